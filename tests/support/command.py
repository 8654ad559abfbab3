"""Runs the program as a user does: as a command, plainly or under `accelerate launch`."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run_command(
    *arguments: str | Path, processes: int = 1, timeout: float = 300, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `qlora_dist ARGUMENTS` and return its exit code and output; two or more processes go through accelerate."""
    command = [sys.executable, "-m", "qlora_dist"]
    if processes > 1:
        command = [
            sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(ROOT / "launch" / "cpu_2.yaml"),
            "--num_processes", str(processes), "--main_process_port", "0", "-m", "qlora_dist",
        ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [*command, *map(str, arguments)],
        capture_output=True, text=True, timeout=timeout, cwd=cwd or ROOT, env=environment, check=False,
    )  # fmt: skip


def run_rows(run_folder: Path) -> list[dict]:
    """The rows of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]


def losses(run_folder: Path) -> list[float]:
    """The training losses of a run, step by step."""
    return [row["loss"] for row in run_rows(run_folder) if "loss" in row]


def write_config(file: Path, **sections: object) -> Path:
    """Write a YAML config; keyword arguments are its top-level keys."""
    import yaml

    file.write_text(yaml.safe_dump(sections))
    return file
