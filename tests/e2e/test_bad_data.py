"""Bad data through the command line: one message with place and remedy and nothing written, or rows left out and
counted; in bounded time and memory, on one process and on several."""

import gzip
import json
import os
import pkgutil
import resource
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from unittest import mock

import pyarrow
import pytest
from pyarrow import ipc, parquet

from tests.support.command import run_command, run_forked, write_config
from tests.support.processes import obey_permissions

PLAIN = [{"prompt": f"Question {i}?", "completion": f"Answer {i}."} for i in range(40)]


def chat(*turns: tuple[str, str]) -> dict:
    """A row of messages."""
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


ASKED, ANSWERED = ("user", "How much?"), ("assistant", "Four.")
CHATS = [chat(ASKED, ANSWERED)] * 40
SHAREGPT = {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]}


def lines(*rows: object) -> bytes:
    """Rows as JSONL."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def table(kind: str, rows: list[dict] | None = None, names: list[str] | None = None) -> bytes:
    """Rows as the bytes of a Parquet or Arrow file."""
    content = pyarrow.Table.from_pylist(rows or PLAIN)
    content = content if names is None else content.rename_columns(names)
    sink = pyarrow.BufferOutputStream()
    if kind == "parquet":
        parquet.write_table(content, sink)
    else:
        with ipc.new_stream(sink, content.schema) as out:
            out.write_table(content)
    return sink.getvalue().to_pybytes()


def zst(data: bytes) -> bytes:
    """Bytes as Zstandard compresses them."""
    return pyarrow.compress(data, codec="zstd", asbytes=True)


def half(data: bytes) -> bytes:
    """What a copy that broke off has."""
    return data[: len(data) // 2]


@pytest.fixture
def run(tmp_path: Path, tiny_llama: Path, chat_file: Path) -> dict:
    """Settings that would train for one step."""
    return {
        "output_dir": str(tmp_path / "out"),
        "model": {"path": str(tiny_llama)},
        "adapter": {"rank": 2},
        "data": {"train": str(chat_file), "max_seq_len": 64, "packing": False, "cache_dir": str(tmp_path / "cache")},
        "optim": {"max_steps": 1},
        "logging": {"tensorboard": False},
    }


Done = subprocess.CompletedProcess[str]


def train(run: dict, before: Callable[[], None] | None = None, **data: object) -> Done:
    """`qlora-dist train` with other settings of its `data` section."""
    root = Path(run["output_dir"]).parent
    config = write_config(root / "config.yaml", **{**run, "data": {**run["data"], **data}})
    return run_forked("train", config, before=before)


def check_refused(done: Done, run: dict, *words: str) -> None:
    """Exit code 2, one short line that holds the words, and nothing written."""
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1
    assert len(done.stderr) < 1000
    for word in words:
        assert word in done.stderr
    assert not Path(run["output_dir"]).exists()
    check_cache(run, num_entries=0)


def check_cache(run: dict, num_entries: int) -> None:
    """The cache holds whole entries and locks; nothing half-written."""
    cache = Path(run["data"]["cache_dir"])
    names = [path.name for path in cache.iterdir() if path.suffix != ".lock"] if cache.is_dir() else []
    assert len(names) == num_entries, names
    assert not any(name.startswith(".") for name in names)


def check_trained(done: Done, run: dict, *words: str) -> None:
    """Exit code 0, an adapter, and the words in the output."""
    assert done.returncode == 0, done.stderr
    assert (Path(run["output_dir"]) / "adapter" / "adapter_model.safetensors").is_file()
    for word in words:
        assert word in done.stdout


# -- files that cannot be read to their end

CSV = b"prompt,completion\n" + b"".join(b"Question %d?,Answer %d.\n" % (i, i) for i in range(40))
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

    "invalid UTF-8": ("d.jsonl", lines(*PLAIN) + b'{"prompt": "\xff\xfe"}\n', ("line 41: not UTF-8", "as UTF-8")),
    "half a character": ("d.jsonl", ROW + b"\n" + "é".encode()[:1], ("line 2: not UTF-8", "as UTF-8")),
    "Latin-1": ("d.csv", CSV + "größer,kleiner\n".encode("latin-1"), ("line 42: not UTF-8", "as UTF-8")),
    "UTF-16": ("d.jsonl", lines(*PLAIN).decode().encode("utf-16"), ("line 1: not UTF-8", "as UTF-8")),
    "UTF-16 without a mark": ("d.jsonl", lines(*PLAIN).decode().encode("utf-16-le"), ("line 1: a NUL byte", "UTF-8")),
    "NUL bytes": ("d.jsonl", lines(*PLAIN) + bytes(5000), ("line 41: a NUL byte", "write it again")),
    "NUL bytes in a CSV": ("d.csv", CSV + b"a,\0\n", ("line 42: a NUL byte", "write it again")),
    "JSONL cut off": ("d.jsonl", half(lines(*PLAIN)), ("line 21: not valid JSON", "one JSON object")),
    "JSONL with two objects in a line": ("d.jsonl", ROW + ROW + b"\n", ("line 1: not valid JSON", "one JSON object")),
    "an array cut off": ("d.json", half(json.dumps(PLAIN, indent=1).encode()), ("line 83: ", "cut off")),
    "an array of numbers": ("d.json", b"[1, 2]", ("row 1: 1 is not a JSON object",)),
    "a number in a line": ("d.jsonl", ROW + b"\n17\n", ("line 2: '17' is not a JSON object",)),
    "Parquet cut off": ("d.parquet", half(table("parquet")), ("not a whole Parquet file", "cut off")),
    "Arrow cut off": ("d.arrow", half(table("arrow")), ("not a whole Arrow file", "cut off")),
    "gzip cut off": ("d.jsonl.gz", half(gzip.compress(lines(*PLAIN))), ("cannot be read on", "cut off")),
    "Zstandard cut off": ("d.csv.zst", half(zst(CSV)), ("cannot be read on", "cut off")),
    "not gzip": ("d.jsonl.gz", lines(*PLAIN), ("d.jsonl.gz, after line 0: cannot be read on", "again")),
    "not Parquet": ("d.parquet", lines(*PLAIN), ("not a whole Parquet file",)),
    "not Arrow": ("d.arrow", lines(*PLAIN), ("not a whole Arrow file",)),
    "a cell too many": ("d.csv", CSV + b"a,b,c\n", ("line 42: 3 cells, but the header has 2", "quotation marks")),
    "a cell too few": ("d.csv", CSV + b"a\n", ("line 42: 1 cells, but the header has 2", "quotation marks")),
    "a quotation that never ends": ("d.csv", CSV + b'a,"b\n' + CSV, ("line 83: not valid CSV", "cut off")),
    "a quotation mark within a cell": ("d.csv", CSV + b'a,"b"c\n', ("line 42: not valid CSV", "twice")),
    "a column twice in CSV": ("d.csv", b"prompt,prompt\na,b\n", ("more than one column 'prompt'", "Rename")),
    "a column twice in Parquet": (
        "d.parquet", table("parquet", names=["text", "text"]), ("more than one column 'text'", "Rename"),
    ),
    "a column twice in Arrow": (
        "d.arrow", table("arrow", names=["text", "text"]), ("more than one column 'text'", "Rename"),
    ),
    "a key twice in JSON": (
        "d.jsonl", ROW + b'\n{"prompt": "a", "completion": "b", "prompt": "c"}\n',
        ("line 2: not valid JSON", "more than one 'prompt'", "keep one"),
    ),
    "a key twice in an array": ("d.json", b'[{"prompt": "a", "prompt": "c"}]', ("more than one 'prompt'", "keep one")),
    "a number of 5,000 digits": (
        "d.jsonl", b'{"text": ' + b"7" * 5000 + b"}", ("line 1: not valid JSON", "4300 digits", "one JSON object"),
    ),
    "JSON nested too deep": ("d.jsonl", b'{"text": ' + DEEP + b"}\n", ("line 1: not valid JSON", "nested too deep")),
    "an array nested too deep": ("d.json", b"[" + DEEP + b"]", ("d.json, line 1: ", "nested too deep")),
    "columns without end, none known": (
        "d.jsonl", lines({f"c{i}": i for i in range(MANY)}), ("row 1 has the columns `c0`", "100,000", "Rename"),
    ),
    "columns without end, one of them twice": (
        "d.csv", ",".join([f"c{i}" for i in range(MANY)] + ["c7"]).encode() + b"\n1\n", ("more than one column 'c7'",),
    ),
    "all columns twice": (
        "d.csv", ",".join([f"c{i}" for i in range(MANY)] * 2).encode() + b"\n1\n", ("more than one column 'c0'",),
    ),
    "an unknown suffix": ("d.txt", b"text", ("the suffix '.txt'", "Give a .jsonl")),
    "a compressed table": ("d.parquet.gz", b"text", ("the suffix '.parquet.gz'", "Give a .jsonl")),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD_FILES)
def test_a_broken_file_is_explained(tmp_path: Path, run: dict, what: str) -> None:
    """The message names the setting, the file, the line where there are lines, and the remedy."""
    name, content, words = BAD_FILES[what]
    (tmp_path / name).write_bytes(content)
    check_refused(train(run, train=str(tmp_path / name)), run, f"data.train {tmp_path / name}"[11:], *words)


def test_a_broken_evaluation_file_is_explained(tmp_path: Path, run: dict) -> None:
    """Under its own setting; what was tokenised before it stays for the next run."""
    (tmp_path / "d.jsonl").write_bytes(ROW + b"\n{\n")
    done = train(run, eval=str(tmp_path / "d.jsonl"))
    check_cache(run, num_entries=1)
    shutil.rmtree(run["data"]["cache_dir"])
    check_refused(done, run, f"data.eval {tmp_path / 'd.jsonl'}, line 2: not valid JSON")


# -- files that are there, but are no data


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
def test_what_cannot_be_opened_is_explained(tmp_path: Path, run: dict, make: Callable[[Path], str]) -> None:
    """Pipes and devices are not waited for, and links and permissions are told apart."""
    (tmp_path / "data").mkdir()
    done = train(run, obey_permissions, train=make(tmp_path / "data"))
    (tmp_path / "data").chmod(0o755)
    check_refused(done, run, f"data.train {tmp_path / 'data'}", *NO_FILES[make])


def test_folders_that_contain_themselves(tmp_path: Path, run: dict) -> None:
    """Links in circles, of which there are two here, are not followed: each file is read once."""
    folder = tmp_path / "data"
    (folder / "inner").mkdir(parents=True)
    (folder / "inner" / "d.jsonl").write_bytes(lines(*PLAIN))
    for name in ("one", "two"):
        (folder / "inner" / name).symlink_to(folder)
    check_trained(train(run, train=str(folder / "**" / "*.jsonl")), run, "prompt_completion, 40 rows")


def when_called(owner: str, function: str, action: Callable[[], None], call: int = 1) -> None:
    """Let something happen in this process just before that call of a function."""
    original, num_calls = getattr(pkgutil.resolve_name(owner), function), 0

    def watched(*arguments: object, **keywords: object) -> object:
        nonlocal num_calls
        num_calls += 1
        if num_calls == call:
            action()
        return original(*arguments, **keywords)

    mock.patch(f"{owner}.{function}", watched).start()


def append(file: Path) -> None:
    with file.open("ab") as out:
        out.write(lines(*PLAIN))


def swap(file: Path) -> None:
    """Another file of the same size and time under the same name."""
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
        (Path.unlink, "fingerprint", ("d.jsonl does not exist", "Give the path")),
        (Path.unlink, "Report.check", ("d.jsonl does not exist", "Give the path")),
        (swap, "load_rows", ("line 1: not valid JSON",)),
    ],
)
def test_a_file_that_changes_meanwhile(
    tmp_path: Path, run: dict, action: Callable[[Path], None], function: str, words: tuple[str, ...]
) -> None:
    """Rows that were read while somebody wrote them are not trained on, nor kept under the name of what was there."""
    file = tmp_path / "d.jsonl"
    file.write_bytes(lines(*PLAIN))
    owner, _, name = f"qlora_dist.data.cache.{function}".rpartition(".")
    check_refused(train(run, partial(when_called, owner, name, partial(action, file)), train=str(file)), run, *words)
    file.write_bytes(lines(*PLAIN, *PLAIN))
    check_trained(train(run, train=str(file)), run, "80 rows")


# -- rows that cannot be used

BAD_ROWS: dict[str, tuple[dict, str, str]] = {
    # what is wrong: (a row, the reason by which it is counted, words of the message about it)
    "no columns": ({}, "no `messages`", "no column `messages` (the row has no columns)"),
    "an empty list": ({"messages": []}, "empty row", "`messages` is []"),
    "nothing": ({"messages": None}, "empty row", "`messages` is None"),
    "a number for messages": ({"messages": 7}, "empty row", "`messages` is 7"),
    "a number for text": (chat(ASKED, ("assistant", 7)), "message without `content`", "message 2"),
    "a text for messages": ({"messages": "hello"}, "empty row", "`messages` is 'hello'"),
    "texts for messages": ({"messages": ["hello"]}, "message without `content`", "message 1 is 'hello'"),
    "no answer": (chat(ASKED), "no assistant turn", "Add the answer"),
    "an answer first": (chat(ANSWERED, ASKED), "starts with an assistant turn", "Put a user turn before it"),
    "a tool that nothing called": (chat(ASKED, ("tool", "4"), ANSWERED), "tool turn that nothing called", "message 2"),
    "an unknown role": (chat(("bot", "hi"), ANSWERED), "unknown role", "the role 'bot'"),
    "a number for a role": (chat((3, "hi"), ANSWERED), "unknown role", "the role 3"),
    "a list for a role": (chat((["user"], "hi"), ANSWERED), "unknown role", "the role ['user']"),
    "another format": (SHAREGPT, "sharegpt row", "Split the file by format"),
    "another format of text": (PLAIN[0], "prompt_completion row", "Split the file by format"),
    "half an emoji": (chat(ASKED, ("assistant", "\ud83e")), "half a character", "emoji cut in two"),
    "a NUL character": (chat(ASKED, ("assistant", "a\0")), "NUL character", "Remove it"),
    "a call without a name": (
        {"messages": [*CHATS[0]["messages"], {"role": "assistant", "tool_calls": [{}]}]}, "tool call without a name",
        "message 3 calls {}",
    ),
    "tools without a form": ({**CHATS[0], "tools": "[1]"}, "`tools` is no list", "function descriptions"),
    "tools that the template leaves out": (
        {**CHATS[0], "tools": [{"name": "weather"}]}, "tools left out by the template", "'weather'",
    ),
    "a value nested deep": ({"messages": json.loads("[" * 900 + "]" * 900)}, "message without `content`", "message 1"),
    "columns without end": ({f"c{i}": i for i in range(MANY)}, "no `messages`", "others, 100,000 in all"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD_ROWS)
def test_a_faulty_row_is_counted_or_stops_the_run(tmp_path: Path, run: dict, what: str) -> None:
    """Two of 42 rows: within a max_bad_fraction of 0.05 they are left out, and shown with the reason, their number and
    the first one; within 0.04 they are too many, and the message is about the first."""
    row, reason, words = BAD_ROWS[what]
    file = tmp_path / "d.jsonl"
    text = "".join(json.dumps(row) + "\n" for row in [*CHATS[:4], row, *CHATS[4:], row])
    file.write_text(text, encoding="utf-8")
    done = train(run, train=str(file), max_bad_fraction=0.04)
    check_refused(done, run, f"error: {file}, row 5: ", words, "2 of 42 rows", "data.max_bad_fraction (0.04)")
    shown = f", 2 faulty rows left out: {reason}: 2 (first: {file}, row 5)\n"
    check_trained(train(run, train=str(file)), run, "format messages, 40 rows, ", shown)


def test_several_reasons_are_counted_apart(tmp_path: Path, run: dict) -> None:
    """The most frequent first."""
    file = tmp_path / "d.jsonl"
    bad = [BAD_ROWS[what][0] for what in ("no answer", "nothing", "an empty list")]
    file.write_bytes(lines(*CHATS * 2, *bad))
    shown = f"3 faulty rows left out: empty row: 2 (first: {file}, row 82), no assistant turn: 1 ({file}, row 81)"
    check_trained(train(run, train=str(file)), run, shown)


def test_only_faulty_rows(tmp_path: Path, run: dict) -> None:
    """There is nothing to train on, whatever may be faulty."""
    file = tmp_path / "d.jsonl"
    file.write_bytes(lines(*[chat(ASKED)] * 3))
    check_refused(
        train(run, train=str(file), max_bad_fraction=0.999), run, f"{file}, row 1: no assistant turn", "3 of 3"
    )


@pytest.mark.parametrize(
    ("fraction", "num_bad", "num_rows"), [(0.05, 1, 20), (0.29, 29, 100), (0.07, 7, 100), (0, 0, 5)]
)
def test_exactly_as_many_as_may_be(tmp_path: Path, run: dict, fraction: float, num_bad: int, num_rows: int) -> None:
    """`max_bad_fraction` means the decimal number that was written: 0.29 of 100 rows are 29, and 30 are too many."""
    file = tmp_path / "d.jsonl"
    file.write_bytes(lines(*[CHATS[0]] * (num_rows - num_bad), *[chat(ASKED)] * num_bad))
    check_trained(train(run, train=str(file), max_bad_fraction=fraction), run, f"{num_rows - num_bad} rows")
    shutil.rmtree(run["output_dir"])
    shutil.rmtree(run["data"]["cache_dir"])
    file.write_bytes(lines(*[CHATS[0]] * (num_rows - num_bad - 1), *[chat(ASKED)] * (num_bad + 1)))
    check_refused(train(run, train=str(file), max_bad_fraction=fraction), run, f"{num_bad + 1} of {num_rows} rows")


def test_numbers_instead_of_text(tmp_path: Path, run: dict) -> None:
    """JSON numbers are no text; in a CSV file all cells are."""
    (tmp_path / "d.jsonl").write_bytes(lines({"prompt": 1, "completion": 2}))
    (tmp_path / "d.csv").write_text("prompt,completion\n1,2\n")
    done = train(run, train=str(tmp_path / "d.jsonl"))
    check_refused(done, run, "d.jsonl, row 1: `completion` is 2, but must be text")
    check_trained(train(run, train=str(tmp_path / "d.csv")), run, "prompt_completion, 1 rows")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("d.jsonl", b"\xef\xbb\xbf" + lines(*PLAIN).replace(b"\n", b"\r\n")),
        ("d.csv", b"\xef\xbb\xbf" + CSV.replace(b"\n", b"\r\n")),
        ("d.json", b"\xef\xbb\xbf" + json.dumps(PLAIN, indent=1).encode().replace(b"\n", b"\r\n")),
        ("d.jsonl", lines(*PLAIN).rstrip()),  # no line feed at the end
        ("d.parquet", table("parquet", [{f"c{i}": i for i in range(2000)} | PLAIN[0]] * 40)),
    ],
    ids=["JSONL of Windows", "CSV of Windows", "JSON of Windows", "no last line feed", "two thousand columns"],
)
def test_what_is_unusual_but_right(tmp_path: Path, run: dict, name: str, content: bytes) -> None:
    """Byte order marks and CRLF are how editors on Windows write; columns that nothing needs do not matter."""
    (tmp_path / name).write_bytes(content)
    check_trained(train(run, train=str(tmp_path / name)), run, "prompt_completion, 40 rows")


def test_rows_without_a_target_left(tmp_path: Path, run: dict) -> None:
    """Where the question alone fills the row, nothing is left to learn: counted; if it is so in all rows, refused."""
    file = tmp_path / "d.jsonl"
    long = chat(("user", "why? " * 100), ANSWERED)
    file.write_bytes(lines(*CHATS, long, long))
    check_trained(train(run, train=str(file)), run, "40 rows, ", "2 rows dropped (no target left)")
    shutil.rmtree(run["output_dir"])
    shutil.rmtree(run["data"]["cache_dir"])
    file.write_bytes(lines(long, long))
    words = ("none of its 2 rows has a target token within data.max_seq_len (64)", "Raise data.max_seq_len")
    check_refused(train(run, train=str(file)), run, *words)


# -- templates that do not do what they should

MESSAGES = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
TEMPLATES: dict[str, tuple[str, str]] = {
    # what the template does: (the template, words of the message)
    "drops system turns": (
        MESSAGES.replace("messages %}", "messages if m['role'] != 'system' %}"), "leaves out message 1 (system)",
    ),
    "keeps the last turn only": (MESSAGES.replace("messages %}", "messages[-1:] %}"), "assistant turn 3 differently"),
    "refuses": ("{{ raise_exception('Only users may speak') }}", "Only users may speak"),
    "has a syntax error": ("{% for m in messages %}", "refuses this conversation"),
    "divides by zero": (MESSAGES + "{{ 1 // 0 }}", "refuses this conversation"),
    "calls what is not there": (MESSAGES + "{{ messages[99].strip() }}", "refuses this conversation"),
    "recurses without end": (
        "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "refuses this conversation",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", TEMPLATES)
def test_a_template_that_does_not_fit(tmp_path: Path, run: dict, what: str) -> None:
    """One message about the first row, not a traceback out of Jinja and not an adapter that learned something else."""
    template, words = TEMPLATES[what]
    model = shutil.copytree(run["model"]["path"], tmp_path / "model")
    (model / "chat_template.jinja").write_text(template)
    run["model"]["path"] = str(model)
    file = tmp_path / "d.jsonl"
    file.write_bytes(lines(*[chat(("system", "Be brief."), ASKED, ANSWERED)] * 3))
    check_refused(train(run, train=str(file)), run, f"{file}, row 1: the ", "chat template", words, "3 of 3")


# -- rows of megabytes


def limit_memory(num_bytes: int) -> None:
    """Let this process have so much address space more than it has now."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + num_bytes, resource.RLIM_INFINITY))


