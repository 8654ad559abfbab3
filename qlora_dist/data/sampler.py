"""The order of samples: a pure function of (number of samples, seed, position), cut into disjoint rank slices."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from qlora_dist.config import IGNORE_INDEX, OptimConfig
from qlora_dist.data.chat import Sample


@dataclass(frozen=True)
class MicroBatch:
    """One forward pass of one rank, right-padded to its longest sample."""

    input_ids: torch.Tensor  # (micro_batch_size, seq_len) int64
    attention_mask: torch.Tensor  # (micro_batch_size, seq_len) int64, 1 for real tokens
    labels: torch.Tensor  # (micro_batch_size, seq_len) int64, IGNORE_INDEX where there is no target
    num_tokens: int
    num_targets: int

    def to(self, device: torch.device) -> MicroBatch:
        """The same batch on another device."""
        return MicroBatch(
            self.input_ids.to(device, non_blocking=True),
            self.attention_mask.to(device, non_blocking=True),
            self.labels.to(device, non_blocking=True),
            self.num_tokens,
            self.num_targets,
        )


def collate(samples: Sequence[Sample], pad_token_id: int) -> MicroBatch:
    """Pad samples on the right to the longest of them.

    No samples at all make one padding token without a target: a rank with nothing left to evaluate must still take
    part in the collectives of a sharded forward.
    """
    if not samples:
        samples = [Sample([pad_token_id], [IGNORE_INDEX])]
    length = max(len(sample.input_ids) for sample in samples)
    input_ids = torch.full((len(samples), length), pad_token_id, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, IGNORE_INDEX)
    for row, sample in enumerate(samples):
        n = len(sample.input_ids)
        input_ids[row, :n] = torch.tensor(sample.input_ids)
        attention_mask[row, :n] = 1
        labels[row, :n] = torch.tensor(sample.labels)
    return MicroBatch(
        input_ids,
        attention_mask,
        labels,
        num_tokens=sum(len(sample.input_ids) for sample in samples),
        num_targets=sum(sample.num_targets for sample in samples),
    )


@dataclass(frozen=True)
class BatchPlan:
    """How an endless, seeded stream of samples is cut into steps, micro-batches and ranks.

    Epoch after epoch, each in an order of its own, the samples form one stream; step s takes the next
    `global_batch_size` of it, across the border of an epoch when it falls there. Within a step, micro-batch m of rank
    r is the (m * world_size + r)-th group of `micro_batch_size`: two ranks with one micro-batch each see the same
    groups as one rank with two.
    """

    num_samples: int
    seed: int
    micro_batch_size: int
    grad_accum_steps: int
    world_size: int

    @property
    def global_batch_size(self) -> int:
        """Samples of one optimizer step over all ranks."""
        return self.micro_batch_size * self.grad_accum_steps * self.world_size

    def num_steps(self, config: OptimConfig) -> int:
        """Optimizer steps of the run; the last one of an epoch-based run is filled up from the next epoch."""
        if config.max_steps is not None:
            return config.max_steps
        epochs = 1.0 if config.epochs is None else config.epochs
        # The small part less keeps 2.2 epochs of 25 samples (55.000000000000007) from needing a 56th.
        return max(1, math.ceil(epochs * self.num_samples / self.global_batch_size - 1e-9))

    def epoch_at(self, step: int) -> float:
        """Passes over the data after `step` optimizer steps."""
        return step * self.global_batch_size / self.num_samples

    def micro_batches(self, step: int, rank: int) -> list[list[int]]:
        """Sample indices of each micro-batch of `rank` in optimizer step `step`, the first being 1."""
        start = (step - 1) * self.global_batch_size
        stream = self._stream(start, start + self.global_batch_size)
        size = self.micro_batch_size
        groups = [stream[i : i + size] for i in range(0, len(stream), size)]
        return groups[rank :: self.world_size]

    def _stream(self, start: int, stop: int) -> list[int]:
        indices: list[int] = []
        for epoch in range(start // self.num_samples, (stop - 1) // self.num_samples + 1):
            first = epoch * self.num_samples
            order = self._epoch_order(epoch)
            indices += order[max(start, first) - first : stop - first]
        return indices

    def _epoch_order(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        return torch.randperm(self.num_samples, generator=generator).tolist()


def eval_batches(num_samples: int, micro_batch_size: int, rank: int, world_size: int) -> Iterator[list[int]]:
    """Every sample once, in file order, micro-batches dealt round to the ranks.

    All ranks get the same number of batches, since each forward of a sharded model is a collective; a batch that has
    no samples left is empty.
    """
    groups = [list(range(i, min(i + micro_batch_size, num_samples))) for i in range(0, num_samples, micro_batch_size)]
    groups += [[]] * (-len(groups) % world_size)
    yield from groups[rank::world_size]
