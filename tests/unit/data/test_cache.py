"""Cached tokenized data equals its source, and all of it reaches the model, once an epoch."""

import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from qlora_dist.config.schema import IGNORE_INDEX, DataConfig, Source
from qlora_dist.data import cache
from qlora_dist.data.dataset import RunData, load_data
from qlora_dist.data.loader import StepLoader, step_batches
from qlora_dist.data.order import BatchPlan, SampleOrder
from qlora_dist.data.packing import pack
from qlora_dist.data.samples import Rows, Sample, join
from qlora_dist.errors import DataError
from tests.support.rows import encode, stored

PAD = 0
quick = settings(deadline=None, max_examples=25)

words = st.lists(
    st.sampled_from(["a", "fox", " ", "the quick brown", ".", "é🦊", "\n"]), max_size=20
).map("".join)


@st.composite
def rows(draw: st.DrawFn, layout: str | None = None) -> list[dict]:
    """Return a few rows of one format; some are empty, long or without an answer."""
    kind = layout or draw(st.sampled_from(["messages", "prompt_completion", "text"]))
    made: list[dict] = []
    for _ in range(draw(st.integers(1, 12))):
        asked, said = draw(words), draw(words)
        if kind == "messages":
            turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
            made.append({"messages": turns[: draw(st.sampled_from([2, 2, 2, 1, 0]))]})
        elif kind == "prompt_completion":
            made.append({"prompt": asked, "completion": said})
        else:
            made.append({"text": said})
    good = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    return [
        *made,
        *[{"messages": good["messages"], "prompt": "a", "completion": "b", "text": "c"}] * 3,
    ]


data_settings = st.fixed_dictionaries(
    {
        "max_seq_len": st.sampled_from([24, 32, 48, 1024]),
        "too_long": st.sampled_from(["truncate_end", "truncate_start", "split", "drop"]),
        "train_on": st.sampled_from(["completions", "all"]),
        "eval_fraction": st.sampled_from([0.0, 0.3]),
        "packing": st.booleans(),
        "max_bad_fraction": st.just(0.99),
    }
)


def contents(data: RunData) -> tuple:
    """Return all that a run takes from its data."""
    return (
        list(data.train),
        list(data.eval),
        data.sizes,
        data.weights,
        data.reports,
        data.notes,
        data.fingerprint(),
    )


def write_rows(file: Path, values: list[dict]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in values))
    return str(file)


# -- cache hits


@quick
@given(rows(), rows(), data_settings, st.integers(0, 99))
def test_what_is_found_is_what_was_made(
    tokenizer, first: list[dict], second: list[dict], config: dict, seed: int
) -> None:
    """A hit equals a miss, and tokenizes no row.

    Samples, the account of the rows, notes and fingerprint are equal.
    """
    with tempfile.TemporaryDirectory() as folder:
        paths = [
            write_rows(Path(folder) / f"{i}.jsonl", values)
            for i, values in enumerate((first, second))
        ]
        sources = (Source(paths[0], 2.0), Source(paths[1]))
        asked = DataConfig(train=sources, cache_dir=f"{folder}/cache", **config)
        try:
            missed = contents(load_data(asked, tokenizer, seed))
        except DataError:  # none is short enough
            assume(False)
        with mock.patch.object(cache, "encode_rows", side_effect=AssertionError):
            assert contents(load_data(asked, tokenizer, seed)) == missed
        elsewhere = replace(asked, cache_dir=f"{folder}/other")
        assert contents(load_data(elsewhere, tokenizer, seed)) == missed


CHAT = [
    {
        "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
        "text": "c",
    }
] * 8
BASE = {
    "format": "messages",
    "max_seq_len": 64,
    "too_long": "truncate_end",
    "train_on": "completions",
}


@pytest.fixture
def made(tmp_path: Path, tokenizer):
    """A function that tells whether a row was tokenized, after the settings BASE were tokenized."""
    path = write_rows(tmp_path / "d.jsonl", CHAT)

    def load(settings: dict, tokenizer=tokenizer, path: str = path, seed: int = 0) -> bool:
        with mock.patch.object(cache, "encode_rows", wraps=cache.encode_rows) as encode_rows:
            config = DataConfig(
                train=path, cache_dir=str(tmp_path / "cache"), **{**BASE, **settings}
            )
            load_data(config, tokenizer, seed)
        return encode_rows.called

    assert load({})
    assert not load({})
    return load


