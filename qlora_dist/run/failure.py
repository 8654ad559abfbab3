"""End of a failing run: one process reports the reason, to its launcher too; others stay silent."""

# Tested by tests/distributed/test_failing_ranks.py.

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path

from qlora_dist.errors import EXIT_RESUME, EXIT_USER_ERROR, PeerError, QloraDistError
from qlora_dist.metrics import streams
from qlora_dist.run.launcher import GONE, is_lost_to

EXIT_CRASH = 1

_PATIENCE_SECONDS = 10.0
"""Wait of a process with nothing to report: a launcher ends all others as soon as one has ended."""


def exit_code_after(error: Exception) -> int:
    """Report `error` unless another process of the run did; return this process's exit code.

    When one process fails, the others soon fail too, in the collective where they waited for it.
    Only the first error is the cause.
    """
    if isinstance(error, PeerError):
        _let_others_speak()
        return _exit_code(error.error)
    if is_lost_to(error):  # after a run's last checkpoint, or before there was anything to save
        streams.write(sys.stderr, f"{_rank_prefix()}stopped ({GONE}): {type(error).__name__}\n")
        return EXIT_RESUME
    is_user_error = isinstance(error, QloraDistError)
    if _is_first_to_fail():
        streams.flush(sys.stdout)
        report = f"error: {_rank_prefix()}{error}\n" if is_user_error else _crash_report(error)
        streams.write(sys.stderr, report)
        tell_launcher(str(error) if is_user_error else f"{type(error).__name__}: {error}")
    return _exit_code(error)


def _exit_code(error: Exception) -> int:
    return EXIT_USER_ERROR if isinstance(error, QloraDistError) else EXIT_CRASH


def _is_first_to_fail() -> bool:
    """True in the process that is to report: the first to fail, as the shared store counts it."""
    if "torch.distributed" in sys.modules:
        from torch import distributed as dist

        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            try:
                return dist.distributed_c10d._get_default_store().add("qlora_dist/failures", 1) == 1
            except RuntimeError:  # the store ended with the process that held it
                return True
    # Before there is a store every process of a node meets the same mistake: the first reports.
    if os.environ.get("LOCAL_RANK", "0") == "0":
        return True
    _let_others_speak()
    return False


def _let_others_speak() -> None:
    # SIGTERM now comes from the launcher, after the report of another rank: it shall end the wait.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(_PATIENCE_SECONDS)


def _crash_report(error: Exception) -> str:
    prefix = _rank_prefix()
    if "Connection closed by peer" in str(error) or "Connection reset by peer" in str(error):
        return (
            f"error: {prefix}another process of this run ended without a word while this one "
            "waited for it. The launcher's report below names it and its signal (SIGKILL: often "
            "the system was out of memory).\n"
        )
    lines = "".join(traceback.format_exception(error))
    return "".join(f"{prefix}{line}\n" for line in lines.rstrip().splitlines())


def _rank_prefix() -> str:
    return f"[rank {os.environ['RANK']}] " if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""


def tell_launcher(message: str) -> None:
    """Write the message for torchrun and accelerate, which print it as the root cause."""
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        # The form of torch.distributed.elastic.multiprocessing.errors.ErrorHandler.
        details = {"py_callstack": message, "timestamp": str(int(time.time()))}
        text = json.dumps({"message": {"message": message, "extraInfo": details}})
        with suppress(OSError):  # the launcher removes the file's folder when it ends
            Path(file).write_text(text, encoding="utf-8")
