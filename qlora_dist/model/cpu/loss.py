"""The loss on a CPU: logits of few rows at a time, probabilities in pieces that its cache holds."""

# Tested by tests/unit/model/test_loss.py.

from __future__ import annotations

import math

import torch
from torch import Tensor

from qlora_dist.model.logits import LogitsTransform, to_gradient

MAX_ROWS = 256
"""Largest number of rows in a chunk. Products of more rows are no quicker, and fresh memory for
their logits is slow."""

_PIECE = 2**20  # entries that become probabilities at a time, in float32: they stay in the cache
_LOG2_E = math.log2(math.e)


def loss_and_gradient_on_cpu(
    raw: Tensor, targets: Tensor, form: LogitsTransform, with_gradient: bool
) -> Tensor:
    """Summed loss of some rows, 0-dim float32; can overwrite the head's output with its gradient.

    Args:
        raw: the head's output, (rows, vocab); overwritten.
        targets: (rows, 1) int64.
    """
    rows = max(1, _PIECE // raw.shape[1])
    pieces = zip(raw.split(rows), targets.split(rows), strict=True)
    return torch.stack([_of_piece(*piece, form, with_gradient) for piece in pieces]).sum()


def _of_piece(raw: Tensor, targets: Tensor, form: LogitsTransform, with_gradient: bool) -> Tensor:
    # Powers of 2, and one per entry: torch's exp2 takes a quarter of the time of its exp on a CPU.
    powers = form(raw).to(torch.float32, copy=True)
    powers.sub_(powers.amax(1, keepdim=True)).mul_(_LOG2_E)
    of_targets = powers.gather(1, targets)  # before the powers are taken: (rows, 1)
    sums = powers.exp2_().sum(1, keepdim=True)
    if with_gradient:
        to_gradient(powers.div_(sums), targets, raw, form)
    return sums.log2_().sub_(of_targets).sum() / _LOG2_E
