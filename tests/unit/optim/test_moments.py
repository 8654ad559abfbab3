"""Adam's moments survive being gathered, saved and cut anew."""

import pytest
import torch
from torch import nn

from qlora_dist.config.schema import OptimConfig
from qlora_dist.optim.adamw import FlatAdamW
from qlora_dist.optim.moments import BufferSlice, Moments
from qlora_dist.optim.optimizers import build_optimizer

SIZES = {"a": (80, 100), "b": (100, 30), "c": (70, 3)}
NUMELS = {name: shape[0] * shape[1] for name, shape in SIZES.items()}
CPU = torch.device("cpu")


def trained(
    optimizer: str, seed: int = 0, num_updates: int = 5
) -> tuple[FlatAdamW, dict[str, nn.Parameter]]:
    """Return an optimizer over three parameters after some updates with random gradients."""
    generator = torch.Generator().manual_seed(seed)
    params = {
        name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in SIZES.items()
    }
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
    return flat.moments(CPU).gather(NUMELS)


@pytest.mark.parametrize(
    "optimizer", ["adamw", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"]
)
def test_what_was_saved_goes_on_bit_for_bit(optimizer: str) -> None:
    """An optimizer with saved moments makes the updates of the optimizer that they are from."""
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


def values(saved: dict[str, torch.Tensor], name: str, moment: str) -> torch.Tensor:
    """Return the float32 values of saved state: those of codes times their blocks' constants."""
    if f"{name}.{moment}_code" not in saved:
        return saved[f"{name}.{moment}"]
    codes, starts = saved[f"{name}.{moment}_code"].long(), saved[f"{name}.block_start"]
    block_of = (torch.arange(codes.numel())[:, None] >= starts).sum(1) - 1
    return saved[f"{moment}_code_book"][codes] * saved[f"{name}.{moment}_absmax"][block_of]


def half_of(
    saved: dict[str, torch.Tensor], optimizer: str, half: int, padding: int = 0
) -> tuple[Moments, dict]:
    """Load saved state into a buffer of half of every parameter, in a different order.

    Returns:
        the moments, and the state of the buffer.
    """
    pieces, offset = [], 0
    for name in ("c", "a", "b"):
        pieces.append(BufferSlice(name, half * NUMELS[name] // 2, NUMELS[name] // 2, 0, offset))
        offset += NUMELS[name] // 2
    buffer = nn.Parameter(torch.zeros(offset + padding))
    engine = build_optimizer([[buffer]], OptimConfig(optimizer=optimizer))
    moments = Moments(engine, [buffer], pieces, None, CPU)
    moments.scatter(saved, num_updates=5)
    return moments, engine.state[buffer]


def in_halves(optimizer: str, saved: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """Load saved state into the buffers of two ranks, and gather it from each."""
    return [half_of(saved, optimizer, half)[0].gather(NUMELS) for half in (0, 1)]


def halves_of(parts: list[dict[str, torch.Tensor]], name: str, moment: str) -> torch.Tensor:
    """Join the values of a parameter of which each part has one half."""
    numel = NUMELS[name] // 2
    first, second = (values(part, name, moment) for part in parts)
    return torch.cat([first[:numel], second[numel:]])


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_moments_are_found_in_any_layout(optimizer: str) -> None:
    """Moments survive the way from one buffer to those of two ranks, in a different order.

    float32 is unchanged, and 8-bit state moves by at most a step of its code.
    """
    flat, _ = trained(optimizer)
    saved = whole(flat)
    parts = in_halves(optimizer, saved)
    for name in SIZES:
        for moment in ("exp_avg", "exp_avg_sq"):
            together, before = halves_of(parts, name, moment), values(saved, name, moment)
            if optimizer == "adamw":
                assert torch.equal(together, before)
            else:
                assert (together - before).abs().max() <= 0.02 * before.abs().max()
                assert not torch.equal(together, before), "other blocks have other constants"


def test_another_optimizer_takes_up_the_values() -> None:
    """AdamW goes on from the float32 values of 8-bit state, to the bit."""
    saved = whole(trained("adamw_8bit")[0])
    parts = in_halves("adamw", saved)
    for name in SIZES:
        for moment in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(halves_of(parts, name, moment), values(saved, name, moment))


def test_8_bit_state_is_saved_as_it_is() -> None:
    """Saved 8-bit state has the values of the optimizer's own, in 2.1 bytes an element.

    It has codes, constants and beginnings of blocks, of both moments.
    """
    flat, _ = trained("adamw_8bit")
    saved = whole(flat)
    of_moments = {
        f"{moment}_{part}" for moment in ("exp_avg", "exp_avg_sq") for part in ("code", "absmax")
    }
    books = {"exp_avg_code_book", "exp_avg_sq_code_book"}
    assert set(saved) == books | {
        f"{name}.{kind}" for name in SIZES for kind in of_moments | {"block_start"}
    }
    assert saved["a.exp_avg_code"].dtype == torch.uint8
    assert saved["a.block_start"].tolist() == list(range(0, 8000, 256))
    assert saved["b.block_start"][:3].tolist() == [0, 192, 448], (
        "its first block began in another parameter"
    )
    num_bytes = sum(tensor.nbytes for name, tensor in saved.items() if name not in books)
    assert num_bytes <= 2.1 * sum(NUMELS.values())
    (state,) = (flat._optimizer.state[group.flat] for group in flat._groups)
    for number, moment in enumerate(("exp_avg", "exp_avg_sq"), start=1):
        codes, absmax = state[f"state{number}"].long(), state[f"absmax{number}"]
        expected = state[f"qmap{number}"][codes] * absmax.repeat_interleave(256)[: codes.numel()]
        assert torch.equal(torch.cat([values(saved, name, moment) for name in SIZES]), expected)


def as_in_version_1(saved: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return saved state in the form of checkpoints of format version 1."""
    old = {}
    for name, numel in NUMELS.items():
        lengths = saved[f"{name}.block_start"].diff(append=torch.tensor([numel]))
        for moment in ("exp_avg", "exp_avg_sq"):
            old[f"{name}.{moment}"] = values(saved, name, moment)
            old[f"{name}.{moment}_code"] = saved[f"{name}.{moment}_code"]
            old[f"{name}.{moment}_absmax"] = saved[f"{name}.{moment}_absmax"].repeat_interleave(
                lengths
            )
    return old


def test_state_of_format_version_1_is_taken_up() -> None:
    """State of version 1 is taken up bit for bit in its layout, and as newer state elsewhere."""
    first, _ = trained("adamw_8bit")
    second, _ = trained("adamw_8bit", seed=1, num_updates=0)
    saved = whole(first)
    second.moments(CPU).scatter(as_in_version_1(saved), num_updates=5)
    again = whole(second)
    assert all(torch.equal(again[name], tensor) for name, tensor in saved.items())
    for optimizer in ("adamw", "adamw_8bit"):
        old, new = in_halves(optimizer, as_in_version_1(saved)), in_halves(optimizer, saved)
        assert all(
            torch.equal(a[name], b[name]) for a, b in zip(old, new, strict=True) for name in b
        )


def test_padding_does_not_change_the_blocks() -> None:
    """State of padded buffers, such as DeepSpeed's, comes back to the bit."""
    saved = whole(trained("adamw_8bit")[0])
    for half in (0, 1):
        part = half_of(saved, "adamw_8bit", half, padding=1000)[0].gather(NUMELS)
        again, state = half_of(part, "adamw_8bit", half, padding=1000)
        for name, tensor in again.gather(NUMELS).items():
            assert torch.equal(tensor, part[name])
        for number in (1, 2):
            codes = state[f"state{number}"][-1000:].long()
            assert (state[f"qmap{number}"][codes] == 0).all(), (
                "or it would become the largest of its block"
            )
