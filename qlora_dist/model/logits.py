"""Logits: the transform between a head's output and its logits, found by running the model."""

# Tested by tests/unit/model/test_loss.py.

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import chain
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from qlora_dist.model.parts import base_model


@dataclass(frozen=True)
class LogitsTransform:
    """Logits of a head's output z: scale * z, or cap * tanh(scale * z / cap)."""

    scale: float = 1.0
    """Cohere, Granite and others multiply or divide their logits."""
    cap: float | None = None
    """Soft-capping, Gemma 2 (https://arxiv.org/abs/2408.00118, section 2)."""

    def __call__(self, raw: Tensor) -> Tensor:
        """Return the logits of a head's output, elementwise.

        In float32, except that a transform that changes nothing returns `raw` itself.
        """
        if self == LogitsTransform():
            return raw
        logits = raw.float() * self.scale
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)

    def times_slope(self, gradient: Tensor, raw: Tensor) -> Tensor:
        """Turn a gradient of the logits into that of the head's output `raw`, in place."""
        if self.cap is not None:
            gradient.mul_(1 - torch.tanh(raw.float() * (self.scale / self.cap)) ** 2)
        return gradient if self.scale == 1 else gradient.mul_(self.scale)


# --------------------------------------------------------------------------------------------------
# Each family has its own code behind the head, so a model's transform is read off its results.

_forms: WeakKeyDictionary[nn.Module, LogitsTransform | None] = WeakKeyDictionary()


def logits_transform(model: nn.Module) -> LogitsTransform | None:
    """Return the transform behind a model's head; a collective.

    The first call runs a forward of a few tokens in which the head answers with given values. Scale
    and cap are read off the logits that come out, and must account for all of them.

    Returns:
        None if the model computes its logits in some other way.
    """
    base = base_model(model)
    if base not in _forms:
        _forms[base] = _probe_head(model)
    return _forms[base]


@torch.no_grad()
def _probe_head(model: nn.Module) -> LogitsTransform | None:
    head = base_model(model).get_output_embeddings()
    if head is None:
        return None
    seen: list[tuple[Any, Tensor]] = []  # (batch and length of the hidden states, values given)

    def answer(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        seen.append((inputs[0].shape[:-1] if inputs else None, _probe_values(output)))
        return seen[-1][1]

    hook = head.register_forward_hook(answer)
    was_training = model.training
    model.eval()
    # Buffers come first: they are never offloaded, so they are where the model runs.
    device = next(chain(model.buffers(), model.parameters())).device
    ids = torch.arange(4, device=device).unsqueeze(0)  # (1, 4)
    try:
        found = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    finally:
        hook.remove()
        model.train(was_training)
    if len(seen) != 1 or seen[0][0] != ids.shape or seen[0][1].shape != found.shape:
        return None
    return _transform_between(seen[0][1], found)


_PROBE_EXTREMES = (1.0, 1e6, 1e7)


def _probe_values(like: Tensor) -> Tensor:
    """Float32 values from small to large, different in each row, after `_PROBE_EXTREMES`."""
    values = torch.linspace(-300, 300, like.numel(), device=like.device).roll(like.shape[-1] // 2)
    values[: len(_PROBE_EXTREMES)] = values.new_tensor(_PROBE_EXTREMES)[: len(values)]
    return values.reshape(like.shape)


def _transform_between(given: Tensor, found: Tensor) -> LogitsTransform | None:
    """Return the transform from the values `given` to the logits `found`, if there is one."""
    one, large, larger = found.flatten()[: len(_PROBE_EXTREMES)].tolist()
    form = LogitsTransform(scale=one)
    if large == larger > abs(one):  # capped: so far out, tanh is 1
        scale = large * math.atanh(one / large)
        form = LogitsTransform(scale=1.0 if abs(scale - 1) < 1e-6 else scale, cap=large)
    return form if torch.allclose(form(given), found.float(), rtol=1e-5, atol=1e-5) else None


HALF_GAIN = 2.0**8
"""Factor of the gradients of logits in float16, which would lose those below 6e-8.

Gradients behind the head are divided by it.
"""


def to_gradient(p: Tensor, targets: Tensor, raw: Tensor, form: LogitsTransform) -> None:
    """Overwrite the head's output `raw` with its gradient.

    Args:
        p: probabilities, (rows, vocab) float32; overwritten.
        targets: (rows, 1) int64.
        raw: (rows, vocab).
    """
    # d loss / d logits = p - onehot(target)
    gradient = p.scatter_add_(1, targets, torch.full_like(targets, -1, dtype=torch.float32))
    gradient = form.times_slope(gradient, raw)
    raw.copy_(gradient.mul_(HALF_GAIN) if raw.dtype == torch.float16 else gradient)
