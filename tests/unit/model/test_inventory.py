"""Each parameter and each linear layer of a model is in its inventory, once."""

from pathlib import Path

import pytest
import torch
import transformers

from qlora_dist.config.schema import AdapterConfig, ModelConfig
from qlora_dist.model.adapters import add_adapters
from qlora_dist.model.inventory import ADAPTERS, EXPERTS, LINEAR, VECTORS, Inventory, Share
from qlora_dist.model.parts import ModelParts
from qlora_dist.model.skeleton import build_skeleton
from tests.support.expert_families import write_expert_family
from tests.support.families import gemma3_wrapper

D, VOCAB, MLP, LAYERS, RANK = 64, 320, 112, 2, 4
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": D,
    "intermediate_size": MLP,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}


def inventory_of(
    folder: Path, config: object, *, adapter: AdapterConfig | None = None, **model: object
) -> Inventory:
    """Take the inventory of the model that `config` describes, adapted, on meta."""
    config.save_pretrained(folder)
    settings = ModelConfig(path=str(folder), **{"dtype": "bfloat16", **model})
    skeleton = build_skeleton(folder, settings)
    return Inventory.of(ModelParts(add_adapters(skeleton, adapter or AdapterConfig(rank=RANK), "")))


def share(inventory: Inventory, what: str, dtype: str | None = None) -> Share:
    (found,) = (one for one in inventory.shares if one.what == what and dtype in (None, one.dtype))
    return found


