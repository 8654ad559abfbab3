"""Runs of the program as a user's command, plain or under `accelerate launch`."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run_command(
    *arguments: str | Path, processes: int = 1, timeout: float = 300, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `qlora_dist ARGUMENTS` and return its exit code and output.

    Args:
        processes: two or more go through accelerate.
    """
    command = [sys.executable, "-m", "qlora_dist"]
    if processes > 1:
        command = [
            sys.executable,
            "-m",
            "accelerate.commands.launch",
            "--config_file",
            str(ROOT / "launch" / "cpu_2.yaml"),
            "--num_processes",
            str(processes),
            "--main_process_port",
            "0",
            "-m",
            "qlora_dist",
        ]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    return subprocess.run(
        [*command, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=cwd or ROOT,
        env=environment,
        check=False,
    )


def run_forked(
    *arguments: str | Path, timeout: float = 60, before: Callable[[], None] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `run_command`'s command in a process forked from one that has imported everything.

    Saves the seconds of the imports.

    Args:
        before: called in that process first; may replace parts of the program. Picklable.
    """
    from tests.support.processes import exit_code_of

    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        code = exit_code_of(
            _main, [str(argument) for argument in arguments], out, err, before, timeout=timeout
        )
        return subprocess.CompletedProcess(arguments, code, out.read_text(), err.read_text())


def run_ranks(
    *arguments: str | Path,
    processes: int,
    timeout: float = 300,
    before: Callable[[], None] | None = None,
) -> list[subprocess.CompletedProcess[str]]:
    """Run `run_forked` in each of several processes, set up as by a launcher; one result each."""
    from tests.support.processes import free_port

    if processes == 1:
        return [run_forked(*arguments, timeout=timeout, before=before)]
    port = free_port()

    def run(rank: int) -> subprocess.CompletedProcess[str]:
        return run_forked(
            *arguments, timeout=timeout, before=partial(_become, rank, processes, port, before)
        )

    with ThreadPoolExecutor(processes) as pool:
        return list(pool.map(run, range(processes)))


def _become(rank: int, world_size: int, port: int, before: Callable[[], None] | None) -> None:
    from tests.support.processes import be_rank

    be_rank(rank, world_size, port)
    if before is not None:
        before()


def _main(arguments: list[str], out: Path, err: Path, before: Callable[[], None] | None) -> None:
    from qlora_dist.cli import main

    for descriptor, file in ((1, out), (2, err)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), descriptor)
    if before is not None:
        before()
    main(arguments)


def run_rows(run_folder: Path) -> list[dict]:
    """Rows of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]


def losses(run_folder: Path) -> list[float]:
    """Training losses of a run, step by step."""
    return [row["loss"] for row in run_rows(run_folder) if "loss" in row]


def write_config(file: Path, **sections: object) -> Path:
    """Write a YAML config; keyword arguments are its top-level keys."""
    import yaml

    file.write_text(yaml.safe_dump(sections))
    return file