@pytest.mark.parametrize("layout", ["chat", "text"])
@pytest.mark.parametrize("too_long", ["truncate_end", "drop"])
def test_a_row_of_fifty_megabytes(tmp_path: Path, run: dict, layout: str, too_long: str) -> None:
    """It is one long row: cut or dropped, and counted, within seconds and a gigabyte; whole, its tokens would take
    nine."""
    text = "the quick brown fox " * 2_500_000
    row = chat(ASKED, ("assistant", text)) if layout == "chat" else {"text": text}
    file = tmp_path / "d.jsonl"
    file.write_bytes(lines(row, chat(ASKED, ANSWERED) if layout == "chat" else {"text": "fox"}))
    started = time.monotonic()
    done = train(run, partial(limit_memory, 2**30), train=str(file), too_long=too_long)
    shown = "2 rows, " if too_long == "truncate_end" else "1 rows, "
    check_trained(done, run, shown, "1 rows cut to 64" if shown == "2 rows, " else "1 rows dropped (longer than 64)")
    assert time.monotonic() - started < 20


# -- the cache


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"needs the right to mount: {done.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("place", ["a file", "below a file", "no right to write"])
def test_a_cache_that_cannot_be_written(tmp_path: Path, run: dict, place: str) -> None:
    """The message names the folder and the setting."""
    folder = tmp_path / "cache"
    if place == "no right to write":
        folder.mkdir(mode=0o555)
    else:
        folder.write_text("")
    asked = folder / "inner" if place == "below a file" else folder
    done = train(run, obey_permissions, cache_dir=str(asked))
    check_refused(
        done, run, f"tokenised data cannot be written to {asked} (", "Set data.cache_dir to a folder with room"
    )


