"""The arithmetic that a step of training needs, counted from the model's dimensions and the samples' lengths.

Per token: 4 P + 6 P_lora, where P are the parameters of the frozen linear layers (2 P forward, 2 P for the gradient of
their inputs; their own is not computed) and P_lora those of the adapters. Per target token: 4 d V for the frozen output
head, which sees no others. Per pair of a token and one that it attends to, and layer: 12 w, where w is the number of
heads times their width (two products forward, four backward, 2 w each). The rule is that of PaLM
(https://arxiv.org/abs/2204.02311, appendix B), without the gradients of frozen weights.

What a run computes for its own convenience is not useful work and not counted: recomputed activations, padding,
dequantization, the products that a fused attention kernel repeats in backward. Elementwise work is not counted either.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cache

import torch
from torch import nn

from qlora_dist.model.parts import ModelParts
from qlora_dist.runtime.processes import Runtime


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of forward and backward."""

    per_token: int
    per_target: int
    attention: tuple[tuple[int, int | None], ...]
    """Of each layer with attention: operations per attended pair, and the window outside of which nothing is seen."""

    def of(
        self,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor | None,
        num_tokens: int,
        num_targets: int,
    ) -> int:
        """Operations that a micro-batch needs.

        Args:
            attention_mask: (batch, seq_len) int64, 1 for real tokens.
            position_ids: (batch, seq_len) int64 of packed rows, from 0 in each sample; else None.
            num_tokens: none when the only token stands in for an empty batch.
        """
        if num_tokens == 0:
            return 0
        windows = {window for _, window in self.attention}
        pairs = {
            window: _attended_pairs(attention_mask, position_ids, window) for window in windows
        }
        attention = sum(per_pair * pairs[window] for per_pair, window in self.attention)
        return self.per_token * num_tokens + self.per_target * num_targets + attention


def flops_of(parts: ModelParts) -> Flops:
    """Count the linear layers of an adapted model, which may be on meta or in shards."""
    in_head = set() if parts.head is None else set(parts.head.modules())
    per_token = per_target = 0
    for name, module in parts.base.named_modules():
        if isinstance(module, nn.Linear):
            operations = (6 if ".lora_" in name else 4) * module.in_features * module.out_features
            if module in in_head:
                per_target += operations
            else:
                per_token += operations
    return Flops(per_token, per_target, _attention_of(parts.dimensions))


def _attention_of(config: object) -> tuple[tuple[int, int | None], ...]:
    """From a transformers config. Layers that are neither full nor sliding attention (recurrent ones) have no pairs."""
    heads, layers = config.num_attention_heads, config.num_hidden_layers  # type: ignore[attr-defined]
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads  # type: ignore[attr-defined]
    window = getattr(config, "sliding_window", None)
    usual = "full_attention" if window is None else "sliding_attention"
    windows = {"full_attention": None, "sliding_attention": window}
    types = getattr(config, "layer_types", None) or [usual] * layers
    return tuple((12 * heads * head_dim, windows[kind]) for kind in types if kind in windows)


def _attended_pairs(
    attention_mask: torch.Tensor, position_ids: torch.Tensor | None, window: int | None
) -> int:
    """Pairs of a real token and one that it sees: itself, and those before it in its sample, within the window."""
    if position_ids is None:
        position_ids = torch.arange(
            attention_mask.shape[1], device=attention_mask.device
        ).expand_as(attention_mask)
    seen = position_ids + 1 if window is None else (position_ids + 1).clamp(max=window)
    return int((seen * attention_mask).sum())


_BUDGET_SECONDS = 0.1


def peak_flops(runtime: Runtime) -> float:
    """Floating-point operations per second of all ranks together, measured by all at once; a collective."""
    runtime.barrier()
    mine = torch.tensor(matmul_flops(runtime.device, runtime.compute_dtype), device=runtime.device)
    return runtime.sum_over_ranks(mine).item()


@cache
def matmul_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a large square matrix product, with the process's threads.

    The quickest of at least five within 0.1 s: on a machine that others use as well, the median would be their mood.
    """
    size = 8192 if device.type == "cuda" else 512
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    seconds: list[float] = []
    while len(seconds) < 5 or sum(seconds) < _BUDGET_SECONDS:
        started = time.perf_counter()
        left @ right
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / min(seconds)
