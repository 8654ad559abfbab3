"""Bad data files on the command line: a message with file, line and remedy, nothing written."""

import gzip
import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests.support.command import run_command, write_config
from tests.support.data_runs import (
    CSV,
    PLAIN,
    check_cache,
    check_refused,
    check_trained,
    half,
    lines,
    table,
    train,
    when_called,
    zst,
)
from tests.support.processes import obey_permissions

# -- files that cannot be read to their end

ROW = json.dumps(PLAIN[0]).encode()
DEEP = b"[" * 100_000 + b"]" * 100_000
MANY = 100_000

BAD_FILES: dict[str, tuple[str, bytes, tuple[str, ...]]] = {
    # what is wrong: (name of the file, what is in it, words of the message)
    "nothing": ("d.jsonl", b"", ("d.jsonl is empty", "at least one row")),
    "only a byte order mark": ("d.jsonl", b"\xef\xbb\xbf", ("d.jsonl holds no rows",)),
    "only blank lines": ("d.jsonl", b"\n \r\n\n", ("d.jsonl holds no rows",)),
    "an empty array": ("d.json", b"[]", ("d.json holds no rows",)),
    "an empty CSV": ("d.csv", b"\n\n", ("d.csv holds no rows",)),
    "only a header": ("d.csv", b"prompt,completion\n", ("d.csv holds no rows",)),
    "an empty gzip": ("d.jsonl.gz", gzip.compress(b""), ("d.jsonl.gz holds no rows",)),
    "invalid UTF-8": (
        "d.jsonl",
        lines(*PLAIN) + b'{"prompt": "\xff\xfe"}\n',
        ("line 41: not UTF-8", "as UTF-8"),
    ),
    "half a character": (
        "d.jsonl",
        ROW + b"\n" + "é".encode()[:1],
        ("line 2: not UTF-8", "as UTF-8"),
    ),
    "Latin-1": (
        "d.csv",
        CSV + "größer,kleiner\n".encode("latin-1"),
        ("line 42: not UTF-8", "as UTF-8"),
    ),
    "UTF-16": (
        "d.jsonl",
        lines(*PLAIN).decode().encode("utf-16"),
        ("line 1: not UTF-8", "as UTF-8"),
    ),
    "UTF-16 without a mark": (
        "d.jsonl",
        lines(*PLAIN).decode().encode("utf-16-le"),
        ("line 1: a NUL byte", "UTF-8"),
    ),
    "NUL bytes": (
        "d.jsonl",
        lines(*PLAIN) + bytes(5000),
        ("line 41: a NUL byte", "write it again"),
    ),
    "NUL bytes in a CSV": ("d.csv", CSV + b"a,\0\n", ("line 42: a NUL byte", "write it again")),
    "JSONL cut off": (
        "d.jsonl",
        half(lines(*PLAIN)),
        ("line 21: not valid JSON", "one JSON object"),
    ),
    "JSONL with two objects in a line": (
        "d.jsonl",
        ROW + ROW + b"\n",
        ("line 1: not valid JSON", "one JSON object"),
    ),
    "an array cut off": (
        "d.json",
        half(json.dumps(PLAIN, indent=1).encode()),
        ("line 83: ", "cut off"),
    ),
    "an array of numbers": ("d.json", b"[1, 2]", ("row 1: 1 is not a JSON object",)),
    "a number in a line": ("d.jsonl", ROW + b"\n17\n", ("line 2: '17' is not a JSON object",)),
    "Parquet cut off": (
        "d.parquet",
        half(table("parquet")),
        ("not a whole Parquet file", "cut off"),
    ),
    "Arrow cut off": ("d.arrow", half(table("arrow")), ("not a whole Arrow file", "cut off")),
    "gzip cut off": (
        "d.jsonl.gz",
        half(gzip.compress(lines(*PLAIN))),
        ("cannot be read on", "cut off"),
    ),
    "Zstandard cut off": ("d.csv.zst", half(zst(CSV)), ("cannot be read on", "cut off")),
    "not gzip": (
        "d.jsonl.gz",
        lines(*PLAIN),
        ("d.jsonl.gz, after line 0: cannot be read on", "again"),
    ),
    "not Parquet": ("d.parquet", lines(*PLAIN), ("not a whole Parquet file",)),
    "not Arrow": ("d.arrow", lines(*PLAIN), ("not a whole Arrow file",)),
    "a cell too many": (
        "d.csv",
        CSV + b"a,b,c\n",
        ("line 42: 3 cells, but the header has 2", "quotation marks"),
    ),
    "a cell too few": (
        "d.csv",
        CSV + b"a\n",
        ("line 42: 1 cells, but the header has 2", "quotation marks"),
    ),
    "a quotation that never ends": (
        "d.csv",
        CSV + b'a,"b\n' + CSV,
        ("line 83: not valid CSV", "cut off"),
    ),
    "a quotation mark within a cell": (
        "d.csv",
        CSV + b'a,"b"c\n',
        ("line 42: not valid CSV", "twice"),
    ),
    "a column twice in CSV": (
        "d.csv",
        b"prompt,prompt\na,b\n",
        ("more than one column 'prompt'", "Rename"),
    ),
    "a column twice in Parquet": (
        "d.parquet",
        table("parquet", names=["text", "text"]),
        ("more than one column 'text'", "Rename"),
    ),
    "a column twice in Arrow": (
        "d.arrow",
        table("arrow", names=["text", "text"]),
        ("more than one column 'text'", "Rename"),
    ),
    "a key twice in JSON": (
        "d.jsonl",
        ROW + b'\n{"prompt": "a", "completion": "b", "prompt": "c"}\n',
        ("line 2: not valid JSON", "more than one 'prompt'", "keep one"),
    ),
    "a key twice in an array": (
        "d.json",
        b'[{"prompt": "a", "prompt": "c"}]',
        ("more than one 'prompt'", "keep one"),
    ),
    "a number of 5,000 digits": (
        "d.jsonl",
        b'{"text": ' + b"7" * 5000 + b"}",
        ("line 1: not valid JSON", "4300 digits", "one JSON object"),
    ),
    "JSON nested too deep": (
        "d.jsonl",
        b'{"text": ' + DEEP + b"}\n",
        ("line 1: not valid JSON", "nested too deep"),
    ),
    "an array nested too deep": (
        "d.json",
        b"[" + DEEP + b"]",
        ("d.json, line 1: ", "nested too deep"),
    ),
    "columns without end, none known": (
        "d.jsonl",
        lines({f"c{i}": i for i in range(MANY)}),
        ("row 1 has the columns `c0`", "100,000", "Rename"),
    ),
    "columns without end, one of them twice": (
        "d.csv",
        ",".join([f"c{i}" for i in range(MANY)] + ["c7"]).encode() + b"\n1\n",
        ("more than one column 'c7'",),
    ),
    "all columns twice": (
        "d.csv",
        ",".join([f"c{i}" for i in range(MANY)] * 2).encode() + b"\n1\n",
        ("more than one column 'c0'",),
    ),
    "an unknown suffix": ("d.txt", b"text", ("the suffix '.txt'", "Give a .jsonl")),
    "a compressed table": ("d.parquet.gz", b"text", ("the suffix '.parquet.gz'", "Give a .jsonl")),
}


