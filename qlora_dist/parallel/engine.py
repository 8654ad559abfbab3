"""Engine: backward of one micro-batch and one update; and the common part of two engines."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from qlora_dist.config.schema import OptimConfig
from qlora_dist.model.adapters import whole_adapter
from qlora_dist.model.cpu.pieces import in_pieces
from qlora_dist.model.parts import ModelParts
from qlora_dist.optim.adamw import FlatAdamW
from qlora_dist.runtime.processes import Runtime
from qlora_dist.runtime.shards import whole_shape


class Engine(Protocol):
    """Backward and update of the training loop, as a backend provides them."""

    can_drop_gradients: bool
    """True if a step can begin again after an error in it: no collective is half done then."""
    loss_scale: float
    """Power of two that multiplies a loss before backward; gradients are divided by it again."""

    def backward(self, loss: Tensor, is_last_micro_batch: bool) -> None:
        """Add the gradient of a micro-batch; gradients are summed over ranks at the last one.

        Args:
            loss: 0-dim float32, divided by the target tokens of the global batch already.
        """

    def update(self, lr: float, max_grad_norm: float | None) -> Tensor:
        """Clip, step, clear gradients; a collective that waits for the device.

        Returns:
            0-dim: global gradient norm before clipping. If it is not finite, no rank has updated
            anything.
        """

    def drop_gradients(self) -> None:
        """Forget the gradients since the last update."""

    def whole_adapter(self) -> dict[str, Tensor]:
        """Gather all adapter tensors by parameter name on rank 0, none elsewhere; a collective."""

    def optimizer_state(self) -> dict[str, Tensor]:
        """Gather the optimizer's moments on rank 0, see `Moments.gather`; a collective.

        Call it after the first update.
        """

    def load_optimizer_state(self, saved: Mapping[str, Tensor], num_updates: int) -> None:
        """Load moments that any engine returned, on any number of ranks.

        Args:
            num_updates: updates that made them.
        """


class FlatEngine(ABC):
    """Common part of the engines written here: adapters in flat buffers, one norm, one update."""

    can_drop_gradients = False
    loss_scale = 1.0

    def __init__(self, parts: ModelParts, config: OptimConfig, runtime: Runtime) -> None:
        self._parts = parts
        self._runtime = runtime
        self._optimizer = FlatAdamW(parts.adapters, config)

    def update(self, lr: float, max_grad_norm: float | None) -> Tensor:
        self._optimizer.collect_gradients()
        gradients = self._optimizer.gradients
        norm = (self._global_norm(gradients) / self.loss_scale).float()
        if norm.isfinite():  # waits for the device
            if self.loss_scale != 1:
                torch._foreach_mul_(gradients, 1 / self.loss_scale)
            _clip(gradients, norm, max_grad_norm)
            self._optimizer.step(lr)
        self._optimizer.clear_gradients()
        return norm

    def drop_gradients(self) -> None:
        self._optimizer.clear_gradients()

    @abstractmethod
    def _global_norm(self, gradients: list[Tensor]) -> Tensor:
        """Norm of the whole gradient, 0-dim float64; copies of several ranks are summed first."""

    def whole_adapter(self) -> dict[str, Tensor]:
        return whole_adapter(self._parts.model, self._runtime.is_main)

    def optimizer_state(self) -> dict[str, Tensor]:
        sizes = {name: whole_shape(param).numel() for name, param in self._parts.adapters.items()}
        return self._optimizer.moments(self._runtime.device).gather(sizes)

    def load_optimizer_state(self, saved: Mapping[str, Tensor], num_updates: int) -> None:
        self._optimizer.moments(self._runtime.device).scatter(saved, num_updates)


_CPU_PIECE = 2**17
"""Elements that a CPU squares at a time: their copy in float64, 1 MiB, stays in its cache."""


def squared_norm(gradients: list[Tensor]) -> Tensor:
    """Sum of squares of all gradients, 0-dim float64."""
    # float64, rounded back to float32 later, gives the norm the same bits however the gradient is
    # cut. In float32 clipping would carry the difference into every weight.
    norms = [
        torch.linalg.vector_norm(piece, dtype=torch.float64)
        for gradient in gradients
        for piece in in_pieces(gradient.flatten(), _CPU_PIECE)
    ]
    return (torch.stack(norms) ** 2).sum()


def _clip(gradients: list[Tensor], norm: Tensor, max_norm: float | None) -> None:
    if max_norm is not None:
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)  # as torch's clip_grad_norm_
        for gradient in gradients:
            gradient.mul_(factor.to(gradient.device))
