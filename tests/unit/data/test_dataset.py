"""Training and evaluation samples from the `data` section."""

import json
from functools import partial
from pathlib import Path

import pytest

from qlora_dist.config.schema import DataConfig, Source
from qlora_dist.data.dataset import load_data
from qlora_dist.data.samples import Sample
from qlora_dist.errors import DataError

padded = partial(DataConfig, packing=False)
"""Settings of one sample a row; packed rows are in test_packing.py and test_cache.py."""


def chat_rows(file: Path, answers: list[str]) -> str:
    """Write one conversation per answer; return the path as the config has it."""
    turns = [
        [{"role": "user", "content": "go"}, {"role": "assistant", "content": answer}]
        for answer in answers
    ]
    file.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in turns))
    return str(file)


def answers_of(samples: list[Sample], tokenizer) -> list[str]:
    """Return the texts that the samples teach."""
    return [
        tokenizer.decode([i for i in sample.labels if i >= 0], skip_special_tokens=True).strip()
        for sample in samples
    ]


def test_all_rows_train_when_nothing_is_held_out(tmp_path: Path, tokenizer) -> None:
    """Without an evaluation source every row is a training sample, in the order of the file."""
    path = chat_rows(tmp_path / "t.jsonl", ["a", "b", "c"])
    data = load_data(padded(train=path), tokenizer, seed=0)
    assert answers_of(data.train, tokenizer) == ["a", "b", "c"]
    assert list(data.eval) == []
    assert data.layout == "messages"


def test_an_evaluation_file_is_held_out_as_it_is(tmp_path: Path, tokenizer) -> None:
    """`data.eval` supplies the evaluation samples and takes none from training."""
    train = chat_rows(tmp_path / "t.jsonl", ["a", "b"])
    held_out = chat_rows(tmp_path / "e.jsonl", ["c", "d", "e"])
    data = load_data(padded(train=train, eval=held_out), tokenizer, seed=0)
    assert answers_of(data.train, tokenizer) == ["a", "b"]
    assert answers_of(data.eval, tokenizer) == ["c", "d", "e"]


@pytest.mark.parametrize(("fraction", "num_eval"), [(0.25, 5), (0.5, 10), (0.01, 1), (0.9, 18)])
def test_eval_fraction_splits_the_rows(
    tmp_path: Path, tokenizer, fraction: float, num_eval: int
) -> None:
    """Each row is on exactly one side; the share is rounded, and at least one row is held out."""
    words = [chr(ord("a") + i) for i in range(20)]
    path = chat_rows(tmp_path / "t.jsonl", words)
    data = load_data(padded(train=path, eval_fraction=fraction), tokenizer, seed=0)
    train, held_out = answers_of(data.train, tokenizer), answers_of(data.eval, tokenizer)
    assert len(held_out) == num_eval
    assert sorted(train + held_out) == words


def test_the_split_is_a_function_of_the_seed(tmp_path: Path, tokenizer) -> None:
    """All ranks, and a resumed run, hold out the same rows.

    Another seed holds out other rows, not just the last ones.
    """
    path = chat_rows(tmp_path / "t.jsonl", [chr(ord("a") + i) for i in range(20)])
    config = padded(train=path, eval_fraction=0.3)
    splits = [
        answers_of(load_data(config, tokenizer, seed).eval, tokenizer) for seed in (0, 0, 1, 2)
    ]
    assert splits[0] == splits[1]
    assert len({tuple(split) for split in splits}) == 3
    assert list("opqrst") not in splits


def test_a_split_that_leaves_nothing_to_train_on_is_refused(tmp_path: Path, tokenizer) -> None:
    """Holding out the only row is refused, with the setting, the number of rows and the remedy."""
    path = chat_rows(tmp_path / "t.jsonl", ["a"])
    with pytest.raises(
        DataError,
        match=r"data\.eval_fraction 0\.1 of 1 rows leaves no row of .*t\.jsonl to train on",
    ):
        load_data(padded(train=path, eval_fraction=0.1), tokenizer, seed=0)


def test_a_fault_is_blamed_on_the_setting_that_named_the_file(tmp_path: Path, tokenizer) -> None:
    """A missing evaluation file is reported under data.eval, a bad row under its own file."""
    train = chat_rows(tmp_path / "t.jsonl", ["a"])
    with pytest.raises(DataError, match=r"^data\.eval .*nowhere\.jsonl does not exist"):
        load_data(padded(train=train, eval=str(tmp_path / "nowhere.jsonl")), tokenizer, seed=0)
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"messages": []}\n')
    with pytest.raises(DataError, match=r"bad\.jsonl, row 1"):
        load_data(padded(train=train, eval=str(bad)), tokenizer, seed=0)


