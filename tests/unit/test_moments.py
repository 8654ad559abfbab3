"""Adam's moments survive being gathered, saved and cut anew."""

import pytest
import torch
from torch import nn

from qlora_dist.config import OptimConfig
from qlora_dist.moments import Moments, Piece
from qlora_dist.optim import FlatAdamW, build_optimizer

SIZES = {"a": (80, 100), "b": (100, 30), "c": (70, 3)}
CPU = torch.device("cpu")


def trained(optimizer: str, seed: int = 0, num_updates: int = 5) -> tuple[FlatAdamW, dict[str, nn.Parameter]]:
    """An optimizer over three parameters after some updates with random gradients."""
    generator = torch.Generator().manual_seed(seed)
    params = {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in SIZES.items()}
    flat = FlatAdamW(params, OptimConfig(optimizer=optimizer))
    for _ in range(num_updates):
        update(flat, generator)
    return flat, params


def update(flat: FlatAdamW, generator: torch.Generator) -> None:
    for gradient in flat.gradients:
        gradient.copy_(torch.randn(gradient.shape, generator=generator))
    flat.step(lr=1e-2)
    flat.clear_gradients()


def whole(flat: FlatAdamW) -> dict[str, torch.Tensor]:
    return flat.moments(CPU).gather({name: shape[0] * shape[1] for name, shape in SIZES.items()})


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"])
def test_what_was_saved_goes_on_bit_for_bit(optimizer: str) -> None:
    """An optimizer that takes up saved moments makes the same updates as the one that was saved."""
    first, params = trained(optimizer)
    second, copies = trained(optimizer, seed=1, num_updates=0)
    for name, param in params.items():
        copies[name].data.copy_(param.data)
    second.moments(CPU).scatter(whole(first), num_updates=5)
    for seed in (7, 8):
        update(first, torch.Generator().manual_seed(seed))
        update(second, torch.Generator().manual_seed(seed))
    for name, param in params.items():
        assert torch.equal(param, copies[name]), name
    assert {name: tensor.tolist() for name, tensor in whole(first).items()} == {
        name: tensor.tolist() for name, tensor in whole(second).items()
    }


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_moments_are_found_in_any_layout(optimizer: str) -> None:
    """Moments that were gathered from one buffer, scattered over two ranks' worth of buffers in another order and
    gathered from these: float32 is unchanged; 8-bit state moves by at most a step of its code."""
    flat, _ = trained(optimizer)
    saved = whole(flat)
    parts = []
    for half in (0, 1):
        pieces, offset = [], 0
        for name in ("c", "a", "b"):
            numel = SIZES[name][0] * SIZES[name][1] // 2
            pieces.append(Piece(name, half * numel, numel, 0, offset))
            offset += numel
        buffer = nn.Parameter(torch.zeros(offset))
        engine = build_optimizer([[buffer]], OptimConfig(optimizer=optimizer))
        moments = Moments(engine, [buffer], pieces, None, CPU)
        moments.scatter(saved, num_updates=5)
        parts.append(moments.gather({name: shape[0] * shape[1] for name, shape in SIZES.items()}))
    for name in SIZES:
        for kind in ("exp_avg", "exp_avg_sq"):
            key = f"{name}.{kind}"
            together = parts[0][key] + parts[1][key]
            if optimizer == "adamw":
                assert torch.equal(together, saved[key])
            else:
                assert (together - saved[key]).abs().max() <= 0.02 * saved[key].abs().max()
                assert not torch.equal(together, saved[key]), "other blocks have other constants"


def test_8_bit_state_is_saved_with_its_codes() -> None:
    """The float32 values of 8-bit state are its codes times the constants of their blocks."""
    flat, _ = trained("adamw_8bit")
    saved = whole(flat)
    assert set(saved) == {
        f"{name}.{moment}{part}"
        for name in SIZES
        for moment in ("exp_avg", "exp_avg_sq")
        for part in ("", "_code", "_absmax")
    }
    assert saved["a.exp_avg_code"].dtype == torch.uint8
    assert saved["a.exp_avg_absmax"].unique().numel() > 1
    assert (saved["a.exp_avg"].abs() <= saved["a.exp_avg_absmax"]).all()