@pytest.mark.parametrize("is_tied", [True, False])
def test_a_llama(tmp_path: Path, is_tied: bool) -> None:
    """A Llama's linear layers are in 4 bits and adapted; embedding, head and norms in 16 bits."""
    config = transformers.LlamaConfig(**COMMON, num_key_value_heads=2, tie_word_embeddings=is_tied)
    found = inventory_of(tmp_path, config)
    per_layer = 2 * D * D + 2 * D * D // 2 + 3 * D * MLP
    assert share(found, LINEAR).num_parameters == LAYERS * per_layer
    assert share(found, LINEAR).dtype == "nf4"
    embedding = "embedding (also the output head)" if is_tied else "embedding"
    assert share(found, embedding).num_parameters == VOCAB * D
    assert share(found, embedding).num_bytes == 2 * VOCAB * D
    assert share(found, VECTORS).num_parameters == (2 * LAYERS + 1) * D
    assert any(one.what == "output head" for one in found.shares) != is_tied
    features = 4 * D + 2 * (D + D // 2) + 3 * (D + MLP)
    assert share(found, ADAPTERS).num_parameters == LAYERS * RANK * features
    assert share(found, ADAPTERS).dtype == "float32"
    assert sum(found.adapted.values()) == 7 * LAYERS
    assert found.adapted["model.layers.*.self_attn.q_proj"] == LAYERS
    assert found.without_adapter == {"lm_head": (1, "the output head")}


@pytest.mark.parametrize(
    "config",
    [
        transformers.BertConfig(**COMMON, is_decoder=True),
        transformers.MambaConfig(vocab_size=VOCAB, hidden_size=D, num_hidden_layers=LAYERS),
        transformers.LlamaConfig(**COMMON),
    ],
    ids=lambda config: config.model_type,
)
def test_decoder_layers_are_those_of_the_configuration(
    tmp_path: Path, config: transformers.PreTrainedConfig
) -> None:
    """Modules that a family names beside its layers do not count (embeddings, mixers)."""
    assert inventory_of(tmp_path, config).num_layers == LAYERS


def test_a_falcon_is_in_4_bits(tmp_path: Path) -> None:
    """A subclass of nn.Linear counts as what it is: all of Falcon's are in 4 bits and adapted."""
    config = transformers.FalconConfig(
        vocab_size=VOCAB, hidden_size=D, num_hidden_layers=LAYERS, num_attention_heads=4
    )
    found = inventory_of(tmp_path, config)
    assert {one.dtype for one in found.shares if one.what == LINEAR} == {"nf4"}
    assert found.adapted.keys() == {
        f"transformer.h.*.{name}"
        for name in (
            "self_attention.query_key_value",
            "self_attention.dense",
            "mlp.dense_h_to_4h",
            "mlp.dense_4h_to_h",
        )
    }


def test_layers_without_an_adapter_have_a_reason(tmp_path: Path) -> None:
    """Layers that were not asked for are named as such, in 4 bits all the same."""
    config = transformers.LlamaConfig(**COMMON)
    adapter = AdapterConfig(rank=RANK, target_modules=["q_proj", "v_proj"])
    found = inventory_of(tmp_path, config, adapter=adapter)
    assert found.adapted == {f"model.layers.*.self_attn.{name}_proj": LAYERS for name in "qv"}
    assert found.without_adapter.pop("lm_head") == (1, "the output head")
    assert len(found.without_adapter) == 5
    reason = "not in adapter.target_modules"
    assert set(found.without_adapter.values()) == {(LAYERS, reason)}
    text = "down_proj, gate_proj, k_proj, o_proj, up_proj (not in adapter.target_modules)"
    assert text in found.lines()[1]


def test_16_bit_layers_have_a_reason(tmp_path: Path) -> None:
    """Without quantization the linear layers stay in 16 bits, and the setting is the reason."""
    found = inventory_of(tmp_path, transformers.LlamaConfig(**COMMON), quantization="none")
    linear = share(found, LINEAR)
    assert (linear.dtype, linear.why) == ("bfloat16", "model.quantization is none")
    assert linear.num_bytes == 2 * linear.num_parameters


def test_a_layer_that_the_code_reads_is_named(tmp_path: Path) -> None:
    """A layer whose weight Mamba's kernels take stays in 16 bits without an adapter; so do its
    convolutions, which are no linear layers."""
    config = transformers.Mamba2Config(
        vocab_size=VOCAB,
        hidden_size=D,
        num_hidden_layers=LAYERS,
        head_dim=16,
        num_heads=8,
        n_groups=1,
    )
    found = inventory_of(tmp_path, config)
    reason = "its weight is read by the model's own code"
    assert found.without_adapter["backbone.layers.*.mixer.out_proj"] == (LAYERS, reason)
    assert share(found, LINEAR, "bfloat16").why == reason
    assert share(found, "weights of no linear layer").names["backbone.layers.*.mixer.conv1d.weight"]


def test_left_out_towers_are_named(tmp_path: Path) -> None:
    """The towers of a multimodal wrapper are named, and none of their parameters counts."""
    found = inventory_of(tmp_path, gemma3_wrapper())
    assert any("vision_tower" in name for name in found.left_out)
    assert not any("vision" in name for one in found.shares for name in one.names)
    assert not any("vision" in name for name in (*found.adapted, *found.without_adapter))
    assert "not read" in found.lines()[-1]
    assert "vision_tower" in found.lines()[-1]


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_each_parameter_counts_once(tmp_path: Path, quantization: str) -> None:
    """The parameters are those that transformers counts, however they are stored."""
    config = transformers.GPTNeoXConfig(**COMMON, rotary_pct=0.5)
    found = inventory_of(tmp_path, config, quantization=quantization)
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(config).num_parameters()
    assert sum(one.num_parameters for one in found.shares if one.what != ADAPTERS) == theirs


def test_experts_count_in_either_form(tmp_path: Path) -> None:
    """Experts are a share of their own, quantized or not, also of a class that asks no registry;
    a router that is a linear layer by class only stays in 16 bits, with the reason."""
    folder = write_expert_family("llama4", tmp_path)
    for quantization, dtype in (("nf4", "nf4"), ("none", "bfloat16")):
        config = ModelConfig(str(folder), quantization, dtype="bfloat16")
        model = add_adapters(build_skeleton(folder, config), AdapterConfig(rank=RANK), "")
        found = Inventory.of(ModelParts(model))
        experts = share(found, EXPERTS)
        assert experts.dtype == dtype
        assert experts.num_parameters == 2 * 8 * 3 * D * 48
        reason = "its class makes more of it than a product"
        assert (2, reason) in found.without_adapter.values()
