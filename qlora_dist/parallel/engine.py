"""Engine: one micro-batch's backward and one update, and what the engines written here share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Protocol

import torch

from qlora_dist.config.schema import OptimConfig
from qlora_dist.model.adapters import whole_adapter
from qlora_dist.model.cpu.pieces import in_pieces
from qlora_dist.model.parts import ModelParts
from qlora_dist.optim.adamw import FlatAdamW
from qlora_dist.runtime.processes import Runtime
from qlora_dist.runtime.shards import whole_shape


class Engine(Protocol):
    """What the loop needs from a backend: one micro-batch's backward, and one update."""

    can_drop_gradients: bool
    """Whether a step can be begun again after an error in forward or backward: no collective is half done then."""
    loss_scale: float
    """Factor of a loss before backward, a power of two; norms and gradients are divided by it."""

    def backward(self, loss: torch.Tensor, is_last_micro_batch: bool) -> None:
        """Add the gradient of `loss` (already divided by the global token count); ranks are summed at the last."""

    def update(self, lr: float, max_grad_norm: float | None) -> torch.Tensor:
        """Clip, step, clear gradients; returns the global gradient norm before clipping (0-dim, on the device).

        A norm that is not finite means that nothing was updated, on no rank. Waits for the device.
        """

    def drop_gradients(self) -> None:
        """Forget what backward has added since the last update."""

    def whole_adapter(self) -> dict[str, torch.Tensor]:
        """All adapter tensors by parameter name on rank 0, nothing elsewhere; a collective."""

    def optimizer_state(self) -> dict[str, torch.Tensor]:
        """The optimizer's moments on rank 0, see `Moments.gather`; a collective, after the first update."""

    def load_optimizer_state(self, saved: Mapping[str, torch.Tensor], num_updates: int) -> None:
        """Take up moments that any engine returned, on any number of ranks, after `num_updates` updates."""


class FlatEngine(ABC):
    """What the engines written here share: adapters in flat buffers, one norm, one update."""

    can_drop_gradients = False
    loss_scale = 1.0

    def __init__(self, parts: ModelParts, config: OptimConfig, runtime: Runtime) -> None:
        self._parts = parts
        self._runtime = runtime
        self._optimizer = FlatAdamW(parts.adapters, config)

    def update(self, lr: float, max_grad_norm: float | None) -> torch.Tensor:
        self._optimizer.collect_gradients()
        gradients = self._optimizer.gradients
        norm = (self._global_norm(gradients) / self.loss_scale).float()
        if norm.isfinite():
            if self.loss_scale != 1:
                torch._foreach_mul_(gradients, 1 / self.loss_scale)
            _clip(gradients, norm, max_grad_norm)
            self._optimizer.step(lr)
        self._optimizer.clear_gradients()
        return norm

    def drop_gradients(self) -> None:
        self._optimizer.clear_gradients()

    @abstractmethod
    def _global_norm(self, gradients: list[torch.Tensor]) -> torch.Tensor:
        """Norm of the whole gradient, float64; sums it over ranks first where they hold copies."""

    def whole_adapter(self) -> dict[str, torch.Tensor]:
        return whole_adapter(self._parts.model, self._runtime.is_main)

    def optimizer_state(self) -> dict[str, torch.Tensor]:
        sizes = {name: whole_shape(param).numel() for name, param in self._parts.adapters.items()}
        return self._optimizer.moments(self._runtime.device).gather(sizes)

    def load_optimizer_state(self, saved: Mapping[str, torch.Tensor], num_updates: int) -> None:
        self._optimizer.moments(self._runtime.device).scatter(saved, num_updates)


_CPU_PIECE = 2**17
"""Elements that a CPU squares at a time."""


def squared_norm(gradients: list[torch.Tensor]) -> torch.Tensor:
    """Sum of squares, in float64: rounded back to float32, the norm then has the same bits however the gradient is cut.
    In float32 it would not, and clipping would carry the difference into every weight. A CPU makes a copy in float64 of
    what it is given: in pieces, this stays in its cache."""
    norms = [
        torch.linalg.vector_norm(piece, dtype=torch.float64)
        for gradient in gradients
        for piece in in_pieces(gradient.flatten(), _CPU_PIECE)
    ]
    return (torch.stack(norms) ** 2).sum()


def _clip(gradients: list[torch.Tensor], norm: torch.Tensor, max_norm: float | None) -> None:
    if max_norm is not None:
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for gradient in gradients:
            gradient.mul_(factor.to(gradient.device))
