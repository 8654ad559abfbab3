"""Micro-batches: samples as tensors."""

# Tested by tests/unit/data/test_order.py and tests/unit/data/test_packing.py.

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from qlora_dist.config.schema import IGNORE_INDEX
from qlora_dist.data.samples import Sample


@dataclass(frozen=True)
class MicroBatch:
    """One forward pass of one rank, right-padded to its longest sample."""

    input_ids: Tensor  # (micro_batch_size, seq_len) int64
    attention_mask: Tensor  # (micro_batch_size, seq_len) int64, 1 for real tokens
    labels: Tensor  # (micro_batch_size, seq_len) int64, IGNORE_INDEX where there is no target
    # (micro_batch_size, seq_len) int64, from 0 in each sample; None: not packed
    position_ids: Tensor | None
    num_tokens: int
    num_targets: int
    seed: int = 0
    """Seed of the random numbers that its forward draws (dropout)."""

    def to(self, device: torch.device) -> MicroBatch:
        """Return the batch on a device; from pinned memory, the copy does not block the CPU."""
        return self._with_tensors(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> MicroBatch:
        """Return the batch in page-locked memory, from which a GPU copies while it computes."""
        return self._with_tensors(Tensor.pin_memory)

    def _with_tensors(self, change: Callable[[Tensor], Tensor]) -> MicroBatch:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        tensors = {name: x for name, x in values.items() if isinstance(x, Tensor)}
        return replace(self, **{name: change(x) for name, x in tensors.items()})


def collate(samples: Sequence[Sample], pad_token_id: int, seed: int = 0) -> MicroBatch:
    """Pad samples on the right to the longest of them.

    Without samples the batch is one padding token without a target: a rank with nothing left to
    evaluate must still take part in the collectives of a sharded forward.
    """
    rows = samples or [Sample([pad_token_id], [IGNORE_INDEX])]
    length = max(len(row.input_ids) for row in rows)
    input_ids = torch.full((len(rows), length), pad_token_id, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, IGNORE_INDEX)
    position_ids = torch.arange(length).repeat(len(rows), 1)
    ends = [(*row.starts[1:], len(row.input_ids)) for row in rows]
    longest = max(
        end - start
        for row, row_ends in zip(rows, ends, strict=True)
        for start, end in zip(row.starts, row_ends, strict=True)
    )
    for i, row in enumerate(rows):
        n = len(row.input_ids)
        for start in ends[i]:
            # The padding counts as more samples, none longer than the real ones: some rotary
            # positions (LongRoPE) follow from the largest position of the batch.
            position_ids[i, start:] = torch.arange(length - start) % longest
        input_ids[i, :n] = torch.tensor(row.input_ids)
        attention_mask[i, :n] = 1
        labels[i, :n] = torch.tensor(row.labels)
    return MicroBatch(
        input_ids,
        attention_mask,
        labels,
        position_ids if any(len(row.starts) > 1 for row in rows) else None,
        num_tokens=sum(len(sample.input_ids) for sample in samples),
        num_targets=sum(sample.num_targets for sample in samples),
        seed=seed,
    )


def eval_batches(
    num_samples: int, micro_batch_size: int, rank: int, world_size: int
) -> Iterator[list[int]]:
    """Yield a rank's micro-batches of sample indices; each sample comes once, in file order.

    Micro-batches are dealt to the ranks in turn. All ranks get an equal number, since each forward
    of a sharded model is a collective; a batch for which no sample is left is empty.
    """
    indices, size = range(num_samples), micro_batch_size
    groups = [list(indices[i : i + size]) for i in range(0, num_samples, size)]
    groups += [[]] * (-len(groups) % world_size)
    yield from groups[rank::world_size]
