"""A command that lives no longer than the process that started it."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from types import FrameType
from typing import TextIO

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_PATIENCE_SECONDS = 40.0
"""Time for a command that was asked to end; a launcher gives its ranks 30 s."""
_PR_SET_PDEATHSIG = 1  # of linux/prctl.h


def run_child(
    command: Sequence[str],
    patience_seconds: float = _PATIENCE_SECONDS,
    output: TextIO | None = None,
) -> tuple[int, int | None]:
    """Run a command to its end, and pass on SIGINT, SIGTERM and SIGHUP to it.

    When this process is killed the command gets SIGTERM (on Linux). Only for the main thread.

    Args:
        patience_seconds: time from a signal that is passed on to SIGKILL.
        output: file for stdout and stderr of the command; None: those of this process.

    Returns:
        Exit code of the command, and the first signal that this process received, if any.
    """
    die = _dying_with(os.getpid())
    # A session of its own: Ctrl-C at a terminal reaches the command through this process alone. A
    # launcher that gets it twice leaves its ranks behind.
    process = subprocess.Popen(
        command, start_new_session=True, preexec_fn=die, stdout=output, stderr=output
    )
    received: list[int] = []
    killer = threading.Timer(patience_seconds, process.kill)
    killer.daemon = True

    def pass_on(number: int, frame: FrameType | None) -> None:
        if not received:
            killer.start()
            process.send_signal(number)
        received.append(number)

    # An ignored signal, as under nohup, stays ignored.
    heard = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    previous = {number: signal.signal(number, pass_on) for number in heard}
    try:
        code = process.wait()
    finally:
        killer.cancel()
        for number, handler in previous.items():
            signal.signal(number, handler)
    return code, received[0] if received else None


def _dying_with(parent: int) -> Callable[[], None] | None:
    """Return a function that ties a new process to `parent` before it becomes the command."""
    if not sys.platform.startswith("linux"):
        return None
    prctl = ctypes.CDLL(None).prctl  # looked up here: little is safe between fork and exec

    def die_with_parent() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it has ended before prctl was called
            os._exit(1)

    return die_with_parent