def test_a_full_disk(tmp_path: Path, run: dict, small_disk: Path) -> None:
    """Nothing half-written is left to fill the disk; a smaller file fits."""
    run["data"]["cache_dir"] = str(small_disk / "cache")
    file = tmp_path / "d.jsonl"
    file.write_bytes(lines(*[chat(ASKED, ("assistant", f"Four, {i}.")) for i in range(2000)]))
    done = train(run, train=str(file))
    check_refused(done, run, "cannot be written", "No space left on device", "about five bytes per token")
    check_trained(train(run), run, "48 rows")
    check_cache(run, num_entries=1)


def test_a_disk_that_may_only_be_read(run: dict, small_disk: Path) -> None:
    """It is refused for what is not in it, and serves what is."""
    run["data"]["cache_dir"] = str(small_disk / "cache")
    check_trained(train(run), run)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    done = train({**run, "output_dir": f"{run['output_dir']}-2"}, max_seq_len=32)
    assert done.returncode == 2
    assert "cannot be written" in done.stderr
    assert "Read-only file system" in done.stderr
    assert train({**run, "output_dir": f"{run['output_dir']}-3"}).returncode == 0


def entry_of(run: dict) -> Path:
    """The only entry of the cache."""
    [entry] = [path for path in Path(run["data"]["cache_dir"]).iterdir() if path.is_dir()]
    return entry


