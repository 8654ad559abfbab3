"""Runs on good and bad data through the command line, and their expected outcomes."""

import json
import pkgutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pyarrow
from pyarrow import ipc, parquet

from tests.support.command import run_forked, write_config

PLAIN = [{"prompt": f"Question {i}?", "completion": f"Answer {i}."} for i in range(40)]
CSV = b"prompt,completion\n" + b"".join(b"Question %d?,Answer %d.\n" % (i, i) for i in range(40))


def chat(*turns: tuple[str, str]) -> dict:
    """Row of messages."""
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
    """Bytes compressed with Zstandard."""
    return pyarrow.compress(data, codec="zstd", asbytes=True)


def half(data: bytes) -> bytes:
    """First half of the bytes, as an interrupted copy leaves them."""
    return data[: len(data) // 2]


Done = subprocess.CompletedProcess[str]


def train(run: dict, before: Callable[[], None] | None = None, **data: object) -> Done:
    """Run `qlora-dist train` with other settings of its `data` section."""
    root = Path(run["output_dir"]).parent
    config = write_config(root / "config.yaml", **{**run, "data": {**run["data"], **data}})
    return run_forked("train", config, before=before)


def check_refused(done: Done, run: dict, *words: str) -> None:
    """Check for exit code 2, one short line that holds the words, and no written file."""
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1
    assert len(done.stderr) < 1000
    for word in words:
        assert word in done.stderr, done.stderr
    assert not Path(run["output_dir"]).exists()
    check_cache(run, num_entries=0)


def check_cache(run: dict, num_entries: int) -> None:
    """Check that the cache holds whole entries and locks, and nothing half-written."""
    cache = Path(run["data"]["cache_dir"])
    names = (
        [path.name for path in cache.iterdir() if path.suffix != ".lock"] if cache.is_dir() else []
    )
    assert len(names) == num_entries, names
    assert not any(name.startswith(".") for name in names)


def check_trained(done: Done, run: dict, *words: str) -> None:
    """Check for exit code 0, an adapter, and the words in the output."""
    assert done.returncode == 0, done.stderr
    assert (Path(run["output_dir"]) / "adapter" / "adapter_model.safetensors").is_file()
    for word in words:
        assert word in done.stdout


def when_called(owner: str, function: str, action: Callable[[], None], call: int = 1) -> None:
    """Run an action in this process just before the given call of a function."""
    original, num_calls = getattr(pkgutil.resolve_name(owner), function), 0

    def watched(*arguments: object, **keywords: object) -> object:
        nonlocal num_calls
        num_calls += 1
        if num_calls == call:
            action()
        return original(*arguments, **keywords)

    mock.patch(f"{owner}.{function}", watched).start()
