"""The loss: a sum over target tokens, so that it can be divided once by their number over all ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import PeftModel
from torch import nn

from qlora_dist.config import IGNORE_INDEX
from qlora_dist.model.skeleton import base_model


def target_loss_sum(
    model: PeftModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    labels: torch.Tensor,
    position_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """Summed next-token cross-entropy over target tokens, in float32.

    Args:
        input_ids, attention_mask, labels: (batch, seq_len) int64; labels are aligned with input_ids and shifted here.
        position_ids: (batch, seq_len) int64 of packed rows: they begin at 0 in each sample, which is how the model's
            attention tells samples apart. The mask of padding is not used then.

    Returns:
        0-dim float32, zero when there is no target.
    """
    targets = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)  # (batch, seq_len), aligned with logits
    is_target = targets != IGNORE_INDEX
    with _head_sees_only(base_model(model).get_output_embeddings(), is_target):
        if position_ids is None:
            output = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        else:  # with any mask, transformers would not look at the positions, and samples would see each other
            output = model(input_ids=input_ids, position_ids=position_ids, use_cache=False)
    logits = output.logits.squeeze(0).float()  # (num_targets, vocab)
    return nn.functional.cross_entropy(logits, targets[is_target], reduction="sum")


@contextmanager
def _head_sees_only(head: nn.Module, rows: torch.Tensor) -> Iterator[None]:
    """Let the output head compute logits of some positions only: (batch, seq_len, d_model) becomes (1, n, d_model).

    On chat data one token in ten is a target, and the head is a fifth of a small model's parameters. Whatever a family
    does to its logits afterwards (soft-capping, scaling) works on each row by itself, so the model's own code still
    does it.

    Args:
        rows: (batch, seq_len) bool, the n positions to keep.
    """
    handle = head.register_forward_pre_hook(lambda _, inputs: (inputs[0][rows].unsqueeze(0),))
    try:
        yield
    finally:
        handle.remove()
