"""Signs of life from long work in a log file: a line whenever nothing has been said for a while."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass


@dataclass
class Work:
    """Something that may take long, and how far it is."""

    doing: str
    total: int | None = None
    """Pieces in all, where it is known."""
    done: int = 0
    note: str = ""
    """More about how far it is."""
    started: float = 0.0
    line: Callable[[float], str] | None = None
    """Its sign of life, given the time now; None is the usual one."""

    @property
    def text(self) -> str:
        """Such as `loading layer 3/32`."""
        return self.doing if self.total is None else f"{self.doing} {self.done}/{self.total}"

    def sign(self, now: float) -> str:
        """What is said of it after a silence."""
        if self.line is not None:
            return self.line(now)
        parts = [
            self.text if self.total is not None or self.note else f"still {self.doing}",
            self.note,
        ]
        return ", ".join([*filter(None, parts), f"{now - self.started:.0f} s"])


class Heartbeat:
    """Says what is being done, once nothing has been said for `interval` seconds, and again after as many.

    A thread looks at the time while there is work, since one long call gives nobody else the chance.
    """

    def __init__(
        self, log: Callable[[str], None], interval: float, clock: Callable[[], float]
    ) -> None:
        self._say, self._interval, self._clock = log, interval, clock
        self._works: list[Work] = []
        self._last = clock()
        self._is_looking = threading.Lock()
        self._over: threading.Event | None = None
        self._thread: threading.Thread | None = None

    def begin(self, work: Work) -> None:
        """Work begins; it goes before what it is a part of."""
        work.started = self._clock()
        if not self._works:
            self._last = work.started
            self._over = threading.Event()
            self._thread = threading.Thread(
                target=self._beat, args=(self._over,), name="heartbeat", daemon=True
            )
            self._thread.start()
        self._works.append(work)

    def end(self, work: Work) -> None:
        """Work is over."""
        self._works.remove(work)
        if not self._works and self._over is not None and self._thread is not None:
            self._over.set()
            # A thread that writes when the interpreter ends would take the lock of its file along. One that waits for
            # a reader is not waited for.
            self._thread.join(1.0)

    def spoke(self) -> None:
        """Something was said."""
        self._last = self._clock()

    def look(self) -> None:
        """Speak if it is time."""
        if not self._is_looking.acquire(blocking=False):
            return
        try:
            now, works = self._clock(), self._works[-1:]
            if works and now - self._last >= self._interval:
                self._say(works[0].sign(now))
        finally:
            self._is_looking.release()

    def _beat(self, over: threading.Event) -> None:
        while not over.wait(min(1.0, max(0.05, self._interval / 5))):
            self.look()