def cut(file: Path) -> None:
    file.write_bytes(half(file.read_bytes()))


def write(text: str, file: Path) -> None:
    file.write_text(text)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("tokens.int32", cut), ("tokens.int32", Path.unlink), ("targets.uint8", cut), ("ends.int64", cut),
        ("ends.int64", partial(write, "")), ("report.json", cut), ("report.json", Path.unlink),
        ("report.json", partial(write, "null")), ("report.json", partial(write, '{"digest": 1, "report": {}}')),
        ("report.json", partial(write, '{"digest": 1, "report": {"faulty": {"reasons": null}}}')),
    ],
    ids=range(10),
)  # fmt: skip
def test_a_damaged_entry_is_made_anew(run: dict, name: str, damage: Callable[[Path], None]) -> None:
    """What is in the cache can always be had again, so a fault in it is never the user's problem."""
    first = train(run)
    check_trained(first, run)
    entry = entry_of(run)
    whole = {path.name: path.read_bytes() for path in entry.iterdir()}
    damage(entry / name)
    shutil.rmtree(run["output_dir"])
    again = train(run)
    check_trained(again, run, *first.stdout.splitlines()[:1])
    assert {path.name: path.read_bytes() for path in entry_of(run).iterdir()} == whole


def kill_this_process() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("owner", "function", "call"),
    [
        ("qlora_dist.data.cache", "encode_rows", 1),
        ("qlora_dist.data.samples.SampleWriter", "add", 30),
        ("qlora_dist.data.cache", "sync_tree", 1),
        ("qlora_dist.data.cache", "remove", 1),
        ("qlora_dist.data.cache", "sync_folder", 1),
    ],
)
def test_kill_9_while_tokenising(run: dict, owner: str, function: str, call: int) -> None:
    """The next run succeeds, and what the killed one left is gone."""
    done = train(run, partial(when_called, owner, function, kill_this_process, call))
    assert done.returncode == -signal.SIGKILL
    assert not Path(run["output_dir"]).exists()
    check_trained(train(run), run, "48 rows")
    check_cache(run, num_entries=1)


