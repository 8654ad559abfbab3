"""What a rank will hold of a model, exact to the byte, from its description alone."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from qlora_dist.errors import ModelError
from qlora_dist.model.shards import planned_rows, whole_bytes

GIB = 2**30

_VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_VERSION_2 = ("memory.max", "memory.current", "inactive_file")
"""Files of a control group with its limit and what it uses, and what `memory.stat` calls its untouched cache."""


@dataclass(frozen=True)
class Footprint:
    """Bytes of parameters on one rank."""

    base: int
    """Frozen weights and quantisation constants of this rank's shard."""
    adapters: int
    """Trainable parameters of this rank's shard, gradients and optimizer state not included."""
    largest_unit: int
    """The largest unit that is gathered at once, whole; zero when nothing is sharded."""


def plan_footprint(model: nn.Module, units: list[nn.Module], num_shards: int, rank: int) -> Footprint:
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


def total_bytes(device: torch.device) -> int:
    """All memory of a GPU, or of this machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def free_bytes(device: torch.device) -> int:
    """Memory that can still be allocated on `device`; on the host, within this process's control groups."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for line in _lines(Path("/proc/meminfo")):  # counts reclaimable cache as free, which sysconf does not
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
    return min([free, *free_in_control_groups(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))])


def free_in_control_groups(membership: Path, mount: Path) -> list[int]:
    """Bytes that each control group around this process still allows, where it has a limit: a container's, a job's.

    Cached files that nobody has touched lately count as free, as in the kubelet's working set: the kernel drops them
    before it refuses memory, and a model that was just read leaves gigabytes of them.

    Args:
        membership: lists the groups of the process, as /proc/self/cgroup does (man 7 cgroups).
        mount: where the control groups are, of version 1 or 2.
    """
    free = []
    for line in _lines(membership):
        _, controllers, group = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root = mount / "memory" if controllers else mount
        limit_name, used_name, cached_name = _VERSION_1 if controllers else _VERSION_2
        folder = root / group.lstrip("/")
        for each in (folder, *folder.parents):
            limit, used = _lines(each / limit_name), _lines(each / used_name)
            if limit and used and limit[0].isdigit():  # or "max"
                stat = dict(entry.split(maxsplit=1) for entry in _lines(each / "memory.stat"))
                free.append(max(0, int(limit[0]) - int(used[0]) + int(stat.get(cached_name, 0))))
            if each == root:
                break
    return free


def _largest_unit(model: nn.Module, units: list[nn.Module]) -> int:
    return max([*map(whole_bytes, units), sum(p.numel() * p.element_size() for p in parameters_outside(units, model))])


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
