"""Rehearsal, on this CPU, of the one run that `gpu.py` gets on a rented GPU.

    make gpu-rehearsal                           # makes the environment first: some gigabytes, once
    python benchmarks/gpu_rehearsal.py --python .venv-gpu/bin/python

Copies the tracked files and the carried packages into a clean folder and runs the rented machine's
command there: with the packages of `gpu_machine.txt` and no others, with tiny shapes, and without a
network where this system can take it away. Kills the run after some cases and starts it again.
Fails unless every case then has a result or a reason that the missing GPU explains.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks.gpu_carry import MODULES, MOST_BYTES, SITE, in_mib, size_of  # noqa: E402
from benchmarks.gpu_parts.plan import all_parts  # noqa: E402

MACHINE = ROOT / "benchmarks" / "gpu_machine.txt"
KILLED_AFTER = 5
"""Cases of the first call."""
SECONDS = 3600
"""Longest time of a call; a longer one hangs."""
TOOLS = {"pip"}
"""Packages of every environment that no run uses."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--python", required=True, help="of an environment with the packages of gpu_machine.txt"
    )
    parser.add_argument("--keep", type=Path, help="folder for the results and what the calls said")
    options = parser.parse_args()
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    started = time.monotonic()
    # not resolved: an environment's python is a link
    python = str(Path(options.python).absolute())
    check_environment(python)
    with tempfile.TemporaryDirectory() as folder:
        there = Path(folder) / "there"
        rehearsal = Rehearsal(python, there, options.keep or Path(folder) / "kept")
        rehearsal.carry()
        rehearsal.check_imports()
        rows = rehearsal.killed_call()
        rehearsal.second_call(rows)
        rehearsal.third_call()
    seconds = time.monotonic() - started
    carried = in_mib(rehearsal.num_bytes)
    print(f"rehearsal passed: {carried} carried, {seconds:.0f} seconds in all")


def check_environment(python: str) -> None:
    """Check that the environment has exactly the packages of the list.

    Raises:
        SystemExit: packages differ; the message names them.
    """
    wanted = dict(
        re.findall(r"^([\w.-]+)==(\S+)$", MACHINE.read_text(encoding="utf-8"), re.MULTILINE)
    )
    code = (
        "import json; from importlib.metadata import distributions; "
        "print(json.dumps({d.name: d.version for d in distributions()}))"
    )
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    installed = json.loads(
        subprocess.check_output([python, "-I", "-c", code], env=clean, text=True)
    )
    expected = {_plain(name): version for name, version in wanted.items()}
    found = {
        _plain(name): version for name, version in installed.items() if _plain(name) not in TOOLS
    }
    differs = sorted(
        name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)
    )
    if differs:
        said = [
            f"{name}: {expected.get(name, 'none')} there, {found.get(name, 'none')} here"
            for name in differs
        ]
        sys.exit(f"{python} is not as {MACHINE.name} says: {'; '.join(said)}")
    print(f"{len(found)} packages, those of {MACHINE.name} and no others")


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


