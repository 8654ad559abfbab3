"""Checkpoints: adapter, optimizer and position of a run, complete and verified, or absent.

    checkpoints/step-00000020/
        adapter/                  in PEFT format, usable as it is
        optimizer.safetensors     Adam's moments, whole, by parameter
        state.json                position, and identity of the run
        COMPLETE                  written last: size and SHA-256 of every file

Tensors are whole and named by parameter, so that any backend on any number of ranks can continue.
"""

# Tested by tests/distributed/test_interrupted_runs.py and tests/distributed/test_resume.py.

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from qlora_dist.atomic import remove, sync_folder, whole_folder, write_text
from qlora_dist.config.saved_adapter import ADAPTER_WEIGHTS
from qlora_dist.errors import CheckpointError
from qlora_dist.model.adapters import adapter_parameters, saved_name
from qlora_dist.run.state import RunIdentity, TrainState
from qlora_dist.runtime.processes import Runtime
from qlora_dist.runtime.shards import keep_local, whole_shape

FORMAT_VERSION = 2
_READABLE_VERSIONS = (1, 2)
"""Version 1 has float32 values beside the optimizer's 8-bit state, see `moments.py`."""
_COMPLETE = "COMPLETE"
_STATE = "state.json"
_OPTIMIZER = "optimizer.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    path: Path
    state: TrainState
    identity: RunIdentity
    world_size: int
    backend: str

    def check(self, now: RunIdentity, is_same_run: bool) -> None:
        """Refuse to go on with another base model, other data or another adapter.

        Args:
            is_same_run: refuse other settings as well.

        Raises:
            CheckpointError: with the differences.
        """
        differences = self.identity.differences(now, is_same_run)
        if differences:
            raise CheckpointError(
                f"checkpoint {self.path} cannot be continued: {'; '.join(differences[:5])}. "
                "Restore what it was made with, or give another output_dir and "
                "checkpoint.resume: never."
            )

    @torch.no_grad()
    def load_adapter(self, model: nn.Module) -> None:
        """Copy this rank's parts of the saved adapter into the model."""
        with safe_open(self.path / "adapter" / ADAPTER_WEIGHTS, framework="pt") as file:
            for name, param in adapter_parameters(model).items():
                keep_local(param, file.get_tensor(saved_name(name)))

    def optimizer_tensors(self) -> Mapping[str, Tensor]:
        """Return the saved moments by name; a tensor is read when it is looked up."""
        return _LazyTensors(self.path / _OPTIMIZER)


class _LazyTensors(Mapping[str, Tensor]):
    """Tensors of a safetensors file, mapped into memory."""

    def __init__(self, path: Path) -> None:
        self._file = safe_open(path, framework="pt").__enter__()  # open as long as this object
        self._names = list(self._file.keys())

    def __getitem__(self, name: str) -> Tensor:
        return self._file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@dataclass
