"""Faults of the cache of tokenized data, seen by the runs and processes that share it."""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from unittest import mock

import pytest

from tests.support.command import run_command, run_ranks, write_config
from tests.support.data_runs import (
    ASKED,
    CHATS,
    PLAIN,
    Done,
    chat,
    check_cache,
    check_refused,
    check_trained,
    half,
    lines,
    train,
    when_called,
)
from tests.support.processes import obey_permissions

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
        done,
        run,
        f"tokenized data cannot be written to {asked} (",
        "Set data.cache_dir to a folder with room",
    )


def test_a_full_disk(tmp_path: Path, run: dict, small_disk: Path) -> None:
    """No half-written file is left to fill the disk; a smaller file fits."""
    run["data"]["cache_dir"] = str(small_disk / "cache")
    file = tmp_path / "d.jsonl"
    file.write_bytes(lines(*[chat(ASKED, ("assistant", f"Four, {i}.")) for i in range(2000)]))
    done = train(run, train=str(file))
    check_refused(
        done, run, "cannot be written", "No space left on device", "about five bytes per token"
    )
    check_trained(train(run), run, "48 rows")
    check_cache(run, num_entries=1)


def test_a_disk_that_may_only_be_read(run: dict, small_disk: Path) -> None:
    """A read-only disk serves what is in the cache, and is refused for anything else."""
    run["data"]["cache_dir"] = str(small_disk / "cache")
    check_trained(train(run), run)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    done = train({**run, "output_dir": f"{run['output_dir']}-2"}, max_seq_len=32)
    assert done.returncode == 2
    assert "cannot be written" in done.stderr
    assert "Read-only file system" in done.stderr
    assert train({**run, "output_dir": f"{run['output_dir']}-3"}).returncode == 0


def entry_of(run: dict) -> Path:
    """Return the only entry of the cache."""
    [entry] = [path for path in Path(run["data"]["cache_dir"]).iterdir() if path.is_dir()]
    return entry


def cut(file: Path) -> None:
    file.write_bytes(half(file.read_bytes()))


def write(text: str, file: Path) -> None:
    file.write_text(text)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("tokens.int32", cut),
        ("tokens.int32", Path.unlink),
        ("targets.uint8", cut),
        ("ends.int64", cut),
        ("ends.int64", partial(write, "")),
        ("report.json", cut),
        ("report.json", Path.unlink),
        ("report.json", partial(write, "null")),
        ("report.json", partial(write, '{"digest": 1, "report": {}}')),
        ("report.json", partial(write, '{"digest": 1, "report": {"faulty": {"reasons": null}}}')),
    ],
    ids=range(10),
)
def test_a_damaged_entry_is_made_anew(run: dict, name: str, damage: Callable[[Path], None]) -> None:
    """A damaged entry is made again without a message, since the data is still there."""
    first = train(run)
    check_trained(first, run)
    entry = entry_of(run)
    whole = {path.name: path.read_bytes() for path in entry.iterdir()}
    damage(entry / name)
    shutil.rmtree(run["output_dir"])
    again = train(run)
    (notes,) = (line for line in first.stdout.splitlines() if "format messages" in line)
    check_trained(again, run, notes)
    assert {path.name: path.read_bytes() for path in entry_of(run).iterdir()} == whole


def kill_this_process() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("owner", "function", "call"),
    [
        ("qlora_dist.data.cache", "encode_rows", 1),
        ("qlora_dist.data.samples.SampleWriter", "add", 30),
        ("qlora_dist.atomic", "sync_tree", 1),
        ("qlora_dist.atomic", "remove", 2),
        ("qlora_dist.atomic", "sync_folder", 2),
    ],
)
def test_kill_9_while_tokenizing(run: dict, owner: str, function: str, call: int) -> None:
    """After `kill -9`, the next run succeeds, and no file of the killed run is left."""
    done = train(run, partial(when_called, owner, function, kill_this_process, call))
    assert done.returncode == -signal.SIGKILL
    assert not Path(run["output_dir"]).exists()
    check_trained(train(run), run, "48 rows")
    check_cache(run, num_entries=1)


