"""Checkpoints: adapter, optimizer and position of a run, complete and verified, or not there.

    checkpoints/step-00000020/
        adapter/                  in PEFT format, usable as it is
        optimizer.safetensors     Adam's moments, whole, by parameter
        state.json                position, and what the checkpoint belongs to
        COMPLETE                  written last: size and SHA-256 of every file

Tensors are whole and named by parameter, so that any backend on any number of ranks can go on from them.
"""

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
from torch import nn

from qlora_dist.atomic import remove, sync_folder, whole_folder, write_text
from qlora_dist.config.saved_adapter import ADAPTER_WEIGHTS
from qlora_dist.errors import CheckpointError
from qlora_dist.model.adapters import adapter_parameters, saved_name
from qlora_dist.run.state import RunIdentity, TrainState
from qlora_dist.runtime.processes import Runtime
from qlora_dist.runtime.shards import local_part, local_range, whole_shape

FORMAT_VERSION = 2
_READABLE_VERSIONS = (1, 2)
"""Version 1 holds the 8-bit state of optimizers at greater length, see `moments.py`."""
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
            is_same_run: other settings are refused as well.

        Raises:
            CheckpointError: with what differs.
        """
        differences = self.identity.differences(now, is_same_run)
        if differences:
            raise CheckpointError(
                f"checkpoint {self.path} cannot be continued: {'; '.join(differences[:5])}. "
                "Restore what it was made with, or give another output_dir and checkpoint.resume: never."
            )

    @torch.no_grad()
    def load_adapter(self, model: nn.Module) -> None:
        """Copy this rank's parts of the saved adapter into the model."""
        with safe_open(self.path / "adapter" / ADAPTER_WEIGHTS, framework="pt") as file:
            for name, param in adapter_parameters(model).items():
                first, stop = local_range(param)
                local_part(param).view(-1).copy_(
                    file.get_tensor(saved_name(name)).view(-1)[first:stop]
                )

    def optimizer_tensors(self) -> Mapping[str, torch.Tensor]:
        """The saved moments by name; each is read when it is asked for."""
        return _LazyTensors(self.path / _OPTIMIZER)


class _LazyTensors(Mapping[str, torch.Tensor]):
    """The tensors of a safetensors file, mapped into memory."""

    def __init__(self, path: Path) -> None:
        self._file = safe_open(path, framework="pt").__enter__()
        self._names = list(self._file.keys())

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@dataclass
class Checkpoints:
    """Writes the checkpoints of a run, behind the training loop's back.

    Tensors are gathered by all ranks before; what is left is file work, in a thread of rank 0. An error there is raised
    at the next call.
    """

    folder: Path
    """`checkpoints/` of the run."""
    keep: int
    """Newest checkpoints to keep besides the best."""
    identity: RunIdentity
    runtime: Runtime
    backend: str
    write_adapter: Callable[[Path, dict[str, torch.Tensor]], None]
    """Writes an adapter folder from whole tensors."""
    _written: set[int] = field(default_factory=set, init=False)
    _thread: threading.Thread | None = field(default=None, init=False)
    _error: BaseException | None = field(default=None, init=False)

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step is."""
        return step_folder(self.folder, step)

    def mark_written(self, step: int) -> None:
        """There is a checkpoint of this step already: the one that the run goes on from."""
        self._written.add(step)

    def has(self, step: int) -> bool:
        """Whether the checkpoint of a step is written, or being written; the same on every rank."""
        return step in self._written

    def write(
        self,
        state: TrainState,
        adapter: dict[str, torch.Tensor],
        optimizer: dict[str, torch.Tensor],
        is_trial: bool,
    ) -> None:
        """Begin to write a checkpoint of `state`; waits for the one before.

        Args:
            is_trial: only shows that checkpoints can be written; the next regular one replaces it.
        """
        self.wait()
        self._written.add(state.step)
        if not self.runtime.is_main:
            return
        arguments = (replace(state), adapter, optimizer, is_trial)
        self._thread = threading.Thread(
            target=self._write_caught, args=arguments, name="checkpoint"
        )
        self._thread.start()

    def wait(self) -> None:
        """Return when nothing is being written any more.

        Raises:
            CheckpointError: what went wrong meanwhile.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.poll()

    def poll(self) -> None:
        """Raise what went wrong so far, without waiting."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _write_caught(self, *arguments: Any) -> None:
        try:
            self._write(*arguments)
        except (OSError, SafetensorError) as error:
            self._error = CheckpointError(
                f"the checkpoint cannot be written to {self.folder}: {error}. Free some space or fix the folder's "
                "permissions, and start the same command again: it goes on from the last complete checkpoint."
            )
        except Exception as error:  # noqa: BLE001 - raised again by the training thread
            self._error = error

    def _write(
        self,
        state: TrainState,
        adapter: dict[str, torch.Tensor],
        optimizer: dict[str, torch.Tensor],
        is_trial: bool,
    ) -> None:
        path = self.path(state.step)
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
        write_text(path / _COMPLETE, json.dumps(manifest, indent=2) + "\n")
        sync_folder(self.folder)

    def _rotate(self, state: TrainState) -> None:
        """Keep the newest and the best; a trial goes as soon as there is another."""
        steps = complete_steps(self.folder)
        regular = [step for step in steps if step == state.step or not _is_trial(self.folder, step)]
        keep = set(regular[-self.keep :]) | {state.best_step}
        for step in steps:
            if step not in keep:
                _delete(self.path(step))


def step_folder(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step is."""
    return folder / f"step-{step:08d}"


