"""Console output, on terminals and in log files."""

import re
import threading
import time
from io import StringIO

import pytest

from qlora_dist.metrics.console import Reporter, duration, step_line
from qlora_dist.metrics.rows import EvalMetrics, StepMetrics

STEP = StepMetrics(
    step=120,
    loss=1.23449,
    grad_norm=0.4321,
    lr=1.8e-4,
    num_tokens=4100,
    num_target_tokens=900,
    tokens_per_second=5119.6,
    target_tokens_per_second=500.0,
    step_seconds=0.8149,
    data_wait_seconds=0.0,
    peak_memory_gib=21.4,
    mfu=None,
    epoch=0.5,
    num_skipped_steps=0,
)
EVAL = EvalMetrics(
    step=120,
    eval_loss=0.5,
    eval_perplexity=1.64872,
    num_target_tokens=12345,
    seconds=2.04,
    epoch=0.5,
)
STEP_TEXT = (
    "step 120/1000 | loss 1.2345 | grad 0.432 | lr 1.80e-04 | 5,120 tok/s | mem 21.40 GiB | 0.81 s"
)
EVAL_TEXT = "eval at step 120 | loss 0.5000 | perplexity 1.65 | 12,345 target tokens | 2.0 s"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (0.4, "0s"),
        (59.4, "59s"),
        (59.6, "1m00s"),
        (75, "1m15s"),
        (3599.4, "59m59s"),
        (3599.6, "1h00m"),
        (3660, "1h01m"),
        (360_000, "100h00m"),
    ],
)
def test_duration(seconds: float, text: str) -> None:
    """A duration has its two largest units, with rounding carried over: never 60 seconds, never 60
    minutes."""
    assert duration(seconds) == text


def test_a_logged_step_is_one_line() -> None:
    """A logged step is one line with all figures, their units, and the time left if it is known."""
    assert step_line(STEP, 1000, None) == STEP_TEXT
    assert step_line(STEP, 1000, 75.0) == f"{STEP_TEXT} | 1m15s left"


def report(reporter: Reporter) -> None:
    """Log a line of each kind."""
    reporter.log("hello")
    with reporter.loading(total_bytes=2**21, total_layers=4) as on_progress:
        on_progress(2**19, 1)
        on_progress(2**20, 4)
    with reporter.training(1000):
        reporter.step(STEP, None)
        reporter.evaluation(EVAL)


def test_plain_lines_where_there_is_no_terminal() -> None:
    """A log file has complete lines, in order, without a control character."""
    out = StringIO()
    report(Reporter(True, file=out))
    hello, loading, step, evaluation = out.getvalue().splitlines()
    assert hello == "hello"
    assert re.fullmatch(r"base model: this rank read 1 of 2 MiB in \d+\.\d s", loading)
    assert (step, evaluation) == (STEP_TEXT, EVAL_TEXT)
    assert "\x1b" not in out.getvalue()


def test_other_ranks_are_silent(capfd: pytest.CaptureFixture[str]) -> None:
    """A rank other than 0 writes nothing, neither to its file nor to the standard streams."""
    out = StringIO()
    report(Reporter(False, file=out))
    report(Reporter(False))
    assert out.getvalue() == ""
    assert capfd.readouterr() == ("", "")


def test_text_is_shown_as_it_is() -> None:
    """Brackets are not markup, and a long line stays one line."""
    out = StringIO()
    text = "[bold]rows[0][/bold] " + "x" * 300
    Reporter(True, file=out).log(text)
    assert out.getvalue() == text + "\n"


class Terminal(StringIO):
    """A file that claims to be a terminal."""

    def isatty(self) -> bool:
        return True


def test_a_live_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal layers and steps move a bar instead of adding lines; an evaluation is a line of
    its own."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    out = Terminal()
    reporter = Reporter(True, file=out)
    report(reporter)
    assert "\x1b[" in out.getvalue()
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue())
    assert "loading layer 4/4 ━" in plain
    assert "step 120/1000 ━" in plain
    assert "loss 1.2345 | grad 0.432" in plain
    assert STEP_TEXT not in plain
    assert EVAL_TEXT in plain
    reporter.step(STEP, None)  # the bar has gone with the training
    assert out.getvalue().endswith(STEP_TEXT + "\n")


def test_brackets_and_colons_are_printed_as_they_are() -> None:
    """Code such as `x[:100:]` is neither markup nor emoji."""
    out = StringIO()
    Reporter(is_main=True, file=out).log("x[:100:]")
    assert out.getvalue() == "x[:100:]\n"


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def reporter_at(out: StringIO, is_main: bool = True) -> tuple[Reporter, Clock]:
    """A reporter for a log file, and its clock."""
    clock = Clock()
    return Reporter(is_main, file=out, interval=10, clock=clock), clock


