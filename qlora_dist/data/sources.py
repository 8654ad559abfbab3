"""Rows from files and from the hub, one at a time, with faults named by file and line.

JSON is parsed here, line by line, instead of being made into an Arrow table: a table gives all rows one set of nested
columns, and so fills the arguments of one row's tool call with the names, empty, of every other row's.
"""

from __future__ import annotations

import csv
import glob
import gzip
import hashlib
import io
import json
import os
import re
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from qlora_dist.errors import DataError

_HUB_NAME = re.compile(r"^\w[\w.-]*/[\w.-]+(:[\w.-]+)?$")


@dataclass(frozen=True)
class Row:
    """One row of a source, by column."""

    where: str
    """File and number, as messages name it: `chat.jsonl, row 3`."""
    values: dict[str, Any]


def find_files(path: str, key: str) -> tuple[Path, ...]:
    """The files that a path means: itself, those of a folder, or those that match a pattern; sorted, all of one kind.

    A path that exists is never read as a pattern. Cheap, reads nothing.

    Raises:
        DataError: naming the config key `key` and the path: nothing is there, or it is empty, of an unknown kind, of
            several kinds, or not ours to look at.
    """
    try:
        return _find_files(path, key)
    except OSError as error:
        raise DataError(_unreadable(path, key, error)) from None


def _find_files(path: str, key: str) -> tuple[Path, ...]:
    place = Path(path)
    if place.is_dir():
        files = [
            file
            for file in sorted(place.iterdir())
            if _kind(file) and file.name not in _BESIDE_DATA
        ]
        missing = (
            f"{key} {path} is a folder without data files. Put {_kinds()} files directly into it."
        )
    elif place.exists():
        files = [place]
    else:
        matches = _matches(path) if glob.has_magic(path) else set()
        files = [file for file in map(Path, sorted(matches)) if file.is_file()]
        missing = f"{key} {path} does not exist. Give the path of a {_kinds()} file, a folder of them, or a pattern."
    if not files:
        raise DataError(missing)
    for file in files:
        if not _kind(file):
            suffix = "".join(file.suffixes[-2:]) if file.suffix.lower() in _OPENERS else file.suffix
            raise DataError(
                f"{key} {file} has the suffix {suffix!r}, which is not known. Give a {_kinds()} file; those of text "
                f"may be compressed ({', '.join(_OPENERS)})."
            )
        if not file.is_file():
            raise DataError(f"{key} {file} is not a regular file. Give a {_kinds()} file.")
        if file.stat().st_size == 0:
            raise DataError(f"{key} {file} is empty. It must hold at least one row.")
    kinds = {str(_kind(file)): file for file in reversed(files)}
    if len(kinds) > 1:
        names = " and ".join(str(file) for file in kinds.values())
        raise DataError(
            f"{key} {path} means files of several kinds ({names}). Name one kind with a pattern such as "
            f"'*{next(iter(kinds))}', or list them one by one."
        )
    return tuple(files)


def _matches(pattern: str) -> set[str]:
    """As `glob.glob`, but `**` does not go through links to folders, which may lead in circles."""
    stars = re.search(r"(^|(?<=/))\*\*(/|$)", pattern)
    if stars is None:
        return set(glob.glob(pattern))
    before, after = pattern[: stars.start()], pattern[stars.end() :]
    found: set[str] = set()
    for top in glob.glob(before) if before else ["."]:
        for folder, inner, _ in os.walk(top):
            inner[:] = [name for name in inner if not name.startswith(".")]
            found |= _matches(os.path.join(glob.escape(folder), after or "*"))
    return found


def check_source(path: str, key: str) -> None:
    """Refuse a source that is not there, before anything slow is done; the hub is not asked.

    Raises:
        DataError: see `find_files`.
    """
    if not is_hub_name(path):
        find_files(path, key)


def is_hub_name(path: str) -> bool:
    """Whether a source is a data set of the hub, `owner/name` or `owner/name:split`, and nothing on this machine."""
    name = path.partition(":")[0]
    return (
        _HUB_NAME.match(path) is not None
        and _kind(Path(name)) is None
        and Path(name).suffix.lower() not in _OPENERS
        and not os.path.exists(path)
        and not Path(name).parent.exists()  # then it is a file's name with a mistake in it
    )


def load_rows(path: str, key: str) -> Iterator[Row]:
    """The rows of a source, in the order of its files and of the rows in them; only one is held in memory.

    (But for a file that is one JSON array, which is parsed as a whole.)

    Raises:
        DataError: while reading: a file cannot be parsed (with the line), or none has a row.
    """
    num_rows = 0
    for name, rows in _tables(path, key):
        for number, values in enumerate(rows, start=1):
            num_rows += 1
            yield Row(f"{name}, row {number}", values)
    if num_rows == 0:
        raise DataError(f"{key} {path} holds no rows.")