@pytest.mark.parametrize(
    "change",
    [
        {"format": "text"},
        {"format": "auto"},
        {"columns": {"messages": "messages"}},
        {"roles": {"user": ("human",)}},
        {"max_seq_len": 65},
        {"too_long": "drop"},
        {"train_on": "all"},
        {"template_kwargs": {"enable_thinking": False}},
    ],
    ids=str,
)
def test_settings_that_decide_the_samples(made, change: dict) -> None:
    """Each of these settings, changed, tokenizes data anew; changed back, it hits the cache."""
    assert made(change)
    assert not made(change)
    assert not made({})


@pytest.mark.parametrize(
    "change",
    [
        {"eval_fraction": 0.5},
        {"packing": True},
        {"packing": False},
        {"max_bad_fraction": 0.5},
        {"seed": 7},
    ],
    ids=str,
)
def test_settings_that_do_not(made, change: dict) -> None:
    """A setting that only chooses among samples, or orders them, tokenizes nothing."""
    seed = change.get("seed", 0)
    assert not made({key: value for key, value in change.items() if key != "seed"}, seed=seed)


def test_every_setting_is_one_or_the_other() -> None:
    """A new setting of the section must be put into the key, or into this list."""
    decides = {"train", "eval", "format", "max_seq_len", "too_long", "train_on", "chat_template"}
    decides |= {"columns", "roles", "allow_lost", "template_date", "template_kwargs"}
    does_not = {"max_bad_fraction", "eval_fraction", "cache_dir", "packing", "group_by_length"}
    assert set(DataConfig.__dataclass_fields__) == decides | does_not


def test_bytes_and_tokenizer_that_decide_the_samples(
    tmp_path: Path, made, tokenizer_folder: Path
) -> None:
    """A change of the file, template, end token or vocabulary tokenizes data anew."""
    from transformers import AutoTokenizer

    path = tmp_path / "d.jsonl"
    before, status = path.read_bytes(), path.stat()
    path.write_bytes(before.replace(b'"b"', b'"c"', 1))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert made({}), "same size, same time, other bytes"
    path.write_bytes(before)
    assert not made({})

    def changed(change) -> object:
        other = AutoTokenizer.from_pretrained(tokenizer_folder)
        change(other)
        return other

    assert not made({}, tokenizer=changed(lambda same: None))
    assert made(
        {},
        tokenizer=changed(lambda other: setattr(other, "chat_template", " " + other.chat_template)),
    )
    assert made({}, tokenizer=changed(lambda other: setattr(other, "eos_token", "<|endoftext|>")))
    assert made({}, tokenizer=changed(lambda other: other.add_tokens(["fox"])))
    assert made({}, path=write_rows(tmp_path / "e.jsonl", CHAT)), "messages name the file"


def test_a_day_decides_the_samples_of_a_template_that_writes_it(made, tokenizer_folder) -> None:
    """Another day tokenizes anew, another second of it does not; nor does either without a date."""
    from transformers import AutoTokenizer

    dated = AutoTokenizer.from_pretrained(tokenizer_folder)
    dated.chat_template = "{{ strftime_now('%d %b %Y') }}" + dated.chat_template
    assert made({"template_date": "2024-02-29T07:05:00"}, tokenizer=dated)
    assert not made({"template_date": "2024-02-29T23:59:59"}, tokenizer=dated)
    assert made({"template_date": "2024-03-01"}, tokenizer=dated)
    made({})
    assert not made({"template_date": "2024-03-01"})


# -- samples on disk


samples = st.lists(
    st.lists(st.tuples(st.integers(0, 2**31 - 1), st.booleans()), min_size=1, max_size=9).map(
        lambda tokens: Sample(
            [t for t, _ in tokens], [t if is_target else IGNORE_INDEX for t, is_target in tokens]
        )
    ),
    max_size=8,
)