def test_short_work_leaves_no_line() -> None:
    """Work of less than ten seconds leaves no line, with or without reported progress."""
    out = StringIO()
    reporter, clock = reporter_at(out)
    with reporter.working("evaluating batch", total=4) as update:
        for number in range(1, 5):
            clock.now += 2.4
            update(number)
    with reporter.training(4):
        clock.now += 9.9
        reporter.at_step(1)
        reporter._heartbeat.look()
    assert out.getvalue() == ""


def test_long_work_says_how_far_it_is() -> None:
    """Long work has a line every ten seconds, not more, with its progress and its duration."""
    out = StringIO()
    reporter, clock = reporter_at(out)
    with reporter.working("evaluating batch", total=100) as update:
        for number in range(1, 101):
            clock.now += 0.25
            update(number)
    with reporter.working("loading layer", total=3) as update:
        clock.now += 11
        update(2, "7 MiB read by this rank")
    assert out.getvalue().splitlines() == [
        "evaluating batch 40/100, 10 s",
        "evaluating batch 80/100, 20 s",
        "loading layer 2/3, 7 MiB read by this rank, 11 s",
    ]


def test_one_long_call_is_spoken_of_by_a_thread() -> None:
    """A thread logs work that never reports progress; it lives no longer than the work."""
    out = StringIO()
    num_threads = threading.active_count()
    reporter = Reporter(True, file=out, interval=0.2)
    with reporter.working("converting"):
        time.sleep(1.1)
    assert threading.active_count() == num_threads
    lines = out.getvalue().splitlines()
    assert 3 <= len(lines) <= 5
    assert set(lines) <= {"still converting, 0 s", "still converting, 1 s"}


def test_every_line_counts_as_a_sign_of_life() -> None:
    """Ten seconds count from the last line of any origin; the line is about the innermost work."""
    out = StringIO()
    reporter, clock = reporter_at(out)
    with reporter.working("preparing the run"):
        clock.now = 9
        reporter.log("a line")
        with reporter.working("fetching a model"):
            clock.now = 18.5
            reporter._heartbeat.look()
            clock.now = 19
            reporter._heartbeat.look()
        clock.now = 29
        reporter._heartbeat.look()
    assert out.getvalue().splitlines() == [
        "a line",
        "still fetching a model, 10 s",
        "still preparing the run, 29 s",
    ]


def test_steps_that_are_long_or_seldom_logged() -> None:
    """The line names the last finished step and the duration of the next one so far."""
    out = StringIO()
    reporter, clock = reporter_at(out)
    with reporter.training(1000):
        clock.now = 12
        reporter._heartbeat.look()
        for step in range(1, 121):
            reporter.at_step(step)
        with reporter.working("evaluating batch", total=4):
            clock.now = 15
        clock.now = 21
        reporter.log("a line")
        clock.now = 31
        reporter._heartbeat.look()
        clock.now = 32.4
        reporter.at_step(121)
        clock.now = 41
        reporter.at_step(122)
        reporter._heartbeat.look()
        reporter.step(STEP, None)
        clock.now = 50.9
        reporter._heartbeat.look()
        clock.now = 51
        reporter._heartbeat.look()
    assert out.getvalue().splitlines() == [
        "after step 0/1000, for 12 s in step 1",
        "a line",
        "after step 120/1000, for 16 s in step 121",
        "after step 122/1000",
        STEP_TEXT,
        "after step 122/1000, for 10 s in step 123",
    ]


def test_other_ranks_say_nothing_of_long_work() -> None:
    """Ranks other than 0 log no long work, and start no thread for it."""
    out = StringIO()
    reporter, clock = reporter_at(out, is_main=False)
    num_threads = threading.active_count()
    with reporter.working("evaluating batch", total=4) as update:
        assert threading.active_count() == num_threads
        clock.now = 60
        update(1)
    assert out.getvalue() == ""


def test_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """On 80 columns the step stays whole and its note is cut off; there is one line at a time."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    out = Terminal()
    reporter = Reporter(True, file=out)
    with reporter.training(1000):
        reporter.step(STEP, 75.0)
        with reporter.working("evaluating batch", total=4):
            pass
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue())
    last = plain.rstrip("\n").splitlines()[-1].rpartition("\r")[2]
    assert last.startswith("step 120/1000 ")
    assert "1m15s left | loss 1.2345 | " in last
    assert "evaluating batch 0/4" in plain
    assert len(last) <= 80
