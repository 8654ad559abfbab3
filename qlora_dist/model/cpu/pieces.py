"""Pieces of tensors that a CPU's cache holds; a GPU takes tensors whole."""

# Tested by tests/unit/parallel/test_engine.py and tests/unit/model/test_nf4.py.

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def in_pieces(tensor: Tensor, size: int) -> Sequence[Tensor]:
    """Cut a tensor on a CPU along its first dimension into pieces of at most `size`.

    A tensor on a GPU stays whole.
    """
    return tensor.split(size) if is_on_cpu(tensor) else (tensor,)


def is_on_cpu(tensor: Tensor) -> bool:
    """True if a CPU computes with this tensor."""
    return tensor.device.type == "cpu"
