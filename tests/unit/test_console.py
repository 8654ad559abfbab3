"""What a person sees."""

import re
from io import StringIO

import pytest

from qlora_dist.console import Reporter, duration, step_line
from qlora_dist.metrics import EvalMetrics, StepMetrics

STEP = StepMetrics(
    step=120, loss=1.23449, grad_norm=0.4321, lr=1.8e-4, num_tokens=4100, num_target_tokens=900,
    tokens_per_second=5119.6, target_tokens_per_second=500.0, step_seconds=0.8149, data_wait_seconds=0.0,
    peak_memory_gib=21.4, mfu=None, epoch=0.5, num_skipped_steps=0,
)  # fmt: skip
EVAL = EvalMetrics(step=120, eval_loss=0.5, eval_perplexity=1.64872, num_target_tokens=12345, seconds=2.04, epoch=0.5)
STEP_TEXT = "step 120/1000 | loss 1.2345 | grad 0.432 | lr 1.80e-04 | 5,120 tok/s | mem 21.40 GiB | 0.81 s"
EVAL_TEXT = "eval at step 120 | loss 0.5000 | perplexity 1.65 | 12,345 target tokens | 2.0 s"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"), (0.4, "0s"), (59.4, "59s"), (59.6, "1m00s"), (75, "1m15s"), (3599.4, "59m59s"),
        (3599.6, "1h00m"), (3660, "1h01m"), (360_000, "100h00m"),
    ],
)  # fmt: skip
def test_duration(seconds: float, text: str) -> None:
    """The two largest units, with rounding carried over: never 60 seconds, never 60 minutes."""
    assert duration(seconds) == text


def test_a_logged_step_is_one_line() -> None:
    """All figures with their units, and the time left where it is known."""
    assert step_line(STEP, 1000, None) == STEP_TEXT
    assert step_line(STEP, 1000, 75.0) == f"{STEP_TEXT} | 1m15s left"


def report(reporter: Reporter) -> None:
    """Say one thing of each kind."""
    reporter.say("hello")
    with reporter.loading(total_bytes=2**21, total_layers=4) as on_progress:
        on_progress(2**19, 1)
        on_progress(2**20, 4)
    with reporter.training(1000):
        reporter.step(STEP, None)
        reporter.evaluation(EVAL)


def test_plain_lines_where_there_is_no_terminal() -> None:
    """In a log file: complete lines, in order, without a control character."""
    out = StringIO()
    report(Reporter(True, file=out))
    hello, loading, step, evaluation = out.getvalue().splitlines()
    assert hello == "hello"
    assert re.fullmatch(r"base model: this rank read 1 of 2 MiB in \d+\.\d s", loading)
    assert (step, evaluation) == (STEP_TEXT, EVAL_TEXT)
    assert "\x1b" not in out.getvalue()


def test_other_ranks_are_silent(capfd: pytest.CaptureFixture[str]) -> None:
    """A rank other than 0 says nothing, neither to its file nor to the standard streams."""
    out = StringIO()
    report(Reporter(False, file=out))
    report(Reporter(False))
    assert out.getvalue() == ""
    assert capfd.readouterr() == ("", "")


def test_text_is_shown_as_it_is() -> None:
    """Brackets are not markup, and a long line stays one line."""
    out = StringIO()
    text = "[bold]rows[0][/bold] " + "x" * 300
    Reporter(True, file=out).say(text)
    assert out.getvalue() == text + "\n"


class Terminal(StringIO):
    """A file that claims to be a terminal."""

    def isatty(self) -> bool:
        return True


def test_a_live_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal layers and steps move a bar instead of adding lines; an evaluation is a line of its own."""
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
    Reporter(is_main=True, file=out).say("x[:100:]")
    assert out.getvalue() == "x[:100:]\n"
