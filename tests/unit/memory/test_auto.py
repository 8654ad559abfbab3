"""`memory.recompute: auto`: the limit that it may take, and its first estimate."""

from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from qlora_dist.config.schema import AdapterConfig, ModelConfig, TrainConfig
from qlora_dist.memory.auto import RecomputeBudget
from qlora_dist.memory.policy import Recompute
from qlora_dist.memory.recompute import recompute_of
from qlora_dist.model.parts import ModelParts
from qlora_dist.runtime.memory import GIB, MemoryMeter, memory_limit
from qlora_dist.runtime.processes import start_runtime
from tests.support.adapted import build_adapted


@pytest.mark.parametrize(
    ("budget_gib", "local_world_size", "device", "expected"),
    [(None, 2, "cpu", 7), (None, 2, "cuda", 12), (6.5, 2, "cpu", 6.5), (20, 1, "cpu", 11)],
)
def test_the_limit(
    budget_gib: float | None, local_world_size: int, device: str, expected: float
) -> None:
    """The limit is the held memory, the share of each process of a host in the free memory, and the
    allocator's spare memory; or less."""
    meter = SimpleNamespace(held=lambda: 3 * GIB, unused=lambda: (device == "cuda") * GIB)
    runtime = SimpleNamespace(device=torch.device(device), local_world_size=local_world_size)
    with mock.patch("qlora_dist.runtime.memory.free_bytes", return_value=8 * GIB):
        assert memory_limit(budget_gib, meter, runtime) == expected * GIB


@pytest.mark.parametrize(
    ("device", "num_retries", "reserves"),
    [("cpu", 0, [0.1, 0.1, 0.05, 0.05]), ("cuda", 0, [0.05] * 4), ("cuda", 2, [0.1] * 4)],
)
def test_a_host_leaves_more_free_until_two_steps_were_measured(
    device: str, num_retries: int, reserves: list[float]
) -> None:
    """The reserve before the first step, after it, after the second and later; and on a GPU
    whenever its allocator had to begin anew."""
    runtime = SimpleNamespace(device=torch.device(device))
    meter = MemoryMeter(runtime.device)
    with mock.patch.object(
        torch.cuda, "memory_stats", return_value={"num_alloc_retries": num_retries}
    ):
        found = [
            RecomputeBudget._reserve.fget(
                SimpleNamespace(_runtime=runtime, _meter=meter, _num_steps=n)
            )
            for n in range(4)
        ]
    assert found == reserves


def test_an_allocator_that_has_done_nothing_has_no_retries() -> None:
    """An allocator has no figures before the first allocation, which counts as no retries."""
    with mock.patch.object(torch.cuda, "memory_stats", return_value={}):
        assert MemoryMeter(torch.device("cuda")).num_retries() == 0


def test_the_first_estimate_counts_the_mask(tiny_llama: Path) -> None:
    """Layers keep everything if the attention mask takes nothing, and recompute if it is too large
    to keep."""
    runtime = start_runtime(seed=0, dtype="float32")
    if runtime.device.type != "cpu":
        pytest.skip("what is free on a GPU is another matter")
    model = build_adapted(tiny_llama, runtime, recompute="auto")
    config = TrainConfig(
        model=ModelConfig(path=str(tiny_llama), dtype="float32"), adapter=AdapterConfig(rank=4)
    )
    for elements, expected in ((0, Recompute(3)), (2**40, Recompute(3, 0, 3))):
        with mock.patch("qlora_dist.memory.auto.mask_elements", return_value=elements) as asked:
            RecomputeBudget(config, ModelParts(model), runtime, lambda text: None).choose()
        assert recompute_of(ModelParts(model).layers) == expected
        assert asked.call_args == mock.call(
            model, 1, config.data.max_seq_len, is_packed=True, is_on_gpu=False
        )
