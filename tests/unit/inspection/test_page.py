"""The page of `qlora-dist data`: its rows and warnings, and its text on any terminal."""

import re
from fnmatch import fnmatch
from io import StringIO
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console

from qlora_dist.config.schema import DataConfig, OptimConfig, Source, TrainConfig
from qlora_dist.data.dataset import RunData, load_data
from qlora_dist.errors import ModelError
from qlora_dist.inspection.facts import gather_facts
from qlora_dist.inspection.page import (
    bars,
    choose_rows,
    print_facts,
    print_samples,
    print_warnings,
    warnings,
)
from qlora_dist.weights.files import resolve_model_folder
from tests.unit.data.test_dataset import chat_rows

SENTENCE = "the quick brown fox jumps over the lazy dog "


def load(
    *sources: Source, tokenizer, optim: dict | None = None, **data: object
) -> tuple[TrainConfig, RunData]:
    """Return a configuration of sources, not packed unless `data` says so, and its samples."""
    data_config = DataConfig(train=sources, **{"packing": False, **data})
    config = TrainConfig(data=data_config, optim=OptimConfig(max_steps=1, **(optim or {})))
    return config, load_data(config.data, tokenizer, config.seed)


def page(
    config: TrainConfig, data: RunData, tokenizer, num_shown: int = 3, **settings: object
) -> str:
    """Return all that is printed."""
    out = StringIO()
    console = Console(file=out, markup=False, highlight=False, emoji=False, **settings)
    facts = gather_facts(data, config, tokenizer)
    print_facts(console, facts)
    print_samples(console, choose_rows(data, num_shown, config.seed), tokenizer)
    print_warnings(console, facts)
    return out.getvalue()


def found_in(config: TrainConfig, data: RunData, tokenizer) -> list[str]:
    """Return the warnings about a data set."""
    return warnings(gather_facts(data, config, tokenizer))


def awkward(folder: Path, tokenizer) -> tuple[TrainConfig, RunData]:
    """Return two sources with all that could break a line in their names and rows.

    Lengths, brackets, wide characters, tabs, control characters; some rows are faulty, some
    cut.
    """
    name = "[red]" + "very-long-name-" * 12
    answers = [
        "a" * 300,
        "[bold]not bold[/bold]",
        "日本語" * 60,
        "\tx\t" * 40,
        "\x1b[31mred\x07",
        SENTENCE * 9,
    ] * 2
    first = Path(chat_rows(folder / f"{name}.jsonl", answers))
    first.write_text(first.read_text() + '{"messages": []}\n')
    second = chat_rows(folder / "second\x1b[2J.jsonl", ["1", "2"])
    return load(
        Source(str(first), 2.0),
        Source(second),
        tokenizer=tokenizer,
        max_seq_len=256,
        eval_fraction=0.1,
        max_bad_fraction=0.5,
    )


@pytest.mark.parametrize("width", [40, 80, 140])
def test_no_line_is_too_long(tmp_path: Path, tokenizer, width: int) -> None:
    """Every line fits the width, whatever is in the data, so that no terminal wraps it."""
    config, data = awkward(tmp_path, tokenizer)
    lines = page(config, data, tokenizer, width=width).splitlines()
    long = [line for line in lines if cell_len(line) > width]
    assert (
        not long if width > 40 else all("  " in line for line in long)
    )  # tables of numbers are not cut


@pytest.mark.parametrize("settings", [{}, {"force_terminal": True, "color_system": "truecolor"}])
def test_only_colors_and_text_are_printed(tmp_path: Path, tokenizer, settings: dict) -> None:
    """A log file gets no control character, a terminal only colors. Brackets are no markup."""
    config, data = awkward(tmp_path, tokenizer)
    text = page(config, data, tokenizer, num_shown=20, width=100, **settings)
    assert ("\x1b" in text) == bool(settings)
    left = re.sub(r"\x1b\[[0-9;]*m", "", text)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", left)
    assert "second⟨U+001B⟩[2J.jsonl" in left
    assert "⟨U+001B⟩[31mred⟨U+0007⟩" in left
    assert "[bold]not bold[/bold]" in left
    assert ("⟦" in left) == (not settings)


