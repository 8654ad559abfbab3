"""Parameter bytes that a rank will hold, exact, from the description of a model alone."""

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
    """Largest unit that is gathered at once, whole; zero when nothing is sharded."""


def plan_footprint(
    model: nn.Module, units: list[nn.Module], num_shards: int, rank: int
) -> Footprint:
    """Compute the footprint of a rank when a meta-device model is cut by rows.

    Args:
        units: modules that are gathered as a whole; parameters in none of them form one more unit.
        num_shards: parts of each parameter.
        rank: number of this rank's part, from 0.
    """
    held = {True: 0, False: 0}  # bytes of trained and of frozen parameters
    for param in model.parameters():
        start, stop = planned_rows(param.shape[0], num_shards, rank)
        size = (stop - start) * math.prod(param.shape[1:]) * param.element_size()
        held[param.requires_grad] += size
    largest_unit = 0
    if num_shards > 1:
        last_unit = sum(p.numel() * p.element_size() for p in parameters_outside(units, model))
        largest_unit = max(last_unit, *map(whole_bytes, units))
    return Footprint(held[False], held[True], largest_unit)


def parameters_outside(units: list[nn.Module], model: nn.Module) -> list[nn.Parameter]:
    """List the parameters of a model that are in none of these modules."""
    # By identity: comparing tensors compares their elements.
    inside = {id(param) for unit in units for param in unit.parameters()}
    return [param for param in model.parameters() if id(param) not in inside]


def check_memory(footprint: Footprint, device: torch.device, num_ranks_here: int) -> None:
    """Refuse a model that cannot fit, before any weight is read.

    Args:
        device: device of the shards.
        num_ranks_here: processes that share its memory: those of this node on the CPU, one on a
            GPU.

    Raises:
        ModelError: naming the needed and the free bytes.
    """
    need = footprint.base + footprint.adapters + footprint.largest_unit
    free = free_bytes(device)
    if need * num_ranks_here <= free:
        return
    each = f" for each of the {num_ranks_here} processes here" if num_ranks_here > 1 else ""
    raise ModelError(
        f"the model needs {need / GIB:,.1f} GiB{each} ({footprint.base / GIB:,.1f} of base, "
        f"{footprint.adapters / GIB:,.1f} of adapters, {footprint.largest_unit / GIB:,.1f} for one "
        f"gathered layer) before any activation, but {device.type} memory has "
        f"{free / GIB:,.1f} GiB free. Use more GPUs with parallel.backend: fsdp, a smaller model, "
        "or on GPUs parallel.cpu_offload: true."
    )
