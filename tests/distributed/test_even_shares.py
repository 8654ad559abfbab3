"""Each rank of FSDP2 holds an even share of a 65B model, in a pretended group."""

from __future__ import annotations

import dataclasses
import multiprocessing
from pathlib import Path

import pytest
from transformers import LlamaConfig

from qlora_dist.config.schema import AdapterConfig, ModelConfig
from qlora_dist.memory.footprint import plan_footprint
from qlora_dist.model.adapters import add_adapters
from qlora_dist.model.parts import ModelParts
from qlora_dist.model.skeleton import build_skeleton
from tests.support.built import cut

RANK = 64


def shares_under_fsdp(folder: str, world_size: int) -> None:
    """Shard the 65B description over a pretended group, in its own process, and compare with an
    even share."""
    import os

    from torch import distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from qlora_dist.runtime.processes import start_runtime
    from qlora_dist.runtime.shards import local_bytes, whole_bytes

    runtime = dataclasses.replace(start_runtime(seed=0, dtype="bfloat16"), world_size=world_size)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    skeleton = build_skeleton(Path(folder), ModelConfig(path=folder, dtype="bfloat16"))
    model = add_adapters(skeleton, AdapterConfig(rank=RANK), "base")
    total = whole_bytes(model)
    plan = plan_footprint(model, ModelParts(model).gathered_units, world_size, rank=0)
    cut(model, "fsdp", runtime)
    held = local_bytes(model)
    assert held == plan.base + plan.adapters
    assert held <= 1.02 * total / world_size
    assert plan.largest_unit <= 0.02 * total
    os._exit(0)


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_fsdp_holds_an_even_share_of_65b(tmp_path: Path, world_size: int) -> None:
    """Sharded by FSDP2, the first of 2, 4 and 8 ranks holds the planned bytes, at most 1.02 of an
    even share, and the largest unit gathered at once is below 2 % of the model; constants,
    embedding and adapters included."""
    LlamaConfig(
        hidden_size=8192,
        intermediate_size=22016,
        num_hidden_layers=80,
        num_attention_heads=64,
        vocab_size=32000,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(tmp_path)
    process = multiprocessing.get_context("spawn").Process(
        target=shares_under_fsdp, args=(str(tmp_path), world_size)
    )
    process.start()
    process.join()
    assert process.exitcode == 0
