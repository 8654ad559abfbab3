"""The micro-batches of the next step, made in the background while this one computes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from qlora_dist.data.batch import MicroBatch, collate
from qlora_dist.data.order import BatchPlan, seed_of
from qlora_dist.data.samples import Sample


def step_batches(
    plan: BatchPlan, num_samples_seen: int, samples: Sequence[Sample], rank: int, pad_token_id: int
) -> list[MicroBatch]:
    """The micro-batches of a rank in the optimizer step that begins at that position, on the CPU."""
    return [
        collate(
            [samples[i] for i in group.indices],
            pad_token_id,
            seed_of(plan.order.seed, "dropout", group.position),
        )
        for group in plan.micro_batches(num_samples_seen, rank)
    ]


class StepLoader:
    """Hands out the micro-batches of one step after the other; a context, since a thread works for it.

    A thread is enough: tokens come ready from the disk, so a step's micro-batches take milliseconds to make.
    """

    def __init__(
        self,
        plan: BatchPlan,
        samples: Sequence[Sample],
        rank: int,
        pad_token_id: int,
        *,
        pin_memory: bool,
    ) -> None:
        self._plan = plan
        self._samples = samples
        self._rank = rank
        self._pad_token_id = pad_token_id
        self._pin_memory = pin_memory
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="data")
        self._ahead: tuple[int, Future[list[MicroBatch]]] | None = None
        self.wait_seconds = 0.0
        """Time that :meth:`take` has waited, in all."""

    def take(self, num_samples_seen: int) -> list[MicroBatch]:
        """The micro-batches of the step that begins at that position; begins with those of the one after it."""
        started = time.perf_counter()
        if self._ahead is None or self._ahead[0] != num_samples_seen:
            self._begin(num_samples_seen)
        assert self._ahead is not None
        batches = self._ahead[1].result()
        self.wait_seconds += time.perf_counter() - started
        self._begin(self._plan.after_step(num_samples_seen))
        return batches

    def _begin(self, num_samples_seen: int) -> None:
        self._ahead = num_samples_seen, self._pool.submit(self._make, num_samples_seen)

    def _make(self, num_samples_seen: int) -> list[MicroBatch]:
        batches = step_batches(
            self._plan, num_samples_seen, self._samples, self._rank, self._pad_token_id
        )
        return [batch.pinned() for batch in batches] if self._pin_memory else batches

    def __enter__(self) -> StepLoader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
