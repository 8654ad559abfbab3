"""Models with experts train alike however they are cut, each rank holding its share."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from qlora_dist.config.schema import ModelConfig, TrainConfig
from qlora_dist.model.experts import expert_stacks
from qlora_dist.runtime.processes import start_runtime
from qlora_dist.runtime.shards import local_bytes, whole_bytes
from tests.distributed.test_families import train_two_steps
from tests.support.built import build
from tests.support.expert_families import EXPERT_FAMILIES, write_expert_family
from tests.support.processes import run_on_processes

LIMIT = 1e-5
"""Relative distance; float32 sums in another order differ by 1e-6."""


def compare_backends(folders: dict[str, Path], backends: list[str]) -> None:
    runtime = start_runtime(seed=0, dtype="float32")
    for name, folder in folders.items():
        whole_losses, whole = train_two_steps(folder, "ddp", runtime)
        assert whole_losses[1] < whole_losses[0], name
        for backend in backends:
            losses, sharded = train_two_steps(folder, backend, runtime)
            assert losses == pytest.approx(whole_losses, rel=LIMIT), (name, backend)
            for key, tensor in whole.items():
                distance = (tensor - sharded[key]).norm() / tensor.norm()
                assert distance <= LIMIT, (name, backend, key)


@pytest.mark.parametrize("processes", [2, 3])
def test_sharded_training_equals_whole_training(tmp_path: Path, processes: int) -> None:
    """On two and three ranks each family trains sharded as it trains whole, with recomputation and
    accumulation."""
    folders = {name: write_expert_family(name, tmp_path / name) for name in EXPERT_FAMILIES}
    backends = ["fsdp"] + ["zero3"] * (processes == 2 and find_spec("deepspeed") is not None)
    run_on_processes(compare_backends, processes, folders, backends)


def share_of_each_rank(folder: Path) -> None:
    runtime = start_runtime(seed=0, dtype="float32")
    config = TrainConfig(model=ModelConfig(str(folder), dtype="float32"))
    parts, _ = build(config, folder, "fsdp", runtime)
    stacks = expert_stacks(parts.base).values()
    here = sum(local_bytes(stack) for stack in stacks)
    whole = sum(whole_bytes(stack) for stack in stacks)
    assert here <= 1.1 * whole / runtime.world_size
    assert runtime.sum_over_ranks(torch.tensor(here)).item() == whole


@pytest.mark.parametrize("processes", [3, 5])
def test_each_rank_holds_its_share_of_the_experts(tmp_path: Path, processes: int) -> None:
    """Eight experts are cut into three and five equal parts, inside of experts where need be."""
    run_on_processes(share_of_each_rank, processes, write_expert_family("mixtral", tmp_path))
