"""The order of samples: one seeded sequence, cut into steps, micro-batches and ranks."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from qlora_dist.config import IGNORE_INDEX, OptimConfig
from qlora_dist.data.chat import Sample
from qlora_dist.data.sampler import BatchPlan, collate, eval_batches

PAD = 99

small = st.integers(1, 4)
plans = st.builds(
    BatchPlan,
    num_samples=st.integers(1, 30),
    seed=st.integers(0, 2**32 - 1),
    micro_batch_size=small,
    grad_accum_steps=small,
    world_size=small,
)


def plan_of(num_samples: int, *, seed: int = 0, micro: int = 1, accum: int = 1, world: int = 1) -> BatchPlan:
    """A plan in one line."""
    return BatchPlan(num_samples, seed, micro_batch_size=micro, grad_accum_steps=accum, world_size=world)


def groups_of_step(plan: BatchPlan, step: int) -> list[list[int]]:
    """The micro-batches of all ranks in a step: first those that run at the same time, then the next ones."""
    by_rank = [plan.micro_batches(step, rank) for rank in range(plan.world_size)]
    return [group for together in zip(*by_rank, strict=True) for group in together]


def stream(plan: BatchPlan, num_steps: int) -> list[int]:
    """All samples of the first steps, in order."""
    return [i for step in range(1, num_steps + 1) for group in groups_of_step(plan, step) for i in group]


# -- the stream


@settings(deadline=None)
@given(plans)
def test_every_epoch_sees_every_sample_once(plan: BatchPlan) -> None:
    """Epoch after epoch, wherever steps begin and end, each sample comes up exactly once."""
    num_epochs = 3
    num_steps = -(-num_epochs * plan.num_samples // plan.global_batch_size)
    indices = stream(plan, num_steps)
    for epoch in range(num_epochs):
        once = indices[epoch * plan.num_samples : (epoch + 1) * plan.num_samples]
        assert sorted(once) == list(range(plan.num_samples))


@settings(deadline=None)
@given(plans, st.integers(1, 20))
def test_a_step_depends_on_nothing_but_the_plan(plan: BatchPlan, step: int) -> None:
    """The samples of a step are the same whether or not other steps, or other random numbers, were asked for first."""
    expected = groups_of_step(plan, step)
    stream(plan, 2)
    torch.rand(3)
    assert groups_of_step(plan, step) == expected


@settings(deadline=None)
@given(plans)
def test_the_order_does_not_disturb_other_random_numbers(plan: BatchPlan) -> None:
    """Asking for samples leaves torch's global generator as it was, so dropout does not depend on it."""
    before = torch.get_rng_state()
    plan.micro_batches(1, 0)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_seed_decides_the_order() -> None:
    """Other seeds and other epochs give other orders; none of them is file order."""
    orders = [stream(plan_of(50, seed=seed), num_steps=150) for seed in range(4)]
    epochs = [tuple(order[start : start + 50]) for order in orders for start in (0, 50, 100)]
    assert len(set(epochs)) == len(epochs)
    assert tuple(range(50)) not in epochs


@pytest.mark.parametrize("num_samples", [3, 5, 7])
def test_a_step_crosses_the_border_of_an_epoch(num_samples: int) -> None:
    """A global batch that does not divide the data is filled up from the next epoch, and is never short."""
    plan = plan_of(num_samples, micro=2, accum=2, world=1)
    for step in range(1, 10):
        assert [len(group) for group in groups_of_step(plan, step)] == [2, 2]
    one_by_one = plan_of(num_samples)
    assert stream(plan, 9) == stream(one_by_one, 9 * 4)


def test_a_global_batch_larger_than_the_data_repeats_it() -> None:
    """Three samples in a batch of eight come up two or three times each."""
    indices = stream(plan_of(3, micro=2, accum=2, world=2), num_steps=1)
    assert sorted(indices.count(i) for i in range(3)) == [2, 3, 3]


# -- the cut into ranks and micro-batches