def speak_at_once() -> None:
    """Say how far things are all the time, not every ten seconds."""
    mock.patch("qlora_dist.console._SAY_EVERY_SECONDS", 0).start()


def tokenise_slowly(log: Path) -> None:
    """Take more than a second, and leave a line."""
    speak_at_once()
    when_called("qlora_dist.data.cache", "encode_rows", partial(note_and_sleep, log))


def note_and_sleep(log: Path) -> None:
    with log.open("a") as out:
        out.write("tokenised\n")
    time.sleep(1.5)


def test_two_runs_that_want_the_same(tmp_path: Path, run: dict) -> None:
    """One tokenises; the other says that it waits, and trains on the same."""
    log = tmp_path / "log"
    runs = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        runs.append({**run, "output_dir": str(tmp_path / name / "out")})
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(lambda one: train(one, partial(tokenise_slowly, log)), runs))
    for done, one in zip(both, runs, strict=True):
        check_trained(done, one, "48 rows")
    assert log.read_text() == "tokenised\n"
    waited = ["another process is tokenising" in done.stdout for done in both]
    assert sorted(waited) == [False, True]
    losses = {line.split(" | ")[1] for done in both for line in done.stdout.splitlines() if line.startswith("step 1/")}
    assert len(losses) == 1


# -- several processes


