"""What a person sees: a live bar on a terminal, plain lines in a log file, and nothing else."""

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
"""Longest silence about one long piece of work, where there is no terminal to show a bar on."""


class Update(Protocol):
    """Tells how far a piece of work is."""

    def __call__(self, done: int, note: str = "") -> None: ...


class Reporter:
    """Speaks for the run on rank 0; on other ranks it is silent.

    Args:
        interval: seconds of silence after which long work is spoken of; None is ten.
        clock: in seconds.
    """

    def __init__(
        self,
        is_main: bool,
        file: TextIO | None = None,
        interval: float | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.console = Console(
            file=streams.lasting(file or sys.stdout),
            quiet=not is_main,
            highlight=False,
            emoji=False,
            soft_wrap=True,
        )
        self._clock = clock
        self._heartbeat = Heartbeat(
            self.log, _SAY_EVERY_SECONDS if interval is None else interval, clock
        )
        self._bars = _Bars(self.console) if self.console.is_terminal and is_main else None
        self._is_main = is_main
        self._num_steps = 0
        self._training: Work | None = None
        self._step_started = 0.0

    def log(self, text: str) -> None:
        """One plain line."""
        self._heartbeat.spoke()
        self.console.print(text, markup=False)

    @contextmanager
    def working(self, doing: str, total: int | None = None) -> Iterator[Update]:
        """Show that something is being done that may take long; the body may tell how far it is.

        On a terminal a bar shows it. In a log file there is a line after ten seconds in which nothing was said, and
        again after ten more; nothing is written about work that is shorter.

        Args:
            doing: such as `evaluating batch`; how many of `total` are done is put behind it.
        """
        with self._showing(work := Work(doing, total)) as show:

            def update(done: int, note: str = "") -> None:
                work.done, work.note = done, note
                show()

            yield update

    @contextmanager
    def _showing(self, work: Work) -> Iterator[Callable[[], None]]:
        """Show work while the body runs; the body calls what it gets when something about it has changed."""
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
                self._step_started = (
                    self._clock()
                )  # what was done between two steps belongs to none

    @contextmanager
    def training(self, num_steps: int) -> Iterator[None]:
        """Show a live bar while the body runs, or, in a log file, where it stands when it was silent for long."""
        self._num_steps, self._step_started = num_steps, self._clock()
        work = Work("step", num_steps, line=self._training_line)
        self._training = work
        with self._showing(work):
            try:
                yield
            finally:
                self._training = None

    def at_step(self, step: int) -> None:
        """An optimizer step is done, logged or not."""
        if self._training is not None:
            self._training.done, self._step_started = step, self._clock()
            if self._bars is not None:
                self._bars.refresh()

    def _training_line(self, now: float) -> str:
        assert self._training is not None
        seconds, done = now - self._step_started, self._training.done
        within = (
            f", for {seconds:.0f} s in step {done + 1}"
            if seconds >= 1 and done < self._num_steps
            else ""
        )
        return f"after step {done}/{self._num_steps}{within}"

    @contextmanager
    def loading(
        self, total_bytes: int, total_layers: int, check_in: Callable[[], None] = lambda: None
    ) -> Iterator[Callable[[int, int], None]]:
        """Progress of reading weights; the body calls what it gets with the bytes read and layers filled so far.

        Args:
            alive: called whenever another layer is filled, by all ranks alike.
        """
        started = time.perf_counter()
        last = last_layer = 0
        with self.working("loading layer", total_layers) as update:

            def on_progress(num_bytes: int, num_layers: int) -> None:
                nonlocal last, last_layer
                if num_layers != last_layer:
                    check_in()
                last, last_layer = num_bytes, num_layers
                update(num_layers, f"{num_bytes // 2**20:,} MiB read by this rank")

            yield on_progress
        seconds = time.perf_counter() - started
        self.log(
            f"base model: this rank read {last / 2**20:,.0f} of {total_bytes / 2**20:,.0f} MiB in {seconds:.1f} s"
        )

    @contextmanager
    def preparing(self) -> Iterator[Callable[[str], None]]:
        """How far the data are: the body calls what it gets with a line, shown while it is true, or now and then."""
        work = Work("reading the data")

        def line(now: float) -> str:
            return f"{work.doing}, {now - work.started:.0f} s"

        work.line = line
        with self._showing(work) as show:

            def say_now(text: str) -> None:
                work.doing = text
                show()

            yield say_now

    @contextmanager
    def quantizing(self, total_bytes: int) -> Iterator[Callable[[int], None]]:
        """Progress of `quantize`: a bar on a terminal, else a line every ten seconds."""
        started = time.perf_counter()
        with self.working("quantizing MiB", max(1, total_bytes // 2**20)) as update:

            def on_bytes(num_bytes: int) -> None:
                left = (time.perf_counter() - started) * (total_bytes / max(1, num_bytes) - 1)
                update(num_bytes // 2**20, f"{duration(left)} left")

            yield on_bytes
        seconds = time.perf_counter() - started
        self.log(f"quantized {total_bytes / 2**20:,.0f} MiB in {seconds:.1f} s")

    def step(self, row: StepMetrics, seconds_left: float | None) -> None:
        """One logged optimizer step."""
        if self._training is not None and self._bars is not None:
            # What is left comes first: a narrow terminal has no room for all.
            left = [] if seconds_left is None else [f"{duration(seconds_left)} left"]
            self._training.done = row.step
            self._training.note = " | ".join(
                [*left, step_line(row, self._num_steps, None).partition(" | ")[2]]
            )
            self._bars.refresh()
        else:
            self.log(step_line(row, self._num_steps, seconds_left))

    def evaluation(self, row: EvalMetrics) -> None:
        """One evaluation."""
        self.log(
            f"eval at step {row.step} | loss {row.eval_loss:.4f} | perplexity {row.eval_perplexity:.2f} | "
            f"{row.num_target_tokens:,} target tokens | {row.seconds:.1f} s"
        )


class _Bars:
    """A bar for each piece of work that is being done, on a terminal; that of the innermost one is shown."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress: Progress | None = None
        self._shown: list[tuple[Work, TaskID]] = []

    @contextmanager
    def showing(self, work: Work, stays: bool) -> Iterator[Callable[[], None]]:
        """Show this work's bar while the body runs.

        Args:
            stays: its last state stays on the screen.
        """
        if self._progress is None:
            text = TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True))
            columns = (text, BarColumn(bar_width=24), _Note(), TimeElapsedColumn())
            self._progress = Progress(*columns, console=self._console, transient=not stays)
            self._progress.start()
        progress = self._progress
        for _, outer in self._shown[-1:]:
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
        """Something about the innermost work has changed."""
        for work, task in self._shown[-1:]:
            assert self._progress is not None
            self._progress.update(task, description=work.text, completed=work.done, note=work.note)


class _Note(ProgressColumn):
    """More about how far it is, cut off where the terminal is too narrow; the other columns stay whole."""

    def __init__(self) -> None:
        super().__init__(table_column=Column(no_wrap=False))

    def render(self, task: Task) -> Text:
        return Text(str(task.fields["note"]), no_wrap=True, overflow="ellipsis")


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
    return (
        f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"
    )