def fingerprint(path: str, key: str) -> str:
    """Of the contents of a source: the bytes of its files, or what `datasets` says of a data set of the hub.

    Raises:
        DataError: see `find_files`; or the data set cannot be loaded.
    """
    if is_hub_name(path):
        return str(_hub_table(path, key)._fingerprint)
    digest = hashlib.sha256()
    for file in find_files(path, key):
        try:
            contents = hashlib.sha256()
            with file.open("rb") as stream:
                while block := stream.read(2**20):
                    contents.update(block)
            digest.update(contents.digest() + str(file).encode())
        except OSError as error:
            raise DataError(_unreadable(str(file), key, error)) from None
    return digest.hexdigest()


def stamp(path: str, key: str) -> object:
    """What differs when a file of a source is written to, added or taken away; cheap.

    Raises:
        DataError: see `find_files`.
    """
    if is_hub_name(path):
        return None
    found = [(file, file.stat()) for file in find_files(path, key)]
    return [
        (str(file), status.st_ino, status.st_size, status.st_mtime_ns) for file, status in found
    ]


def _unreadable(path: str, key: str, error: OSError) -> str:
    return (
        f"{key} {path} cannot be read ({error.strerror or error}). See that the file is there, and that it and the "
        "folders around it may be read by you."
    )


def _tables(path: str, key: str) -> Iterator[tuple[str, Iterator[dict[str, Any]]]]:
    if is_hub_name(path):
        yield path, _hub_rows(path, key)
        return
    for file in find_files(path, key):
        kind = _kind(file)
        assert kind is not None
        yield str(file), _READERS[kind](file, key)


# --------------------------------------------------------------------------------------------------------------------
# Text: JSON, JSONL and CSV, plain or compressed.


def _open_zst(file: Path) -> BinaryIO:
    import pyarrow

    return io.BufferedReader(pyarrow.input_stream(str(file), compression="zstd"))


_OPENERS: dict[str, Callable[[Path], Any]] = {".gz": gzip.open, ".zst": _open_zst}


def _lines(file: Path, key: str) -> Iterator[tuple[int, str]]:
    """The lines of a text file with their numbers, each with its line feed; nothing else ends a line."""
    number = 0
    try:
        with _OPENERS.get(file.suffix.lower(), _open_plain)(file) as stream:
            for number, line in enumerate(stream, start=1):
                try:
                    text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    raise DataError(
                        f"{key} {file}, line {number}: not UTF-8 text ({error.reason}). Save the file as UTF-8."
                    ) from None
                if "\0" in text:
                    raise DataError(
                        f"{key} {file}, line {number}: a NUL byte, which text does not have. The file may have been "
                        "damaged by a crash or a full disk, or be UTF-16: write it again, as UTF-8."
                    )
                yield number, text
    except (EOFError, OSError, zlib.error) as error:
        raise DataError(
            f"{key} {file}, after line {number}: cannot be read on ({error}). The file may have been cut off or "
            "damaged. Write it, or copy it, again."
        ) from None


def _open_plain(file: Path) -> BinaryIO:
    return file.open("rb")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        twice = next(
            name for name, count in Counter(name for name, _ in pairs).items() if count > 1
        )
        raise ValueError(f"an object has more than one {twice!r:.40}, keep one")
    return values


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def _json_fault(error: ValueError | RecursionError) -> tuple[int, str, str]:
    """The line, the column in words, and what is wrong."""
    if isinstance(error, json.JSONDecodeError):
        return error.lineno, f", column {error.colno}", error.msg
    # Besides names that come twice: a number of more digits than Python reads.
    return (
        1,
        "",
        "nested too deep" if isinstance(error, RecursionError) else str(error).partition(":")[0],
    )


def _json_rows(file: Path, key: str) -> Iterator[dict[str, Any]]:
    """Objects of a JSON array, or one a line; whatever the suffix says, people swap them."""
    lines = _lines(file, key)
    is_first = True
    for number, line in lines:
        if not line.strip():
            continue
        if is_first and line.lstrip().startswith("["):
            yield from _array_rows(
                "\n" * (number - 1) + line + "".join(rest for _, rest in lines), file, key
            )
            return
        try:
            row = _DECODER.decode(line)
        except (ValueError, RecursionError) as error:
            _, column, what = _json_fault(error)
            raise DataError(
                f"{key} {file}, line {number}: not valid JSON ({what}{column}). Each line must be one JSON object."
            ) from None
        if not isinstance(row, dict):
            raise DataError(
                f"{key} {file}, line {number}: {line.strip()[:40]!r} is not a JSON object with named columns."
            )
        yield row
        is_first = False


def _array_rows(text: str, file: Path, key: str) -> Iterator[dict[str, Any]]:
    try:
        rows = _DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        line, _, what = _json_fault(error)
        raise DataError(
            f"{key} {file}, line {line}: the JSON array that starts the file is broken here ({what}). "
            "The file may have been cut off. Write it again, or one object a line (.jsonl)."
        ) from None
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise DataError(
                f"{key} {file}, row {number}: {row!r:.40} is not a JSON object with named columns."
            )
        yield row


