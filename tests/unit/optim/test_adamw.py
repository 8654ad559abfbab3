"""The learning rate as a function of the step, and AdamW over flat buffers against torch's."""

import math

import pytest
import torch
from torch import nn

from qlora_dist.config.schema import OptimConfig
from qlora_dist.errors import ConfigError
from qlora_dist.optim.adamw import FlatAdamW
from qlora_dist.optim.schedule import check_warmup, lr_at, warmup_steps

HALF = math.sqrt(0.5)

# -- learning rate


@pytest.mark.parametrize(
    ("optim", "expected"),
    [
        # Worked out by hand, for a peak of 1: equal steps up to the peak, and then down from 1.
        ({"schedule": "constant"}, [1, 1, 1, 1]),
        ({"schedule": "constant", "warmup_steps": 2}, [1 / 3, 2 / 3, 1, 1]),
        ({"schedule": "linear"}, [1, 3 / 4, 2 / 4, 1 / 4]),
        ({"schedule": "linear", "warmup_steps": 1}, [1 / 2, 1, 2 / 3, 1 / 3]),
        ({"schedule": "linear", "warmup_ratio": 0.5}, [1 / 3, 2 / 3, 1, 1 / 2]),
        ({"schedule": "linear", "warmup_ratio": 0.0}, [1, 3 / 4, 2 / 4, 1 / 4]),
        (
            {"schedule": "cosine"},
            [1, (1 + HALF) / 2, 1 / 2, (1 - HALF) / 2],
        ),  # angles 0, 45, 90 and 135 degrees
        (
            {"schedule": "cosine", "warmup_steps": 1},
            [1 / 2, 1, 3 / 4, 1 / 4],
        ),  # 0, 60 and 120 degrees
        ({"schedule": "cosine", "warmup_ratio": 0.5}, [1 / 3, 2 / 3, 1, 1 / 2]),
        ({"schedule": "cosine", "warmup_steps": 3}, [1 / 4, 2 / 4, 3 / 4, 1]),
    ],
)
def test_learning_rate_of_a_run_of_four_steps(optim: dict, expected: list[float]) -> None:
    """Each schedule, with and without warm-up, is the table made by hand, times the peak rate."""
    for peak in (1.0, 2e-4):
        rates = [lr_at(step, 4, OptimConfig(lr=peak, **optim)) for step in range(1, 5)]
        assert rates == pytest.approx([peak * value for value in expected], rel=1e-12)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 1, 7, 99])
@pytest.mark.parametrize("num_steps", [100, 333])
def test_learning_rate_rises_to_its_peak_and_falls_without_a_wasted_step(
    schedule: str, warmup: int, num_steps: int
) -> None:
    """The rate rises strictly to `optim.lr` at step w + 1, then falls strictly, and is never 0."""
    optim = OptimConfig(lr=3e-4, schedule=schedule, warmup_steps=warmup)
    rates = [lr_at(step, num_steps, optim) for step in range(1, num_steps + 1)]
    rise, fall = rates[: warmup + 1], rates[warmup:]
    assert rise[-1] == optim.lr
    assert rise == sorted(set(rise))
    assert fall == sorted(set(fall), reverse=True)
    assert min(rates) > 0


@pytest.mark.parametrize(
    ("optim", "expected"),
    [({}, 0), ({"warmup_steps": 7}, 7), ({"warmup_ratio": 0.1}, 10), ({"warmup_ratio": 0.999}, 99)],
)
def test_length_of_the_warm_up(optim: dict, expected: int) -> None:
    """Warm-up has the given steps, or a share of 100 steps, rounded down; none by default."""
    assert warmup_steps(100, OptimConfig(**optim)) == expected


# -- AdamW

SHAPES = {"lora_A": (8, 32), "lora_B": (32, 8), "bias": (5,), "scalar": ()}


def parameters(shapes: dict[str, tuple[int, ...]] = SHAPES) -> dict[str, nn.Parameter]:
    """Return random parameters, equal at every call, named as peft names them."""
    generator = torch.Generator().manual_seed(0)
    return {
        f"layer.{name}.weight": nn.Parameter(torch.randn(s, generator=generator))
        for name, s in shapes.items()
    }


def set_gradients(params: dict[str, nn.Parameter], step: int) -> None:
    """Run a backward that leaves random gradients of the step, of very different sizes."""
    generator = torch.Generator().manual_seed(step)
    weights = [
        torch.randn(p.shape, generator=generator) * 10.0**i for i, p in enumerate(params.values())
    ]
    sum((p * w).sum() for p, w in zip(params.values(), weights, strict=True)).backward()


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_flat_adamw_is_adamw(weight_decay: float) -> None:
    """Ten steps of changing rates give the values of torch.optim.AdamW on separate tensors."""
    ours, theirs = parameters(), parameters()
    flat = FlatAdamW(ours, OptimConfig(weight_decay=weight_decay))
    reference = torch.optim.AdamW(
        theirs.values(), betas=(0.9, 0.999), eps=1e-8, weight_decay=weight_decay, foreach=False
    )
    for step in range(1, 11):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        flat.step(lr=0.01 * step)
        flat.clear_gradients()
        reference.param_groups[0]["lr"] = 0.01 * step
        reference.step()
        reference.zero_grad()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-6, atol=1e-7)
        assert not torch.equal(ours[name], parameters()[name])


def test_weight_decay_shrinks_what_has_no_gradient() -> None:
    """Without a gradient, decoupled decay multiplies a value by 1 - lr * weight_decay."""
    params = parameters()
    FlatAdamW(params, OptimConfig(weight_decay=0.5)).step(lr=0.1)
    for name, before in parameters().items():
        torch.testing.assert_close(params[name].data, before.data * 0.95)


