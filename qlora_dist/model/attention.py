"""Choice of the attention that a model runs with, and its inputs for samples that share a row."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig
from transformers.utils import is_flash_attn_2_available, is_flash_attn_greater_or_equal

from qlora_dist.config.schema import ModelConfig
from qlora_dist.errors import ConfigError
from qlora_dist.model.parts import base_model

# Takes the lengths of samples that follow each other (variable-length kernels) instead of a mask.
_BY_LENGTHS = "flash_attention_2"


def attention_note(model: nn.Module, config: ModelConfig, *, is_packed: bool) -> str:
    """Return the log's line about the attention: its name, who chose it, how it parts samples."""
    name = _implementation(model)
    note = f"attention: {name}"
    if config.attention == "auto":
        note += " (chosen by model.attention: auto)"
        if torch.cuda.is_available() and (problem := flash_attention_problem()) is not None:
            note += f"; the package flash-attn is installed, but cannot be imported ({problem})"
    if is_packed:
        by_lengths = "their lengths, with variable-length kernels"
        how = by_lengths if name == _BY_LENGTHS else "a mask over the row"
        note += f"; samples in a packed row are kept apart by {how}"
    return note


def model_inputs(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor | None
) -> dict[str, Any]:
    """Return the model's arguments by which each token sees only its own sample, up to itself.

    Args:
        input_ids, attention_mask: (batch, seq_len) int64.
        position_ids: (batch, seq_len) int64 of packed rows, counted from 0 in each sample and in
            the padding; else None.
    """
    if position_ids is None:
        return {"input_ids": input_ids, "attention_mask": attention_mask}
    if _implementation(model) == _BY_LENGTHS:
        # transformers looks for samples in a batch of one row only. Variable-length kernels would
        # take each of several rows for one sample.
        input_ids, position_ids = input_ids.reshape(1, -1), position_ids.reshape(1, -1)
    # With any mask, transformers would ignore the positions, and samples would see each other.
    return {"input_ids": input_ids, "position_ids": position_ids}


def mask_elements(
    model: nn.Module, rows: int, length: int, *, is_packed: bool, is_on_gpu: bool
) -> int:
    """Elements of the mask that SDPA makes of a micro-batch in each layer and keeps for backward.

    On a GPU its masked kernel takes numbers to add to the scores, in the compute type. Packed rows
    have a mask, and so have several rows that are padded to a common length.
    """
    has_mask = is_on_gpu and _implementation(model) == "sdpa" and (is_packed or rows > 1)
    return rows * length * length if has_mask else 0


def _implementation(model: nn.Module) -> str:
    return str(base_model(model).config.get_text_config()._attn_implementation)


def attention_arguments(config: ModelConfig, model_config: PreTrainedConfig) -> dict[str, str]:
    """Return the implementation to ask for; an empty dictionary leaves the choice to the model.

    On a GPU with the package flash-attn, `auto` takes its kernels: they skip the pairs that packed
    samples must not see, while SDPA computes these and masks them out. Otherwise the model takes
    SDPA if it can. A model with soft-capped scores (Gemma 2) takes eager attention instead.

    Raises:
        ConfigError: `model.attention` is sdpa for a model with soft-capped scores.
    """
    cap = getattr(model_config.get_text_config(), "attn_logit_softcapping", None)
    # SDPA knows no cap, and some versions of transformers (5.17) leave it out without a word.
    if config.attention == "sdpa" and cap is not None:
        raise ConfigError(
            "model.attention is sdpa, which cannot soft-cap attention scores "
            f"(attn_logit_softcapping is {cap:g} in this model). "
            "Use auto, eager or flash_attention_2."
        )
    if config.attention != "auto":
        return {"attn_implementation": config.attention}
    # None for code that is shipped with a model: whether it runs with flash-attn is unknown.
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(model_config), None)
    if (
        torch.cuda.is_available()
        and config.dtype != "float32"  # the kernels know 16-bit types only
        and getattr(model_class, "_supports_flash_attn", False) is True
        and is_flash_attn_2_available()
        and flash_attention_problem() is None
        and (cap is None or is_flash_attn_greater_or_equal("2.6.0"))  # the first that soft-caps
    ):
        return {"attn_implementation": "flash_attention_2"}
    return {} if cap is None else {"attn_implementation": "eager"}


@cache
def flash_attention_problem() -> str | None:
    """Return why the installed package flash-attn cannot be used.

    Returns:
        the error of its import; None if it can be imported, or is not installed.
    """
    if find_spec("flash_attn") is None:
        return None
    # transformers looks at the package's metadata only. A package that was built for a different
    # torch has these, and fails when it is imported ("undefined symbol").
    try:
        import_module("flash_attn")
    except Exception as error:  # noqa: BLE001 - whatever it is, the run can do without the package
        return f"{type(error).__name__}: {error}"
    return None
