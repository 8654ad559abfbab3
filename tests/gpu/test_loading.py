"""4-bit weights on the GPU have bitsandbytes' bytes, or those of a 4-bit checkpoint."""

from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from safetensors.torch import load_file

from qlora_dist.model.nf4 import QuantFormat, QuantizedLinear, quantize_matrix
from qlora_dist.weights.quantize import quantize
from tests.support.models import load_here


def four_bit_layers(model: torch.nn.Module) -> dict[str, QuantizedLinear]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, QuantizedLinear)
    }


@pytest.mark.parametrize("double_quant", [True, False])
def test_quantizing_on_load_makes_the_bytes_of_bitsandbytes(
    double_quant: bool, device: torch.device, tiny_llama: Path
) -> None:
    """Packed weights and constants equal `quantize_4bit` of the whole matrix on this GPU."""
    layers = four_bit_layers(load_here(tiny_llama, device, double_quant=double_quant))
    stored = load_file(tiny_llama / "model.safetensors")
    assert len(layers) == 21
    for name, layer in layers.items():
        packed, state = bnb.functional.quantize_4bit(
            stored[f"{name}.weight"].to(device), quant_type="nf4", compress_statistics=double_quant
        )
        assert layer.weight.device.type == device.type
        assert torch.equal(layer.weight, packed), name
        assert torch.equal(layer.absmax, state.absmax), name
        if double_quant:
            assert torch.equal(layer.absmax_scale, state.state2.absmax), name
            assert torch.equal(layer.absmax_offset[0], state.offset), name
        assert torch.equal(layer.dequantized(), bnb.functional.dequantize_4bit(packed, state)), name


def test_the_cpu_quantizes_to_nearly_the_same(device: torch.device, tiny_llama: Path) -> None:
    """CPU and GPU differ in at most one value in a thousand, by at most one code.

    A value on the border of two codes may fall to either side, and a mean is summed in another
    order.
    """
    there, here = (
        four_bit_layers(load_here(tiny_llama, where)) for where in (device, torch.device("cpu"))
    )
    for name, layer in there.items():
        codes = [
            torch.stack([packed.flatten() >> 4, packed.flatten() & 15]).int()
            for packed in (layer.weight.cpu(), here[name].weight)
        ]
        step = (codes[0] - codes[1]).abs()
        assert step.max() <= 1, name
        assert (step > 0).float().mean() <= 1e-3, name
        weights = [one.dequantized().cpu().float() for one in (layer, here[name])]
        assert (weights[0] - weights[1]).norm() <= 0.01 * weights[1].norm(), name


@pytest.mark.parametrize(
    "fmt", [QuantFormat("nf4"), QuantFormat("nf4", double_quant=False), QuantFormat("fp4")], ids=str
)
def test_zeros_are_zeros_on_both(fmt: QuantFormat, device: torch.device) -> None:
    """A block of zeros has equal codes on CPU and GPU, and all its weights dequantize to zero."""
    matrix = torch.randn(64, 96, generator=torch.Generator().manual_seed(0)).bfloat16()
    matrix.view(-1)[64 * 5 : 64 * 7] = 0
    there, here = (
        quantize_matrix(matrix.to(where), fmt) for where in (device, torch.device("cpu"))
    )
    for found in (there, here):
        assert found.weight.view(-1, 32)[5:7].cpu().unique().tolist() == [
            0x77 if fmt.quant_type == "nf4" else 0
        ]
    step = (there.weight.cpu().int() - here.weight.int()).abs()
    assert (step > 0).float().mean() <= 1e-3


def test_a_4_bit_checkpoint_has_the_same_bytes_on_both(
    device: torch.device, tiny_llama: Path, tmp_path: Path
) -> None:
    """A 4-bit checkpoint loads with its stored bytes on any device."""
    quantize(str(tiny_llama), str(tmp_path / "nf4"), QuantFormat())
    there, here = (load_here(tmp_path / "nf4", where) for where in (device, torch.device("cpu")))
    expected = dict(here.named_parameters())
    assert {param.device.type for param in there.parameters()} == {device.type}
    for name, param in there.named_parameters():
        assert torch.equal(param.cpu(), expected[name]), name
