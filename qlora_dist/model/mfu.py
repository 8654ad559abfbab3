"""Useful arithmetic of a training step, counted from dimensions and the samples' lengths.

Per token: 4 P + 6 P_lora. P are the parameters of the frozen linear layers (2 P forward, 2 P for
the gradient of their inputs; their own is not computed), P_lora those of the adapters. Per target
token: 4 d V for the frozen output head, which sees no other tokens. Per layer, and pair of a token
and a token that it attends to: 12 w, where w is the number of heads times their width (two products
forward, four backward, 2 w each). The rule is that of PaLM (https://arxiv.org/abs/2204.02311,
appendix B), without the gradients of frozen weights.

Work that a run does for its own convenience is not counted: recomputed activations, padding,
dequantization, the products that a fused attention kernel repeats in backward. Nor is elementwise
work.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from qlora_dist.model.experts import StackAdapter, expert_stacks, experts_per_token
from qlora_dist.model.parts import ModelParts
from qlora_dist.runtime.processes import Runtime
from qlora_dist.runtime.shards import whole_shape

_ATTENTION_OUTPUTS = ("o_proj", "out_proj", "dense", "c_proj", "wo")
"""Names of the projection that takes the concatenated heads."""


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of forward and backward."""

    per_token: int
    per_target: int
    attention: tuple[tuple[int, int | None], ...]
    """For each layer with attention: operations per attended pair, and the window of tokens that
    a token sees."""

    def of(
        self, attention_mask: Tensor, position_ids: Tensor | None, num_tokens: int, num_targets: int
    ) -> int:
        """Return the operations that a micro-batch needs.

        Args:
            attention_mask: (batch, seq_len) int64, 1 for real tokens.
            position_ids: (batch, seq_len) int64 of packed rows, from 0 in each sample; else None.
            num_tokens: 0 for an empty batch, whose only token is a stand-in.
        """
        if num_tokens == 0:
            return 0
        windows = {window for _, window in self.attention}
        pairs = {w: _attended_pairs(attention_mask, position_ids, w) for w in windows}
        attention = sum(per_pair * pairs[window] for per_pair, window in self.attention)
        return self.per_token * num_tokens + self.per_target * num_targets + attention


def flops_of(parts: ModelParts) -> Flops:
    """Count the linear layers of an adapted model, which may be on meta or in shards."""
    in_head = set() if parts.head is None else set(parts.head.modules())
    per_token, per_target = _of_experts(parts), 0
    adapters = (one for one in parts.base.modules() if isinstance(one, StackAdapter))
    of_experts = {module for adapter in adapters for module in adapter.modules()}
    for name, module in parts.base.named_modules():
        if isinstance(module, nn.Linear) and module not in of_experts:
            operations = (6 if ".lora_" in name else 4) * module.in_features * module.out_features
            if module in in_head:
                per_target += operations
            else:
                per_token += operations
    return Flops(per_token, per_target, _attention_of(parts))


def _of_experts(parts: ModelParts) -> int:
    """Return the operations per token of routed experts and their adapters.

    A token goes through some of them only.
    """
    num_active = experts_per_token(parts.dimensions)
    operations = sum(4 * stack.shape[1:].numel() for stack in expert_stacks(parts.base).values())
    for adapter in parts.base.modules():
        if isinstance(adapter, StackAdapter):
            matrices = (*adapter.lora_A.parameters(), *adapter.lora_B.parameters())
            stack = adapter.get_param()
            operations += sum(6 * whole_shape(one).numel() // stack.shape[0] for one in matrices)
    return num_active * operations


def _attention_of(parts: ModelParts) -> tuple[tuple[int, int | None], ...]:
    """Return `Flops.attention` of a model: widths by its modules, windows by its configuration."""
    config = parts.dimensions
    window = getattr(config, "sliding_window", None)
    usual = "full_attention" if window is None else "sliding_attention"
    chunk = getattr(config, "attention_chunk_size", None)
    windows = {
        "full_attention": None,
        "sliding_attention": window,
        "chunked_attention": chunk,
        "attention": None,
        "hybrid": None,
    }
    types = getattr(config, "layer_types", None) or [usual] * len(parts.layers)
    # Layers of all other types, such as recurrent ones, have no pairs.
    return tuple(
        (12 * width, windows[kind])
        for layer, kind in zip(parts.layers, types, strict=False)
        if kind in windows and (width := _attention_width(layer, config))
    )


def _attention_width(layer: nn.Module, config: Any) -> int:
    """Return the number of heads times their width in a decoder layer; 0 without attention."""
    attention = [module for module in layer.modules() if "Attention" in type(module).__name__]
    for module in attention:
        for name, child in module.named_children():
            width = getattr(child, "in_features", None)
            if name in _ATTENTION_OUTPUTS and isinstance(width, int):
                return width
    heads = getattr(config, "num_attention_heads", None)
    if not attention or not isinstance(heads, int):
        return 0
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return int(heads * head_dim)


def _attended_pairs(mask: Tensor, position_ids: Tensor | None, window: int | None) -> int:
    """Pairs of a real token and a token that it sees: from its sample and window, up to itself."""
    if position_ids is None:
        position_ids = torch.arange(mask.shape[1], device=mask.device)
    seen = position_ids + 1 if window is None else (position_ids + 1).clamp(max=window)
    return int((seen * mask).sum())


def peak_flops(runtime: Runtime) -> float:
    """Measure the floating-point operations per second of all ranks together; a collective."""
    runtime.barrier()  # ranks of a machine share its cores: all measure at once
    mine = torch.tensor(matmul_flops(runtime.device, runtime.compute_dtype), device=runtime.device)
    return runtime.sum_over_ranks(mine).item()


@cache
def matmul_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the operations per second of a large square product, with the process's threads.

    Best of at least five runs in 0.1 s; on a shared machine the median measures the neighbors.
    """
    size = 8192 if device.type == "cuda" else 512
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    seconds: list[float] = []
    while len(seconds) < 5 or sum(seconds) < 0.1:
        started = time.perf_counter()
        left @ right
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / min(seconds)
