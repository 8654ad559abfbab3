"""The least time of a micro-batch is that of its matrix products, its attention and its weights, and nothing else."""

from pathlib import Path

import pytest

from benchmarks.bound import work_of
from qlora_dist.config import AdapterConfig, ModelConfig
from qlora_dist.model.adapters import add_adapters
from qlora_dist.model.skeleton import build_skeleton

ROWS, SEQ_LEN, NUM_TARGETS, RANK = 2, 32, 10, 2
D, LAYERS, HEADS_WIDTH = 64, 3, 64
FROZEN = LAYERS * (D * 64 + 2 * D * 32 + 64 * D + 3 * D * 112)  # q, k and v of two heads of four, o; gate, up, down
LORA = LAYERS * RANK * (D + 64 + 2 * (D + 32) + 64 + D + 3 * (D + 112))
LIMITS = {"gemm_tflops": {"bfloat16": 0.5}, "attention_tflops": {"512 tokens": 0.1, "2048 tokens": 0.2},
          "dequantize_gib_per_second": 4.0}  # fmt: skip


@pytest.fixture(scope="module")
def model(tiny_llama: Path):
    return add_adapters(build_skeleton(tiny_llama, ModelConfig(path=str(tiny_llama))), AdapterConfig(rank=RANK), "base")


@pytest.mark.parametrize("recomputed", [0.0, 0.5, 1.0])
def test_the_bound_is_the_sum_of_its_three_parts(model, recomputed: float) -> None:
    """4 P + 6 P_lora per token and 4 d V per target at the rate of products, 7 s (s + 1) w at that of attention, two
    passes over the 4-bit weights; a layer that is recomputed adds 2 P + 2 P_lora, 2 s (s + 1) w and a pass."""
    work = work_of(model, ROWS, SEQ_LEN, NUM_TARGETS, recomputed)
    vocab = model.config.vocab_size
    tokens = ROWS * SEQ_LEN
    products = (4 + 2 * recomputed) * FROZEN * tokens + (6 + 2 * recomputed) * LORA * tokens + 4 * D * vocab * 10
    attention = (7 + 2 * recomputed) * SEQ_LEN * (SEQ_LEN + 1) * HEADS_WIDTH * LAYERS * ROWS
    expected = products / 0.5e12 + attention / 0.2e12 + (2 + recomputed) * FROZEN * 2.516 / (4 * 2**30)
    assert work.least_seconds(LIMITS) == pytest.approx(expected, rel=1e-12)


def test_a_machine_of_several_moods_is_bounded_by_their_mean_time(model) -> None:
    """Tokens per second at the bound come from the mean of the least seconds, not from the mean of the rates."""
    work = work_of(model, ROWS, SEQ_LEN, NUM_TARGETS)
    slow = {**LIMITS, "gemm_tflops": {"bfloat16": 0.1}}
    seconds = (work.least_seconds(LIMITS) + work.least_seconds(slow)) / 2
    assert work.most_tokens_per_second([LIMITS, slow]) == pytest.approx(ROWS * SEQ_LEN / seconds)