@quick
@given(samples, samples, st.data())
def test_rows_from_disk_are_those_of_memory(
    first: list[Sample], second: list[Sample], data: st.DataObject
) -> None:
    """Rows equal lists of samples: one after the other, concatenated, grouped and sliced."""
    with tempfile.TemporaryDirectory() as folder:
        parts = [stored(part, Path(folder) / str(i)) for i, part in enumerate((first, second))]
        both, expected = Rows.concatenated([*parts, parts[0]]), [*first, *second, *first]
        assert list(both) == expected
        assert both.lengths.tolist() == [len(sample.input_ids) for sample in expected]
        cut = data.draw(st.slices(len(expected)))
        assert both[cut] == expected[cut]
        order = data.draw(st.permutations(range(len(expected))))
        ends = sorted(data.draw(st.sets(st.integers(1, max(1, len(order) - 1))))) if order else []
        groups = [group for group in map(list, np.split(np.array(order, dtype=int), ends)) if group]
        grouped = both.grouped(groups)
        joined = [
            join([expected[i] for i in group]) if len(group) > 1 else expected[group[0]]
            for group in groups
        ]
        assert list(grouped) == joined
        assert (grouped.num_samples, len(grouped)) == (len(expected), len(groups))
        assert grouped.lengths.tolist() == [len(row.input_ids) for row in joined]
        twice = grouped.grouped([[i] for i in reversed(range(len(grouped)))])
        assert list(twice) == joined[::-1]
        assert (grouped.digest() == both.digest()) == (
            groups == [[i] for i in range(len(expected))]
        )
        with pytest.raises(IndexError):
            both[len(expected)]


# -- the account of rows


@quick
@given(rows("prompt_completion") | rows("text") | rows("messages"), data_settings)
def test_every_row_is_accounted_for(tokenizer, values: list[dict], config: dict) -> None:
    """Rows = used + faulty + without targets + too long.

    Of the used rows, some are cut and some are several samples.
    """
    try:
        made = encode(values, tokenizer, **config)
    except DataError:
        assume(False)
    report, limit = made.report, config["max_seq_len"]
    whole = encode(
        values, tokenizer, **{**config, "max_seq_len": 10**6, "too_long": "truncate_end"}
    )
    is_split = config["too_long"] == "split" and report.layout == "text"
    num_used = (
        whole.report.num_samples
        - report.num_too_long
        - (report.num_without_targets - whole.report.num_without_targets)
    )
    assert report.num_rows == len(values)
    assert (
        report.num_rows
        == num_used + report.faulty.num_rows + report.num_without_targets + report.num_too_long
    )
    assert report.faulty == whole.report.faulty
    assert report.num_samples == len(made.samples) >= num_used
    assert report.num_samples == num_used or is_split
    assert report.num_tokens == sum(len(sample.input_ids) for sample in made.samples)
    assert report.num_targets == sum(sample.num_targets for sample in made.samples)
    num_longer = sum(len(sample.input_ids) > limit for sample in whole.samples)
    assert report.num_cut + report.num_split + report.num_too_long <= num_longer
    if config["too_long"] == "drop":
        assert report.num_too_long == num_longer


