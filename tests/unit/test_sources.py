"""Data files: the four kinds read alike, and each fault is named by file and, where there are lines, by line."""

import csv
import json
from pathlib import Path

import pytest

from qlora_dist.data.sources import check_data_file, detect_layout, load_rows
from qlora_dist.errors import DataError

ROWS = [
    {"prompt": "Who jumps?", "completion": "the fox, it seems"},
    {"prompt": "Two\nlines", "completion": 'and "quotes"'},
    {"prompt": "naïve 狐", "completion": "🦊"},
]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables are cached in the test's own folder, not in the user's."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


def lines(*rows: object) -> str:
    """Rows as JSONL."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def refusal(file: Path) -> str:
    """The message with which a file is refused; it always names the config key and the file."""
    with pytest.raises(DataError) as caught:
        load_rows(str(file), "data.train")
    message = str(caught.value)
    assert message.startswith(f"data.train {file}")
    return message


# -- reading


def write_rows(file: Path, rows: list[dict]) -> None:
    """Write rows in the kind that the suffix says."""
    if file.suffix.lower() == ".jsonl":
        file.write_text(lines(*rows), encoding="utf-8")
    elif file.suffix == ".json":
        file.write_text(json.dumps(rows, indent=2), encoding="utf-8")
    elif file.suffix == ".csv":
        with file.open("w", encoding="utf-8", newline="") as out:
            writer = csv.DictWriter(out, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), file)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "rows.parquet", "ROWS.JSONL"])
def test_all_kinds_of_file_hold_the_same_rows(tmp_path: Path, name: str) -> None:
    """Text comes back as it was written, line breaks, quotes and non-ASCII included, in the order of the file."""
    write_rows(tmp_path / name, ROWS)
    rows = load_rows(str(tmp_path / name), "data.train")
    assert rows.column_names == ["prompt", "completion"]
    assert list(rows) == ROWS


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.parquet"])
def test_conversations_come_back_as_lists_of_turns(tmp_path: Path, name: str) -> None:
    """Nested rows keep their form, whatever the number of turns."""
    chats = [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * turns}
        for turns in (1, 2)
    ]
    write_rows(tmp_path / name, chats)
    assert list(load_rows(str(tmp_path / name), "data.train")) == chats


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    """A table cached from an earlier version of the file is not used."""
    file = tmp_path / "rows.jsonl"
    write_rows(file, ROWS)
    load_rows(str(file), "data.train")
    write_rows(file, ROWS[:1])
    assert list(load_rows(str(file), "data.train")) == ROWS[:1]


def test_blank_lines_between_rows_are_nothing(tmp_path: Path) -> None:
    """A blank line is neither a row nor a fault."""
    file = tmp_path / "rows.jsonl"
    file.write_text(lines(ROWS[0]) + "\n\n" + lines(ROWS[1]))
    assert list(load_rows(str(file), "data.train")) == ROWS[:2]


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
def test_an_impossible_file_is_refused_unread(tmp_path: Path, name: str, content: bytes | None, what: str) -> None:
    """Missing, empty and unknown files are refused by the cheap check, with the kinds that are possible."""
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(DataError, match=f"data.eval {file} .*{what}"):
        check_data_file(str(file), "data.eval")
    refusal(file)


def test_a_folder_is_refused(tmp_path: Path) -> None:
    """A folder is not a data file, even one named like it."""
    folder = tmp_path / "rows.jsonl"
    folder.mkdir()
    with pytest.raises(DataError, match=r"is a folder\. Give one"):
        check_data_file(str(folder), "data.train")
    refusal(folder)


@pytest.mark.parametrize(
    ("content", "line", "what"),
    [
        (lines(*ROWS) + '{"prompt": "x", "compl\n' + lines(*ROWS), 4, "not valid JSON"),
        ('{"prompt": x}\n' + lines(*ROWS), 1, "not valid JSON"),
        (lines(ROWS[0]) + "\n\n" + lines(ROWS[1])[:-10], 4, "not valid JSON"),  # cut off, after two blank lines
        (lines(*ROWS, [1, 2]), 4, "is not a JSON object"),
        (lines("text", *ROWS), 1, "is not a JSON object"),
        (lines(*ROWS, 3, *ROWS), 4, "is not a JSON object"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, content: str, line: int, what: str) -> None:
    """The first line of a JSONL file that is not an object is named by its number, counting blank ones."""
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


def test_rows_with_differing_columns_are_named(tmp_path: Path) -> None:
    """A row whose columns differ from those before it is named, with what it lacks and what it adds.

    The reader fills gaps with None within its first 10 MiB, where rows are refused one by one later; so the file is
    a little larger.
    """
    file = tmp_path / "rows.jsonl"
    long = {"prompt": "x" * 2**20, "completion": "y"}
    file.write_text(lines(*[long] * 11, {"prompt": "x", "answer": "y"}))
    message = refusal(file)
    assert ", line 12: its columns differ" in message
    assert "missing: ['completion'], new: ['answer']" in message


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
    """What the reader says of other kinds of file reaches the user as a data error with key and file."""
    file = tmp_path / name
    file.write_bytes(content)
    assert what in refusal(file)


# -- layout


@pytest.mark.parametrize(
    ("columns", "asked", "expected"),
    [
        (["messages"], "auto", "messages"),
        (["id", "messages", "source"], "auto", "messages"),
        (["completion", "prompt", "id"], "auto", "prompt_completion"),
        (["messages", "prompt", "completion"], "auto", "messages"),
        (["messages", "prompt", "completion"], "prompt_completion", "prompt_completion"),
        (["messages", "prompt", "completion"], "messages", "messages"),
    ],
)
def test_the_columns_say_the_layout(columns: list[str], asked: str, expected: str) -> None:
    """Other columns do not matter; where both layouts are there, conversations win unless data.format says more."""
    assert detect_layout(columns, asked, "rows.jsonl") == expected


@pytest.mark.parametrize(
    ("columns", "asked", "needed"),
    [
        (["text"], "auto", ("`messages`", "`prompt` and `completion`")),
        (["prompt", "answer"], "auto", ("`messages`", "`prompt` and `completion`")),
        (["prompt", "completion"], "messages", ("`messages`",)),
        (["messages"], "prompt_completion", ("`prompt` and `completion`",)),
    ],
)
def test_missing_columns_are_refused(columns: list[str], asked: str, needed: tuple[str, ...]) -> None:
    """The message names the file, the columns it has, and those that data.format needs."""
    with pytest.raises(DataError) as caught:
        detect_layout(columns, asked, "rows.jsonl")
    message = str(caught.value)
    assert message.startswith("rows.jsonl: ")
    assert f"data.format: {asked}" in message
    for text in (*(f"`{column}`" for column in columns), *needed):
        assert text in message


@pytest.mark.parametrize("path", ["data[1].jsonl", "[x]/data.jsonl"])
def test_brackets_in_a_path_are_no_pattern(tmp_path: Path, path: str) -> None:
    """A path is taken literally, even if read as a pattern it would match another file."""
    (tmp_path / "[x]").mkdir()
    (tmp_path / "data1.jsonl").write_text(lines({"prompt": "another", "completion": "file"}))
    (tmp_path / path).write_text(lines(*ROWS))
    assert list(load_rows(str(tmp_path / path), "data.train")) == ROWS


def test_text_in_another_encoding_is_named_by_line(tmp_path: Path) -> None:
    """Latin-1 is refused before any row is used, although the JSON parser would let it pass."""
    file = tmp_path / "rows.jsonl"
    file.write_bytes((lines(ROWS[0]) + '{"prompt": "é", "completion": "b"}\n').encode("latin-1"))
    assert "line 2: not UTF-8" in refusal(file)


def test_unicode_line_separators_end_no_line(tmp_path: Path) -> None:
    """Only a line feed ends a line of JSONL."""
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "a\u2028b", "completion": "c"}\n{"prompt": "x", "comp\n', encoding="utf-8")
    assert "line 2: not valid JSON" in refusal(file)


def test_csv_cells_are_text(tmp_path: Path) -> None:
    """Numbers and words like None or NA in a CSV file come back as they were written."""
    file = tmp_path / "rows.csv"
    file.write_text("prompt,completion\nIs it there?,None\nHow many?,42\nWhich?,NA\n")
    assert [row["completion"] for row in load_rows(str(file), "data.train")] == ["None", "42", "NA"]
