"""End of a process that hangs, with the stacks of its threads."""

# Tested by tests/distributed/test_failing_ranks.py.

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time

from qlora_dist.metrics import streams
from qlora_dist.run.failure import EXIT_CRASH, tell_launcher


class Watchdog:
    """Thread that ends this process when :meth:`feed` was not called for `timeout_seconds`.

    When one process of a run hangs, the others wait for it in a collective, so the watchdogs of all
    processes end them. Each prints the stacks of its threads: the process whose stack is in no
    collective is the culprit.
    """

    def __init__(self, timeout_seconds: float, rank: int) -> None:
        self._timeout = timeout_seconds
        self._rank = rank
        self._last = time.monotonic()  # not the wall clock, which can jump
        self._closed = threading.Event()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def feed(self) -> None:
        """Start the time anew: there was progress."""
        self._last = time.monotonic()

    def close(self) -> None:
        """End the watch."""
        self._closed.set()

    def _watch(self) -> None:
        while (silence := time.monotonic() - self._last) < self._timeout:
            if self._closed.wait(self._timeout - silence):
                return
        message = (
            f"[rank {self._rank}] no progress for {self._timeout:g} seconds "
            "(parallel.hang_timeout_seconds). The stacks of all ranks show where each one waits; "
            "the one that is in no collective is what the others wait for. The same command goes "
            "on from the last checkpoint."
        )
        streams.write(sys.stderr, f"error: {message}\n")
        faulthandler.dump_traceback(all_threads=True)
        tell_launcher(message)
        os._exit(EXIT_CRASH)
