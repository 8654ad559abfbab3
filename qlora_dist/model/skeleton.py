"""The model as a description: every module in place on the meta device, 4-bit layers included, no weights read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
)

from qlora_dist.config.schema import ModelConfig
from qlora_dist.errors import ModelError
from qlora_dist.model.attention import attention_arguments
from qlora_dist.model.cpu.attention import use_cpu_attention
from qlora_dist.model.nf4 import QuantFormat, QuantizedLinear
from qlora_dist.model.parts import decoder_layers, linear_layers
from qlora_dist.weights.prequantized import _stored_formats

DTYPES = {
    "auto": torch.bfloat16,  # of a description that nobody computes with: 16 bits, whichever type is taken later
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}
"""By `model.dtype`."""


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
        attention = attention_arguments(config, model_config)
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
