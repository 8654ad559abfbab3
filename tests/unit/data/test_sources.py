"""Data files: all kinds read alike, and each fault is named by file and, in text, by line."""

import csv
import gzip
import json
import random
from pathlib import Path

import pyarrow
import pyarrow.ipc
import pytest
from pyarrow import parquet

from qlora_dist.data.files import find_files
from qlora_dist.data.sources import check_source, load_rows
from qlora_dist.errors import DataError

ROWS = [
    {"prompt": "Who jumps?", "completion": "the fox, it seems"},
    {"prompt": "Two\nlines", "completion": 'and "quotes"'},
    {"prompt": "naïve 狐", "completion": "🦊"},
]


def lines(*rows: object) -> str:
    """Return rows as JSONL."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def values(path: Path | str) -> list[dict]:
    """Return all rows of a source."""
    return [row.values for row in load_rows(str(path), "data.train")]


def refusal(file: Path) -> str:
    """Return the message that refuses a file; it always begins with the config key and the file."""
    with pytest.raises(DataError) as caught:
        list(load_rows(str(file), "data.train"))
    message = str(caught.value)
    assert message.startswith(f"data.train {file}")
    return message


# -- reading

KINDS = [
    "rows.jsonl",
    "rows.json",
    "rows.csv",
    "rows.parquet",
    "rows.arrow",
    "ROWS.JSONL",
    "rows.jsonl.gz",
    "rows.json.gz",
    "rows.csv.gz",
    "rows.jsonl.zst",
    "rows.csv.ZST",
]


def write_rows(file: Path, rows: list[dict]) -> None:
    """Write rows in the kind that the suffix says."""
    if file.suffix.lower() in (".gz", ".zst"):
        plain = file.with_suffix("")
        write_rows(plain, rows)
        file.write_bytes(compressed(plain.read_bytes(), file.suffix))
        plain.unlink()
    elif file.suffix.lower() == ".jsonl":
        file.write_text(lines(*rows), encoding="utf-8")
    elif file.suffix == ".json":
        file.write_text(json.dumps(rows, indent=2), encoding="utf-8")
    elif file.suffix == ".csv":
        with file.open("w", encoding="utf-8", newline="") as out:
            writer = csv.DictWriter(out, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif file.suffix == ".arrow":
        table = pyarrow.Table.from_pylist(rows)
        with pyarrow.ipc.new_stream(file, table.schema) as out:
            out.write_table(table)
    else:
        parquet.write_table(pyarrow.Table.from_pylist(rows), file)


def compressed(data: bytes, suffix: str) -> bytes:
    """Return the bytes of a .gz or .zst file."""
    if suffix.lower() == ".gz":
        return gzip.compress(data)
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as out:
        out.write(data)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize("name", KINDS)
def test_all_kinds_of_file_hold_the_same_rows(tmp_path: Path, name: str) -> None:
    """Text comes back as written, with line breaks, quotes and non-ASCII, in the file's order."""
    write_rows(tmp_path / name, ROWS)
    assert values(tmp_path / name) == ROWS


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.parquet"])
def test_conversations_come_back_as_lists_of_turns(tmp_path: Path, name: str) -> None:
    """Nested rows keep their form, whatever the number of turns."""
    chats = [
        {
            "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
            * turns
        }
        for turns in (1, 2)
    ]
    write_rows(tmp_path / name, chats)
    assert values(tmp_path / name) == chats


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    """Nothing of an earlier version of the file is used."""
    file = tmp_path / "rows.jsonl"
    write_rows(file, ROWS)
    values(file)
    write_rows(file, ROWS[:1])
    assert values(file) == ROWS[:1]


def test_blank_lines_between_rows_are_nothing(tmp_path: Path) -> None:
    """A blank line is neither a row nor a fault."""
    file = tmp_path / "rows.jsonl"
    file.write_text(lines(ROWS[0]) + "\n\n" + lines(ROWS[1]))
    assert values(file) == ROWS[:2]