def be_rank(rank: int, world_size: int, port: int, before: Callable[[], None] | None = None) -> None:
    """Be one of several processes, as a launcher would have started it."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    mock.patch("qlora_dist.failure._PATIENCE_SECONDS", 1).start()
    if before is not None:
        before()


def train_on_two(run: dict, before: Callable[[], None] | None = None, **data: object) -> list[Done]:
    """`train` on two processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    root = Path(run["output_dir"]).parent
    config = write_config(root / "config.yaml", **{**run, "data": {**run["data"], **data}})
    ranks = [partial(be_rank, rank, 2, port, before) for rank in range(2)]
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda rank: run_forked("train", config, before=rank), ranks))


TWO = {
    "before the processes know each other": (b"", "d.jsonl is empty"),
    "in the file": (lines(*PLAIN) + b"{\n", "d.jsonl, line 41: not valid JSON"),
    "in the rows": (lines(*CHATS, *[chat(ASKED)] * 9), "d.jsonl, row 41: no assistant turn"),
}


@pytest.mark.parametrize("where", TWO)
def test_every_process_ends(tmp_path: Path, run: dict, where: str) -> None:
    """All of them with exit code 2, and one speaks for all."""
    content, words = TWO[where]
    file = tmp_path / "d.jsonl"
    file.write_bytes(content)
    both = train_on_two(run, train=str(file))
    assert [done.returncode for done in both] == [2, 2]
    [message] = "".join(done.stderr for done in both).splitlines()
    assert message.startswith("error: [rank ")
    assert words in message
    assert not Path(run["output_dir"]).exists()


