"""Orderly stops, by signal, STOP file or loss of the launcher: all ranks agree before they act."""

# Tested by tests/distributed/test_resume.py and tests/distributed/test_orphans.py.

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from types import FrameType

from qlora_dist.errors import Stopped
from qlora_dist.run.folder import STOP
from qlora_dist.run.launcher import GONE, watch_launcher
from qlora_dist.runtime.processes import Runtime

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
_STOP_FILE = 1000
"""Number that stands for the file where other requests have their signal's number."""
_LAUNCHER_GONE = 1001
"""Number that stands for a launcher that has ended."""
_FILE_POLL_SECONDS = 1.0
_DOUBLE_SECONDS = 1.0
"""Time within which two SIGINT are one Ctrl-C: the terminal sends it to all processes, and their
launcher passes it on."""


class StopRequest:
    """Requests to stop the run, to any of its ranks.

    A request is SIGTERM, SIGINT, SIGUSR1 or SIGHUP (a closed terminal) to any process, a file STOP
    in the run's folder, or the end of a launcher. A second Ctrl-C ends the process at once: the
    files on disk are complete at any moment.
    """

    def __init__(self, folder: Path, runtime: Runtime) -> None:
        self._file = folder / STOP
        self._runtime = runtime
        self._signal = 0
        self._interrupted_at: float | None = None
        self._looked_at = float("-inf")
        self.launcher = watch_launcher()
        # nohup sets SIGHUP to be ignored. A launcher disregards that: it passes the signal on, and
        # sends SIGKILL 30 s later.
        is_deaf = self.launcher is None and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        for number in _SIGNALS:
            if number != signal.SIGHUP or not is_deaf:
                signal.signal(number, self._on_signal)

    def check(self) -> None:
        """Look for requests on all ranks; a collective that does not wait for the device.

        Raises:
            Stopped: on all ranks, when any of them was asked to stop.
        """
        # The largest number wins where ranks were asked in several ways.
        agreed = self._runtime.max_on_host(self._mine())
        if not agreed:
            return
        if self.launcher is not None:
            self.launcher.stand_down()
        reasons = {_STOP_FILE: f"file {self._file}", _LAUNCHER_GONE: GONE}
        raise Stopped(reasons.get(agreed) or signal.Signals(agreed).name)

    def _mine(self) -> int:
        """Return the request to this rank as a number; 0 if there is none."""
        if self._signal:
            return self._signal
        if self.launcher is not None and self.launcher.is_gone:
            return _LAUNCHER_GONE
        return _STOP_FILE if self._runtime.is_main and self._is_file_there() else 0

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        """Take note of a signal; at a second Ctrl-C, end the process."""
        now = time.monotonic()
        if number == signal.SIGINT:
            if self._interrupted_at is not None and now - self._interrupted_at > _DOUBLE_SECONDS:
                os._exit(130)  # as a shell reports a process that SIGINT ended
            self._interrupted_at = self._interrupted_at or now
        self._signal = number

    def _is_file_there(self) -> bool:
        """True if there is a STOP file; looks at most once a second."""
        now = time.monotonic()
        # A network file system takes milliseconds for each look.
        if now - self._looked_at < _FILE_POLL_SECONDS:
            return False
        self._looked_at = now
        return self._file.exists()