@pytest.mark.parametrize("what", BAD_FILES)
def test_a_broken_file_is_explained(tmp_path: Path, run: dict, what: str) -> None:
    """The message names the setting, the file, the line if there are lines, and the remedy."""
    name, content, words = BAD_FILES[what]
    (tmp_path / name).write_bytes(content)
    check_refused(
        train(run, train=str(tmp_path / name)), run, f"data.train {tmp_path / name}"[11:], *words
    )


def test_a_broken_evaluation_file_is_explained(tmp_path: Path, run: dict) -> None:
    """Its own setting is named; data tokenized before it stays for the next run."""
    (tmp_path / "d.jsonl").write_bytes(ROW + b"\n{\n")
    done = train(run, eval=str(tmp_path / "d.jsonl"))
    check_cache(run, num_entries=1)
    shutil.rmtree(run["data"]["cache_dir"])
    check_refused(done, run, f"data.eval {tmp_path / 'd.jsonl'}, line 2: not valid JSON")


def test_evaluation_on_training_data_is_explained(tmp_path: Path, run: dict) -> None:
    """A file on both sides is refused before anything is tokenized, with a way out."""
    (folder := tmp_path / "d").mkdir()
    (folder / "a.jsonl").write_bytes(lines(*PLAIN))
    done = train(run, train=str(folder), eval=str(folder / "a.jsonl"))
    check_refused(done, run, f"data.train ({folder}) and data.eval", "data.eval_fraction")


def test_columns_of_the_file_are_told(tmp_path: Path, run: dict) -> None:
    """An entry of `data.columns` that nothing uses is refused with the columns of the file."""
    (tmp_path / "d.jsonl").write_bytes(lines({"question": "a", "answer": "b"}))
    done = train(run, train=str(tmp_path / "d.jsonl"), columns={"prompt": "quest"})
    check_refused(done, run, "data.columns.prompt is 'quest'", "`question`, `answer`", "Rename")
    columns = {"prompt": "question", "completion": "answer"}
    done = train(run, train=str(tmp_path / "d.jsonl"), columns=columns)
    check_trained(done, run, "columns read: completion from `answer`, prompt from `question`")


# -- paths that are no data files


def pipe(folder: Path) -> str:
    os.mkfifo(folder / "d.jsonl")
    return str(folder / "d.jsonl")


def device(folder: Path) -> str:
    (folder / "d.jsonl").symlink_to("/dev/zero")
    return str(folder / "d.jsonl")


def link_to_itself(folder: Path) -> str:
    (folder / "d.jsonl").symlink_to("d.jsonl")
    return str(folder / "d.jsonl")


