"""The order of samples: one endless seeded stream, cut into steps, micro-batches and ranks."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from qlora_dist.config.schema import IGNORE_INDEX, DataConfig, OptimConfig, TrainConfig
from qlora_dist.data.batch import collate, eval_batches
from qlora_dist.data.dataset import RunData
from qlora_dist.data.order import (
    BatchPlan,
    SampleGroup,
    SampleOrder,
    run_end,
    sample_order,
    seed_of,
)
from qlora_dist.data.samples import Sample
from tests.support.rows import stored

PAD = 99

small = st.integers(1, 4)
cuts = st.tuples(small, small, small)  # micro_batch_size, grad_accum_steps, world_size


@st.composite
def orders(
    draw: st.DrawFn, weighted: bool | None = None, grouped: bool | None = None
) -> SampleOrder:
    """Draw one to three small sources, with or without weights, grouped by length or not."""
    sizes = tuple(draw(st.lists(st.integers(1, 15), min_size=1, max_size=3)))
    weight = st.sampled_from([0.01, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0]) | st.floats(0.05, 4)
    with_weights = draw(st.booleans()) if weighted is None else weighted
    with_lengths = draw(st.booleans()) if grouped is None else grouped
    return SampleOrder(
        sizes,
        draw(st.integers(0, 2**31 - 1)),
        weights=tuple(draw(weight) for _ in sizes) if with_weights else None,
        lengths=tuple(draw(st.integers(1, 50)) for _ in range(sum(sizes)))
        if with_lengths
        else None,
    )


def order_of(num_samples: int, seed: int = 0) -> SampleOrder:
    """Return the order of one source without a weight."""
    return SampleOrder((num_samples,), seed)


def plan_of(
    num_samples: int, *, micro: int = 1, accum: int = 1, world: int = 1, end: int | None = None
) -> BatchPlan:
    """Return a plan over one source."""
    return BatchPlan(order_of(num_samples), micro, accum, world, end)


def groups_of_step(plan: BatchPlan, num_seen: int) -> list[SampleGroup]:
    """Return the micro-batches of all ranks in a step, in the order in which they run."""
    by_rank = [plan.micro_batches(num_seen, rank) for rank in range(plan.world_size)]
    return [group for together in zip(*by_rank, strict=True) for group in together]


def samples_of(groups: list[SampleGroup]) -> list[int]:
    """Return the sample indices of micro-batches, in order."""
    return [i for group in groups for i in group.indices]


def steps_from(
    plan: BatchPlan, num_seen: int, num_steps: int | None = None
) -> Iterator[tuple[int, list[SampleGroup]]]:
    """Yield the samples seen after each of the next steps, and the step's micro-batches.

    Ends with the run, or after `num_steps` steps.
    """
    while num_seen != plan.end and num_steps != 0:
        groups = groups_of_step(plan, num_seen)
        num_seen = plan.after_step(num_seen)
        assert plan.end is None or num_seen <= plan.end
        num_steps = None if num_steps is None else num_steps - 1
        yield num_seen, groups


def sources_of(order: SampleOrder) -> list[range]:
    """Return the sample indices of each source."""
    return [range(sum(order.sizes[:n]), sum(order.sizes[: n + 1])) for n in range(len(order.sizes))]


# -- the stream


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(0, 2**31 - 1), st.integers(0, 3))
def test_every_epoch_sees_every_sample_once(num_samples: int, seed: int, epoch: int) -> None:
    """Epoch after epoch, each sample of a source without a weight comes up exactly once."""
    order = order_of(num_samples, seed)
    assert order.epoch_size == num_samples
    assert sorted(order.between(epoch * num_samples, (epoch + 1) * num_samples)) == list(
        range(num_samples)
    )


@settings(deadline=None)
@given(orders(weighted=True), st.integers(0, 3))
def test_a_source_comes_up_as_often_as_its_weight_says(order: SampleOrder, epoch: int) -> None:
    """In each epoch a source of n samples has round(weight * n) places, and at least one."""
    size = order.epoch_size
    counts = Counter(order.between(epoch * size, (epoch + 1) * size))
    assert order.weights is not None
    places = [
        max(1, round(weight * n)) for weight, n in zip(order.weights, order.sizes, strict=True)
    ]
    assert [sum(counts[i] for i in source) for source in sources_of(order)] == places
    assert size == sum(places)


@settings(deadline=None)
@given(orders(), st.integers(1, 6))
def test_samples_of_a_source_take_turns(order: SampleOrder, num_epochs: int) -> None:
    """Whatever the weight, appearances of two samples of a source differ by at most one."""
    counts = Counter(order.between(0, num_epochs * order.epoch_size))
    for source in sources_of(order):
        appearances = [counts[i] for i in source]
        assert max(appearances) - min(appearances) <= 1


def test_half_a_source_per_epoch_is_the_other_half_next_time() -> None:
    """A weight of 0.5 shows each sample once in two epochs; beside it, a weight of 2 four times."""
    order = SampleOrder((10, 3), seed=0, weights=(0.5, 2.0))
    assert order.epoch_size == 5 + 6
    first, second = order.between(0, 11), order.between(11, 22)
    assert sorted(i for i in first + second if i < 10) == list(range(10))
    assert Counter(i for i in first + second if i >= 10) == {10: 4, 11: 4, 12: 4}


def test_an_order_has_what_data_and_config_say(tmp_path: Path) -> None:
    """The order takes sizes, weights, seed, and lengths if `data.group_by_length` is set."""
    rows = stored(
        [Sample([1] * length, [1] * length) for length in (2, 3, 4)], tmp_path / "samples"
    )
    data = RunData(rows, rows, (1, 2), (1.0, 0.5), (), [])
    assert sample_order(data, TrainConfig(seed=7)) == SampleOrder((1, 2), 7, (1.0, 0.5), None)
    grouped = TrainConfig(seed=7, data=DataConfig(group_by_length=True))
    assert sample_order(data, grouped) == SampleOrder((1, 2), 7, (1.0, 0.5), (2, 3, 4))


def test_sources_are_mixed() -> None:
    """An epoch is not one source after the other: each tenth of it has samples of both."""
    order = SampleOrder((500, 500), seed=0)
    epoch = order.between(0, 1000)
    for start in range(0, 1000, 100):
        assert 20 < sum(i < 500 for i in epoch[start : start + 100]) < 80


@settings(deadline=None)
@given(orders(), st.lists(st.integers(0, 60), min_size=3, max_size=3).map(sorted))
def test_the_stream_depends_on_nothing_but_data_and_seed(
    order: SampleOrder, positions: list[int]
) -> None:
    """A piece of the stream depends neither on earlier pieces nor on other random numbers."""
    start, middle, stop = positions
    fresh = SampleOrder(order.sizes, order.seed, order.weights, order.lengths)
    order.between(200, 260)
    torch.rand(3)
    assert order.between(start, middle) + order.between(middle, stop) == fresh.between(start, stop)
    assert len(fresh.between(start, stop)) == stop - start


@settings(deadline=None)
@given(orders(), cuts)
def test_the_order_does_not_disturb_other_random_numbers(
    order: SampleOrder, cut: tuple[int, int, int]
) -> None:
    """The order leaves torch's global generator alone, so dropout does not depend on it."""
    before = torch.get_rng_state()
    BatchPlan(order, *cut).micro_batches(0, 0)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_seed_decides_the_order() -> None:
    """Other seeds and other epochs give other orders, never the file's order."""
    epochs = [
        tuple(order_of(50, seed).between(start, start + 50))
        for seed in range(4)
        for start in (0, 50, 100)
    ]
    assert len(set(epochs)) == len(epochs)
    assert tuple(range(50)) not in epochs


