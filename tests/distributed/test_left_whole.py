"""Parameters that both ends of a sharded model need stay whole between micro-batches, unless
trained."""

from pathlib import Path
from unittest import mock

import pytest
import torch
import transformers
from torch import nn
from torch.distributed.fsdp._fully_shard import _fsdp_param_group
from torch.distributed.tensor import DTensor

from qlora_dist.config.schema import (
    AdapterConfig,
    BackendName,
    MemoryConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
)
from qlora_dist.data.batch import MicroBatch, collate
from qlora_dist.data.samples import Sample
from qlora_dist.memory.footprint import parameters_outside
from qlora_dist.model.adapters import adapter_parameters, whole_adapter
from qlora_dist.model.parts import ModelParts, base_model, decoder_layers
from qlora_dist.runtime.processes import Runtime, start_runtime
from qlora_dist.runtime.shards import local_bytes, whole_bytes
from qlora_dist.train import train_step
from tests.support.built import build
from tests.support.processes import run_on_processes

NUM_STEPS = 3


def micro_batches(rank: int) -> list[MicroBatch]:
    """The two micro-batches of a step."""
    generator = torch.Generator().manual_seed(rank)
    rows = [torch.randint(3, 300, (length,), generator=generator).tolist() for length in (12, 20)]
    return [collate([Sample(row, row)], pad_token_id=0) for row in rows]


def train(
    folder: Path, backend: BackendName, runtime: Runtime
) -> tuple[nn.Module, torch.Tensor, list[int]]:
    """Model and adapter after some steps, and after each step the memory that holds the embedding's
    weight."""
    config = TrainConfig(
        model=ModelConfig(path=str(folder), dtype="float32"),
        adapter=AdapterConfig(rank=4),
        memory=MemoryConfig(recompute="none"),
        optim=OptimConfig(lr=1e-2, grad_accum_steps=2),
    )
    parts, sharing = build(config, folder, backend, runtime)
    model = parts.model.train()
    engine = sharing.engine(parts)
    places = []
    for _ in range(NUM_STEPS):
        train_step(model, engine, micro_batches(runtime.rank), 1e-2, 1.0, runtime)
        places.append(base_model(model).get_input_embeddings().weight.data_ptr())
    return model, torch.cat([tensor.flatten() for tensor in whole_adapter(model).values()]), places


def check_tied(folder: Path) -> None:
    runtime = start_runtime(seed=0, dtype="float32")
    _, expected, _ = train(folder, "ddp", runtime)
    model, adapter, places = train(folder, "fsdp", runtime)
    assert (adapter - expected).norm() <= 1e-5 * expected.norm()
    assert len(set(places)) == 1, "gathered once, in the first step"
    rest = parameters_outside(ModelParts(model).gathered_units, model)
    assert sum(map(torch.numel, rest)) > 320 * 64
    assert not any(isinstance(param, DTensor) for param in rest)
    for layer in decoder_layers(model):
        assert local_bytes(layer) <= 0.55 * whole_bytes(layer)


def test_a_tied_embedding_is_gathered_once(families: dict[str, Path]) -> None:
    run_on_processes(check_tied, 2, families["llama-tied"])


def check_trained(folder: Path) -> None:
    runtime = start_runtime(seed=0, dtype="float32")
    _, expected, _ = train(folder, "ddp", runtime)
    model, adapter, _ = train(folder, "fsdp", runtime)
    assert (adapter - expected).norm() <= 1e-5 * expected.norm()
    trained = [name for name in adapter_parameters(model) if "project_in" in name]
    assert len(trained) == 2
    assert all(
        isinstance(param, DTensor)
        for param in parameters_outside(ModelParts(model).gathered_units, model)
    )


@pytest.fixture(scope="module")
def projected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with linear layers outside its decoder layers."""
    folder = tmp_path_factory.mktemp("opt")
    torch.manual_seed(0)
    config = transformers.OPTConfig(
        vocab_size=320,
        hidden_size=64,
        word_embed_proj_dim=32,
        ffn_dim=112,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        do_layer_norm_before=False,
        dropout=0.0,
    )
    transformers.OPTForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def test_what_is_trained_is_gathered_anew_for_every_micro_batch(projected: Path) -> None:
    """A trained parameter is gathered anew for each micro-batch: left whole, it would miss the
    updates."""
    run_on_processes(check_trained, 2, projected)


def check_untied(folder: Path) -> None:
    runtime = start_runtime(seed=0, dtype="float32")
    gathered: list[str] = []
    original = _fsdp_param_group.foreach_all_gather

    def logged(params, *arguments):
        modules = [param._module_info.module for param in params]
        gathered.extend(name for name, module in ends.items() if module in modules)
        return original(params, *arguments)

    config = TrainConfig(
        model=ModelConfig(path=str(folder), dtype="float32"),
        adapter=AdapterConfig(rank=4),
        memory=MemoryConfig(recompute="full"),
        optim=OptimConfig(lr=1e-2, grad_accum_steps=2),
    )
    parts, sharing = build(config, folder, "fsdp", runtime)
    model = parts.model.train()
    base = base_model(model)
    ends = {"embedding": base.get_input_embeddings(), "head": base.get_output_embeddings()}
    engine = sharing.engine(parts)
    train_step(model, engine, micro_batches(runtime.rank), 1e-2, 1.0, runtime)
    with mock.patch.object(_fsdp_param_group, "foreach_all_gather", logged):
        train_step(model, engine, micro_batches(runtime.rank), 1e-2, 1.0, runtime)
    assert gathered == ["embedding", "head"] * 2


def test_an_embedding_is_not_gathered_for_backward(families: dict[str, Path]) -> None:
    """An untied embedding is gathered once per micro-batch, as the head is. FSDP2 by itself would
    gather it once more at the end of each backward, which needs nothing of it."""
    run_on_processes(check_untied, 2, families["llama"])