def complete_steps(folder: Path) -> list[int]:
    """Steps that have a complete checkpoint, ascending. Names decide, not the clock."""
    if not folder.is_dir():
        return []
    names = [
        re.fullmatch(r"step-(\d{8,})", path.name)
        for path in folder.iterdir()
        if (path / _COMPLETE).is_file()
    ]
    return sorted(int(match[1]) for match in names if match)


def clean_up(folder: Path) -> None:
    """Remove what a run that died left half-written."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.name.endswith(".partial") or (
            path.name.startswith("step-") and not (path / _COMPLETE).is_file()
        ):
            remove(path)


def choose_checkpoint(
    run_folder: Path, resume: str, runtime: Runtime, log: Callable[[str], None]
) -> Checkpoint | None:
    """The checkpoint that a run goes on from, the same on every rank; a collective.

    Args:
        resume: `checkpoint.resume`. A path is where a new run begins; once it has checkpoints of its own, the newest of
            these.

    Raises:
        CheckpointError: there is something to go on from, but it cannot be used.
    """
    chosen: str | None = None
    if runtime.is_main and resume != "never":
        clean_up(run_folder / "checkpoints")
        found = newest_checkpoint(run_folder / "checkpoints", log)
        if found is None and resume != "auto":
            found = read_checkpoint(Path(resume))
        chosen = None if found is None else str(found.path)
    chosen = runtime.from_main(chosen)
    return None if chosen is None else read_checkpoint(Path(chosen), verify=False)


def newest_checkpoint(folder: Path, log: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint whose every byte is as it was written; None when there is none at all.

    Args:
        say: is told of checkpoints that are passed over.

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
    """Read one checkpoint, and verify every byte of it unless another rank has.

    Raises:
        CheckpointError: it is not there, not complete, of another format, or not as it was written.
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
                f"checkpoint {path} has format version {content['format_version']}, this program reads "
                f"{' and '.join(map(str, _READABLE_VERSIONS))}."
            )
        return Checkpoint(
            path,
            TrainState(**content["state"]),
            RunIdentity(**content["identity"]),
            content["world_size"],
            content["backend"],
        )
    except FileNotFoundError as error:
        raise CheckpointError(
            f"checkpoint {path} is not complete: {Path(error.filename).name} is missing."
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"checkpoint {path} cannot be read: {error!r}.") from None


def adapter_shapes(model: nn.Module) -> dict[str, str]:
    """Shapes of the adapter's tensors, such as `16x4096`, by their saved names."""
    return {
        saved_name(name): "x".join(map(str, whole_shape(param)))
        for name, param in adapter_parameters(model).items()
    }


def _is_trial(folder: Path, step: int) -> bool:
    return bool(
        json.loads((step_folder(folder, step) / _STATE).read_text(encoding="utf-8"))["is_trial"]
    )


def _delete(path: Path) -> None:
    """Remove a checkpoint so that it is never seen half-removed."""
    (path / _COMPLETE).unlink(missing_ok=True)
    remove(path)


def _verify_tensors(path: Path, expected: dict[str, torch.Tensor]) -> None:
    reread = _LazyTensors(path)
    for name, tensor in expected.items():
        if not torch.equal(
            reread[name].view(torch.uint8), tensor.view(torch.uint8)
        ):  # bytes: a NaN equals itself
            raise CheckpointError(
                f"{path}: {name} was read back differently from what was written. Check the disk."
            )


def _manifest(folder: Path) -> dict[str, dict[str, Any]]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in files
    }


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(2**20):
            digest.update(piece)
    return digest.hexdigest()
