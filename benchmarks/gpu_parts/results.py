"""Results of the benchmark on disk, complete after every case and continued by later calls."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu_parts.plan import Case, Part

ROOT = Path(__file__).parents[2]
MACHINE = ("device", "python", "torch", "transformers", "peft", "bitsandbytes")
"""Keys of the machine that all results of a file share."""

Row = dict[str, Any]
"""Figures by name, or `not measured` with the reason; `unfinished` if the time ran out and another
call may try."""


class Results:
    """File of results by part and case."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.content: dict[str, Any] = {"parts": {}}
        if file.is_file():
            self.content = json.loads(file.read_text(encoding="utf-8"))
        self._program = program()

    def begin(self, machine: Mapping[str, Any], is_small: bool) -> None:
        """Record the machine and the sizes of the results.

        Raises:
            SystemExit: the file has results of another machine, of other versions or other sizes.
        """
        before = self.content.get("machine", machine)
        differs = [
            f"{key} {before.get(key)} there, {machine[key]} here"
            for key in MACHINE
            if before.get(key) != machine[key]
        ]
        if self.content.get("is_small", is_small) != is_small:
            differs.append(f"is_small {not is_small} there, {is_small} here")
        if differs:
            raise SystemExit(
                f"{self.file} holds results of something else: {'; '.join(differs)}. "
                "They would be mixed. Give another file with --out, or remove this one."
            )
        self.content |= {
            "machine": dict(machine),
            "is_small": is_small,
            "adapter_rank": 4 if is_small else 64,
        }

    def is_done(self, part: str, case: str) -> bool:
        """True for a case with a result, or with a reason that another call would find as well."""
        row = self.content["parts"].get(part, {}).get(case)
        return row is not None and not row.get("unfinished")

    def left_of(self, parts: Sequence[Part], again: Sequence[str]) -> list[tuple[Part, list[Case]]]:
        """Cases still to run; all cases of the parts in `again`."""
        left = []
        for part in parts:
            cases = [
                case
                for case in part.cases
                if part.name in again or not self.is_done(part.name, case.name)
            ]
            if cases:
                left.append((part, cases))
        return left

    def add(self, part: str, case: str, row: Row) -> None:
        """Keep a result and rewrite the file; a reader sees the old file or the new one."""
        self.content["parts"].setdefault(part, {})[case] = {**row, "program": self._program}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        partial = self.file.with_name(f".{self.file.name}.partial")
        partial.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, self.file)


def program() -> str:
    """Eight digits that identify the source of the program and the benchmark."""
    files = [*ROOT.glob("qlora_dist/**/*.py"), *ROOT.glob("benchmarks/**/*.py")]
    return hashlib.sha256(b"".join(file.read_bytes() for file in sorted(files))).hexdigest()[:8]
