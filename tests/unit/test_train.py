"""Parts of the training loop that need no model."""

from dataclasses import replace

import pytest
import torch

from qlora_dist.data.batch import MicroBatch
from qlora_dist.data.loader import step_batches
from qlora_dist.data.order import BatchPlan, SampleOrder
from qlora_dist.data.samples import Sample
from qlora_dist.runtime.processes import Runtime, start_runtime
from qlora_dist.train import is_due

SAMPLES = [Sample([i] * (i + 1), [i] * (i + 1)) for i in range(20)]


@pytest.fixture(scope="module")
def runtime() -> Runtime:
    """The one process of this test."""
    return replace(start_runtime(seed=0, dtype="float32"), device=torch.device("cpu"))


def batches_of_all_ranks(
    runtime: Runtime,
    num_seen: int,
    *,
    accum: int,
    world: int,
    seed: int = 0,
    end: int | None = None,
) -> list[MicroBatch]:
    """The micro-batches of a step, 2 samples each, in the order of the stream."""
    plan = BatchPlan(SampleOrder((len(SAMPLES),), seed), 2, accum, world, end)
    by_rank = [step_batches(plan, num_seen, SAMPLES, rank, 0) for rank in range(world)]
    return [batch for together in zip(*by_rank, strict=True) for batch in together]


def test_dropout_depends_on_the_place_in_the_data_only(runtime: Runtime) -> None:
    """Equal micro-batches have equal seeds on one rank and on three, in one step or in three."""
    expected = batches_of_all_ranks(runtime, 6, accum=3, world=1)
    steps = [
        batch
        for start in (6, 8, 10)
        for batch in batches_of_all_ranks(runtime, start, accum=1, world=1)
    ]
    for batches in (batches_of_all_ranks(runtime, 6, accum=1, world=3), steps):
        assert [batch.seed for batch in batches] == [batch.seed for batch in expected]
        assert [batch.input_ids.tolist() for batch in batches] == [
            batch.input_ids.tolist() for batch in expected
        ]


def test_no_two_micro_batches_drop_the_same(runtime: Runtime) -> None:
    """Seeds differ from micro-batch to micro-batch, from epoch to epoch, and with the seed of the
    run."""
    one = batches_of_all_ranks(runtime, 0, accum=5, world=8)  # four epochs
    other = batches_of_all_ranks(runtime, 0, accum=5, world=8, seed=1)
    assert len({batch.seed for batch in one + other}) == 80


def test_ranks_without_samples_get_padding(runtime: Runtime) -> None:
    """In a short last step a micro-batch without samples can be forwarded and has no target."""
    batches = batches_of_all_ranks(runtime, 18, accum=2, world=3, end=20)
    assert [batch.input_ids.numel() > 0 for batch in batches] == [True, True, True]
    assert [batch.num_targets > 0 for batch in batches] == [True, False, False]


@pytest.mark.parametrize(
    ("every", "due"), [(None, []), (1, [1, 2, 3, 4, 5, 6]), (3, [3, 6]), (7, [])]
)
def test_what_is_due(every: int | None, due: list[int]) -> None:
    """An action is due at every N-th step, or never."""
    assert [step for step in range(1, 7) if is_due(step, every)] == due
