"""Tokenized samples: one in memory, many on disk, and the rows that a run makes of them."""

# Tested by tests/unit/data/test_cache.py and tests/unit/data/test_packing.py.

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import overload

import numpy as np
from numpy.typing import NDArray

from qlora_dist.config.schema import IGNORE_INDEX


@dataclass(frozen=True)
class Sample:
    """A tokenized row.

    `labels[i]` is `input_ids[i]` if token i is a target, else IGNORE_INDEX.
    """

    input_ids: list[int]
    labels: list[int]
    starts: tuple[int, ...] = (0,)
    """Index of the first token of each sample of a packed row."""

    @property
    def num_targets(self) -> int:
        """Tokens that count in the loss."""
        labels = self.labels[1:]  # nothing precedes the first token of a row, so it has no loss
        return len(labels) - labels.count(IGNORE_INDEX)


def join(samples: Sequence[Sample]) -> Sample:
    """Return one row made of several samples; the first token of each sample is no target."""
    input_ids: list[int] = []
    labels: list[int] = []
    starts: list[int] = []
    for sample in samples:
        starts.append(len(input_ids))
        input_ids += sample.input_ids
        # Its neighbor in the row is the end of an unrelated sample, which does not predict it.
        labels += [IGNORE_INDEX, *sample.labels[1:]]
    return Sample(input_ids, labels, tuple(starts))


# Little-endian on every machine, as the type codes "<i4" and "<i8" below say.
_TOKENS, _TARGETS, _ENDS = "tokens.int32", "targets.uint8", "ends.int64"


class SampleWriter:
    """Writes samples to a folder, one after the other, and keeps no sample in memory."""

    def __init__(self, folder: Path) -> None:
        self._files = [(folder / name).open("wb") for name in (_TOKENS, _TARGETS, _ENDS)]
        self._digest = hashlib.sha256()
        self._end = 0

    def add(self, sample: Sample) -> None:
        """Append a sample."""
        self._end += len(sample.input_ids)
        tokens = np.array(sample.input_ids, dtype="<i4")
        targets = (np.array(sample.labels) != IGNORE_INDEX).astype("u1")
        ends = np.array(self._end, dtype="<i8")
        for file, values in zip(self._files, (tokens, targets, ends), strict=True):
            data = values.tobytes()
            file.write(data)
            self._digest.update(data)

    def close(self) -> str:
        """Finish the files, and return a digest of all samples in their order."""
        for file in self._files:
            file.close()
        return self._digest.hexdigest()


