"""The run folder and the adapter in it: written whole, reopened and checked, or not there at all."""

from __future__ import annotations

import copy
import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerBase

from qlora_dist.config import ModelConfig, TrainConfig, dump_config, flatten, load_config
from qlora_dist.data.sources import Layout
from qlora_dist.errors import CheckpointError, ConfigError
from qlora_dist.model.files import read_json

ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
RECIPE = "qlora_dist.json"
"""Beside the adapter: what PEFT's own files do not say, see :class:`Recipe`."""


@dataclass(frozen=True)
class Recipe:
    """How an adapter was trained, as far as using it depends on it."""

    base: ModelConfig
    layout: Layout
    """Row layout of its training data: `generate` puts prompts into the same form."""


def check_run_folder(config: TrainConfig) -> Path:
    """Refuse an output folder that belongs to something else; creates nothing.

    A folder of the same configuration may be used again: its files are replaced.

    Raises:
        CheckpointError: the folder holds another run (with the differing settings), or files that are no run.
    """
    folder = Path(config.output_dir)
    if not folder.exists():
        _check_writable(folder)
        return folder
    if not folder.is_dir():
        raise CheckpointError(f"output_dir {folder} is a file. Give a folder for the run.")
    if not any(folder.iterdir()):
        return folder
    if not (folder / "config.yaml").is_file():
        some = ", ".join(sorted(p.name for p in folder.iterdir())[:3])
        raise CheckpointError(
            f"output_dir {folder} is not empty and holds no run (it has {some}). Give a new or empty folder."
        )
    try:
        previous = flatten(load_config(folder / "config.yaml"))
    except ConfigError as error:
        raise CheckpointError(
            f"output_dir {folder} holds a run whose config.yaml cannot be read: {error} Give another output_dir."
        ) from None
    differing = [
        f"{key}: {previous[key]!r} there, {value!r} now"
        for key, value in flatten(config).items()
        if previous[key] != value and key != "output_dir"
    ]
    if differing:
        raise CheckpointError(
            f"output_dir {folder} holds a different run ({'; '.join(differing[:5])}). "
            "Give another output_dir, or move that folder away."
        )
    return folder


def create_run_folder(folder: Path, config: TrainConfig) -> None:
    """Make the run folder and write the resolved configuration; called by rank 0 once all input is known to be good."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for stale in ("metrics.jsonl", "adapter", "tensorboard"):
            _remove(folder / stale)
        write_text(folder / "config.yaml", dump_config(config))
    except OSError as error:
        raise CheckpointError(
            f"output_dir {folder} cannot be written: {error}. Give a folder you may write to."
        ) from None


def save_adapter(
    folder: Path, model: PeftModel, tensors: dict[str, torch.Tensor], tokenizer: PreTrainedTokenizerBase, recipe: Recipe
) -> None:
    """Write the adapter in PEFT format, reopen it, compare every value, and only then put it in place.

    Args:
        folder: the final place; replaced as a whole.
        tensors: the whole adapter by parameter name, on the CPU.

    Raises:
        CheckpointError: a value is not finite, the disk refused it, or what was read back is not what was written.
    """
    weights = {_saved_name(name): tensor.contiguous() for name, tensor in tensors.items()}
    for name, tensor in weights.items():
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(
                f"the adapter holds values that are not finite in {name}, so it is not saved. Lower optim.lr or set "
                "optim.max_grad_norm."
            )
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        _remove(partial)
        partial.mkdir(parents=True)
        save_file(weights, partial / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        peft_config = copy.copy(model.peft_config["default"])
        peft_config.inference_mode = True  # as PEFT itself writes it
        peft_config.save_pretrained(str(partial))
        # safetensors writes files that only their owner may read; an adapter is as public as the files beside it.
        (partial / ADAPTER_WEIGHTS).chmod((partial / ADAPTER_CONFIG).stat().st_mode)
        tokenizer.save_pretrained(str(partial))
        write_text(partial / RECIPE, json.dumps(asdict(recipe), indent=2) + "\n")
        _verify(partial, weights)
        _remove(folder)
        os.replace(partial, folder)
    except OSError as error:
        raise CheckpointError(
            f"the adapter cannot be written to {folder}: {error}. Free some space or fix the folder's permissions."
        ) from None
    finally:
        _remove(partial)


def read_recipe(folder: Path) -> Recipe:
    """How the adapter in `folder` was trained; for an adapter from elsewhere, this program's defaults.

    Raises:
        CheckpointError: it is not an adapter folder, or names no base model.
    """
    if not folder.is_dir():
        raise CheckpointError(f"adapter folder {folder} does not exist. Give the adapter/ folder of a finished run.")
    for file in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (folder / file).is_file():
            nested = folder / "adapter"
            hint = f" Did you mean {nested}?" if (nested / ADAPTER_CONFIG).is_file() else ""
            raise CheckpointError(f"adapter folder {folder} has no {file}, so it is not a PEFT adapter.{hint}")
    base_path = read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
    if not base_path:
        raise CheckpointError(f"{folder / ADAPTER_CONFIG} names no base model (base_model_name_or_path). Add it there.")
    saved = read_json(folder / RECIPE) if (folder / RECIPE).is_file() else {}
    base = ModelConfig(**{**saved.get("base", {}), "path": str(base_path)})
    return Recipe(base, saved.get("layout", "messages"))


def write_text(path: Path, text: str) -> None:
    """Write a file so that it is either the old one or the whole new one, whatever happens meanwhile."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def _saved_name(name: str) -> str:
    """PEFT's file format leaves the adapter's name out: `...lora_A.default.weight` is saved as `...lora_A.weight`."""
    return name.replace(".default.", ".")


def _verify(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    try:
        reread = load_file(folder / ADAPTER_WEIGHTS)
    except SafetensorError as error:
        raise CheckpointError(f"the adapter just written to {folder} cannot be read back ({error}).") from None
    read_recipe(folder)
    for name, tensor in weights.items():
        if name not in reread or not torch.equal(reread[name], tensor):
            raise CheckpointError(f"{folder}: {name} was read back differently from what was written. Check the disk.")


def _check_writable(folder: Path) -> None:
    ancestor = folder.absolute()
    while not ancestor.exists():
        ancestor = ancestor.parent
    if not ancestor.is_dir() or not os.access(ancestor, os.W_OK):
        raise CheckpointError(f"output_dir {folder} cannot be made: {ancestor} is not a writable folder.")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