# -- faults


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("missing.jsonl", None, "does not exist"),
        ("empty.jsonl", b"", "is empty"),
        ("rows.txt", b"x", "suffix '.txt'"),
        ("rows", b"x", "suffix ''"),
    ],
)
def test_an_impossible_file_is_refused_unread(
    tmp_path: Path, name: str, content: bytes | None, what: str
) -> None:
    """The cheap check refuses missing, empty and unknown files, and names the possible kinds."""
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(DataError, match=f"data.eval {file} .*{what}"):
        check_source(str(file), "data.eval")
    refusal(file)


@pytest.mark.parametrize(
    ("content", "line", "what"),
    [
        (lines(*ROWS) + '{"prompt": "x", "compl\n' + lines(*ROWS), 4, "not valid JSON"),
        ('{"prompt": x}\n' + lines(*ROWS), 1, "not valid JSON"),
        (
            lines(ROWS[0]) + "\n\n" + lines(ROWS[1])[:-10],
            4,
            "not valid JSON",
        ),  # cut off, after two blank lines
        (lines(*ROWS, [1, 2]), 4, "is not a JSON object"),
        (lines("text", *ROWS), 1, "is not a JSON object"),
        (lines(*ROWS, 3, *ROWS), 4, "is not a JSON object"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, content: str, line: int, what: str) -> None:
    """The first line that is no JSON object is named by its number; blank lines count."""
    file = tmp_path / "rows.jsonl"
    file.write_text(content, encoding="utf-8")
    message = refusal(file)
    assert f", line {line}: " in message
    assert what in message


def test_a_truncated_array_is_named_by_the_line_where_it_ends(tmp_path: Path) -> None:
    """A JSON array that was cut off is not mistaken for broken JSONL."""
    text = json.dumps(ROWS, indent=2)
    file = tmp_path / "rows.json"
    file.write_text("\n".join(text.splitlines()[:7]))  # the second object is open
    message = refusal(file)
    assert ", line 7: the JSON array" in message
    assert "cut off" in message


@pytest.mark.parametrize(("encoding", "line"), [("utf-16", 1), ("utf-32", 1)])
def test_a_file_that_is_not_utf8_is_named(tmp_path: Path, encoding: str, line: int) -> None:
    """Text in another encoding is refused with the line and the remedy."""
    file = tmp_path / "rows.jsonl"
    file.write_bytes(lines(*ROWS).encode(encoding))
    message = refusal(file)
    assert f", line {line}: not UTF-8" in message
    assert "Save the file as UTF-8." in message


def test_rows_with_differing_columns_come_as_they_are(tmp_path: Path) -> None:
    """A row has the columns that it was written with; their use is decided row by row, later."""
    file = tmp_path / "rows.jsonl"
    differing = [*ROWS, {"prompt": "x", "answer": 3}, {}]
    file.write_text(lines(*differing))
    assert values(file) == differing


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("rows.csv", b"prompt,completion\na,b\nc,d,e\n", "line 3"),
        ("rows.csv", "prompt,completion\na,é\n".encode("latin-1"), "line 2: not UTF-8"),
        ("rows.parquet", b"this is no parquet file", "Parquet"),
        ("rows.jsonl", b"\n\n", "holds no rows"),
        ("rows.json", b"[]", "holds no rows"),
        ("rows.csv", b"prompt,completion\n", "holds no rows"),
    ],
)
def test_a_file_that_holds_no_rows_or_cannot_be_parsed_is_refused(
    tmp_path: Path, name: str, content: bytes, what: str
) -> None:
    """A file without rows, or of broken content, is a data error with key and file."""
    file = tmp_path / name
    file.write_bytes(content)
    assert what in refusal(file)


# -- text


@pytest.mark.parametrize("path", ["data[1].jsonl", "[x]/data.jsonl"])
def test_brackets_in_a_path_are_no_pattern(tmp_path: Path, path: str) -> None:
    """A path is taken literally, even if as a pattern it would match another file."""
    (tmp_path / "[x]").mkdir()
    (tmp_path / "data1.jsonl").write_text(lines({"prompt": "another", "completion": "file"}))
    (tmp_path / path).write_text(lines(*ROWS))
    assert values(tmp_path / path) == ROWS