def test_an_order_is_the_same_on_every_machine() -> None:
    """Seeds are SHA-256 of their key, not Python's hash(), which differs between processes.

    The value: `printf "(0, 'epoch', 3)" | sha256sum`, its first 8 bytes as a little-endian
    number, halved.
    """
    assert seed_of(0, "epoch", 3) == 928_185_087_805_610_579
    assert (
        len(
            {
                seed_of(0, "epoch", 3),
                seed_of(0, "epoch", 4),
                seed_of(1, "epoch", 3),
                seed_of(0, "chunks", 3),
            }
        )
        == 4
    )


# -- grouping by length


@settings(deadline=None)
@given(orders(grouped=True), st.integers(0, 3))
def test_grouping_keeps_the_samples_of_each_epoch(order: SampleOrder, epoch: int) -> None:
    """Grouping by length changes the order within an epoch and nothing else."""
    plain = SampleOrder(order.sizes, order.seed, order.weights)
    start, stop = epoch * order.epoch_size, (epoch + 1) * order.epoch_size
    assert sorted(order.between(start, stop)) == sorted(plain.between(start, stop))


def test_grouping_puts_like_lengths_together() -> None:
    """With lengths from 1 to 1000, shuffled micro-batches of 8 are 44% padding, grouped hardly any.

    The mean of the largest of 8 is 8/9 of 1000, the mean of all is 500: 44% padding. A sorted
    window of 1024 changes by about 1 from one sample to the next.
    """
    lengths = tuple(
        torch.randint(1, 1001, (4096,), generator=torch.Generator().manual_seed(0)).tolist()
    )

    def padding(order: SampleOrder) -> float:
        batches = [
            [lengths[i] for i in order.between(start, start + 8)] for start in range(0, 4096, 8)
        ]
        return 1 - sum(lengths) / sum(8 * max(batch) for batch in batches)

    assert padding(SampleOrder((4096,), 0)) == pytest.approx(0.44, abs=0.02)
    assert padding(SampleOrder((4096,), 0, lengths=lengths)) < 0.02


