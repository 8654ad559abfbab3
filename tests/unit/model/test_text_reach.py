"""Layers that text passes through are in 4 bits and adapted; all others are named with a reason."""

from pathlib import Path

import pytest
import transformers
from accelerate import init_empty_weights
from transformers import AutoModelForCausalLM, PreTrainedModel

from qlora_dist.config.schema import AdapterConfig, ModelConfig
from qlora_dist.model.adapters import add_adapters
from qlora_dist.model.linear_layers import linear_layers, linear_layers_and_reasons
from qlora_dist.model.nf4 import QuantizedLinear
from qlora_dist.model.parts import decoder_layers, lora_layers
from qlora_dist.model.skeleton import build_skeleton
from qlora_dist.model.text_reach import LeftOut, reached_by_text
from tests.support.families import gemma3_wrapper

SIZES = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def gemma3n() -> transformers.PreTrainedConfig:
    """A Gemma 3n text model of four layers, of which two share their keys and values."""
    return transformers.Gemma3nTextConfig(
        **{**SIZES, "num_hidden_layers": 4, "intermediate_size": [96, 64, 96, 64]},
        head_dim=16,
        sliding_window=8,
        num_kv_shared_layers=2,
        hidden_size_per_layer_input=16,
        vocab_size_per_layer_input=320,
        laurel_rank=8,
        altup_num_inputs=2,
        activation_sparsity_pattern=[0.0] * 4,
        layer_types=["sliding_attention", "full_attention"] * 2,
    )


def mamba2() -> transformers.PreTrainedConfig:
    """A Mamba 2, whose fused kernel takes the weight of the output projection."""
    return transformers.Mamba2Config(
        vocab_size=320, hidden_size=64, num_hidden_layers=2, num_heads=8, head_dim=16, state_size=8
    )


def bloom() -> transformers.PreTrainedConfig:
    """A Bloom, which slices the weights of its layers in a setting that is not this one."""
    return transformers.BloomConfig(vocab_size=320, hidden_size=64, n_layer=2, n_head=4)


def described(config: transformers.PreTrainedConfig) -> PreTrainedModel:
    with init_empty_weights(include_buffers=False):
        return AutoModelForCausalLM.from_config(config)


def left(model: PreTrainedModel) -> dict[str, str]:
    """The layers that stay in 16 bits, without their number, and the reason."""
    return {
        ".".join(name.split(".")[-2:]): reason
        for name, reason in linear_layers_and_reasons(model).items()
        if reason
    }


NOT_CALLED = "text does not pass through it"
READ = "its weight is read by the model's own code"
HEAD = {"lm_head": "the output head"}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (gemma3n(), {**HEAD, "altup.prediction_coefs": READ, "altup.correction_coefs": NOT_CALLED}),
        (mamba2(), {**HEAD, "mixer.out_proj": READ}),
        (bloom(), HEAD),
        (
            transformers.FalconConfig(
                vocab_size=320, hidden_size=64, num_hidden_layers=1, num_attention_heads=4
            ),
            HEAD,
        ),
        (transformers.LlamaConfig(**SIZES), HEAD),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_layers_that_stay_in_16_bits_have_their_reason(config, expected: dict[str, str]) -> None:
    """Only the head, and weights that the model's code changes or hands to a kernel, are left."""
    assert left(described(config)) == expected


def test_a_wrapper_without_its_tower(tmp_path: Path) -> None:
    """The language model is in 4 bits and adapted; of the tower only the names remain.

    By these peft shortens the list of adapted layers without taking in one of the tower.
    """
    gemma3_wrapper().save_pretrained(tmp_path)
    model = build_skeleton(tmp_path, ModelConfig(path=str(tmp_path), dtype="float32"))
    assert isinstance(model.get_submodule("model.vision_tower"), LeftOut)
    assert isinstance(model.get_submodule("model.multi_modal_projector"), LeftOut)
    assert not any("vision" in name or "projector" in name for name, _ in model.named_parameters())
    assert len(decoder_layers(model)) == 2
    in_4_bits = {n for n, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    assert in_4_bits == set(linear_layers(model))
    assert len(in_4_bits) == 14
    peft_model = add_adapters(model, AdapterConfig(rank=4), "base")
    adapted = [name for name, _ in peft_model.named_parameters() if ".lora_A." in name]
    assert len(adapted) == len(list(lora_layers(peft_model))) == 14
    assert all(name.startswith("base_model.model.model.language_model.layers.") for name in adapted)
    for target in peft_model.peft_config["default"].target_modules:
        assert "model.vision_tower.encoder.layers.0.self_attn.q_proj".endswith(target) is False


def test_a_list_of_targets_means_the_language_model(tmp_path: Path) -> None:
    """Short names adapt its layers, although the tower has layers of the same names."""
    gemma3_wrapper().save_pretrained(tmp_path)
    model = build_skeleton(tmp_path, ModelConfig(path=str(tmp_path), dtype="float32"))
    settings = AdapterConfig(rank=4, target_modules=("q_proj", "layers.1.self_attn.v_proj"))
    names = [name for name, _ in add_adapters(model, settings, "base").named_parameters()]
    layers = "base_model.model.model.language_model.layers"
    assert [name for name in names if ".lora_A." in name] == [
        f"{layers}.{name}.lora_A.default.weight"
        for name in ("0.self_attn.q_proj", "1.self_attn.q_proj", "1.self_attn.v_proj")
    ]


def test_text_reaches_every_layer_of_a_dense_model() -> None:
    """All linear layers are called, and the head."""
    model = described(transformers.LlamaConfig(**SIZES))
    reached = reached_by_text(model)
    assert reached is not None
    assert set(linear_layers_and_reasons(model)) <= reached
