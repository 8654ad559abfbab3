"""Dynamic loss scaling: keeps gradients within the range of float16.

After mixed precision training (https://arxiv.org/abs/1710.03740, section 3.2): float16 knows
nothing below 6e-8 and nothing above 65,504. The loss is multiplied by a scale before backward, and
the float32 gradients of the adapters are divided by it. The scale is a power of two, so both are
exact. A step whose gradients overflow has changed nothing: it is taken again with half the scale,
and no row is lost.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from qlora_dist.metrics.rows import StepSums
from qlora_dist.run.state import TrainState
from qlora_dist.runtime.processes import Runtime

INITIAL = 2.0**16
LARGEST = 2.0**24
"""Far beyond what any gradient needs, and far from the end of float32."""
GROWTH_INTERVAL = 2000
"""Steps in a row without overflow after which the scale doubles, as in torch.amp."""


class LossScale:
    """Scale of a run that computes in float16; in all other types it stays 1.

    Its value is part of the run's state. Every decision rests on numbers that all ranks agree on,
    so it is the same on all ranks.
    """

    def __init__(self, state: TrainState, runtime: Runtime, log: Callable[[str], None]) -> None:
        self._state, self._runtime, self._say = state, runtime, log
        self._is_on = runtime.compute_dtype == torch.float16
        self._before: float | None = None  # the scale of a repeated step's first attempt
        if self._is_on and state.loss_scale is None:
            state.loss_scale = INITIAL

    @property
    def value(self) -> float:
        """Factor of the loss."""
        return self._state.loss_scale if self._is_on and self._state.loss_scale is not None else 1.0

    def is_to_repeat(self, sums: StepSums) -> bool:
        """Decide if a step is taken again, with half the scale; a collective if it overflowed.

        A smaller scale helps neither a loss that is not finite, nor gradients that overflow at a
        scale of 1. Then the scale goes back to its value before the step, and the step counts as
        skipped, as in all other types.
        """
        if not self._is_on:
            return False
        if sums.is_finite:
            self._count_good_step()
            return False
        before = self.value if self._before is None else self._before
        is_loss_finite = self._runtime.max_over_ranks(float(not sums.loss.isfinite())) == 0
        if is_loss_finite and self.value > 1:
            self._before = before
            self._state.loss_scale, self._state.num_steps_at_scale = self.value / 2, 0
            return True
        self._state.loss_scale, self._before = before, None
        return False

    def _count_good_step(self) -> None:
        state = self._state
        if self._before is not None:
            self._say(
                f"step {state.step + 1}: gradients exceeded float16's range, so the step was taken "
                f"again; loss scale {self._before:,.0f} -> {self.value:,.0f}"
            )
            self._before = None
        state.num_steps_at_scale += 1
        if state.num_steps_at_scale >= GROWTH_INTERVAL and self.value < LARGEST:
            state.loss_scale, state.num_steps_at_scale = self.value * 2, 0
