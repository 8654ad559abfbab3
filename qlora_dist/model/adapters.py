"""LoRA adapters: peft's modules and file format, created on meta and initialized the same on any number of ranks."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel

from qlora_dist.config.saved_adapter import ADAPTER_WEIGHTS, BASE_KEEPING_INITS
from qlora_dist.config.schema import AdapterConfig
from qlora_dist.errors import CheckpointError, ConfigError
from qlora_dist.model.dora import DoraVariant
from qlora_dist.model.parts import adapter_parameters, lora_layers
from qlora_dist.runtime.shards import keep_local, whole_shape, whole_tensor


def add_adapters(model: PreTrainedModel, config: AdapterConfig, base_path: str) -> PeftModel:
    """Wrap the linear layers of a meta-device skeleton with empty LoRA adapters (float32, also on meta).

    Raises:
        ConfigError: an entry of `adapter.target_modules` names no linear layer of the model, or one that cannot learn.
    """
    targets = (
        config.target_modules
        if isinstance(config.target_modules, str)
        else list(config.target_modules)
    )
    if isinstance(targets, list):
        if config.path is None:  # an adapter that is continued may name more than this model has
            _check_all_named(model, targets)
        _check_head(model, targets)
    lora = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=targets,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        init_lora_weights=True if config.init == "default" else config.init,
        task_type="CAUSAL_LM",
    )
    try:
        peft_model = _wrap(model, lora)
    except ValueError as error:
        raise ConfigError(
            f"adapter.target_modules is {targets}, which peft refuses: {error}"
        ) from None
    lora.base_model_name_or_path = base_path
    return peft_model


def _check_all_named(model: PreTrainedModel, targets: list[str]) -> None:
    """Each entry must name linear layers: peft takes what it finds of a list, and leaves the rest out silently."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for target in targets:
        if not any(f".{name}".endswith(f".{target}") for name in names):
            kinds = sorted({name.rpartition(".")[2] for name in names})
            raise ConfigError(
                f"adapter.target_modules names {target}, which is no linear layer of {type(model).__name__}. "
                f"It has {', '.join(kinds)}; all-linear, which is not written as a list, takes all but the output head."
            )


