"""Settings of a short run with checkpoints, and processes that are watched from outside."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from tests.support.command import ROOT

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


def start(config: Path, root: Path) -> tuple[subprocess.Popen[bytes], Path]:
    """Start `train` on two processes in the background, writing to a log file."""
    log = root / "log.txt"
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(ROOT / "launch" / "cpu_2.yaml"),
        "--main_process_port",
        "0",
        "-m",
        "qlora_dist",
        "train",
        str(config),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with log.open("wb") as out:
        return subprocess.Popen(command, stdout=out, stderr=out, cwd=ROOT, env=environment), log


def wait_for(condition, process: subprocess.Popen, log: Path, seconds: float = 120) -> None:
    """Poll until the condition holds; fail if the run ends before."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)


def children(pid: int) -> list[int]:
    """Process ids of the direct children of `pid` that are still running."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            found.append(int(status.parent.name))
    return found


def rank_pid(launcher: int, rank: int) -> int:
    """Process id of rank `rank`."""
    for pid in children(launcher):
        if f"RANK={rank}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            return pid
    raise AssertionError(f"no process of rank {rank}")


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
