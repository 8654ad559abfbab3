"""Signs of life from long work in a log file: a line after each longer silence."""

# Tested by tests/unit/metrics/test_console.py.

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass


@dataclass
class Work:
    """A piece of work that may take long, and its progress."""

    doing: str
    total: int | None = None
    """Number of parts; None if unknown."""
    done: int = 0
    note: str = ""
    """More about the progress."""
    started: float = 0.0
    line: Callable[[float], str] | None = None
    """Returns the line for a time of the clock; None takes the usual line."""

    @property
    def text(self) -> str:
        """Work and progress, such as `loading layer 3/32`."""
        return self.doing if self.total is None else f"{self.doing} {self.done}/{self.total}"

    def sign(self, now: float) -> str:
        """Return the line to log after a silence, at time `now` of the clock."""
        if self.line is not None:
            return self.line(now)
        has_progress = self.total is not None or self.note
        parts = [self.text if has_progress else f"still {self.doing}", self.note]
        return ", ".join([*filter(None, parts), f"{now - self.started:.0f} s"])


class Heartbeat:
    """Logs the innermost work whenever the log has been silent for `interval` seconds.

    A thread watches the clock while there is work: a single long call of a library, such as a
    download, returns to no code of this program meanwhile.
    """

    def __init__(
        self, log: Callable[[str], None], interval: float, clock: Callable[[], float]
    ) -> None:
        self._say, self._interval, self._clock = log, interval, clock
        self._works: list[Work] = []
        self._last = clock()
        self._looking = threading.Lock()
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

    def begin(self, work: Work) -> None:
        """Begin work; it is shown instead of the work that it is a part of."""
        work.started = self._clock()
        if not self._works:
            self._last = work.started
            self._done = threading.Event()
            self._thread = threading.Thread(
                target=self._beat, args=(self._done,), name="heartbeat", daemon=True
            )
            self._thread.start()
        self._works.append(work)

    def end(self, work: Work) -> None:
        """End work; the last piece of work stops the thread."""
        self._works.remove(work)
        if not self._works and self._thread is not None:
            self._done.set()
            # A daemon thread killed while it writes keeps the lock of its file, and exit hangs.
            # One second: a thread that blocks on a pipe without a reader never returns.
            self._thread.join(1.0)

    def spoke(self) -> None:
        """Note that a line was logged just now."""
        self._last = self._clock()

    def look(self) -> None:
        """Log a line if the silence has lasted for `interval` seconds."""
        if not self._looking.acquire(blocking=False):  # the other thread is logging
            return
        try:
            now, works = self._clock(), self._works[-1:]
            if works and now - self._last >= self._interval:
                self._say(works[0].sign(now))
        finally:
            self._looking.release()

    def _beat(self, done: threading.Event) -> None:
        while not done.wait(min(1.0, max(0.05, self._interval / 5))):
            self.look()
