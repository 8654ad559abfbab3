"""Position of a run, and identity of its base model, data, adapter and settings."""

# Tested by tests/distributed/test_resume.py. A run that goes on with another world size takes its
# position from here, and cuts its tensors anew in optim/moments.py and model/adapters.py.

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any


@dataclass
class TrainState:
    """Position of a run: everything besides tensors that a checkpoint must keep.

    Random generators have no state to keep: dropout is seeded by the position of each micro-batch
    in the stream of samples, and the order of samples by the epoch.
    """

    step: int = 0
    """Optimizer steps done."""
    num_samples_seen: int = 0
    """Position in the stream of samples."""
    num_skipped_steps: int = 0
    """Steps that updated nothing because the gradient was not finite."""
    num_skipped_in_a_row: int = 0
    evaluated_step: int | None = None
    """Step after which the last evaluation ran."""
    best_eval_loss: float | None = None
    best_step: int | None = None
    loss_scale: float | None = None
    """Factor of the loss before backward, see `loss_scale.py`; None before the first step."""
    num_steps_at_scale: int = 0
    """Steps in a row that `loss_scale` held for."""

    @property
    def num_updates(self) -> int:
        """Steps that updated the adapters."""
        return self.step - self.num_skipped_steps

    def count_step(self, num_samples_seen: int, is_finite: bool) -> None:
        """Count one optimizer step, which updated nothing if its gradient was not finite."""
        self.step += 1
        self.num_samples_seen = num_samples_seen
        self.num_skipped_steps += not is_finite
        self.num_skipped_in_a_row = 0 if is_finite else self.num_skipped_in_a_row + 1

    def count_evaluation(self, eval_loss: float) -> None:
        """Record an evaluation after the current step, and keep it if it is the best so far."""
        self.evaluated_step = self.step
        best = math.inf if self.best_eval_loss is None else self.best_eval_loss
        if eval_loss < best:  # never true of inf and NaN
            self.best_eval_loss, self.best_step = eval_loss, self.step


@dataclass(frozen=True)
class RunIdentity:
    """Base model, data, adapter and settings that a checkpoint belongs to.

    With any other of them, going on would not continue the same training.
    """

    base: str
    """Fingerprint of the base model's files."""
    data: str
    """Fingerprint of the tokenized training samples, in order."""
    adapter: dict[str, str]
    """Shapes of the adapter's tensors."""
    settings: dict[str, Any]
    """The settings that tell one run from another."""

    def differences(self, other: RunIdentity, with_settings: bool) -> list[str]:
        """Return the differences of `other` in words; empty if it can go on from here."""
        found = []
        if self.base != other.base:
            found.append("the base model is another one (its files differ)")
        if self.data != other.data:
            found.append("the training data are other ones (rows, tokenizer or template differ)")
        shapes = {
            name: (mine, theirs)
            for name in sorted(self.adapter.keys() | other.adapter.keys())
            if (mine := self.adapter.get(name)) != (theirs := other.adapter.get(name))
        }
        if shapes:
            name, (mine, theirs) = next(iter(shapes.items()))
            found.append(
                f"the adapter has other tensors ({len(shapes)} differ, such as {name}: {mine} "
                f"there, {theirs} now)"
            )
        if with_settings:
            found += [
                f"{key}: {self.settings.get(key)!r} there, {value!r} now"
                for key, value in other.settings.items()
                if self.settings.get(key) != value
            ]
        return found
