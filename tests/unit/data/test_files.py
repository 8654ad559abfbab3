"""Files of a source: those that are left out, saved data sets, and files on both sides."""

import json
import os
from pathlib import Path

import pytest

from qlora_dist.config.schema import DataConfig
from qlora_dist.data.dataset import load_data
from qlora_dist.data.files import find, find_files, left_out_remark
from qlora_dist.data.sources import check_sources, load_rows, source_fingerprint
from qlora_dist.errors import DataError


def write(folder: Path, *names: str) -> Path:
    """Return a folder with files of one row each, which has the file's name as its text."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_text(json.dumps({"text": name}) + "\n")
    return folder


def names(path: Path | str, key: str = "data.train") -> list[str]:
    """Return the names of a source's files."""
    return [file.name for file in find_files(str(path), key)]


def texts(path: Path | str) -> list[str]:
    """Return the column `text` of a source."""
    return [row.values["text"] for row in load_rows(str(path), "data.train")]


def refusal(path: Path | str, key: str = "data.train") -> str:
    """Return the message that refuses a source, which begins with its key and path."""
    with pytest.raises(DataError) as caught:
        find_files(str(path), key)
    assert str(caught.value).startswith(f"{key} {path}")
    return str(caught.value)


# -- files that by their names are for evaluation, or for training

HELD_OUT = [
    "test.jsonl",
    "validation.jsonl",
    "eval.jsonl",
    "dev.jsonl",
    "val.jsonl",
    "valid.jsonl",
    "Test.JSONL",
    "test-00000-of-00002.jsonl",
    "validation_01.jsonl",
    "chat_test.jsonl",
    "alpaca-eval.jsonl",
    "mine.dev.jsonl",
    "test2.jsonl",
]
NOT_HELD_OUT = [
    "train.jsonl",
    "a.jsonl",
    "latest.jsonl",
    "contest.jsonl",
    "test_cases_of_code.jsonl",
    "developers.jsonl",
    "evaluator.jsonl",
    "invalid.jsonl",
    "testimony.jsonl",
]


@pytest.mark.parametrize("name", HELD_OUT)
def test_files_held_out_by_name_are_not_trained(tmp_path: Path, name: str) -> None:
    """A folder's held-out files are left out of training, and said with the remedy.

    The remedy holds: named itself, the file is trained on.
    """
    folder = write(tmp_path / "d", name, "a.jsonl", "train.jsonl")
    assert names(folder) == ["a.jsonl", "train.jsonl"]
    assert names(folder / "*") == ["a.jsonl", "train.jsonl"]
    remark = left_out_remark(str(folder), "data.train")
    assert remark == (
        f"data.train {folder}: left out {name}, by name not for training; to train on such a file "
        f"all the same, name the file itself, such as {folder / name}"
    )
    assert texts(folder / name) == [name]
    assert left_out_remark(str(folder / name), "data.train") == ""


@pytest.mark.parametrize("name", NOT_HELD_OUT)
def test_other_files_are_trained(tmp_path: Path, name: str) -> None:
    """A word within another word, or in the middle of a name, holds no file out."""
    folder = write(tmp_path / "d", name, "b.jsonl")
    assert set(names(folder)) == {name, "b.jsonl"}
    assert left_out_remark(str(folder), "data.train") == ""


@pytest.mark.parametrize(
    "name", ["b.ndjson", "b.txt", "b.tsv", "b.jsonl.xz", "b.parquet.gz", "b.jsonl.1", "b", "sub/"]
)
def test_what_is_not_read_beside_the_files_is_said(tmp_path: Path, name: str) -> None:
    """Files of other kinds and folders with data are named, with the remedy; papers are not."""
    folder = write(tmp_path / "d", "train.jsonl", "README.md", ".gitattributes", "LICENSE")
    (folder / "images").mkdir()
    write(folder / ".cache", "x.jsonl")
    assert left_out_remark(str(folder), "data.train") == ""
    if name.endswith("/"):
        write(folder / name / "deeper", "x.jsonl")
    else:
        write(folder, name)
    assert names(folder) == ["train.jsonl"]
    remark = left_out_remark(str(folder), "data.train")
    assert remark.startswith(
        f"data.train {folder}: did not read {name}, beside its .jsonl files; to"
    )
    write(folder, "test.jsonl")
    assert left_out_remark(str(folder), "data.train").endswith(f"{folder / 'test.jsonl'}. {remark}")


