"""The loss: a sum over target tokens, so that it can be divided once by their number over all ranks."""

from __future__ import annotations

import torch
from torch import nn

from qlora_dist.config import IGNORE_INDEX


def target_loss_sum(
    model: nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """Summed next-token cross-entropy over target tokens, in float32.

    Args:
        input_ids, attention_mask, labels: (batch, seq_len) int64; labels are aligned with input_ids and shifted here.

    Returns:
        0-dim float32, zero when there is no target.
    """
    logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
    return nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(),  # (batch * (seq_len - 1), vocab)
        labels[:, 1:].flatten(),
        ignore_index=IGNORE_INDEX,
        reduction="sum",
    )
