"""The micro-batches of the next step, made in the background while the current step computes."""

# Tested by tests/unit/test_train.py and tests/gpu/test_loader.py.

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from qlora_dist.data.batch import MicroBatch, collate
from qlora_dist.data.order import BatchPlan, seed_of
from qlora_dist.data.samples import Sample


def step_batches(
    plan: BatchPlan, num_samples_seen: int, samples: Sequence[Sample], rank: int, pad_token_id: int
) -> list[MicroBatch]:
    """Return a rank's micro-batches of the optimizer step after that many samples, on the CPU."""
    return [
        collate(
            [samples[i] for i in group.indices],
            pad_token_id,
            seed_of(plan.order.seed, "dropout", group.position),
        )
        for group in plan.micro_batches(num_samples_seen, rank)
    ]


class StepLoader:
    """Hands out the micro-batches of successive steps; a context manager that ends its thread.

    A thread suffices: tokens come ready from the disk, so a step's micro-batches take milliseconds.
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
        self._share = samples, rank, pad_token_id
        self._pin_memory = pin_memory
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="data")
        self._ahead: tuple[int, Future[list[MicroBatch]]] | None = None
        self.wait_seconds = 0.0
        """Seconds that :meth:`take` has waited, in all."""

    def take(self, num_samples_seen: int) -> list[MicroBatch]:
        """Return the micro-batches of the step after that many samples; start on the next step."""
        started = time.perf_counter()
        ahead = self._ahead
        # Nothing is ahead at the first step, or another step than was expected.
        if ahead is None or ahead[0] != num_samples_seen:
            ahead = self._begin(num_samples_seen)
        batches = ahead[1].result()
        self.wait_seconds += time.perf_counter() - started
        self._ahead = self._begin(self._plan.after_step(num_samples_seen))
        return batches

    def _begin(self, num_samples_seen: int) -> tuple[int, Future[list[MicroBatch]]]:
        return num_samples_seen, self._pool.submit(self._make, num_samples_seen)

    def _make(self, num_samples_seen: int) -> list[MicroBatch]:
        batches = step_batches(self._plan, num_samples_seen, *self._share)
        return [batch.pinned() for batch in batches] if self._pin_memory else batches

    def __enter__(self) -> StepLoader:
        return self

    def __exit__(self, *error: object) -> None:
        # No waiting: what is being made ahead is of no use any more.
        self._pool.shutdown(wait=False, cancel_futures=True)
