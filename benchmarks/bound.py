"""Lower bound on a step's time on this device: arithmetic and traffic no implementation avoids.

    seconds >= F / f + D / d + (L + E) / c

F   floating-point operations, counted as in `qlora_dist/model/mfu.py`: 4 P per token for the frozen
    linear layers, 12 w per attended pair and layer, 4 d V per target token for the output head.
    f: operations per second of a large matrix product on this device.
D   bytes that dequantization reads and writes: 0.516 + b per weight and pass. There are two passes,
    one in forward and one for the gradient of the input.
    d: bytes per second of bitsandbytes' dequantization kernel on this device.
L   bytes that LoRA moves. Its products are thin, so memory traffic bounds their time. Per token and
    layer, x (in) is read for A x and for dA, and the gradient (out) for g B and for dB. The output
    (out) and dx (in) are read and written again when the adapter's part is added. The sum is
    4 (in + out) elements. Where 6 P_lora / f takes longer, that time counts instead.
E   bytes that elementwise work moves if each operation is one kernel. In elements per token and
    layer, forward: 8 d for two residual additions with their norms, 2 (d + kv) for the rotary
    embedding, 3 i for the product of the MLP's two halves; backward: 8 d, 2 (d + kv) and 5 i.
    d: hidden width, kv: width of the keys, i: intermediate width of the MLP.
c   bytes per second of a copy on this device, reads and writes counted.

Every tensor has the compute type, of b bytes: 2 for bfloat16, 4 for float32.

Each recomputed layer adds a forward: 2 P, 4 w, one dequantization pass, and its share of E and L.
The bound leaves out softmax, the loss beyond its products, the optimizer and kernel launches, so no
step can be faster.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import nn

from benchmarks.limits import copy_gib_per_second, dequantize_gib_per_second, gemm_tflops
from qlora_dist.config.schema import AdapterConfig, ModelConfig
from qlora_dist.data.batch import MicroBatch
from qlora_dist.model.adapters import add_adapters, lora_layers
from qlora_dist.model.mfu import flops_of
from qlora_dist.model.nf4 import QuantizedLinear
from qlora_dist.model.parts import ModelParts, base_model
from qlora_dist.model.skeleton import build_skeleton

GIB = 2**30


@dataclass(frozen=True)
class Rates:
    """Measured rates of a device, per second."""

    flops: float
    dequantized_bytes: float
    copied_bytes: float
    element_bytes: int = 2
    """Bytes per element of the compute type that was measured."""

    @classmethod
    def of(cls, limits: Mapping[str, Any], dtype: str = "bfloat16") -> Rates:
        """Convert a result of `limits.measure`.

        Args:
            limits: the result.
            dtype: the compute type, `bfloat16` or `float32`.
        """
        dequantized = {
            "bfloat16": "dequantize_gib_per_second",
            "float32": "dequantize_float32_gib_per_second",
        }
        return cls(
            flops=limits["gemm_tflops"][dtype] * 1e12,
            dequantized_bytes=limits[dequantized[dtype]] * GIB,
            copied_bytes=limits["copy_gib_per_second"] * GIB,
            element_bytes={"bfloat16": 2, "float32": 4}[dtype],
        )


@cache
def measured_rates(device: torch.device) -> Rates:
    """Measure the rates of a device, once per process; takes some seconds.

    On a GPU the matrices exceed its cache.
    """
    is_gpu = device.type == "cuda"
    size = 8192 if is_gpu else 512
    rates = Rates(
        flops=gemm_tflops(size, size, size, torch.bfloat16, device) * 1e12,
        dequantized_bytes=dequantize_gib_per_second(2 * size, device) * GIB,
        copied_bytes=copy_gib_per_second(2**30 if is_gpu else 2**25, device) * GIB,
    )
    if is_gpu:
        torch.cuda.empty_cache()
    return rates


def bound_seconds(
    model: nn.Module, batch: MicroBatch, rates: Rates, recomputed_share: float = 0.0
) -> float:
    """Lower bound on the seconds of a step on one micro-batch.

    Args:
        recomputed_share: share of the layers that compute their forward twice.
    """
    config = base_model(model).config.get_text_config()
    num_weights = sum(
        m.in_features * m.out_features for m in model.modules() if isinstance(m, QuantizedLinear)
    )
    lora = [(layer.in_features, layer.out_features, _rank(layer)) for layer in lora_layers(model)]
    kv = config.hidden_size * config.num_key_value_heads // config.num_attention_heads
    tokens = batch.num_tokens
    forwards = 1 + recomputed_share

    flops = flops_of(ModelParts(model))
    frozen = flops.of(batch.attention_mask, batch.position_ids, tokens, batch.num_targets)
    lora_flops = 6 * tokens * sum(rank * (inner + outer) for inner, outer, rank in lora)
    linear, head = 4 * num_weights * tokens, flops.per_target * batch.num_targets
    pairs = frozen - lora_flops - linear - head  # 12 w for each: 4 w of them forward
    arithmetic = (linear / 2 + pairs / 3) * forwards + linear / 2 + pairs * 2 / 3 + head

    element = rates.element_bytes
    dequantized = (0.516 + element) * num_weights * (1 + forwards)
    rotated = 2 * (config.hidden_size + kv)
    elementwise_forward = 8 * config.hidden_size + rotated + 3 * config.intermediate_size
    elementwise_backward = 8 * config.hidden_size + rotated + 5 * config.intermediate_size
    elementwise = (
        tokens
        * config.num_hidden_layers
        * (elementwise_forward * forwards + elementwise_backward)
        * element
    )
    # forward: read x, read and write the output; the rest belongs to backward
    lora_elements = sum(
        (inner + 2 * outer) * forwards + 3 * inner + 2 * outer for inner, outer, _ in lora
    )
    lora_seconds = max(
        tokens * lora_elements * element / rates.copied_bytes, lora_flops / rates.flops
    )
    return (
        arithmetic / rates.flops
        + dequantized / rates.dequantized_bytes
        + lora_seconds
        + elementwise / rates.copied_bytes
    )


def most_tokens_per_second(
    folder: Path,
    adapter_rank: int,
    rows: int,
    seq_len: int,
    num_targets: int,
    measured: Sequence[Mapping[str, Any]],
    dtype: str = "bfloat16",
) -> float:
    """Upper bound on tokens/s for full rows and adapters on all linear layers; reads no weights.

    Args:
        folder: the model's folder; only its `config.json` is read.
        measured: results of `limits.measure`; several results average the drift of the machine's
            speed.
        dtype: the compute type.
    """
    skeleton = build_skeleton(folder, ModelConfig(path=str(folder)))
    model = add_adapters(skeleton, AdapterConfig(rank=adapter_rank), "base")
    ids = torch.zeros(rows, seq_len, dtype=torch.int64)
    batch = MicroBatch(
        ids, torch.ones_like(ids), ids, None, num_tokens=ids.numel(), num_targets=num_targets
    )
    return ids.numel() / mean(
        bound_seconds(model, batch, Rates.of(limits, dtype)) for limits in measured
    )


def arithmetic_seconds(model: nn.Module, batch: MicroBatch, rates: Rates) -> float:
    """Seconds of the useful operations alone.

    Their share of a step is the model FLOPs utilization.
    """
    useful = flops_of(ModelParts(model)).of(
        batch.attention_mask, batch.position_ids, batch.num_tokens, batch.num_targets
    )
    return useful / rates.flops


def _rank(layer: nn.Module) -> int:
    return int(next(iter(layer.r.values())))
