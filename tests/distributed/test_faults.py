"""Faults during a run cost at most the steps since the last checkpoint, and never a checkpoint."""

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest

from qlora_dist import train as train_module
from qlora_dist.run import checkpoint as checkpoint_module
from qlora_dist.run.checkpoint import complete_steps, newest_checkpoint
from tests.distributed.test_failures import rank_pid, start, wait_for
from tests.support.command import run_forked, write_config
from tests.support.processes import exit_code_of, run_on_processes
from tests.support.training import adapter_bytes, lasting_rows, train_here

NUM_STEPS = 8


def settings(model: Path, data: Path) -> dict:
    """Settings of eight steps, a checkpoint after every third, and evaluations in between."""
    return {
        "model": {"path": str(model), "dtype": "float32"},
        "adapter": {"rank": 4, "alpha": 8, "dropout": 0.1},
        "data": {"train": str(data), "eval_fraction": 0.25, "max_seq_len": 96, "packing": False},
        "optim": {"max_steps": NUM_STEPS, "lr": 2e-3, "grad_accum_steps": 2},
        "eval": {"every": 4},
        "checkpoint": {"every": 3},
        "logging": {"tensorboard": False},
    }


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, tiny_llama: Path, chat_file: Path) -> Path:
    """Folder of the run that nothing disturbs."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    assert exit_code_of(train_here, folder, settings(tiny_llama, chat_file)) == 0
    return folder


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


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Function that mounts a file system of a given size, to be filled up or made read-only."""
    mounted: list[Path] = []

    def make(options: str) -> Path:
        folder = tmp_path / "disk"
        folder.mkdir()
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)],
            capture_output=True,
            check=False,
        )
        if done.returncode:
            pytest.skip(f"needs the right to mount: {done.stderr.decode().strip()}")
        mounted.append(folder)
        return folder

    yield make
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_is_full_from_the_start(
    tmp_path: Path, tiny_llama: Path, chat_file: Path, small_disk
) -> None:
    """A checkpoint that cannot be written is reported at the first step, not after hours, with
    advice."""
    disk = small_disk("size=100k")
    config = write_config(
        tmp_path / "c.yaml", **settings(tiny_llama, chat_file), output_dir=str(disk / "run")
    )
    done = run_forked("train", config)
    assert done.returncode == 2
    assert "the checkpoint cannot be written" in done.stderr
    assert "No space left" in done.stderr
    assert "step 4/" not in done.stdout
    assert not any((disk / "run" / "checkpoints").iterdir()), (
        "the half-written checkpoint gave its space back"
    )


def test_a_disk_that_fills_up(
    tmp_path: Path, tiny_llama: Path, chat_file: Path, small_disk, undisturbed: Path
) -> None:
    """A run on a full disk ends with the reason and keeps its last complete checkpoint. With free
    space it goes on to the undisturbed adapter."""
    disk = small_disk("size=3m")
    run = settings(tiny_llama, chat_file)
    config = write_config(tmp_path / "c.yaml", **run, output_dir=str(disk / "run"))
    assert exit_code_of(train_with_ballast, disk / "run", run, disk / "ballast") != 0
    assert complete_steps(disk / "run" / "checkpoints") == [3]
    (disk / "ballast").unlink()
    assert run_forked("train", config).returncode == 0
    assert adapter_bytes(disk / "run") == adapter_bytes(undisturbed)


def train_with_ballast(folder: Path, run: dict, ballast: Path) -> None:
    """Train; while the checkpoint of step 3 is written, other data fill the disk."""
    rotate = checkpoint_module.Checkpoints._rotate

    def rotate_and_fill(self, state):
        rotate(self, state)
        if state.step == 3:
            with ballast.open("wb", buffering=0) as file:
                try:
                    while True:
                        file.write(bytes(4096))
                except OSError:
                    pass

    with mock.patch.object(checkpoint_module.Checkpoints, "_rotate", rotate_and_fill):
        train_here(folder, run)


def test_a_folder_that_cannot_be_written(
    tmp_path: Path, tiny_llama: Path, chat_file: Path, small_disk
) -> None:
    """A read-only output folder is refused before anything is read, also for root."""
    disk = small_disk("size=3m")
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    for folder in (disk, disk / "run"):
        config = write_config(
            tmp_path / "c.yaml", **settings(tiny_llama, chat_file), output_dir=str(folder)
        )
        done = run_forked("train", config)
        assert done.returncode == 2
        assert f"output_dir {folder}" in done.stderr
        assert "rows" not in done.stdout


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


