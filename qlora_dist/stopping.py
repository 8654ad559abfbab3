"""Stopping in good order: signals and a STOP file, agreed by all ranks before anyone acts on them."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from types import FrameType

from qlora_dist.errors import Stopped
from qlora_dist.run_folder import STOP
from qlora_dist.runtime import Runtime

EXIT_INTERRUPTED = 130

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_STOP_FILE = 1000
"""What a rank says instead of a signal's number when it found the file."""
_FILE_POLL_SECONDS = 1.0
_DOUBLE_SECONDS = 1.0
"""A launcher passes Ctrl-C on to processes that the terminal has already told: within so short a time it is one."""


class StopRequest:
    """Whether somebody wants this run to stop, on any rank.

    SIGTERM, SIGINT and SIGUSR1 to any process, or a file STOP in the run's folder. A second Ctrl-C ends the process at
    once: what is on disk is complete at any moment.
    """

    def __init__(self, folder: Path, runtime: Runtime) -> None:
        self._file = folder / STOP
        self._runtime = runtime
        self._signal = 0
        self._interrupted_at: float | None = None
        self._looked_at = float("-inf")
        for number in _SIGNALS:
            signal.signal(number, self._on_signal)

    def check(self) -> None:
        """Let all ranks look together; a collective on the host, which does not wait for the device.

        Raises:
            Stopped: on all ranks, when any was asked to stop.
        """
        mine = self._signal or (_STOP_FILE if self._runtime.is_main and self._is_file_there() else 0)
        agreed = self._runtime.max_on_host(mine)
        if agreed:
            raise Stopped(f"file {self._file}" if agreed == _STOP_FILE else signal.Signals(agreed).name)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if number == signal.SIGINT:
            if self._interrupted_at is not None and now - self._interrupted_at > _DOUBLE_SECONDS:
                os._exit(EXIT_INTERRUPTED)
            self._interrupted_at = self._interrupted_at or now
        self._signal = number

    def _is_file_there(self) -> bool:
        """Look at most once a second: a network file system takes its time."""
        now = time.monotonic()
        if now - self._looked_at < _FILE_POLL_SECONDS:
            return False
        self._looked_at = now
        return self._file.exists()
