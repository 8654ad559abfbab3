"""The skeleton of a model: every module in place on the meta device, 4-bit layers included.

Building it reads no weights.
"""

# Tested by tests/unit/weights/test_loading.py and tests/distributed/test_families.py.

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from accelerate import init_empty_weights
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from qlora_dist.config.schema import ModelConfig
from qlora_dist.errors import ModelError
from qlora_dist.model.attention import attention_arguments
from qlora_dist.model.cpu.attention import use_cpu_attention
from qlora_dist.model.experts import quantize_stacks
from qlora_dist.model.linear_layers import linear_layers, linear_layers_and_reasons
from qlora_dist.model.nf4 import QuantFormat, QuantizedLinear
from qlora_dist.model.parts import is_linear
from qlora_dist.model.positions import forget_longest
from qlora_dist.model.supported import check_supported
from qlora_dist.model.text_reach import leave_out_towers

DTYPES = {
    "auto": torch.bfloat16,  # nobody computes with the skeleton: 16 bits, whichever type it gets
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}
"""Types of parameters by `model.dtype`."""


def build_skeleton(
    folder: Path,
    config: ModelConfig,
    stored_formats: Mapping[str, QuantFormat] | None = None,
    is_tied: bool = True,
) -> PreTrainedModel:
    """Build the causal language model of a folder on meta, with its linear layers in 4 bits.

    Buffers (rotary frequencies and the like) get their values: no checkpoint holds them.

    Args:
        stored_formats: formats of the layers that the folder holds in 4 bits, by name; None for a
            16-bit model, whose linear layers get the format of `config`.
        is_tied: false gives the output head weights of its own, whatever the model's configuration
            says of them.

    Raises:
        ModelError: the architecture is unknown, or :func:`check_supported` refuses it.
        ConfigError: the attention that `config` asks for would not compute what the model's does.
    """
    dtype, trust_code = DTYPES[config.dtype], config.trust_remote_code
    try:
        model_config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_code)
        if stored_formats is not None:
            # transformers builds a 16-bit model then; the layers themselves know their formats.
            del model_config.quantization_config
        if not is_tied:
            for part in (model_config, model_config.get_text_config()):
                part.tie_word_embeddings = False
        attention = attention_arguments(config, model_config)
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(
                model_config, dtype=dtype, trust_remote_code=trust_code, **attention
            )
    except (ValueError, ImportError, KeyError, AttributeError, TypeError) as error:
        asked = "" if config.attention == "auto" else f" with model.attention {config.attention}"
        problem = f"model.path {folder} cannot be built by transformers{asked}: {error}"
        raise ModelError(problem) from None
    model.tie_weights()  # each parameter was put on meta by itself
    model.requires_grad_(False)
    leave_out_towers(model)
    forget_longest(model)
    if config.attention == "auto" and config.dtype == "bfloat16" and not torch.cuda.is_available():
        use_cpu_attention(model)
    check_supported(model, folder)
    formats, fmt = stored_formats, None
    if config.quantization != "none":
        fmt = QuantFormat(config.quantization, config.double_quant)
    if formats is None and fmt is not None:
        formats = dict.fromkeys(linear_layers(model), fmt)
    elif formats is not None:
        _check_stored(model, formats, folder)
    if formats:
        quantize_skeleton(model, formats, dtype)
    quantize_stacks(model, fmt, dtype)
    return model


def _check_stored(model: PreTrainedModel, formats: Mapping[str, QuantFormat], folder: Path) -> None:
    """Refuse a layer that is stored in 4 bits, but whose weight the model's own code reads.

    Raises:
        ModelError: naming the layer.
    """
    for name, reason in linear_layers_and_reasons(model).items():
        if name in formats and reason.startswith("its weight"):
            raise ModelError(
                f"model.path {folder} holds {name} in 4 bits, but {reason}, which needs the matrix "
                "itself. Give the original 16-bit model: such layers then stay in 16 bits."
            )


def quantize_skeleton(
    model: PreTrainedModel, formats: Mapping[str, QuantFormat], dtype: torch.dtype
) -> None:
    """Replace linear layers by empty 4-bit ones; ignore names in `formats` of other modules."""
    for name, module in list(model.named_modules()):
        if name in formats and is_linear(module):
            shape, has_bias = (module.in_features, module.out_features), module.bias is not None
            model.set_submodule(name, QuantizedLinear(*shape, has_bias, formats[name], dtype))
    # peft asks the model, not the layer, whether it may find 4-bit layers.
    model.is_loaded_in_4bit = True