def test_parameters_are_views_of_one_buffer() -> None:
    """The optimizer puts all parameters into one piece of memory and keeps their values."""
    params = parameters()
    FlatAdamW(params, OptimConfig())
    for name, before in parameters().items():
        assert torch.equal(params[name], before)
        assert params[name].shape == before.shape
    buffers = {p.untyped_storage().data_ptr() for p in params.values()}
    assert len(buffers) == 1
    assert next(iter(params.values())).untyped_storage().nbytes() == 4 * sum(
        p.numel() for p in params.values()
    )


def test_backward_writes_into_the_flat_gradient() -> None:
    """Gradients lie end to end in one tensor, add up over backward passes, and clear in place."""
    params, separate = parameters(), parameters()
    flat = FlatAdamW(params, OptimConfig())
    for step in (1, 2):
        set_gradients(params, step)
        set_gradients(separate, step)
    flat.collect_gradients()
    [gradient] = flat.gradients
    expected = torch.cat([p.grad.reshape(-1) for p in separate.values()])
    torch.testing.assert_close(gradient, expected)
    flat.clear_gradients()
    assert not gradient.any()
    set_gradients(params, 3)
    assert gradient.any()  # still the gradients of the parameters


def test_what_is_done_to_the_flat_gradient_counts() -> None:
    """With `gradients` set to zero no parameter moves: clipping and reduction act there."""
    params = parameters()
    flat = FlatAdamW(params, OptimConfig())
    set_gradients(params, 1)
    for gradient in flat.gradients:
        gradient.zero_()
    flat.step(lr=0.1)
    for name, before in parameters().items():
        assert torch.equal(params[name], before)


def test_lora_plus_trains_b_matrices_faster() -> None:
    """With lora_plus_ratio 16, B moves as under 16 times the rate, and A as under the rate."""
    names = {
        "q_proj.lora_A.default": (8, 32),
        "q_proj.lora_B.default": (32, 8),
        "v_proj.lora_B.default": (16, 8),
    }
    ours, theirs = parameters(names), parameters(names)
    flat = FlatAdamW(ours, OptimConfig(lora_plus_ratio=16.0))
    a = [p for name, p in theirs.items() if "lora_A" in name]
    b = [p for name, p in theirs.items() if "lora_B" in name]
    assert (len(a), len(b)) == (1, 2)
    reference = torch.optim.AdamW(
        [{"params": a, "lr": 0.01}, {"params": b, "lr": 0.16}], weight_decay=0.0
    )
    for step in range(1, 4):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        flat.step(lr=0.01)
        flat.clear_gradients()
        reference.step()
        reference.zero_grad()
    for name in names:
        key = f"layer.{name}.weight"
        torch.testing.assert_close(ours[key], theirs[key], rtol=1e-6, atol=1e-7)


# -- the optimizers of bitsandbytes

MANY_SMALL = {f"q{i}.lora_A": (8, 16) for i in range(64)}  # 128 elements each, 8,192 together


def distances(
    optimizer: str, num_steps: int = 60
) -> tuple[list[float], dict[str, nn.Parameter], FlatAdamW]:
    """Minimize half the squared distance to zero; return its value before each step."""
    params = parameters(MANY_SMALL)
    flat = FlatAdamW(params, OptimConfig(optimizer=optimizer))
    losses = []
    for _ in range(num_steps):
        loss = sum((p**2).sum() for p in params.values()) / 2
        loss.backward()
        losses.append(loss.item())
        flat.step(lr=0.05)
        flat.clear_gradients()
    return losses, params, flat


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("optimizer", ["adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"])
def test_bitsandbytes_optimizers_follow_adamw(optimizer: str) -> None:
    """Optimizers of bitsandbytes bring a quadratic down as AdamW, within their precision."""
    losses, params, _ = distances(optimizer)
    expected, expected_params, _ = distances("adamw")
    assert losses[-1] < 0.05 * losses[0]
    tolerance = (
        1e-4 if "32bit" in optimizer else 0.05
    )  # of values about 1: 8-bit state has some 2 % of noise
    for name, param in params.items():
        assert (param - expected_params[name]).abs().mean() < tolerance
    assert losses == pytest.approx(expected, rel=1e-3 if "32bit" in optimizer else 0.2)


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize(
    ("optimizer", "dtype"),
    [
        ("adamw", torch.float32),
        ("adamw_8bit", torch.uint8),
        ("paged_adamw_8bit", torch.uint8),
        ("paged_adamw_32bit", torch.float32),
    ],
)
def test_small_tensors_get_8_bit_state_because_they_are_flat(
    optimizer: str, dtype: torch.dtype
) -> None:
    """Flat buffers get 8-bit state, which bitsandbytes refuses tensors below 4,096 elements."""
    _, params, flat = distances(optimizer, num_steps=1)
    assert max(p.numel() for p in params.values()) < 4096
    [state] = flat._optimizer.state.values()
    moments = [
        v for v in state.values() if isinstance(v, torch.Tensor) and v.numel() == 64 * 8 * 16
    ]
    assert [moment.dtype for moment in moments] == [dtype, dtype]


def test_warmup_ratio_is_not_one_less_by_rounding() -> None:
    """A warm-up of 29 % of 100 steps has 29, though 100 * 0.29 is less in floating point."""
    assert warmup_steps(100, OptimConfig(warmup_ratio=0.29)) == 29


def test_a_warmup_as_long_as_the_run_is_refused() -> None:
    """A run as long as its warm-up is refused: the peak comes one step after the warm-up."""
    check_warmup(11, OptimConfig(warmup_steps=10))
    with pytest.raises(ConfigError, match=r"never reach optim\.lr"):
        check_warmup(10, OptimConfig(warmup_steps=10))
