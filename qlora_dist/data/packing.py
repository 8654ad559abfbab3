"""Packing: several samples in one row, which leaves little padding to compute on."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

import torch

# Samples that are packed together. A window bounds the work, and makes rows of samples that are
# neighbors in the shuffled order.
_WINDOW = 16384


def pack(lengths: Sequence[int], max_seq_len: int, seed: int) -> list[list[int]]:
    """Return the samples of each row of at most `max_seq_len` tokens; each sample is in one row.

    Best-fit decreasing within windows of the samples in a seeded order: the longest first, each
    into the fullest row that still has room for it. A row keeps its samples in every epoch; the
    order of rows changes.

    Args:
        lengths: tokens of each sample, none more than `max_seq_len`.
    """
    order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(seed)).tolist()
    rows: list[list[int]] = []
    for start in range(0, len(order), _WINDOW):
        rows += _best_fit(order[start : start + _WINDOW], lengths, max_seq_len)
    return rows


def _best_fit(indices: Sequence[int], lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Return the indices in bins of lengths that sum to at most `capacity`; the longest first."""
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free, bin), ascending: the first with enough is the fullest
    for index in sorted(indices, key=lambda i: -lengths[i]):
        place = bisect_left(room, (lengths[index], -1))
        free, number = room.pop(place) if place < len(room) else (capacity, len(bins))
        if number == len(bins):
            bins.append([])
        bins[number].append(index)
        insort(room, (free - lengths[index], number))
    return bins
