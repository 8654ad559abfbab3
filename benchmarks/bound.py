"""The least time that a micro-batch can take on a device of given rates: what a measured rate is a share of.

Three things cannot be left out, and follow each other: matrix products (at the rate of a large square one), attention
(at the best rate of its kernel), and expanding the 4-bit weights, once in forward and once in backward. Layers that are
recomputed pay for their forward again. Elementwise work, the thinness of the adapters' products, gathers, and the
optimizer are not in it: what they cost is the distance to the bound.

The rates are those of `limits.py`, which are best measured in the same run: on a shared machine they drift.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

BYTES_PER_WEIGHT = 2.516
"""Read and written to expand a weight to bfloat16: 4 bits and its constants in, 2 bytes out."""
KERNEL_OPERATIONS = 14 / 12
"""What a fused attention kernel computes, of what is needed: backward makes the scores again."""


@dataclass(frozen=True)
class Work:
    """What one micro-batch, forward and backward, makes a device do."""

    num_tokens: int
    gemm_flops: float
    attention_flops: float
    """As the kernel computes it: 14 w per pair, see `qlora_dist/model/flops.py` for w."""
    expanded_weights: float
    """4-bit weights, times the passes that need them."""

    def least_seconds(self, limits: Mapping[str, Any]) -> float:
        """On a device of these rates.

        Args:
            limits: what `limits.measure` returns.
        """
        return (
            self.gemm_flops / (limits["gemm_tflops"]["bfloat16"] * 1e12)
            + self.attention_flops / (max(limits["attention_tflops"].values()) * 1e12)
            + self.expanded_weights * BYTES_PER_WEIGHT / (limits["dequantize_gib_per_second"] * 2**30)
        )

    def most_tokens_per_second(self, measured: Sequence[Mapping[str, Any]]) -> float:
        """At the bound, over several measurements of the rates of a machine whose speed drifts."""
        return self.num_tokens * len(measured) / sum(self.least_seconds(limits) for limits in measured)


def work_of(model: nn.Module, rows: int, seq_len: int, num_targets: int, recomputed: float = 0.0) -> Work:
    """The work of one micro-batch of full rows with one sample each.

    Args:
        model: with adapters; may be on meta or in shards.
        num_targets: tokens of the micro-batch that have a target, which alone reach the output head.
        recomputed: share of the layers that compute their forward twice.
    """
    from qlora_dist.model.flops import flops_of
    from qlora_dist.model.nf4 import QuantizedLinear
    from qlora_dist.model.skeleton import base_model

    flops, base, tokens = flops_of(model), base_model(model), rows * seq_len
    pairs = {window: rows * _pairs(seq_len, window) for _, window in flops.attention}
    attention = KERNEL_OPERATIONS * sum(per_pair * pairs[window] for per_pair, window in flops.attention)
    head = base.get_output_embeddings()
    in_head = set() if head is None else set(head.modules())
    layers = [module for module in base.modules() if isinstance(module, nn.Linear) and module not in in_head]
    forward = sum(2 * layer.in_features * layer.out_features for layer in layers)  # per token, adapters included
    quantized = [layer for layer in layers if isinstance(layer, QuantizedLinear)]
    return Work(
        num_tokens=tokens,
        gemm_flops=(flops.per_token + recomputed * forward) * tokens + flops.per_target * num_targets,
        attention_flops=attention * (1 + recomputed * 4 / 14),
        expanded_weights=(2 + recomputed) * sum(layer.in_features * layer.out_features for layer in quantized),
    )


def work_of_folder(folder: Path, adapter_rank: int, rows: int, seq_len: int, num_targets: int) -> Work:
    """`work_of` for a model folder with adapters on all linear layers, of which no weights are read."""
    from qlora_dist.config import AdapterConfig, ModelConfig
    from qlora_dist.model.adapters import add_adapters
    from qlora_dist.model.skeleton import build_skeleton

    skeleton = build_skeleton(folder, ModelConfig(path=str(folder)))
    return work_of(add_adapters(skeleton, AdapterConfig(rank=adapter_rank), "base"), rows, seq_len, num_targets)


def _pairs(seq_len: int, window: int | None) -> int:
    """Pairs of a token and one that it sees, in a row of one sample."""
    return sum(min(place, window or seq_len) for place in range(1, seq_len + 1))
