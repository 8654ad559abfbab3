"""LoRA adapters: peft's modules and file format, with initial values that no rank count changes."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from qlora_dist.config.saved_adapter import ADAPTER_WEIGHTS, BASE_KEEPING_INITS
from qlora_dist.config.schema import AdapterConfig
from qlora_dist.errors import CheckpointError, ConfigError
from qlora_dist.model.dora import DoraVariant
from qlora_dist.model.experts import expert_stacks, stacks_as_parameters, use_stack_adapters
from qlora_dist.model.linear_layers import linear_layers
from qlora_dist.model.parts import adapter_parameters, lora_layers
from qlora_dist.model.text_reach import left_out_towers
from qlora_dist.runtime.shards import keep_local, whole_shape, whole_tensor


def add_adapters(model: PreTrainedModel, config: AdapterConfig, base_path: str) -> PeftModel:
    """Wrap the linear layers of a meta-device skeleton with empty LoRA adapters (float32 on meta).

    Raises:
        ConfigError: an entry of `adapter.target_modules` names no linear layer of the model, or
            an output head that shares its weights with the embedding.
    """
    asked = config.target_modules
    stacks = known = sorted({".".join(name.split(".")[-2:]) for name in expert_stacks(model)})
    if asked == "all-linear":
        targets = linear_layers(model)  # peft shortens the list where it can
    elif asked == "attention-only":
        targets, stacks = _in_attention(model), []
    else:
        targets = list(asked)
        stacks = [name for name in stacks if name in targets]
        targets = [name for name in targets if name not in stacks]
        if config.path is None:  # an adapter that is continued may name more than this model has
            _check_all_named(model, targets)
        _check_head(model, targets)
        if left_out_towers(model):
            # By whole names: layers of a tower have the same short ones.
            names = _linear_names(model)
            targets = [
                name
                for name in names
                if f".{name}".endswith(tuple(f".{target}" for target in targets))
            ]
    _check_stacks(config, stacks)
    if mistaken := mistaken_for_experts(model, targets) if known else []:
        targets = [name for name in targets if name not in mistaken]
        if asked != "all-linear":
            raise ConfigError(
                f"adapter.target_modules names {', '.join(mistaken)}, which peft takes for layers "
                f"of experts in {type(model).__name__}. Name the experts' own: {', '.join(known)}."
            )
    lora = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=targets,
        target_parameters=stacks or None,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        init_lora_weights=True if config.init == "default" else config.init,
        task_type="CAUSAL_LM",
    )
    try:
        peft_model = _wrap(model, lora)
    except ValueError as error:
        problem = f"adapter.target_modules is {asked}, which peft refuses: {error}"
        raise ConfigError(problem) from None
    lora.base_model_name_or_path = base_path
    return peft_model


def _in_attention(model: PreTrainedModel) -> list[str]:
    """Return the names of the linear layers of attention.

    Raises:
        ConfigError: there are none.
    """
    kinds = {name: type(module).__name__.lower() for name, module in model.named_modules()}
    inside = tuple(
        f"{name}." for name, kind in kinds.items() if "attention" in kind or "attn" in kind
    )
    if targets := [name for name in linear_layers(model) if name.startswith(inside)]:
        return targets
    raise ConfigError(
        f"adapter.target_modules is attention-only, but no linear layer of {type(model).__name__} "
        "is part of an attention module. Name the layers, or set all-linear."
    )


def mistaken_for_experts(model: PreTrainedModel, targets: list[str]) -> list[str]:
    """Return the names of ordinary layers that peft would turn into names of stacks of experts.

    It reads older adapters so, whose experts were modules: the name of a dense layer's MLP then
    means the experts of other layers.
    """

    def is_mistaken(target: str) -> bool:
        config = LoraConfig(target_modules=[target])
        try:
            convert_peft_config_for_transformers(config, model, None)
        except ValueError:  # one of several that make a stack
            return True
        return target not in (config.target_modules or ())

    return sorted(filter(is_mistaken, targets))


def _check_stacks(config: AdapterConfig, stacks: list[str]) -> None:
    """Refuse settings that peft's adapters on stacks of experts do not know."""
    for key, is_set in (("dropout", config.dropout > 0), ("use_dora", config.use_dora)):
        if stacks and is_set:
            raise ConfigError(
                f"adapter.{key} is {getattr(config, key)}, which adapters on experts "
                f"({', '.join(stacks)}) cannot have in peft. Set it to "
                f"{'0' if key == 'dropout' else 'false'}, or name the layers to adapt in "
                "adapter.target_modules."
            )