def broken_link(folder: Path) -> str:
    (folder / "d.jsonl").symlink_to("nowhere.jsonl")
    return str(folder)


def several_kinds(folder: Path) -> str:
    (folder / "a.jsonl").write_bytes(lines(*PLAIN))
    (folder / "b.csv").write_bytes(CSV)
    return str(folder)


def no_data(folder: Path) -> str:
    (folder / "README.md").write_text("about")
    return str(folder)


def long_name(folder: Path) -> str:
    return str(folder / ("x" * 300 + ".jsonl"))


def unreadable(folder: Path) -> str:
    (folder / "d.jsonl").write_bytes(lines(*PLAIN))
    (folder / "d.jsonl").chmod(0)
    return str(folder / "d.jsonl")


def locked_folder(folder: Path) -> str:
    path = unreadable(folder)
    folder.chmod(0)
    return path


NO_FILES: dict[Callable[[Path], str], tuple[str, ...]] = {
    pipe: ("d.jsonl is not a regular file", "Give a .jsonl"),
    device: ("d.jsonl is not a regular file", "Give a .jsonl"),
    link_to_itself: ("d.jsonl does not exist", "Give the path"),
    broken_link: ("d.jsonl is not a regular file", "Give a .jsonl"),
    several_kinds: ("files of several kinds", "a.jsonl", "b.csv", "Name one kind with a pattern"),
    no_data: ("is a folder without data files", "Put .jsonl"),
    long_name: ("cannot be read (File name too long)",),
    unreadable: ("d.jsonl cannot be read (Permission denied)", "may be read by you"),
    locked_folder: ("d.jsonl cannot be read (Permission denied)", "may be read by you"),
}


@pytest.mark.parametrize("make", NO_FILES, ids=lambda make: make.__name__)
def test_what_cannot_be_opened_is_explained(
    tmp_path: Path, run: dict, make: Callable[[Path], str]
) -> None:
    """Pipes and devices are not waited for; links and permissions have messages of their own."""
    (tmp_path / "data").mkdir()
    done = train(run, obey_permissions, train=make(tmp_path / "data"))
    (tmp_path / "data").chmod(0o755)
    check_refused(done, run, f"data.train {tmp_path / 'data'}", *NO_FILES[make])


def test_folders_that_contain_themselves(tmp_path: Path, run: dict) -> None:
    """Two links in circles are not followed: each file is read once."""
    folder = tmp_path / "data"
    (folder / "inner").mkdir(parents=True)
    (folder / "inner" / "d.jsonl").write_bytes(lines(*PLAIN))
    for name in ("one", "two"):
        (folder / "inner" / name).symlink_to(folder)
    check_trained(
        train(run, train=str(folder / "**" / "*.jsonl")), run, "prompt_completion, 40 rows"
    )


def append(file: Path) -> None:
    with file.open("ab") as out:
        out.write(lines(*PLAIN))


def swap(file: Path) -> None:
    """Replace a file by another of equal size, time and name."""
    status = file.stat()
    file.with_suffix(".new").write_bytes(file.read_bytes()[::-1].replace(b"\n", b" "))
    os.utime(file.with_suffix(".new"), ns=(status.st_atime_ns, status.st_mtime_ns))
    file.with_suffix(".new").replace(file)


@pytest.mark.parametrize(
    ("action", "function", "words"),
    [
        (append, "load_rows", ("d.jsonl changed while it was read", "Start again")),
        (append, "encode_rows", ("d.jsonl changed while it was read", "Start again")),
        (Path.unlink, "load_rows", ("d.jsonl does not exist", "Give the path")),
        (Path.unlink, "source_fingerprint", ("d.jsonl does not exist", "Give the path")),
        (Path.unlink, "Report.check", ("d.jsonl does not exist", "Give the path")),
        (swap, "load_rows", ("line 1: not valid JSON",)),
    ],
)
def test_a_file_that_changes_meanwhile(
    tmp_path: Path, run: dict, action: Callable[[Path], None], function: str, words: tuple[str, ...]
) -> None:
    """Rows read while the file is written are not trained on, nor cached as earlier contents."""
    file = tmp_path / "d.jsonl"
    file.write_bytes(lines(*PLAIN))
    owner, _, name = f"qlora_dist.data.cache.{function}".rpartition(".")
    check_refused(
        train(run, partial(when_called, owner, name, partial(action, file)), train=str(file)),
        run,
        *words,
    )
    file.write_bytes(lines(*PLAIN, *PLAIN))
    check_trained(train(run, train=str(file)), run, "80 rows")


def test_as_a_command(tmp_path: Path, run: dict) -> None:
    """A process of its own, as a user starts it, gives the message and the exit code."""
    (tmp_path / "d.parquet").write_bytes(half(table("parquet")))
    run["data"]["train"] = str(tmp_path / "d.parquet")
    done = run_command("train", write_config(tmp_path / "config.yaml", **run))
    check_refused(done, run, "d.parquet: not a whole Parquet file")
