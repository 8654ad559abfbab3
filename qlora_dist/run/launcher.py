"""The launcher of this process, and the end of a rank that has lost it.

Ranks have a session of their own, so nothing ends them when their launcher is killed: they would train on for hours,
seen by nobody. Nobody could start the run again either, since they hold its folder.
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
"""From the loss to the latest end, for a rank that reaches no place where all agree to stop."""
_MARGIN_SECONDS = 5
"""After which the kernel ends a process whose threads cannot."""
_SIGNS = ("TORCHELASTIC_RUN_ID", "LOCAL_RANK", "ACCELERATE_MIXED_PRECISION")
"""Variables that a launcher sets: torchrun and `accelerate launch`, others, `accelerate launch` for one process."""
_NO_LAUNCHERS = {
    "sh",
    "bash",
    "dash",
    "zsh",
    "fish",
    "ksh",
    "csh",
    "tcsh",
    "ash",
    "busybox",
    "sshd",
    "screen",
    "tmux: server",
    "init",
    "systemd",
}
"""Parents of processes that were started by hand, with nohup or over ssh: they may go while the run stays."""


class LauncherWatch:
    """Notices that the process which started this one is gone.

    The parent's id tells: it changes when the parent's last thread ends, whoever adopts its children. A signal at the
    parent's death (`PR_SET_PDEATHSIG`) would come when the thread ends that started this process.

    Args:
        poll_seconds: between two looks.
        patience_seconds: from the loss to the end of this process, unless :meth:`stand_down` comes before.
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
        """Whether the launcher has ended."""
        self._is_gone = self._is_gone or os.getppid() != self._parent
        return self._is_gone

    def take_charge(self, last_words: Callable[[], None]) -> None:
        """From now on there is something to save: after a loss, wait for all ranks to stop together.

        Args:
            last_words: called before this process is ended because that did not happen in time.
        """
        self._last_words = last_words

    def stand_down(self) -> None:
        """All ranks have agreed to stop, or this one ends by itself: do not end it meanwhile."""
        self._stood_down.set()

    def _watch(self) -> None:
        while not self.is_gone:
            if self._stood_down.wait(self._poll_seconds):
                return
        if self._last_words is not None:
            # A thread cannot act while another one holds the interpreter's lock, in a read that never returns. The
            # kernel can: nobody handles this signal.
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
    """The watch of this process, begun at the first call; None when no launcher started it."""
    global _watch
    if _watch is None and _has_launcher():
        _watch = LauncherWatch()
    return _watch


def is_lost_to(error: BaseException) -> bool:
    """Whether an error came of the launcher's end: the store in its process, or another rank, was gone with it."""
    if _watch is None or not isinstance(error, RuntimeError):  # what torch.distributed raises
        return False
    deadline = (
        time.monotonic() + 2 * _POLL_SECONDS
    )  # its connections end before the parent's id changes
    while not _watch.is_gone and time.monotonic() < deadline:
        time.sleep(0.05)
    return _watch.is_gone


def _has_launcher() -> bool:
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return True
    is_marked = int(os.environ.get("WORLD_SIZE", "1")) > 1 or any(
        sign in os.environ for sign in _SIGNS
    )
    return is_marked and os.getppid() != 1 and _name(os.getppid()) not in _NO_LAUNCHERS


def _name(pid: int) -> str:
    with suppress(OSError):  # no Linux
        return Path(f"/proc/{pid}/comm").read_text(encoding="utf-8").strip()
    return ""


def _was_lost_before() -> bool:
    """Whether the launcher ended before its id could be read: its store, which is there before any rank, is not."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return False
    try:
        socket.create_connection(
            (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])), timeout=5
        ).close()
    except ConnectionRefusedError:
        return True
    except (OSError, KeyError, ValueError):
        return False
    return False
