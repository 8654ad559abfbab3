"""Logits: what a model makes of its head's output, asked of the model itself, since each family has code of its own."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from qlora_dist.model.parts import base_model


@dataclass(frozen=True)
class LogitsTransform:
    """What a model makes of the output z of its head: scale * z, or cap * tanh(scale * z / cap)."""

    scale: float = 1.0
    """Cohere, Granite and others multiply or divide their logits."""
    cap: float | None = None
    """Soft-capping, Gemma 2 (https://arxiv.org/abs/2408.00118, section 2)."""

    def __call__(self, raw: torch.Tensor) -> torch.Tensor:
        """Logits of what the head returned, elementwise; in float32 unless nothing is done to them."""
        if self == LogitsTransform():
            return raw
        logits = raw.float() * self.scale
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)

    def times_slope(self, gradient: torch.Tensor, raw: torch.Tensor) -> torch.Tensor:
        """Gradient of what the head returned, from that of the logits, in place."""
        if self.cap is not None:
            gradient.mul_(1 - torch.tanh(raw.float() * (self.scale / self.cap)) ** 2)
        return gradient if self.scale == 1 else gradient.mul_(self.scale)


# --------------------------------------------------------------------------------------------------------------------
# What the model does with its head: asked of the model itself, since each family has code of its own for it.

_forms: WeakKeyDictionary[nn.Module, LogitsTransform | None] = WeakKeyDictionary()
_PROBE_LENGTH = 4


def logits_transform(model: nn.Module) -> LogitsTransform | None:
    """What this model makes of its head's output, or None when that is something else; all ranks ask together.

    The first time, a forward of a few tokens is run in which the head answers with given values. Scale and cap are read
    off the logits that come out, and must account for all of them.
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
    seen: list[
        tuple[Any, torch.Tensor]
    ] = []  # (shape of the hidden states, values given in place of logits)

    def answer(_: nn.Module, inputs: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        seen.append((inputs[0].shape[:-1] if inputs else None, _probe_values(output)))
        return seen[-1][1]

    hook = head.register_forward_hook(answer)
    was_training = model.training
    model.eval()
    ids = torch.arange(_PROBE_LENGTH, device=_device(model)).unsqueeze(0)
    try:
        found = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    finally:
        hook.remove()
        model.train(was_training)
    if len(seen) != 1 or seen[0][0] != ids.shape or seen[0][1].shape != found.shape:
        return None
    return _transform_between(seen[0][1], found)


_PROBE_EXTREMES = (1.0, 1e6, 1e7)


def _probe_values(like: torch.Tensor) -> torch.Tensor:
    """Float32 values from small to large, different in each row; the first ones of the first row are landmarks."""
    values = torch.linspace(-300, 300, like.numel(), device=like.device).roll(like.shape[-1] // 2)
    values[: len(_PROBE_EXTREMES)] = values.new_tensor(_PROBE_EXTREMES)[: len(values)]
    return values.reshape(like.shape)


def _transform_between(given: torch.Tensor, found: torch.Tensor) -> LogitsTransform | None:
    """The form that makes `found` of `given`."""
    one, large, larger = found.flatten()[: len(_PROBE_EXTREMES)].tolist()
    form = LogitsTransform(scale=one)
    if large == larger > abs(one):  # so far out that tanh is 1
        scale = large * math.atanh(one / large)
        form = LogitsTransform(scale=1.0 if abs(scale - 1) < 1e-6 else scale, cap=large)
    is_form = torch.allclose(form(given), found.float(), rtol=1e-5, atol=1e-5)
    return form if is_form else None


def _device(model: nn.Module) -> torch.device:
    """Where the model runs; its buffers are never offloaded."""
    return next((tensor.device for tensor in model.buffers()), next(model.parameters()).device)


HALF_GAIN = 2.0**8
"""Gradients of logits are multiplied by it in float16, which would lose those below 6e-8, and what the head makes of
them is divided by it."""


def to_gradient(
    p: torch.Tensor, targets: torch.Tensor, raw: torch.Tensor, form: LogitsTransform
) -> None:
    """Probabilities (rows, vocab) float32, used up, to the gradient of what the head returned, in the place of that."""
    gradient = p.scatter_add_(1, targets, torch.full_like(targets, -1, dtype=torch.float32))
    gradient = form.times_slope(gradient, raw)
    raw.copy_(gradient.mul_(HALF_GAIN) if raw.dtype == torch.float16 else gradient)