@pytest.mark.parametrize("pattern", ["**", "**/*.jsonl", "*/*.jsonl", "*/[01].jsonl"])
@pytest.mark.parametrize("name", ["test", "validation", "Eval", "dev_1"])
def test_folders_that_a_pattern_finds_are_held_out_by_name(
    tmp_path: Path, pattern: str, name: str
) -> None:
    """A folder `test` that a pattern descends into is not trained on; `train` is not evaluated on.

    A folder that the source names itself is meant, as a file is.
    """
    folder = tmp_path / "dev"  # above the pattern, where names say nothing
    for split in ("train", name):
        write(folder / split, "0.jsonl", "1.jsonl")
    source = str(folder / pattern)
    trained, evaluated = (find_files(source, key) for key in ("data.train", "data.eval"))
    assert {file.parent.name for file in trained} == {"train"}
    assert {file.parent.name for file in evaluated} == {name}
    check_sources([source], [source])
    assert f"left out {folder / name / '0.jsonl'}, " in left_out_remark(source, "data.train")
    assert len(find_files(str(folder / name / "*"), "data.train")) == 2
    assert len(find_files(str(folder / name), "data.train")) == 2


def test_compressed_files_are_held_out_alike(tmp_path: Path) -> None:
    """The suffix of a compression is no part of the name."""
    import gzip

    folder = write(tmp_path / "d", "train.jsonl")
    (folder / "test.jsonl.gz").write_bytes(gzip.compress(b'{"text": "x"}\n'))
    assert names(folder) == ["train.jsonl"]


def test_a_folder_of_held_out_files_alone_is_refused(tmp_path: Path) -> None:
    """A folder without any other file is an error with the remedy; a pattern for them is meant."""
    folder = write(tmp_path / "d", "test.jsonl", "dev.jsonl")
    message = refusal(folder)
    assert "holds only files that are held out by their names (dev.jsonl, test.jsonl)." in message
    assert message.endswith(f"name the file itself: {folder / 'dev.jsonl'}.")
    assert names(folder / "t*.jsonl") == ["test.jsonl"]


def test_evaluation_takes_the_files_for_it(tmp_path: Path) -> None:
    """One folder serves both sides: training files are not evaluated on beside held-out ones."""
    folder = write(tmp_path / "d", "train-0.jsonl", "train-1.jsonl", "test.jsonl")
    assert names(folder) == ["train-0.jsonl", "train-1.jsonl"]
    assert names(folder, "data.eval") == ["test.jsonl"]
    assert "left out train-0.jsonl, train-1.jsonl, by name not for evaluation" in left_out_remark(
        str(folder), "data.eval"
    )
    check_sources([str(folder)], [str(folder)])
    other = write(tmp_path / "e", "train.jsonl", "more.jsonl")
    assert names(other, "data.eval") == ["more.jsonl", "train.jsonl"]


def test_the_log_says_what_is_left_out(tmp_path: Path, tokenizer) -> None:
    """One sentence of the log names the file, also when the tokenized data were in the cache."""
    folder = write(tmp_path / "d", "train.jsonl")
    config = DataConfig(train=str(folder))
    assert not any("left out" in note for note in load_data(config, tokenizer, 0).notes)
    write(folder, "test.jsonl")
    data = load_data(config, tokenizer, 0)
    assert [note for note in data.notes if "left out" in note] == [
        left_out_remark(str(folder), "data.train")
    ]
    assert data.train.num_samples == 1


# -- saved by `datasets`


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Return the folder of a DatasetDict; each row's text is its split."""
    from datasets import Dataset, DatasetDict

    tables = {split: Dataset.from_list([{"text": split}] * 2) for split in ("train", "test", "x")}
    DatasetDict(tables).save_to_disk(tmp_path / "saved")
    return tmp_path / "saved"


def test_a_saved_table_is_a_source(tmp_path: Path) -> None:
    """All rows come in order; files that an earlier save left in the folder are none of them."""
    from datasets import Dataset

    rows = [{"text": str(number)} for number in range(7)]
    Dataset.from_list(rows).save_to_disk(tmp_path / "d", num_shards=3)
    assert texts(tmp_path / "d") == [row["text"] for row in rows]
    before = source_fingerprint(str(tmp_path / "d"), "data.train")
    Dataset.from_list(rows[:2]).save_to_disk(tmp_path / "d")
    assert len(list((tmp_path / "d").glob("*.arrow"))) == 4
    assert texts(tmp_path / "d") == ["0", "1"]
    assert source_fingerprint(str(tmp_path / "d"), "data.train") != before


@pytest.mark.parametrize("split", ["train", "test", "x"])
def test_a_split_of_a_saved_dict_is_a_source(saved: Path, split: str) -> None:
    """`FOLDER:split` and `FOLDER/split` are that split, whatever its name."""
    assert texts(f"{saved}:{split}") == texts(saved / split) == [split] * 2
    check_sources([f"{saved}:train"], [f"{saved}:test"])


