"""Words to a terminal or a pipe that may be gone: what nobody can read any more must not end a run."""

from __future__ import annotations

import errno
import os
from typing import Any, TextIO, cast

_GONE = (errno.EPIPE, errno.EIO)
"""A pipe without a reader, a terminal that was closed."""


def write(stream: TextIO, text: str) -> None:
    """Write and flush; a failure is not raised."""
    try:
        stream.write(text)
        stream.flush()
    except OSError as error:
        _lead_nowhere(stream, error)


def flush(stream: TextIO) -> None:
    """Flush; a failure is not raised."""
    write(stream, "")


def lasting(stream: TextIO) -> TextIO:
    """The stream, with writes and flushes that do not raise."""
    return cast(TextIO, _Lasting(stream))


class _Lasting:
    """A stream whose reader may go; all else is as it was."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            _lead_nowhere(self._stream, error)
            return len(text)

    def flush(self) -> None:
        flush(self._stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _lead_nowhere(stream: TextIO, error: OSError) -> None:
    """Put /dev/null in the place of what is gone, for all that write there after us: libraries, and the interpreter,
    which otherwise makes exit code 120 of what it cannot flush. After other errors, as of a full disk, the next line
    may be written again."""
    if error.errno not in _GONE:
        return
    try:
        descriptor = stream.fileno()
    except (OSError, ValueError, AttributeError):  # no file of the operating system
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)
