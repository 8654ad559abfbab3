"""Free, held and peak memory of a process."""

from __future__ import annotations

import os
import resource
import sys
from contextlib import suppress
from pathlib import Path

import torch

from qlora_dist.runtime.processes import Runtime

GIB = 2**30


def memory_limit(budget_gib: float | None, meter: MemoryMeter, runtime: Runtime) -> int:
    """Bytes that this rank may take at its peak, what it holds already included."""
    num_ranks = runtime.local_world_size if runtime.device.type == "cpu" else 1
    limit = meter.held() + (free_bytes(runtime.device) + meter.unused()) // num_ranks
    return limit if budget_gib is None else min(limit, int(budget_gib * GIB))


class MemoryMeter:
    """Memory of this process: allocated on its GPU, or resident on the host when it has none."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def held(self) -> int:
        """Bytes now."""
        if self._device.type == "cuda":
            return torch.cuda.memory_allocated(self._device)
        return _status("VmRSS")

    def unused(self) -> int:
        """Bytes that the allocator has taken from the device and not given to anybody."""
        if self._device.type == "cuda":
            return torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(
                self._device
            )
        return 0

    def restart(self) -> None:
        """Look for the peak from here on."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            return
        with suppress(
            OSError
        ):  # not allowed in every container: the peak is then that of the whole life
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")

    def num_retries(self) -> int:
        """Allocations that succeeded only after cached memory was given back; zero without a GPU."""
        if self._device.type == "cuda":
            return int(torch.cuda.memory_stats(self._device).get("num_alloc_retries", 0))
        return 0

    def peak(self) -> int:
        """Most bytes since the restart."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return _status("VmHWM") or _highest_resident()


def _highest_resident() -> int:
    """Most resident bytes of this process in its life, where there is no /proc."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, others KiB


def _status(key: str) -> int:
    """A line of /proc/self/status, in bytes; zero where there is no such file."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")), 0)


_VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_VERSION_2 = ("memory.max", "memory.current", "inactive_file")
"""Files of a control group with its limit and what it uses, and what `memory.stat` calls its untouched cache."""


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
    for line in _lines(
        Path("/proc/meminfo")
    ):  # counts reclaimable cache as free, which sysconf does not
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


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
