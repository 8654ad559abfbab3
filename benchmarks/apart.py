"""A command in a process of its own, so that what one contender leaves behind does not touch the next."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run_apart(command: list[str], threads: int, **environment: str) -> str:
    """Run a Python script or module to its end.

    Args:
        command: what follows `python`.
        threads: of its computations.
        environment: variables besides those of this process.

    Returns:
        what it wrote to stdout.

    Raises:
        SystemExit: it failed; with the end of what it said.
    """
    fixed = {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *command],
        env={**os.environ, **fixed, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        said = f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        sys.exit(f"python {' '.join(command)}\nended with {done.returncode}:\n{said}")
    return done.stdout
