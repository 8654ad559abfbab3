"""Runs in processes of their own, so that what one contender leaves behind does not touch the next; and beside others,
as the speed of a machine drifts."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
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


def neighbours(is_base: Sequence[bool], place: int) -> list[int]:
    """Where the base ran next before a place and next behind it; at the place itself, only there twice.

    Args:
        is_base: of all runs, in the order in which they ran, whether it was one of the base.
    """
    bases = [i for i, found in enumerate(is_base) if found]
    return [i for i in bases if i <= place][-1:] + [i for i in bases if i >= place][:1]
