"""Faults during a run cost at most the steps since the last checkpoint, and never a checkpoint."""

import os
import shutil
import signal
import time
from pathlib import Path
from unittest import mock

import pytest

from qlora_dist import train as train_module
from qlora_dist.run.checkpoint import complete_steps, newest_checkpoint
from tests.support.command import run_forked, write_config
from tests.support.interrupted import (
    NUM_STEPS,
    rank_pid,
    settings,
    start,
    wait_for,
    wait_until_gone,
)
from tests.support.processes import exit_code_of
from tests.support.training import adapter_bytes, lasting_rows, train_here

# Where the process is killed: module, function, and at which call.
MOMENTS = {
    "while weights are read": ("qlora_dist.build", "load_base_weights", 1),
    "in the first evaluation": ("qlora_dist.train", "evaluate", 1),
    "in a step": ("qlora_dist.train", "micro_step", 9),
    "while the trial checkpoint is written": ("qlora_dist.run.checkpoint", "save_file", 1),
    "after tensors, before the rest": ("qlora_dist.run.checkpoint", "_verify_tensors", 2),
    "before the folder gets its name": ("qlora_dist.run.checkpoint", "_manifest", 2),
    "before COMPLETE": ("qlora_dist.run.checkpoint.Checkpoints", "_mark_complete", 2),
    "after COMPLETE, before old ones go": ("qlora_dist.run.checkpoint.Checkpoints", "_rotate", 3),
    "while an old one is removed": ("qlora_dist.run.checkpoint", "remove", 3),
    "while the final adapter is written": ("qlora_dist.train.Training", "finish", 1),
}


def train_and_die(folder: Path, run: dict, owner: str, function: str, call: int) -> None:
    """Train until call number `call` of a function, which ends this process as `kill -9` does."""
    num_calls = 0
    original = getattr(_resolve(owner), function)

    def deadly(*arguments, **keywords):
        nonlocal num_calls
        num_calls += 1
        if num_calls == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **keywords)

    with mock.patch(f"{owner}.{function}", deadly):
        train_here(folder, run)


def _resolve(path: str) -> object:
    import pkgutil

    return pkgutil.resolve_name(path)


@pytest.mark.parametrize("moment", MOMENTS)
def test_kill_9(
    tmp_path: Path, tiny_llama: Path, chat_file: Path, undisturbed: Path, moment: str
) -> None:
    """A run that is killed at a moment and started again ends with the adapter and rows of the
    undisturbed one. It repeats no more than the steps since its last checkpoint, and half-written
    checkpoints are gone."""
    run, folder = settings(tiny_llama, chat_file), tmp_path / "run"
    assert exit_code_of(train_and_die, folder, run, *MOMENTS[moment]) == -signal.SIGKILL
    steps = complete_steps(folder / "checkpoints")
    rows = lasting_rows(folder) if (folder / "metrics.jsonl").exists() else []
    reached = max((row["step"] for row in rows), default=0)
    assert (
        reached - max(steps, default=0) <= 3 + 1
    )  # the step that the next checkpoint was being written behind
    assert exit_code_of(train_here, folder, run) == 0
    assert adapter_bytes(folder) == adapter_bytes(undisturbed)
    assert lasting_rows(folder) == lasting_rows(undisturbed)
    assert all((path / "COMPLETE").exists() for path in (folder / "checkpoints").iterdir())
    assert complete_steps(folder / "checkpoints") == complete_steps(undisturbed / "checkpoints")


def test_the_undisturbed_run_keeps_the_newest_and_the_best(undisturbed: Path) -> None:
    """The two newest checkpoints remain, and the one with the lowest evaluation loss; the trial of
    the first step is gone."""
    newest = newest_checkpoint(undisturbed / "checkpoints", print)
    losses = {
        row["step"]: row["eval_loss"] for row in lasting_rows(undisturbed) if "eval_loss" in row
    }
    best = min(losses, key=losses.__getitem__)
    assert (newest.state.step, newest.state.best_step) == (NUM_STEPS, best)
    assert complete_steps(undisturbed / "checkpoints") == sorted({6, NUM_STEPS, best} - {0})


