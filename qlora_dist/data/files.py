"""Files that a source means: a file, a folder's files, a pattern's matches, a saved data set."""

from __future__ import annotations

import glob
import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qlora_dist.errors import DataError

KINDS = (".jsonl", ".json", ".parquet", ".arrow", ".csv")
"""Suffixes of files that can be read."""
COMPRESSIONS = (".gz", ".zst")
"""Suffixes that may follow those of text."""
_KINDS = " or ".join(", ".join(KINDS).rsplit(", ", 1))
# Files that `datasets` writes beside the data.
_SAVED, _SAVED_SPLITS = "state.json", "dataset_dict.json"
_BESIDE_DATA = ("dataset_info.json", "dataset_infos.json", _SAVED, _SAVED_SPLITS)

_PROSE = re.compile(r"(readme|licen[cs]e)|.*\.(md|rst|py|sh|ya?ml|lock|html)$", re.IGNORECASE)

_NUMBERS = r"([-_.]?\d+|[-_.]of[-_.]?\d+)*$"  # of shards, such as test-00000-of-00002
_HELD_OUT = re.compile(
    rf"(.*[-_. ])?(test|testing|eval|evaluation|val|valid|validation|dev){_NUMBERS}", re.IGNORECASE
)
_TRAINED = re.compile(rf"(.*[-_. ])?(train|training){_NUMBERS}", re.IGNORECASE)


@dataclass(frozen=True)
class Found:
    """The files of a source, and those that were there as well."""

    files: tuple[Path, ...]
    left_out: tuple[Path, ...] = ()
    """Files of the folder, or matches of the pattern, that are for the other side by their name."""
    unread: tuple[Path, ...] = ()
    """Files of the folder of another kind, and its folders with data files."""


def find_files(path: str, key: str) -> tuple[Path, ...]:
    """Find the files that `path` means: the file itself, a folder's files, or a pattern's matches.

    The files are sorted and all of one kind. A path that exists is never read as a pattern, nor as
    the split of a saved DatasetDict. Of files beside each other, those named `test`, `validation`
    and the like are not for training, and those named `train` not for evaluation; a file that is
    given by its own path is taken. No data file is opened.

    Raises:
        DataError: names the config key `key` and the path. There is no file, or a file is empty, of
            an unknown kind, of another kind than the rest, or not permitted to be looked at.
    """
    return find(path, key).files


def find(path: str, key: str) -> Found:
    """Return the files of `find_files`, and those left out.

    Raises:
        DataError: see `find_files`.
    """
    try:
        found = _found(path, key)
        _check(found.files, path, key)
    except OSError as error:
        raise DataError(unreadable(path, key, error)) from None
    return found


def _found(path: str, key: str) -> Found:
    place = Path(path)
    if place.is_dir():
        return _in_folder(place, path, key)
    if place.exists():
        return Found((place,))
    folder, _, split = path.rpartition(":")
    if folder and (Path(folder) / _SAVED_SPLITS).is_file():
        return _saved_split(Path(folder), split, path, key)
    matches = _matches(path) if glob.has_magic(path) else set()
    files = [file for file in map(Path, sorted(matches)) if file.is_file()]
    if not files:
        if folder and Path(folder).is_dir():
            raise DataError(
                f"{key} {path} does not exist. The folder {folder} does, but it has no splits: "
                f"only a saved DatasetDict is read as FOLDER:split. Give {folder}, or a file in it."
            )
        raise DataError(
            f"{key} {path} does not exist. Give the path of a {_KINDS} file, a folder of them, or "
            "a pattern."
        )
    parts = Path(path).parts
    num_given = next((i for i, part in enumerate(parts) if glob.has_magic(part)), len(parts))
    found = _parted(files, key, num_given)
    return found if found.files else Found(tuple(files))  # only such files match: they are meant