class Checkpoints:
    """Writer of a run's checkpoints, in a thread of rank 0 beside the training loop.

    All ranks gather the tensors before; the thread has only files to write. An error in it is
    raised by the next call of :meth:`write`, :meth:`wait` or :meth:`poll`.
    """

    folder: Path
    """`checkpoints/` of the run."""
    keep: int
    """Newest checkpoints to keep besides the best."""
    identity: RunIdentity
    runtime: Runtime
    backend: str
    write_adapter: Callable[[Path, dict[str, Tensor]], None]
    """Function that writes an adapter folder from whole tensors."""
    _written: set[int] = field(default_factory=set, init=False)
    _thread: threading.Thread | None = field(default=None, init=False)
    _error: BaseException | None = field(default=None, init=False)

    def path(self, step: int) -> Path:
        """Return the folder of a step's checkpoint."""
        return step_folder(self.folder, step)

    def mark_written(self, step: int) -> None:
        """Take note of a step's checkpoint on disk: the run goes on from it."""
        self._written.add(step)

    def has(self, step: int) -> bool:
        """True if the checkpoint of a step is written, or being written; alike on all ranks."""
        return step in self._written

    def write(
        self,
        state: TrainState,
        adapter: dict[str, Tensor],
        optimizer: dict[str, Tensor],
        is_trial: bool,
    ) -> None:
        """Begin to write a checkpoint of `state`, once the previous one is written.

        Args:
            is_trial: only proves that checkpoints can be written; the next one replaces it.
        """
        self.wait()
        self._written.add(state.step)
        if self.runtime.is_main:
            # A copy of the state: training goes on counting in the original.
            work = (replace(state), adapter, optimizer, is_trial)
            self._thread = threading.Thread(target=self._write_caught, args=work, name="checkpoint")
            self._thread.start()

    def wait(self) -> None:
        """Wait until the current checkpoint is written.

        Raises:
            CheckpointError: the checkpoint could not be written.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.poll()

    def poll(self) -> None:
        """Raise the error of the writing thread, if there was one, without waiting."""
        if self._error is not None:
            error, self._error = self._error, None  # raise it once
            raise error

    def _write_caught(self, *arguments: Any) -> None:
        """Write a checkpoint; keep its error for the training thread."""
        try:
            self._write(*arguments)
        except (OSError, SafetensorError) as error:
            self._error = CheckpointError(
                f"the checkpoint cannot be written to {self.folder}: {error}. Free some space or "
                "fix the folder's permissions, and start the same command again: it goes on from "
                "the last complete checkpoint."
            )
        except Exception as error:  # noqa: BLE001 - raised again by the training thread
            self._error = error

    def _write(
        self,
        state: TrainState,
        adapter: dict[str, Tensor],
        optimizer: dict[str, Tensor],
        is_trial: bool,
    ) -> None:
        path = self.path(state.step)
        # An earlier folder of this step, such as a trial's, stays until the new one is on the disk.
        with whole_folder(path, clear=_delete) as partial:
            self.write_adapter(partial / "adapter", adapter)
            save_file(optimizer, partial / _OPTIMIZER)
            content = {
                "format_version": FORMAT_VERSION,
                "world_size": self.runtime.world_size,
                "backend": self.backend,
                "is_trial": is_trial,
                "state": asdict(state),
                "identity": asdict(self.identity),
            }
            write_text(partial / _STATE, json.dumps(content, indent=2) + "\n")
            _verify_tensors(partial / _OPTIMIZER, optimizer)
            manifest = _manifest(partial)
        self._mark_complete(path, manifest)
        self._rotate(state)

    def _mark_complete(self, path: Path, manifest: dict[str, dict[str, Any]]) -> None:
        """Write the mark that makes a checkpoint count, after everything else is on the disk."""
        write_text(path / _COMPLETE, json.dumps(manifest, indent=2) + "\n")
        sync_folder(self.folder)

    def _rotate(self, state: TrainState) -> None:
        """Delete all checkpoints but the `keep` newest and the best; earlier trials go as well."""
        steps = complete_steps(self.folder)
        regular = [step for step in steps if step == state.step or not _is_trial(self.folder, step)]
        keep = set(regular[-self.keep :]) | {state.best_step}
        for step in steps:
            if step not in keep:
                _delete(self.path(step))


def step_folder(folder: Path, step: int) -> Path:
    """Return the folder of a step's checkpoint below `checkpoints/`."""
    return folder / f"step-{step:08d}"


def complete_steps(folder: Path) -> list[int]:
    """Return the steps that have a complete checkpoint, ascending."""
    # The names decide on the order, not the times: a copied folder keeps its names.
    complete = folder.glob(f"step-*/{_COMPLETE}")
    names = [re.fullmatch(r"step-(\d{8,})", file.parent.name) for file in complete]
    return sorted(int(match[1]) for match in names if match)


def clean_up(folder: Path) -> None:
    """Remove checkpoints that a run which died left half-written or half-deleted."""
    for path in [*folder.glob("*.partial"), *folder.glob("step-*")]:
        if not (path / _COMPLETE).is_file():
            remove(path)


