"""Learning rate as a function of the step."""

# Tested by tests/unit/optim/test_adamw.py.

from __future__ import annotations

import math
from collections.abc import Callable

from qlora_dist.config.schema import OptimConfig
from qlora_dist.errors import ConfigError

SCHEDULES: dict[str, Callable[[float], float]] = {
    "linear": lambda progress: 1 - progress,
    "cosine": lambda progress: (1 + math.cos(math.pi * progress)) / 2,
    "constant": lambda progress: 1.0,
}
"""By `optim.schedule`: the share of `optim.lr`, as a function of the share of the steps after
warm-up that are done."""


def lr_at(step: int, num_steps: int, config: OptimConfig) -> float:
    """Learning rate of optimizer step `step`, counted from 1.

    Linear warm-up over w steps reaches `optim.lr` at step w + 1. After that the rate is constant,
    or falls linearly or along a half cosine (SGDR, https://arxiv.org/abs/1608.03983, eq. 5) to zero
    just after the last step.
    """
    warmup = warmup_steps(num_steps, config)
    if step <= warmup:
        return config.lr * step / (warmup + 1)
    # 0 at the first full-rate step, below 1 at the last.
    progress = (step - 1 - warmup) / max(1, num_steps - warmup)
    return config.lr * SCHEDULES[config.schedule](progress)


def warmup_steps(num_steps: int, config: OptimConfig) -> int:
    """Number of warm-up steps of a run of `num_steps`."""
    if config.warmup_steps is not None:
        return config.warmup_steps
    # 1e-9 more, because 100 * 0.29 is 28.999999999999996.
    return int(num_steps * (config.warmup_ratio or 0.0) + 1e-9)


def check_warmup(num_steps: int, config: OptimConfig) -> None:
    """Refuse a warm-up that is as long as the run or longer.

    Raises:
        ConfigError: `optim.lr` would never be reached.
    """
    if warmup_steps(num_steps, config) >= num_steps:
        raise ConfigError(
            f"optim.warmup_steps is {config.warmup_steps}, but the run has {num_steps} steps: "
            "the learning rate would never reach optim.lr. Shorten the warm-up."
        )
