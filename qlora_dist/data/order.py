"""The order of samples: a pure function of (data, seed, position), cut into slices for ranks."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field
from fractions import Fraction

import torch
from torch import Tensor

from qlora_dist.config.schema import OptimConfig, TrainConfig
from qlora_dist.data.dataset import RunData

# Grouping by length sorts windows of the shuffled order, and then shuffles chunks of the result.
# Constants, so that the order depends neither on the number of ranks nor on micro-batch sizes.
_WINDOW = 1024
_CHUNK = 32


@dataclass(frozen=True)
class SampleOrder:
    """An endless, seeded stream of sample indices: epoch after epoch, each shuffled anew.

    The samples are those of one or several sources, numbered one source after the other. An epoch
    passes over each source `weight` times: 1 is once, 2 twice, and with 0.5 the two halves of the
    source take turns.
    """

    sizes: tuple[int, ...]
    """Samples of each source."""
    seed: int
    weights: tuple[float, ...] | None = None
    """Passes over each source in one epoch; None means one pass over each."""
    lengths: tuple[int, ...] | None = None
    """Tokens of each sample, to make neighbors of samples of like length; None does not group."""
    _made: dict[int, list[int]] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def epoch_size(self) -> int:
        """Samples of one epoch."""
        return sum(self._counts())

    def between(self, start: int, stop: int) -> list[int]:
        """Return the sample indices at positions `start` to `stop` (exclusive) of the stream."""
        size = self.epoch_size
        indices: list[int] = []
        for epoch in range(start // size, -(-stop // size)):
            indices += self._epoch(epoch)[max(0, start - epoch * size) : stop - epoch * size]
        return indices

    def _epoch(self, epoch: int) -> list[int]:
        if epoch not in self._made:
            while len(self._made) > 1:  # a step looks at one epoch, or at the border of two
                del self._made[min(self._made)]
            self._made[epoch] = self._grouped(self._shuffled(epoch), epoch).tolist()
        return self._made[epoch]

    def _counts(self) -> list[int]:
        weights = self.weights or (1.0,) * len(self.sizes)
        return [max(1, round(w * size)) for w, size in zip(weights, self.sizes, strict=True)]

    def _shuffled(self, epoch: int) -> Tensor:  # (epoch_size,) int64
        parts = []
        first = 0
        for number, (size, count) in enumerate(zip(self.sizes, self._counts(), strict=True)):
            # The source's own stream of shuffled passes, of which each epoch takes `count`.
            passes = range(epoch * count // size, -(-(epoch + 1) * count // size))
            order = torch.cat([_permutation(size, self.seed, number, p) for p in passes])
            skip = epoch * count - passes.start * size
            parts.append(order[skip : skip + count] + first)
            first += size
        whole = torch.cat(parts)
        return whole[_permutation(len(whole), self.seed, "epoch", epoch)]

    def _grouped(self, indices: Tensor, epoch: int) -> Tensor:  # (epoch_size,) int64
        if self.lengths is None:
            return indices
        lengths = torch.tensor(self.lengths)[indices]
        chunks: list[Tensor] = []
        for start in range(0, len(indices), _WINDOW):
            by_length = torch.sort(lengths[start : start + _WINDOW], stable=True).indices
            chunks += indices[start : start + _WINDOW][by_length].split(_CHUNK)
        shuffle = _permutation(len(chunks), self.seed, "chunks", epoch)
        return torch.cat([chunks[i] for i in shuffle.tolist()])


def _permutation(size: int, *key: int | str) -> Tensor:  # (size,) int64
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed_of(*key)))


def seed_of(*key: int | str) -> int:
    """Return a seed of 63 bits that belongs to `key`, equal on every machine."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "little") >> 1


@dataclass(frozen=True)
class SampleGroup:
    """The samples of one micro-batch."""

    indices: list[int]
    position: int
    """Place of the first of them in the stream of samples."""


@dataclass(frozen=True)
class BatchPlan:
    """A cut of the stream of samples into steps, micro-batches and ranks.

    A step takes the next `global_batch_size` samples, across the border of an epoch if need be; the
    last step of a run over whole epochs may be shorter. Within a step, micro-batch m of rank r is
    the (m * world_size + r)-th group of `micro_batch_size`: two ranks with one micro-batch each see
    the same groups as one rank with two.

    A run's place in the stream is one number, the samples it has seen, which does not depend on the
    cut.
    """

    order: SampleOrder
    micro_batch_size: int
    grad_accum_steps: int
    world_size: int
    end: int | None = None
    """Samples of the whole run; None if its length is given in steps."""

    @property
    def global_batch_size(self) -> int:
        """Samples of one full optimizer step over all ranks."""
        return self.micro_batch_size * self.grad_accum_steps * self.world_size

    def after_step(self, num_seen: int) -> int:
        """Return the samples seen after the step that begins at `num_seen`."""
        stop = num_seen + self.global_batch_size
        return stop if self.end is None else min(stop, self.end)

    def num_steps(self, step: int, num_seen: int, config: OptimConfig) -> int:
        """Return the optimizer steps of the whole run, given a place in it: steps and samples."""
        if self.end is None:
            assert config.max_steps is not None
            return config.max_steps
        # The steps before may have had another batch size, so only the remaining ones are computed.
        return step - (-max(0, self.end - num_seen) // self.global_batch_size)

    def epoch_at(self, num_seen: int) -> float:
        """Return the passes over the data after that many samples."""
        return num_seen / self.order.epoch_size

    def micro_batches(self, num_seen: int, rank: int) -> list[SampleGroup]:
        """Return the micro-batches of `rank` in the step that begins at `num_seen`.

        All ranks get an equal number, since each forward of a sharded model is a collective; in a
        short last step the last micro-batches may be empty.
        """
        stream = self.order.between(num_seen, self.after_step(num_seen))
        size = self.micro_batch_size
        starts = range(0, len(stream), size)
        groups = [SampleGroup(stream[i : i + size], num_seen + i) for i in starts]
        while len(groups) % self.world_size:
            groups.append(SampleGroup([], num_seen + len(groups) * size))
        return groups[rank :: self.world_size]


def sample_order(data: RunData, config: TrainConfig) -> SampleOrder:
    """Return the order in which a run sees its training samples."""
    lengths = tuple(data.train.lengths.tolist()) if config.data.group_by_length else None
    return SampleOrder(data.sizes, config.seed, data.weights, lengths)


def run_end(order: SampleOrder, config: OptimConfig) -> int | None:
    """Return the samples of the whole run; None if `optim.max_steps` sets its length."""
    if config.max_steps is not None:
        return None
    epochs = 1.0 if config.epochs is None else config.epochs
    # The decimal number as it was written: as floats, 2.2 epochs of 25 samples are more than 55.
    return max(1, math.ceil(Fraction(str(epochs)) * order.epoch_size))