def choose_checkpoint(
    run_folder: Path, resume: str, runtime: Runtime, log: Callable[[str], None]
) -> Checkpoint | None:
    """Choose the checkpoint that a run goes on from, alike on all ranks; a collective.

    Args:
        resume: `checkpoint.resume`. A path counts only until the run has a checkpoint of its own.

    Raises:
        CheckpointError: there is something to go on from, but it cannot be used.
    """
    found = None
    if runtime.is_main and resume != "never":
        clean_up(run_folder / "checkpoints")
        found = newest_checkpoint(run_folder / "checkpoints", log)
        if found is None and resume != "auto":
            found = read_checkpoint(Path(resume))
    path = runtime.from_main(None if found is None else found.path)
    # Rank 0 has verified every byte; all ranks read the small files themselves.
    return None if path is None else read_checkpoint(path, verify=False)


def newest_checkpoint(folder: Path, log: Callable[[str], None]) -> Checkpoint | None:
    """Return the newest checkpoint whose bytes are all as written; None if there are none at all.

    Args:
        log: called with a line about each checkpoint that is passed over.

    Raises:
        CheckpointError: there are complete checkpoints, but none of them can be read any more.
    """
    steps = complete_steps(folder)
    problem = ""
    for step in reversed(steps):
        try:
            return read_checkpoint(step_folder(folder, step))
        except CheckpointError as error:
            problem = str(error)
            log(f"{error} Passing it over.")
    if steps:
        raise CheckpointError(
            f"none of the {len(steps)} checkpoints in {folder} can be used; the oldest: {problem} "
            "checkpoint.resume: never starts over."
        )
    return None


def read_checkpoint(path: Path, verify: bool = True) -> Checkpoint:
    """Read one checkpoint.

    Args:
        verify: compare size and SHA-256 of every file with the manifest.

    Raises:
        CheckpointError: the checkpoint is missing, incomplete, of another format, or changed.
    """
    try:
        manifest = json.loads((path / _COMPLETE).read_text(encoding="utf-8"))
        content = json.loads((path / _STATE).read_text(encoding="utf-8"))
        for name, expected in manifest.items() if verify else ():
            size = (path / name).stat().st_size
            if size != expected["bytes"]:
                raise CheckpointError(
                    f"checkpoint {path}: {name} has {size} bytes instead of {expected['bytes']}."
                )
            if _sha256(path / name) != expected["sha256"]:
                raise CheckpointError(
                    f"checkpoint {path}: {name} is not what was written (its SHA-256 differs)."
                )
        if content["format_version"] not in _READABLE_VERSIONS:
            raise CheckpointError(
                f"checkpoint {path} has format version {content['format_version']}, this program "
                f"reads {' and '.join(map(str, _READABLE_VERSIONS))}."
            )
        state, run = TrainState(**content["state"]), RunIdentity(**content["identity"])
        return Checkpoint(path, state, run, content["world_size"], content["backend"])
    except FileNotFoundError as error:
        raise CheckpointError(
            f"checkpoint {path} is not complete: {Path(error.filename).name} is missing."
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"checkpoint {path} cannot be read: {error!r}.") from None


def adapter_shapes(model: nn.Module) -> dict[str, str]:
    """Return the shapes of the adapter's tensors, such as `16x4096`, by their saved names."""
    return {
        saved_name(name): "x".join(map(str, whole_shape(param)))
        for name, param in adapter_parameters(model).items()
    }


def _is_trial(folder: Path, step: int) -> bool:
    text = (step_folder(folder, step) / _STATE).read_text(encoding="utf-8")
    return bool(json.loads(text)["is_trial"])


def _delete(path: Path) -> None:
    """Remove a checkpoint; first its mark, so that a half-removed one never counts as complete."""
    (path / _COMPLETE).unlink(missing_ok=True)
    remove(path)


def _verify_tensors(path: Path, expected: dict[str, Tensor]) -> None:
    """Refuse a file whose tensors are not, byte for byte, the expected ones."""
    reread, as_bytes = _LazyTensors(path), torch.uint8  # as bytes a NaN equals itself
    for name, tensor in expected.items():
        if not torch.equal(reread[name].view(as_bytes), tensor.view(as_bytes)):
            raise CheckpointError(
                f"{path}: {name} was read back differently from what was written. Check the disk."
            )


def _manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """Return size and SHA-256 of every file below `folder`, by its path in it."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in files
    }


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
