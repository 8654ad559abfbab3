"""DoRA computes what peft's own does on an unquantized base, forward and backward."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

from qlora_dist.config.schema import AdapterConfig, ModelConfig
from qlora_dist.model.adapters import (
    adapter_parameters,
    add_adapters,
    init_adapters,
    lora_layers,
    saved_name,
)
from qlora_dist.model.dora import init_magnitudes, row_lengths
from qlora_dist.model.nf4 import QuantizedLinear
from qlora_dist.model.parts import base_model
from qlora_dist.model.skeleton import build_skeleton
from qlora_dist.weights.loading import load_base_weights, materialize

IDS = torch.randint(3, 300, (2, 11), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def biased_llama(tmp_path_factory) -> Path:
    """A random Llama whose linear layers have biases."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=112,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=True,
        mlp_bias=True,
    )
    model = LlamaForCausalLM(config)
    for param in model.parameters():
        torch.nn.init.normal_(param, std=0.12)
    folder = tmp_path_factory.mktemp("biased-llama")
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def build(folder: Path, quantization: str = "nf4", dtype: str = "float32", **adapter: object):
    """Build our model with DoRA adapters at their initial values."""
    config = ModelConfig(path=str(folder), dtype=dtype, quantization=quantization)
    adapters = AdapterConfig(rank=4, alpha=12, use_dora=True, **adapter)
    model = add_adapters(build_skeleton(folder, config), adapters, str(folder))
    materialize(model, torch.device("cpu"), torch.device("cpu"))
    load_base_weights(model, folder, torch.device("cpu"))
    init_adapters(model, seed=0)
    init_magnitudes(lora_layers(model))
    return model


def shake(model) -> None:
    """Move all adapter values off the initial ones: B = 0 hides most of the computation."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for param in adapter_parameters(model).values():
            noise = torch.randn(param.shape, generator=generator)
            param.mul_(1 + 0.2 * noise) if param.ndim == 1 else param.add_(0.05 * noise)


def reference_of(model, folder: Path, dropout: float):
    """Build peft's own DoRA with our adapter values, on our dequantized weights in float32."""
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name, module in base_model(model).named_modules():
        if isinstance(module, QuantizedLinear):
            plain.get_submodule(name.removesuffix(".base_layer")).weight.data = module.dequantized()
    config = LoraConfig(
        r=4,
        lora_alpha=12,
        lora_dropout=dropout,
        target_modules="all-linear",
        use_dora=True,
        task_type="CAUSAL_LM",
    )
    reference = get_peft_model(plain, config)
    magnitudes = {
        n: p.detach().clone() for n, p in adapter_parameters(reference).items() if "magnitude" in n
    }
    ours = {
        saved_name(name): param.detach().clone()
        for name, param in adapter_parameters(model).items()
    }
    assert ours.keys() == get_peft_model_state_dict(reference).keys()
    result = set_peft_model_state_dict(reference, ours)
    assert not result.unexpected_keys
    return reference, magnitudes


def loss_of(model) -> torch.Tensor:
    """Return a loss that every logit bears on."""
    torch.manual_seed(0)  # of dropout
    logits = model(input_ids=IDS).logits
    return (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).mean()


@pytest.mark.parametrize(("quantization", "dropout"), [("nf4", 0.0), ("nf4", 0.25), ("none", 0.0)])
def test_forward_and_gradients_are_those_of_peft(
    biased_llama: Path, quantization: str, dropout: float
) -> None:
    """Results in float32 are those of peft, with biases, quantized or not, with dropout or not.

    Logits agree within 1e-6 of the largest logit, and each gradient within 1e-5 of its norm.
    """
    model = build(biased_llama, quantization, dropout=dropout).train()
    reference, magnitudes = reference_of(model, biased_llama, dropout)
    for name, param in adapter_parameters(model).items():
        if "magnitude" in name:
            torch.testing.assert_close(param.detach(), magnitudes[name], rtol=1e-6, atol=0)
    shake(model)
    set_peft_model_state_dict(
        reference, {saved_name(n): p.detach() for n, p in adapter_parameters(model).items()}
    )
    reference.train()
    torch.manual_seed(0)
    expected = reference(input_ids=IDS).logits
    torch.manual_seed(0)
    assert (model(input_ids=IDS).logits - expected).abs().max() <= 1e-6 * expected.abs().max()

    loss_of(model).backward()
    loss_of(reference).backward()
    gradients = {name: param.grad for name, param in adapter_parameters(reference).items()}
    assert sum("lora_magnitude_vector" in name for name in gradients) == 2 * 7
    for name, param in adapter_parameters(model).items():
        assert gradients[name].any(), name
        assert (param.grad - gradients[name]).norm() <= 1e-5 * gradients[name].norm(), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_starts_as_the_base(tiny_llama: Path, dtype: str) -> None:
    """With initial values the logits are exactly those of the base, in bfloat16 too.

    There a rounded length would move them by up to 0.2 %.
    """
    model = build(tiny_llama, dtype=dtype).eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
        adapted = model(input_ids=IDS).logits
        with model.disable_adapter():
            assert torch.equal(model(input_ids=IDS).logits, adapted)


def test_lengths_are_those_of_the_adapted_rows(tiny_llama: Path, monkeypatch) -> None:
    """Lengths taken a few rows at a time are the row norms of W + s BA."""
    monkeypatch.setattr("qlora_dist.model.dora._PIECE", 64 * 5)
    model = build(tiny_llama)
    shake(model)
    for layer in lora_layers(model):
        update = (
            layer.scaling["default"]
            * layer.lora_B["default"].weight
            @ layer.lora_A["default"].weight
        )
        expected = (layer.get_base_layer().dequantized() + update).norm(dim=1)
        torch.testing.assert_close(row_lengths(layer), expected.detach(), rtol=1e-6, atol=0)


def test_lengths_are_kept_in_evaluation_only(tiny_llama: Path, monkeypatch) -> None:
    """Evaluation computes lengths once, however many tokens are generated.

    Training in between renews them.
    """
    model = build(tiny_llama)
    calls = []
    monkeypatch.setattr(
        "qlora_dist.model.dora.row_lengths", lambda layer: calls.append(1) or row_lengths(layer)
    )
    with torch.no_grad():
        for _ in range(3):
            before = model.eval()(input_ids=IDS).logits
    assert len(calls) == 3 * 7 * 3  # eval() starts over
    with torch.no_grad():
        model(input_ids=IDS)
    assert len(calls) == 3 * 7 * 3
    model.train()
    shake(model)
    with torch.no_grad():
        assert not torch.equal(model.eval()(input_ids=IDS).logits, before)
    assert len(calls) == 3 * 7 * 4
