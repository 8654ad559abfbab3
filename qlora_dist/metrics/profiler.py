"""A trace of a few training steps, for https://ui.perfetto.dev or TensorBoard's profiler page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.profiler import ProfilerActivity, profile, schedule, tensorboard_trace_handler

if TYPE_CHECKING:
    from qlora_dist.metrics.console import Reporter


_UNTRACED = 2
"""Steps before the trace: the first pays first-time costs (kernels, buffers, communicators), during
the second the profiler itself warms up."""


class StepProfiler:
    """A context that traces some steps of this process.

    Args:
        folder: gets the trace.
        num_steps: steps to trace; None traces nothing.
    """

    def __init__(self, folder: Path, num_steps: int | None, reporter: Reporter) -> None:
        self._folder = folder
        self._reporter = reporter
        self._num_done = 0
        self._is_written = False
        self._profile: Any = None
        if num_steps is not None:
            activities = [ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(ProfilerActivity.CUDA)
            phases = schedule(wait=_UNTRACED - 1, warmup=1, active=num_steps, repeat=1)
            self._profile = profile(
                activities=activities, schedule=phases, on_trace_ready=self._write
            )

    def __enter__(self) -> StepProfiler:
        if self._profile is not None:
            self._profile.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._profile is None:
            return
        self._profile.stop()
        if not self._is_written:
            self._reporter.log(
                f"nothing was profiled: the run was over before its step {_UNTRACED + 1}"
            )

    def step(self) -> None:
        """Count a finished step; call it after each."""
        self._num_done += 1
        if self._profile is not None and not self._is_written:
            self._profile.step()

    def _write(self, trace: Any) -> None:
        """Write the trace; the profiler calls this after the last step, or when the run ends."""
        if self._num_done <= _UNTRACED:  # the run ended before a traced step
            return
        tensorboard_trace_handler(str(self._folder), worker_name="rank0", use_gzip=True)(trace)
        self._is_written = True
        self._reporter.log(
            f"profile written to {self._folder}: open it at https://ui.perfetto.dev "
            "or in TensorBoard"
        )
