"""The launcher of this process, and the end of a rank that has lost it.

Ranks have a session of their own, so nothing ends them when their launcher is killed: they would
train on for hours, unnoticed. Nobody could start the run again either, since they hold its folder.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from qlora_dist.errors import EXIT_RESUME
from qlora_dist.metrics import streams

GONE = "the launcher is gone"

_POLL_SECONDS = 0.5
_PATIENCE_SECONDS = 45.0
"""Time from the loss to the end of a rank that reaches no point where all agree to stop."""
_MARGIN_SECONDS = 5
"""Further time after which the kernel ends a process whose threads cannot run."""
_SIGNS = {"TORCHELASTIC_RUN_ID", "LOCAL_RANK", "ACCELERATE_MIXED_PRECISION"}
"""Variables set by torchrun, by other launchers, and by `accelerate launch` for one process."""
_NO_LAUNCHERS = {"sh", "bash", "dash", "zsh", "fish", "ksh", "csh", "tcsh", "ash", "busybox"}
_NO_LAUNCHERS |= {"sshd", "screen", "tmux: server", "init", "systemd"}
"""Parents of processes started by hand, with nohup or over ssh: they may end while the run goes on.
"""


class LauncherWatch:
    """Thread that notices the end of the process which started this one, and then ends this one.

    Args:
        poll_seconds: time between two looks.
        patience_seconds: time from the loss to the end of this process, unless :meth:`stand_down`
            is called before.
    """

    def __init__(
        self, poll_seconds: float = _POLL_SECONDS, patience_seconds: float = _PATIENCE_SECONDS
    ) -> None:
        self._parent = os.getppid()
        self._is_gone = _was_lost_before()
        self._poll_seconds, self._patience_seconds = poll_seconds, patience_seconds
        self._stood_down = threading.Event()
        self._last_words: Callable[[], None] | None = None
        threading.Thread(target=self._watch, name="launcher", daemon=True).start()

    @property
    def is_gone(self) -> bool:
        """True if the launcher has ended."""
        # The parent's id changes when the last thread of the parent ends. PR_SET_PDEATHSIG would
        # send its signal too early: when that one thread ends which started this process.
        self._is_gone = self._is_gone or os.getppid() != self._parent
        return self._is_gone

    def take_charge(self, last_words: Callable[[], None]) -> None:
        """Make a later loss wait for all ranks to stop together: now there is work to save.

        Args:
            last_words: called before this process is ended because the ranks did not stop in time.
        """
        self._last_words = last_words

    def stand_down(self) -> None:
        """Never end this process: all ranks have agreed to stop, or it ends by itself."""
        self._stood_down.set()

    def _watch(self) -> None:
        while not self.is_gone:
            if self._stood_down.wait(self._poll_seconds):
                return
        if self._last_words is not None:
            # While another thread holds the interpreter's lock, in a read that never returns, this
            # thread cannot act. The kernel can: SIGALRM has no handler, so it ends the process.
            signal.alarm(int(self._patience_seconds) + _MARGIN_SECONDS)
            if self._stood_down.wait(self._patience_seconds):
                signal.alarm(0)
                return
            self._last_words()
        if os.environ.get("LOCAL_RANK", "0") == "0":
            streams.write(sys.stderr, f"stopped ({GONE})\n")
        os._exit(EXIT_RESUME)


_watch: LauncherWatch | None = None


def watch_launcher() -> LauncherWatch | None:
    """Return the watch of this process, begun at the first call; None without a launcher."""
    global _watch
    if _watch is None and _has_launcher():
        _watch = LauncherWatch()
    return _watch


def is_lost_to(error: BaseException) -> bool:
    """True if the launcher's end caused an error: its store, or another rank, ended with it."""
    if _watch is None or not isinstance(error, RuntimeError):  # what torch.distributed raises
        return False
    # The launcher's connections end a little before the parent's id changes.
    deadline = time.monotonic() + 2 * _POLL_SECONDS
    while not _watch.is_gone and time.monotonic() < deadline:
        time.sleep(0.05)
    return _watch.is_gone


def _has_launcher() -> bool:
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return True
    is_one_of_several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if not is_one_of_several and _SIGNS.isdisjoint(os.environ):
        return False
    # A script may have set the variables by hand.
    return os.getppid() != 1 and _name(os.getppid()) not in _NO_LAUNCHERS


def _name(pid: int) -> str:
    """Return the name of a process's program; empty where there is no /proc."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text(encoding="utf-8").strip()
    return ""


def _was_lost_before() -> bool:
    """True if the launcher ended before its id could be read: nobody answers as its store."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return False
    # A launcher opens its store before it starts any rank.
    with suppress(OSError, KeyError, ValueError):
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        try:
            socket.create_connection(address, timeout=5).close()
        except ConnectionRefusedError:
            return True
    return False
