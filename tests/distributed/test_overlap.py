"""Collectives that run beside the layers (FSDP2 on the CPU) give the bits of collectives that are
waited for."""

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from qlora_dist.config.schema import (
    AdapterConfig,
    MemoryConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    TrainConfig,
)
from qlora_dist.data.batch import MicroBatch, collate
from qlora_dist.data.samples import Sample
from qlora_dist.model.adapters import whole_adapter
from qlora_dist.model.cpu.overlap import Reductions
from qlora_dist.model.parts import decoder_layers
from qlora_dist.runtime.processes import Runtime, start_runtime
from qlora_dist.train import train_step
from tests.support.built import build
from tests.support.processes import run_on_processes

VOCAB, NUM_STEPS = 320, 3


def micro_batches(rank: int, step: int) -> list[MicroBatch]:
    """The two micro-batches of a step."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    rows = [torch.randint(3, VOCAB, (length,), generator=generator).tolist() for length in (12, 20)]
    return [collate([Sample(row, row)], pad_token_id=0) for row in rows]


def train(
    folder: Path, recompute: int, replicas: int, runtime: Runtime
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Losses and gradient norms of the steps, and the adapter after the last."""
    config = TrainConfig(
        model=ModelConfig(path=str(folder), dtype="float32"),
        adapter=AdapterConfig(rank=4),
        memory=MemoryConfig(recompute=recompute),
        parallel=ParallelConfig(replicas=replicas),
        optim=OptimConfig(lr=1e-2, grad_accum_steps=2),
    )
    parts, sharing = build(config, folder, "fsdp", runtime)
    model = parts.model.train()
    engine = sharing.engine(parts)
    first, second = decoder_layers(model)[:2]
    first.mlp.register_forward_hook(lambda *_: gathering.append(is_gathering(second)))
    found = []
    for step in range(NUM_STEPS):
        sums = train_step(model, engine, micro_batches(runtime.rank, step), 1e-2, 1.0, runtime)
        found += [sums.loss, sums.grad_norm]
    return found, torch.cat([tensor.flatten() for tensor in whole_adapter(model).values()])


gathering: list[bool] = []
"""True at each forward of the first layer during which the second one was being gathered."""


def is_gathering(layer: Any) -> bool:
    """True if the layer's gather has started, beside the main thread, and is not waited for yet."""
    result = layer._get_fsdp_state()._fsdp_param_group._all_gather_result
    return result is not None and result.all_gather_work is not None


class Watched(Reductions):
    """Notes the number of reductions in flight at each start and each wait."""

    running: ClassVar[list[int]] = []

    def __call__(self, *arguments: Any, **named: Any) -> None:
        super().__call__(*arguments, **named)
        self.running.append(len(self._running))

    def wait(self) -> None:
        super().wait()
        self.running.append(len(self._running))


def compare(folder: Path) -> None:
    runtime = start_runtime(seed=0, dtype="float32")
    for recompute, replicas in ((0, 1), (1, 1), (0, runtime.world_size)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("qlora_dist.parallel.fsdp.overlap_on_cpu", lambda _: None)
            expected_sums, expected = train(folder, recompute, replicas, runtime)
        assert not any(gathering)
        gathering.clear()
        Watched.running.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("qlora_dist.model.cpu.overlap.Reductions", Watched)
            sums, adapter = train(folder, recompute, replicas, runtime)
        assert gathering[0] == (replicas == 1)  # of replicas, each holds whole layers
        gathering.clear()
        assert all(map(torch.equal, sums, expected_sums))
        assert torch.equal(adapter, expected)
        if replicas > 1:  # replicas add up what a reduction has made: it must be there
            assert Watched.running == []
            continue
        assert max(Watched.running) == 2
        assert Watched.running[-1] == 0  # before anybody reads the gradients


def test_overlapping_changes_no_bit(families: dict[str, Path]) -> None:
    """Two ranks, with and without recomputation and accumulation, train equal bits; and so do two
    replicas, whose reductions do not overlap."""
    run_on_processes(compare, 2, families["llama"])
