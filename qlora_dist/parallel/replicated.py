"""A copy of the model on every rank: `single`, and `ddp` with one all-reduce per optimizer step."""

# Tested by tests/distributed/test_equivalence.py and tests/distributed/test_accumulation.py.

from __future__ import annotations

from torch import Tensor

from qlora_dist.model.parts import ModelParts
from qlora_dist.parallel.backend import Backend
from qlora_dist.parallel.engine import Engine, FlatEngine, squared_norm


class Replicated(Backend):
    """Backend in which every rank holds the whole model and takes its part of each batch."""

    def cut(self, parts: ModelParts) -> None:
        """Leave the model whole."""

    def engine(self, parts: ModelParts) -> Engine:
        return ReplicatedEngine(parts, self.config.optim, self.runtime)


class ReplicatedEngine(FlatEngine):
    """Engine that sums flat adapter gradients over ranks, once per optimizer step."""

    can_drop_gradients = True

    def backward(self, loss: Tensor, is_last_micro_batch: bool) -> None:
        (loss * self.loss_scale).backward()

    def _global_norm(self, gradients: list[Tensor]) -> Tensor:
        for gradient in gradients:
            self._runtime.sum_over_ranks(gradient)
        return squared_norm(gradients).sqrt()
