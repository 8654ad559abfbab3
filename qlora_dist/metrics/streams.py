"""Output to a terminal or pipe that may be gone: lines that nobody can read must not end a run."""

from __future__ import annotations

import errno
import os
from typing import Any, TextIO, cast

_GONE = (errno.EPIPE, errno.EIO)
"""A pipe without a reader, a terminal that was closed."""


def write(stream: TextIO, text: str) -> None:
    """Write and flush; ignore an error of the operating system."""
    try:
        stream.write(text)
        stream.flush()
    except OSError as error:
        _redirect_to_null(stream, error)


def flush(stream: TextIO) -> None:
    """Flush; ignore an error of the operating system."""
    write(stream, "")


def lasting(stream: TextIO) -> TextIO:
    """Return the stream with writes and flushes that ignore errors of the operating system."""
    return cast(TextIO, _Lasting(stream))


class _Lasting:
    """A stream whose reader may go; every other attribute is the stream's own."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            _redirect_to_null(self._stream, error)
            return len(text)

    def flush(self) -> None:
        flush(self._stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _redirect_to_null(stream: TextIO, error: OSError) -> None:
    """Put /dev/null in the place of a stream whose reader is gone; leave it after other errors."""
    if error.errno not in _GONE:
        return  # such as a full disk: the next line may be written again
    try:
        descriptor = stream.fileno()
    except (OSError, ValueError, AttributeError):  # no file of the operating system
        return
    # The descriptor, not the object: libraries write there too, and the interpreter flushes it on
    # exit, where a broken pipe makes exit code 120.
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)
