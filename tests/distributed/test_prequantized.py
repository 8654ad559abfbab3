"""Each rank takes its own bytes of a stored 4-bit model, and together they are the whole."""

import shutil
from pathlib import Path

import bitsandbytes.functional as bnb_functional
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import distributed as dist

from qlora_dist.config.schema import ModelConfig
from qlora_dist.errors import ModelError
from qlora_dist.model.nf4 import QuantFormat, QuantizedLinear
from qlora_dist.model.skeleton import build_skeleton
from qlora_dist.runtime.processes import start_runtime
from qlora_dist.runtime.shards import local_bytes, whole_bytes, whole_tensor
from qlora_dist.weights.loading import load_base_weights, materialize
from qlora_dist.weights.prequantized import formats_in
from qlora_dist.weights.quantize import quantize
from tests.support.built import cut
from tests.support.models import save_with_transformers, tensors_of
from tests.support.processes import run_on_processes

Stored = dict[str, tuple[Path, str, bool]]
BAD = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def stored(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Stored:
    """The tiny Llama in 4 bits, as several programs write it: folder, 4-bit type, double
    quantization."""
    root = tmp_path_factory.mktemp("stored")
    quantize(str(tiny_llama), str(root / "ours"), QuantFormat())
    save_with_transformers(
        tiny_llama,
        root / "bf16-storage",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_quant_storage="bfloat16",
    )
    save_with_transformers(
        tiny_llama,
        root / "several-files",
        max_shard_size="40KB",
        bnb_4bit_quant_type="fp4",
        bnb_4bit_use_double_quant=False,
        bnb_4bit_quant_storage="float32",
    )
    assert len(list((root / "several-files").glob("*.safetensors"))) > 3
    return {
        "ours": (root / "ours", "nf4", True),
        "bf16-storage": (root / "bf16-storage", "nf4", True),
        "several-files": (root / "several-files", "fp4", False),
    }


def load_sharded(folder: Path, quantization: str, double_quant: bool):
    """Load the base model of `folder`, sharded over the ranks; return it with the bytes that this
    one read."""
    runtime = start_runtime(seed=0, dtype="bfloat16")
    config = ModelConfig(str(folder), quantization, double_quant, "bfloat16")
    model = build_skeleton(folder, config, formats_in(folder, config))
    cut(model, "fsdp", runtime)
    materialize(model, runtime.device, runtime.device)
    return model, load_base_weights(model, folder, runtime.device).bytes_read


def check_gathered(model, source: Path, quantization: str, double_quant: bool) -> None:
    """Check that all ranks' parts together are what bitsandbytes makes of each 16-bit matrix of
    `source`."""
    originals = load_file(source / "model.safetensors")
    expected = dict(originals)
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            packed, state = bnb_functional.quantize_4bit(
                originals[f"{name}.weight"],
                blocksize=64,
                compress_statistics=double_quant,
                quant_type=quantization,
            )
            expected |= {f"{name}.weight": packed, f"{name}.absmax": state.absmax}
            if double_quant:
                expected[f"{name}.absmax_scale"] = state.state2.absmax
                expected[f"{name}.absmax_offset"] = state.offset.reshape(1)
    params = dict(model.named_parameters())
    assert params.keys() == expected.keys()
    for name, param in params.items():
        assert torch.equal(whole_tensor(param), expected[name]), name


def check_bytes_read(folder: Path, bytes_read: int) -> None:
    """Check that this rank read its share; only code books and states are read by all ranks."""
    sizes = {
        name: tensor.numel() * tensor.element_size() for name, tensor in tensors_of(folder).items()
    }
    common = {
        name: size for name, size in sizes.items() if "quant_map" in name or "quant_state" in name
    }
    shared = sum(sizes.values()) - sum(common.values())
    world_size = dist.get_world_size()
    # A share is rounded up to a row, of at most 128 bytes here; states are looked at twice, once
    # when they are checked.
    assert bytes_read <= shared / world_size + 128 * len(sizes) + 2 * sum(common.values())
    total = torch.tensor(bytes_read)
    dist.all_reduce(total)
    assert total >= shared, "something that the model needs was not read"


def check_stored(stored: Stored, source: Path) -> None:
    for folder, quantization, double_quant in stored.values():
        model, bytes_read = load_sharded(folder, quantization, double_quant)
        check_bytes_read(folder, bytes_read)
        check_gathered(model, source, quantization, double_quant)
        assert local_bytes(model) <= (1 / dist.get_world_size() + 0.05) * whole_bytes(model)


@pytest.mark.parametrize("world_size", [2, 3])
def test_parts_are_those_of_quantizing_on_load(
    stored: Stored, tiny_llama: Path, world_size: int
) -> None:
    """Gathered bytes equal quantizing the 16-bit model: for files of `quantize`, for a float
    storage whose elements straddle the borders of parts, and for several files. Each rank reads and
    holds its share."""
    run_on_processes(check_stored, world_size, stored, tiny_llama)


def check_refused_everywhere(folders: list[Path]) -> None:
    for folder in folders:
        with pytest.raises(ModelError, match=rf"{BAD} holds values that are not finite"):
            load_sharded(folder, "nf4", double_quant=False)


def test_all_ranks_refuse_what_one_of_them_sees(tiny_llama: Path, tmp_path: Path) -> None:
    """A NaN in the last rank's rows, in a 16-bit or in a stored matrix, stops all ranks with one
    message."""
    quantize(str(tiny_llama), str(tmp_path / "stored"), QuantFormat(double_quant=False))
    shutil.copytree(tiny_llama, tmp_path / "plain")
    for name, key in (("stored", f"{BAD}.absmax"), ("plain", BAD)):
        tensors = {
            key: tensor.clone()
            for key, tensor in load_file(tmp_path / name / "model.safetensors").items()
        }
        tensors[key].view(-1)[-1] = float("nan")
        save_file(tensors, tmp_path / name / "model.safetensors")
    run_on_processes(check_refused_everywhere, 2, [tmp_path / "stored", tmp_path / "plain"])
