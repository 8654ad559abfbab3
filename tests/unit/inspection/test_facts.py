"""Facts about a run's data, on samples that were made by hand."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from qlora_dist.config.schema import IGNORE_INDEX, DataConfig, OptimConfig, TrainConfig
from qlora_dist.data.dataset import RunData
from qlora_dist.data.packing import pack
from qlora_dist.data.report import Report
from qlora_dist.data.samples import Rows, Sample
from qlora_dist.inspection.facts import Facts, Spread, gather_facts, histogram, num_padded
from tests.support.rows import stored

END = 2
"""<|im_end|> of the test tokenizer."""
CONFIG = TrainConfig(
    data=DataConfig(train="a.jsonl", max_seq_len=8, packing=False), optim=OptimConfig(max_steps=1)
)


def sample(prompt: list[int], *answers: list[int]) -> Sample:
    """Return a prompt and answers; after each answer but the last, the prompt again."""
    ids, labels = [], []
    for answer in answers:
        ids += prompt + answer
        labels += [IGNORE_INDEX] * len(prompt) + answer
    return Sample(ids, labels)


def facts(
    folder: Path,
    tokenizer,
    *sources: list[Sample],
    held_out: list[Sample] | None = None,
    weights: tuple[float, ...] = (),
    config: TrainConfig = CONFIG,
) -> Facts:
    """Return the facts of a data set of these samples."""
    parts = [stored(samples, folder / str(number)) for number, samples in enumerate(sources)]
    if config.data.packing:
        parts = [
            rows.grouped(pack(rows.lengths.tolist(), config.data.max_seq_len, config.seed))
            for rows in parts
        ]
    data = RunData(
        train=Rows.concatenated(parts),
        eval=Rows.concatenated([stored(held_out, folder / "eval")] if held_out else []),
        sizes=tuple(map(len, parts)),
        weights=weights or (1.0,) * len(parts),
        reports=tuple(
            Report(f"{name}.jsonl", "messages") for name in "abcd"[: len(parts) + bool(held_out)]
        ),
        notes=[],
    )
    return gather_facts(data, config, tokenizer)


def test_percentiles_are_values_that_occur() -> None:
    """The numbers 1 to 10 have the median 5 and the 90th percentile 9; a lone value has itself."""
    assert Spread.of(np.arange(1, 11)) == Spread(p50=5, p90=9, p99=10, max=10)
    assert Spread.of(np.array([7])) == Spread(7, 7, 7, 7)


@pytest.mark.parametrize(
    ("lengths", "limit", "bins"),
    [
        (
            [9, 10, 11, 16],
            16,
            [(9, 10, 2), (11, 12, 1), (13, 14, 0), (15, 16, 1)],
        ),  # quarters of 8 to 16
        ([200, 260], 260, [(193, 224, 1), (225, 260, 1)]),  # no bin of 257 to 260
        (
            [3, 1000],
            1024,
            [
                (3, 4, 1),
                (5, 8, 0),
                (9, 16, 0),
                (17, 32, 0),
                (33, 64, 0),
                (65, 128, 0),
                (129, 256, 0),
                (257, 512, 0),
                (513, 1024, 1),
            ],
        ),
        ([5], 5, [(5, 5, 1)]),
    ],
)
def test_histogram(lengths: list[int], limit: int, bins: list[tuple[int, int, int]]) -> None:
    """Bins go from the shortest to the longest sample, finer if that leaves few of them."""
    found = histogram(np.array(lengths), limit)
    assert [(bin.first, bin.last, bin.num_samples) for bin in found] == bins


@pytest.mark.parametrize("limit", [1, 7, 256, 1000, 131072])
def test_each_length_is_in_one_bin(limit: int) -> None:
    """Every length up to the limit, inclusive, is counted once, in few bins."""
    found = histogram(np.arange(1, limit + 1), limit)
    assert [bin.num_samples for bin in found] == [bin.last - bin.first + 1 for bin in found]
    assert (found[0].first, found[-1].last) == (1, limit)
    assert len(found) <= 18


def test_padding_is_counted_by_micro_batch() -> None:
    """Rows of 3 and 5, then 2 and 2, then 7 alone: 10 + 4 + 7 tokens are computed."""
    assert num_padded(np.array([3, 5, 2, 2, 7]), 2) == 21
    assert num_padded(np.array([3, 5, 2, 2, 7]), 1) == 19
    assert num_padded(np.array([3, 5, 2, 2, 7]), 8) == 35


MIXED = [sample([10], [11]) for _ in range(32)] + [
    sample([10, 11, 12], [13, 14, 15]) for _ in range(32)
]
"""32 samples of 2 tokens and 32 of 6: packed to 8, grouped into chunks of 32 and 32."""


@pytest.mark.parametrize("arrangement", ["shuffled", "group_by_length", "packing"])
def test_each_way_to_make_batches(tmp_path: Path, tokenizer, arrangement: str) -> None:
    """All arrangements are told, whichever is configured.

    Shuffled, both micro-batches are padded to 6 tokens; grouped or packed, none has padding.
    """
    data = replace(
        CONFIG.data,
        packing=arrangement == "packing",
        group_by_length=arrangement == "group_by_length",
    )
    config = replace(CONFIG, data=data, optim=OptimConfig(max_steps=1, micro_batch_size=32))
    found = facts(tmp_path, tokenizer, MIXED, config=config)
    assert [
        (b.arrangement, b.num_rows, b.num_steps, b.num_tokens, b.num_computed_tokens)
        for b in found.batchings
    ] == [
        ("shuffled", 64, 2, 256, 384),
        ("group_by_length", 64, 2, 256, 256),
        ("packing", 32, 1, 256, 256),
    ]
    assert found.batchings[0].padding == pytest.approx(1 / 3)
    assert found.configured.arrangement == arrangement
    assert (found.train.num_samples, found.train.num_tokens, found.train.num_targets) == (
        64,
        256,
        32 + 96,
    )
    assert found.run.num_targets_per_epoch == 128


def test_weights_count_in_an_epoch(tmp_path: Path, tokenizer) -> None:
    """Two rows of 4 tokens twice are as many tokens as two rows of 8 once; so are their targets."""
    short, long = sample([10, 11], [12, 13]), sample([10, 11, 12], [13, 14, 15, 16, 17])
    found = facts(tmp_path, tokenizer, [short] * 2, [long] * 2, weights=(2.0, 1.0))
    assert [(source.key, source.weight, source.epoch_share) for source in found.sources] == [
        ("data.train", 2.0, 0.5),
        ("data.train", 1.0, 0.5),
    ]
    assert (found.configured.num_rows, found.configured.num_tokens) == (6, 32)
    assert found.run.num_targets_per_epoch == 4 * 2 + 2 * 5


@pytest.mark.parametrize(
    ("length", "num_steps", "epochs"),
    [({"max_steps": 3}, 3, 1.5), ({"epochs": 1.25}, 3, 1.25), ({}, 2, 1.0)],
)
def test_the_run(tmp_path: Path, tokenizer, length: dict, num_steps: int, epochs: float) -> None:
    """8 rows at 4 a step: 3 steps are 1.5 epochs, and 1.25 epochs are 3 steps, the last short."""
    config = replace(CONFIG, optim=OptimConfig(micro_batch_size=2, grad_accum_steps=2, **length))
    found = facts(tmp_path, tokenizer, [sample([10, 11], [12])] * 8, config=config)
    assert (found.run.num_steps, found.run.epochs, found.run.num_rows_per_step) == (
        num_steps,
        epochs,
        4,
    )


def test_copies_and_leaks_are_found(tmp_path: Path, tokenizer) -> None:
    """Copies within training, and held-out samples and prompts that training has, are counted."""
    a, b, c = sample([10, 11], [20, END]), sample([10, 12], [20, END]), sample([10, 13], [20, END])
    answered_otherwise = sample([10, 12], [21, END])
    found = facts(
        tmp_path,
        tokenizer,
        [a, b, a],
        [c, a],
        held_out=[c, answered_otherwise, sample([10, 14], [20, END])],
    )
    assert (found.train.num_repeats, found.train.most_repeated_times) == (2, 3)
    assert found.train.most_repeated == tokenizer.decode([20, END])
    assert found.leak is not None
    assert (found.leak.num_samples, found.leak.num_prompts) == (1, 1)
    assert found.eval is not None
    assert found.eval.most_repeated is None


def test_one_prompt_for_all_is_no_leak(tmp_path: Path, tokenizer) -> None:
    """A held-out sample with the instruction that all samples share is no leak."""
    found = facts(
        tmp_path,
        tokenizer,
        [sample([10, 11], [i]) for i in range(20, 24)],
        held_out=[sample([10, 11], [9])],
    )
    assert found.leak is not None
    assert (found.leak.num_samples, found.leak.num_prompts) == (0, 0)


def test_texts_that_begin_or_end_alike_are_not_the_same(tmp_path: Path, tokenizer) -> None:
    """Plain texts with a common first token are no leak, with one other token no copies."""
    texts = [Sample([first, 20, END], [first, 20, END]) for first in (10, 11, 12)]
    held_out = Sample([10, 21, END], [10, 21, END])
    found = facts(tmp_path, tokenizer, texts, held_out=[held_out])
    assert found.train.num_repeats == 0
    assert found.leak is not None
    assert (found.leak.num_samples, found.leak.num_prompts) == (0, 0)


def test_nothing_held_out(tmp_path: Path, tokenizer) -> None:
    """Without evaluation data there is no leak, and no facts about them."""
    found = facts(tmp_path, tokenizer, [sample([10], [11])])
    assert (found.eval, found.leak) == (None, None)


def test_answers(tmp_path: Path, tokenizer) -> None:
    """Turns of only an end token are empty; samples that were cut teach no end."""
    rows = [
        sample([10, 11], [END]),
        sample([10, 11], [20, END], [END]),
        sample([10, 11], [20, 21, 22]),
        sample([10, 11], [20, 21, END]),
    ]
    part = facts(tmp_path, tokenizer, rows).train
    assert (
        part.num_answers,
        part.num_empty_answers,
        part.num_answers_of_one_token,
        part.num_open,
    ) == (5, 2, 1, 1)
    assert [(opening.text, opening.num_samples) for opening in part.openings] == [
        (tokenizer.decode([20]), 3),
        ("<|im_end|>", 1),
    ]
    assert part.num_at_limit == 0
    assert part.targets == Spread(p50=3, p90=3, p99=3, max=3)


def test_the_first_token_is_no_target(tmp_path: Path, tokenizer) -> None:
    """All tokens of plain text but the first count, here as in the run's log."""
    text = Sample([20, 21, END], [20, 21, END])
    part = facts(tmp_path, tokenizer, [text]).train
    assert part.num_targets == text.num_targets == 2
    assert part.openings[0].text == tokenizer.decode([21])
