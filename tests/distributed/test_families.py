"""Each family of models loads as in transformers, and trains sharded as it trains whole."""

from pathlib import Path

import pytest
import torch

from qlora_dist.config.schema import (
    AdapterConfig,
    MemoryConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
)
from qlora_dist.data.batch import collate
from qlora_dist.data.samples import Sample
from qlora_dist.model.adapters import whole_adapter
from qlora_dist.model.nf4 import QuantizedLinear
from qlora_dist.runtime.processes import Runtime, start_runtime
from qlora_dist.train import train_step
from tests.support.built import build
from tests.support.families import FAMILIES
from tests.support.models import load_here, load_there, logits
from tests.support.processes import run_on_processes


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers(families: dict[str, Path], family: str) -> None:
    """The 4-bit base gives exactly the bfloat16 logits of the folder quantized by transformers."""
    from transformers import BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    ours = load_here(families[family])
    attention = (
        ours.config._attn_implementation
    )  # by itself, transformers 5.17 takes one without Gemma's cap
    assert any(isinstance(module, QuantizedLinear) for module in ours.modules())
    assert not isinstance(ours.get_output_embeddings(), QuantizedLinear)
    theirs = load_there(
        families[family], quantization_config=quantization, attn_implementation=attention
    )
    assert torch.equal(logits(ours), logits(theirs))


def train_two_steps(
    folder: Path, backend: str, runtime: Runtime
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and final adapter of two optimizer steps with recomputed activations."""
    config = TrainConfig(
        model=ModelConfig(path=str(folder), dtype="float32"),
        adapter=AdapterConfig(rank=4),
        memory=MemoryConfig(recompute="full"),
        optim=OptimConfig(lr=1e-2),
    )
    parts, sharing = build(config, folder, backend, runtime)
    model = parts.model.train()
    engine = sharing.engine(parts)
    generator = torch.Generator().manual_seed(runtime.rank)
    rows = [torch.randint(3, 320, (length,), generator=generator).tolist() for length in (12, 20)]
    batches = [collate([Sample(ids, ids)], pad_token_id=0) for ids in rows]
    losses = []
    for _ in range(2):
        sums = train_step(model, engine, batches, 1e-2, 1.0, runtime)
        losses.append(runtime.sum_over_ranks(sums.loss).item())
    return losses, whole_adapter(model)


def check_families(folders: dict[str, Path]) -> None:
    runtime = start_runtime(seed=0, dtype="float32")
    for name, folder in folders.items():
        whole_losses, whole = train_two_steps(folder, "ddp", runtime)
        losses, sharded = train_two_steps(folder, "fsdp", runtime)
        assert losses == whole_losses, name
        assert losses[1] < losses[0], name
        for key, tensor in whole.items():
            assert torch.equal(tensor, sharded[key]), (name, key)


def test_sharded_training_equals_whole_training(families: dict[str, Path]) -> None:
    """On two ranks each family trains to equal bits sharded and whole, with recomputation and
    accumulation."""
    run_on_processes(check_families, 2, families)


def test_a_family_that_cannot_be_done_is_named(tmp_path: Path) -> None:
    """A model with fused experts of its own kind is refused: they are no linear layers, and
    transformers does not ask its registry how to compute them. Most of it would stay in 16 bits."""
    from transformers import JetMoeConfig, JetMoeForCausalLM

    from qlora_dist.errors import ModelError
    from qlora_dist.model.skeleton import build_skeleton

    config = JetMoeConfig(
        vocab_size=320,
        hidden_size=64,
        num_hidden_layers=2,
        num_key_value_heads=2,
        kv_channels=16,
        intermediate_size=112,
        num_local_experts=4,
    )
    JetMoeForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"JetMoeForCausalLM.*fused experts"):
        build_skeleton(tmp_path, ModelConfig(path=str(tmp_path)))
