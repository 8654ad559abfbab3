"""Helpers that run contenders in fresh processes and compare each with nearby runs of a base.

A fresh process keeps one contender's leftovers away from the next. A nearby run of the base cancels
the drift of the machine's speed.
"""

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
        command: the words after `python`.
        threads: threads of its computations.
        environment: variables added to those of the calling process.

    Returns:
        the command's stdout.

    Raises:
        SystemExit: the command failed; the message quotes the end of its output.
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
    """Indices of the base runs nearest before and nearest after a place.

    A place that holds a base run comes twice. At either end of the order one index may be missing.

    Args:
        is_base: for every run in execution order, True if it was a run of the base.
    """
    bases = [i for i, found in enumerate(is_base) if found]
    return [i for i in bases if i <= place][-1:] + [i for i in bases if i >= place][:1]


def in_turns(contenders: Sequence[str], base: str) -> list[str]:
    """Order of the runs: the base first, last, and after every second other contender."""
    others = [name for name in contenders if name != base]
    pairs = [others[i : i + 2] for i in range(0, len(others), 2)]
    return [base, *(name for pair in pairs for name in (*pair, base))]


def over_base(in_order: Sequence[tuple[str, float]], base: str) -> dict[str, list[float]]:
    """Ratios of each contender's runs to the mean rate of the nearest base runs, by contender.

    Args:
        in_order: name and rate of every run, in execution order.
    """
    is_base = [name == base for name, _ in in_order]
    found: dict[str, list[float]] = {}
    for place, (name, rate) in enumerate(in_order):
        found.setdefault(name, []).append(
            rate / statistics.mean(in_order[i][1] for i in neighbors(is_base, place))
        )
    return found


def standard_error(values: Sequence[float]) -> float:
    """Standard error of the mean of at least two values."""
    return statistics.stdev(values) / len(values) ** 0.5
