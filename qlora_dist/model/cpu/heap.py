"""The C library's heap, which keeps freed memory resident."""

# Tested by tests/distributed/test_recompute.py.

from __future__ import annotations

import ctypes
from contextlib import suppress

import torch


def trim_heap(device: torch.device) -> None:
    """Hand freed memory that glibc keeps back to the operating system, if layers run on the CPU.

    Kept memory counts as resident, and would hide that a step takes less than the step before. Not
    for every step: fetching the pages again makes the next step a tenth longer (SmolLM2-135M).
    """
    if device.type == "cpu":
        with suppress(OSError, AttributeError):  # other C libraries have no such function
            ctypes.CDLL(None).malloc_trim(0)