def wait_until_gone(pids: list[int]) -> None:
    """Wait for processes that are not children of this one."""
    deadline = time.monotonic() + 60
    while not all(map(_is_gone, pids)):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def _is_gone(pid: int) -> bool:
    """True if no thread of the process is left, apart from one that its parent has not waited
    for."""
    try:
        threads = list(Path(f"/proc/{pid}/task").iterdir())
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return True
    return state == "Z" and len(threads) == 1


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


def hang_on_one_rank(folder: Path, run: dict) -> None:
    micro_step = train_module.micro_step
    num_done = 0

    def sleepy_micro_step(*arguments):
        nonlocal num_done
        num_done += 1
        if num_done == 7 and os.environ["RANK"] == "1":
            time.sleep(1000)
        return micro_step(*arguments)

    log = os.open(folder.with_name(f"rank-{os.environ['RANK']}.txt"), os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 2)
    with mock.patch.object(train_module, "micro_step", sleepy_micro_step):
        train_here(folder, run)


def innermost_frame(report: str) -> str:
    """Innermost frame of the thread that trains, in a dump of all threads."""
    [stack] = [block for block in report.split("Thread 0x") if "in train_here" in block]
    return stack.splitlines()[1]


def test_a_rank_that_hangs(tmp_path: Path, tiny_llama: Path, chat_file: Path) -> None:
    """When one rank hangs, every rank ends after the timeout with the stacks of its threads: the
    culprit's shows the place, the other's shows a collective."""
    run = settings(tiny_llama, chat_file)
    run["parallel"] = {"backend": "fsdp", "hang_timeout_seconds": 8}
    started = time.monotonic()
    with pytest.raises(Exception, match="terminated with exit code 1"):
        run_on_processes(hang_on_one_rank, 2, tmp_path / "run", run)
    assert time.monotonic() - started < 60
    culprit = (tmp_path / "rank-1.txt").read_text()
    assert "[rank 1] no progress for 8 seconds (parallel.hang_timeout_seconds)" in culprit
    assert innermost_frame(culprit).endswith("in sleepy_micro_step")
    other = (tmp_path / "rank-0.txt").read_text()
    assert "[rank 0] no progress for 8 seconds" in other
    assert "torch/distributed" in innermost_frame(other)
    assert complete_steps(tmp_path / "run" / "checkpoints") == [3]


def test_a_rank_that_computes_something_else(
    tmp_path: Path, tiny_llama: Path, chat_file: Path
) -> None:
    """One flipped bit in one rank's copy of the adapter is noticed at the next check and never
    saved."""
    run = settings(tiny_llama, chat_file)
    run["parallel"] = {"backend": "ddp", "check_every": 1}
    run_on_processes(flip_one_bit, 2, tmp_path / "run", run)
    message = (tmp_path / "message").read_text()
    assert "after step 5 the ranks no longer agree on" in message
    assert ".layers.1.mlp.up_proj.lora_B" in message
    assert complete_steps(tmp_path / "run" / "checkpoints") == [3, 4]


def flip_one_bit(folder: Path, run: dict) -> None:
    import torch

    from qlora_dist.errors import TrainingError
    from qlora_dist.model.adapters import adapter_parameters

    train_step = train_module.train_step
    num_steps = 0

    def faulty(model, *arguments):
        nonlocal num_steps
        sums = train_step(model, *arguments)
        num_steps += 1
        if num_steps == 5 and os.environ["RANK"] == "1":
            for name, param in adapter_parameters(model).items():
                if ".layers.1.mlp.up_proj.lora_B" in name:
                    param.data.view(-1)[3:4].view(torch.int32).bitwise_xor_(1)
        return sums

    with (
        mock.patch.object(train_module, "train_step", faulty),
        pytest.raises(TrainingError) as error,
    ):
        train_here(folder, run)
    if os.environ["RANK"] == "0":
        folder.with_name("message").write_text(str(error.value))