def test_grouping_does_not_train_from_short_to_long() -> None:
    """Chunks of like length come in random order: each eighth of an epoch has the mean length."""
    lengths = tuple(range(1, 4097))
    epoch = SampleOrder((4096,), 0, lengths=lengths).between(0, 4096)
    means = [
        sum(lengths[i] for i in epoch[start : start + 512]) / 512 for start in range(0, 4096, 512)
    ]
    assert max(abs(mean - 2048) for mean in means) < 1000  # sorted, the first would be 1792 away


# -- the cut into steps, ranks and micro-batches


@settings(deadline=None)
@given(orders(), cuts, st.integers(0, 50), st.integers(1, 4))
def test_the_stream_does_not_depend_on_the_cut(
    order: SampleOrder, cut: tuple[int, int, int], start: int, num_steps: int
) -> None:
    """For any ranks and micro-batches, steps are the stream in order, each a full batch."""
    plan = BatchPlan(order, *cut)
    steps = list(steps_from(plan, start, num_steps))
    assert [len(samples_of(groups)) for _, groups in steps] == [plan.global_batch_size] * num_steps
    stop = start + num_steps * plan.global_batch_size
    assert [i for _, groups in steps for i in samples_of(groups)] == order.between(start, stop)
    assert steps[-1][0] == stop


@settings(deadline=None)
@given(orders(), cuts, st.integers(0, 50))
def test_every_rank_does_the_same_work(
    order: SampleOrder, cut: tuple[int, int, int], start: int
) -> None:
    """Each rank has `grad_accum_steps` micro-batches of `micro_batch_size`: collectives meet."""
    micro, accum, world = cut
    for rank in range(world):
        groups = BatchPlan(order, *cut).micro_batches(start, rank)
        assert [len(group.indices) for group in groups] == [micro] * accum


@settings(deadline=None)
@given(st.integers(1, 40), cuts, st.data())
def test_ranks_get_disjoint_samples(
    num_samples: int, cut: tuple[int, int, int], data: st.DataObject
) -> None:
    """Within a step that lies in one epoch, no sample is on two ranks or in two micro-batches."""
    plan = BatchPlan(order_of(num_samples), *cut)
    assume(plan.global_batch_size <= num_samples)
    start = data.draw(st.integers(0, num_samples - plan.global_batch_size))
    indices = samples_of(groups_of_step(plan, start))
    assert len(set(indices)) == len(indices) == plan.global_batch_size


@settings(deadline=None)
@given(
    orders(),
    small,
    small,
    st.sampled_from([(1, 2), (2, 1), (1, 3), (3, 1), (2, 3), (3, 2), (4, 1)]),
    st.integers(0, 50),
)
def test_the_same_groups_however_they_are_dealt(
    order: SampleOrder, micro: int, accum: int, worlds: tuple[int, int], start: int
) -> None:
    """n ranks with m micro-batches each see the groups that m ranks with n micro-batches see.

    With (1, 2): one rank with 2k micro-batches, and two ranks with k.
    """
    few, many = worlds
    one, other = (
        BatchPlan(order, micro, accum * many, few),
        BatchPlan(order, micro, accum * few, many),
    )
    assert groups_of_step(one, start) == groups_of_step(other, start)


@settings(deadline=None)
@given(orders(), cuts, st.integers(0, 50))
def test_a_group_knows_its_place_in_the_stream(
    order: SampleOrder, cut: tuple[int, int, int], start: int
) -> None:
    """`position` is the place of a group's first sample; the group's seed depends on it alone."""
    for group in groups_of_step(BatchPlan(order, *cut), start):
        assert group.indices == order.between(group.position, group.position + len(group.indices))


