"""Offloading on a GPU keeps the bits of training and takes less memory."""

from pathlib import Path

import pytest
import torch

from qlora_dist.memory.offload import CopyStream, Offload
from qlora_dist.memory.policy import Recompute
from qlora_dist.memory.recompute import set_recompute
from qlora_dist.model.parts import ModelParts, decoder_layers
from qlora_dist.runtime.processes import start_runtime
from tests.support.adapted import build_adapted
from tests.unit.memory.test_selective import loss_and_gradient

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="copies between GPU and host need a GPU"
)

LENGTH = 8192  # a layer's input takes 2 MiB in float32, above the least size that is offloaded
CHOICES = [Recompute(3), Recompute(3, 3), Recompute(3, 0, 3), Recompute(3, 1, 1)]


def measured(model, runtime) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Loss, gradient, and peak of allocated bytes."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    loss, gradient = loss_and_gradient(model, runtime, LENGTH // 2)
    torch.cuda.synchronize()
    return loss, gradient, torch.cuda.max_memory_allocated()


@pytest.mark.parametrize("choice", CHOICES)
def test_offloading_keeps_the_bits_and_takes_less(tiny_llama: Path, choice: Recompute) -> None:
    """Every policy keeps the bits over several steps that reuse host memory.

    With everything kept, the peak falls.
    """
    runtime = start_runtime(seed=0, dtype="float32")
    # eager, because SDPA's backward adds in any order
    model = build_adapted(tiny_llama, runtime, dropout=0.1, attention="eager")
    set_recompute(ModelParts(model).layers, choice)
    loss_and_gradient(model, runtime, LENGTH // 2)
    loss, gradient, peak = measured(model, runtime)
    offload = Offload(CopyStream())
    for layer in decoder_layers(model):
        layer.forward._offload = offload
    for _ in range(3):
        found_loss, found_gradient, found_peak = measured(model, runtime)
        assert torch.equal(found_loss, loss)
        assert torch.equal(found_gradient, gradient)
    if choice == Recompute(3):
        assert found_peak < peak