def poison(folder: Path, run: dict, which: list[int]) -> None:
    """Train while the loss of some optimizer steps is not finite on one rank only."""
    train_step = train_module.train_step
    micro_step = train_module.micro_step
    step = 0

    def counting(*arguments):
        nonlocal step
        step += 1
        return train_step(*arguments)

    def poisoned(*arguments):
        loss = micro_step(*arguments)
        return loss * float("nan") if step in which and os.environ["RANK"] == "1" else loss

    with (
        mock.patch.object(train_module, "micro_step", poisoned),
        mock.patch.object(train_module, "train_step", counting),
    ):
        try:
            train_here(folder, run)
        except train_module.TrainingError as error:
            if os.environ["RANK"] == "0":
                folder.with_name("message").write_text(str(error))


@pytest.mark.parametrize("backend", ["ddp", "fsdp", "zero2", "zero3"])
def test_steps_that_are_not_finite(
    tmp_path: Path, tiny_llama: Path, chat_file: Path, backend: str
) -> None:
    """After a NaN on one rank all ranks skip the update, count it and train on; the adapter stays
    finite."""
    if backend.startswith("zero"):
        pytest.importorskip("deepspeed")
    run = settings(tiny_llama, chat_file)
    run["parallel"] = {"backend": backend, "check_every": 1}
    run_on_processes(poison, 2, tmp_path / "run", run, [3, 4])
    rows = [row for row in lasting_rows(tmp_path / "run") if "loss" in row]
    assert [row["num_skipped_steps"] for row in rows] == [0, 0, 1, 2, 2, 2, 2, 2]
    assert [row["loss"] is None for row in rows] == [
        False,
        False,
        True,
        True,
        False,
        False,
        False,
        False,
    ]
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_too_many_steps_that_are_not_finite(
    tmp_path: Path, tiny_llama: Path, chat_file: Path
) -> None:
    """After the configured number of such steps in a row the run ends with advice; its last
    checkpoint is from before."""
    run = settings(tiny_llama, chat_file)
    run["optim"]["max_skipped_steps"] = 2
    run["checkpoint"]["every"] = 2
    run["parallel"] = {"backend": "ddp"}
    run_on_processes(poison, 2, tmp_path / "run", run, [4, 6, 7])
    message = (tmp_path / "message").read_text()
    assert "the gradient was not finite in 2 steps in a row" in message
    assert "Lower optim.lr (now 0.002)" in message
    assert (
        json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 7
    )
    assert newest_checkpoint(tmp_path / "run" / "checkpoints", print).state.num_skipped_steps <= 2


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


def run_out_of_memory(folder: Path, run: dict) -> None:
    """Train until the fifth micro-batch raises a made-up error of a full memory (there may be no
    GPU)."""
    import torch

    micro_step = train_module.micro_step
    num_done = 0

    def too_large(*arguments):
        nonlocal num_done
        num_done += 1
        if num_done == 5:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return micro_step(*arguments)

    with (
        mock.patch.object(train_module, "micro_step", too_large),
        pytest.raises(train_module.TrainingError) as error,
    ):
        train_here(folder, run)
    folder.with_name("message").write_text(str(error.value))


def run_out_of_memory_in_evaluation(folder: Path, run: dict) -> None:
    import torch

    full = mock.patch.object(
        train_module, "evaluate", side_effect=torch.OutOfMemoryError("CUDA out of memory.")
    )
    with (
        full,
        pytest.raises(
            train_module.TrainingError,
            match=r"full in an evaluation.*optim\.micro_batch_size \(now",
        ),
    ):
        train_here(folder, run)


def test_memory_that_is_full_in_an_evaluation(
    tmp_path: Path, tiny_llama: Path, chat_file: Path
) -> None:
    """The message of an evaluation without memory names settings of its own: nothing is kept for
    backward."""
    run = settings(tiny_llama, chat_file)
    assert exit_code_of(run_out_of_memory_in_evaluation, tmp_path / "run", run) == 0


def test_memory_that_is_full(tmp_path: Path, tiny_llama: Path, chat_file: Path) -> None:
    """The message names the micro-batch and the saving of each change for the model at hand."""
    run = settings(tiny_llama, chat_file)
    run["optim"]["micro_batch_size"] = 4
    run["memory"] = {"recompute": 1}
    assert exit_code_of(run_out_of_memory, tmp_path / "run", run) == 0
    message = (tmp_path / "message").read_text()
    assert "a micro-batch of 4 rows of 96 tokens takes about" in message
    for words in (
        "memory.recompute: full saves about",
        "optim.micro_batch_size: 2 with grad_accum_steps: 4",
    ):
        assert words in message