@pytest.mark.parametrize("num_samples", [3, 5, 7])
def test_a_step_crosses_the_border_of_an_epoch(num_samples: int) -> None:
    """A global batch that does not divide the data is filled up from the next epoch."""
    plan = plan_of(num_samples, micro=2, accum=2)
    steps = [groups for _, groups in steps_from(plan, 0, 9)]
    assert all([len(group.indices) for group in groups] == [2, 2] for groups in steps)
    indices = [i for groups in steps for i in samples_of(groups)]
    for start in range(0, len(indices) - num_samples, num_samples):
        assert sorted(indices[start : start + num_samples]) == list(range(num_samples))


def test_a_global_batch_larger_than_the_data_repeats_it() -> None:
    """Three samples in a batch of eight come up two or three times each."""
    indices = samples_of(groups_of_step(plan_of(3, micro=2, accum=2, world=2), 0))
    assert sorted(indices.count(i) for i in range(3)) == [2, 3, 3]


# -- going on with other ranks


@settings(deadline=None)
@given(
    orders(),
    st.lists(st.tuples(cuts, st.integers(0, 4)), min_size=2, max_size=4),
    st.none() | st.integers(1, 150),
)
def test_a_run_goes_on_with_other_ranks_where_it_stopped(
    order: SampleOrder, legs: list[tuple[tuple[int, int, int], int]], end: int | None
) -> None:
    """Stops, other ranks and other micro-batches leave the samples and their order as they are.

    None is lost, and none comes twice.
    """
    num_seen = 0
    seen: list[int] = []
    for cut, num_steps in legs:
        for after, groups in steps_from(BatchPlan(order, *cut, end), num_seen, num_steps):
            seen += samples_of(groups)
            num_seen = after
    assert seen == order.between(0, num_seen)
    if end is not None:
        for _, groups in steps_from(BatchPlan(order, *legs[0][0], end), num_seen):
            seen += samples_of(groups)
        assert seen == order.between(0, end)


# -- how long a run is