def test_marks_instead_of_colors_where_these_are_not_wanted(tmp_path: Path, tokenizer) -> None:
    """With NO_COLOR on a terminal, marks show the mask."""
    config, data = load(
        Source(chat_rows(tmp_path / "t.jsonl", ["fox", "dog"])), tokenizer=tokenizer
    )
    text = page(
        config,
        data,
        tokenizer,
        width=80,
        force_terminal=True,
        color_system="standard",
        no_color=True,
    )
    assert "⟦fox<|im_end|>⟧" in text


def test_what_became_of_each_row_is_told(tmp_path: Path, tokenizer) -> None:
    """The page has format, counts, weight and share of a source, and faults with first places."""
    config, data = awkward(tmp_path, tokenizer)
    lines = [
        line.strip() for line in page(config, data, tokenizer, num_shown=0, width=400).splitlines()
    ]
    report = data.reports[0]
    assert "13 rows of format messages → 12 samples" in lines
    share = f"{report.num_targets / report.num_tokens:.1%}"
    assert f"{report.num_tokens:,} tokens, {share} of them targets" in lines
    assert f"{report.num_cut} cut to 256 tokens ({report.num_cut / 13:.1%})" in lines
    assert report.num_cut > 0
    assert "1 left out as faulty (7.7%):" in lines
    assert any(re.fullmatch(r"1 x empty row, first: .*\.jsonl, row 13", line) for line in lines)
    [weight] = [line for line in lines if line.startswith("weight 2: ")]
    assert weight.endswith("% of an epoch's tokens")
    assert "WHAT THE MODEL SEES" not in lines


def test_shown_rows_are_spread_over_sources(tmp_path: Path, tokenizer) -> None:
    """Sources take turns, no row comes twice, and the seed alone decides."""
    sources = [
        Source(chat_rows(tmp_path / f"{name}.jsonl", list(name)))
        for name in ("abcdefgh", "x", "mnop")
    ]
    _, data = load(*sources, tokenizer=tokenizer)
    names = [Path(path).stem for path, _ in choose_rows(data, 5, seed=0)]
    assert names == ["abcdefgh", "x", "mnop", "abcdefgh", "mnop"]
    for path, sample in choose_rows(data, 100, seed=0):
        answer = tokenizer.decode([i for i in sample.labels if i >= 0], skip_special_tokens=True)
        assert answer in Path(path).stem
    assert len({tuple(sample.input_ids) for _, sample in choose_rows(data, 100, seed=0)}) == 13
    assert (
        choose_rows(data, 5, seed=0) == choose_rows(data, 5, seed=0) != choose_rows(data, 5, seed=1)
    )
    assert choose_rows(data, 0, seed=0) == []


def test_bars_are_as_long_as_counts(tmp_path: Path, tokenizer) -> None:
    """The largest bin has the longest bar, half of it half of that, and no sample is invisible."""
    answers = ["1"] * 400 + ["1" * 9] * 200 + ["1" * 50]
    config, data = load(Source(chat_rows(tmp_path / "t.jsonl", answers)), tokenizer=tokenizer)
    lines = bars(gather_facts(data, config, tokenizer).train, 76)
    lengths = [line.count("█") for line in lines if "│" in line]
    assert max(lengths) == 40
    assert 20 in lengths
    assert "▏" in lines[-1]
    assert all(line.endswith("%") for line in lines)


@pytest.mark.parametrize("needs_weights", [True, False])
def test_the_tokenizer_is_fetched_without_weights(
    monkeypatch: pytest.MonkeyPatch, needs_weights: bool
) -> None:
    """For a hub name only the small files are fetched, unless the model is to be loaded."""
    asked: list[str] = []

    def snapshot_download(name: str, allow_patterns: list[str]) -> str:
        asked.extend(allow_patterns)
        raise OSError("offline")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(ModelError, match="could not be fetched"):
        resolve_model_folder("owner/model", needs_weights=needs_weights)
    wanted = {
        file
        for file in (
            "model-00001.safetensors",
            "model.safetensors.index.json",
            "tokenizer.json",
            "t.jinja",
        )
        if any(fnmatch(file, pattern) for pattern in asked)
    }
    assert wanted == {"model.safetensors.index.json", "tokenizer.json", "t.jinja"} | (
        {"model-00001.safetensors"} if needs_weights else set()
    )


