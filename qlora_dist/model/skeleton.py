"""The model as a description: every module in place on the meta device, 4-bit layers included, no weights read."""

from __future__ import annotations

from pathlib import Path

import torch
from accelerate import init_empty_weights
from peft import PeftModel
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from qlora_dist.config import ModelConfig
from qlora_dist.errors import ModelError
from qlora_dist.model.nf4 import QuantFormat, QuantizedLinear

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def build_skeleton(folder: Path, config: ModelConfig) -> PreTrainedModel:
    """Build the causal language model of `folder` with its parameters on meta and its linear layers in 4 bits.

    Buffers (rotary frequencies and the like) are computed for real, since no checkpoint holds them.

    Raises:
        ModelError: the architecture is unknown, or has no linear layers in its decoder layers.
    """
    try:
        model_config = AutoConfig.from_pretrained(folder, trust_remote_code=config.trust_remote_code)
        if getattr(model_config, "quantization_config", None) is not None:
            raise ModelError(
                f"model.path {folder} is already quantised. Give the 16-bit model: it is quantised while it is read."
            )
        attention = {} if config.attention == "auto" else {"attn_implementation": config.attention}
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(
                model_config, dtype=DTYPES[config.dtype], trust_remote_code=config.trust_remote_code, **attention
            )
    except (ValueError, ImportError, KeyError) as error:
        raise ModelError(f"model.path {folder} cannot be built by transformers: {error}") from None
    model.tie_weights()  # on meta each use of a shared parameter was given one of its own
    model.requires_grad_(False)
    layers = decoder_layers(model)
    if not any(isinstance(module, nn.Linear) for layer in layers for module in layer.modules()):
        kinds = sorted({type(module).__name__ for layer in layers for module in layer.modules()})
        raise ModelError(
            f"model.path {folder}: {type(model).__name__} has no nn.Linear in its decoder layers "
            f"(it uses {', '.join(kinds[:6])}), so there is nothing to quantise and nowhere to put adapters. "
            "Use a model with nn.Linear projections, such as Llama, Mistral, Qwen, Gemma or Phi."
        )
    if config.quantization != "none":
        fmt = QuantFormat(config.quantization, config.double_quant)
        quantize_skeleton(model, fmt, DTYPES[config.dtype])
    return model


def quantize_skeleton(model: PreTrainedModel, fmt: QuantFormat, dtype: torch.dtype) -> None:
    """Replace every linear layer but the output head by an empty 4-bit one, as transformers does by default."""
    head = model.get_output_embeddings()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and child is not head:
                quantized = QuantizedLinear(child.in_features, child.out_features, child.bias is not None, fmt, dtype)
                setattr(parent, name, quantized)
    # peft asks the model, not the layer, whether it may find 4-bit layers.
    model.is_loaded_in_4bit = True


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The transformer blocks in forward order: the unit of sharding and of recomputation.

    Raises:
        ModelError: the model has no list of blocks.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    block_names = set(getattr(base, "_no_split_modules", None) or ())
    blocks = [module for module in base.modules() if type(module).__name__.removeprefix("FSDP") in block_names]
    if not blocks:
        lists = [module for module in base.modules() if isinstance(module, nn.ModuleList)]
        blocks = max((list(modules) for modules in lists), key=len, default=[])
    if not blocks:
        raise ModelError(f"{type(base).__name__} has no list of decoder layers, so it cannot be trained here.")
    return blocks
