"""Compiled models on several ranks train like uncompiled ones."""

from pathlib import Path

import pytest
import torch
from torch import nn

from qlora_dist.config.schema import (
    AdapterConfig,
    MemoryConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
)
from qlora_dist.data.batch import collate
from qlora_dist.data.tokenization import Sample
from qlora_dist.model.adapters import whole_adapter
from qlora_dist.model.parts import decoder_layers
from qlora_dist.runtime.processes import Runtime, start_runtime
from qlora_dist.runtime.shards import local_bytes, whole_bytes
from qlora_dist.train import train_step
from tests.support.built import build
from tests.support.compiled import without_kernels
from tests.support.processes import run_on_processes

WAYS = {  # backend, compiled, recomputed
    "fsdp": ("fsdp", True, "none"),
    "fsdp, first layer recomputing": ("fsdp", True, 1),
}
ZERO_WAYS = {"zero2": ("zero2", True, "none"), "zero2, recomputing": ("zero2", True, "full")}


def train(
    folder: Path, way: tuple, runtime: Runtime
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and final adapter of two steps of two accumulated micro-batches."""
    backend, is_compiled, recompute = way
    config = TrainConfig(
        model=ModelConfig(path=str(folder), dtype="float32"),
        adapter=AdapterConfig(rank=4),
        memory=MemoryConfig(recompute=recompute, compile=is_compiled),
        optim=OptimConfig(lr=1e-2, grad_accum_steps=2),
    )
    parts, sharing = build(config, folder, backend, runtime)
    model = parts.model.train()
    engine = sharing.engine(parts)
    generator = torch.Generator().manual_seed(runtime.rank)
    rows = [torch.randint(3, 300, (length,), generator=generator).tolist() for length in (20, 20)]
    batches = [collate([Sample(ids, ids)], pad_token_id=0) for ids in rows]
    losses = []
    for _ in range(2):
        sums = train_step(model, engine, batches, 1e-2, 1.0, runtime)
        losses.append(runtime.sum_over_ranks(sums.loss).item())
    if backend == "fsdp":
        layers = nn.ModuleList(decoder_layers(model))
        assert local_bytes(layers) <= 0.55 * whole_bytes(layers), "what was gathered is let go of"
    return losses, whole_adapter(model)


def compare(folder: Path, ways: dict) -> None:
    runtime = start_runtime(seed=0, dtype="float32")
    expected_losses, expected = train(folder, ("ddp", False, "none"), runtime)
    for name, way in ways.items():
        with without_kernels():
            losses, found = train(folder, way, runtime)
        for loss, expected_loss in zip(losses, expected_losses, strict=True):
            assert abs(loss / expected_loss - 1) <= 1e-6, name
        for key, tensor in expected.items():
            assert (found[key] - tensor).norm() <= 1e-5 * tensor.norm(), (name, key)


@pytest.mark.parametrize("ways", [WAYS, ZERO_WAYS], ids=["here", "deepspeed"])
def test_distributed_layers_train_compiled(tmp_path: Path, ways: dict) -> None:
    """On two ranks float32 losses and adapters equal those of uncompiled `ddp`, also where two
    kinds of layers take turns."""
    if ways is ZERO_WAYS:
        pytest.importorskip("deepspeed", reason="deepspeed is an optional dependency")
    run_on_processes(compare, 2, of_two_kinds(tmp_path), ways)


def of_two_kinds(folder: Path) -> Path:
    """Make a tiny random Cohere 2. Its layers of sliding attention rotate queries and keys, those
    of full attention do not; each layer decides by its own kind."""
    from transformers import Cohere2Config, Cohere2ForCausalLM

    torch.manual_seed(0)
    config = Cohere2Config(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=112,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        pad_token_id=0,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
    )
    model = Cohere2ForCausalLM(config)
    for param in model.parameters():
        torch.nn.init.normal_(param, std=0.1)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder
