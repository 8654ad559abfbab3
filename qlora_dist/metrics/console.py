"""Console output of a run: a live bar on a terminal, plain lines in a log file."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol, TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Column
from rich.text import Text

from qlora_dist.metrics import streams
from qlora_dist.metrics.heartbeat import Heartbeat, Work

if TYPE_CHECKING:
    from qlora_dist.metrics.rows import EvalMetrics, StepMetrics


_SAY_EVERY_SECONDS = 10.0
"""Longest silence of a log file during work that takes long."""


class Update(Protocol):
    """Function that reports the progress of a piece of work."""

    def __call__(self, done: int, note: str = "") -> None: ...


class Reporter:
    """Writes what the user sees of a run; silent on all ranks but 0.

    Args:
        file: gets the lines; None is standard output.
        interval: seconds of silence after which a log file gets a line about long work; None is
            ten.
        clock: returns seconds.
    """

    def __init__(
        self,
        is_main: bool,
        file: TextIO | None = None,
        interval: float | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        out, is_quiet = streams.lasting(file or sys.stdout), not is_main
        # soft_wrap: a log file keeps one line per message, of any length.
        self.console = Console(
            file=out, quiet=is_quiet, highlight=False, emoji=False, soft_wrap=True
        )
        self._clock = clock
        interval = _SAY_EVERY_SECONDS if interval is None else interval
        self._heartbeat = Heartbeat(self.log, interval, clock)
        # A bar is drawn by one process only, and never into a file.
        self._bars = _Bars(self.console) if self.console.is_terminal and is_main else None
        self._is_main = is_main
        self._num_steps = 0
        self._training: Work | None = None
        self._step_started = 0.0

    def log(self, text: str) -> None:
        """Write one plain line."""
        self._heartbeat.spoke()
        self.console.print(text, markup=False)

    @contextmanager
    def working(self, doing: str, total: int | None = None) -> Iterator[Update]:
        """Show work that may take long; yields a function with which the body reports progress.

        A terminal shows a bar. A log file gets a line after ten seconds of silence, and again after
        ten more; shorter work leaves no line.

        Args:
            doing: the work, such as `evaluating batch`; the progress is put behind it.
            total: number of parts; None if unknown.
        """
        with self._showing(work := Work(doing, total)) as show:

            def update(done: int, note: str = "") -> None:
                work.done, work.note = done, note
                show()

            yield update

    @contextmanager
    def _showing(self, work: Work) -> Iterator[Callable[[], None]]:
        """Show work while the body runs; yields a function to call after a change of `work`."""
        if not self._is_main:
            yield lambda: None
        elif self._bars is not None:
            with self._bars.showing(work, stays=work is self._training) as show:
                yield show
        else:
            self._heartbeat.begin(work)
            try:
                yield self._heartbeat.look
            finally:
                self._heartbeat.end(work)
                # Work between two steps, such as an evaluation, belongs to neither of them.
                self._step_started = self._clock()

    @contextmanager
    def training(self, num_steps: int) -> Iterator[None]:
        """Show the training's progress while the body runs: a bar, or a line after each silence."""
        self._num_steps, self._step_started = num_steps, self._clock()
        self._training = Work("step", num_steps, line=self._training_line)
        with self._showing(self._training):
            try:
                yield
            finally:
                self._training = None  # later rows are plain lines: the bar is gone

    def at_step(self, step: int) -> None:
        """Note that an optimizer step is done, whether it is logged or not."""
        if self._training is not None:
            self._training.done, self._step_started = step, self._clock()
            if self._bars is not None:
                self._bars.refresh()

    def _training_line(self, now: float) -> str:
        assert self._training is not None
        seconds, done = now - self._step_started, self._training.done
        line = f"after step {done}/{self._num_steps}"
        if seconds >= 1 and done < self._num_steps:
            line += f", for {seconds:.0f} s in step {done + 1}"
        return line

    @contextmanager
    def loading(
        self, total_bytes: int, total_layers: int, check_in: Callable[[], None] = lambda: None
    ) -> Iterator[Callable[[int, int], None]]:
        """Show the loading of weights; yields a function of the bytes read and the layers filled.

        Args:
            check_in: called after each filled layer, by all ranks alike.
        """
        started = time.perf_counter()
        read = filled = 0
        with self.working("loading layer", total_layers) as update:

            def on_progress(num_bytes: int, num_layers: int) -> None:
                nonlocal read, filled
                if num_layers != filled:
                    check_in()  # a collective: all ranks fill the layers in the same order
                read, filled = num_bytes, num_layers
                update(num_layers, f"{num_bytes // 2**20:,} MiB read by this rank")

            yield on_progress
        seconds = time.perf_counter() - started
        self.log(
            f"base model: this rank read {read / 2**20:,.0f} of {total_bytes / 2**20:,.0f} MiB "
            f"in {seconds:.1f} s"
        )

    @contextmanager
    def preparing(self) -> Iterator[Callable[[str], None]]:
        """Yields a function that shows one status line: live on a terminal, otherwise at most every
        ten seconds."""
        work = Work("reading the data")
        work.line = lambda now: f"{work.doing}, {now - work.started:.0f} s"
        with self._showing(work) as show:

            def show_status(text: str) -> None:
                work.doing = text
                show()

            yield show_status

    @contextmanager
    def quantizing(self, total_bytes: int) -> Iterator[Callable[[int], None]]:
        """Show the progress of `quantize`; yields a function of the bytes done so far."""
        started = time.perf_counter()
        with self.working("quantizing MiB", max(1, total_bytes // 2**20)) as update:

            def on_bytes(num_bytes: int) -> None:
                left = (time.perf_counter() - started) * (total_bytes / max(1, num_bytes) - 1)
                update(num_bytes // 2**20, f"{duration(left)} left")

            yield on_bytes
        seconds = time.perf_counter() - started
        self.log(f"quantized {total_bytes / 2**20:,.0f} MiB in {seconds:.1f} s")

    def step(self, row: StepMetrics, seconds_left: float | None) -> None:
        """Show a logged optimizer step.

        Args:
            seconds_left: expected time until the last step; None if unknown.
        """
        if self._training is not None and self._bars is not None:
            # The time left comes first: a narrow terminal cuts off the end.
            left = [] if seconds_left is None else [f"{duration(seconds_left)} left"]
            measured = step_line(row, self._num_steps, None).partition(" | ")[2]
            self._training.done, self._training.note = row.step, " | ".join([*left, measured])
            self._bars.refresh()
        else:
            self.log(step_line(row, self._num_steps, seconds_left))

    def evaluation(self, row: EvalMetrics) -> None:
        """Show an evaluation."""
        self.log(
            f"eval at step {row.step} | loss {row.eval_loss:.4f} | "
            f"perplexity {row.eval_perplexity:.2f} | "
            f"{row.num_target_tokens:,} target tokens | {row.seconds:.1f} s"
        )


class _Bars:
    """Bars on a terminal, one for each piece of work at hand; only the innermost is visible."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress: Progress | None = None
        self._shown: list[tuple[Work, TaskID]] = []

    @contextmanager
    def showing(self, work: Work, stays: bool) -> Iterator[Callable[[], None]]:
        """Show the bar of `work` while the body runs; yields :meth:`refresh`.

        Args:
            stays: keep the bar's last state on the screen.
        """
        if self._progress is None:
            # One display for all bars: rich refuses a second one while the first is live.
            text = TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True))
            columns = (text, BarColumn(bar_width=24), _Note(), TimeElapsedColumn())
            self._progress = Progress(*columns, console=self._console, transient=not stays)
            self._progress.start()
        progress = self._progress
        for _, outer in self._shown[-1:]:  # none or one
            progress.update(outer, visible=False)
        task = progress.add_task(work.text, total=work.total, note=work.note)
        self._shown.append((work, task))
        try:
            yield self.refresh
        finally:
            self.refresh()
            self._shown.pop()
            for _, outer in self._shown[-1:]:
                progress.remove_task(task)
                progress.update(outer, visible=True)
            if not self._shown:
                progress.stop()
                self._progress = None

    def refresh(self) -> None:
        """Draw the innermost bar anew, after a change of its work."""
        for work, task in self._shown[-1:]:
            assert self._progress is not None
            self._progress.update(task, description=work.text, completed=work.done, note=work.note)


class _Note(ProgressColumn):
    """Column for a bar's note; a narrow terminal cuts off this column and no other."""

    def __init__(self) -> None:
        super().__init__(table_column=Column(no_wrap=False))

    def render(self, task: Task) -> Text:
        return Text(str(task.fields["note"]), no_wrap=True, overflow="ellipsis")


def step_line(row: StepMetrics, num_steps: int, seconds_left: float | None) -> str:
    """Format a logged step as one line of text."""
    left = "" if seconds_left is None else f" | {duration(seconds_left)} left"
    return (
        f"step {row.step}/{num_steps} | loss {row.loss:.4f} | grad {row.grad_norm:.3f} | "
        f"lr {row.lr:.2e} | {row.tokens_per_second:,.0f} tok/s | "
        f"mem {row.peak_memory_gib:.2f} GiB | {row.step_seconds:.2f} s{left}"
    )


def duration(seconds: float) -> str:
    """Format seconds: `75` as `1m15s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"
