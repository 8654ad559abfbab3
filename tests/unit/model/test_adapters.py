"""Initial values of adapters, and adapters read back from a folder."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_dist.config.schema import AdapterConfig, ModelConfig, OptimConfig
from qlora_dist.errors import CheckpointError, ConfigError
from qlora_dist.model.adapters import (
    adapter_parameters,
    add_adapters,
    check_adapter_fits,
    init_adapters,
    load_adapter_weights,
    wrap_with_saved_adapter,
)
from qlora_dist.model.skeleton import build_skeleton
from qlora_dist.optim.optimizers import parameter_groups
from qlora_dist.run.adapter_folder import AdapterRecord, save_adapter
from qlora_dist.weights.loading import materialize
from tests.support.models import edit_json

CPU = torch.device("cpu")


def described(folder: Path, **adapter: object):
    """Build a meta-device model with adapters."""
    return add_adapters(
        build_skeleton(folder, ModelConfig(path=str(folder))), AdapterConfig(**adapter), str(folder)
    )


@pytest.mark.parametrize("init", ["default", "gaussian"])
def test_initial_values_have_the_distribution_of_peft(tiny_llama: Path, init: str) -> None:
    """Initial A, B and seeds are as in peft.

    A is uniform in +-1/sqrt(in_features), or normal with deviation 1/rank. B is zero. No two
    matrices are equal, and the seed changes all of A.
    """
    model = described(tiny_llama, rank=8, init=init)
    assert model.peft_config["default"].init_lora_weights == (
        True if init == "default" else "gaussian"
    )
    materialize(model, CPU, CPU)
    init_adapters(model, 0, init)
    a = {
        name: param.detach().clone()
        for name, param in adapter_parameters(model).items()
        if ".lora_A." in name
    }
    assert not any(
        param.any() for name, param in adapter_parameters(model).items() if ".lora_B." in name
    )
    for matrix in a.values():
        deviation = 1 / 8 if init == "gaussian" else 1 / math.sqrt(3 * matrix.shape[1])
        assert matrix.std().item() == pytest.approx(deviation, rel=0.1)
        assert abs(matrix.mean().item()) < 4 * deviation / math.sqrt(matrix.numel())
        beyond = (matrix.abs() > 1 / math.sqrt(matrix.shape[1])).float().mean().item()
        assert (beyond == 0) == (init == "default")
    assert len({matrix.sum().item() for matrix in a.values()}) == len(a)
    init_adapters(model, 1, init)
    assert all(
        not torch.equal(matrix, adapter_parameters(model)[name]) for name, matrix in a.items()
    )


def test_magnitudes_learn_at_the_rate_of_a(tiny_llama: Path) -> None:
    """LoRA+ raises the learning rate of B alone: magnitudes keep that of A."""
    model = described(tiny_llama, rank=2, use_dora=True)
    groups = parameter_groups(adapter_parameters(model), OptimConfig(lora_plus_ratio=8.0))
    assert {multiplier: len(params) for multiplier, params in groups.items()} == {
        1.0: 2 * 21,
        8.0: 21,
    }


@pytest.fixture
def saved(tmp_path: Path, tiny_llama: Path, tokenizer) -> Path:
    """Folder with a DoRA adapter of random values on two kinds of layers."""
    model = described(tiny_llama, rank=2, use_dora=True, target_modules=("q_proj", "v_proj"))
    tensors = {name: torch.randn(param.shape) for name, param in adapter_parameters(model).items()}
    save_adapter(
        tmp_path / "adapter",
        model,
        tensors,
        tokenizer,
        AdapterRecord(ModelConfig(str(tiny_llama)), "messages"),
    )
    return tmp_path / "adapter"


def test_a_dora_adapter_has_the_names_of_peft_and_comes_back(saved: Path, tiny_llama: Path) -> None:
    """Magnitudes are saved as `lora_magnitude_vector`, as by PEFT, and every value is read back.

    It is read into a model for training and into a model for answering.
    """
    tensors = load_file(saved / "adapter_model.safetensors")
    assert {name.partition(".lora_")[2] for name in tensors} == {
        "A.weight",
        "B.weight",
        "magnitude_vector",
    }
    assert json.loads((saved / "adapter_config.json").read_text())["use_dora"] is True
    skeleton = build_skeleton(tiny_llama, ModelConfig(path=str(tiny_llama)))
    again = described(tiny_llama, rank=2, use_dora=True, target_modules=("q_proj", "v_proj"))
    for model in (again, wrap_with_saved_adapter(skeleton, saved)):
        materialize(model, CPU, CPU)
        load_adapter_weights(model, saved)
        found = {name: param for name, param in model.named_parameters() if ".lora_" in name}
        assert len(found) == len(tensors) == 3 * 2 * 3
        for name, param in found.items():
            stored = name.replace("_vector.default.weight", "_vector").replace(".default", "")
            assert torch.equal(param, tensors[stored]), name


def without_a_tensor(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[next(name for name in tensors if name.endswith("lora_A.weight"))]


def with_another_shape(tensors: dict[str, torch.Tensor]) -> None:
    name = next(name for name in tensors if name.endswith("lora_A.weight"))
    tensors[name] = tensors[name][:, :60].contiguous()


def with_another_layer(tensors: dict[str, torch.Tensor]) -> None:
    tensors["base_model.model.model.layers.0.self_attn.o_proj.lora_A.weight"] = torch.zeros(2, 64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_a_tensor, r"1 tensors missing \['.*lora_A.weight'\]"),
        (with_another_shape, r"lora_A.weight is \(2, 60\), but \(2, 64\) is needed"),
        (
            with_another_layer,
            r"adapts o_proj, q_proj, v_proj; adapter.target_modules asks for q_proj, v_proj",
        ),
    ],
)
def test_an_adapter_of_another_model_is_refused(
    saved: Path, tiny_llama: Path, change, message: str
) -> None:
    """A wrong tensor is named from names and shapes alone, before the base is read."""
    tensors = load_file(saved / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, saved / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        check_adapter_fits(
            described(tiny_llama, rank=2, use_dora=True, target_modules=("q_proj", "v_proj")), saved
        )


def test_an_adapter_that_is_continued_may_name_more_than_there_is(tiny_llama: Path) -> None:
    """Layers that the model lacks are refused in the user's list, and not in a continued adapter.

    Adapters of other programs list the layers of many families.
    """
    names = ("q_proj", "c_attn")
    with pytest.raises(
        ConfigError, match=r"adapter\.target_modules names c_attn, which is no linear layer"
    ):
        described(tiny_llama, rank=2, target_modules=names)
    assert adapter_parameters(described(tiny_llama, rank=2, target_modules=names, path="somewhere"))


def test_an_adapter_of_a_tied_head_is_refused(saved: Path, tiny_llama: Path) -> None:
    """A saved adapter on a tied head is refused before anything is loaded."""
    edit_json(
        saved / "adapter_config.json",
        lambda config: config.update(target_modules=["lm_head", "q_proj"]),
    )
    model = build_skeleton(tiny_llama, ModelConfig(path=str(tiny_llama)))
    model.lm_head.weight = model.get_input_embeddings().weight
    with pytest.raises(
        CheckpointError, match=r"names lm_head, whose weights are those of the embedding"
    ):
        wrap_with_saved_adapter(model, saved)


def test_an_adapter_that_belongs_to_a_changed_base_is_refused(
    saved: Path, tiny_llama: Path
) -> None:
    """An adapter whose initialization changed the base, such as PiSSA's, is refused.

    On the base of the checkpoint it would be a different model.
    """
    edit_json(
        saved / "adapter_config.json", lambda config: config.update(init_lora_weights="pissa")
    )
    with pytest.raises(CheckpointError, match=r"initialized with 'pissa', which changes the base"):
        wrap_with_saved_adapter(
            build_skeleton(tiny_llama, ModelConfig(path=str(tiny_llama))), saved
        )
