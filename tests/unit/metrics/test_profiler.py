"""Traces of steps: where they are, what is in them, and that nobody pays for them who has not asked."""

import gzip
import json
from pathlib import Path

import pytest
import torch

from qlora_dist.metrics.profiler import StepProfiler


class Ear:
    """Hears what a reporter would say."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def log(self, text: str) -> None:
        self.said.append(text)


def run(folder: Path, num_steps: int | None, steps_of_run: int) -> list[str]:
    """Steps that each multiply a matrix of another size; returns what was said."""
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
    """As many as were asked for, or as there were; one compressed file in Chrome's format, under the name that
    TensorBoard's plugin looks for; one line says where."""
    said = run(tmp_path / "profile", num_steps, steps_of_run)
    [file] = (tmp_path / "profile").iterdir()
    assert file.name.startswith("rank0.")
    assert file.name.endswith(".pt.trace.json.gz")
    assert said == [
        f"profile written to {tmp_path / 'profile'}: open it at https://ui.perfetto.dev or in TensorBoard"
    ]
    with gzip.open(file, "rt") as text:
        events = json.load(text)["traceEvents"]
    assert sum(event.get("name") == "aten::mm" for event in events) == traced
    steps = {event["name"] for event in events if event.get("name", "").startswith("ProfilerStep")}
    assert steps >= {f"ProfilerStep#{number}" for number in range(2, 2 + traced)}


def test_a_run_of_two_steps_says_that_there_is_no_trace(tmp_path: Path) -> None:
    """A setting that had no effect does not pass in silence."""
    assert run(tmp_path / "profile", 1, 2) == [
        "nothing was profiled: the run was over before its step 3"
    ]
    assert not (tmp_path / "profile").exists()


def test_nothing_is_traced_unasked(tmp_path: Path) -> None:
    """With null, no folder, no line, no profiler."""
    assert run(tmp_path / "profile", None, 5) == []
    assert not list(tmp_path.iterdir())
