"""Files and folders that a crash leaves whole and on the disk, or absent; and JSON read back."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from qlora_dist.errors import QloraDistError


def write_text(path: Path, text: str) -> None:
    """Replace a file as a whole: after a crash it has its old content or all of the new one."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    sync_folder(path.parent)  # a rename is on the disk only once its folder is


@contextmanager
def whole_folder(final: Path, clear: Callable[[Path], None] | None = None) -> Iterator[Path]:
    """Yield an empty folder that becomes `final` when the body ends without an error.

    After an error in the body the new folder is removed, and `final` stays as it was.

    Args:
        clear: removes an old folder at `final`, once the new one is on the disk;
            :func:`remove` by default.
    """
    partial = final.with_name(f".{final.name}.partial")
    try:
        remove(partial)  # of a process that was killed
        partial.mkdir(parents=True)
        yield partial
        sync_tree(partial)
        (clear or remove)(final)
        os.replace(partial, final)
        sync_folder(final.parent)
    finally:
        with suppress(OSError):  # the error of the body, such as a full disk, says more
            remove(partial)


def read_json(file: Path, error: type[QloraDistError], label: str = "") -> dict[str, Any]:
    """Read a file that holds a JSON object.

    Args:
        error: raised when the file cannot be read or holds anything else.
        label: put before the file's name in the message.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as reason:
        raise error(f"{label}{file} is not readable JSON: {reason}.") from None
    if not isinstance(content, dict):
        raise error(f"{label}{file} must hold a JSON object.")
    return content


def sync_tree(folder: Path) -> None:
    """Bring every file below `folder`, and the names of all of them, to the disk."""
    for parent, _, files in os.walk(folder, topdown=False):
        for name in files:
            _sync(Path(parent) / name)
        sync_folder(Path(parent))


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk, where its file system supports that."""
    _sync(folder)


def remove(path: Path) -> None:
    """Delete a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():  # of a link only the link goes
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if not path.is_dir():  # some network file systems sync no folders
            raise
    finally:
        os.close(descriptor)
