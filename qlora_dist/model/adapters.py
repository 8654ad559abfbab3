"""LoRA adapters: peft's modules and file format, created on meta and initialised the same on any number of ranks."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, load_peft_weights, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel

from qlora_dist.config import AdapterConfig
from qlora_dist.errors import CheckpointError, ConfigError
from qlora_dist.model.shards import local_part, local_range, whole_shape


def add_adapters(model: PreTrainedModel, config: AdapterConfig, base_path: str) -> PeftModel:
    """Wrap the linear layers of a meta-device skeleton with empty LoRA adapters (float32, also on meta).

    Raises:
        ConfigError: `adapter.target_modules` names no linear layer of the model.
    """
    targets = config.target_modules if isinstance(config.target_modules, str) else list(config.target_modules)
    lora = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=targets,
        use_rslora=config.use_rslora,
        task_type="CAUSAL_LM",
    )
    try:
        peft_model = get_peft_model(model, lora)
    except ValueError as error:
        linear = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        raise ConfigError(
            f"adapter.target_modules is {targets}, which names no linear layer of {type(model).__name__}. "
            f"It has {', '.join(sorted(linear))}. ({error})"
        ) from None
    peft_model.peft_config["default"].base_model_name_or_path = base_path
    _cast_adapters_at_use(peft_model)
    return peft_model


def wrap_with_saved_adapter(model: PreTrainedModel, adapter_folder: Path) -> PeftModel:
    """Wrap a meta-device skeleton with adapters of the shapes that `adapter_folder` holds; values come later."""
    peft_config = PeftConfig.from_pretrained(str(adapter_folder))
    if not isinstance(peft_config, LoraConfig):
        raise CheckpointError(
            f"adapter folder {adapter_folder} holds an adapter of type {peft_config.peft_type}. Only LoRA is supported."
        )
    try:
        peft_model = get_peft_model(model, peft_config)
    except ValueError as error:
        raise CheckpointError(f"adapter folder {adapter_folder} does not fit {type(model).__name__}: {error}") from None
    _cast_adapters_at_use(peft_model)
    return peft_model


def load_adapter_weights(model: PeftModel, adapter_folder: Path) -> None:
    """Copy saved adapter tensors into a materialised, unsharded model.

    Raises:
        CheckpointError: the folder lacks a tensor of the model, or holds one the model has no place for.
    """
    try:
        result = set_peft_model_state_dict(model, load_peft_weights(str(adapter_folder), device="cpu"))
    except (RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"adapter folder {adapter_folder} does not fit its base model: {error}") from None
    missing = [key for key in result.missing_keys if ".lora_" in key]
    if missing or result.unexpected_keys:
        raise CheckpointError(
            f"adapter folder {adapter_folder} does not fit its base model: "
            f"{len(missing)} tensors missing {missing[:2]}, {len(result.unexpected_keys)} unknown "
            f"{result.unexpected_keys[:2]}."
        )


def _cast_adapters_at_use(model: PeftModel) -> None:
    """Let autocast cast the small adapter matrices, instead of peft the large inputs.

    peft casts every input to float32, the adapters' type, before the low-rank product: a quarter of the throughput.
    """
    for layer in lora_layers(model):
        layer.cast_input_dtype_enabled = False


def lora_layers(model: nn.Module) -> Iterator[LoraLayer]:
    """All modules of the model that carry an adapter, in forward order."""
    return (module for module in model.modules() if isinstance(module, LoraLayer))


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable parameters by name, in model order."""
    return {name: param for name, param in model.named_parameters() if param.requires_grad}


@torch.no_grad()
def init_adapters(model: nn.Module, seed: int) -> None:
    """Set A to Kaiming-uniform with a = sqrt(5), peft's default, and B to zero.

    Every matrix draws from a generator of its own, seeded by (seed, name): the values depend neither on the number of
    ranks, nor on which part of the matrix this rank holds, nor on the order of modules.
    """
    for name, param in adapter_parameters(model).items():
        whole = torch.zeros(whole_shape(param), dtype=torch.float32)
        if ".lora_A." in name:
            # One number of 32 bits: torch's CPU generator silently ignores the higher bits of a seed.
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
            nn.init.kaiming_uniform_(whole, a=math.sqrt(5), generator=generator)
        start, stop = local_range(param)
        local_part(param).view(-1).copy_(whole.view(-1)[start:stop])