@pytest.mark.parametrize("damage", ["truncated", "one bit", "gone", "all"])
def test_checkpoints_that_were_damaged(
    tmp_path: Path, tiny_llama: Path, chat_file: Path, undisturbed: Path, damage: str
) -> None:
    """A checkpoint that was cut off, changed in one bit or lost a file is skipped with a message,
    for the one before it. When none is left, the run does not start over by itself."""
    folder = tmp_path / "run"
    shutil.copytree(undisturbed, folder)
    shutil.rmtree(folder / "adapter")
    steps = complete_steps(folder / "checkpoints")
    for step in steps if damage == "all" else steps[-1:]:
        file = folder / "checkpoints" / f"step-{step:08d}" / "optimizer.safetensors"
        content = bytearray(file.read_bytes())
        content[-100] ^= 4
        file.write_bytes(content[:-1] if damage == "truncated" else content)
        if damage == "gone":
            file.unlink()
    config = write_config(
        tmp_path / "c.yaml", **settings(tiny_llama, chat_file), output_dir=str(folder)
    )
    done = run_forked("train", config)
    words = {"truncated": "bytes instead of", "gone": "is missing"}.get(damage, "SHA-256 differs")
    assert f"step-{steps[-1]:08d}" in done.stdout
    assert words in done.stdout
    if damage == "all":
        assert done.returncode == 2
        assert f"none of the {len(steps)} checkpoints" in done.stderr
        return
    assert done.returncode == 0
    assert f"going on after step {steps[-2]}" in done.stdout
    assert adapter_bytes(folder) == adapter_bytes(undisturbed)
    assert lasting_rows(folder) == lasting_rows(undisturbed)


def test_two_runs_on_one_folder(tmp_path: Path, tiny_llama: Path, chat_file: Path) -> None:
    """While a run works on a folder, a second one is refused; the lock of a killed run stops
    nobody."""
    run = settings(tiny_llama, chat_file)
    run["optim"]["max_steps"] = 100_000
    config = write_config(tmp_path / "c.yaml", **run, output_dir=str(tmp_path / "run"))
    process, log = start(config, tmp_path)
    try:
        wait_for(lambda: "step 3/" in log.read_text(), process, log)
        second = run_forked("train", config)
        assert second.returncode == 2
        assert "is in use by another run (process " in second.stderr
        assert "rows" not in second.stdout
        pids = [rank_pid(process.pid, rank) for rank in (0, 1)]
        process.kill()
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        process.wait(timeout=60)
        wait_until_gone(
            pids
        )  # orphans by now; a lock lasts until the memory of its process has been given back
    finally:
        process.kill()
    (tmp_path / "run" / "STOP").touch()
    third = run_forked("train", config)
    assert third.returncode == 75, third.stderr
    assert "stopped (file " in third.stdout


def test_a_clock_that_goes_backwards(
    tmp_path: Path, tiny_llama: Path, chat_file: Path, undisturbed: Path
) -> None:
    """A run stops, resumes from its newest checkpoint and ends with the undisturbed adapter
    although the wall clock goes back by an hour at every look and the checkpoints' times are
    reversed."""
    folder = tmp_path / "run"
    assert exit_code_of(train_backwards, folder, settings(tiny_llama, chat_file)) == 0
    assert adapter_bytes(folder) == adapter_bytes(undisturbed)
    assert lasting_rows(folder) == lasting_rows(undisturbed)


def train_backwards(folder: Path, run: dict) -> None:
    now = time.time()

    def backwards() -> float:
        nonlocal now
        now -= 3600
        return now

    with mock.patch("time.time", backwards):
        assert not train_here(folder, run, stop_after=14)
        for age, path in enumerate(sorted((folder / "checkpoints").iterdir())):
            os.utime(path, (1e9 - age, 1e9 - age))
        assert train_here(folder, run)


def press_ctrl_c(folder: Path, run: dict, pause: float) -> None:
    """Train; SIGINT comes twice in the middle of a step, `pause` seconds apart."""
    micro_step = train_module.micro_step
    num_done = 0

    def interrupted(*arguments):
        nonlocal num_done
        num_done += 1
        if num_done == 9:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(pause)
            os.kill(os.getpid(), signal.SIGINT)
        return micro_step(*arguments)

    with mock.patch.object(train_module, "micro_step", interrupted):
        assert not train_here(folder, run)


@pytest.mark.parametrize(("pause", "exit_code"), [(0.0, 0), (1.2, 130)])
def test_ctrl_c(
    tmp_path: Path, tiny_llama: Path, chat_file: Path, pause: float, exit_code: int
) -> None:
    """Two SIGINTs at once, as through a launcher, stop the run in good order. A second Ctrl-C a
    while later ends the process on the spot; saved checkpoints stay whole."""
    folder = tmp_path / "run"
    assert exit_code_of(press_ctrl_c, folder, settings(tiny_llama, chat_file), pause) == exit_code
    assert (
        newest_checkpoint(folder / "checkpoints", print).state.step == 4
    )  # the interrupted one was the fifth
