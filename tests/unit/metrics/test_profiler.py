"""Traces of steps: their place and content, and no cost without a request."""

import gzip
import json
from pathlib import Path

import pytest
import torch

from qlora_dist.metrics.profiler import StepProfiler


class Ear:
    """Collects the lines that a reporter would log."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def log(self, text: str) -> None:
        self.said.append(text)


def run(folder: Path, num_steps: int | None, steps_of_run: int) -> list[str]:
    """Profile steps that each multiply a matrix of another size; return the logged lines."""
    ear = Ear()
    with StepProfiler(folder, num_steps, ear) as profiler:
        for step in range(1, steps_of_run + 1):
            torch.ones(step, 3) @ torch.ones(3, step)
            profiler.step()
    return ear.said


@pytest.mark.parametrize(("num_steps", "steps_of_run", "traced"), [(2, 6, 2), (1, 3, 1), (5, 4, 2)])
def test_the_steps_after_the_first_two_are_traced(
    tmp_path: Path, num_steps: int, steps_of_run: int, traced: int
) -> None:
    """The requested steps, or as many as there were, are traced into one compressed file in
    Chrome's format, under the name that TensorBoard's plugin looks for; one line names the
    folder."""
    said = run(tmp_path / "profile", num_steps, steps_of_run)
    [file] = (tmp_path / "profile").iterdir()
    assert file.name.startswith("rank0.")
    assert file.name.endswith(".pt.trace.json.gz")
    assert said == [
        f"profile written to {tmp_path / 'profile'}: open it at https://ui.perfetto.dev "
        "or in TensorBoard"
    ]
    with gzip.open(file, "rt") as text:
        events = json.load(text)["traceEvents"]
    assert sum(event.get("name") == "aten::mm" for event in events) == traced
    steps = {event["name"] for event in events if event.get("name", "").startswith("ProfilerStep")}
    assert steps >= {f"ProfilerStep#{number}" for number in range(2, 2 + traced)}


def test_a_run_of_two_steps_says_that_there_is_no_trace(tmp_path: Path) -> None:
    """A profile that was requested and not written is mentioned."""
    assert run(tmp_path / "profile", 1, 2) == [
        "nothing was profiled: the run was over before its step 3"
    ]
    assert not (tmp_path / "profile").exists()


def test_nothing_is_traced_unasked(tmp_path: Path) -> None:
    """With null there is no folder, no line and no profiler."""
    assert run(tmp_path / "profile", None, 5) == []
    assert not list(tmp_path.iterdir())
