"""Recording: one row per logged step and per evaluation, to metrics.jsonl and TensorBoard."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import torch
from torch import Tensor

from qlora_dist.config.schema import LoggingConfig
from qlora_dist.metrics.rows import EvalMetrics, StepMetrics, StepSums
from qlora_dist.runtime.memory import GIB, MemoryMeter

if TYPE_CHECKING:
    from qlora_dist.metrics.console import Reporter
    from qlora_dist.runtime.processes import Runtime

_SPIKE = 2.0
"""Multiple of the usual loss above which a loss gets a warning."""


class MetricsWriter:
    """Appends rows to metrics.jsonl, each flushed, and mirrors them to TensorBoard; rank 0 only."""

    def __init__(self, folder: Path, config: LoggingConfig, first_step: int = 1) -> None:
        self._file: TextIO = (folder / "metrics.jsonl").open("a", encoding="utf-8")
        self._board: Any = None
        if config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            # A resumed run computes some steps again: TensorBoard drops their first values.
            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step)

    def write(self, row: StepMetrics | EvalMetrics) -> None:
        """Add one row."""
        values = [
            (name, value)
            for name, value in vars(row).items()
            if value is not None or not name.startswith("expert_tokens_")
        ]
        # JSON has no NaN and no infinity: null stands for both.
        finite = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in values
        }
        self._file.write(json.dumps(finite) + "\n")
        self._file.flush()
        if self._board is not None:
            prefix = "eval" if isinstance(row, EvalMetrics) else "train"
            for name, value in values:
                if name != "step" and value is not None:
                    tag = f"{prefix}/{name.removeprefix('eval_')}"
                    self._board.add_scalar(tag, value, row.step)

    def close(self) -> None:
        """Flush and close the files."""
        self._file.close()
        if self._board is not None:
            self._board.close()


class Recorder:
    """A context that turns steps into rows; rank 0 writes them, all ranks call it alike.

    Between two logged steps nothing is read from the device. Times are means over the steps since
    the last row, evaluations excluded.

    Args:
        first_step: number of the step that the run begins or resumes with.
        peak_flops: operations per second that all devices reach at best; None leaves MFU out.
        take_token_counts: returns the tokens that each expert got on this rank since the last call,
            (experts of all layers,); None for a model without experts.
    """

    def __init__(
        self,
        folder: Path,
        config: LoggingConfig,
        runtime: Runtime,
        reporter: Reporter,
        num_steps: int,
        first_step: int,
        peak_flops: float | None = None,
        take_token_counts: Callable[[], Tensor | None] = lambda: None,
    ) -> None:
        self._take_token_counts = take_token_counts
        self._expert_tokens: Tensor | None = None  # since the start
        self._config, self._runtime, self._reporter = config, runtime, reporter
        self._num_steps, self._peak_flops = num_steps, peak_flops
        self._writer = MetricsWriter(folder, config, first_step) if runtime.is_main else None
        self._stack = ExitStack()
        self._waited_before = self._peak_gib = 0.0
        self._seconds_per_step: list[float] = []
        self._losses: deque[float] = deque(maxlen=20)
        # A window is the steps since the last row.
        self._window_steps = self._window_flops = 0
        self._window_counts = torch.zeros(2, device=runtime.device)  # (2,): tokens, targets
        self._window_started = time.perf_counter()

    def __enter__(self) -> Recorder:
        self._stack.enter_context(self._reporter.training(self._num_steps))
        self._window_started = time.perf_counter()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()
        if self._writer is not None:
            self._writer.close()

    def step(
        self,
        step: int,
        lr: float,
        sums: StepSums,
        epoch: float,
        num_skipped_steps: int,
        waited_seconds: float = 0.0,
        flops: int = 0,
    ) -> None:
        """Count an optimizer step; write a row where `logging.every` says so, and after the last.

        Args:
            waited_seconds: time that this rank has waited for micro-batches since the start.
            flops: useful operations of this rank in the step.
        """
        self._window_steps += 1
        self._window_counts += torch.stack([sums.num_tokens, sums.num_targets])
        self._window_flops += flops
        self._reporter.at_step(step)
        if step % self._config.every and step != self._num_steps:
            return
        row = self._row(step, lr, sums, epoch, num_skipped_steps, waited_seconds)
        self._seconds_per_step.append(row.step_seconds)
        if self._writer is not None:
            self._writer.write(row)
        self._reporter.step(row, self._seconds_left(step))
        if step == self._num_steps:
            self._tell_idle_experts()
        self._warn_of_spike(row)
        self._waited_before = waited_seconds
        self._window_steps = self._window_flops = 0
        self._window_counts.zero_()
        self._window_started = time.perf_counter()

    def _row(
        self,
        step: int,
        lr: float,
        sums: StepSums,
        epoch: float,
        num_skipped_steps: int,
        waited_seconds: float,
    ) -> StepMetrics:
        """Gather the row of a step and its window; a collective that waits for the device."""
        runtime = self._runtime
        # (2,): loss, operations of the window
        own = torch.stack([sums.loss, sums.loss.new_tensor(self._window_flops)])
        loss, flops = runtime.sum_over_ranks(own)
        # `memory/auto.py` lets the device forget its peak now and then: keep the larger.
        peak = runtime.max_over_ranks(MemoryMeter(runtime.device).peak() / GIB)
        self._peak_gib = max(self._peak_gib, peak)
        waited = runtime.max_over_ranks(waited_seconds - self._waited_before)
        counts = (sums.num_tokens, sums.num_targets, *self._window_counts)
        # One copy from the device for all numbers of the row.
        values = torch.stack([sums.grad_norm, *counts, loss, flops]).tolist()
        grad_norm, num_tokens, num_targets, window_tokens, window_targets, loss, flops = values
        least, mean, most = self._spread_of_tokens()
        seconds = time.perf_counter() - self._window_started
        return StepMetrics(
            step=step,
            loss=loss,
            grad_norm=grad_norm,
            lr=lr,
            num_tokens=int(num_tokens),
            num_target_tokens=int(num_targets),
            tokens_per_second=window_tokens / seconds,
            target_tokens_per_second=window_targets / seconds,
            step_seconds=seconds / self._window_steps,
            data_wait_seconds=waited / self._window_steps,
            peak_memory_gib=self._peak_gib,
            mfu=flops / seconds / self._peak_flops if self._peak_flops else None,
            epoch=epoch,
            num_skipped_steps=num_skipped_steps,
            expert_tokens_least=least,
            expert_tokens_mean=mean,
            expert_tokens_most=most,
        )

    def _spread_of_tokens(self) -> tuple[int | None, float | None, int | None]:
        """Return least, mean and most tokens of an expert in the window; a collective."""
        counts = self._take_token_counts()
        if counts is None:
            return None, None, None
        counts = self._runtime.sum_over_ranks(counts)
        before = self._expert_tokens
        self._expert_tokens = counts if before is None else before + counts
        least, total, most = torch.stack([counts.min(), counts.sum(), counts.max()]).tolist()
        return least, total / len(counts), most

    def _tell_idle_experts(self) -> None:
        """Log how many experts have had no token at all."""
        counts = self._expert_tokens
        if counts is not None and (num_idle := int((counts == 0).sum())):
            self._reporter.log(
                f"{num_idle:,} of {len(counts):,} experts of all layers got no token in these "
                "steps: their adapters are as they began"
            )

    def evaluation(self, row: EvalMetrics) -> None:
        """Write the row of an evaluation, and leave its time out of the window."""
        if self._writer is not None:
            self._writer.write(row)
        self._reporter.evaluation(row)
        self._window_started += row.seconds

    def _warn_of_spike(self, row: StepMetrics) -> None:
        """Warn when the loss is far above its median."""
        is_known = len(self._losses) == self._losses.maxlen
        usual = statistics.median(self._losses) if is_known else math.inf
        if row.loss > _SPIKE * usual:
            self._reporter.log(
                f"step {row.step}: the loss {row.loss:.4f} is more than {_SPIKE:g} times its "
                f"median over the last {len(self._losses)} logged steps ({usual:.4f}). Should it "
                "stay there: lower optim.lr, or lengthen the warm-up."
            )
        if math.isfinite(row.loss):
            self._losses.append(row.loss)

    def _seconds_left(self, step: int) -> float | None:
        if len(self._seconds_per_step) < 2 or step == self._num_steps:
            return None
        recent = self._seconds_per_step[1:][-20:]  # the first includes warm-up
        return (self._num_steps - step) * sum(recent) / len(recent)
