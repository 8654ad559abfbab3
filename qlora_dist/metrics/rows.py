"""Rows of metrics: one per logged step and per evaluation."""

# Tested by tests/unit/metrics/test_recorder.py.

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class StepSums:
    """Results of one optimizer step on the device, 0-dim float32; reading them waits for it."""

    loss: Tensor
    """This rank's share of the global mean loss; the shares of all ranks add up to it."""
    grad_norm: Tensor
    num_targets: Tensor
    num_tokens: Tensor

    @property
    def is_finite(self) -> bool:
        """True if the step updated the adapters; equal on every rank."""
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
    """Part of `step_seconds` that the loop waited for its micro-batches; largest over ranks."""
    peak_memory_gib: float
    """Peak over ranks since the start, allocated on the GPU or resident in host memory on CPU.
    With `memory.recompute: auto` since the first step, where its measuring begins."""
    mfu: float | None
    """Model FLOPs utilization: operations per second that training needs (see `model/mfu.py`),
    over the measured peak of all ranks' devices."""
    epoch: float
    num_skipped_steps: int
    """Steps so far without an update, because their gradient was not finite."""
    expert_tokens_least: int | None = None
    """Tokens of the expert that got the fewest since the last row, over all layers and ranks; None,
    and no column, for models without experts."""
    expert_tokens_mean: float | None = None
    expert_tokens_most: int | None = None


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
