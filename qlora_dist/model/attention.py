"""Which attention a model runs with, and how samples that share a row are kept apart in it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from qlora_dist.config import ModelConfig
from qlora_dist.model.skeleton import base_model, flash_attention_problem

_BY_LENGTHS = "flash_attention_2"
"""Takes the lengths of samples that follow each other (variable-length kernels) instead of a mask."""


def attention_note(model: nn.Module, config: ModelConfig, *, is_packed: bool) -> str:
    """What the log says of the attention."""
    name = _implementation(model)
    chosen = " (chosen by model.attention: auto)" if config.attention == "auto" else ""
    if chosen and torch.cuda.is_available() and (problem := flash_attention_problem()) is not None:
        chosen += f"; the package flash-attn is installed, but cannot be imported ({problem})"
    how = "their lengths, with variable-length kernels" if name == _BY_LENGTHS else "a mask over the row"
    return f"attention: {name}{chosen}" + (f"; samples in a packed row are kept apart by {how}" if is_packed else "")


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


def mask_elements(model: nn.Module, rows: int, length: int, *, is_packed: bool, is_on_gpu: bool) -> int:
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
