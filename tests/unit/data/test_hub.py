"""Data sets of the hub, and copies of them: names, configurations and splits."""

import json
from pathlib import Path

import pytest

from qlora_dist.data.hub import DataSetName, is_data_set, parse_name
from qlora_dist.data.sources import load_rows
from qlora_dist.errors import DataError

ROWS = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}]
README = """---
license: mit
configs:
- config_name: en
  data_files:
  - {split: train, path: en/train.jsonl}
  - {split: test, path: en/test.jsonl}
- config_name: de
  data_files:
  - {split: train, path: de/train.jsonl}
---
# About
"""


def texts(path: str | Path) -> list[str]:
    """Return the column `text` of a source."""
    return [row.values["text"] for row in load_rows(str(path), "data.train")]


@pytest.fixture
def copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder that is a copy of a data set of the hub; rows tell where they are from."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    folder = tmp_path / "copy"
    for place in ("en/train", "en/test", "de/train"):
        file = folder / f"{place}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"text": place}) + "\n")
    (folder / "README.md").write_text(README)
    return folder


@pytest.fixture
def hub(copied: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Let `datasets` find the copy under a name of the hub, which is not reachable here."""
    import datasets

    for name in ("load_dataset", "get_dataset_config_names", "get_dataset_split_names"):
        original = getattr(datasets, name)

        def found(asked: str, *args: object, original=original, **kwargs: object) -> object:
            assert asked == "owner/name"
            return original(str(copied), *args, **kwargs)

        monkeypatch.setattr(datasets, name, found)
    return "owner/name"


@pytest.mark.parametrize(
    ("rest", "expected"),
    [
        (":en:train", "en/train"),
        (":en:test", "en/test"),
        (":de:", "de/train"),
        (":de:train", "de/train"),
    ],
)
@pytest.mark.parametrize("where", ["hub", "copied"])
def test_configuration_and_split(
    request: pytest.FixtureRequest, where: str, rest: str, expected: str
) -> None:
    """A configuration and a split choose a table, from the hub and from a folder that is a copy."""
    assert texts(f"{request.getfixturevalue(where)}{rest}") == [expected]


@pytest.mark.parametrize(
    ("rest", "remedy"),
    [
        ("", "Its configurations are en, de: name one and a split, such as {}:en:train."),
        ("::test", "Its configurations are en, de: name one and a split, such as {}:en:test."),
        (":de", "Its configurations are en, de: name one and a split, such as {}:de:train."),
        (":fr:test", "Its configurations are en, de: name one and a split, such as {}:en:test."),
        (":en:dev", "Its splits are train, test: name one, such as {}:en:train."),
        (":de:test", "Its splits are train: name one, such as {}:de:train."),
    ],
)
@pytest.mark.parametrize("where", ["hub", "copied"])
def test_what_there_is_instead_is_told(
    request: pytest.FixtureRequest, where: str, rest: str, remedy: str
) -> None:
    """A missing or unknown configuration or split is refused with those that exist."""
    name = str(request.getfixturevalue(where))
    if where == "copied" and rest == "":
        remedy = "lists configurations. Name one and a split, as {}:CONFIG:SPLIT."
    with pytest.raises(DataError) as caught:
        texts(f"{name}{rest}")
    assert str(caught.value).startswith(f"data.train {name}{rest} is ")
    assert str(caught.value).endswith(remedy.format(name))


def test_a_folder_with_data_files_is_read_as_files(copied: Path) -> None:
    """A list of configurations changes nothing for a folder that is given without a split."""
    assert texts(copied / "en") == ["en/train"]
    (copied / "own.jsonl").write_text('{"text": "own"}\n')
    assert texts(copied) == ["own"]


@pytest.mark.parametrize(
    ("path", "parts"),
    [
        ("owner/name", ("owner/name", "", "train")),
        ("owner/name:test", ("owner/name", "", "test")),
        ("owner/name::test", ("owner/name", "", "test")),
        ("owner/name:en:test", ("owner/name", "en", "test")),
        ("owner/name:en:", ("owner/name", "en", "train")),
    ],
)
def test_parts_of_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, parts: tuple[str, str, str]
) -> None:
    """One part after the name is a split, two are a configuration and a split."""
    monkeypatch.chdir(tmp_path)
    assert parse_name(path) == DataSetName(*parts)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("owner/name", True),
        ("owner/name:test", True),
        ("owner/name-1.5", True),
        ("owner/name::test", True),
        ("owner/name:en-US:test", True),
        ("owner/name:20231101.en:", True),
        ("owner/name:a b:train", True),
        ("owner/name:a/b:train", False),
        ("owner/name:a:b:c", False),
        ("C:/data/rows.jsonl", False),
        ("here:en:train", False),
        ("data/rows.jsonl", False),
        ("data/rows.jsonl.gz", False),
        ("rows", False),
        ("a/b/c", False),
        ("./owner/name", False),
        ("../name", False),
        ("owner/*", False),
        ("here/name", False),
    ],
)
def test_what_may_be_a_name_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, expected: bool
) -> None:
    """Owner and name are of the hub if no such path, and no such folder, is here.

    In a folder that is here, the name is more likely a mistyped file.
    """
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    assert is_data_set(path) is expected


def test_a_data_set_of_the_hub_is_read_through_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` gets name and split and no other argument, so no code of the data set runs."""
    from datasets import Dataset

    asked: list[tuple] = []

    def load(*args: object, **kwargs: object) -> Dataset:
        asked.append((args, kwargs))
        return Dataset.from_list(ROWS)

    monkeypatch.setattr("datasets.load_dataset", load)
    assert [row.values for row in load_rows("owner/name:validation", "data.train")] == ROWS
    assert asked == [(("owner/name",), {"split": "validation"})]


def test_a_data_set_that_cannot_be_had_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any error of `datasets` becomes one line with the key and the name."""

    def fail(*_: object, **__: object) -> None:
        raise ConnectionError("no route to the hub\nmore")

    monkeypatch.setattr("datasets.load_dataset", fail)
    with pytest.raises(
        DataError,
        match=r"data\.eval owner/name is no file .*: no route to the hub\. Check the name",
    ):
        list(load_rows("owner/name", "data.eval"))
