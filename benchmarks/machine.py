"""Description of the machine in every result: hardware and versions, in the same fields."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate")
CPU_FEATURES = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "asimd", "bf16", "sve")
"""CPU flags (x86, ARM) that decide the speed of products and the types they support."""
ISA_LIMITS = (
    "ATEN_CPU_CAPABILITY",
    "ONEDNN_MAX_CPU_ISA",
    "DNNL_MAX_CPU_ISA",
    "MKL_ENABLE_INSTRUCTIONS",
)
"""Variables that make PyTorch and its libraries use fewer instructions than the CPU has."""


def describe_machine() -> dict[str, Any]:
    """Hardware and library versions of this process."""
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "num_gpus": torch.cuda.device_count(),
        "cpu": _cpu_fact("model name") or platform.processor(),
        "cpu_features": [name for name in CPU_FEATURES if name in _cpu_flags()],
        "isa_limits": {name: os.environ[name] for name in ISA_LIMITS if name in os.environ},
        "num_cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
    }


def kind_of(machine: Mapping[str, Any], dtype: str) -> str:
    """Name of a kind of machine and compute type; only results of equal kind are comparable.

    The kind is the GPU's name, or the CPU's relevant features and limits.
    """
    if machine["num_gpus"]:
        return f"{machine['device']} in {dtype}"
    if "cpu_features" not in machine:
        return f"a CPU of unknown features ({machine['cpu']}) in {dtype}"
    limits = "".join(f", {name}={value}" for name, value in machine["isa_limits"].items())
    return f"a CPU with {', '.join(machine['cpu_features'])}{limits} in {dtype}"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _cpu_flags() -> list[str]:
    return (_cpu_fact("flags") or _cpu_fact("Features") or "").split()


def _cpu_fact(key: str) -> str | None:
    """Value of a key for the first CPU in /proc/cpuinfo; None without such a line."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(
                line.split(":", 1)[1].strip()
                for line in file
                if line.partition(":")[0].strip() == key
            )
    except (OSError, StopIteration):
        return None
