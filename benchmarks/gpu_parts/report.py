"""Results as text: a line for each case as it ends, and tables of all."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from benchmarks.gpu_parts.plan import MOST_SECONDS, Part, total_seconds

_NOTES = ("seconds", "program", "unfinished")
"""Keys that tell how a row was measured."""


def plan_table(parts: Sequence[Part]) -> str:
    """Markdown table of the parts, their cases and their seconds."""
    lines = ["| part | seconds | cases, each with its limit in seconds |", "|---|---|---|"]
    for part in parts:
        cases = "; ".join(f"{case.name} ({case.limit_seconds})" for case in part.cases)
        lines.append(f"| {part.name} | {part.seconds} | {cases} |")
    total = total_seconds(parts)
    lines.append(f"| all | {total} | {sum(len(part.cases) for part in parts)} cases |")
    return "\n".join([*lines, "", f"{total} of {MOST_SECONDS} seconds"])


def in_short(row: dict[str, Any]) -> str:
    """A result in a few words."""
    if "tokens_per_second" not in row:
        return verdict(row)
    share = f", {row['share_of_bound']:.1%} of the bound" if "share_of_bound" in row else ""
    busy = f", busy {row['busy']['share']:.0%}" if "share" in (row.get("busy") or {}) else ""
    peak = row["peak_allocated_gib"]
    memory = "" if peak is None else f", {peak:.2f} GiB"
    speed = f"{row['tokens_per_second']:,.0f} tokens/s, {row['seconds_per_step']:.4g} s a step"
    found = _found(row)
    return f"{speed}{share}{busy}{memory}{', ' + json.dumps(found) if found else ''}"


def table(result: dict[str, Any]) -> str:
    """Markdown tables of the steps and of all other results."""
    lines = [
        "| model | setting | tokens/s | s/step | MFU | of the bound | with recompute | busy "
        "| peak, reserved GiB | retries | loss |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    checks = ["| part | | result |", "|---|---|---|"]
    for part, rows in result["parts"].items():
        for name, row in rows.items():
            if "tokens_per_second" in row:
                lines.append(f"| {part} | {name} | {' | '.join(_step_cells(row))} |")
            if "tokens_per_second" not in row or _found(row):
                checks.append(f"| {part} | {name} | {verdict(_found(row) or row)} |")
    return "\n".join([*lines, "", *checks])


def _found(row: dict[str, Any]) -> dict[str, Any]:
    """Findings of a case of steps besides its speed: gathered weights, a save."""
    return {
        key: row[key] for key in ("gathered_parameters", "bytes_that_differ", "save") if key in row
    }


def _step_cells(row: dict[str, Any]) -> list[str]:
    shares = [
        f"{row[key]:.1%}" if key in row else ""
        for key in ("mfu", "share_of_bound", "share_of_bound_with_recompute")
    ]
    busy = row.get("busy") or {}
    peaks = [row["peak_allocated_gib"], row["peak_reserved_gib"]]
    memory = (
        ""
        if None in peaks
        else f"{max(peaks[0], row.get('build_peak_gib') or 0):.2f}, {peaks[1]:.2f}"
    )
    return [
        f"{row['tokens_per_second']:,.0f}",
        f"{row['seconds_per_step']:.4g}",
        *shares,
        f"{busy['share']:.0%}" if "share" in busy else "",
        memory,
        str(row.get("allocation_retries", "")),
        f"{row['first_loss']:.4f} → {row['last_loss']:.4f}",
    ]


def verdict(row: dict[str, Any]) -> str:
    """Finding of a check as text; other figures as JSON."""
    if "not measured" in row:
        return f"not measured: {row['not measured']}"
    found = []
    for dtype in ("float32", "bfloat16"):
        if isinstance(row.get(dtype), dict) and "gradients" in row[dtype]:
            distances = [
                f"{row[dtype][part][which]:.2g}"
                for part in ("output", "gradients")
                for which in ("plain", "quick")
            ]
            word = "as exact" if row[dtype]["is_as_exact"] else "LESS EXACT"
            output, gradients = " → ".join(distances[:2]), " → ".join(distances[2:])
            found.append(f"{dtype}: {word} (output {output}, gradients {gradients})")
    return "; ".join(found) or json.dumps(
        {key: value for key, value in row.items() if key not in _NOTES}
    )
