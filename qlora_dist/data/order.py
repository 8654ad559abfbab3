"""The order of samples: a pure function of (data, seed, position), cut into disjoint slices for the ranks."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field
from fractions import Fraction

import torch

from qlora_dist.config.schema import OptimConfig, TrainConfig
from qlora_dist.data.dataset import RunData

_WINDOW = 1024
_CHUNK = 32
"""Grouping by length sorts windows of the shuffled order and then shuffles chunks of what was sorted. Both are
constants, so that the order does not depend on how many ranks there are, nor on the size of their micro-batches."""


@dataclass(frozen=True)
class SampleOrder:
    """An endless, seeded stream of sample indices: epoch after epoch, each in an order of its own.

    The samples are those of one or several sources, numbered one source after the other. In an epoch a source comes up
    `weight` times: 1 is once each, 2 twice, and with 0.5 the two halves of the source take turns.
    """

    sizes: tuple[int, ...]
    """Samples of each source."""
    seed: int
    weights: tuple[float, ...] | None = None
    """Passes over each source in one epoch; None means one over each."""
    lengths: tuple[int, ...] | None = None
    """Tokens of each sample, to put samples of like length next to each other; None leaves them as shuffled."""
    _made: dict[int, list[int]] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def epoch_size(self) -> int:
        """Samples of one epoch."""
        return sum(self._counts())

    def between(self, start: int, stop: int) -> list[int]:
        """The sample indices at positions `start` to `stop` (exclusive) of the stream."""
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
        return [
            max(1, round(weight * size)) for weight, size in zip(weights, self.sizes, strict=True)
        ]

    def _shuffled(self, epoch: int) -> torch.Tensor:  # (epoch_size,) int64
        generator = _generator(self.seed, "epoch", epoch)
        parts = []
        first = 0
        for number, (size, count) in enumerate(zip(self.sizes, self._counts(), strict=True)):
            # The source's own stream of shuffled passes, of which this epoch takes the next `count`.
            passes = range(epoch * count // size, -(-(epoch + 1) * count // size))
            order = torch.cat(
                [torch.randperm(size, generator=_generator(self.seed, number, p)) for p in passes]
            )
            skip = epoch * count - passes.start * size
            parts.append(order[skip : skip + count] + first)
            first += size
        whole = torch.cat(parts)
        return whole[torch.randperm(len(whole), generator=generator)]

    def _grouped(self, indices: torch.Tensor, epoch: int) -> torch.Tensor:
        if self.lengths is None:
            return indices
        lengths = torch.tensor(self.lengths)[indices]
        chunks: list[torch.Tensor] = []
        for start in range(0, len(indices), _WINDOW):
            by_length = torch.sort(lengths[start : start + _WINDOW], stable=True).indices
            chunks += indices[start : start + _WINDOW][by_length].split(_CHUNK)
        shuffle = torch.randperm(len(chunks), generator=_generator(self.seed, "chunks", epoch))
        return torch.cat([chunks[i] for i in shuffle.tolist()])


def _generator(*key: int | str) -> torch.Generator:
    return torch.Generator().manual_seed(seed_of(*key))


def seed_of(*key: int | str) -> int:
    """A seed of 63 bits that belongs to `key`, the same on every machine."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "little") >> 1


@dataclass(frozen=True)
class SampleGroup:
    """The samples of one micro-batch."""

    indices: list[int]
    position: int
    """Place of the first of them in the stream of samples."""


@dataclass(frozen=True)
class BatchPlan:
    """How the stream of samples is cut into steps, micro-batches and ranks.

    A step takes the next `global_batch_size` samples, across the border of an epoch when it falls there; the last step
    of a run over whole epochs may be shorter. Within a step, micro-batch m of rank r is the (m * world_size + r)-th
    group of `micro_batch_size`: two ranks with one micro-batch each see the same groups as one rank with two.

    Where a run stands in the stream is one number, the samples it has seen, and does not depend on the cut.
    """

    order: SampleOrder
    micro_batch_size: int
    grad_accum_steps: int
    world_size: int
    end: int | None = None
    """Samples of the whole run; None when its length is given in steps."""

    @property
    def global_batch_size(self) -> int:
        """Samples of one full optimizer step over all ranks."""
        return self.micro_batch_size * self.grad_accum_steps * self.world_size

    def after_step(self, num_seen: int) -> int:
        """Samples seen after the step that begins at `num_seen`."""
        stop = num_seen + self.global_batch_size
        return stop if self.end is None else min(stop, self.end)

    def num_steps(self, step: int, num_seen: int, config: OptimConfig) -> int:
        """Optimizer steps of the whole run, seen from after `step` steps and `num_seen` samples."""
        if self.end is None:
            assert config.max_steps is not None
            return config.max_steps
        return step - (-max(0, self.end - num_seen) // self.global_batch_size)

    def epoch_at(self, num_seen: int) -> float:
        """Passes over the data after that many samples."""
        return num_seen / self.order.epoch_size

    def micro_batches(self, num_seen: int, rank: int) -> list[SampleGroup]:
        """The micro-batches of `rank` in the step that begins at `num_seen`.

        All ranks get the same number, since each forward of a sharded model is a collective; in a short last step the
        last ones may be empty.
        """
        stream = self.order.between(num_seen, self.after_step(num_seen))
        size = self.micro_batch_size
        groups = [
            SampleGroup(stream[i : i + size], num_seen + i) for i in range(0, len(stream), size)
        ]
        while len(groups) % self.world_size:
            groups.append(SampleGroup([], num_seen + len(groups) * size))
        return groups[rank :: self.world_size]


def sample_order(data: RunData, config: TrainConfig) -> SampleOrder:
    """The order in which a run sees its training samples."""
    lengths = tuple(data.train.lengths.tolist()) if config.data.group_by_length else None
    return SampleOrder(data.sizes, config.seed, data.weights, lengths)


def run_end(order: SampleOrder, config: OptimConfig) -> int | None:
    """Samples of the whole run, or None when `optim.max_steps` says how long it is."""
    if config.max_steps is not None:
        return None
    epochs = 1.0 if config.epochs is None else config.epochs
    # The decimal number as it was written: in floating point 2.2 epochs of 25 samples are 55.000000000000007.
    return max(1, math.ceil(Fraction(str(epochs)) * order.epoch_size))