def _csv_rows(file: Path, key: str) -> Iterator[dict[str, Any]]:
    """Each cell as text, also where it looks like a number or says NA."""
    csv.field_size_limit(
        min(sys.maxsize, 2**31 - 1)
    )  # the default refuses a cell of more than 128 KiB
    # Strictly, because a quotation mark that is never closed would make the rest of the file one cell.
    reader = csv.reader((line for _, line in _lines(file, key)), strict=True)
    header: list[str] | None = None
    try:
        for cells in reader:
            if not cells:
                continue
            if header is None:
                header = cells
                _check_columns(header, file, key)
            elif len(cells) != len(header):
                raise DataError(
                    f"{key} {file}, line {reader.line_num}: {len(cells)} cells, but the header has {len(header)}. "
                    "Put quotation marks around cells that hold commas or line breaks."
                )
            else:
                yield dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise DataError(
            f"{key} {file}, line {reader.line_num}: not valid CSV ({error}). The file may have been cut off; quotation "
            "marks within a cell are written twice."
        ) from None


def _check_columns(names: list[str], file: Path, key: str) -> None:
    twice = sorted(name for name, count in Counter(names).items() if count > 1)
    if twice:
        others = f" (and {len(twice) - 1:,} others)" if len(twice) > 1 else ""
        raise DataError(
            f"{key} {file} has more than one column {twice[0]!r:.40}{others}. Rename or remove one."
        )


# --------------------------------------------------------------------------------------------------------------------
# Tables: Parquet, Arrow, and data sets of the hub.


def _parquet_rows(file: Path, key: str) -> Iterator[dict[str, Any]]:
    from pyarrow import ArrowException, parquet

    try:
        with parquet.ParquetFile(file) as table:
            _check_columns(table.schema_arrow.names, file, key)
            for batch in table.iter_batches(batch_size=_BATCH_ROWS):
                yield from map(_unfilled, batch.to_pylist())
    except (ArrowException, OSError) as error:
        raise DataError(_damaged(file, key, "Parquet", error)) from None


def _arrow_rows(file: Path, key: str) -> Iterator[dict[str, Any]]:
    """A stream, as `datasets` writes, or a file, as Feather is."""
    from pyarrow import ArrowException, ipc, memory_map

    try:
        with memory_map(str(file)) as source:
            if source.read(6) == b"ARROW1":
                table = ipc.open_file(source)
                batches = (table.get_batch(i) for i in range(table.num_record_batches))
            else:
                source.seek(0)
                table = batches = ipc.open_stream(source)
            _check_columns(table.schema.names, file, key)
            for batch in batches:
                for start in range(0, batch.num_rows, _BATCH_ROWS):
                    yield from map(_unfilled, batch.slice(start, _BATCH_ROWS).to_pylist())
    except (ArrowException, OSError) as error:
        raise DataError(_damaged(file, key, "Arrow", error)) from None


def _hub_rows(path: str, key: str) -> Iterator[dict[str, Any]]:
    yield from map(_unfilled, _hub_table(path, key))


def _hub_table(path: str, key: str) -> Any:
    """A split of a data set of the hub. `datasets` 4 and later execute no script of a data set; nor is one asked to."""
    from datasets import load_dataset

    name, _, split = path.partition(":")
    try:
        return load_dataset(name, split=split or "train")
    except Exception as error:  # noqa: BLE001 - network, hub and parser each have their own
        raise DataError(
            f"{key} {path} is no file or folder here, and as a data set of the hub it cannot be loaded: "
            f"{str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__}. "
            "Check the name (owner/name, or owner/name:split), or give a file."
        ) from None


_BATCH_ROWS = 256
"""Rows of a table that are made Python objects at a time."""


def _unfilled(row: dict[str, Any]) -> dict[str, Any]:
    """A row without the names, within its columns, that only other rows have: tables fill those with None."""
    return {column: _without_none(value) for column, value in row.items()}


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_none(item) for name, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value


def _damaged(file: Path, key: str, kind: str, error: Exception) -> str:
    first = str(error).strip().split("\n")[0]
    return f"{key} {file}: not a whole {kind} file ({first}). It may have been cut off: write it, or copy it, again."


_READERS: dict[str, Callable[[Path, str], Iterator[dict[str, Any]]]] = {
    ".jsonl": _json_rows,
    ".json": _json_rows,
    ".parquet": _parquet_rows,
    ".arrow": _arrow_rows,
    ".csv": _csv_rows,
}
_TEXT = (".jsonl", ".json", ".csv")
_BESIDE_DATA = ("dataset_info.json", "dataset_dict.json", "state.json")
"""What `datasets` writes into a folder beside its Arrow files."""


def _kind(file: Path) -> str | None:
    """The suffix that says how to read a file, without that of its compression; None when it is not known."""
    suffix = file.suffix.lower()
    if suffix in _OPENERS:
        inner = file.with_suffix("").suffix.lower()
        return inner if inner in _TEXT else None
    return suffix if suffix in _READERS else None


def _kinds() -> str:
    return ", ".join(list(_READERS)[:-1]) + f" or {list(_READERS)[-1]}"
