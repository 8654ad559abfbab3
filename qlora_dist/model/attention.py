"""Which attention a model runs with, and how samples that share a row are kept apart in it."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig
from transformers.utils import is_flash_attn_2_available, is_flash_attn_greater_or_equal

from qlora_dist.config.schema import ModelConfig
from qlora_dist.errors import ConfigError
from qlora_dist.model.parts import base_model

_BY_LENGTHS = "flash_attention_2"
"""Takes the lengths of samples that follow each other (variable-length kernels) instead of a mask."""


def attention_note(model: nn.Module, config: ModelConfig, *, is_packed: bool) -> str:
    """What the log says of the attention."""
    name = _implementation(model)
    chosen = " (chosen by model.attention: auto)" if config.attention == "auto" else ""
    if chosen and torch.cuda.is_available() and (problem := flash_attention_problem()) is not None:
        chosen += f"; the package flash-attn is installed, but cannot be imported ({problem})"
    how = (
        "their lengths, with variable-length kernels"
        if name == _BY_LENGTHS
        else "a mask over the row"
    )
    return f"attention: {name}{chosen}" + (
        f"; samples in a packed row are kept apart by {how}" if is_packed else ""
    )


def model_inputs(
    model: nn.Module,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    position_ids: torch.Tensor | None,
) -> dict[str, Any]:
    """What to call the model with, so that each token sees those before it in its own sample and nothing else.

    Args:
        input_ids, attention_mask: (batch, seq_len) int64.
        position_ids: (batch, seq_len) int64 of packed rows, from 0 in each sample and in the padding; else None.
    """
    if position_ids is None:
        return {"input_ids": input_ids, "attention_mask": attention_mask}
    if _implementation(model) == _BY_LENGTHS:
        return in_one_row(input_ids, position_ids)
    # With any mask, transformers would not look at the positions, and samples would see each other.
    return {"input_ids": input_ids, "position_ids": position_ids}


def mask_elements(
    model: nn.Module, rows: int, length: int, *, is_packed: bool, is_on_gpu: bool
) -> int:
    """Elements of what SDPA makes of a micro-batch's mask, in each layer, and keeps for backward.

    On a GPU its masked kernel takes numbers to add to the scores, in the compute type. Packed rows
    have a mask, and so have several that are padded to one length.
    """
    has_mask = is_on_gpu and _implementation(model) == "sdpa" and (is_packed or rows > 1)
    return rows * length * length if has_mask else 0


def in_one_row(input_ids: torch.Tensor, position_ids: torch.Tensor) -> dict[str, Any]:
    """Packed rows behind each other. transformers looks for samples in a batch of one row only: of several, each row
    would be one sample to variable-length kernels."""
    return {"input_ids": input_ids.reshape(1, -1), "position_ids": position_ids.reshape(1, -1)}


def _implementation(model: nn.Module) -> str:
    return str(base_model(model).config.get_text_config()._attn_implementation)


_FIRST_WITH_CAP = "2.6.0"
"""The first flash-attn that soft-caps scores."""


def attention_arguments(config: ModelConfig, model_config: PreTrainedConfig) -> dict[str, str]:
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
    if (
        torch.cuda.is_available()
        and has_kernels
        and config.dtype != "float32"
        and _takes_flash(model_config)
    ):
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
