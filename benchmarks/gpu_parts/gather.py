"""FSDP2 on one GPU, as rank 0 of several: bytes of gathered weights, time and memory.

A process group of one proves nothing: torch then copies parameter by parameter and gathers nothing.
So the group pretends to have more ranks. Its gather repeats this rank's shard at the speed of a
copy in the GPU's memory; its reduce-scatter keeps this rank's part. Copies into and out of the
buffers, streams, prefetching and memory are those of a real rank 0; links are not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from benchmarks import memory
from benchmarks.gpu_parts.models import fill, make_batch
from benchmarks.gpu_parts.steps import GIB, busy, reset_peak, row_of, this_device, timed
from qlora_dist.config.schema import TrainConfig
from qlora_dist.model.adapters import init_adapters
from qlora_dist.model.parts import ModelParts
from qlora_dist.parallel.choice import make_backend
from qlora_dist.train import train_step
from qlora_dist.weights.loading import materialize

STORAGES = (torch.uint8, torch.bfloat16, torch.float16, torch.float32)
_COPIES = 64
"""Repetitions of all 65,536 patterns of two bytes; 8 MiB together."""


def patterns(device: torch.device) -> torch.Tensor:
    """Every pattern of two bytes, and so every bfloat16 and float16, (8 MiB,) uint8."""
    return (
        torch.arange(2**16, dtype=torch.int32)
        .to(torch.int16)
        .view(torch.uint8)
        .repeat(_COPIES)
        .to(device)
    )


def foreach_copies() -> dict[str, Any]:
    """Count the bytes that `torch._foreach_copy_` changes, by storage type.

    FSDP2 copies shards into its buffers with this operator, which is reported to rewrite NaNs of
    bfloat16 on CUDA. Packed 4-bit weights in bfloat16 storage would change silently; integers have
    no NaNs.
    """
    before = patterns(this_device())
    result: dict[str, Any] = {"bytes": before.numel()}
    for dtype in STORAGES:
        source = before.view(dtype)
        copied = torch.empty_like(source)
        torch._foreach_copy_([copied], [source])
        result[str(dtype).removeprefix("torch.")] = num_different(copied, before)
    return result


def num_different(tensor: torch.Tensor, other: torch.Tensor) -> int:
    """Number of bytes in which two tensors differ."""
    return int((_bytes(tensor) != _bytes(other)).sum())


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


class RepeatedGather:
    """Stand-in for an all-gather in which every rank has this rank's shard."""

    def __init__(self) -> None:
        self.num_bytes = 0
        """Bytes written into outputs, this rank's part included."""

    def allocate(
        self, size: tuple[int, ...], *, dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        """Allocate an output."""
        return torch.empty(size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        group: dist.ProcessGroup,
        async_op: bool = False,
    ) -> None:
        """Copy the input, which is the output's first part in memory, over the other parts."""
        parts = output_tensor.view(group.size(), -1)
        parts[1:].copy_(input_tensor.expand(group.size() - 1, -1))
        self.num_bytes += output_tensor.nbytes


class KeptReduceScatter:
    """Stand-in for a reduce-scatter whose sum is this rank's own part."""

    def allocate(
        self, size: tuple[int, ...], *, dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        """Allocate an input or output."""
        return torch.empty(size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> None:
        """Copy the first part."""
        output_tensor.copy_(input_tensor[: output_tensor.numel()])

    def wait(self) -> None:
        """Return at once; nothing is pending."""


def pretended(shape: Mapping[str, int], seq_len: int, rank: int, ranks: int) -> dict[str, Any]:
    """Compare gathered weights with the shards and take optimizer steps, as rank 0 of `ranks`.

    Args:
        rank: the adapters' rank.
        ranks: size of the pretended group.
    """
    with mock.patch.object(memory, "RANK", rank):
        model, runtime = memory.describe(memory.Shape(**shape), ranks, seq_len, "full")
    device = runtime.device
    reset_peak(device)
    materialize(model, device, device)
    fill(model, Path(), device)
    init_adapters(model, 0, "gaussian")
    engine = make_backend("fsdp", TrainConfig(), runtime).engine(ModelParts(model.train()))
    gather, scatter = RepeatedGather(), KeptReduceScatter()
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_custom_all_gather(gather)
            module.set_custom_reduce_scatter(scatter)
    # a CPU's own collectives are replaced as well, and backward must not wait for them
    engine._reductions = None  # type: ignore[attr-defined]
    row = compare_gathered(model, ranks)
    batch = make_batch(shape["vocab"], 1, seq_len)
    reset_peak(device)
    gather.num_bytes = num_steps = 0

    def step() -> float:
        nonlocal num_steps
        num_steps += 1
        return train_step(model, engine, [batch], 1e-4, 1.0, runtime).loss.item()

    steps = row_of(*timed(step, device), batch.num_tokens, device)
    gathered = float(f"{gather.num_bytes / num_steps / GIB:.4g}")
    return {**row, **steps, "gathered_gib_per_step": gathered, "busy": busy(step, device)}


def compare_gathered(model: nn.Module, ranks: int) -> dict[str, int]:
    """Compare each frozen parameter as layers see it with this rank's shard repeated."""
    parts = different = changed = 0
    for unit, owned in _units(model):
        shards = {
            name: param.to_local().clone()
            for name, param in owned.items()
            if isinstance(param, DTensor)
        }
        unit.unshard()
        for name, param in unit.named_parameters():
            if name in shards:
                expected = torch.cat([shards[name]] * ranks)[: param.shape[0]]
                found = num_different(param, expected)
                parts, different, changed = parts + 1, different + (found > 0), changed + found
        unit.reshard()
    return {"gathered_parameters": parts, "that_differ": different, "bytes_that_differ": changed}


def _units(model: nn.Module) -> Iterator[tuple[Any, dict[str, torch.Tensor]]]:
    """Units gathered as a whole, each with the frozen parameters of its own."""
    units = [
        (prefix, module)
        for prefix, module in model.named_modules()
        if isinstance(module, FSDPModule)
    ]
    for prefix, unit in units:
        inner = tuple(
            other[len(prefix) :].lstrip(".") + "."
            for other, _ in units
            if other != prefix and other.startswith(prefix)
        )
        yield (
            unit,
            {
                name: param
                for name, param in unit.named_parameters()
                if not param.requires_grad and not (inner and name.startswith(inner))
            },
        )