class SampleStore:
    """Samples that a `SampleWriter` wrote, mapped into memory and read from disk on access."""

    def __init__(self, folder: Path, digest: str) -> None:
        """Open a folder.

        Raises:
            ValueError: a file is missing, or shorter than the samples need.
        """
        self.digest = digest
        try:
            ends: NDArray[np.int64] = np.fromfile(folder / _ENDS, dtype="<i8")
            self._tokens = _mapped(folder / _TOKENS, "<i4")
            self._targets = _mapped(folder / _TARGETS, "u1")
        except OSError as error:
            raise ValueError(str(error)) from None
        self._bounds = np.insert(ends, 0, 0)
        if not len(self._tokens) == len(self._targets) == self._bounds[-1]:
            raise ValueError(f"{folder}: its files do not belong together")

    def __len__(self) -> int:
        return len(self._bounds) - 1

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each sample. (num_samples,)"""
        return np.diff(self._bounds)

    @property
    def num_targets(self) -> NDArray[np.int64]:
        """Targets of each sample; its first token is none. (num_samples,)"""
        if not len(self):
            return np.empty(0, dtype=np.int64)
        firsts = self._bounds[:-1]
        marked: NDArray[np.int64] = np.add.reduceat(self._targets, firsts, dtype=np.int64)
        return marked - self._targets[firsts].astype(np.int64)

    def __getitem__(self, index: int) -> Sample:
        tokens, targets = self.arrays(index)
        return Sample(tokens.tolist(), np.where(targets, tokens, IGNORE_INDEX).tolist())

    def arrays(self, index: int) -> tuple[NDArray[np.generic], NDArray[np.generic]]:
        """Return a sample's token ids, and 1 for each target, else 0. (num_tokens,) each

        The arrays are views of the files on disk.
        """
        span = slice(self._bounds[index], self._bounds[index + 1])
        return self._tokens[span], self._targets[span]


def _mapped(file: Path, dtype: str) -> NDArray[np.generic]:
    if file.stat().st_size == 0:  # an empty file cannot be mapped
        return np.empty(0, dtype=dtype)
    return np.memmap(file, dtype=dtype, mode="r")


class Rows(Sequence[Sample]):
    """Rows of one or several samples each, from one or several stores; made on access."""

    def __init__(
        self, stores: Sequence[SampleStore], members: NDArray[np.int64], counts: NDArray[np.int64]
    ) -> None:
        """Make rows from parts; elsewhere, begin with `Rows.of`.

        Args:
            members: the samples in the rows, numbered through all stores in turn. (num_samples,)
            counts: samples of each row, at least one. (num_rows,)
        """
        self._stores = tuple(stores)
        self._firsts = [0, *accumulate(map(len, self._stores))]  # number of each store's first
        self._members = members
        self._bounds = _bounds_of(counts)

    @classmethod
    def of(cls, store: SampleStore) -> Rows:
        """Return rows of one sample each, in the order of a store."""
        return cls([store], np.arange(len(store)), np.ones(len(store), dtype=np.int64))

    @classmethod
    def concatenated(cls, parts: Sequence[Rows]) -> Rows:
        """Return the rows of all parts, one part after the other."""
        stores = [store for part in parts for store in part._stores]
        firsts = accumulate((part._firsts[-1] for part in parts), initial=0)
        members = [part._members + first for part, first in zip(parts, firsts, strict=False)]
        return cls(stores, _joined(members), _joined([part.counts for part in parts]))

    def grouped(self, groups: Sequence[Sequence[int]]) -> Rows:
        """Return a row for each group of row indices, made of the samples of those rows.

        Groups of one index choose and order rows.
        """
        members = [self._samples_of(index) for group in groups for index in group]
        counts = self.counts
        grouped = [sum(counts[index] for index in group) for group in groups]
        return Rows(self._stores, _joined(members), np.array(grouped, dtype=np.int64))

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each row. (num_rows,)"""
        lengths = _joined([store.lengths for store in self._stores])
        return np.diff(_bounds_of(lengths[self._members])[self._bounds])

    @property
    def num_targets(self) -> int:
        """Tokens that count in the loss, of all rows."""
        targets = _joined([store.num_targets for store in self._stores])
        return int(targets[self._members].sum())

    @property
    def num_samples(self) -> int:
        """Samples in all rows."""
        return len(self._members)

    @property
    def counts(self) -> NDArray[np.int64]:
        """Samples in each row. (num_rows,)"""
        return np.diff(self._bounds)

    def apart(self) -> Rows:
        """Return the same samples in the same order, each as a row of its own."""
        return Rows(self._stores, self._members, np.ones(len(self._members), dtype=np.int64))

    def arrays(self) -> Iterator[tuple[NDArray[np.generic], NDArray[np.generic]]]:
        """Yield `SampleStore.arrays` of each sample."""
        for number in self._members.tolist():
            store, index = self._place(number)
            yield store.arrays(index)

    def digest(self) -> str:
        """Return a digest of the samples and of their distribution over rows."""
        digest = hashlib.sha256("".join(store.digest for store in self._stores).encode())
        digest.update(self._members.astype("<i8").tobytes())
        digest.update(self._bounds.astype("<i8").tobytes())
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self._bounds) - 1

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        places = map(self._place, self._samples_of(index).tolist())
        samples = [store[number] for store, number in places]
        # `join` would make the first token no target; alone, a sample stays as it was written.
        return samples[0] if len(samples) == 1 else join(samples)

    def _samples_of(self, index: int) -> NDArray[np.int64]:
        return self._members[self._bounds[index] : self._bounds[index + 1]]

    def _place(self, number: int) -> tuple[SampleStore, int]:
        """Return the store of a sample, and its index there."""
        store = bisect_right(self._firsts, number) - 1
        return self._stores[store], number - self._firsts[store]


def _joined(arrays: list[NDArray[np.int64]]) -> NDArray[np.int64]:
    return np.concatenate([np.empty(0, dtype=np.int64), *arrays])  # also of no arrays


def _bounds_of(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the first index of each of consecutive parts, and their total. (len(counts) + 1,)"""
    return np.insert(np.cumsum(counts, dtype=np.int64), 0, 0)