def test_the_layout_may_be_fixed(tmp_path: Path, tokenizer) -> None:
    """`data.format` refuses a file of the other layout instead of guessing."""
    path = chat_rows(tmp_path / "t.jsonl", ["a"])
    with pytest.raises(DataError, match=r"data\.format: prompt_completion needs"):
        load_data(padded(train=path, format="prompt_completion"), tokenizer, seed=0)


def test_notes_say_what_became_of_the_rows(tmp_path: Path, tokenizer) -> None:
    """The notes count rows, tokens, share of targets, and rows cut and dropped, file by file."""
    rows = [
        # A token each, and the end token: 3 tokens, 2 of them targets.
        {"prompt": "1", "completion": "2"},
        {"prompt": "1", "completion": "2345678901"},  # cut to 8, 7 of them targets
        {"prompt": "1234567890", "completion": "2"},  # cut to 8, no target left
    ]
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    [note] = load_data(padded(train=str(path), max_seq_len=8), tokenizer, seed=0).notes
    assert note == (
        f"{path}: format prompt_completion, 2 rows, 11 tokens, 82% of them targets, "
        "1 rows cut to 8, 1 rows dropped (no target left)"
    )  # 9 / 11


def test_faulty_rows_are_left_out_and_told(tmp_path: Path, tokenizer) -> None:
    """Up to data.max_bad_fraction, faulty rows are left out; notes give reasons and places."""
    path = Path(chat_rows(tmp_path / "t.jsonl", ["a", "b"]))
    path.write_text(
        '{"messages": []}\n'
        + path.read_text()
        + '{"messages": []}\n{"messages": [{"role": "bot"}]}\n'
    )
    data = load_data(padded(train=str(path), max_bad_fraction=0.6), tokenizer, seed=0)
    assert answers_of(data.train, tokenizer) == ["a", "b"]
    assert data.notes[0].endswith(
        f", 3 faulty rows left out: empty row: 2 (first: {path}, row 1), "
        f"unknown role: 1 ({path}, row 5)"
    )
    with pytest.raises(
        DataError,
        match=r"row 1: `messages` is \[\].* 3 of 5 rows .*data\.max_bad_fraction \(0\.5\)",
    ):
        load_data(padded(train=str(path), max_bad_fraction=0.5), tokenizer, seed=0)


def test_formats_are_told_and_the_layout_is_how_the_model_sees_them(
    tmp_path: Path, tokenizer
) -> None:
    """The model sees chat in whatever format a conversation was written; notes name the format."""
    rows = {
        "sharegpt": {
            "conversations": [{"from": "human", "value": "go"}, {"from": "gpt", "value": "a"}]
        },
        "alpaca": {"instruction": "go", "output": "a"},
        "text": {"text": "a"},
    }
    layouts = {}
    for name, row in rows.items():
        path = tmp_path / f"{name}.jsonl"
        path.write_text(json.dumps(row) + "\n")
        data = load_data(padded(train=str(path)), tokenizer, seed=0)
        assert data.notes[0].startswith(f"{path}: format {name}, 1 rows, ")
        layouts[name] = data.layout
        assert answers_of(data.train, tokenizer) == ["a"]
    assert layouts == {"sharegpt": "messages", "alpaca": "messages", "text": "text"}


# -- several files


def test_several_files_follow_each_other(tmp_path: Path, tokenizer) -> None:
    """Each file's samples are one source, with a size and a weight.

    Layouts may differ; the first source's layout counts.
    """
    chat = chat_rows(tmp_path / "c.jsonl", ["a", "b", "c"])
    plain = tmp_path / "p.jsonl"
    plain.write_text('{"prompt": "go", "completion": "d"}\n{"prompt": "go", "completion": "e"}\n')
    data = load_data(padded(train=(Source(chat, 2.0), Source(str(plain), 0.5))), tokenizer, seed=0)
    assert answers_of(data.train, tokenizer) == ["a", "b", "c", "d", "e"]
    assert (data.sizes, data.weights, data.layout) == ((3, 2), (2.0, 0.5), "messages")
    assert [note.rpartition(", ")[2] for note in data.notes] == ["weight 2", "weight 0.5"]
    assert [note.partition(":")[0] for note in data.notes] == [chat, str(plain)]


