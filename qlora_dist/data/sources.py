"""Rows from files and from the hub, read singly, with faults named by file and line.

JSON is parsed here, line by line, not by way of an Arrow table. A table gives all rows one set of
nested columns, so the arguments of one row's tool call would get the names, with empty values,
that occur in any other row's call.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from qlora_dist.data.files import find_files, kind_of, left_out_remark, unreadable
from qlora_dist.data.hub import is_data_set, load_table, parse_name
from qlora_dist.errors import DataError


@dataclass(frozen=True)
class Row:
    """A row of a source, by column."""

    where: str
    """File and row number, as messages name them: `chat.jsonl, row 3`."""
    values: dict[str, Any]


def check_source(path: str, key: str) -> None:
    """Refuse a source that is not on this machine, before anything slow; the hub is not asked.

    Raises:
        DataError: see `find_files`.
    """
    if not is_data_set(path):
        find_files(path, key)


def check_sources(train: Sequence[str], held_out: Sequence[str]) -> None:
    """Refuse sources that are not on this machine, and a file that comes in two of them.

    A file is the same under any path that leads to it, be it through a folder or a link.

    Raises:
        DataError: see `find_files`; or with the file and both sources.
    """
    seen: dict[object, tuple[str, str, str]] = {}
    for key, path in [("data.train", p) for p in train] + [("data.eval", p) for p in held_out]:
        check_source(path, key)
        for name, identity in _identities(path, key):
            if identity in seen:
                raise DataError(_twice(name, (key, path), *seen[identity]))
            seen[identity] = key, path, name


def _twice(name: str, source: tuple[str, str], key: str, path: str, first: str) -> str:
    """Return the message about a file of a source that was in the source `path` of `key` before."""
    if source == (key, path):
        return f"{key} {path} has one file twice, as {first} and as {name}. Remove the link."
    if source[0] == key:
        hint = " A weight of 2 passes over a file twice per epoch." * (key == "data.train")
        return f"{key} has {name} twice: in {path} and in {source[1]}. Remove it from one.{hint}"
    return (
        f"data.train ({path}) and data.eval ({source[1]}) both have {name}: the evaluation loss "
        "would be that of rows that are trained on. Remove it from one; or remove data.eval and "
        "set data.eval_fraction, which holds rows out. To evaluate on training rows all the same, "
        "copy the file."
    )


def _identities(path: str, key: str) -> Iterator[tuple[str, object]]:
    """Yield the name of each file or table of a source, and what it has in common with its like."""
    data_set = parse_name(path)
    if data_set is not None:
        yield path, data_set
        return
    for file in find_files(path, key):
        status = file.stat()  # of the file that a link leads to
        yield str(file), (status.st_dev, status.st_ino)


def load_rows(path: str, key: str) -> Iterator[Row]:
    """Yield the rows of a source, in the order of its files and of the rows in each file.

    A single row is held in memory, except for a file that is one JSON array: that is parsed whole.

    Raises:
        DataError: while reading: a file cannot be parsed (with the line), or no file has a row.
    """
    num_rows = 0
    for name, rows in _tables(path, key):
        for number, values in enumerate(rows, start=1):
            num_rows += 1
            yield Row(f"{name}, row {number}", values)
    if num_rows == 0:
        raise DataError(f"{key} {path} holds no rows.")


def left_out_of(path: str, key: str) -> str:
    """Return a sentence about files beside a source's that are no part of it; empty if none are.

    Raises:
        DataError: see `find_files`.
    """
    return "" if is_data_set(path) else left_out_remark(path, key)


def source_fingerprint(path: str, key: str) -> str:
    """Return a digest of a source's contents: the bytes of its files, or the hub table's own.

    Raises:
        DataError: see `find_files`; or the data set cannot be loaded.
    """
    if is_data_set(path):
        return str(load_table(path, key)._fingerprint)
    digest = hashlib.sha256()
    for file in find_files(path, key):
        try:
            with file.open("rb") as stream:
                contents = hashlib.file_digest(stream, "sha256")
        except OSError as error:
            raise DataError(unreadable(str(file), key, error)) from None
        digest.update(contents.digest() + str(file).encode())
    return digest.hexdigest()


def stamp(path: str, key: str) -> object:
    """Return a value that changes when a file of a source is written, added or removed.

    Reads no contents. None for a data set that `datasets` loads.

    Raises:
        DataError: see `find_files`.
    """
    if is_data_set(path):
        return None
    files = find_files(path, key)
    return [(str(f), (s := f.stat()).st_ino, s.st_size, s.st_mtime_ns) for f in files]


def _tables(path: str, key: str) -> Iterator[tuple[str, Iterator[dict[str, Any]]]]:
    if is_data_set(path):
        yield path, map(_unfilled, load_table(path, key))
        return
    for file in find_files(path, key):
        yield str(file), _READERS[str(kind_of(file))](file, key)


# -- Text: JSON, JSONL and CSV, plain or compressed.


def _open_zst(file: Path) -> BinaryIO:
    import pyarrow

    # Arrow's stream yields no lines; the buffered reader around it does.
    return io.BufferedReader(pyarrow.input_stream(str(file), compression="zstd"))


_OPENERS: dict[str, Callable[[Path], Any]] = {".gz": gzip.open, ".zst": _open_zst}


def _lines(file: Path, key: str) -> Iterator[tuple[int, str]]:
    """Yield the number and the text of each line, with its line feed; nothing else ends a line."""
    number = 0
    try:
        with _OPENERS.get(file.suffix.lower(), partial(open, mode="rb"))(file) as stream:
            # Bytes, since text mode would also end lines at a lone carriage return.
            for number, line in enumerate(stream, start=1):
                try:
                    text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    raise DataError(
                        f"{key} {file}, line {number}: not UTF-8 text ({error.reason}). "
                        "Save the file as UTF-8."
                    ) from None
                if "\0" in text:
                    raise DataError(
                        f"{key} {file}, line {number}: a NUL byte, which text does not have. The "
                        "file may have been damaged by a crash or a full disk, or be UTF-16: write "
                        "it again, as UTF-8."
                    )
                yield number, text
    except (EOFError, OSError, zlib.error) as error:
        raise DataError(
            f"{key} {file}, after line {number}: cannot be read on ({error}). The file may have "
            "been cut off or damaged. Write it, or copy it, again."
        ) from None


def _repeated(names: Iterable[str]) -> list[str]:
    return [name for name, count in Counter(names).items() if count > 1]


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        twice = _repeated(name for name, _ in pairs)[0]
        raise ValueError(f"an object has more than one {twice!r:.40}, keep one")
    return values


# By default `json` silently keeps the last of several equal names.
_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def _json_fault(error: ValueError | RecursionError) -> tuple[int, str, str]:
    """Return the line, the column in words, and the fault."""
    if isinstance(error, json.JSONDecodeError):
        return error.lineno, f", column {error.colno}", error.msg
    if isinstance(error, RecursionError):
        return 1, "", "nested too deep"
    # From `_object`; or from `int`, for a number of more than 4300 digits.
    return 1, "", str(error).partition(":")[0]


def _json_rows(file: Path, key: str) -> Iterator[dict[str, Any]]:
    """Yield the objects of a JSON array, or of lines that hold one object each."""
    # The suffix does not decide: .json files often hold lines, and .jsonl files an array.
    lines = _lines(file, key)
    is_first = True
    for number, line in lines:
        if not line.strip():
            continue
        if is_first and line.lstrip().startswith("["):
            rest = "".join(text for _, text in lines)
            # The line feeds make the parser's line numbers those of the file.
            yield from _array_rows("\n" * (number - 1) + line + rest, file, key)
            return
        try:
            row = _DECODER.decode(line)
        except (ValueError, RecursionError) as error:
            _, column, fault = _json_fault(error)
            raise DataError(
                f"{key} {file}, line {number}: not valid JSON ({fault}{column}). Each line must be "
                "one JSON object."
            ) from None
        if not isinstance(row, dict):
            raise DataError(
                f"{key} {file}, line {number}: {line.strip()[:40]!r} is not a JSON object with "
                "named columns."
            )
        yield row
        is_first = False


def _array_rows(text: str, file: Path, key: str) -> Iterator[dict[str, Any]]:
    try:
        rows = _DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        line, _, fault = _json_fault(error)
        raise DataError(
            f"{key} {file}, line {line}: the JSON array that starts the file is broken here "
            f"({fault}). The file may have been cut off. Write it again, or one object a line "
            "(.jsonl)."
        ) from None
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise DataError(
                f"{key} {file}, row {number}: {row!r:.40} is not a JSON object with named columns."
            )
        yield row


def _csv_rows(file: Path, key: str) -> Iterator[dict[str, Any]]:
    """Yield rows whose cells are all text, also a cell that looks like a number or says NA."""
    # The default refuses a cell of more than 128 KiB; a C long holds 32 bits on some systems.
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    # Strict: a quotation mark that is never closed would make the rest of the file one cell.
    reader = csv.reader((line for _, line in _lines(file, key)), strict=True)
    rows = filter(None, reader)  # without blank lines
    try:
        header = next(rows, [])
        _check_columns(header, file, key)
        for cells in rows:
            if len(cells) != len(header):
                raise DataError(
                    f"{key} {file}, line {reader.line_num}: {len(cells)} cells, but the header has "
                    f"{len(header)}. Put quotation marks around cells that hold commas or line "
                    "breaks."
                )
            yield dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise DataError(
            f"{key} {file}, line {reader.line_num}: not valid CSV ({error}). The file may have "
            "been cut off; quotation marks within a cell are written twice."
        ) from None


def _check_columns(names: list[str], file: Path, key: str) -> None:
    if twice := sorted(_repeated(names)):
        others = f" (and {len(twice) - 1:,} others)" if len(twice) > 1 else ""
        raise DataError(
            f"{key} {file} has more than one column {twice[0]!r:.40}{others}. Rename or remove one."
        )


# -- Tables: Parquet, Arrow, and data sets of the hub.

_BATCH_ROWS = 256  # rows that are Python objects at a time


def _table_rows(file: Path, key: str) -> Iterator[dict[str, Any]]:
    from pyarrow import ArrowException

    is_parquet = file.suffix.lower() == ".parquet"
    try:
        for batch in _parquet_batches(file, key) if is_parquet else _arrow_batches(file, key):
            yield from map(_unfilled, batch.to_pylist())
    except (ArrowException, OSError) as error:
        reason = str(error).strip().split("\n")[0]
        raise DataError(
            f"{key} {file}: not a whole {'Parquet' if is_parquet else 'Arrow'} file ({reason}). "
            "It may have been cut off: write it, or copy it, again."
        ) from None


def _parquet_batches(file: Path, key: str) -> Iterator[Any]:
    from pyarrow import parquet

    with parquet.ParquetFile(file) as table:
        _check_columns(table.schema_arrow.names, file, key)
        yield from table.iter_batches(batch_size=_BATCH_ROWS)


def _arrow_batches(file: Path, key: str) -> Iterator[Any]:
    from pyarrow import ipc, memory_map

    with memory_map(str(file)) as source:
        if source.read(6) == b"ARROW1":  # the file format, which Feather is
            table = ipc.open_file(source)
            batches = map(table.get_batch, range(table.num_record_batches))
        else:  # a stream, which `datasets` writes
            source.seek(0)
            table = batches = ipc.open_stream(source)
        _check_columns(table.schema.names, file, key)
        for batch in batches:
            for start in range(0, batch.num_rows, _BATCH_ROWS):
                yield batch.slice(start, _BATCH_ROWS)


def _unfilled(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row without the names, within its columns, whose value is None."""
    # Tables fill with None the names that only other rows have.
    return {column: _without_none(value) for column, value in row.items()}


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_none(item) for name, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value


_READERS: dict[str, Callable[[Path, str], Iterator[dict[str, Any]]]] = {
    ".jsonl": _json_rows,
    ".json": _json_rows,
    ".parquet": _table_rows,
    ".arrow": _table_rows,
    ".csv": _csv_rows,
}
