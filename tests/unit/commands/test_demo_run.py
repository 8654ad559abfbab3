"""The demo takes as many steps as fit, scales its schedule with them, and prints commands that can be run."""

import shlex
from pathlib import Path

import pytest

from qlora_dist.commands.demo_run import Pace, Training, steps_within
from qlora_dist.config.load import load_config
from qlora_dist.optim.schedule import lr_at


@pytest.mark.parametrize(
    ("seconds", "pace", "expected"),
    [
        (240, Pace(1.5, 40), 40),  # all of them fit
        (240, Pace(9.6, 60), 18),  # (240 - 60) / 9.6
        (240, Pace(60, 100), 8),  # the least that learns something
        (10, Pace(1, 100), 8),
        (600, Pace(9.6, 60), 40),
    ],
)
def test_as_many_steps_as_fit(seconds: float, pace: Pace, expected: int) -> None:
    """Beside what is not a step: starting, loading, evaluating; between 8 and 40."""
    assert steps_within(seconds, pace) == expected


@pytest.mark.parametrize("max_steps", [2, 8, 18, 40])
def test_the_schedule_is_that_of_the_steps(tmp_path: Path, max_steps: int) -> None:
    """Warm-up is the same share of any number of steps, and the last one's learning rate is near zero."""
    for name in ("train.jsonl", "eval.jsonl"):
        (tmp_path / name).touch()
    training = Training(
        tmp_path, "model", (tmp_path / "train.jsonl", tmp_path / "eval.jsonl"), 2, "fsdp"
    )
    words = training.command(str(tmp_path / "run"), max_steps)
    assert words[-2:] == ["train", str(training.config_file)]
    optim = load_config(training.config_file).optim
    assert optim.max_steps == max_steps
    assert optim.warmup_steps == max(1, 3 * max_steps // 40)
    rates = [lr_at(step, max_steps, optim) for step in range(1, max_steps + 1)]
    assert max(rates) == optim.lr
    if max_steps > 8:
        assert rates[-1] < 0.02 * optim.lr
    assert shlex.split(shlex.join(words)) == words