def _check_all_named(model: PreTrainedModel, targets: list[str]) -> None:
    """Refuse a list with an entry that names no linear layer; peft would ignore the entry."""
    names = _linear_names(model)
    for target in targets:
        if not any(f".{name}".endswith(f".{target}") for name in names):
            kinds = sorted({name.rpartition(".")[2] for name in names})
            raise ConfigError(
                f"adapter.target_modules names {target}, which is no linear layer of "
                f"{type(model).__name__}. It has {', '.join(kinds)}; all-linear, which is not "
                "written as a list, takes all but the output head."
            )


def _linear_names(model: PreTrainedModel) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def _check_head(model: PreTrainedModel, targets: list[str]) -> None:
    """Refuse a list that names an output head whose weights are the embedding's."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is not embedding.weight:
        return
    name = next(name for name, module in model.named_modules() if module is head)
    for target in targets:
        if f".{name}".endswith(f".{target}"):
            raise ConfigError(
                f"adapter.target_modules names {target}, whose weights are those of the embedding "
                f"(tie_word_embeddings) in {type(model).__name__}: an adapter there would part the "
                "two. Remove it."
            )


def wrap_with_saved_adapter(model: PreTrainedModel, adapter_folder: Path) -> PeftModel:
    """Wrap a meta-device skeleton with empty adapters of the shapes that a folder holds.

    Raises:
        CheckpointError: the adapter is not LoRA, belongs to a changed base, or does not fit.
    """
    peft_config = PeftConfig.from_pretrained(str(adapter_folder))
    if not isinstance(peft_config, LoraConfig):
        raise CheckpointError(
            f"adapter folder {adapter_folder} holds an adapter of type {peft_config.peft_type}. "
            "Only LoRA is supported."
        )
    if peft_config.init_lora_weights not in BASE_KEEPING_INITS:
        raise CheckpointError(
            f"adapter folder {adapter_folder} was initialized with "
            f"{peft_config.init_lora_weights!r}, which changes the base model. "
            "Save it converted to plain LoRA first."
        )
    targets = peft_config.target_modules or []
    try:
        _check_head(model, [] if isinstance(targets, str) else sorted(targets))
        return _wrap(model, peft_config)
    except (ValueError, ConfigError) as error:
        name = type(model).__name__
        problem = f"adapter folder {adapter_folder} does not fit {name}: {error}"
        raise CheckpointError(problem) from None


def _wrap(model: PreTrainedModel, config: LoraConfig) -> PeftModel:
    """Put empty adapters on a meta-device model, whose adapter settings `config` becomes."""
    # For DoRA, peft would take the lengths of rows that have no values yet.
    use_dora, config.use_dora = config.use_dora, False
    with stacks_as_parameters(model):
        peft_model = get_peft_model(model, config, low_cpu_mem_usage=True)
    use_stack_adapters(peft_model)
    config.use_dora = use_dora
    for layer in lora_layers(peft_model):
        # Autocast casts the small adapter matrices. With its own cast, peft would turn every large
        # input into float32, the adapters' type, which costs a quarter of the throughput.
        layer.cast_input_dtype_enabled = False
        if use_dora:
            DoraVariant.init(layer, "default")
    return peft_model


@torch.no_grad()
def load_adapter_weights(model: PeftModel, adapter_folder: Path) -> None:
    """Fill the adapters of a materialized model from a PEFT folder; each rank keeps its part.

    Raises:
        CheckpointError: see :func:`check_adapter_fits`.
    """
    check_adapter_fits(model, adapter_folder)
    with _saved_tensors(adapter_folder) as file:
        for name, param in _all_adapter_parameters(model).items():
            keep_local(param, file.get_tensor(saved_name(name)))


def check_adapter_fits(model: PeftModel, adapter_folder: Path) -> None:
    """Compare names and shapes of saved adapter tensors with a model's, on meta or in shards.

    Raises:
        CheckpointError: the folder lacks a tensor of the model, holds a tensor of a different
            shape, or holds a tensor that the model has no place for.
    """
    with _saved_tensors(adapter_folder) as file:
        names = file.keys()  # the only way to list them: the file is no mapping
        saved = {name: tuple(file.get_slice(name).get_shape()) for name in names}
    params = _all_adapter_parameters(model)
    here = {saved_name(name): tuple(whole_shape(param)) for name, param in params.items()}
    there, now = _adapted(saved), _adapted(here)
    missing, unknown = sorted(here.keys() - saved.keys()), sorted(saved.keys() - here.keys())
    differing = [name for name, shape in here.items() if shape != saved.get(name)]
    if there != now:
        what = f"it adapts {', '.join(there)}; adapter.target_modules asks for {', '.join(now)}."
    elif missing or unknown:
        what = (
            f"{len(missing)} tensors missing {missing[:2]}, {len(unknown)} unknown {unknown[:2]}."
        )
    elif differing:
        name, others = differing[0], len(differing) - 1
        what = f"{name} is {saved[name]}, but {here[name]} is needed (and {others} more)."
    else:
        return
    raise CheckpointError(f"adapter folder {adapter_folder} does not fit its base model: {what}")


def saved_name(name: str) -> str:
    """Return the name of a parameter in PEFT's files.

    PEFT drops the adapter's name, and `weight` too for a magnitude: `...lora_A.default.weight` is
    `...lora_A.weight`, `...lora_magnitude_vector.default.weight` is `...lora_magnitude_vector`.
    """
    name = name.replace(".lora_magnitude_vector.default.weight", ".lora_magnitude_vector")
    return name.replace(".default.", ".")


def _saved_tensors(adapter_folder: Path) -> safe_open:
    try:
        return safe_open(adapter_folder / ADAPTER_WEIGHTS, framework="pt")
    except (OSError, SafetensorError) as error:
        problem = f"adapter folder {adapter_folder}: {ADAPTER_WEIGHTS} cannot be read: {error}"
        raise CheckpointError(problem) from None


def _adapted(names: Iterable[str]) -> list[str]:
    """Kinds of layers that saved adapter tensors belong to, such as `q_proj`."""
    return sorted({name.partition(".lora_")[0].rpartition(".")[2] for name in names})


def _all_adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The adapters' parameters by name, frozen ones included."""
    return {name: param for name, param in model.named_parameters() if ".lora_" in name}


