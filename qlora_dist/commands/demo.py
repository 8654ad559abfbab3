"""Command `demo`: from a small real model to a trained adapter, on this machine."""

# Tested by tests/unit/test_cli.py and tests/unit/commands/test_demo_run.py.

from __future__ import annotations

from dataclasses import dataclass

from qlora_dist.commands.startup import parse, quiet_third_parties
from qlora_dist.errors import ConfigError


@dataclass(frozen=True)
class Options:
    """Fine-tune a real 135M chat model on this machine, in a few minutes, and show the result."""

    output_dir: str = "runs/demo"
    """Folder of the run."""
    model: str | None = None
    """Another chat model to use: a folder or hub name."""
    minutes: float = 4.0
    """Time to train, evaluations included: as many steps as fit, but at least 8 and at most 40."""
    max_steps: int | None = None
    """Take this many optimizer steps, however long they take."""


def main(argv: list[str]) -> None:
    """Fine-tune a small real model and show what it learned."""
    options = parse(Options, argv, "qlora-dist demo")
    if options.max_steps is not None and options.max_steps < 1:
        raise ConfigError(f"--max_steps is {options.max_steps}, but must be at least 1.")
    if not 0 < options.minutes < float("inf"):
        raise ConfigError(f"--minutes is {options.minutes:g}, but must be a number greater than 0.")
    quiet_third_parties()
    from qlora_dist.commands.demo_run import demo

    demo(**vars(options))
