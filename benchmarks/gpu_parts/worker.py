"""Processes that run the cases, so that a crash, a hang or leftovers of one spare the others.

A worker imports everything before it gets a case, while the previous worker still measures: imports
take ten seconds or more, fifteen times over. It talks in lines of JSON: a case comes in, and a row
goes out.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import queue
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.gpu_parts import NotMeasured
from benchmarks.gpu_parts.plan import Case
from benchmarks.gpu_parts.results import ROOT, Row

START_SECONDS = 90
"""Longest time for a process to import everything."""
_MARK = "\x1eworker: "
"""Beginning of a worker's lines; all other stdout comes from libraries."""


class Worker:
    """Process that runs the cases it is given."""

    def __init__(self, command: list[str]) -> None:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        # closed by `end`
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=environment,
            cwd=ROOT,
            start_new_session=True,
        )
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._machine: dict[str, Any] | None = None
        self.is_over = False
        """True when it can take no more cases."""
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(_MARK):
                self._lines.put(line.removeprefix(_MARK))
        self._lines.put(None)

    def machine(self) -> dict[str, Any]:
        """Hardware and versions of the process; waits until it is ready.

        Raises:
            NotMeasured: the process does not become ready.
        """
        if self._machine is None:
            self._machine = self._next(START_SECONDS)
        if "not measured" in self._machine:
            raise NotMeasured(self._machine["not measured"])
        return self._machine

    def wait_until_ready(self) -> None:
        """Wait for the imports; if they fail, :meth:`run` gives the reason."""
        with suppress(NotMeasured):
            self.machine()

    def run(self, case: Case, seconds: float) -> Row:
        """Row of a case, or the reason why there is none."""
        started = time.monotonic()
        try:
            self.machine()
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps({**asdict(case), "seconds": seconds}) + "\n")
            self._process.stdin.flush()
            row = self._next(seconds)
        except (NotMeasured, BrokenPipeError) as error:
            self.is_over = True
            row = {"not measured": f"the process did not start: {error}", "unfinished": True}
        return {**row, "seconds": round(time.monotonic() - started, 1)}

    def _next(self, seconds: float) -> Row:
        try:
            line = self._lines.get(timeout=seconds)
        except queue.Empty:
            self.is_over = True
            return {
                "not measured": f"it took longer than {seconds:.0f} seconds",
                "unfinished": True,
            }
        if line is not None:
            row = dict(json.loads(line))
            self.is_over = is_device_lost(row)
            return row
        self.is_over = True
        code = self._process.wait()
        self._errors.seek(0)
        said = self._errors.read().strip().splitlines()
        last = said[-1][:500] if said else "without a word"
        return {"not measured": f"the process ended with {code}: {last}"}

    def end(self) -> None:
        """End the process and all processes that it started."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._errors.close()


class Workers:
    """Sequence of workers, each started ahead of its use; a context that ends them all."""

    def __init__(self, command: list[str]) -> None:
        self._command = command
        self._next = Worker(self._command)
        self._current: Worker | None = None

    def machine(self) -> dict[str, Any]:
        """Hardware and versions of the workers' processes."""
        return self._next.machine()

    def fresh(self) -> Worker:
        """Unused worker; the previous one is ended."""
        if self._current is not None:
            self._current.end()
        self._current, self._next = self._next, Worker(self._command)
        return self._current

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *exception: object) -> None:
        for worker in (self._current, self._next):
            if worker is not None:
                worker.end()


# --------------------------------------------------------------------------------------------------
# In a worker.


def work() -> None:
    """Import everything, describe the machine, and run the cases that come in."""
    from qlora_dist.commands.startup import quiet_third_parties

    quiet_third_parties()
    from benchmarks.machine import describe_machine

    with suppress(ImportError):  # each case reports a missing package itself
        importlib.import_module("benchmarks.gpu_parts.steps")
    serve({**describe_machine(), "carried": _carried()}, attempt)


def serve(machine: Row, run: Callable[[Case, float], Row]) -> None:
    """Run each case that comes in, write its row, and free what it left behind."""
    cases = os.fdopen(os.dup(0), encoding="utf-8")
    # compilers and tests that a case starts would otherwise read from the pipe of cases
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    _say(machine)
    for line in cases:
        message = json.loads(line)
        seconds = message.pop("seconds")
        row = run(Case(**message), seconds)
        _say(row)
        _clean_up()
        if is_device_lost(row):
            break
    os._exit(0)  # an ordinary exit may hang or abort in process groups and compilers


def _say(row: Row) -> None:
    sys.stdout.write(f"\n{_MARK}{json.dumps(row)}\n")
    sys.stdout.flush()


def _clean_up() -> None:
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is None:
        return
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()  # else the next case's lengths would be compiled as dynamic ones
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _carried() -> list[str]:
    """Packages from the folder beside the program, with their versions."""
    from importlib.metadata import distributions

    sites = [entry for entry in sys.path if Path(entry).resolve() == ROOT / ".site"]
    return sorted(f"{found.name} {found.version}" for found in distributions(path=sites))


def attempt(case: Case, seconds: float = 600.0) -> Row:
    """Result of a case, or the reason why there is none.

    Args:
        seconds: passed to a case that has an argument `seconds`, reduced so that it can report in
            time.
    """
    import torch

    from qlora_dist.errors import QloraDistError

    arguments = dict(case.arguments)
    if "seconds" in arguments:
        arguments["seconds"] = max(1.0, seconds - 3)
    try:
        module, _, function = case.function.partition(".")
        return dict(
            getattr(importlib.import_module(f"benchmarks.gpu_parts.{module}"), function)(
                **arguments
            )
        )
    except NotMeasured as error:
        return {"not measured": str(error)}
    except ModuleNotFoundError as error:
        return {"not measured": f"{error.name} is not installed"}
    except torch.OutOfMemoryError as error:
        return {"not measured": f"out of memory: {str(error).splitlines()[0][:300]}"}
    except QloraDistError as error:
        return {"not measured": re.sub(r"\S+/run\.yaml:\d+: ", "", str(error))}
    except Exception as error:  # noqa: BLE001 - whatever it is, the other cases shall run
        import traceback

        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(frame.filename).name}:{frame.lineno}"
        return {"not measured": f"{type(error).__name__}: {str(error)[:500]} ({where})"}


def is_device_lost(row: Row) -> bool:
    """True if an error has left the GPU unusable for this process."""
    reason = str(row.get("not measured", ""))
    return any(
        words in reason
        for words in ("CUDA error", "CUDA driver error", "cuDNN error", "NCCL error")
    )
