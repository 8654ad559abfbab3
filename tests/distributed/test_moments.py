"""Optimizer state in parts on several ranks is gathered on rank 0, and nowhere else."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed as dist
from torch import nn

from qlora_dist.config.schema import (
    AdapterConfig,
    MemoryConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    TrainConfig,
)
from qlora_dist.data.batch import collate
from qlora_dist.data.samples import Sample
from qlora_dist.model.adapters import adapter_parameters
from qlora_dist.optim.moments import BufferSlice, Moments
from qlora_dist.optim.optimizers import build_optimizer
from qlora_dist.runtime.processes import start_runtime
from qlora_dist.train import train_step
from tests.support.built import build
from tests.support.processes import run_on_processes

NUMEL = 9000
CUT = 6000
"""Elements of the one parameter that rank 0 has: enough for 8-bit state, unlike the others."""


def of_rank(
    rank: int, group: dist.ProcessGroup | None, optimizer: str
) -> tuple[Moments, dict[Any, Any]]:
    """A rank's part of the parameter, and its state by buffer."""
    first, stop = ((0, CUT), (CUT, NUMEL))[rank]
    buffer = nn.Parameter(torch.zeros(stop - first + 100))
    engine = build_optimizer([[buffer]], OptimConfig(optimizer=optimizer))
    moments = Moments(
        engine,
        [buffer],
        [BufferSlice("a", first, stop - first, 0, 100)],
        group,
        torch.device("cpu"),
    )
    generator = torch.Generator().manual_seed(rank)
    buffer.grad = torch.randn(buffer.shape, generator=generator)
    engine.step()
    return moments, engine.state[buffer]


def check_parts() -> None:
    start_runtime(seed=0, dtype="float32")
    rank = dist.get_rank()
    for optimizer, kinds in {
        "adamw": (torch.float32,) * 2,
        "adamw_8bit": (torch.uint8, torch.float32),
    }.items():
        moments, state = of_rank(rank, dist.group.WORLD, optimizer)
        key = "exp_avg" if optimizer == "adamw" else "state1"
        assert state[key].dtype == kinds[rank]
        box = [moments.gather({"a": NUMEL})]
        assert bool(box[0]) == (rank == 0)
        dist.broadcast_object_list(box, src=0)
        (saved,) = box
        before = {
            name: value.clone() for name, value in state.items() if isinstance(value, torch.Tensor)
        }
        moments.scatter(saved, num_updates=1)
        again = moments._optimizer.state[moments._buffers[0]]
        covered = slice(100, None)
        for name, value in before.items():
            if name.startswith(("exp_avg", "state")):
                assert torch.equal(again[name][covered], value[covered]), name
            elif name.startswith("absmax"):
                assert torch.equal(again[name], value), name
        if optimizer == "adamw_8bit" and rank == 0:
            assert saved["a.exp_avg_absmax"].isnan().tolist() == [False] * 24 + [True]
            assert saved["a.block_start"].tolist() == [0, *range(156, CUT, 256), CUT]


def test_parts_in_8_bits_and_in_float32_come_back_as_they_were() -> None:
    """State of one rank in blocks of 256 that begin before its part, and of a rank with too few
    elements for 8-bit state, returns unchanged."""
    run_on_processes(check_parts, 2)


def check_copies() -> None:
    start_runtime(seed=0, dtype="float32")
    alone = [dist.new_group([rank]) for rank in range(2)][dist.get_rank()]
    for group in (None, alone):
        moments, _ = of_rank(0, group, "adamw_8bit")
        assert bool(moments.gather({"a": NUMEL})) == (dist.get_rank() == 0)


def test_copies_are_not_gathered() -> None:
    """If each rank or each group of ranks has the whole state, only that of rank 0 is read."""
    run_on_processes(check_copies, 2)


def check_engines(folder: Path, backends: tuple[tuple[str, int], ...]) -> None:
    runtime = start_runtime(seed=0, dtype="float32")
    for backend, replicas in backends:
        config = TrainConfig(
            model=ModelConfig(path=str(folder), dtype="float32"),
            adapter=AdapterConfig(rank=16),
            memory=MemoryConfig(recompute="none"),
            optim=OptimConfig(optimizer="adamw_8bit"),
            parallel=ParallelConfig(backend=backend, replicas=replicas),
        )
        parts, sharing = build(config, folder, backend, runtime)
        model = parts.model.train()
        engine = sharing.engine(parts)
        row = list(range(3, 30))
        train_step(model, engine, [collate([Sample(row, row)], pad_token_id=0)], 1e-2, 1.0, runtime)
        names = set(adapter_parameters(model)) if runtime.is_main else set()
        adapter, moments = engine.whole_adapter(), engine.optimizer_state()
        assert set(adapter) == names, backend
        assert {name.rpartition(".")[0] for name in moments} - {""} == names, backend
        if runtime.is_main:
            assert any(moments[f"{name}.exp_avg_sq_code"].any() for name in names), backend


@pytest.mark.parametrize(
    "backends", [(("ddp", 1), ("fsdp", 1), ("fsdp", 2)), (("zero2", 1),), (("zero3", 1),)], ids=str
)
def test_only_rank_0_has_what_is_saved(
    backends: tuple[tuple[str, int], ...], tiny_llama: Path
) -> None:
    """Whole adapters and moments are in the memory of the rank that writes them."""
    if "zero" in backends[0][0] and find_spec("deepspeed") is None:
        pytest.skip("deepspeed is an optional dependency")
    run_on_processes(check_engines, 2, tiny_llama, backends)
