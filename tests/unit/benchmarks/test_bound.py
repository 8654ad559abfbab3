"""The bound on a step's time sums the unavoidable work at the machine's rates."""

from pathlib import Path

import pytest
import torch

from benchmarks.bound import GIB, Rates, bound_seconds, most_tokens_per_second
from benchmarks.gpu_parts.models import build, make_batch, make_config
from benchmarks.memory import Shape
from qlora_dist.runtime.processes import start_runtime

SHAPE = Shape(64, 176, 3, 4, 2, 320)


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> torch.nn.Module:
    """Small model with an adapter of rank 4."""
    config = make_config(
        tmp_path_factory.mktemp("small"),
        SHAPE,
        2,
        32,
        adapter={"rank": 4},
        model={"dtype": "bfloat16"},
    )
    return build(config, start_runtime(seed=0, dtype="bfloat16"))[0].model


def test_the_bound_is_the_sum_of_its_parts(adapted: torch.nn.Module) -> None:
    """Each term equals a count by hand for widths 64, 176 and 32 (keys).

    The rates of the other terms are near infinity.
    """
    batch = make_batch(SHAPE.vocab, 2, 32)
    weights = 3 * (64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 176)
    pairs, targets, tokens, huge = 2 * 32 * 33 // 2, 2 * 31, 64, 1e30
    flops = 4 * weights * tokens + 12 * 64 * 3 * pairs + 4 * 64 * 320 * targets
    assert bound_seconds(adapted, batch, Rates(1.0, huge, 1e-3 * huge)) == pytest.approx(
        flops + 6 * 4 * tokens * 3 * (128 + 2 * 96 + 128 + 3 * 240), rel=1e-6
    )  # the adapter's arithmetic takes longer than its traffic
    assert bound_seconds(adapted, batch, Rates(huge, 1.0, huge)) == pytest.approx(
        2.516 * weights * 2
    )
    lora = 4 * (128 + 2 * 96 + 128 + 3 * 240)
    elementwise = 16 * 64 + 4 * (64 + 32) + 8 * 176
    assert bound_seconds(adapted, batch, Rates(huge, huge, 1.0)) == pytest.approx(
        3 * tokens * (lora + elementwise) * 2
    )


def test_recomputing_every_layer_adds_a_forward(adapted: torch.nn.Module) -> None:
    """Recomputation adds half of linear arithmetic, a third of attention's, one dequantization."""
    batch = make_batch(SHAPE.vocab, 2, 32)
    weights = 3 * (64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 176)
    for rates, more in (
        (Rates(1.0, 1e30, 1e27), 2 * weights * 64 + 4 * 64 * 3 * 32 * 33),
        (Rates(1e30, 1.0, 1e30), 2.516 * weights),
    ):
        plain, twice = (bound_seconds(adapted, batch, rates, share) for share in (0.0, 1.0))
        assert twice - plain == pytest.approx(more, rel=1e-6)


def test_a_machine_of_drifting_speed_is_bounded_by_the_mean_time(tiny_llama: Path) -> None:
    """Tokens/s at the bound come from the mean of the least seconds, not the mean of rates."""
    quick = {
        "gemm_tflops": {"bfloat16": 0.5},
        "dequantize_gib_per_second": 4.0,
        "copy_gib_per_second": 9.0,
    }
    slow = {
        "gemm_tflops": {"bfloat16": 0.1},
        "dequantize_gib_per_second": 1.0,
        "copy_gib_per_second": 2.0,
    }
    assert Rates.of(quick) == Rates(0.5e12, 4.0 * GIB, 9.0 * GIB)
    alone = [
        2 * 32 / most_tokens_per_second(tiny_llama, 4, 2, 32, 10, [limits])
        for limits in (quick, slow)
    ]
    assert alone[1] > 2 * alone[0]
    both = most_tokens_per_second(tiny_llama, 4, 2, 32, 10, [quick, slow])
    assert both == pytest.approx(2 * 32 / (sum(alone) / 2))