def test_text_in_another_encoding_is_named_by_line(tmp_path: Path) -> None:
    """Latin-1 is refused before any row is used, although the JSON parser would let it pass."""
    file = tmp_path / "rows.jsonl"
    file.write_bytes((lines(ROWS[0]) + '{"prompt": "é", "completion": "b"}\n').encode("latin-1"))
    assert "line 2: not UTF-8" in refusal(file)


def test_unicode_line_separators_end_no_line(tmp_path: Path) -> None:
    """Only a line feed ends a line of JSONL."""
    file = tmp_path / "rows.jsonl"
    file.write_text(
        '{"prompt": "a\u2028b", "completion": "c"}\n{"prompt": "x", "comp\n', encoding="utf-8"
    )
    assert "line 2: not valid JSON" in refusal(file)


def test_csv_cells_are_text(tmp_path: Path) -> None:
    """Numbers and words like None or NA in a CSV file come back as they were written."""
    file = tmp_path / "rows.csv"
    file.write_text("prompt,completion\nIs it there?,None\nHow many?,42\nWhich?,NA\n")
    assert [row["completion"] for row in values(file)] == ["None", "42", "NA"]


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    """A byte order mark, as of editors on Windows, is no part of the first row."""
    for name in ("rows.jsonl", "rows.csv"):
        write_rows(tmp_path / name, ROWS)
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + (tmp_path / name).read_bytes())
        assert values(tmp_path / name) == ROWS


def test_a_large_row_is_a_row(tmp_path: Path) -> None:
    """A cell or a line of megabytes is read like any other."""
    large = [{"prompt": "x", "completion": "fox " * 2**20}]
    for name in ("rows.jsonl", "rows.csv"):
        write_rows(tmp_path / name, large)
        assert values(tmp_path / name) == large


# -- tables


@pytest.mark.parametrize("name", ["rows.parquet", "rows.arrow"])
def test_tables_do_not_lend_names_to_other_rows(tmp_path: Path, name: str) -> None:
    """A row lacks arguments that only another row has, though the table holds them as null."""
    calls = [
        {"calls": [{"arguments": {"city": "Rome"}}]},
        {"calls": [{"arguments": {"day": "today"}}]},
    ]
    write_rows(tmp_path / name, calls)
    assert values(tmp_path / name) == calls


def test_an_arrow_file_may_be_a_stream_or_a_file(tmp_path: Path) -> None:
    """An Arrow file may be a stream, as `datasets` writes, or the file format, as Feather is."""
    table = pyarrow.Table.from_pylist(ROWS)
    with pyarrow.ipc.new_file(tmp_path / "rows.arrow", table.schema) as out:
        out.write_table(table, max_chunksize=2)
    assert values(tmp_path / "rows.arrow") == ROWS


