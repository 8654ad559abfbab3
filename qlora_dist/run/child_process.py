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
"""For a command that was asked to end; a launcher gives its ranks 30."""
_PR_SET_PDEATHSIG = 1


def run_child(
    command: Sequence[str],
    patience_seconds: float = _PATIENCE_SECONDS,
    output: TextIO | None = None,
) -> tuple[int, int | None]:
    """Run a command to its end; returns its exit code, and the signal that this process was told to end by, if any.

    SIGINT, SIGTERM and SIGHUP are passed on, and the command is waited for. When this process is killed the command
    gets SIGTERM (on Linux). Only for the main thread.

    Args:
        patience_seconds: from such a signal to SIGKILL.
        output: a file for what it says; None: where this process speaks.
    """
    # A session of its own: Ctrl-C at a terminal reaches the command through this process alone. A launcher that is told
    # twice leaves its ranks behind.
    process = subprocess.Popen(
        command,
        start_new_session=True,
        preexec_fn=_dying_with(os.getpid()),
        stdout=output,
        stderr=output,
    )
    received: list[int] = []
    killer = threading.Timer(patience_seconds, process.kill)
    killer.daemon = True

    def pass_on(number: int, frame: FrameType | None) -> None:
        if not received:
            killer.start()
            process.send_signal(number)
        received.append(number)

    previous = {
        number: signal.signal(number, pass_on) for number in _SIGNALS if not _is_ignored(number)
    }
    try:
        code = process.wait()
    finally:
        killer.cancel()
        for number, handler in previous.items():
            signal.signal(number, handler)
    return code, received[0] if received else None


def _is_ignored(number: int) -> bool:
    return signal.getsignal(number) is signal.SIG_IGN  # nohup


def _dying_with(parent: int) -> Callable[[], None] | None:
    """What the new process does before it becomes the command."""
    if not sys.platform.startswith("linux"):
        return None
    prctl = ctypes.CDLL(
        None
    ).prctl  # found here: between fork and exec as little as possible may happen

    def die_with_parent() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # which has ended already
            os._exit(1)

    return die_with_parent