def test_two_processes_tokenise_once(tmp_path: Path, run: dict) -> None:
    """The others find what the first one made."""
    log = tmp_path / "log"
    both = train_on_two(run, partial(tokenise_slowly, log))
    assert [done.returncode for done in both] == [0, 0], both
    assert log.read_text() == "tokenised\n"
    assert "48 rows" in both[0].stdout


def test_under_a_launcher(tmp_path: Path, run: dict) -> None:
    """The launcher ends too, and repeats the message in its report; nothing else is said."""
    (tmp_path / "d.jsonl").write_bytes(lines(*PLAIN) + b"{\n")
    run["data"]["train"] = str(tmp_path / "d.jsonl")
    done = run_command("train", write_config(tmp_path / "config.yaml", **run), processes=2, timeout=60)
    assert done.returncode != 0
    assert done.stderr.count("error: [rank ") == done.stderr.count("error: ") == 1
    assert "d.jsonl, line 41: not valid JSON" in done.stderr
    assert not Path(run["output_dir"]).exists()


def test_as_a_command(tmp_path: Path, run: dict) -> None:
    """A process of its own, as a user starts it, says the same and ends alike."""
    (tmp_path / "d.parquet").write_bytes(half(table("parquet")))
    run["data"]["train"] = str(tmp_path / "d.parquet")
    done = run_command("train", write_config(tmp_path / "config.yaml", **run))
    check_refused(done, run, "d.parquet: not a whole Parquet file")