def _in_folder(place: Path, path: str, key: str) -> Found:
    if (place / _SAVED_SPLITS).is_file():
        splits = _splits(place, path, key)
        raise DataError(
            f"{key} {path} is a saved DatasetDict with the splits {', '.join(splits)}. Name one, "
            f"such as {path}:{splits[0]}."
        )
    if (place / _SAVED).is_file():
        return Found(_saved_files(place, path, key))
    inside = sorted(place.iterdir())
    files = [file for file in inside if kind_of(file) and file.name not in _BESIDE_DATA]
    if not files:
        if lists_configs(place):
            raise DataError(
                f"{key} {path} is a folder whose README.md lists configurations. Name one and a "
                f"split, as {path}:CONFIG:SPLIT."
            )
        raise DataError(
            f"{key} {path} is a folder without data files. Put {_KINDS} files directly into it."
        )
    found = _parted(files, key, len(place.parts))
    if not found.files:
        names = ", ".join(file.name for file in found.left_out[:3])
        raise DataError(
            f"{key} {path} holds only files that are held out by their names ({names}). To train "
            f"on one, name the file itself: {found.left_out[0]}."
        )
    others = [entry for entry in inside if entry not in files and _may_hold_data(entry)]
    return replace(found, unread=tuple(others))


def _may_hold_data(entry: Path) -> bool:
    """True if an entry of a folder, of no kind that is read, may hold rows that a user misses."""
    if entry.name.startswith(".") or entry.name in _BESIDE_DATA:
        return False
    if entry.is_dir():
        return any(kind_of(Path(name)) for _, _, names in os.walk(entry) for name in names)
    return not _PROSE.match(entry.name)


def _parted(files: list[Path], key: str, num_given: int) -> Found:
    """Leave out the files that by their names are for the other one of training and evaluation.

    Args:
        num_given: parts of each path that the source names; the names of later folders count, too.
    """

    def are_for(pattern: re.Pattern[str], file: Path) -> bool:
        return any(map(pattern.match, (*file.parts[num_given:-1], _stem(file))))

    held_out = [file for file in files if are_for(_HELD_OUT, file)]
    if key == "data.train":
        left_out = held_out
    else:
        # Files of any name may be evaluated on, unless there are some for it.
        left_out = [f for f in files if held_out and f not in held_out and are_for(_TRAINED, f)]
    return Found(tuple(file for file in files if file not in left_out), tuple(left_out))


def _stem(file: Path) -> str:
    if file.suffix.lower() in COMPRESSIONS:
        file = file.with_suffix("")
    return file.stem


def left_out_remark(path: str, key: str) -> str:
    """Return sentences about what is beside the files of a source; empty if nothing is.

    Raises:
        DataError: see `find_files`.
    """
    found = find(path, key)
    told = []
    if files := found.left_out:
        purpose, use = ("training", "train") if key == "data.train" else ("evaluation", "evaluate")
        pattern = _HELD_OUT if key == "data.train" else _TRAINED
        # Left out for the name of its folder, a file needs it to be recognized.
        own = [file.name if pattern.match(_stem(file)) else str(file) for file in files]
        told.append(
            f"{key} {path}: left out {_first(own)}, by name not for {purpose}; to {use} on such a "
            f"file all the same, name the file itself, such as {files[0]}"
        )
    if found.unread:
        names = [entry.name + "/" * entry.is_dir() for entry in found.unread]
        told.append(
            f"{key} {path}: did not read {_first(names)}, beside its {kind_of(found.files[0])} "
            "files; to read them, convert files to that kind, and name folders as sources of their "
            "own"
        )
    return ". ".join(told)


def _first(names: list[str]) -> str:
    return ", ".join(names[:5]) + ", …" * (len(names) > 5)


# -- Data sets that `datasets` wrote: with `save_to_disk`, or for the hub.

_CONFIGS = re.compile(r"---\s*\n(.*\n)*?configs:")  # at the start of a README.md


def lists_configs(folder: Path) -> bool:
    """True if a folder's `README.md` lists configurations, as those of the hub's data sets do."""
    try:
        return _CONFIGS.match((folder / "README.md").read_text("utf-8")) is not None
    except (OSError, ValueError):
        return False


