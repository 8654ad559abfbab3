"""Output to a terminal or pipe whose reader is gone."""

import os
from pathlib import Path

import pytest

from qlora_dist.metrics import streams
from qlora_dist.metrics.console import Reporter
from qlora_dist.metrics.rows import EvalMetrics

EVAL = EvalMetrics(
    step=1, eval_loss=0.5, eval_perplexity=1.6, num_target_tokens=9, seconds=2.0, epoch=0.5
)


def test_a_pipe_without_a_reader() -> None:
    """A reporter goes on when its reader has gone; so does every other writer to that stream."""
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as file:
        reporter = Reporter(True, file=file)
        reporter.log("hello")
        reporter.evaluation(EVAL)
        assert os.path.samefile(f"/proc/self/fd/{writing}", os.devnull)
        file.write("a library's words")


def test_a_terminal_that_was_closed() -> None:
    """A reporter goes on after its terminal was closed, whose writes fail with another error."""
    terminal, end = os.openpty()
    os.close(terminal)
    with os.fdopen(end, "w") as file:
        streams.write(file, "hello\n")
        streams.lasting(file).write("hello\n")
        assert os.path.samefile(f"/proc/self/fd/{end}", os.devnull)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_disk_that_is_full() -> None:
    """Lines are lost while the disk is full, and the file stays in place: there may be space
    later."""
    file = open("/dev/full", "w")  # noqa: SIM115 - closing it fails
    Reporter(True, file=file).log("hello")
    assert os.path.samefile(f"/proc/self/fd/{file.fileno()}", "/dev/full")
    os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())
    file.close()


def test_other_errors_are_raised() -> None:
    """Errors of other kinds than the operating system's are raised."""
    reading, writing = os.pipe()
    os.close(reading)
    file = os.fdopen(writing, "w")
    file.close()
    with pytest.raises(ValueError, match="closed file"):
        streams.write(file, "hello")