@settings(deadline=None)
@given(plans, st.data())
def test_ranks_get_disjoint_samples(plan: BatchPlan, data: st.DataObject) -> None:
    """Within a step that lies in one epoch, no sample is on two ranks or in two micro-batches."""
    assume(plan.global_batch_size <= plan.num_samples)
    step = data.draw(st.integers(1, plan.num_samples // plan.global_batch_size))
    indices = [i for rank in range(plan.world_size) for group in plan.micro_batches(step, rank) for i in group]
    assert len(set(indices)) == len(indices) == plan.global_batch_size


@settings(deadline=None)
@given(plans, st.integers(1, 8))
def test_every_rank_does_the_same_work(plan: BatchPlan, step: int) -> None:
    """Each rank has `grad_accum_steps` micro-batches of `micro_batch_size`, so that collectives meet."""
    for rank in range(plan.world_size):
        assert [len(group) for group in plan.micro_batches(step, rank)] == (
            [plan.micro_batch_size] * plan.grad_accum_steps
        )


@settings(deadline=None)
@given(
    st.integers(1, 30), st.integers(0, 1000), small, small,
    st.sampled_from([(1, 2), (2, 1), (1, 3), (3, 1), (2, 3), (3, 2), (4, 1)]),
)  # fmt: skip
def test_the_same_groups_however_they_are_dealt(
    num_samples: int, seed: int, micro: int, accum: int, worlds: tuple[int, int]
) -> None:
    """n ranks with m micro-batches each see the sequence of groups that m ranks with n micro-batches each see.

    With (1, 2) this is: one rank with 2k micro-batches, and two ranks with k.
    """
    few, many = worlds
    one = plan_of(num_samples, seed=seed, micro=micro, accum=accum * many, world=few)
    other = plan_of(num_samples, seed=seed, micro=micro, accum=accum * few, world=many)
    for step in range(1, 6):
        assert groups_of_step(one, step) == groups_of_step(other, step)


@settings(deadline=None)
@given(st.integers(1, 30), st.integers(0, 1000), st.integers(1, 5))
def test_a_run_goes_on_with_other_ranks_where_it_stopped(num_samples: int, seed: int, stop: int) -> None:
    """Stopped after any step and resumed on three ranks instead of one, the samples to come are those not yet seen."""
    before = plan_of(num_samples, seed=seed, micro=2, accum=3, world=1)
    after = plan_of(num_samples, seed=seed, micro=2, accum=1, world=3)
    resumed = [groups_of_step(before if step <= stop else after, step) for step in range(1, 9)]
    assert resumed == [groups_of_step(before, step) for step in range(1, 9)]


# -- how long a run is


@pytest.mark.parametrize(
    ("num_samples", "global_batch", "optim", "steps"),
    [
        (10, 2, OptimConfig(), 5),  # one epoch is the default
        (10, 4, OptimConfig(), 3),  # 2.5 steps: the last one is filled up
        (10, 5, OptimConfig(epochs=3), 6),
        (10, 4, OptimConfig(epochs=0.5), 2),  # 5 of 10 samples
        (10, 64, OptimConfig(epochs=0.1), 1),
        (10, 4, OptimConfig(max_steps=7), 7),  # beyond one epoch, and not rounded to one
        (1000, 4, OptimConfig(max_steps=1), 1),
    ],
)
def test_number_of_steps(num_samples: int, global_batch: int, optim: OptimConfig, steps: int) -> None:
    """`max_steps` counts steps; `epochs` counts passes, and every started batch is a step."""
    assert plan_of(num_samples, accum=global_batch).num_steps(optim) == steps
    assert plan_of(num_samples, world=global_batch).num_steps(optim) == steps


def test_epoch_is_the_share_of_the_data_seen() -> None:
    """Global batches of 4 out of 10 samples: 0.4 epochs a step."""
    plan = plan_of(10, micro=2, accum=1, world=2)
    assert [plan.epoch_at(step) for step in (0, 1, 5)] == pytest.approx([0, 0.4, 2.0])


# -- evaluation


@settings(deadline=None)
@given(st.integers(1, 40), small, st.integers(1, 5))
def test_evaluation_covers_every_sample_once_with_equal_work(num_samples: int, micro: int, world: int) -> None:
    """Every sample is evaluated on exactly one rank, in file order, and all ranks get as many batches."""
    by_rank = [list(eval_batches(num_samples, micro, rank, world)) for rank in range(world)]
    assert len({len(batches) for batches in by_rank}) == 1
    in_order = [batch for together in zip(*by_rank, strict=True) for batch in together]
    assert [i for batch in in_order for i in batch] == list(range(num_samples))
    assert max(len(batch) for batch in in_order) <= micro
    assert len(by_rank[0]) == -(-num_samples // (micro * world))


# -- collate


def test_collate_pads_on_the_right() -> None:
    """Shorter samples end in padding that no mask, label or count includes."""
    ignore = IGNORE_INDEX
    batch = collate([Sample([1, 2, 3], [ignore, 2, 3]), Sample([4], [ignore]), Sample([5, 6], [5, 6])], PAD)
    assert batch.input_ids.tolist() == [[1, 2, 3], [4, PAD, PAD], [5, 6, PAD]]
    assert batch.attention_mask.tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 0]]
    assert batch.labels.tolist() == [[ignore, 2, 3], [ignore] * 3, [5, 6, ignore]]
    assert batch.num_tokens == 6
    assert batch.num_targets == 3  # 2, 3 and 6: nothing predicts the first token of a row
    for tensor in (batch.input_ids, batch.attention_mask, batch.labels):
        assert tensor.dtype == torch.int64


def test_a_token_that_looks_like_padding_is_kept() -> None:
    """The end token is often the padding token too; inside a sample it is a real, labelled token."""
    batch = collate([Sample([1, PAD], [IGNORE_INDEX, PAD]), Sample([1, 2, 3], [1, 2, 3])], PAD)
    assert batch.attention_mask.tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch.labels.tolist() == [[IGNORE_INDEX, PAD, IGNORE_INDEX], [1, 2, 3]]


def test_an_empty_batch_can_still_be_forwarded() -> None:
    """A rank with no samples left gets one row without a target: it takes part and adds nothing."""
    batch = collate([], PAD)
    assert batch.input_ids.tolist() == [[PAD]]
    assert batch.labels.tolist() == [[IGNORE_INDEX]]
    assert batch.attention_mask.tolist() == [[1]]  # a row without a single visible token is NaN in some attentions
    assert batch.num_targets == 0


def test_number_of_steps_is_not_one_more_by_rounding() -> None:
    """2.2 epochs of 25 rows are 55 steps of one row, though 2.2 * 25 is a little more than 55 in floating point."""
    assert BatchPlan(25, 0, 1, 1, 1).num_steps(OptimConfig(epochs=2.2)) == 55
