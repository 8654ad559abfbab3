"""The folder of a run: its owner, its lock, and files of an earlier run in it."""

from __future__ import annotations

import fcntl
import json
import os
import socket
from contextlib import suppress
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

from qlora_dist.atomic import remove, write_text
from qlora_dist.config.load import dump_config, load_config
from qlora_dist.config.schema import TrainConfig, flatten
from qlora_dist.errors import CheckpointError, ConfigError
from qlora_dist.run.checkpoint import read_checkpoint

STOP = "STOP"
"""File by which a user or a batch script asks the run to stop; the run removes it when it does."""
STOPPED = "STOPPED"
"""File that a run leaves when it stopped before its end and can go on; its first line says why."""
_LOCK = ".lock"
_WITHOUT_A_RUN = {STOP, STOPPED, _LOCK}
"""Files that do not make a folder the folder of a run: they may come before its first own file."""

_CUTS = ("optim.micro_batch_size", "optim.grad_accum_steps")
_CHANGEABLE = ("output_dir", "parallel.", "memory.", "checkpoint.", "eval.", "logging.", *_CUTS)
"""Settings, or sections, that may change within a run: they only decide how it is computed and what
is recorded."""


def check_run_folder(config: TrainConfig) -> Path:
    """Refuse an output folder that belongs to something else; create nothing.

    Raises:
        CheckpointError: the folder holds another run (with the differing settings), or files that
            are no run.
    """
    folder = Path(config.output_dir)
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"output_dir {folder} is a file. Give a folder for the run.")
    _check_writable(folder)
    there = set(os.listdir(folder) if folder.exists() else ()) - _WITHOUT_A_RUN
    if not there:
        return folder
    if "config.yaml" not in there:
        raise CheckpointError(
            f"output_dir {folder} is not empty and holds no run (it has "
            f"{', '.join(sorted(there)[:3])}). Give a new or empty folder."
        )
    try:
        previous = identity(load_config(folder / "config.yaml"))
    except ConfigError as error:
        raise CheckpointError(
            f"output_dir {folder} holds a run whose config.yaml cannot be read: {error} "
            "Give another output_dir."
        ) from None
    differing = [
        f"{key}: {previous[key]!r} there, {value!r} now"
        for key, value in identity(config).items()
        # config.yaml has the type that `auto` stood for, and the date of the first start.
        if previous[key] != value and (key, value) not in _SETTLED_AT_START
    ]
    if differing:
        raise CheckpointError(
            f"output_dir {folder} holds a different run ({'; '.join(differing[:5])}). "
            "Give another output_dir, or move that folder away."
        )
    return folder


_SETTLED_AT_START = (("model.dtype", "auto"), ("data.template_date", None))


def date_of_run(config: TrainConfig, folder: Path) -> str | None:
    """Return the `data.template_date` to use: that of the run's first start if it goes on.

    None for a run that began without one: its templates are told the present date.
    """
    if config.data.template_date is not None:
        return config.data.template_date
    has_begun, began_with = _began_with(config, folder, "data.template_date")
    return began_with if has_begun else datetime.now().isoformat(timespec="seconds")


def dtype_of_run(config: TrainConfig, folder: Path) -> tuple[str, bool]:
    """Return the `model.dtype` to use, and True if a run that goes on began with it.

    A run keeps its compute type on any machine: `auto` then stands for the type that it began with.
    """
    asked = config.model.dtype
    began_with = _began_with(config, folder, "model.dtype")[1]
    if began_with is None or asked not in ("auto", began_with):
        return asked, False
    return began_with, True


def _began_with(config: TrainConfig, folder: Path, key: str) -> tuple[bool, Any]:
    """Return true if a run goes on, and the value of a setting with which it began."""
    if config.checkpoint.resume != "never" and (folder / "config.yaml").is_file():
        return True, flatten(load_config(folder / "config.yaml"))[key]
    if config.checkpoint.resume not in ("auto", "never"):
        with suppress(CheckpointError):  # refused later, when the checkpoint is loaded
            saved = read_checkpoint(Path(config.checkpoint.resume), verify=False)
            return True, saved.identity.settings.get(key)
    return False, None


def identity(config: TrainConfig) -> dict[str, Any]:
    """Return the settings that tell one run from another, as plain data."""
    settings = flatten(config).items()
    # Checkpoints made before a mapping was a setting have None for it.
    kept = {
        key: None if value == {} else value
        for key, value in settings
        if not key.startswith(_CHANGEABLE)
    }
    # As a checkpoint's JSON gives them back: a tuple never equals the list that it becomes there.
    plain: dict[str, Any] = json.loads(json.dumps(kept, default=asdict))
    return plain


class RunLock:
    """Lock that keeps every other process from using a run's folder; for rank 0.

    The operating system holds the lock, not the file: the file of a dead run blocks nobody.
    """

    def __init__(self, folder: Path) -> None:
        self._file = folder / _LOCK
        self._descriptor: int | None = None

    def acquire(self) -> None:
        """Lock the folder, which must exist, unless this object has done so.

        Raises:
            CheckpointError: another process holds the lock.
        """
        if self._descriptor is not None:
            return
        descriptor = os.open(self._file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(descriptor, 200).decode(errors="replace")
            os.close(descriptor)
            raise CheckpointError(
                f"output_dir {self._file.parent} is in use by another run"
                f"{f' ({owner})' if owner else ''}. "
                "Wait for it, stop it, or give another output_dir."
            ) from None
        except OSError:  # a file system without locks: better to train unguarded than not at all
            os.close(descriptor)
            return
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
        self._descriptor = descriptor

    def release(self) -> None:
        """Unlock the folder; the end of the process does so as well."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def create_run_folder(
    folder: Path, config: TrainConfig, resumed_step: int | None, lock: RunLock
) -> None:
    """Make the run folder and write the resolved configuration; for rank 0, with good input.

    Args:
        resumed_step: step after which the run goes on; None when it starts from nothing: then the
            files of an earlier run are removed.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
        if resumed_step is None:
            for stale in ("metrics.jsonl", "adapter", "tensorboard", "checkpoints"):
                remove(folder / stale)
        else:
            _keep_metrics_until(folder, resumed_step)
        remove(folder / STOPPED)
        write_text(folder / "config.yaml", dump_config(config))
    except OSError as error:
        raise CheckpointError(
            f"output_dir {folder} cannot be written: {error}. Give a folder you may write to."
        ) from None


def mark_stopped(folder: Path, reason: str) -> None:
    """Write the reason why the run stopped before its end into its folder."""
    # For scripts around a launcher, which hides the exit code 75 of its processes.
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / STOPPED, f"{reason}\n")
    remove(folder / STOP)


def _keep_metrics_until(folder: Path, step: int) -> None:
    """Drop the rows of metrics.jsonl after `step`, which will be computed again."""
    file = folder / "metrics.jsonl"
    if not file.is_file():
        return
    kept = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:  # the last row, cut off when the run was killed
            continue
        if row["step"] <= step:
            kept.append(line + "\n")
    write_text(file, "".join(kept))


def _check_writable(folder: Path) -> None:
    """Refuse a folder that cannot be written, or cannot be made in its nearest existing parent."""
    ancestor = folder.absolute()
    while not ancestor.exists():
        ancestor = ancestor.parent
    # root passes `access` everywhere but on a read-only file system.
    if not ancestor.is_dir() or not os.access(ancestor, os.W_OK):
        raise CheckpointError(
            f"output_dir {folder} cannot be used: {ancestor} is not a writable folder."
        )
