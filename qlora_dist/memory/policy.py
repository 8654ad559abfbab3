"""Which layers recompute what in backward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Policy = Literal["none", "selective", "full"]
"""What a layer recomputes in backward: nothing, what is quick (see `selective.py`), or all of it from its input."""


@dataclass(frozen=True)
class Recompute:
    """How the decoder layers get what backward needs: the first ones `full`, the next `selective`, the rest `none`.

    The first layers recompute most, because what they keep lives longest.
    """

    num_layers: int
    num_selective: int = 0
    num_full: int = 0

    def policy(self, number: int) -> Policy:
        """What layer `number`, from 0, does."""
        if number < self.num_full:
            return "full"
        return "selective" if number < self.num_full + self.num_selective else "none"

    def __str__(self) -> str:
        return (
            f"{self.num_selective} of {self.num_layers} layers selectively, {self.num_full} fully"
        )


def fixed_recompute(setting: str | int, num_layers: int) -> Recompute:
    """What `memory.recompute` stands for; of `auto`, what a run begins with before the memory is known."""
    if isinstance(setting, int):
        return Recompute(num_layers, num_full=min(setting, num_layers))
    if setting == "none":
        return Recompute(num_layers)
    return (
        Recompute(num_layers, num_layers)
        if setting == "selective"
        else Recompute(num_layers, 0, num_layers)
    )