@pytest.fixture(scope="module")
def starting_tokenizer(tokenizer_folder: Path):
    """Texts that begin with an `a` begin with the start token of this tokenizer."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tokenizer_folder, bos_token="a")


@pytest.mark.parametrize("too_long", ["truncate_end", "truncate_start", "split", "drop"])
@quick
@given(
    st.lists(words.map("a fox".__add__) | words.map("fox".__add__), min_size=1, max_size=9),
    st.integers(2, 30),
)
def test_what_too_long_rows_become(
    starting_tokenizer, too_long: str, texts: list[str], limit: int
) -> None:
    """A long row becomes its first tokens, its last ones after the start token, or pieces.

    With `drop`, nothing is left of it.
    """
    values = [{"text": text} for text in texts]
    whole = encode(values, starting_tokenizer, max_seq_len=10**6, max_bad_fraction=0.99).samples
    expected = []
    for sample in whole:
        ids = sample.input_ids
        if len(ids) <= limit:
            expected.append(ids)
        elif too_long == "truncate_end":
            expected.append(ids[:limit])
        elif too_long == "truncate_start":
            starts = ids[0] == starting_tokenizer.bos_token_id
            expected.append([ids[0], *ids[len(ids) - limit + 1 :]] if starts else ids[-limit:])
        elif too_long == "split":
            pieces = [ids[first : first + limit] for first in range(0, len(ids), limit)]
            assert [token for piece in pieces for token in piece] == ids
            expected += [
                piece for piece in pieces if len(piece) > 1
            ]  # one token has none to predict
    try:
        made = encode(
            values, starting_tokenizer, max_seq_len=limit, too_long=too_long, max_bad_fraction=0.99
        ).samples
    except DataError:
        made = []  # none is usable
    assert [sample.input_ids for sample in made] == expected


# -- from files to micro-batches


@quick
@given(
    st.lists(rows(), min_size=1, max_size=3),
    st.booleans(),
    st.sampled_from([24, 40, 256]),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(0, 99),
)
def test_every_token_is_seen_once_an_epoch(
    tokenizer,
    files: list,
    packing: bool,
    max_seq_len: int,
    world_size: int,
    micro: int,
    accum: int,
    seed: int,
) -> None:
    """Each token of each usable row is seen once an epoch, over all ranks and steps.

    It has the targets that it has alone. Rows are never over-full. An equal seed gives an equal
    order, another seed another order.
    """
    with tempfile.TemporaryDirectory() as folder:
        paths = tuple(
            Source(write_rows(Path(folder) / f"{i}.jsonl", values))
            for i, values in enumerate(files)
        )
        config = DataConfig(
            train=paths,
            packing=packing,
            max_seq_len=max_seq_len,
            max_bad_fraction=0.99,
            cache_dir=f"{folder}/cache",
        )
        try:
            alone = list(load_data(replace(config, packing=False), tokenizer, seed).train)
            data = load_data(config, tokenizer, seed)
        except DataError:
            assume(False)
        order = SampleOrder(data.sizes, seed, data.weights)
        plan = BatchPlan(order, micro, accum, world_size, end=len(data.train))
        seen: Counter = Counter()
        position = 0
        while position < len(data.train):
            for rank in range(world_size):
                for batch in step_batches(plan, position, data.train, rank, PAD):
                    assert batch.input_ids.shape[1] <= max_seq_len
                    seen.update(pairs_of(batch))
            position = plan.after_step(position)
        expected = Counter(
            pair for sample in alone for pair in zip(sample.input_ids, targets(sample), strict=True)
        )
        assert +seen == expected
        again = load_data(config, tokenizer, seed)
        assert list(again.train) == list(data.train)
        assert SampleOrder(again.sizes, seed, again.weights).between(0, 50) == order.between(0, 50)
    assert pack([1] * 40, 2, seed) != pack([1] * 40, 2, seed + 1)


def targets(sample: Sample) -> list[int]:
    """Return the labels; the first token of a sample has none, wherever the sample stands."""
    return [IGNORE_INDEX, *sample.labels[1:]]


def pairs_of(batch) -> list[tuple[int, int]]:
    """Return tokens with their labels.

    Padding, and rows that only keep ranks in step, are left out.
    """
    if not batch.num_tokens:
        return []
    labels = batch.labels.clone()
    labels[:, 0] = IGNORE_INDEX
    is_token = batch.attention_mask.bool()
    return list(zip(batch.input_ids[is_token].tolist(), labels[is_token].tolist(), strict=True))


# -- the loader


def plan_and_samples(tmp_path: Path) -> tuple[BatchPlan, Rows]:
    """Return eleven samples, in steps of four."""
    rows = stored(
        [Sample([i + 1] * (i % 4 + 2), [i + 1] * (i % 4 + 2)) for i in range(11)],
        tmp_path / "store",
    )
    return BatchPlan(SampleOrder((11,), 3), 2, 1, 2, end=22), rows


def same(left: list, right: list) -> bool:
    """True if micro-batches are equal in all fields."""
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        assert one.seed == other.seed
        for name in ("input_ids", "attention_mask", "labels"):
            assert getattr(one, name).equal(getattr(other, name))
    return True


def test_the_loader_makes_the_batches_of_each_step(tmp_path: Path) -> None:
    """The loader follows the plan to its short last step.

    It also follows jumps back or ahead, as of a resumed run.
    """
    plan, rows = plan_and_samples(tmp_path)
    in_order, position = [], 0
    while position < 22:
        in_order.append(position)
        position = plan.after_step(position)
    with StepLoader(plan, rows, 1, PAD, pin_memory=False) as loader:
        for position in [*in_order, 8, 8, 12, 0, 20]:
            assert same(loader.take(position), step_batches(plan, position, rows, 1, PAD))


class Slow(list):
    """Samples that take a while to read; one of them cannot be read."""

    bad = -1
    seconds = 0.0

    def __getitem__(self, index):
        time.sleep(self.seconds)
        if index == self.bad:
            raise OSError("the disk is gone")
        return super().__getitem__(index)


def test_a_fault_in_the_background_reaches_the_caller(tmp_path: Path) -> None:
    """The error is raised where its step is taken, not before; the thread ends with the context."""
    plan, rows = plan_and_samples(tmp_path)
    slow = Slow(rows)
    slow.bad = plan.micro_batches(4, 0)[0].indices[0]
    with StepLoader(plan, slow, 0, PAD, pin_memory=False) as loader:
        loader.take(0)
        with pytest.raises(OSError, match="the disk is gone"):
            loader.take(4)


def test_no_thread_outlives_the_loader(tmp_path: Path) -> None:
    """The thread ends even if an exception leaves the context in the middle of a step's work."""
    plan, rows = plan_and_samples(tmp_path)
    slow = Slow(rows)
    slow.seconds = 0.05
    before = loader_threads()
    with suppress(KeyError), StepLoader(plan, slow, 0, PAD, pin_memory=False) as loader:
        loader.take(0)
        assert len(loader_threads() - before) == 1
        raise KeyError
    deadline = time.monotonic() + 5
    while loader_threads() - before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not loader_threads() - before


