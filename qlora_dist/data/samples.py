"""Tokenized samples: one in memory, many on disk, and the rows that a run makes of them."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import BinaryIO, Final, overload

import numpy as np
from numpy.typing import NDArray

from qlora_dist.config.schema import IGNORE_INDEX


@dataclass(frozen=True)
class Sample:
    """One tokenized row; `labels[i]` is `input_ids[i]` where that token is a target, else IGNORE_INDEX."""

    input_ids: list[int]
    labels: list[int]
    starts: tuple[int, ...] = (0,)
    """Where each sample of a packed row begins."""

    @property
    def num_targets(self) -> int:
        """Tokens that count in the loss. The first token of a row is never predicted."""
        labels = self.labels[1:]
        return len(labels) - labels.count(IGNORE_INDEX)


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


_TOKENS: Final = "tokens.int32"
_TARGETS: Final = "targets.uint8"
_ENDS: Final = "ends.int64"


class SampleWriter:
    """Writes samples to a folder, one after the other; nothing but their lengths is kept in memory."""

    def __init__(self, folder: Path) -> None:
        self._tokens: BinaryIO = (folder / _TOKENS).open("wb")
        self._targets: BinaryIO = (folder / _TARGETS).open("wb")
        self._ends: BinaryIO = (folder / _ENDS).open("wb")
        self._digest = hashlib.sha256()
        self._end = 0

    def add(self, sample: Sample) -> None:
        """Append one."""
        self._end += len(sample.input_ids)
        tokens = np.array(sample.input_ids, dtype="<i4").tobytes()
        targets = (np.array(sample.labels) != IGNORE_INDEX).astype("u1").tobytes()
        end = np.array(self._end, dtype="<i8").tobytes()
        for file, data in ((self._tokens, tokens), (self._targets, targets), (self._ends, end)):
            file.write(data)
            self._digest.update(data)

    def close(self) -> str:
        """Finish the files; returns a digest of all samples in their order."""
        for file in (self._tokens, self._targets, self._ends):
            file.close()
        return self._digest.hexdigest()


class SampleStore:
    """The samples that a `SampleWriter` wrote, mapped into memory: only those that are looked at are read."""

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
        self._bounds = np.concatenate([np.zeros(1, dtype=np.int64), ends])
        if not len(self._tokens) == len(self._targets) == self._bounds[-1]:
            raise ValueError(f"{folder}: its files do not belong together")

    def __len__(self) -> int:
        return len(self._bounds) - 1

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each sample. (num_samples,)"""
        return np.diff(self._bounds)

    def __getitem__(self, index: int) -> Sample:
        tokens, targets = self.arrays(index)
        return Sample(tokens.tolist(), np.where(targets, tokens, IGNORE_INDEX).tolist())

    def arrays(self, index: int) -> tuple[NDArray[np.generic], NDArray[np.generic]]:
        """A sample's tokens, and 1 where a token is a target, else 0; as they lie on the disk. (num_tokens,) each"""
        span = slice(self._bounds[index], self._bounds[index + 1])
        return self._tokens[span], self._targets[span]


def _mapped(file: Path, dtype: str) -> NDArray[np.generic]:
    # An empty file cannot be mapped.
    return (
        np.memmap(file, dtype=dtype, mode="r") if file.stat().st_size else np.empty(0, dtype=dtype)
    )


class Rows(Sequence[Sample]):
    """Rows of one or several samples each, out of one or several stores; each is made when it is looked at."""

    def __init__(
        self, stores: Sequence[SampleStore], members: NDArray[np.int64], counts: NDArray[np.int64]
    ) -> None:
        """Use `Rows.of` and what follows it.

        Args:
            members: the samples in the rows, numbered through the stores one after the other. (num_samples,)
            counts: how many of them each row has, at least one. (num_rows,)
        """
        self._stores = tuple(stores)
        self._firsts = [0, *accumulate(map(len, self._stores))]
        self._members = members
        self._bounds = _bounds_of(counts)

    @classmethod
    def of(cls, store: SampleStore) -> Rows:
        """Each sample of a store as a row of its own."""
        return cls([store], np.arange(len(store)), np.ones(len(store), dtype=np.int64))

    @classmethod
    def concatenated(cls, parts: Sequence[Rows]) -> Rows:
        """The rows of one, then those of the next, and so on."""
        stores = [store for part in parts for store in part._stores]
        firsts = accumulate((part._firsts[-1] for part in parts), initial=0)
        members = [part._members + first for part, first in zip(parts, firsts, strict=False)]
        counts = [np.diff(part._bounds) for part in parts]
        empty = [np.empty(0, dtype=np.int64)]
        return cls(stores, np.concatenate(empty + members), np.concatenate(empty + counts))

    def grouped(self, groups: Sequence[Sequence[int]]) -> Rows:
        """A row for each group of this object's rows, made of their samples. A group of one only chooses."""
        members = [self._samples_of(index) for group in groups for index in group]
        counts = [
            sum(self._bounds[index + 1] - self._bounds[index] for index in group)
            for group in groups
        ]
        return Rows(
            self._stores,
            np.concatenate([np.empty(0, dtype=np.int64), *members]),
            np.array(counts, dtype=np.int64),
        )

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each row. (num_rows,)"""
        lengths = (
            np.concatenate([store.lengths for store in self._stores])
            if self._stores
            else np.empty(0, np.int64)
        )
        return np.diff(_bounds_of(lengths[self._members])[self._bounds])

    @property
    def num_samples(self) -> int:
        """Samples in all rows."""
        return len(self._members)

    @property
    def counts(self) -> NDArray[np.int64]:
        """Samples in each row. (num_rows,)"""
        return np.diff(self._bounds)

    def apart(self) -> Rows:
        """The same samples in the same order, each as a row of its own."""
        return Rows(self._stores, self._members, np.ones(len(self._members), dtype=np.int64))

    def arrays(self) -> Iterator[tuple[NDArray[np.generic], NDArray[np.generic]]]:
        """What `SampleStore.arrays` gives, of one sample after the other."""
        for number in self._members.tolist():
            store = bisect_right(self._firsts, number) - 1
            yield self._stores[store].arrays(number - self._firsts[store])

    def digest(self) -> str:
        """Of the samples, and of which are in which row."""
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
        samples = [self._sample(number) for number in self._samples_of(index).tolist()]
        return samples[0] if len(samples) == 1 else join(samples)

    def _samples_of(self, index: int) -> NDArray[np.int64]:
        return self._members[self._bounds[index] : self._bounds[index + 1]]

    def _sample(self, number: int) -> Sample:
        store = bisect_right(self._firsts, number) - 1
        return self._stores[store][number - self._firsts[store]]


def _bounds_of(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where each of consecutive parts begins, and the last one ends. (len(counts) + 1,)"""
    return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(counts, dtype=np.int64)])
