"""Loss scaling: an overflow halves the scale and repeats the step, if that can help."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from qlora_dist.data.batch import collate
from qlora_dist.metrics.rows import StepSums
from qlora_dist.model.adapters import adapter_parameters
from qlora_dist.model.logits import LogitsTransform
from qlora_dist.model.loss import _FrozenHead
from qlora_dist.optim.loss_scale import GROWTH_INTERVAL, INITIAL, LARGEST, LossScale
from qlora_dist.run.state import TrainState
from qlora_dist.runtime.processes import Runtime, start_runtime
from qlora_dist.train import micro_step
from tests.support.adapted import build_adapted
from tests.support.rows import encode


def scale_of(state: TrainState, dtype: torch.dtype = torch.float16) -> tuple[LossScale, list[str]]:
    """Return a scale in a run of one process, and the list of its messages."""
    said: list[str] = []
    runtime = SimpleNamespace(compute_dtype=dtype, max_over_ranks=lambda value: value)
    return LossScale(state, runtime, said.append), said


def sums(grad_norm: float, loss: float = 2.0) -> StepSums:
    one = torch.ones(())
    return StepSums(loss=one * loss, grad_norm=one * grad_norm, num_targets=one, num_tokens=one)


FINE, OVERFLOW = sums(0.5), sums(float("inf"))


def test_an_overflow_halves_the_scale_until_gradients_fit() -> None:
    """Each overflow halves the scale and repeats the step; the log has one line for all."""
    state = TrainState()
    scale, said = scale_of(state)
    assert scale.value == INITIAL
    assert [scale.is_to_repeat(found) for found in (OVERFLOW, sums(float("nan")), FINE)] == [
        True,
        True,
        False,
    ]
    assert scale.value == state.loss_scale == INITIAL / 4
    assert said == [
        "step 1: gradients exceeded float16's range, so the step was taken again; "
        "loss scale 65,536 -> 16,384"
    ]


def test_what_the_scale_cannot_help_is_a_skipped_step() -> None:
    """A loss or gradients that no scale makes finite skip the step, and the scale stays.

    A smaller scale would lose small gradients for the thousands of steps in which it grows back.
    """
    state = TrainState()
    scale, said = scale_of(state)
    assert not scale.is_to_repeat(sums(float("nan"), loss=float("nan")))
    assert scale.value == INITIAL
    repeats = 0
    while scale.is_to_repeat(OVERFLOW):
        repeats += 1
    assert repeats == 16  # from 2^16 to 1
    assert scale.value == INITIAL
    assert said == []
    assert not scale.is_to_repeat(FINE)
    assert scale.value == INITIAL


def test_the_scale_grows_after_many_good_steps_in_a_row() -> None:
    """The scale doubles after enough good steps in a row, up to its largest value."""
    state = TrainState(loss_scale=LARGEST / 2)
    scale, _ = scale_of(state)
    for _ in range(GROWTH_INTERVAL - 1):
        assert not scale.is_to_repeat(FINE)
    assert scale.is_to_repeat(OVERFLOW)
    for _ in range(GROWTH_INTERVAL - 1):
        assert not scale.is_to_repeat(FINE)
    assert scale.value == LARGEST / 4
    assert not scale.is_to_repeat(FINE)
    assert scale.value == LARGEST / 2
    for _ in range(2 * GROWTH_INTERVAL):
        assert not scale.is_to_repeat(FINE)
    assert scale.value == LARGEST


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_other_types_need_no_scale(dtype: torch.dtype) -> None:
    """In bfloat16 and float32 no step is repeated and none counted."""
    state = TrainState(loss_scale=8.0)  # of a float16 run that this one branched off
    scale, _ = scale_of(state, dtype)
    assert scale.value == 1.0
    assert not scale.is_to_repeat(OVERFLOW)
    assert state == TrainState(loss_scale=8.0)


# -- what float16 computes with it


@pytest.fixture(scope="module")
def runtime() -> Runtime:
    return start_runtime(seed=0, dtype="float32")


def gradient(
    folder: Path, runtime: Runtime, batch, dtype: str, num_targets: float, scale: float
) -> torch.Tensor:
    """Return the gradient of all adapters, as the optimizer sees it."""
    runtime = dataclasses.replace(runtime, compute_dtype=getattr(torch, dtype))
    model = build_adapted(folder, runtime)
    (micro_step(model, batch, torch.tensor(num_targets), runtime) * scale).backward()
    return torch.cat([param.grad.flatten() for param in adapter_parameters(model).values()]) / scale


@pytest.fixture(scope="module")
def batch(tokenizer):
    rows = [{"text": "the quick brown fox jumps over the lazy dog"}, {"text": "a lazy fox"}]
    return collate(encode(rows, tokenizer).samples, 0)


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def test_scaled_float32_gradients_have_the_bits_of_unscaled_ones(
    tiny_llama: Path, runtime: Runtime, batch
) -> None:
    """A scale, being a power of two, changes no bit of a float32 gradient."""
    plain, scaled = (
        gradient(tiny_llama, runtime, batch, "float32", 12.0, scale) for scale in (1.0, INITIAL)
    )
    assert torch.equal(plain, scaled)


def test_the_scale_keeps_small_gradients(tiny_llama: Path, runtime: Runtime, batch) -> None:
    """Scaled, float16 is nearer to float32 than bfloat16, which has three bits less.

    Unscaled, it loses much of a gradient whose loss is divided by ten million target tokens.
    """
    sizes = {"batch": batch, "num_targets": 1e7}
    exact = gradient(tiny_llama, runtime, dtype="float32", scale=1.0, **sizes)
    scaled = distance(gradient(tiny_llama, runtime, dtype="float16", scale=INITIAL, **sizes), exact)
    unscaled = distance(gradient(tiny_llama, runtime, dtype="float16", scale=1.0, **sizes), exact)
    bfloat16 = distance(gradient(tiny_llama, runtime, dtype="bfloat16", scale=1.0, **sizes), exact)
    assert scaled < bfloat16 / 2 < 0.02
    assert unscaled > 0.2


def test_the_loss_of_confident_tokens_is_kept() -> None:
    """Gradients of logits below 6e-8, float16's least number, still reach the hidden states."""
    hidden, weight = torch.eye(4, dtype=torch.float16), torch.zeros(4, 4, dtype=torch.float16)
    weight.fill_diagonal_(18.0)  # p = e^-18 = 1.5e-8 for the three others
    rows = targets = torch.arange(4)
    found = {}
    for dtype in (torch.float16, torch.float32):
        x = hidden.detach().to(dtype, copy=True).requires_grad_()
        loss = _FrozenHead.apply(x, rows, targets, weight.to(dtype), None, LogitsTransform(), True)
        (loss * INITIAL).backward()
        found[dtype] = x.grad.float() / INITIAL
    others = ~torch.eye(4, dtype=torch.bool)
    assert torch.allclose(found[torch.float16][others], found[torch.float32][others], rtol=0.05)