def loader_threads() -> set[threading.Thread]:
    """Return the loader threads that are alive; threads of other tests may be among them."""
    return {thread for thread in threading.enumerate() if thread.name.startswith("data")}


def test_waiting_is_counted(tmp_path: Path) -> None:
    """Work done ahead while the caller computes is no waiting; the work still left is."""
    plan, rows = plan_and_samples(tmp_path)
    slow = Slow(rows)
    slow.seconds = 0.1  # two samples of each step are this rank's
    with StepLoader(plan, slow, 0, PAD, pin_memory=False) as loader:
        loader.take(0)
        first = loader.wait_seconds
        assert 0.2 <= first < 0.4
        time.sleep(0.5)
        loader.take(4)
        second = loader.wait_seconds
        assert second - first < 0.1
        loader.take(8)
        assert loader.wait_seconds - second >= 0.15


# -- memory

_MEASURE = """
import resource, sys, time
from transformers import AutoTokenizer
from qlora_dist.config.schema import DataConfig
from qlora_dist.data.dataset import load_data
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
def load(name):
    config = DataConfig(train=f"{sys.argv[1]}/{name}", cache_dir=f"{sys.argv[1]}/cache")
    return load_data(config, tokenizer, 0)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[2])
load("small.jsonl")
before, started = peak(), time.perf_counter()
num_rows = load("large.jsonl").reports[0].num_rows
print(peak() - before, num_rows / (time.perf_counter() - started), num_rows)
"""


@pytest.mark.slow  # it tokenizes 300 MB
def test_memory_does_not_grow_with_the_file(tmp_path: Path, tokenizer_folder: Path) -> None:
    """Chat rows of 300 MB take less than 100 MiB more than a small file, tokenized and opened."""
    turns = [
        {
            "role": role,
            "content": "the quick brown fox jumps over the lazy dog, and then some more. " * 8,
        }
        for role in ("user", "assistant") * 3
    ]
    row = json.dumps({"messages": turns}) + "\n"
    (tmp_path / "small.jsonl").write_text(row * 300)
    with (tmp_path / "large.jsonl").open("w") as out:
        for _ in range(300_000_000 // len(row) // 1000 + 1):
            out.write(row * 1000)
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(tmp_path), str(tokenizer_folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    grown, rows_per_second, num_rows = map(float, done.stdout.split())
    speed = f"{rows_per_second:,.0f} a second"
    print(f"{num_rows:,.0f} rows at {speed}, {grown:.0f} MiB more")  # noqa: T201
    assert grown < 100


def test_the_key_has_the_code_of_all_that_encodes() -> None:
    """Every module of the data that `encode` imports, directly or not, is part of the key."""
    found: set[str] = set()
    todo = ["encode"]
    while todo:
        if (name := todo.pop()) not in found:
            found.add(name)
            text = (Path(cache.__file__).parent / f"{name}.py").read_text("utf-8")
            todo += re.findall(r"^from qlora_dist\.data\.(\w+) import", text, re.MULTILINE)
    assert found == set(cache._CODE)