# -- warnings


def test_good_data_have_nothing_worth_a_look(tmp_path: Path, tokenizer) -> None:
    """Without findings, the page tells the checks that were made."""
    config, data = load(
        Source(chat_rows(tmp_path / "t.jsonl", list("abcdef"))), tokenizer=tokenizer
    )
    assert found_in(config, data, tokenizer) == []
    assert page(config, data, tokenizer, width=100).splitlines()[-2:] == [
        "WORTH A LOOK",
        "  Nothing: no sample twice, none both trained and evaluated on, no empty answer.",
    ]


def test_copies_on_both_sides_of_a_split_are_told(tmp_path: Path, tokenizer) -> None:
    """Ten copies of a row are told: nine of them train, and the held-out one is among them."""
    config, data = load(
        Source(chat_rows(tmp_path / "t.jsonl", ["fox"] * 10)),
        tokenizer=tokenizer,
        eval_fraction=0.1,
    )
    copies, leak = found_in(config, data, tokenizer)
    assert copies.startswith("8 training samples (88.9%) are copies of others")
    assert "comes 9 times; its answer: 'fox<|im_end|>'" in copies
    assert leak.startswith(
        "1 of 1 evaluation samples are training samples as well, token for token. The evaluation"
    )


def test_prompts_on_both_sides_are_told(tmp_path: Path, tokenizer) -> None:
    """A held-out question that training has with another answer is told."""
    train, held_out = tmp_path / "t.jsonl", tmp_path / "e.jsonl"
    train.write_text("".join(f'{{"prompt": "fox {i}", "completion": "a"}}\n' for i in range(4)))
    held_out.write_text(
        '{"prompt": "fox 2", "completion": "b"}\n{"prompt": "dog", "completion": "a"}\n'
    )
    config, data = load(Source(str(train)), tokenizer=tokenizer, eval=str(held_out))
    [leak] = found_in(config, data, tokenizer)
    assert leak.startswith(
        "1 of 2 evaluation samples have the prompt of a training sample, with another answer. "
    )


def test_cut_rows_are_told(tmp_path: Path, tokenizer) -> None:
    """Rows that lose tokens or are dropped are told, and missing end tokens if frequent."""
    rows = chat_rows(tmp_path / "t.jsonl", ["1" * 99, "2" * 99, "3" * 99, "4"])
    config, data = load(Source(rows), tokenizer=tokenizer, max_seq_len=64)
    no_end, cut = found_in(config, data, tokenizer)
    assert no_end.startswith("3 of 4 training samples end without an end token")
    assert cut.startswith(
        f"3 of 4 rows of {rows} lose tokens or are dropped at data.max_seq_len (64)"
    )


@pytest.mark.parametrize(
    ("grouped", "instead"), [(False, ""), (True, " instead of data.group_by_length")]
)
def test_padding_is_told_with_its_remedy(
    tmp_path: Path, tokenizer, grouped: bool, instead: str
) -> None:
    """A micro-batch of one long row and many short ones is mostly padding; packed, it is not."""
    answers = [str(i) for i in range(10, 40)] + ["1" * 200]
    rows = chat_rows(tmp_path / "t.jsonl", answers)
    config, data = load(
        Source(rows),
        tokenizer=tokenizer,
        optim={"micro_batch_size": 31},
        max_seq_len=256,
        group_by_length=grouped,
    )
    [padding] = found_in(config, data, tokenizer)
    told = (
        r"\d\d% of what is computed is padding\. data\.packing: true{} makes that \d+%; "
        r"lower optim\.micro_batch_size "
    )
    assert re.match(told.format(instead), padding)


def test_a_step_of_more_rows_than_an_epoch_is_told(tmp_path: Path, tokenizer) -> None:
    """A step of more rows than an epoch has, which sees rows twice, is told."""
    rows = chat_rows(tmp_path / "t.jsonl", list("ab"))
    config, data = load(Source(rows), tokenizer=tokenizer, optim={"grad_accum_steps": 8})
    [short] = found_in(config, data, tokenizer)
    assert (
        short == "an epoch has 2 rows, fewer than the 8 of one step. Lower optim.grad_accum_steps."
    )
