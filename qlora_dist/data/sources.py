"""Rows from files: JSONL, JSON, Parquet and CSV through `datasets`, with faults named by file and line."""

from __future__ import annotations

import codecs
import csv
import glob
import json
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from qlora_dist.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

Layout = Literal["messages", "prompt_completion"]

_BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
_COLUMNS: dict[Layout, tuple[str, ...]] = {"messages": ("messages",), "prompt_completion": ("prompt", "completion")}


def check_data_file(path: str, key: str) -> Path:
    """Refuse a data file that is missing, empty, or of an unknown kind; cheap, reads nothing.

    Raises:
        DataError: naming the config key `key` and the file.
    """
    file = Path(path)
    if not file.exists():
        raise DataError(f"{key} {path} does not exist. Give the path of a {_kinds()} file.")
    if not file.is_file():
        raise DataError(f"{key} {path} is a folder. Give one {_kinds()} file.")
    if file.suffix.lower() not in _BUILDERS:
        raise DataError(f"{key} {path} has the suffix {file.suffix!r}, which is not known. Give a {_kinds()} file.")
    if file.stat().st_size == 0:
        raise DataError(f"{key} {path} is empty. It must hold at least one row.")
    return file


def load_rows(path: str, key: str) -> Dataset:
    """Read a data file as a memory-mapped table.

    Raises:
        DataError: the file cannot be parsed (with the line), or holds no rows.
    """
    from datasets import Dataset, load_dataset
    from datasets.exceptions import DatasetGenerationError

    file = check_data_file(path, key)
    kind = _BUILDERS[file.suffix.lower()]
    if kind != "parquet":
        _check_utf8(file, key)
    options = _text_columns(file) if kind == "csv" else {}
    try:
        rows = load_dataset(kind, data_files=glob.escape(str(file)), split="train", **options)
    except (DatasetGenerationError, ValueError, OSError, TypeError, KeyError) as error:
        # `datasets` says only that generation failed; find out where.
        cause = error.__cause__ or error
        if "corresponds to no data" in str(cause) or (kind == "csv" and "No columns to parse" in str(cause)):
            raise DataError(f"{key} {path} holds no rows.") from None
        raise DataError(_diagnosis(file, key) or f"{key} {path} cannot be read: {cause}") from None
    assert isinstance(rows, Dataset)
    if len(rows) == 0:
        raise DataError(f"{key} {path} holds no rows.")
    return rows


def detect_layout(columns: list[str], asked: Literal["auto", "messages", "prompt_completion"], path: str) -> Layout:
    """Which row layout the columns form.

    Raises:
        DataError: the needed columns are not there.
    """
    layouts: list[Layout] = ["messages", "prompt_completion"] if asked == "auto" else [asked]
    for layout in layouts:
        if set(_COLUMNS[layout]) <= set(columns):
            return layout
    needed = " or ".join(" and ".join(f"`{c}`" for c in _COLUMNS[layout]) for layout in layouts)
    raise DataError(
        f"{path}: row 1 has the columns {', '.join(f'`{c}`' for c in columns)}, but data.format: {asked} needs "
        f"{needed}. Rename the columns."
    )


def _text_columns(file: Path) -> dict[str, object]:
    """Options that make each cell of a CSV file text, also where it looks like a number or says NA."""
    from datasets import Features, Value

    with file.open(encoding="utf-8", newline="") as stream:
        header = next(csv.reader(stream), [])
    return {"features": Features({name: Value("string") for name in header}), "keep_default_na": False}


def _kinds() -> str:
    return ", ".join(list(_BUILDERS)[:-1]) + f" or {list(_BUILDERS)[-1]}"


def _check_utf8(file: Path, key: str) -> None:
    """Refuse text in another encoding; the parsers would pass it on and fail rows later."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    num_lines = 0
    with file.open("rb") as stream:
        while block := stream.read(2**20):
            try:
                decoder.decode(block)
            except UnicodeDecodeError as error:
                line = num_lines + block[: error.start].count(b"\n") + 1
                raise DataError(
                    f"{key} {file}, line {line}: not UTF-8 text ({error.reason}). Save the file as UTF-8."
                ) from None
            num_lines += block.count(b"\n")


def _diagnosis(file: Path, key: str) -> str | None:
    """The first fault of a JSON file, with its line; None when the file is not JSON or is valid."""
    if _BUILDERS[file.suffix.lower()] != "json":
        return None
    text = file.read_text(encoding="utf-8")
    if text.lstrip().startswith("["):
        try:
            json.loads(text)
        except json.JSONDecodeError as error:
            return (
                f"{key} {file}, line {error.lineno}: the JSON array that starts the file is broken here "
                f"({error.msg}). The file may have been cut off. Write it again, or one object a line (.jsonl)."
            )
        return None
    columns: set[str] = set()
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            return (
                f"{key} {file}, line {number}: not valid JSON ({error.msg}, column {error.colno}). "
                "Each line must be one JSON object."
            )
        if not isinstance(row, dict):
            return f"{key} {file}, line {number}: {line[:40]!r} is not a JSON object with named columns."
        if columns and set(row) != columns:
            missing, extra = sorted(columns - set(row)), sorted(set(row) - columns)
            return (
                f"{key} {file}, line {number}: its columns differ from those of the lines before "
                f"(missing: {missing or 'none'}, new: {extra or 'none'}). All rows must have the same columns."
            )
        columns = set(row)
    return None
