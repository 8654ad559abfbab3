"""Recomputation policies: what each decoder layer computes again in backward."""

# Tested by tests/unit/memory/test_activations.py and tests/distributed/test_recompute.py.

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Policy = Literal["none", "selective", "full"]
"""Recomputation of a layer in backward: none, the quick operations (see `selective.py`), or all."""


@dataclass(frozen=True)
class Recompute:
    """Policies of the decoder layers: the first ones `full`, the next `selective`, the rest `none`.

    The first layers recompute most, because their saved tensors live longest.
    """

    num_layers: int
    num_selective: int = 0
    num_full: int = 0

    def policy(self, number: int) -> Policy:
        """Return the policy of layer `number`, counted from 0."""
        if number < self.num_full:
            return "full"
        return "selective" if number < self.num_full + self.num_selective else "none"

    def __str__(self) -> str:
        selective = f"{self.num_selective} of {self.num_layers} layers selectively"
        return f"{selective}, {self.num_full} fully"


def fixed_recompute(setting: str | int, num_layers: int) -> Recompute:
    """Translate `memory.recompute` into policies; `auto` begins with all layers `full`."""
    if isinstance(setting, int):
        return Recompute(num_layers, num_full=min(setting, num_layers))
    if setting == "none":
        return Recompute(num_layers)
    if setting == "selective":
        return Recompute(num_layers, num_selective=num_layers)
    return Recompute(num_layers, num_full=num_layers)
