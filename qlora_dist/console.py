"""What a person sees: a live bar on a terminal, plain lines in a log file, and nothing else."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from qlora_dist import streams
from qlora_dist.metrics import EvalMetrics, StepMetrics

_SAY_EVERY_SECONDS = 10.0
"""Between lines about one long piece of work, where there is no terminal to show a bar on."""


class Reporter:
    """Speaks for the run on rank 0; on other ranks it is silent."""

    def __init__(self, is_main: bool, file: TextIO | None = None) -> None:
        self.console = Console(
            file=streams.lasting(file or sys.stdout), quiet=not is_main, highlight=False, emoji=False, soft_wrap=True
        )
        self._num_steps = 0
        self._progress: Progress | None = None

    def say(self, text: str) -> None:
        """One plain line."""
        self.console.print(text, markup=False)

    @contextmanager
    def training(self, num_steps: int) -> Iterator[None]:
        """Show a live bar while the body runs, when there is a terminal to show it on."""
        self._num_steps = num_steps
        if not self.console.is_terminal or self.console.quiet:
            yield
            return
        columns = (TextColumn("step {task.completed}/{task.total}"), BarColumn(bar_width=None),
                   TextColumn("{task.fields[status]}"), TimeElapsedColumn())  # fmt: skip
        with Progress(*columns, console=self.console) as progress:
            self._progress = progress
            progress.add_task("train", total=num_steps, status="")
            try:
                yield
            finally:
                self._progress = None

    @contextmanager
    def loading(
        self, total_bytes: int, total_layers: int, alive: Callable[[], None] = lambda: None
    ) -> Iterator[Callable[[int, int], None]]:
        """Progress of reading weights; the body calls what it gets with the bytes read and layers filled so far.

        Args:
            alive: called whenever another layer is filled, by all ranks alike.
        """
        started = time.perf_counter()
        columns = (TextColumn("loading layer {task.completed}/{task.total}"), BarColumn(bar_width=None),
                   TextColumn("{task.fields[mebibytes]:,} MiB read by this rank"))  # fmt: skip
        hidden = not self.console.is_terminal or self.console.quiet
        last = last_layer = 0
        with Progress(*columns, console=self.console, transient=True, disable=hidden) as progress:
            task = progress.add_task("load", total=total_layers, mebibytes=0)

            def on_progress(num_bytes: int, num_layers: int) -> None:
                nonlocal last, last_layer
                if num_layers != last_layer:
                    alive()
                last, last_layer = num_bytes, num_layers
                progress.update(task, completed=num_layers, mebibytes=num_bytes // 2**20)

            yield on_progress
        seconds = time.perf_counter() - started
        self.say(f"base model: this rank read {last / 2**20:,.0f} of {total_bytes / 2**20:,.0f} MiB in {seconds:.1f} s")

    @contextmanager
    def preparing(self) -> Iterator[Callable[[str], None]]:
        """How far the data are: the body calls what it gets with a line, shown while it is true, or now and then."""
        said = time.perf_counter()
        if self.console.is_terminal and not self.console.quiet:
            with self.console.status("") as status:
                yield lambda text: status.update(escape(text))
            return

        def show(text: str) -> None:
            nonlocal said
            if time.perf_counter() - said > _SAY_EVERY_SECONDS:
                said = time.perf_counter()
                self.say(text)

        yield show

    @contextmanager
    def quantizing(self, total_bytes: int) -> Iterator[Callable[[int], None]]:
        """Progress of `quantize`: a bar on a terminal, else a line every ten seconds."""
        started = said = time.perf_counter()
        columns = (TextColumn("quantising"), BarColumn(bar_width=None), DownloadColumn(binary_units=True),
                   TimeRemainingColumn())  # fmt: skip
        has_bar = self.console.is_terminal and not self.console.quiet
        with Progress(*columns, console=self.console, transient=True, disable=not has_bar) as progress:
            task = progress.add_task("quantise", total=total_bytes)

            def on_bytes(num_bytes: int) -> None:
                nonlocal said
                progress.update(task, completed=num_bytes)
                now = time.perf_counter()
                if not has_bar and now - said > _SAY_EVERY_SECONDS:
                    said = now
                    left = (now - started) * (total_bytes / num_bytes - 1)
                    done, whole = num_bytes / 2**20, total_bytes / 2**20
                    self.say(f"quantised {done:,.0f} of {whole:,.0f} MiB | {duration(left)} left")

            yield on_bytes
        seconds = time.perf_counter() - started
        self.say(f"quantised {total_bytes / 2**20:,.0f} MiB in {seconds:.1f} s")

    def step(self, row: StepMetrics, seconds_left: float | None) -> None:
        """One logged optimizer step."""
        status = step_line(row, self._num_steps, seconds_left)
        if self._progress is not None:
            task = self._progress.task_ids[0]
            self._progress.update(task, completed=row.step, status=status.partition(" | ")[2])
        else:
            self.say(status)

    def evaluation(self, row: EvalMetrics) -> None:
        """One evaluation."""
        self.say(
            f"eval at step {row.step} | loss {row.eval_loss:.4f} | perplexity {row.eval_perplexity:.2f} | "
            f"{row.num_target_tokens:,} target tokens | {row.seconds:.1f} s"
        )


def step_line(row: StepMetrics, num_steps: int, seconds_left: float | None) -> str:
    """A logged step as one line of text."""
    left = "" if seconds_left is None else f" | {duration(seconds_left)} left"
    return (
        f"step {row.step}/{num_steps} | loss {row.loss:.4f} | grad {row.grad_norm:.3f} | lr {row.lr:.2e} | "
        f"{row.tokens_per_second:,.0f} tok/s | mem {row.peak_memory_gib:.2f} GiB | {row.step_seconds:.2f} s{left}"
    )


def duration(seconds: float) -> str:
    """`75` as `1m15s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"