def test_one_file_is_one_source(tmp_path: Path, tokenizer) -> None:
    """A plain path is a source of weight 1, and the notes do not mention the weight."""
    data = load_data(padded(train=chat_rows(tmp_path / "t.jsonl", ["a", "b"])), tokenizer, seed=0)
    assert (data.sizes, data.weights) == ((2,), (1.0,))
    assert "weight" not in data.notes[0]


def test_several_evaluation_files_are_one_set(tmp_path: Path, tokenizer) -> None:
    """All rows of all evaluation files are evaluated, in the order of the files."""
    train = chat_rows(tmp_path / "t.jsonl", ["a"])
    files = tuple(chat_rows(tmp_path / f"{name}.jsonl", list(name)) for name in ("bc", "def"))
    data = load_data(padded(train=train, eval=files), tokenizer, seed=0)
    assert answers_of(data.eval, tokenizer) == list("bcdef")
    assert [note.partition(":")[0] for note in data.notes] == [train, *files]


def test_each_file_gives_its_share_to_evaluation(tmp_path: Path, tokenizer) -> None:
    """`eval_fraction` is of every file, whatever its size and weight, and at least one row of each.

    The rows held out of a file do not depend on other files.
    """
    words = {"large": [chr(ord("a") + i) for i in range(20)], "small": list("uvwx")}
    paths = {name: chat_rows(tmp_path / f"{name}.jsonl", rows) for name, rows in words.items()}
    together = padded(
        train=(Source(paths["large"]), Source(paths["small"], 3.0)), eval_fraction=0.1
    )
    data = load_data(together, tokenizer, seed=0)
    assert data.sizes == (18, 3)
    assert (
        sorted(answers_of([*data.train, *data.eval], tokenizer)) == words["large"] + words["small"]
    )
    assert data.notes[-1] == "held out 3 of 24 rows for evaluation"
    alone = [
        load_data(padded(train=path, eval_fraction=0.1), tokenizer, seed=0).eval
        for path in paths.values()
    ]
    assert list(data.eval) == [*alone[0], *alone[1]]


def test_a_fault_in_one_of_several_files_names_it(tmp_path: Path, tokenizer) -> None:
    """The message names a missing file, a faulty row, and a file too small to hold a row out."""
    good = chat_rows(tmp_path / "good.jsonl", ["a", "b", "c"])
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"messages": []}\n')
    one = chat_rows(tmp_path / "one.jsonl", ["a"])
    for path, fraction, message in (
        (str(tmp_path / "nowhere.jsonl"), 0.0, r"^data\.train .*nowhere\.jsonl does not exist"),
        (str(bad), 0.0, r"bad\.jsonl, row 1"),
        (one, 0.3, r"of 1 rows leaves no row of .*one\.jsonl to train on"),
    ):
        with pytest.raises(DataError, match=message):
            load_data(
                padded(train=(Source(good), Source(path)), eval_fraction=fraction),
                tokenizer,
                seed=0,
            )


def test_the_fingerprint_is_of_everything_that_decides_the_stream(
    tmp_path: Path, tokenizer
) -> None:
    """Equal configurations have equal fingerprints.

    Other rows, files, weights, cuts or borders between files change the fingerprint.
    """
    ab, cd = (chat_rows(tmp_path / f"{name}.jsonl", list(name)) for name in ("ab", "cd"))
    abc, d = (chat_rows(tmp_path / f"{name}.jsonl", list(name)) for name in ("abc", "d"))
    abcd = chat_rows(tmp_path / "abcd.jsonl", list("abcd"))

    def fingerprint(*sources: Source, max_seq_len: int = 1024) -> str:
        config = padded(train=sources, max_seq_len=max_seq_len)
        return load_data(config, tokenizer, seed=0).fingerprint()

    num_tokens = len(load_data(padded(train=ab), tokenizer, seed=0).train[0].input_ids)
    both = fingerprint(Source(ab), Source(cd))
    assert both == fingerprint(Source(ab), Source(cd, 1.0))
    others = {
        fingerprint(Source(cd), Source(ab)),
        fingerprint(Source(ab), Source(cd, 2.0)),
        fingerprint(Source(ab, 2.0), Source(cd)),
        fingerprint(Source(abc), Source(d)),
        fingerprint(Source(abcd)),
        fingerprint(Source(ab)),
        fingerprint(Source(ab), Source(cd), max_seq_len=num_tokens - 1),
    }
    assert len(others - {both}) == 7
