"""Rows of metrics: one per logged step and per evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class StepSums:
    """What one optimizer step leaves on the device; all 0-dim float32. Reading it waits for the device."""

    loss: torch.Tensor
    """This rank's share of the global mean loss: the sum over ranks is the loss."""
    grad_norm: torch.Tensor
    num_targets: torch.Tensor
    num_tokens: torch.Tensor

    @property
    def is_finite(self) -> bool:
        """Whether the step updated anything; the same on every rank."""
        return bool(self.grad_norm.isfinite())


@dataclass(frozen=True)
class StepMetrics:
    """One optimizer step, over all ranks."""

    step: int
    loss: float
    """Mean cross-entropy per target token of the global batch, in nats."""
    grad_norm: float
    """Global gradient norm before clipping."""
    lr: float
    num_tokens: int
    """Tokens of the global batch, padding excluded."""
    num_target_tokens: int
    tokens_per_second: float
    """`num_tokens` over `step_seconds`."""
    target_tokens_per_second: float
    step_seconds: float
    data_wait_seconds: float
    """Part of `step_seconds` in which the loop waited for its micro-batches; the largest over ranks."""
    peak_memory_gib: float
    """Largest over ranks: allocated on the GPU, or resident in host memory on CPU, since the start; with
    `memory.recompute: auto`, whose measuring begins there, since the first step."""
    mfu: float | None
    """Model FLOPs utilization: the arithmetic that training needs (see `model/mfu.py`) per second, over what all
    ranks' devices were measured to multiply at best."""
    epoch: float
    num_skipped_steps: int
    """Steps so far that updated nothing, because their gradient was not finite."""


@dataclass(frozen=True)
class EvalMetrics:
    """One evaluation, over all ranks."""

    step: int
    eval_loss: float
    """Mean cross-entropy per target token of the evaluation set, in nats."""
    eval_perplexity: float
    num_target_tokens: int
    seconds: float
    epoch: float