@settings(deadline=None)
@given(orders(), cuts, st.integers(1, 100))
def test_a_run_over_epochs_ends_with_its_last_sample(
    order: SampleOrder, cut: tuple[int, int, int], end: int
) -> None:
    """The last step is as short as it has to be: no sample is lost, and none is seen twice."""
    plan = BatchPlan(order, *cut, end)
    steps = list(steps_from(plan, 0))
    assert [i for _, groups in steps for i in samples_of(groups)] == order.between(0, end)
    assert steps[-1][0] == end
    assert len(steps) == -(-end // plan.global_batch_size)
    for _, groups in steps[:-1]:
        assert len(samples_of(groups)) == plan.global_batch_size


@settings(deadline=None)
@given(orders(), cuts, st.integers(1, 100))
def test_all_ranks_take_part_in_a_short_step(
    order: SampleOrder, cut: tuple[int, int, int], end: int
) -> None:
    """Ranks without samples get empty micro-batches, and no more than needed.

    Each forward of a sharded model is a collective, so all ranks need an equal number.
    """
    plan = BatchPlan(order, *cut, end)
    num_seen = (end - 1) // plan.global_batch_size * plan.global_batch_size
    by_rank = [plan.micro_batches(num_seen, rank) for rank in range(plan.world_size)]
    assert {len(groups) for groups in by_rank} == {
        -(-(end - num_seen) // (plan.micro_batch_size * plan.world_size))
    }
    sizes = [len(group.indices) for together in zip(*by_rank, strict=True) for group in together]
    assert sizes == sorted(sizes, reverse=True)  # full ones, at most one that is not, empty ones
    assert max(sizes) <= plan.micro_batch_size


@pytest.mark.parametrize(
    ("num_samples", "global_batch", "optim", "steps"),
    [
        (10, 2, OptimConfig(), 5),  # one epoch is the default
        (10, 4, OptimConfig(), 3),  # 2.5 steps: the last one is short
        (10, 5, OptimConfig(epochs=3), 6),
        (10, 4, OptimConfig(epochs=0.5), 2),  # 5 of 10 samples
        (10, 64, OptimConfig(epochs=0.1), 1),
        (10, 64, OptimConfig(epochs=1e-5), 1),  # not none
        (10, 4, OptimConfig(max_steps=7), 7),  # beyond one epoch, and not rounded to one
        (1000, 4, OptimConfig(max_steps=1), 1),
    ],
)
def test_number_of_steps(
    num_samples: int, global_batch: int, optim: OptimConfig, steps: int
) -> None:
    """`max_steps` counts steps; `epochs` counts passes, and every started batch is a step."""
    end = run_end(order_of(num_samples), optim)
    for cut in ({"micro": global_batch}, {"accum": global_batch}, {"world": global_batch}):
        assert plan_of(num_samples, end=end, **cut).num_steps(0, 0, optim) == steps


@settings(deadline=None)
@given(orders(), cuts, cuts, st.integers(0, 5), st.integers(1, 100))
def test_number_of_steps_after_a_change_of_ranks(
    order: SampleOrder,
    first: tuple[int, int, int],
    then: tuple[int, int, int],
    num_steps: int,
    end: int,
) -> None:
    """The steps of a run are the steps done before plus those that the new cut needs for the rest.

    With the same cut, the number is the same after each step.
    """
    before, after, optim = (
        BatchPlan(order, *first, end),
        BatchPlan(order, *then, end),
        OptimConfig(),
    )
    step = num_seen = 0
    total = before.num_steps(0, 0, optim)
    for num_seen, _ in steps_from(before, 0, num_steps):
        step += 1
        assert before.num_steps(step, num_seen, optim) == total
    assert after.num_steps(step, num_seen, optim) == step + len(list(steps_from(after, num_seen)))


def test_max_steps_counts_steps_whatever_the_ranks() -> None:
    """A run of a number of steps keeps it after a change of ranks; its last sample changes."""
    optim = OptimConfig(max_steps=7)
    assert run_end(order_of(10), optim) is None
    assert plan_of(10, world=3).num_steps(4, 8, optim) == 7


@settings(deadline=None)
@given(st.integers(1, 500), st.integers(1, 10**8))
@example(220, 25)  # 2.2 * 25 is 55.000000000000007
@example(220, 11_709_190)
def test_the_end_of_a_run_is_not_one_more_by_rounding(hundredths: int, num_samples: int) -> None:
    """`epochs` is the decimal number as written: 2.2 epochs of 25 rows are 55."""
    assert run_end(order_of(num_samples), OptimConfig(epochs=hundredths / 100)) == -(
        -hundredths * num_samples // 100
    )


def test_an_epoch_is_once_through_the_mixture() -> None:
    """`epochs` and the logged epoch count places of all sources: 2 * 10 + 0.5 * 4 = 22 of them."""
    order = SampleOrder((10, 4), 0, weights=(2.0, 0.5))
    assert run_end(order, OptimConfig(epochs=2)) == 44
    assert BatchPlan(order, 1, 1, 1).epoch_at(11) == pytest.approx(0.5)


def test_epoch_is_the_share_of_the_data_seen() -> None:
    """Global batches of 4 out of 10 samples: 0.4 epochs a step."""
    plan = plan_of(10, micro=2, accum=1, world=2)
    assert [plan.epoch_at(num_seen) for num_seen in (0, 4, 20)] == pytest.approx([0, 0.4, 2.0])


# -- evaluation


@settings(deadline=None)
@given(st.integers(1, 40), small, st.integers(1, 5))
def test_evaluation_covers_every_sample_once_with_equal_work(
    num_samples: int, micro: int, world: int
) -> None:
    """Each sample is evaluated on one rank, in file order; all ranks get equally many batches."""
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
    batch = collate(
        [Sample([1, 2, 3], [ignore, 2, 3]), Sample([4], [ignore]), Sample([5, 6], [5, 6])], PAD
    )
    assert batch.input_ids.tolist() == [[1, 2, 3], [4, PAD, PAD], [5, 6, PAD]]
    assert batch.attention_mask.tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 0]]
    assert batch.labels.tolist() == [[ignore, 2, 3], [ignore] * 3, [5, 6, ignore]]
    assert batch.num_tokens == 6
    assert batch.num_targets == 3  # 2, 3 and 6: nothing predicts the first token of a row
    for tensor in (batch.input_ids, batch.attention_mask, batch.labels):
        assert tensor.dtype == torch.int64


def test_a_token_that_looks_like_padding_is_kept() -> None:
    """The end token is often the padding token too; inside a sample it is a real, labeled token."""
    batch = collate([Sample([1, PAD], [IGNORE_INDEX, PAD]), Sample([1, 2, 3], [1, 2, 3])], PAD)
    assert batch.attention_mask.tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch.labels.tolist() == [[IGNORE_INDEX, PAD, IGNORE_INDEX], [1, 2, 3]]


def test_an_empty_batch_can_still_be_forwarded() -> None:
    """A rank with no samples left gets one row that adds no target and no token."""
    batch = collate([], PAD)
    assert batch.input_ids.tolist() == [[PAD]]
    assert batch.labels.tolist() == [[IGNORE_INDEX]]
    assert batch.attention_mask.tolist() == [
        [1]
    ]  # a row without a single visible token is NaN in some attentions
    assert (batch.num_targets, batch.num_tokens) == (0, 0)
