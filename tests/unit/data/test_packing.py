"""Packed rows: every sample once, never over-full, hardly any room left."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_dist.config.schema import IGNORE_INDEX
from qlora_dist.data.batch import collate
from qlora_dist.data.packing import pack
from qlora_dist.data.samples import Sample, join

PAD = 9


def numbered(lengths: list[int]) -> list[Sample]:
    """Return samples whose tokens tell the sample and the place; every other token is a target."""
    samples = []
    for number, length in enumerate(lengths):
        ids = [1000 * (number + 1) + place for place in range(length)]
        samples.append(Sample(ids, [token if token % 2 else IGNORE_INDEX for token in ids]))
    return samples


@settings(deadline=None)
@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=200), st.integers(50, 80), st.integers(0, 99)
)
def test_every_token_of_every_sample_is_in_exactly_one_row(
    lengths: list[int], capacity: int, seed: int
) -> None:
    """No token is lost, doubled or cut; no row is over-full; targets are the samples' own."""
    samples = numbered(lengths)
    groups = pack(lengths, capacity, seed)
    rows = [join([samples[i] for i in group]) for group in groups]
    assert all(len(row.input_ids) <= capacity for row in rows)
    pieces = []
    for row in rows:
        ends = [*row.starts[1:], len(row.input_ids)]
        pieces += [row.input_ids[start:end] for start, end in zip(row.starts, ends, strict=True)]
    assert sorted(pieces) == sorted(sample.input_ids for sample in samples)
    assert sum(row.num_targets for row in rows) == sum(sample.num_targets for sample in samples)
    assert pack(lengths, capacity, seed) == groups


def test_rows_depend_on_the_seed() -> None:
    """Another seed puts other samples together."""
    lengths = [random.Random(0).randint(1, 60) for _ in range(100)]
    assert pack(lengths, 64, seed=0) != pack(lengths, 64, seed=1)


def test_rows_are_full_on_lengths_like_those_of_chats() -> None:
    """Rows of 1,024 and 4,096 tokens are at least 98 % full with lengths like those of chats.

    Lengths are log-normal with a median of 180 tokens and a long tail.
    """
    rng = random.Random(0)
    for capacity in (1024, 4096):
        lengths = [
            min(capacity, max(8, round(rng.lognormvariate(5.2, 0.9)))) for _ in range(20_000)
        ]
        rows = pack(lengths, capacity, seed=0)
        assert sum(lengths) / (len(rows) * capacity) >= 0.98


def test_the_first_token_of_a_sample_is_no_target_of_the_one_before() -> None:
    """Behind another sample, a first token has no label; alone it is never predicted either."""
    row = join([Sample([1, 2, 3], [1, 2, 3]), Sample([4, 5], [4, 5])])
    assert row.input_ids == [1, 2, 3, 4, 5]
    assert row.labels == [IGNORE_INDEX, 2, 3, IGNORE_INDEX, 5]
    assert row.starts == (0, 3)
    assert row.num_targets == 3


def test_positions_begin_anew_in_each_sample_and_in_the_padding() -> None:
    """Positions start at 0 in each sample and in the padding, whatever the row beside it holds."""
    batch = collate([join(numbered([3, 2])), join(numbered([1, 1, 1])), numbered([2])[0]], PAD)
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1], [0, 0, 0, 0, 1], [0, 1, 0, 1, 2]]
    assert batch.num_tokens == 10


def test_padding_has_no_larger_position_than_a_sample() -> None:
    """Beside a full row of short samples, the padding restarts: rotations that follow from the
    largest position (LongRoPE's) stay those of the samples."""
    batch = collate([join(numbered([3, 2, 3])), numbered([1])[0]], PAD)
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 0, 1, 2], [0, 0, 1, 2, 0, 1, 2, 0]]


@pytest.mark.parametrize("lengths", [[4], [2, 3]])
def test_rows_that_are_not_packed_have_no_positions(lengths: list[int]) -> None:
    """Single samples go through the model with a padding mask and without positions."""
    assert collate(numbered(lengths), PAD).position_ids is None
