"""Packing: several samples in one row, so that next to nothing is computed on padding."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

import torch

from qlora_dist.config import IGNORE_INDEX
from qlora_dist.data.chat import Sample

_WINDOW = 16384
"""Samples that are packed together: bounds the work, and keeps rows made of neighbours in the shuffled order."""


def pack_samples(samples: Sequence[Sample], max_seq_len: int, seed: int) -> list[Sample]:
    """Put samples together into rows of at most `max_seq_len` tokens; each sample comes up in exactly one row.

    Best-fit decreasing within windows of the samples in a seeded order: the longest first, each into the fullest row
    that still has room for it. What is in a row stays the same in every epoch; the order of rows changes.

    Args:
        samples: none longer than `max_seq_len`.
    """
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed)).tolist()
    rows: list[Sample] = []
    for start in range(0, len(order), _WINDOW):
        window = [samples[i] for i in order[start : start + _WINDOW]]
        bins = _best_fit_decreasing([len(sample.input_ids) for sample in window], max_seq_len)
        rows += [join([window[i] for i in members]) for members in bins]
    return rows


def join(samples: Sequence[Sample]) -> Sample:
    """One row from several samples. The first token of each is no target: there is nothing that it follows."""
    input_ids: list[int] = []
    labels: list[int] = []
    starts: list[int] = []
    for sample in samples:
        starts.append(len(input_ids))
        input_ids += sample.input_ids
        labels += [IGNORE_INDEX, *sample.labels[1:]]
    return Sample(input_ids, labels, tuple(starts))


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
