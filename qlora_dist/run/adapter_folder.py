"""The adapter as users get it: a PEFT folder that is written whole and verified, or absent."""

from __future__ import annotations

import copy
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from qlora_dist.atomic import read_json, whole_folder, write_text
from qlora_dist.config.saved_adapter import (
    ADAPTER_CONFIG,
    ADAPTER_RECORD,
    ADAPTER_WEIGHTS,
    check_adapter_files,
)
from qlora_dist.config.schema import ModelConfig
from qlora_dist.data.messages import PromptLayout
from qlora_dist.errors import CheckpointError, ModelError
from qlora_dist.model.adapters import saved_name


@dataclass(frozen=True)
class AdapterRecord:
    """Facts about an adapter's training that its use depends on."""

    base: ModelConfig
    layout: PromptLayout
    """Form in which the model saw its training data, and in which `generate` writes prompts."""
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Variables that the chat template was given, and that `generate` gives it."""
    base_fingerprint: str = ""
    """Fingerprint of the base model's files; empty if it is not known."""


def save_adapter(
    folder: Path,
    model: PeftModel,
    tensors: dict[str, Tensor],
    tokenizer: PreTrainedTokenizerBase,
    recipe: AdapterRecord,
) -> None:
    """Write the adapter in PEFT format, reopen it, compare every value, then put it in place.

    Args:
        folder: the final place; replaced as a whole.
        tensors: the whole adapter by parameter name, on the CPU.

    Raises:
        CheckpointError: a value is not finite, the disk refused it, or a value read back differs
            from the one written.
    """
    weights = {saved_name(name): tensor.contiguous() for name, tensor in tensors.items()}
    for name, tensor in weights.items():
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(
                f"the adapter holds values that are not finite in {name}, so it is not saved. "
                "Lower optim.lr or set optim.max_grad_norm."
            )
    try:
        with whole_folder(folder) as partial:
            save_file(weights, partial / ADAPTER_WEIGHTS, metadata={"format": "pt"})
            peft_config = copy.copy(model.peft_config["default"])
            peft_config.inference_mode = True  # as PEFT itself writes it
            peft_config.save_pretrained(str(partial))
            # safetensors writes files that only their owner may read: copy the mode of another.
            (partial / ADAPTER_WEIGHTS).chmod((partial / ADAPTER_CONFIG).stat().st_mode)
            tokenizer.save_pretrained(str(partial))
            write_text(partial / ADAPTER_RECORD, json.dumps(asdict(recipe), indent=2) + "\n")
            _verify(partial, weights)
    except (OSError, SafetensorError) as error:  # safetensors wraps the OSErrors of its writing
        raise CheckpointError(
            f"the adapter cannot be written to {folder}: {error}. "
            "Free some space or fix the folder's permissions."
        ) from None


def read_adapter_record(folder: Path) -> AdapterRecord:
    """Read how the adapter in `folder` was trained.

    An adapter from another program has no record; it gets the defaults of this program.

    Raises:
        CheckpointError: `folder` is not an adapter folder, or names no base model.
    """
    if not folder.is_dir():
        raise CheckpointError(
            f"adapter folder {folder} does not exist. Give the adapter/ folder of a finished run."
        )
    check_adapter_files(folder, f"adapter folder {folder}", CheckpointError)
    base_path = read_json(folder / ADAPTER_CONFIG, ModelError).get("base_model_name_or_path")
    if not base_path:
        raise CheckpointError(
            f"{folder / ADAPTER_CONFIG} names no base model (base_model_name_or_path). "
            "Add it there."
        )
    record = folder / ADAPTER_RECORD
    saved = read_json(record, ModelError) if record.is_file() else {}
    # PEFT's file decides on the path: users edit it when the base model has moved.
    base = ModelConfig(**{**saved.get("base", {}), "path": str(base_path)})
    layout, variables = saved.get("layout", "messages"), saved.get("template_kwargs") or {}
    return AdapterRecord(base, layout, variables, saved.get("base_fingerprint", ""))


def recorded_base(folder: Path) -> str:
    """Fingerprint of the base model that the adapter in `folder` was trained on; empty if unknown.

    Raises:
        CheckpointError: the record cannot be read.
    """
    record = folder / ADAPTER_RECORD
    if not record.is_file():
        return ""
    return str(read_json(record, CheckpointError).get("base_fingerprint", ""))


def _verify(folder: Path, weights: dict[str, Tensor]) -> None:
    """Refuse a folder that does not read back as the adapter that was written."""
    try:
        reread = load_file(folder / ADAPTER_WEIGHTS)
    except SafetensorError as error:
        raise CheckpointError(
            f"the adapter just written to {folder} cannot be read back ({error})."
        ) from None
    read_adapter_record(folder)
    for name, tensor in weights.items():
        if name not in reread or not torch.equal(reread[name], tensor):
            raise CheckpointError(
                f"{folder}: {name} was read back differently from what was written. Check the disk."
            )
