"""Tests that need a GPU, as many as the time allows."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def run(selection: str, seconds: float) -> dict[str, Any]:
    """Run tests; the count of each outcome and the names of those that failed.

    Args:
        selection: expression for pytest's `-k`.
        seconds: seconds after which pytest is ended.
    """
    command = [
        sys.executable,
        "-m",
        "pytest",
        "tests/gpu",
        "-k",
        selection,
        "-vv",
        "-rsf",
        "--tb=line",
        "--color=no",
    ]
    is_over = False
    with tempfile.TemporaryFile("w+", encoding="utf-8") as out:
        try:
            code = subprocess.run(
                command, cwd=ROOT, stdout=out, stderr=out, timeout=seconds, check=False
            ).returncode
        except subprocess.TimeoutExpired:
            is_over, code = True, -1
        out.seek(0)
        said = out.read()
    return outcome(said, code, seconds if is_over else None)


def outcome(said: str, code: int, ended_after: float | None) -> dict[str, Any]:
    """Row of results from pytest's output."""
    found = re.findall(r"^(tests/\S+::.*?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL)", said, re.MULTILINE)
    counts = {
        word.lower(): sum(1 for _, one in found if one == word)
        for word in sorted({one for _, one in found})
    }
    failed = [name for name, word in found if word in ("FAILED", "ERROR")]
    row: dict[str, Any] = {"outcome": counts, "failed": failed}
    if failed:
        causes = [
            line for line in said.splitlines() if re.match(r"(FAILED|ERROR|E  |/\S+:\d+:)", line)
        ]
        row["causes"] = [line[:300] for line in causes[:20]]
    if ended_after is not None:
        return {
            **row,
            "not measured": f"ended after {ended_after:.0f} seconds: {counts}",
            "unfinished": True,
        }
    if not found:
        return {"not measured": f"pytest ended with {code}: {' '.join(said.split())[-400:]}"}
    if set(counts) == {"skipped"}:
        reasons = sorted(set(re.findall(r"^SKIPPED \[\d+\] \S+ (.*)$", said, re.MULTILINE)))
        return {"not measured": f"all {len(found)} tests were skipped: {'; '.join(reasons)[:300]}"}
    return row