class Rehearsal:
    """Calls in a folder that holds the carried files and nothing else of this project."""

    def __init__(self, python: str, there: Path, kept: Path) -> None:
        self.python, self.there, self.kept = python, there, kept
        self.out = there.parent / "out" / "gpu.json"
        self.num_bytes = 0
        home = there.parent / "home"
        home.mkdir()
        kept.mkdir(parents=True, exist_ok=True)
        self.environment = {
            "PATH": "/usr/local/bin:/usr/bin:/bin",
            "HOME": str(home),
            "TMPDIR": str(home),
            "LANG": "C.UTF-8",
            "PYTHONPATH": str(there / ".site"),
        }
        self.alone = ["unshare", "-rn", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
        if subprocess.run([*self.alone, "true"], capture_output=True, check=False).returncode:
            self.alone = []
            print("this system cannot take the network away: a download would not show")

    def carry(self) -> None:
        """Copy the tracked files, as they are in the working tree, and the carried packages.

        Raises:
            SystemExit: the files exceed the size that can be carried.
        """
        changed = subprocess.check_output(["git", "stash", "create"], cwd=ROOT, text=True).strip()
        self.there.mkdir()
        archive = self.there.parent / "tracked.tar"
        subprocess.run(
            ["git", "archive", "-o", str(archive), changed or "HEAD"], cwd=ROOT, check=True
        )
        subprocess.run(["tar", "-xf", str(archive), "-C", str(self.there)], check=True)
        tracked = size_of(self.there)
        shutil.copytree(SITE, self.there / ".site")
        self.num_bytes = size_of(self.there)
        packages = in_mib(self.num_bytes - tracked)
        said = f"carried: {in_mib(tracked)} of the program, {packages} of packages"
        print(f"{said}, {in_mib(self.num_bytes)} together of {in_mib(MOST_BYTES)}")
        if self.num_bytes > MOST_BYTES:
            sys.exit(f"that is more than {in_mib(MOST_BYTES)}")

    def check_imports(self) -> None:
        """Check that carried packages come from the folder and bitsandbytes' CUDA library loads.

        Raises:
            SystemExit: a package is imported from elsewhere, or the library cannot be loaded.
        """
        code = f"""
import ctypes, importlib, json, torch
found = {{name: importlib.import_module(name).__file__ for name in {MODULES!r}}}
ctypes.CDLL(found["bitsandbytes"].replace("__init__.py", "libbitsandbytes_cuda130.so"))
print(json.dumps(found))
"""
        done = self._start(["-c", code], "imports")
        if done.wait():
            sys.exit(f"what is carried cannot be imported:\n{self._said('imports')[-2000:]}")
        files = json.loads(self._said("imports").splitlines()[-1])
        elsewhere = [
            file for file in files.values() if not Path(file).is_relative_to(self.there / ".site")
        ]
        if elsewhere:
            sys.exit(f"not from the carried folder: {elsewhere}")
        print(
            f"{len(files)} carried modules are imported from there; "
            "the CUDA library of bitsandbytes loads"
        )

    def killed_call(self) -> dict[str, Any]:
        """Kill the first call as soon as it has some rows, and return the rows it leaves."""
        process = self._start(self._command(), "first")
        started = time.monotonic()
        while len(self._rows()) < KILLED_AFTER:
            if process.poll() is not None or time.monotonic() - started > SECONDS:
                said = self._said("first")[-3000:]
                sys.exit(f"the first call ended, or hung, before {KILLED_AFTER} cases:\n{said}")
            time.sleep(0.2)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        rows = self._rows()
        seconds = time.monotonic() - started
        print(f"first call: killed after {seconds:.0f} seconds and {len(rows)} cases")
        return rows

    def second_call(self, before: dict[str, Any]) -> None:
        """Run a second call, which must keep the rows of the first and add all others.

        Raises:
            SystemExit: a row is missing, was measured again, or blames anything but the missing
                GPU.
        """
        seconds = self._run_whole("second")
        rows = self._rows()
        planned = [
            f"{part.name} | {case.name}" for part in all_parts(is_small=True) for case in part.cases
        ]
        wrong = [f"{name}: no result and no reason" for name in planned if name not in rows]
        wrong += [f"{name}: measured again" for name in before if rows.get(name) != before[name]]
        without = {name: row["not measured"] for name, row in rows.items() if "not measured" in row}
        wrong += [
            f"{name}: {reason}"
            for name, reason in without.items()
            if not is_for_want_of_gpu(reason)
        ]
        measured = f"{len(rows) - len(without)} of {len(planned)} cases measured"
        print(f"second call: {seconds:.0f} seconds; {measured}, not measured:")
        for name, reason in without.items():
            print(f"    {name}: {reason}")
        if wrong:
            sys.exit("not as it must be:\n" + "\n".join(f"    {line}" for line in wrong))

    def third_call(self) -> None:
        """Run a third call, which must change nothing.

        Raises:
            SystemExit: the results changed.
        """
        before = self.out.read_bytes()
        seconds = self._run_whole("third")
        if self.out.read_bytes() != before:
            sys.exit("a call with nothing left to do has changed the results")
        print(f"third call: {seconds:.0f} seconds, nothing left to do")

    def _command(self) -> list[str]:
        minutes = str(SECONDS / 60)
        return [
            "benchmarks/gpu.py",
            "--device",
            "cpu",
            "--small",
            "--minutes",
            minutes,
            "--out",
            str(self.out),
        ]

    def _run_whole(self, name: str) -> float:
        started = time.monotonic()
        code = self._start(self._command(), name).wait()
        shutil.copy(self.out, self.kept / f"{name}.json")
        if code:
            sys.exit(f"the {name} call ended with {code}:\n{self._said(name)[-3000:]}")
        return time.monotonic() - started

    def _start(self, arguments: list[str], name: str) -> subprocess.Popen[bytes]:
        with (self.kept / f"{name}.log").open("wb") as log:
            return subprocess.Popen(
                [*self.alone, self.python, *arguments],
                cwd=self.there,
                env=self.environment,
                stdout=log,
                stderr=log,
            )

    def _said(self, name: str) -> str:
        return (self.kept / f"{name}.log").read_text(encoding="utf-8")

    def _rows(self) -> dict[str, Any]:
        if not self.out.is_file():
            return {}
        parts = json.loads(self.out.read_text(encoding="utf-8"))["parts"]
        return {
            f"{part} | {case}": row for part, rows in parts.items() for case, row in rows.items()
        }


def is_for_want_of_gpu(reason: str) -> bool:
    """True for a reason that only the missing GPU explains."""
    skipped = re.fullmatch(r"all \d+ tests were skipped: (.*)", reason)
    if skipped:
        return all("CUDA device" in one or "GPU" in one for one in skipped[1].split("; "))
    return reason.startswith("needs a GPU: ")


if __name__ == "__main__":
    main()
