"""What `memory.recompute: auto` may take."""

from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from qlora_dist.budget import RecomputeBudget, memory_limit
from qlora_dist.model.activations import GIB


@pytest.mark.parametrize(
    ("budget_gib", "local_world_size", "device", "expected"),
    [(None, 2, "cpu", 7), (None, 2, "cuda", 12), (6.5, 2, "cpu", 6.5), (20, 1, "cpu", 11)],
)
def test_the_limit(budget_gib: float | None, local_world_size: int, device: str, expected: float) -> None:
    """What is held, what the processes of a host share of what is free, and what the allocator has over; or less."""
    meter = SimpleNamespace(held=lambda: 3 * GIB, unused=lambda: (device == "cuda") * GIB)
    runtime = SimpleNamespace(device=torch.device(device), local_world_size=local_world_size)
    with mock.patch("qlora_dist.budget.free_bytes", return_value=8 * GIB):
        assert memory_limit(budget_gib, meter, runtime) == expected * GIB


@pytest.mark.parametrize(("device", "reserves"), [("cpu", [0.1, 0.1, 0.05, 0.05]), ("cuda", [0.05, 0.05, 0.05, 0.05])])
def test_a_host_leaves_more_free_until_two_steps_were_measured(device: str, reserves: list[float]) -> None:
    """Before the first step, after it, after the second and later."""
    runtime = SimpleNamespace(device=torch.device(device))
    found = [RecomputeBudget._reserve.fget(SimpleNamespace(_runtime=runtime, _num_steps=n)) for n in range(4)]
    assert found == reserves
