"""Shards of a model: each rank holds its share and no more, in exactly the bytes of the whole."""

import itertools
from dataclasses import replace
from pathlib import Path

import bitsandbytes.functional as bnb_functional
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from qlora_dist.config.schema import (
    AdapterConfig,
    BackendName,
    MemoryConfig,
    ModelConfig,
    TrainConfig,
)
from qlora_dist.model.nf4 import QuantFormat, QuantizedLinear
from qlora_dist.model.parts import decoder_layers
from qlora_dist.model.skeleton import build_skeleton, quantize_skeleton
from qlora_dist.runtime.processes import start_runtime
from qlora_dist.runtime.shards import local_bytes, whole_bytes, whole_tensor
from qlora_dist.weights.loading import load_base_weights, materialize
from tests.support.built import build, cut
from tests.support.processes import run_on_processes


def build_sharded(folder: Path, config: ModelConfig, backend: BackendName):
    """Build the model of `folder`, sharded over the processes of this run, in bfloat16, its files'
    type."""
    config = replace(config, dtype="bfloat16")
    runtime = start_runtime(seed=0, dtype=config.dtype)
    train_config = TrainConfig(
        model=config, adapter=AdapterConfig(rank=4), memory=MemoryConfig(recompute="none")
    )
    return build(train_config, folder, backend, runtime)[0].model


def check_share(folder: Path) -> None:
    model = build_sharded(folder, ModelConfig(path=str(folder)), "fsdp")
    assert local_bytes(model) <= 0.55 * whole_bytes(model)


def test_each_of_two_ranks_holds_at_most_its_share(tiny_llama: Path) -> None:
    """With two ranks, each holds at most 0.55 of the parameters' bytes, constants and embeddings
    included."""
    run_on_processes(check_share, 2, tiny_llama)


def check_bytes(folder: Path, quantization: str, double_quant: bool) -> None:
    config = ModelConfig(str(folder), quantization, double_quant)
    assert_bytes_of_whole_matrices(build_sharded(folder, config, "fsdp"), config)


def assert_bytes_of_whole_matrices(model: nn.Module, config: ModelConfig) -> None:
    """Check that gathered weights and constants are what bitsandbytes makes of the matrices in the
    files."""
    with safe_open(Path(config.path) / "model.safetensors", framework="pt") as file:
        num_layers = 0
        for name, module in model.named_modules():
            if not isinstance(module, QuantizedLinear):
                continue
            num_layers += 1
            source = name.removeprefix("base_model.model.").replace(".base_layer", "") + ".weight"
            packed, state = bnb_functional.quantize_4bit(
                file.get_tensor(source).to(torch.bfloat16),
                blocksize=64,
                compress_statistics=config.double_quant,
                quant_type=config.quantization,
            )
            assert torch.equal(whole_tensor(module.weight), packed), name
            assert torch.equal(whole_tensor(module.absmax), state.absmax), name
            if config.double_quant:
                assert torch.equal(whole_tensor(module.absmax_scale), state.state2.absmax), name
                assert torch.equal(whole_tensor(module.absmax_offset), state.offset.reshape(1)), (
                    name
                )
        assert num_layers == 3 * 7


def check_byte_exactness(folder: Path) -> None:
    runtime = start_runtime(seed=0, dtype="bfloat16")
    originals = load_file(folder / "model.safetensors")
    for quant_type, double_quant, block_size in itertools.product(
        ("nf4", "fp4"), (True, False), (64, 128)
    ):
        fmt = QuantFormat(quant_type, double_quant, block_size)
        model = build_skeleton(folder, ModelConfig(path=str(folder), quantization="none"))
        layers = decoder_layers(model)
        linears = [
            name
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and "layers" in name
        ]
        quantize_skeleton(model, dict.fromkeys(linears, fmt), torch.bfloat16)
        assert len(linears) == 7 * len(layers)
        cut(model, "fsdp", runtime)
        materialize(model, runtime.device, runtime.device)
        load_base_weights(model, folder, runtime.device)
        for name in linears:
            module = model.get_submodule(name)
            packed, state = bnb_functional.quantize_4bit(
                originals[f"{name}.weight"],
                blocksize=block_size,
                compress_statistics=double_quant,
                quant_type=quant_type,
            )
            assert torch.equal(whole_tensor(module.weight), packed), (name, fmt)
            assert torch.equal(whole_tensor(module.absmax), state.absmax), (name, fmt)
            if double_quant:
                assert torch.equal(whole_tensor(module.absmax_scale), state.state2.absmax), (
                    name,
                    fmt,
                )
                assert torch.equal(whole_tensor(module.absmax_offset), state.offset.reshape(1)), (
                    name,
                    fmt,
                )


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5])
def test_every_format_is_exact_on_any_number_of_ranks(tiny_llama: Path, world_size: int) -> None:
    """The gathered bytes are those of the whole matrix for NF4 and FP4, double quantization on and
    off, blocks of 64 and 128, on one to five ranks. Slices of these matrices fall inside rows and
    inside blocks."""
    run_on_processes(check_byte_exactness, world_size, tiny_llama)


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize(("quantization", "double_quant"), [("nf4", True), ("fp4", False)])
def test_gathered_bytes_are_those_of_the_whole_matrix(
    tiny_llama: Path, world_size: int, quantization: str, double_quant: bool
) -> None:
    """Packed weights and constants, gathered, equal what bitsandbytes makes of the whole matrix,
    also if slices fall between block borders."""
    run_on_processes(check_bytes, world_size, tiny_llama, quantization, double_quant)
