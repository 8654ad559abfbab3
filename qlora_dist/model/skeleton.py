"""The model as a description: every module in place on the meta device, 4-bit layers included, no weights read."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import torch
from accelerate import init_empty_weights
from peft import PeftModel
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import is_flash_attn_2_available, is_flash_attn_greater_or_equal

from qlora_dist.config import ModelConfig
from qlora_dist.errors import ConfigError, ModelError
from qlora_dist.model.cpu_attention import use_cpu_attention
from qlora_dist.model.nf4 import QuantFormat, QuantizedLinear
from qlora_dist.model.prequantized import is_prequantized, stored_formats
from qlora_dist.model.reader import SafetensorsReader

_FIRST_WITH_CAP = "2.6.0"
"""The first flash-attn that soft-caps scores."""
DTYPES = {
    "auto": torch.bfloat16,  # of a description that nobody computes with: 16 bits, whichever type is taken later
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}
"""By `model.dtype`."""


def num_embeddings(folder: Path, config: ModelConfig) -> int:
    """Rows of the model's embedding, as its configuration says.

    Raises:
        ModelError: transformers cannot read the configuration.
    """
    try:
        model_config = AutoConfig.from_pretrained(folder, trust_remote_code=config.trust_remote_code)
    except (ValueError, ImportError, KeyError) as error:
        raise ModelError(f"model.path {folder} cannot be built by transformers: {error}") from None
    return int(model_config.get_text_config().vocab_size)


def build_skeleton(folder: Path, config: ModelConfig) -> PreTrainedModel:
    """Build the causal language model of `folder` with its parameters on meta and its linear layers in 4 bits.

    Buffers (rotary frequencies and the like) are computed for real, since no checkpoint holds them.

    Raises:
        ModelError: the architecture is unknown, has no linear layers in its decoder layers, or is stored in a
            quantised form that cannot be trained.
        ConfigError: the folder holds 4-bit weights of another kind than `config` asks for, or the attention that it
            asks for would not compute what the model's does.
    """
    try:
        model_config = AutoConfig.from_pretrained(folder, trust_remote_code=config.trust_remote_code)
        formats = _stored_formats(folder, model_config, config)
        attention = _attention(config, model_config)
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(
                model_config, dtype=DTYPES[config.dtype], trust_remote_code=config.trust_remote_code, **attention
            )
    except (ValueError, ImportError, KeyError) as error:
        asked = "" if config.attention == "auto" else f" with model.attention {config.attention}"
        raise ModelError(f"model.path {folder} cannot be built by transformers{asked}: {error}") from None
    if config.attention == "auto" and config.dtype == "bfloat16" and not torch.cuda.is_available():
        use_cpu_attention(model)
    model.tie_weights()  # each parameter was put on meta by itself
    model.requires_grad_(False)
    layers = decoder_layers(model)
    fused = [name for layer in layers for name, param in layer.named_parameters() if param.ndim > 2]
    if fused:
        raise ModelError(
            f"model.path {folder}: {type(model).__name__} keeps fused experts or convolutions ({fused[0]} and "
            f"{len(fused) - 1} more) instead of nn.Linear layers. They would stay in 16 bits and get no adapters, so "
            "it is refused. Use a dense model, such as Llama, Mistral, Qwen, Gemma or Phi."
        )
    if not any(isinstance(module, nn.Linear) for layer in layers for module in layer.modules()):
        kinds = sorted({type(module).__name__ for layer in layers for module in layer.modules()})
        raise ModelError(
            f"model.path {folder}: {type(model).__name__} has no nn.Linear in its decoder layers "
            f"(it uses {', '.join(kinds[:6])}), so there is nothing to quantise and nowhere to put adapters. "
            "Use a model with nn.Linear projections, such as Llama, Mistral, Qwen, Gemma or Phi."
        )
    if formats is None and config.quantization != "none":
        fmt = QuantFormat(config.quantization, config.double_quant)
        formats = dict.fromkeys(linear_layers(model), fmt)
    if formats:
        quantize_skeleton(model, formats, DTYPES[config.dtype])
    return model


def linear_layers(model: PreTrainedModel) -> list[str]:
    """Names of the linear layers that are kept in 4 bits, as transformers chooses them by default.

    All but the output head, and what the architecture wants in float32 (some routers and gates).
    """
    head = model.get_output_embeddings()
    kept = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    return [
        name
        for name, module in model.named_modules()
        if type(module) is nn.Linear and module is not head and not kept & set(name.split("."))
    ]


def quantize_skeleton(model: PreTrainedModel, formats: Mapping[str, QuantFormat], dtype: torch.dtype) -> None:
    """Replace linear layers by empty 4-bit ones; names in `formats` that are no linear layers are left alone."""
    for name, module in list(model.named_modules()):
        if name in formats and type(module) is nn.Linear:
            quantized = QuantizedLinear(
                module.in_features, module.out_features, module.bias is not None, formats[name], dtype
            )
            model.set_submodule(name, quantized)
    # peft asks the model, not the layer, whether it may find 4-bit layers.
    model.is_loaded_in_4bit = True


def _attention(config: ModelConfig, model_config: PreTrainedConfig) -> dict[str, str]:
    """The implementation to ask for; none leaves it to the model, which takes SDPA if it can.

    On a GPU with the package flash-attn, its kernels: they are the ones that skip what packed samples must not see,
    where SDPA computes it and masks it out. They know 16-bit types only. SDPA does not know soft-capped scores (Gemma
    2), and in some versions of transformers (5.17) leaves the cap out without a word.
    """
    cap = getattr(model_config.get_text_config(), "attn_logit_softcapping", None)
    if config.attention == "sdpa" and cap is not None:
        raise ConfigError(
            f"model.attention is sdpa, which cannot soft-cap attention scores (attn_logit_softcapping is {cap:g} in "
            "this model). Use auto, eager or flash_attention_2."
        )
    if config.attention != "auto":
        return {"attn_implementation": config.attention}
    is_usable = is_flash_attn_2_available() and flash_attention_problem() is None
    has_kernels = is_usable and (cap is None or is_flash_attn_greater_or_equal(_FIRST_WITH_CAP))
    if torch.cuda.is_available() and has_kernels and config.dtype != "float32" and _takes_flash(model_config):
        return {"attn_implementation": "flash_attention_2"}
    return {} if cap is None else {"attn_implementation": "eager"}


@cache
def flash_attention_problem() -> str | None:
    """Why the installed package flash-attn cannot be used; None if it can, or is not installed.

    transformers asks its metadata only. One that was built for another version of torch is there,
    and fails when it is imported ("undefined symbol").
    """
    if find_spec("flash_attn") is None:
        return None
    try:
        import_module("flash_attn")
    except Exception as error:  # noqa: BLE001 - whatever it is, the run can do without the package
        return f"{type(error).__name__}: {error}"
    return None


def _takes_flash(model_config: PreTrainedConfig) -> bool:
    """Whether transformers' class of the model runs with flash-attn; of code shipped with a model nobody knows."""
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(model_config), None)
    return getattr(model_class, "_supports_flash_attn", False) is True


def _stored_formats(folder: Path, model_config: PreTrainedConfig, config: ModelConfig) -> dict[str, QuantFormat] | None:
    """Formats of the layers that the folder holds in 4 bits; None for an ordinary model."""
    if not is_prequantized(folder, getattr(model_config, "quantization_config", None)):
        return None
    # The model is built like any other: from here on the layers know what they are, and nothing asks the config.
    del model_config.quantization_config
    with SafetensorsReader(folder) as reader:
        return stored_formats(reader, config)


def base_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model, without what peft wrapped around it."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The transformer blocks in forward order: the unit of sharding and of recomputation.

    Raises:
        ModelError: the model has no list of blocks.
    """
    base = base_model(model)
    block_names = set(getattr(base, "_no_split_modules", None) or ())
    blocks = [module for module in base.modules() if type(module).__name__.removeprefix("FSDP") in block_names]
    if not blocks:
        lists = [module for module in base.modules() if isinstance(module, nn.ModuleList)]
        blocks = max((list(modules) for modules in lists), key=len, default=[])
    if not blocks:
        raise ModelError(f"{type(base).__name__} has no list of decoder layers, so it cannot be trained here.")
    return blocks
