"""Free, held and peak memory of a process."""

# Tested by tests/unit/memory/test_footprint.py and tests/unit/memory/test_auto.py.

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
    """Return how many bytes this rank may hold at its peak, including those that it holds now."""
    # Ranks on one host share its memory.
    num_ranks = runtime.local_world_size if runtime.device.type == "cpu" else 1
    limit = meter.held() + (free_bytes(runtime.device) + meter.unused()) // num_ranks
    return limit if budget_gib is None else min(limit, int(budget_gib * GIB))


class MemoryMeter:
    """Meter of this process's memory: allocated on its GPU, or resident on the host without one."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def held(self) -> int:
        """Return the bytes held now."""
        if self._device.type == "cuda":
            return torch.cuda.memory_allocated(self._device)
        return _kib("/proc/self/status", "VmRSS")

    def unused(self) -> int:
        """Return the bytes that the allocator keeps reserved but has given to no tensor."""
        if self._device.type == "cuda":
            return torch.cuda.memory_reserved(self._device) - self.held()
        return 0

    def restart(self) -> None:
        """Start a new measurement of the peak."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            return
        # 5 resets VmHWM (man 5 proc). Where a container forbids that, the old peak stays.
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")

    def num_retries(self) -> int:
        """Return how many allocations succeeded only once cached memory was freed; 0 on a CPU."""
        if self._device.type == "cuda":
            return int(torch.cuda.memory_stats(self._device).get("num_alloc_retries", 0))
        return 0

    def peak(self) -> int:
        """Return the highest number of bytes since the restart."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        if peak := _kib("/proc/self/status", "VmHWM"):
            return peak
        # No /proc: the peak of the whole life. macOS counts bytes, others KiB.
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _kib(file: str, key: str) -> int:
    """Return in bytes the line `KEY: 123 kB` of a file in /proc; zero if there is no such line."""
    lines = (line.split() for line in _lines(Path(file)) if line.startswith(f"{key}:"))
    return next((int(words[1]) * 1024 for words in lines), 0)


_VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_VERSION_2 = ("memory.max", "memory.current", "inactive_file")
"""Files of a control group with its limit and its use, and the entry of `memory.stat` for cached
files that nobody has touched lately."""


def total_bytes(device: torch.device) -> int:
    """Return the bytes of a GPU's whole memory, or of this machine's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def free_bytes(device: torch.device) -> int:
    """Return the bytes that can still be allocated; on the host, within its control groups."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    # MemAvailable counts reclaimable cache as free, which sysconf does not.
    free = _kib("/proc/meminfo", "MemAvailable")
    free = free or os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([free, *free_in_control_groups(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))])


def free_in_control_groups(membership: Path, mount: Path) -> list[int]:
    """Return the bytes that each control group of this process with a limit still allows.

    Such groups are those of a container or of a job.

    Args:
        membership: file that lists the groups of the process, as /proc/self/cgroup does
            (man 7 cgroups).
        mount: folder of the control groups, of version 1 or 2.
    """
    free = []
    for line in _lines(membership):
        _, controllers, group = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root = mount / "memory" if controllers else mount
        limit_name, used_name, cached_name = _VERSION_1 if controllers else _VERSION_2
        folder = root / group.lstrip("/")
        for each in (folder, *folder.parents):  # a limit of an outer group holds as well
            limit, used = _lines(each / limit_name), _lines(each / used_name)
            if limit and used and limit[0].isdigit():  # or "max"
                # Cached files that nobody has touched lately count as free, as in the kubelet's
                # working set: the kernel drops them before it refuses memory, and a model that was
                # just read leaves gigabytes of them.
                stat = dict(entry.split(maxsplit=1) for entry in _lines(each / "memory.stat"))
                free.append(max(0, int(limit[0]) - int(used[0]) + int(stat.get(cached_name, 0))))
            if each == root:
                break
    return free


def _lines(path: Path) -> list[str]:
    """Return the lines of a file; none if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
