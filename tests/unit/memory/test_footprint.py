"""The parameter bytes of each rank are known before anything is read, exact to the byte."""

import pytest
import torch
from transformers import LlamaConfig

from qlora_dist.config.schema import AdapterConfig, ModelConfig
from qlora_dist.errors import ModelError
from qlora_dist.memory.footprint import Footprint, check_memory, plan_footprint
from qlora_dist.model.adapters import add_adapters
from qlora_dist.model.parts import decoder_layers
from qlora_dist.model.skeleton import build_skeleton
from qlora_dist.runtime.memory import free_bytes, free_in_control_groups

HIDDEN, INTERMEDIATE, LAYERS, VOCAB, RANK = (
    8192,
    22016,
    80,
    32000,
    64,
)  # LLaMA-65B (arXiv:2302.13971, table 2)


@pytest.fixture(scope="module")
def llama_65b(tmp_path_factory):
    """LLaMA-65B with rank-64 adapters on all linear layers, on the meta device."""
    folder = tmp_path_factory.mktemp("llama-65b")
    LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=64,
        num_key_value_heads=64,
        vocab_size=VOCAB,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)
    skeleton = build_skeleton(folder, ModelConfig(path=str(folder), dtype="bfloat16"))
    return add_adapters(skeleton, AdapterConfig(rank=RANK), "base")


def rows(count: int, num_shards: int, rank: int) -> int:
    """Rows of one rank when `count` rows are cut into chunks of ceil(count / num_shards)."""
    size = (count + num_shards - 1) // num_shards
    return max(0, min(size, count - size * rank))


def expected(num_shards: int, rank: int) -> Footprint:
    """The rows' bytes by hand: NF4 is half a byte an element, with one uint8 constant in 64
    elements, one float32 in 256 of those, and one float32 offset a matrix; the rest is bfloat16,
    the adapters float32."""

    def share(count: int) -> int:
        return rows(count, num_shards, rank)

    def matrix(numel: int) -> int:
        return share(numel // 2) + share(numel // 64) + 4 * share(numel // 64 // 256) + 4 * share(1)

    shapes = [(HIDDEN, HIDDEN)] * 4 + [(INTERMEDIATE, HIDDEN)] * 2 + [(HIDDEN, INTERMEDIATE)]
    layer = sum(matrix(out * columns) for out, columns in shapes) + 2 * 2 * share(HIDDEN)
    ends = 2 * 2 * share(VOCAB) * HIDDEN + 2 * share(HIDDEN)
    adapters = sum(4 * (share(RANK) * columns + share(out) * RANK) for out, columns in shapes)
    return Footprint(LAYERS * layer + ends, LAYERS * adapters, 0)


@pytest.mark.parametrize("num_shards", [1, 2, 4, 8])
def test_65b_plan_is_exact(llama_65b, num_shards: int) -> None:
    """For 1, 2, 4 and 8 ranks the plan of a 65B Llama equals the formula for every rank, to the
    byte."""
    layers = decoder_layers(llama_65b)
    whole = expected(1, 0)
    for rank in range(num_shards):
        plan = plan_footprint(llama_65b, layers, num_shards, rank)
        assert (plan.base, plan.adapters) == (
            expected(num_shards, rank).base,
            expected(num_shards, rank).adapters,
        )
    assert (
        34e9 < whole.base < 35e9
    )  # 64.8e9 linear elements at 4.127 bits, 1.05e9 bytes of embedding and head
    total = sum(
        plan_footprint(llama_65b, layers, num_shards, rank).base for rank in range(num_shards)
    )
    assert total == whole.base


def test_meta_model_holds_no_memory(llama_65b) -> None:
    """Describing a 65B model allocates none of its parameters."""
    assert all(param.is_meta for param in llama_65b.parameters())


def test_a_model_that_cannot_fit_is_refused_with_the_numbers() -> None:
    """The message holds the needed and free bytes and the number of processes; a model that fits
    passes."""
    free = free_bytes(torch.device("cpu"))
    check_memory(
        Footprint(base=free // 4, adapters=0, largest_unit=0), torch.device("cpu"), num_ranks_here=2
    )
    too_large = Footprint(base=free, adapters=2**30, largest_unit=2**30)
    with pytest.raises(ModelError) as error:
        check_memory(too_large, torch.device("cpu"), num_ranks_here=2)
    for words in (
        "for each of the 2 processes",
        "1.0 of adapters",
        "1.0 for one gathered layer",
        "GiB free",
    ):
        assert words in str(error.value)


@pytest.mark.parametrize(
    ("membership", "folder", "names"),
    [
        ("0::/job/step\n", "", ("memory.max", "memory.current", "inactive_file")),
        (
            "5:cpu,cpuacct:/other\n4:memory:/job/step\n0::/\n",
            "memory",
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ),
    ],
)
def test_free_memory_is_that_of_every_control_group(tmp_path, membership, folder, names) -> None:
    """Free memory is that of the process's own group and the groups around it, in both versions;
    untouched cache is free; some groups have no limit."""
    limit, used, cached = names
    groups = {"job/step": ("max", 700, 0), "job": (1000, 900, 300), "": (5000, 6000, 10)}
    for group, (allows, uses, caches) in groups.items():
        place = tmp_path / folder / group
        place.mkdir(parents=True, exist_ok=True)
        (place / limit).write_text(f"{allows}\n")
        (place / used).write_text(f"{uses}\n")
        (place / "memory.stat").write_text(f"anon 5\n{cached} {caches}\nslab 7\n")
    (tmp_path / "membership").write_text(membership)
    assert free_in_control_groups(tmp_path / "membership", tmp_path) == [400, 0]


def test_without_control_groups_nothing_limits(tmp_path) -> None:
    """No control group, or none that is mounted here, limits nothing."""
    assert free_in_control_groups(tmp_path / "missing", tmp_path) == []
    (tmp_path / "membership").write_text("4:memory:/elsewhere\n0::/\n")
    assert free_in_control_groups(tmp_path / "membership", tmp_path) == []
