"""Packing: several samples in one row, so that next to nothing is computed on padding."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

import torch

_WINDOW = 16384
"""Samples that are packed together: bounds the work, and keeps rows made of neighbors in the shuffled order."""


def pack(lengths: Sequence[int], max_seq_len: int, seed: int) -> list[list[int]]:
    """Which samples go into one row, so that rows have at most `max_seq_len` tokens; each sample into exactly one.

    Best-fit decreasing within windows of the samples in a seeded order: the longest first, each into the fullest row
    that still has room for it. What is in a row stays the same in every epoch; the order of rows changes.

    Args:
        lengths: tokens of each sample, none more than `max_seq_len`.
    """
    order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(seed)).tolist()
    rows: list[list[int]] = []
    for start in range(0, len(order), _WINDOW):
        window = order[start : start + _WINDOW]
        bins = _best_fit_decreasing([lengths[i] for i in window], max_seq_len)
        rows += [[window[i] for i in members] for members in bins]
    return rows


def _best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of `lengths`, in bins whose sums are at most `capacity`."""
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free, bin), ascending: the first with enough is the fullest
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = bisect_left(room, (lengths[index], -1))
        if place == len(room):
            bins.append([index])
            insort(room, (capacity - lengths[index], len(bins) - 1))
        else:
            free, number = room.pop(place)
            bins[number].append(index)
            insort(room, (free - lengths[index], number))
    return bins
