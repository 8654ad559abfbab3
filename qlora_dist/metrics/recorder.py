"""What is measured: one row per logged step, to metrics.jsonl and TensorBoard."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections import deque
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import torch

from qlora_dist.config.schema import LoggingConfig
from qlora_dist.runtime.memory import MemoryMeter

if TYPE_CHECKING:
    from qlora_dist.metrics.console import Reporter
    from qlora_dist.runtime.processes import Runtime
from qlora_dist.metrics.rows import EvalMetrics, StepMetrics, StepSums
from qlora_dist.runtime.memory import GIB

_SPIKE = 2.0
"""A loss so many times the usual one is worth a warning."""


class MetricsWriter:
    """Appends rows to metrics.jsonl, each flushed, and mirrors the numbers to TensorBoard; rank 0 only."""

    def __init__(self, folder: Path, config: LoggingConfig, first_step: int = 1) -> None:
        self._file: TextIO = (folder / "metrics.jsonl").open("a", encoding="utf-8")
        self._board: Any = None
        if config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step)

    def write(self, row: StepMetrics | EvalMetrics) -> None:
        """Add one row."""
        values = vars(row)
        finite = {
            key: None if isinstance(v, float) and not math.isfinite(v) else v
            for key, v in values.items()
        }
        self._file.write(json.dumps(finite) + "\n")  # JSON knows no NaN
        self._file.flush()
        if self._board is not None:
            prefix = "eval" if isinstance(row, EvalMetrics) else "train"
            for name, value in values.items():
                if name != "step" and value is not None:
                    self._board.add_scalar(
                        f"{prefix}/{name.removeprefix('eval_')}", value, row.step
                    )

    def close(self) -> None:
        """Flush everything."""
        self._file.close()
        if self._board is not None:
            self._board.close()


class Recorder:
    """Turns steps into rows on rank 0; all ranks call it alike, since the loss is summed over them.

    Between two logged steps nothing is read from the device. Times are means over the steps since the last row,
    evaluation excluded.
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
    ) -> None:
        self._config = config
        self._runtime = runtime
        self._reporter = reporter
        self._num_steps = num_steps
        self._writer = MetricsWriter(folder, config, first_step) if runtime.is_main else None
        self._stack = ExitStack()
        self._waited_before = 0.0
        self._peak_gib = 0.0
        self._window_steps = 0
        self._window_tokens = torch.zeros((), device=runtime.device)
        self._window_targets = torch.zeros((), device=runtime.device)
        self._window_flops = 0
        self._peak_flops = peak_flops
        self._window_started = time.perf_counter()
        self._seconds_per_step: list[float] = []
        self._losses: deque[float] = deque(maxlen=20)

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
        """One optimizer step is done; writes a row when `logging.every` says so.

        Args:
            waited_seconds: for micro-batches, on this rank, since the start.
            flops: useful operations of this rank in the step.
        """
        self._window_steps += 1
        self._window_tokens += sums.num_tokens
        self._window_targets += sums.num_targets
        self._window_flops += flops
        self._reporter.at_step(step)
        if step % self._config.every and step != self._num_steps:
            return
        summed = self._runtime.sum_over_ranks(
            torch.stack([sums.loss, sums.loss.new_tensor(self._window_flops)])
        )
        # The larger of both, because `budget.py` lets the device forget its peak now and then.
        self._peak_gib = max(
            self._peak_gib,
            self._runtime.max_over_ranks(MemoryMeter(self._runtime.device).peak() / GIB),
        )
        waited = self._runtime.max_over_ranks(waited_seconds - self._waited_before)
        values = torch.stack(
            [
                sums.grad_norm,
                sums.num_tokens,
                sums.num_targets,
                self._window_tokens,
                self._window_targets,
                *summed,
            ]
        ).tolist()
        grad_norm, num_tokens, num_targets, window_tokens, window_targets, loss, flops = values
        seconds = time.perf_counter() - self._window_started
        row = StepMetrics(
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
        )
        self._seconds_per_step.append(row.step_seconds)
        if self._writer is not None:
            self._writer.write(row)
        self._reporter.step(row, self._seconds_left(step))
        self._warn_of_spike(row)
        self._waited_before = waited_seconds
        self._restart_window()

    def evaluation(self, row: EvalMetrics) -> None:
        """An evaluation is done."""
        if self._writer is not None:
            self._writer.write(row)
        self._reporter.evaluation(row)
        self._window_started += row.seconds

    def _warn_of_spike(self, row: StepMetrics) -> None:
        """Say when the loss is far above what it was: a learning rate too high, or rows unlike the others."""
        usual = (
            statistics.median(self._losses)
            if len(self._losses) == self._losses.maxlen
            else math.inf
        )
        if row.loss > _SPIKE * usual:
            self._reporter.log(
                f"step {row.step}: the loss {row.loss:.4f} is more than {_SPIKE:g} times its median over the last "
                f"{len(self._losses)} logged steps ({usual:.4f}). Should it stay there: lower optim.lr, or lengthen "
                "the warm-up."
            )
        if math.isfinite(row.loss):
            self._losses.append(row.loss)

    def _seconds_left(self, step: int) -> float | None:
        if len(self._seconds_per_step) < 2 or step == self._num_steps:
            return None
        recent = self._seconds_per_step[1:][-20:]  # the first one includes warm-up
        return (self._num_steps - step) * sum(recent) / len(recent)

    def _restart_window(self) -> None:
        self._window_steps = 0
        self._window_tokens.zero_()
        self._window_targets.zero_()
        self._window_flops = 0
        self._window_started = time.perf_counter()
