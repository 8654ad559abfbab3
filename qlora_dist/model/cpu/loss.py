"""The loss on a CPU: logits of few rows at a time, and their probabilities in pieces that its cache holds."""

from __future__ import annotations

import math

import torch

from qlora_dist.model.logits import LogitsTransform, to_gradient

MAX_ROWS = 256
"""Rows of a chunk, at most. Products of more are no quicker, and fresh memory for their logits is slow."""
_PIECE = 2**20
"""Entries that probabilities are made of at a time, in float32: they stay in the cache."""
_LOG2_E = math.log2(math.e)


def loss_and_gradient_on_cpu(
    raw: torch.Tensor, targets: torch.Tensor, form: LogitsTransform, with_gradient: bool
) -> torch.Tensor:
    """Compute what `loss_and_gradient` of `model/loss.py` does, in pieces.

    Args:
        raw: (rows, vocab), overwritten.
        targets: (rows, 1) int64.
    """
    rows = max(1, _PIECE // raw.shape[1])
    pieces = zip(raw.split(rows), targets.split(rows), strict=True)
    return torch.stack([_of_piece(*piece, form, with_gradient) for piece in pieces]).sum()


def _of_piece(
    raw: torch.Tensor, targets: torch.Tensor, form: LogitsTransform, with_gradient: bool
) -> torch.Tensor:
    # Powers of 2, and one for each entry: torch's exp2 takes a quarter of the time of its exp on a CPU.
    powers = form(raw).to(torch.float32, copy=True)
    powers.sub_(powers.amax(1, keepdim=True)).mul_(_LOG2_E)
    of_targets = powers.gather(1, targets)
    sums = powers.exp2_().sum(1, keepdim=True)
    if with_gradient:
        to_gradient(powers.div_(sums), targets, raw, form)
    return sums.log2_().sub_(of_targets).sum() / _LOG2_E
