"""Runs in processes of their own, so that what one contender leaves behind does not touch the next; and beside others,
as the speed of a machine drifts."""

from __future__ import annotations

import os
import statistics
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


def neighbors(is_base: Sequence[bool], place: int) -> list[int]:
    """Where the base ran next before a place and next behind it; at the place itself, only there twice.

    Args:
        is_base: of all runs, in the order in which they ran, whether it was one of the base.
    """
    bases = [i for i, found in enumerate(is_base) if found]
    return [i for i in bases if i <= place][-1:] + [i for i in bases if i >= place][:1]


def in_turns(contenders: Sequence[str], base: str) -> list[str]:
    """Them in their order, the base first, after every second of the others, and last."""
    others = [name for name in contenders if name != base]
    pairs = [others[i : i + 2] for i in range(0, len(others), 2)]
    return [base, *(name for pair in pairs for name in (*pair, base))]


def over_base(in_order: Sequence[tuple[str, float]], base: str) -> dict[str, list[float]]:
    """Of each run of each contender, its rate over that of the nearest runs of the base before and behind it.

    Args:
        in_order: names and rates, in the order in which they ran.
    """
    is_base = [name == base for name, _ in in_order]
    found: dict[str, list[float]] = {}
    for place, (name, rate) in enumerate(in_order):
        found.setdefault(name, []).append(
            rate / statistics.mean(in_order[i][1] for i in neighbors(is_base, place))
        )
    return found


def standard_error(values: Sequence[float]) -> float:
    """Of the mean of at least two values."""
    return statistics.stdev(values) / len(values) ** 0.5
