"""The demo takes as many steps as fit, with a schedule of that length, by a usable command."""

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
        (240, Pace(60, 100), 8),  # fewer would learn nothing
        (10, Pace(1, 100), 8),
        (600, Pace(9.6, 60), 40),
    ],
)
def test_as_many_steps_as_fit(seconds: float, pace: Pace, expected: int) -> None:
    """The time left after starting, loading and evaluating is filled with 8 to 40 steps."""
    assert steps_within(seconds, pace) == expected


@pytest.mark.parametrize("max_steps", [2, 8, 18, 40])
def test_the_schedule_is_that_of_the_steps(tmp_path: Path, max_steps: int) -> None:
    """Warm-up is a fixed share of any number of steps; the last learning rate is near zero."""
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
