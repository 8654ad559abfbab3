"""Files and folders that are whole or absent, and JSON objects read with a message."""

import json
import os
from pathlib import Path

import pytest

from qlora_dist import atomic
from qlora_dist.atomic import read_json, whole_folder, write_text
from qlora_dist.errors import ModelError


def fill(folder: Path, text: str) -> None:
    (folder / "inside").mkdir()
    (folder / "inside" / "file").write_text(text)


def content(folder: Path) -> str:
    return (folder / "inside" / "file").read_text()


def test_a_folder_replaces_the_one_before(tmp_path: Path) -> None:
    """The old folder stays until the new one is filled; nothing else is left beside it."""
    for text in ("first", "second"):
        with whole_folder(tmp_path / "a" / "final") as partial:
            fill(partial, text)
            before = content(tmp_path / "a" / "final") if text == "second" else None
        assert before in (None, "first")
        assert content(tmp_path / "a" / "final") == text
    assert os.listdir(tmp_path / "a") == ["final"]


def test_a_failure_leaves_what_was_there(tmp_path: Path) -> None:
    """An error in the body removes the new folder and nothing else."""
    with whole_folder(tmp_path / "final") as partial:
        fill(partial, "first")

    def fail() -> None:
        with whole_folder(tmp_path / "final") as partial:
            fill(partial, "second")
            raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        fail()
    assert content(tmp_path / "final") == "first"
    assert os.listdir(tmp_path) == ["final"]


def test_the_rest_of_a_killed_process_is_no_obstacle(tmp_path: Path) -> None:
    """A partial folder that a killed process left is emptied first."""
    fill_from = tmp_path / ".final.partial"
    fill_from.mkdir()
    fill(fill_from, "of a killed process")
    with whole_folder(tmp_path / "final") as partial:
        assert not any(partial.iterdir())
    assert not any((tmp_path / "final").iterdir())


def test_what_is_there_goes_only_when_the_new_one_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`clear` is called after the new folder is synced, and before the rename."""
    calls: list[str] = []
    sync_tree, replace = atomic.sync_tree, os.replace
    monkeypatch.setattr(atomic, "sync_tree", lambda path: (calls.append("sync"), sync_tree(path)))
    monkeypatch.setattr(os, "replace", lambda *paths: (calls.append("rename"), replace(*paths)))
    with whole_folder(tmp_path / "final", clear=lambda path: calls.append("clear")):
        calls.append("body")
    assert calls == ["body", "sync", "clear", "rename"]


def test_a_file_is_the_old_or_the_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A crash before the rename leaves the old text."""
    write_text(tmp_path / "file", "old")

    def crash(*paths: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", crash)
        with pytest.raises(KeyboardInterrupt):
            write_text(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "old"
    write_text(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "new"


@pytest.mark.parametrize(
    ("text", "reason"), [("{", "is not readable JSON: "), ("[]", "must hold a JSON object.")]
)
def test_json_that_is_no_object(tmp_path: Path, text: str, reason: str) -> None:
    """The error is of the kind that was asked for, and names the file after the label."""
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(ModelError) as caught:
        read_json(tmp_path / "c.json", ModelError, "the config ")
    assert str(caught.value).startswith(f"the config {tmp_path / 'c.json'} {reason}")
    (tmp_path / "c.json").write_text(json.dumps({"a": 1}))
    assert read_json(tmp_path / "c.json", ModelError) == {"a": 1}