def _check_head(model: PreTrainedModel, targets: list[str]) -> None:
    """None may be an output head whose weights are the embedding's."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is not embedding.weight:
        return
    name = next(name for name, module in model.named_modules() if module is head)
    for target in targets:
        if f".{name}".endswith(f".{target}"):
            raise ConfigError(
                f"adapter.target_modules names {target}, whose weights are those of the embedding "
                f"(tie_word_embeddings) in {type(model).__name__}: an adapter there would part the two. Remove it."
            )


def wrap_with_saved_adapter(model: PreTrainedModel, adapter_folder: Path) -> PeftModel:
    """Wrap a meta-device skeleton with adapters of the shapes that `adapter_folder` holds; values come later."""
    peft_config = PeftConfig.from_pretrained(str(adapter_folder))
    if not isinstance(peft_config, LoraConfig):
        raise CheckpointError(
            f"adapter folder {adapter_folder} holds an adapter of type {peft_config.peft_type}. Only LoRA is supported."
        )
    if peft_config.init_lora_weights not in BASE_KEEPING_INITS:
        raise CheckpointError(
            f"adapter folder {adapter_folder} was initialized with {peft_config.init_lora_weights!r}, which changes "
            "the base model. Save it converted to plain LoRA first."
        )
    targets = peft_config.target_modules or []
    try:
        _check_head(model, [] if isinstance(targets, str) else sorted(targets))
        return _wrap(model, peft_config)
    except (ValueError, ConfigError) as error:
        raise CheckpointError(
            f"adapter folder {adapter_folder} does not fit {type(model).__name__}: {error}"
        ) from None


def _wrap(model: PreTrainedModel, config: LoraConfig) -> PeftModel:
    """Put empty adapters on a meta-device model. `config` becomes that of the model."""
    use_dora, config.use_dora = (
        config.use_dora,
        False,
    )  # peft would take the lengths of rows that have no values yet
    peft_model = get_peft_model(model, config)
    config.use_dora = use_dora
    for layer in lora_layers(peft_model):
        # Autocast shall cast the small adapter matrices, instead of peft the large inputs: casting every input to
        # float32, the adapters' type, costs a quarter of the throughput.
        layer.cast_input_dtype_enabled = False
        if use_dora:
            DoraVariant.init(layer, "default")
    return peft_model


@torch.no_grad()
def load_adapter_weights(model: PeftModel, adapter_folder: Path) -> None:
    """Fill the adapters of a materialized model from a folder in PEFT format; each rank keeps its part.

    Raises:
        CheckpointError: see :func:`check_adapter_fits`.
    """
    check_adapter_fits(model, adapter_folder)
    with _saved_tensors(adapter_folder) as file:
        for name, param in _all_adapter_parameters(model).items():
            keep_local(param, file.get_tensor(saved_name(name)))


def check_adapter_fits(model: PeftModel, adapter_folder: Path) -> None:
    """Compare names and shapes of saved adapter tensors with those of a model, which may be on meta or in shards.

    Raises:
        CheckpointError: the folder lacks a tensor of the model, or holds one of another shape, or one the model has no
            place for.
    """
    with _saved_tensors(adapter_folder) as file:
        saved = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - no mapping
    here = {
        saved_name(name): tuple(whole_shape(param))
        for name, param in _all_adapter_parameters(model).items()
    }
    message = f"adapter folder {adapter_folder} does not fit its base model: "
    there, now = _adapted(saved), _adapted(here)
    if there != now:
        message += (
            f"it adapts {', '.join(there)}; adapter.target_modules asks for {', '.join(now)}."
        )
    elif saved.keys() != here.keys():
        missing, unknown = sorted(here.keys() - saved.keys()), sorted(saved.keys() - here.keys())
        message += (
            f"{len(missing)} tensors missing {missing[:2]}, {len(unknown)} unknown {unknown[:2]}."
        )
    elif differing := [name for name, shape in here.items() if shape != saved[name]]:
        name = differing[0]
        message += (
            f"{name} is {saved[name]}, but {here[name]} is needed (and {len(differing) - 1} more)."
        )
    else:
        return
    raise CheckpointError(message)


def saved_name(name: str) -> str:
    """PEFT's name in files for a parameter: `...lora_A.default.weight` without the adapter's name, `...lora_A.weight`,
    and `...lora_magnitude_vector.default.weight` without either."""
    return name.replace(".lora_magnitude_vector.default.weight", ".lora_magnitude_vector").replace(
        ".default.", "."
    )


def _saved_tensors(adapter_folder: Path) -> safe_open:
    try:
        return safe_open(adapter_folder / ADAPTER_WEIGHTS, framework="pt")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"adapter folder {adapter_folder}: {ADAPTER_WEIGHTS} cannot be read: {error}"
        ) from None


def _adapted(names: Iterable[str]) -> list[str]:
    """Kinds of layers that saved adapter tensors belong to, such as `q_proj`."""
    return sorted({name.partition(".lora_")[0].rpartition(".")[2] for name in names})


def _all_adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The adapters' parameters by name, also of a model that is not to be trained."""
    return {name: param for name, param in model.named_parameters() if ".lora_" in name}


def whole_adapter(model: nn.Module, is_wanted: bool = True) -> dict[str, torch.Tensor]:
    """All adapter tensors, whole, copied to the CPU, by parameter name; a collective.

    Args:
        is_wanted: whether this rank is to have them. The others only take part: a copy in host
            memory would be 3 GB a rank for a 65B model with adapters of rank 64.
    """
    whole = {}
    for name, param in adapter_parameters(model).items():
        tensor = whole_tensor(param)  # one at a time
        if is_wanted:
            whole[name] = tensor.to("cpu", copy=True)
    return whole


@torch.no_grad()
def init_adapters(
    model: nn.Module, seed: int, init: Literal["default", "gaussian"] = "default"
) -> None:
    """Set every A to random values and every B to zero, as peft does; magnitudes are left alone.

    A is Kaiming-uniform with a = sqrt(5), or with `gaussian` normal with standard deviation 1 / rank.

    Every matrix draws from a generator of its own, seeded by (seed, name): the values depend neither on the number of
    ranks, nor on which part of the matrix this rank holds, nor on the order of modules.
    """
    for name, param in adapter_parameters(model).items():
        if ".lora_magnitude_vector." in name:
            continue
        whole = torch.zeros(whole_shape(param), dtype=torch.float32)  # A is (rank, in_features)
        if ".lora_A." in name:
            # One number of 32 bits: torch's CPU generator silently ignores the higher bits of a seed.
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
            if init == "gaussian":
                nn.init.normal_(whole, std=1 / whole.shape[0], generator=generator)
            else:
                nn.init.kaiming_uniform_(whole, a=math.sqrt(5), generator=generator)
        keep_local(param, whole)
