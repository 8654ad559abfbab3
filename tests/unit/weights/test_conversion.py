"""Tensors that files hold in pieces are read as transformers puts them together, row by row."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from transformers.core_model_loading import Concatenate, MergeModulelist, Transpose, WeightConverter

from qlora_dist.config.schema import ModelConfig
from qlora_dist.model.experts import expert_stacks
from qlora_dist.model.skeleton import build_skeleton
from qlora_dist.weights.conversion import composed
from qlora_dist.weights.names import reader_of
from qlora_dist.weights.reader import SafetensorsReader
from tests.support.expert_families import EXPERT_FAMILIES, write_expert_family


@pytest.mark.parametrize("family", EXPERT_FAMILIES)
def test_stacks_are_those_of_transformers(tmp_path: Path, family: str) -> None:
    """Every run of elements of each stack equals that of the model that transformers loads."""
    folder = write_expert_family(family, tmp_path)
    skeleton = build_skeleton(folder, ModelConfig(str(folder), quantization="none"))
    there = expert_stacks(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16))
    generator = torch.Generator().manual_seed(0)
    with reader_of(skeleton, folder) as reader:
        for name, stack in there.items():
            assert reader.shape(name) == tuple(stack.shape)
            flat = stack.data.reshape(-1)
            cuts = torch.randint(len(flat), (6,), generator=generator).sort().values.tolist()
            for first, end in zip([0, *cuts], [*cuts, len(flat)], strict=True):
                assert torch.equal(reader.elements(name, first, end), flat[first:end])
            assert torch.equal(reader.whole(name), stack.data)
            assert torch.equal(reader.rows(name, 3, 4), stack.data[3:4])


def test_only_asked_rows_are_read(tmp_path: Path) -> None:
    """A rank's part of a stack costs the rows that cover it, experts apart or fused."""
    for family in ("mixtral", "gpt_oss"):
        folder = write_expert_family(family, tmp_path / family)
        skeleton = build_skeleton(folder, ModelConfig(str(folder), quantization="none"))
        with reader_of(skeleton, folder) as reader:
            name, stack = next(iter(expert_stacks(skeleton).items()))
            half = stack.numel() // 2 + 7
            reader.elements(name, half, half + 100)
            assert reader.bytes_read <= 2 * (100 + 2 * stack.shape[-1])


def test_operations_that_change_rows(tmp_path: Path) -> None:
    """A tensor that is stored turned round is read whole and turned, as transformers does."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"m.experts.{number}.{leaf}.weight": torch.randn(6, 4, generator=generator)
        for number in range(11)
        for leaf in ("w1", "w3")
    }
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    operations = [MergeModulelist(dim=0), Concatenate(dim=1), Transpose(1, 2)]
    patterns = ["experts.*.w1.weight", "experts.*.w3.weight"]
    converter = WeightConverter(patterns, "experts.gate_up_proj", operations)
    groups = {
        "m.experts.gate_up_proj": [
            (name, patterns[0] if ".w1." in name else patterns[1]) for name in tensors
        ]
    }

    class Model:
        config = None

    # Numbered as numbers: expert 10 comes after expert 9.
    joined = [
        torch.cat([tensors[f"m.experts.{number}.{leaf}.weight"] for leaf in ("w1", "w3")])
        for number in range(11)
    ]
    expected = torch.stack(joined).transpose(1, 2).contiguous()
    with SafetensorsReader(tmp_path) as reader:
        reader.rename(lambda stored: None)
        reader.compose(composed(groups, [converter], reader.stored_shape, Model()))
        assert reader.names() == ["m.experts.gate_up_proj"]
        assert torch.equal(reader.whole("m.experts.gate_up_proj"), expected)
        assert torch.equal(
            reader.elements("m.experts.gate_up_proj", 50, 77), expected.reshape(-1)[50:77]
        )