def speak_at_once() -> None:
    """Show progress at every step, not every ten seconds."""
    mock.patch("qlora_dist.metrics.console._SAY_EVERY_SECONDS", 0).start()


def tokenize_slowly(log: Path) -> None:
    """Take more than a second, and leave a line in a file."""
    speak_at_once()
    when_called("qlora_dist.data.cache", "encode_rows", partial(note_and_sleep, log))


def note_and_sleep(log: Path) -> None:
    with log.open("a") as out:
        out.write("tokenized\n")
    time.sleep(1.5)


def test_two_runs_that_want_the_same(tmp_path: Path, run: dict) -> None:
    """One of two runs tokenizes; the other says that it waits, and trains on equal data."""
    log = tmp_path / "log"
    runs = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        runs.append({**run, "output_dir": str(tmp_path / name / "out")})
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(lambda one: train(one, partial(tokenize_slowly, log)), runs))
    for done, one in zip(both, runs, strict=True):
        check_trained(done, one, "48 rows")
    assert log.read_text() == "tokenized\n"
    waited = ["another process is tokenizing" in done.stdout for done in both]
    assert sorted(waited) == [False, True]
    losses = {
        line.split(" | ")[1]
        for done in both
        for line in done.stdout.splitlines()
        if line.startswith("step 1/")
    }
    assert len(losses) == 1


# -- several processes


def train_on_two(run: dict, before: Callable[[], None] | None = None, **data: object) -> list[Done]:
    """Run `train` on two processes, which wait a second for each other's failures."""
    root = Path(run["output_dir"]).parent
    config = write_config(root / "config.yaml", **{**run, "data": {**run["data"], **data}})
    return run_ranks("train", config, processes=2, before=partial(be_impatient, before))


def be_impatient(before: Callable[[], None] | None) -> None:
    mock.patch("qlora_dist.run.failure._PATIENCE_SECONDS", 1).start()
    if before is not None:
        before()


TWO = {
    "before the processes know each other": (b"", "d.jsonl is empty"),
    "in the file": (lines(*PLAIN) + b"{\n", "d.jsonl, line 41: not valid JSON"),
    "in the rows": (lines(*CHATS, *[chat(ASKED)] * 9), "d.jsonl, row 41: no assistant turn"),
}


@pytest.mark.parametrize("where", TWO)
def test_every_process_ends(tmp_path: Path, run: dict, where: str) -> None:
    """All processes end with exit code 2, and one writes the message."""
    content, words = TWO[where]
    file = tmp_path / "d.jsonl"
    file.write_bytes(content)
    both = train_on_two(run, train=str(file))
    assert [done.returncode for done in both] == [2, 2]
    [message] = "".join(done.stderr for done in both).splitlines()
    assert message.startswith("error: [rank ")
    assert words in message
    assert not Path(run["output_dir"]).exists()


def test_two_processes_tokenize_once(tmp_path: Path, run: dict) -> None:
    """Other processes find the data that the first one tokenized."""
    log = tmp_path / "log"
    both = train_on_two(run, partial(tokenize_slowly, log))
    assert [done.returncode for done in both] == [0, 0], both
    assert log.read_text() == "tokenized\n"
    assert "48 rows" in both[0].stdout


def test_under_a_launcher(tmp_path: Path, run: dict) -> None:
    """The launcher ends too, and repeats the message in its report; nothing else is written."""
    (tmp_path / "d.jsonl").write_bytes(lines(*PLAIN) + b"{\n")
    run["data"]["train"] = str(tmp_path / "d.jsonl")
    done = run_command(
        "train", write_config(tmp_path / "config.yaml", **run), processes=2, timeout=60
    )
    assert done.returncode != 0
    assert done.stderr.count("error: [rank ") == done.stderr.count("error: ") == 1
    assert "d.jsonl, line 41: not valid JSON" in done.stderr
    assert not Path(run["output_dir"]).exists()
