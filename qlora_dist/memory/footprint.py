"""What a rank will hold of a model, exact to the byte, from its description alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from qlora_dist.errors import ModelError
from qlora_dist.runtime.memory import GIB, free_bytes
from qlora_dist.runtime.shards import planned_rows, whole_bytes


@dataclass(frozen=True)
class Footprint:
    """Bytes of parameters on one rank."""

    base: int
    """Frozen weights and quantization constants of this rank's shard."""
    adapters: int
    """Trainable parameters of this rank's shard, gradients and optimizer state not included."""
    largest_unit: int
    """The largest unit that is gathered at once, whole; zero when nothing is sharded."""


def plan_footprint(
    model: nn.Module, units: list[nn.Module], num_shards: int, rank: int
) -> Footprint:
    """The footprint of rank `rank` when each parameter of a meta-device model is cut into `num_shards` by rows.

    Args:
        units: modules that are gathered as a whole; what is in none of them forms one more unit.
    """
    base = adapters = 0
    for param in model.parameters():
        start, stop = planned_rows(param.shape[0], num_shards, rank)
        size = (stop - start) * math.prod(param.shape[1:]) * param.element_size()
        if param.requires_grad:
            adapters += size
        else:
            base += size
    return Footprint(base, adapters, _largest_unit(model, units) if num_shards > 1 else 0)


def parameters_outside(units: list[nn.Module], model: nn.Module) -> list[nn.Parameter]:
    """The parameters of a model that are in none of these modules."""
    inside = {id(param) for unit in units for param in unit.parameters()}
    return [param for param in model.parameters() if id(param) not in inside]


def check_memory(footprint: Footprint, device: torch.device, num_ranks_here: int) -> None:
    """Refuse a model that cannot fit, before anything is read.

    Args:
        device: where the shards will live.
        num_ranks_here: processes that share that memory: those of this node on the CPU, one on a GPU.

    Raises:
        ModelError: with what is needed and what is free.
    """
    need = footprint.base + footprint.adapters + footprint.largest_unit
    free = free_bytes(device)
    if need * num_ranks_here <= free:
        return
    each = f" for each of the {num_ranks_here} processes here" if num_ranks_here > 1 else ""
    raise ModelError(
        f"the model needs {need / GIB:,.1f} GiB{each} ({footprint.base / GIB:,.1f} of base, "
        f"{footprint.adapters / GIB:,.1f} of adapters, {footprint.largest_unit / GIB:,.1f} for one gathered layer) "
        f"before any activation, but {device.type} memory has {free / GIB:,.1f} GiB free. Use more GPUs with "
        "parallel.backend: fsdp, a smaller model, or on GPUs parallel.cpu_offload: true."
    )


def _largest_unit(model: nn.Module, units: list[nn.Module]) -> int:
    return max(
        [
            *map(whole_bytes, units),
            sum(p.numel() * p.element_size() for p in parameters_outside(units, model)),
        ]
    )