@pytest.mark.parametrize(
    "name",
    [
        "rows.parquet",
        "rows.arrow",
        "rows.jsonl.gz",
        "rows.jsonl.zst",
        "rows.csv.gz",
        "rows.json.gz",
        "rows.json.zst",
    ],
)
def test_a_file_that_was_cut_off_is_refused(tmp_path: Path, name: str) -> None:
    """A download that broke off is never taken for a shorter file."""
    rng = random.Random(0)
    write_rows(
        tmp_path / name,
        [{"prompt": str(rng.getrandbits(64)), "completion": "x"} for _ in range(2000)],
    )
    data = (tmp_path / name).read_bytes()
    for length in (len(data) // 2, len(data) * 9 // 10):
        (tmp_path / name).write_bytes(data[:length])
        assert "cut off" in refusal(tmp_path / name)


def test_what_is_not_compressed_says_so(tmp_path: Path) -> None:
    """A plain file with the suffix of a compressed file is refused."""
    for suffix in (".gz", ".zst"):
        file = tmp_path / f"rows.jsonl{suffix}"
        file.write_text(lines(*ROWS))
        assert "cannot be read on" in refusal(file)


def test_a_column_that_comes_twice_is_refused(tmp_path: Path) -> None:
    """Two columns of one name are refused, since either may be meant."""
    (tmp_path / "rows.csv").write_text("prompt,completion,prompt\na,b,c\n")
    assert "more than one column 'prompt'" in refusal(tmp_path / "rows.csv")
    table = pyarrow.table([["a"], ["b"]], names=["prompt", "prompt"])
    parquet.write_table(table, tmp_path / "rows.parquet")
    assert "more than one column 'prompt'" in refusal(tmp_path / "rows.parquet")


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("rows.jsonl", lines(ROWS[0]).encode() + b"\0" * 100, 2),  # as a crash leaves it
        ("rows.jsonl", lines(ROWS[0]).encode("utf-16-le"), 1),
        ("rows.csv", b"prompt,completion\na,b\nc,\0\n", 3),
    ],
)
def test_nul_bytes_are_named_by_line(tmp_path: Path, name: str, content: bytes, line: int) -> None:
    """NUL bytes, from a crash or from UTF-16 without a mark, are named by line."""
    (tmp_path / name).write_bytes(content)
    assert f", line {line}: a NUL byte" in refusal(tmp_path / name)


def test_a_quotation_that_never_ends_is_refused(tmp_path: Path) -> None:
    """An unclosed quotation is refused, since it makes the rest of a CSV file one cell."""
    (tmp_path / "rows.csv").write_text('prompt,completion\na,b\nc,"d\ne,f\n')
    assert "line 4: not valid CSV (unexpected end of data)" in refusal(tmp_path / "rows.csv")


# -- several files as one source


def shards(folder: Path, *names: str) -> Path:
    """Return a folder of files of one row each, which has the file's name as its text."""
    folder.mkdir(exist_ok=True)
    for name in names:
        write_rows(folder / name, [{"text": name}])
    return folder


def test_a_folder_is_its_files_in_order(tmp_path: Path) -> None:
    """A folder's files are sorted by name; other files and inner folders do not matter."""
    folder = shards(tmp_path / "data", "b.jsonl", "a.jsonl.gz", "c.jsonl")
    (folder / "README.md").write_text("about")
    (folder / ".hidden").write_text("x")
    shards(folder / "more", "d.jsonl")
    assert [row["text"] for row in values(folder)] == ["a.jsonl.gz", "b.jsonl", "c.jsonl"]
    assert [row.where for row in load_rows(str(folder), "data.train")][
        -1
    ] == f"{folder / 'c.jsonl'}, row 1"


def test_a_pattern_is_the_files_it_matches(tmp_path: Path) -> None:
    """A pattern matches files in order, also across folders."""
    shards(tmp_path / "x", "train-1.jsonl", "train-0.jsonl", "other.jsonl")
    shards(tmp_path / "a", "train-2.jsonl")
    assert [row["text"] for row in values(tmp_path / "x" / "train-*.jsonl")] == [
        "train-0.jsonl",
        "train-1.jsonl",
    ]
    found = [file.name for file in find_files(str(tmp_path / "**" / "train-?.jsonl"), "data.train")]
    assert found == ["train-2.jsonl", "train-0.jsonl", "train-1.jsonl"]


def test_impossible_folders_and_patterns_are_refused(tmp_path: Path) -> None:
    """Each case is told: an empty folder, no match, files of several kinds, an empty file."""
    (tmp_path / "none").mkdir()
    mixed = shards(tmp_path / "mixed", "a.jsonl", "b.parquet")
    empty = shards(tmp_path / "empty", "a.jsonl")
    (empty / "b.jsonl").write_text("")
    for path, what in (
        (tmp_path / "none", "is a folder without data files"),
        (tmp_path / "no-such-*.jsonl", "does not exist"),
        (mixed, "files of several kinds"),
        (mixed / "*", "files of several kinds"),
    ):
        assert what in refusal(path)
    with pytest.raises(DataError, match=r"b\.jsonl is empty"):
        check_source(str(empty), "data.train")