def _json_of(file: Path, name: str, path: str, key: str) -> list[Any]:
    try:
        values = json.loads(file.read_text("utf-8"))[name]
        if isinstance(values, list) and values:
            return values
    except (ValueError, KeyError, TypeError):
        pass
    raise DataError(
        f"{key} {path} is no whole saved data set: {file.name} names no {name.strip('_')}. Save it "
        "again."
    )


def _splits(folder: Path, path: str, key: str) -> list[str]:
    return [str(split) for split in _json_of(folder / _SAVED_SPLITS, "splits", path, key)]


def _saved_split(folder: Path, split: str, path: str, key: str) -> Found:
    splits = _splits(folder, path, key)
    if split not in splits:
        raise DataError(
            f"{key} {path}: the saved DatasetDict {folder} has no split {split!r}. Its splits are "
            f"{', '.join(splits)}: name one, such as {folder}:{splits[0]}."
        )
    return Found(_saved_files(folder / split, path, key))


def _saved_files(folder: Path, path: str, key: str) -> tuple[Path, ...]:
    # Not all files of the folder: saving fewer shards over more leaves the rest behind.
    parts = _json_of(folder / _SAVED, "_data_files", path, key)
    try:
        files = tuple(folder / part["filename"] for part in parts)
    except (KeyError, TypeError):
        files = ()
    missing = [file.name for file in files if not file.is_file()]
    if not files or missing:
        raise DataError(
            f"{key} {path} is no whole saved data set: {', '.join(missing[:3]) or _SAVED} is "
            "missing or broken. Save or copy it again."
        )
    return files


# -- Kinds and patterns.


def kind_of(file: Path) -> str | None:
    """Return the suffix that decides the reader, without a compression's; None if unknown."""
    suffix = file.suffix.lower()
    if suffix in COMPRESSIONS:
        inner = file.with_suffix("").suffix.lower()
        return inner if inner in (".jsonl", ".json", ".csv") else None
    return suffix if suffix in KINDS else None


def _check(files: Iterable[Path], path: str, key: str) -> None:
    for file in files:
        if not kind_of(file):
            compressed = file.suffix.lower() in COMPRESSIONS
            suffix = "".join(file.suffixes[-2:]) if compressed else file.suffix
            raise DataError(
                f"{key} {file} has the suffix {suffix!r}, which is not known. Give a {_KINDS} "
                f"file; those of text may be compressed ({', '.join(COMPRESSIONS)})."
            )
        if not file.is_file():
            raise DataError(f"{key} {file} is not a regular file. Give a {_KINDS} file.")
        if file.stat().st_size == 0:
            raise DataError(f"{key} {file} is empty. It must hold at least one row.")
    # Reversed, so that the first file of each kind is the one that remains.
    kinds = {str(kind_of(file)): file for file in reversed(list(files))}
    if len(kinds) > 1:
        raise DataError(
            f"{key} {path} means files of several kinds ({' and '.join(map(str, kinds.values()))})."
            f" Name one kind with a pattern such as '*{next(iter(kinds))}', or list them one "
            "by one."
        )


def _matches(pattern: str) -> set[str]:
    """Return the paths that match, as `glob.glob` does, but `**` enters no linked folder."""
    # `glob.glob` follows such links, which may lead in circles; `os.walk` does not.
    stars = re.search(r"(^|(?<=/))\*\*(/|$)", pattern)
    if stars is None:
        return set(glob.glob(pattern))
    before, after = pattern[: stars.start()], pattern[stars.end() :]
    found: set[str] = set()
    for top in glob.glob(before) if before else ["."]:
        for folder, inner, _ in os.walk(top):
            inner[:] = [name for name in inner if not name.startswith(".")]  # prunes the walk
            found |= _matches(os.path.join(glob.escape(folder), after or "*"))
    return found


def unreadable(path: str, key: str, error: OSError) -> str:
    """Return the message about a path that the system refuses."""
    return (
        f"{key} {path} cannot be read ({error.strerror or error}). See that the file is there, and "
        "that it and the folders around it may be read by you."
    )
