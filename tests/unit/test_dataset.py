"""From the `data` section to training and evaluation samples."""

import json
from pathlib import Path

import pytest

from qlora_dist.config import DataConfig
from qlora_dist.data.chat import Sample
from qlora_dist.data.dataset import load_dataset
from qlora_dist.errors import DataError


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables are cached in the test's own folder, not in the user's."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


def chat_rows(file: Path, answers: list[str]) -> str:
    """Write one conversation per answer; returns the path as the config has it."""
    turns = [[{"role": "user", "content": "go"}, {"role": "assistant", "content": answer}] for answer in answers]
    file.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in turns))
    return str(file)


def answers_of(samples: list[Sample], tokenizer) -> list[str]:
    """What the samples teach."""
    return [
        tokenizer.decode([i for i in sample.labels if i >= 0], skip_special_tokens=True).strip() for sample in samples
    ]


def test_all_rows_train_when_nothing_is_held_out(tmp_path: Path, tokenizer) -> None:
    """Without an evaluation source every row is a training sample, in the order of the file."""
    path = chat_rows(tmp_path / "t.jsonl", ["a", "b", "c"])
    data = load_dataset(DataConfig(train=path), tokenizer, seed=0)
    assert answers_of(data.train, tokenizer) == ["a", "b", "c"]
    assert data.eval == []
    assert data.layout == "messages"


def test_an_evaluation_file_is_held_out_as_it_is(tmp_path: Path, tokenizer) -> None:
    """`data.eval` supplies the evaluation samples and takes none from training."""
    train = chat_rows(tmp_path / "t.jsonl", ["a", "b"])
    held_out = chat_rows(tmp_path / "e.jsonl", ["c", "d", "e"])
    data = load_dataset(DataConfig(train=train, eval=held_out), tokenizer, seed=0)
    assert answers_of(data.train, tokenizer) == ["a", "b"]
    assert answers_of(data.eval, tokenizer) == ["c", "d", "e"]


@pytest.mark.parametrize(("fraction", "num_eval"), [(0.25, 5), (0.5, 10), (0.01, 1), (0.9, 18)])
def test_eval_fraction_splits_the_rows(tmp_path: Path, tokenizer, fraction: float, num_eval: int) -> None:
    """Each row is on exactly one side; the share is rounded, and at least one row is held out."""
    words = [chr(ord("a") + i) for i in range(20)]
    path = chat_rows(tmp_path / "t.jsonl", words)
    data = load_dataset(DataConfig(train=path, eval_fraction=fraction), tokenizer, seed=0)
    train, held_out = answers_of(data.train, tokenizer), answers_of(data.eval, tokenizer)
    assert len(held_out) == num_eval
    assert sorted(train + held_out) == words


def test_the_split_is_a_function_of_the_seed(tmp_path: Path, tokenizer) -> None:
    """All ranks, and a resumed run, hold out the same rows; another seed holds out others, not just the last ones."""
    path = chat_rows(tmp_path / "t.jsonl", [chr(ord("a") + i) for i in range(20)])
    config = DataConfig(train=path, eval_fraction=0.3)
    splits = [answers_of(load_dataset(config, tokenizer, seed).eval, tokenizer) for seed in (0, 0, 1, 2)]
    assert splits[0] == splits[1]
    assert len({tuple(split) for split in splits}) == 3
    assert list("opqrst") not in splits


def test_a_split_that_leaves_nothing_to_train_on_is_refused(tmp_path: Path, tokenizer) -> None:
    """Holding out the only row is refused, with the setting, the number of rows and the remedy."""
    path = chat_rows(tmp_path / "t.jsonl", ["a"])
    with pytest.raises(DataError, match=r"data\.eval_fraction 0\.1 of 1 rows leaves no row to train on"):
        load_dataset(DataConfig(train=path, eval_fraction=0.1), tokenizer, seed=0)


def test_a_fault_is_blamed_on_the_setting_that_named_the_file(tmp_path: Path, tokenizer) -> None:
    """A missing evaluation file is reported under data.eval, a bad row under its own file."""
    train = chat_rows(tmp_path / "t.jsonl", ["a"])
    with pytest.raises(DataError, match=r"^data\.eval .*nowhere\.jsonl does not exist"):
        load_dataset(DataConfig(train=train, eval=str(tmp_path / "nowhere.jsonl")), tokenizer, seed=0)
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"messages": []}\n')
    with pytest.raises(DataError, match=r"bad\.jsonl, row 1"):
        load_dataset(DataConfig(train=train, eval=str(bad)), tokenizer, seed=0)


def test_the_layout_may_be_fixed(tmp_path: Path, tokenizer) -> None:
    """`data.format` refuses a file of the other layout instead of guessing."""
    path = chat_rows(tmp_path / "t.jsonl", ["a"])
    with pytest.raises(DataError, match=r"data\.format: prompt_completion needs"):
        load_dataset(DataConfig(train=path, format="prompt_completion"), tokenizer, seed=0)


def test_notes_say_what_became_of_the_rows(tmp_path: Path, tokenizer) -> None:
    """Rows, tokens and their share of targets, rows cut and rows dropped are told for each file."""
    rows = [
        {"prompt": "1", "completion": "2"},  # a token each, and the end token: 3 tokens, 2 of them targets
        {"prompt": "1", "completion": "2345678901"},  # cut to 8, 7 of them targets
        {"prompt": "1234567890", "completion": "2"},  # cut to 8, no target left
    ]
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    [note] = load_dataset(DataConfig(train=str(path), max_seq_len=8), tokenizer, seed=0).notes
    assert note == (
        f"{path}: 2 rows, 11 tokens, 82% of them targets, 1 rows cut to 8, 1 rows dropped (no target left)"
    )  # 9 / 11