def whole_adapter(model: nn.Module, is_wanted: bool = True) -> dict[str, Tensor]:
    """Gather all adapter tensors whole on the CPU, by parameter name; a collective.

    Args:
        is_wanted: True if this rank gets the tensors. Other ranks only take part and get an empty
            dictionary: a copy for a 65B model with adapters of rank 64 takes 3 GB of host memory.
    """
    whole = {}
    for name, param in adapter_parameters(model).items():
        tensor = whole_tensor(param)  # one at a time on the device, on all ranks in the same order
        if is_wanted:
            whole[name] = tensor.to("cpu", copy=True)
    return whole


@torch.no_grad()
def init_adapters(
    model: nn.Module, seed: int, init: Literal["default", "gaussian"] = "default"
) -> None:
    """Set every A to random values and every B to zero, as peft does; leave magnitudes alone.

    A is Kaiming-uniform with a = sqrt(5), or with `gaussian` normal with standard deviation
    1 / rank. Each matrix draws from its own generator, seeded by (seed, name). So its values depend
    neither on the number of ranks, nor on the part that this rank holds, nor on the order of
    modules.
    """
    for name, param in adapter_parameters(model).items():
        if ".lora_magnitude_vector." in name:
            continue
        whole = torch.zeros(whole_shape(param), dtype=torch.float32)  # A is (rank, in_features)
        if ".lora_A." in name:
            # A 32-bit seed: torch's CPU generator silently ignores the higher bits.
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
            if init == "gaussian":
                nn.init.normal_(whole, std=1 / whole.shape[0], generator=generator)
            else:
                nn.init.kaiming_uniform_(whole, a=math.sqrt(5), generator=generator)
        keep_local(param, whole)
