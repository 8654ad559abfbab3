"""An adapter folder holds the adapter as it was written, or it does not exist."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_dist.config.schema import AdapterConfig, ModelConfig
from qlora_dist.errors import CheckpointError
from qlora_dist.model.adapters import add_adapters, load_adapter_weights
from qlora_dist.model.skeleton import build_skeleton
from qlora_dist.run import adapter_folder
from qlora_dist.run.adapter_folder import AdapterRecord, read_adapter_record, save_adapter
from qlora_dist.weights.loading import materialize

ADAPTER_RECORD = AdapterRecord(
    ModelConfig(path="base", quantization="fp4", double_quant=False),
    "prompt_completion",
    {"enable_thinking": False, "deep": [1, None]},
)


@pytest.fixture(scope="module")
def model(tiny_llama: Path):
    """Model on the meta device with adapters of rank 2."""
    skeleton = build_skeleton(tiny_llama, ModelConfig(path=str(tiny_llama)))
    return add_adapters(skeleton, AdapterConfig(rank=2, target_modules=("q_proj",)), "base")


@pytest.fixture
def tensors(model) -> dict[str, torch.Tensor]:
    """Random values for all adapter parameters."""
    return {name: torch.randn(p.shape) for name, p in model.named_parameters() if p.requires_grad}


def test_what_is_saved_comes_back(
    tmp_path: Path, model, tensors, tokenizer, tiny_llama: Path
) -> None:
    """All values and the record are read back equal; names are PEFT's; all files have one mode."""
    save_adapter(tmp_path / "adapter", model, tensors, tokenizer, ADAPTER_RECORD)
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert saved.keys() == {name.replace(".default", "") for name in tensors}
    assert read_adapter_record(tmp_path / "adapter") == ADAPTER_RECORD
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    modes = {
        path.stat().st_mode for path in (tmp_path / "adapter").iterdir() if path.suffix != ".jinja"
    }
    assert len(modes) == 1

    skeleton = build_skeleton(tiny_llama, ModelConfig(path=str(tiny_llama)))
    again = add_adapters(skeleton, AdapterConfig(rank=2, target_modules=("q_proj",)), "base")
    materialize(again, torch.device("cpu"), torch.device("cpu"))
    load_adapter_weights(again, tmp_path / "adapter")
    for name, param in again.named_parameters():
        if param.requires_grad:
            assert torch.equal(param, tensors[name]), name


def test_a_write_that_went_wrong_does_not_count(
    tmp_path: Path, model, tensors, tokenizer, monkeypatch
) -> None:
    """If a value read back differs from the one written, the previous adapter stays as it was."""
    save_adapter(tmp_path / "adapter", model, tensors, tokenizer, ADAPTER_RECORD)
    before = {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()}

    def faulty_disk(weights: dict[str, torch.Tensor], path: Path, **options: object) -> None:
        name = next(iter(weights))
        save_file({**weights, name: weights[name] + 1}, path, **options)

    monkeypatch.setattr(adapter_folder, "save_file", faulty_disk)
    with pytest.raises(CheckpointError, match="read back differently"):
        save_adapter(tmp_path / "adapter", model, tensors, tokenizer, ADAPTER_RECORD)
    assert {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_values_that_are_not_finite_are_not_saved(
    tmp_path: Path, model, tensors, tokenizer
) -> None:
    """An adapter with NaNs, which would make a model without answers, is refused."""
    next(iter(tensors.values()))[0, 0] = float("nan")
    with pytest.raises(CheckpointError, match=r"not finite in .*q_proj"):
        save_adapter(tmp_path / "adapter", model, tensors, tokenizer, ADAPTER_RECORD)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_no_adapter_is_named(tmp_path: Path, model, tensors, tokenizer) -> None:
    """A missing folder is refused by name; one level too high, with the right folder suggested."""
    with pytest.raises(CheckpointError, match="does not exist"):
        read_adapter_record(tmp_path / "missing")
    save_adapter(tmp_path / "adapter", model, tensors, tokenizer, ADAPTER_RECORD)
    with pytest.raises(CheckpointError, match=rf"Did you mean {tmp_path}/adapter\?"):
        read_adapter_record(tmp_path)
