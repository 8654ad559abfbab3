"""The loss in chunks under sharding, with a rank that has no target, trains like the plain loss."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from qlora_dist.config.schema import (
    IGNORE_INDEX,
    AdapterConfig,
    MemoryConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
)
from qlora_dist.data.batch import MicroBatch, collate
from qlora_dist.data.samples import Sample
from qlora_dist.model import logits as logits_module
from qlora_dist.model import loss as loss_module
from qlora_dist.model.adapters import whole_adapter
from qlora_dist.model.logits import logits_transform
from qlora_dist.runtime.processes import Runtime, start_runtime
from qlora_dist.train import train_step
from tests.support.built import build
from tests.support.processes import run_on_processes

VOCAB = 320


def micro_batches(rank: int) -> list[MicroBatch]:
    """Two micro-batches, of which the second has no target on rank 1."""
    generator = torch.Generator().manual_seed(rank)
    rows = [torch.randint(3, VOCAB, (length,), generator=generator).tolist() for length in (12, 20)]
    labels = [rows[0], [IGNORE_INDEX] * 20 if rank == 1 else rows[1]]
    return [collate([Sample(*both)], pad_token_id=0) for both in zip(rows, labels, strict=True)]


def train(
    folder: Path, backend: str, targets: tuple[str, ...], runtime: Runtime
) -> tuple[list[float], torch.Tensor]:
    """Losses and gradient norms of two optimizer steps, and the adapter after them."""
    config = TrainConfig(
        model=ModelConfig(path=str(folder), dtype="float32"),
        adapter=AdapterConfig(rank=4, target_modules=targets),
        memory=MemoryConfig(recompute=1),
        optim=OptimConfig(lr=1e-2, grad_accum_steps=2),
    )
    parts, sharing = build(config, folder, backend, runtime)
    model = parts.model.train()
    engine = sharing.engine(parts)
    losses = []
    for _ in range(2):
        sums = train_step(model, engine, micro_batches(runtime.rank), 1e-2, 1.0, runtime)
        losses += [runtime.sum_over_ranks(sums.loss).item(), sums.grad_norm.item()]
    assert (logits_transform(model) is None) == (backend == "ddp")
    return losses, torch.cat([tensor.flatten() for tensor in whole_adapter(model).values()])


def compare(folders: dict[str, Path], backends: tuple[str, ...]) -> None:
    runtime = start_runtime(seed=0, dtype="float32")
    cases = [("llama-tied", ("q_proj", "down_proj")), ("gemma2", ("q_proj", "down_proj"))]
    cases += [("llama", ("q_proj", "lm_head"))]  # a head that learns
    for name, targets in cases:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                logits_module, "_probe_head", lambda _: None
            )  # the model's own logits, all at once
            expected_losses, expected = train(folders[name], "ddp", targets, runtime)
        assert expected_losses[2] < expected_losses[0]
        for backend in backends:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(loss_module, "_CHUNK_BYTES", 5 * VOCAB * 12)
                losses, adapter = train(folders[name], backend, targets, runtime)
            assert losses == pytest.approx(expected_losses, rel=1e-5), (name, backend)
            # Adam's first steps have the size of the learning rate, and the sign of a gradient that
            # may be rounding.
            differing = (adapter - expected).abs() > 1e-5
            assert differing.sum() <= 0.002 * expected.numel(), (name, backend)


@pytest.mark.parametrize("backend", ["fsdp", "zero3"])
def test_sharded_ranks_train_as_with_the_plain_loss(
    families: dict[str, Path], backend: str
) -> None:
    """On two ranks losses, gradient norms and adapter of two steps are within 1e-5 of those of
    whole models with full logits. The cases are tied and untied heads, soft-capping, an adapter on
    the head, and a micro-batch without targets on one of the ranks."""
    if backend == "zero3" and find_spec("deepspeed") is None:
        pytest.skip("deepspeed is an optional dependency")
    run_on_processes(compare, 2, families, (backend,))
