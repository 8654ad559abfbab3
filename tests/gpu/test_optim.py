"""Optimizers on the GPU, paged ones included."""

import pytest
import torch
from torch import nn

from benchmarks.gpu_parts.optimizers import paged
from qlora_dist.config.schema import OptimConfig
from qlora_dist.optim.adamw import FlatAdamW


@pytest.mark.parametrize("name", ["paged_adamw_8bit", "paged_adamw_32bit"])
def test_a_paged_optimizer_computes_what_the_unpaged_one_does(
    name: str, device: torch.device
) -> None:
    """Parameters and state have equal bits after three steps, and the state really is paged."""
    row = paged()[name]
    assert row["is_paged"]
    assert row["same_parameters"]
    assert row["same_state"]
    assert row["moved"] > 1e-3


@pytest.mark.parametrize(
    "optimizer", ["adamw", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"]
)
def test_state_that_is_saved_and_taken_up_goes_on_bit_for_bit(
    optimizer: str, device: torch.device
) -> None:
    """Two steps, a gather, a scatter into a new optimizer and a third step equal three steps."""
    sizes = {"a.lora_A.w": (300, 400), "a.lora_B.w": (70, 90)}
    config = OptimConfig(optimizer=optimizer, lr=1e-2)  # type: ignore[arg-type]
    generator = torch.Generator(device).manual_seed(0)

    def start(values: dict[str, torch.Tensor]) -> tuple[dict[str, nn.Parameter], FlatAdamW]:
        params = {name: nn.Parameter(value.clone()) for name, value in values.items()}
        return params, FlatAdamW(params, config)

    def step(
        params: dict[str, nn.Parameter], flat: FlatAdamW, gradients: dict[str, torch.Tensor]
    ) -> None:
        for name, param in params.items():
            param.grad.copy_(gradients[name])
        flat.step(config.lr)

    first, *gradients = (
        {
            name: torch.randn(size, generator=generator, device=device)
            for name, size in sizes.items()
        }
        for _ in range(4)
    )
    whole, whole_flat = start(first)
    for one in gradients[:2]:
        step(whole, whole_flat, one)
    saved = whole_flat.moments(device).gather(
        {name: param.numel() for name, param in whole.items()}
    )
    again, again_flat = start({name: param.detach() for name, param in whole.items()})
    again_flat.moments(device).scatter(saved, 2)
    step(whole, whole_flat, gradients[2])
    step(again, again_flat, gradients[2])
    for name, param in whole.items():
        assert torch.equal(again[name], param), name
        assert not torch.equal(param, first[name])


def test_gathering_state_takes_no_memory_on_the_gpu(device: torch.device) -> None:
    """Gathering 8-bit state of 50 million elements takes less than a MiB of GPU memory.

    The parameters have a million elements each.
    """
    config = OptimConfig(optimizer="adamw_8bit")
    params = {
        str(number): nn.Parameter(torch.zeros(1000, 1000, device=device)) for number in range(50)
    }
    flat = FlatAdamW(params, config)
    for gradient in flat.gradients:
        gradient.normal_()
    flat.step(config.lr)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    held = torch.cuda.memory_allocated(device)
    saved = flat.moments(device).gather({name: param.numel() for name, param in params.items()})
    assert torch.cuda.max_memory_allocated(device) - held < 2**20
    assert sum(tensor.nbytes for tensor in saved.values()) <= 2.1 * 50e6
    assert {tensor.device.type for tensor in saved.values()} == {"cpu"}
