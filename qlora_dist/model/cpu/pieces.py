"""Pieces of tensors that a CPU's cache holds; a GPU takes tensors whole."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def in_pieces(tensor: torch.Tensor, size: int) -> Sequence[torch.Tensor]:
    """Cut a tensor along its first dimension into pieces of at most `size` on a CPU; leave it whole on a GPU."""
    return tensor.split(size) if is_on_cpu(tensor) else (tensor,)


def is_on_cpu(tensor: torch.Tensor) -> bool:
    """Whether a CPU computes with this tensor."""
    return tensor.device.type == "cpu"