def test_a_saved_dict_says_what_it_is(saved: Path) -> None:
    """Without a split, or with an unknown one, the message lists the splits and names one."""
    assert refusal(saved) == (
        f"data.train {saved} is a saved DatasetDict with the splits train, test, x. Name one, such "
        f"as {saved}:train."
    )
    assert refusal(f"{saved}:dev").endswith(
        f"has no split 'dev'. Its splits are train, test, x: name one, such as {saved}:train."
    )
    assert f"Give {saved / 'x'}, or a file in it." in refusal(f"{saved / 'x'}:train")


@pytest.mark.parametrize("fault", ["missing", "broken", "no list"])
def test_a_broken_saved_table_is_refused(saved: Path, fault: str) -> None:
    """A copy that lacks a file of the table, or whose list of them is broken, is never read."""
    table = saved / "train"
    if fault == "missing":
        next(table.glob("*.arrow")).unlink()
    else:
        (table / "state.json").write_text("{" if fault == "broken" else '{"_data_files": [3]}')
    for path in (table, f"{saved}:train"):
        assert "is no whole saved data set" in refusal(path)
        assert refusal(path).endswith("again.")


@pytest.mark.parametrize("name", ["a:b.jsonl", "C:rows.jsonl", "saved:train", "d:en:train"])
def test_a_path_with_colons_that_is_there_is_itself(
    tmp_path: Path, saved: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """An existing file or folder is read, whatever its name would mean as a split."""
    monkeypatch.chdir(tmp_path)
    if name.endswith(".jsonl"):
        write(tmp_path, name)
        assert texts(name) == [name]
    else:
        write(tmp_path / name, "a.jsonl")
        assert texts(name) == ["a.jsonl"]


# -- the same file twice


@pytest.mark.parametrize("spelling", ["same", "dotted", "folder", "pattern", "link", "hard link"])
def test_a_file_on_both_sides_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spelling: str
) -> None:
    """Evaluation on a file of the training data is refused under any path, with the remedies."""
    monkeypatch.chdir(tmp_path)
    file = write(tmp_path / "d", "a.jsonl", "b.jsonl") / "a.jsonl"
    (tmp_path / "link.jsonl").symlink_to(file)
    os.link(file, tmp_path / "hard.jsonl")
    other = {
        "same": str(file),
        "dotted": "d/../d/./a.jsonl",
        "folder": "d",
        "pattern": "d/*.jsonl",
        "link": "link.jsonl",
        "hard link": "hard.jsonl",
    }[spelling]
    for train, held_out in ((str(file), other), (other, str(file))):
        with pytest.raises(DataError) as caught:
            check_sources([train], [held_out])
        message = str(caught.value)
        assert message.startswith(f"data.train ({train}) and data.eval ({held_out}) both have ")
        assert "set data.eval_fraction, which holds rows out" in message
        assert message.endswith("copy the file.")
    check_sources([str(file)], [str(tmp_path / "d" / "b.jsonl")])


def test_a_file_in_two_entries_is_refused(tmp_path: Path) -> None:
    """A file that a folder or a link brings a second time is refused, not trained on twice."""
    folder = write(tmp_path / "d", "a.jsonl", "b.jsonl")
    (tmp_path / "link.jsonl").symlink_to(folder / "b.jsonl")
    for second in (folder / "a.jsonl", tmp_path / "link.jsonl"):
        with pytest.raises(DataError, match=r"data\.train has .* twice: in .*weight of 2"):
            check_sources([str(folder), str(second)], [])
        with pytest.raises(DataError, match=r"data\.eval has .* twice: .*Remove it from one\.$"):
            check_sources([], [str(folder), str(second)])


@pytest.mark.parametrize(
    ("train", "held_out", "is_same"),
    [
        ("owner/name", "owner/name:train", True),
        ("owner/name:test", "owner/name::test", True),
        ("owner/name:en:train", "owner/name:en:", True),
        ("owner/name:en:train", "owner/name:de:train", False),
        ("owner/name", "owner/name:test", False),
    ],
)
def test_a_table_of_the_hub_on_both_sides_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, train: str, held_out: str, is_same: bool
) -> None:
    """Two spellings of one split are the same table."""
    monkeypatch.chdir(tmp_path)
    if is_same:
        with pytest.raises(DataError, match=r"data\.train .* and data\.eval .* both have"):
            check_sources([train], [held_out])
    else:
        check_sources([train], [held_out])


def test_a_file_that_a_source_finds_twice_is_refused(tmp_path: Path) -> None:
    """A link beside its file in a folder is the same file a second time."""
    folder = write(tmp_path / "d", "a.jsonl")
    (folder / "b.jsonl").symlink_to(folder / "a.jsonl")
    assert len(find(str(folder), "data.train").files) == 2
    with pytest.raises(
        DataError, match=r"has one file twice, .*a\.jsonl and as .*b\.jsonl\. Remove"
    ):
        check_sources([str(folder)], [])
