"""The 4-bit layer has the results of bitsandbytes' own, and trains on after evaluation."""

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes import functional as bnb_functional
from torch import nn

from qlora_dist.model.nf4 import (
    QuantFormat,
    QuantizedLinear,
    clear_zero_blocks,
    quantize_blocks,
    quantize_matrix,
)

FORMATS = [
    QuantFormat(quant_type, double) for quant_type in ("nf4", "fp4") for double in (True, False)
]


def filled_layer(
    weight: torch.Tensor, bias: torch.Tensor | None, fmt: QuantFormat, dtype: torch.dtype
):
    """Build a QuantizedLinear that holds `weight` (out_features, in_features)."""
    out_features, in_features = weight.shape
    layer = QuantizedLinear(in_features, out_features, bias is not None, fmt, dtype).to_empty(
        device="cpu"
    )
    tensors = quantize_matrix(weight, fmt)
    layer.weight.copy_(tensors.weight)
    layer.absmax.copy_(tensors.absmax)
    if fmt.double_quant:
        layer.absmax_scale.copy_(tensors.absmax_scale)
        layer.absmax_offset.copy_(tensors.absmax_offset)
    if bias is not None:
        layer.bias.copy_(bias)
    return layer


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("block_size", [64, 128])
@pytest.mark.parametrize("shape", [(96, 64), (37, 50), (1, 3)])
def test_bytes_equal_bitsandbytes(
    fmt: QuantFormat, block_size: int, shape: tuple[int, int]
) -> None:
    """Packed weight and constants equal those of `quantize_4bit`, odd sizes included."""
    fmt = QuantFormat(fmt.quant_type, fmt.double_quant, block_size)
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    ours = quantize_matrix(matrix, fmt)
    packed, state = bnb_functional.quantize_4bit(
        matrix,
        blocksize=block_size,
        compress_statistics=fmt.double_quant,
        quant_type=fmt.quant_type,
    )
    assert torch.equal(ours.weight, packed)
    assert torch.equal(ours.absmax, state.absmax)
    assert (ours.absmax_scale is not None) == fmt.double_quant
    if fmt.double_quant:
        assert torch.equal(ours.absmax_scale, state.state2.absmax)
        assert torch.equal(ours.absmax_offset, state.offset.reshape(1))


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_and_gradient_equal_bitsandbytes(fmt: QuantFormat, dtype: torch.dtype) -> None:
    """Output and input gradient have the bits of bitsandbytes' layer."""
    weight = torch.randn(96, 64).to(torch.bfloat16)
    bias = torch.randn(96).to(dtype)
    ours = filled_layer(weight, bias, fmt, dtype).train()
    theirs = bnb.nn.Linear4bit(64, 96, True, dtype, fmt.double_quant, fmt.quant_type)
    theirs.weight = bnb.nn.Params4bit(
        weight.to(dtype),
        requires_grad=False,
        quant_type=fmt.quant_type,
        compress_statistics=fmt.double_quant,
    )
    theirs.bias = nn.Parameter(bias, requires_grad=False)
    theirs = theirs.to("cpu").train()
    x = torch.randn(5, 64, dtype=dtype)
    results = []
    for layer in (ours, theirs):
        x_in = x.clone().requires_grad_()
        out = layer(x_in)
        out.square().sum().backward()
        results.append((out.detach(), x_in.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_training_goes_on_after_evaluation() -> None:
    """A forward in eval mode changes neither packed bytes nor later gradients."""
    layer = filled_layer(torch.randn(96, 64), None, QuantFormat(), torch.bfloat16)
    x = torch.randn(5, 64, dtype=torch.bfloat16)
    packed = layer.weight.clone()
    layer.train()(first := x.clone().requires_grad_()).sum().backward()
    with torch.no_grad():
        layer.eval()(x)
    layer.train()(second := x.clone().requires_grad_()).sum().backward()
    assert torch.equal(layer.weight, packed)
    assert torch.equal(first.grad, second.grad)


@pytest.mark.parametrize("columns", [256, 112, 96, 48, 30, 33])
@pytest.mark.parametrize("block_size", [64, 128])
def test_dequantized_is_close_to_the_original(columns: int, block_size: int) -> None:
    """NF4 keeps normally distributed weights to about 9 % of their norm (QLoRA's own error), also
    where rows end inside of a block; the layer's product is that of these weights."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(256, columns, generator=generator)
    fmt = QuantFormat(block_size=block_size)
    layer = filled_layer(weight, None, fmt, torch.float32)
    error = (layer.dequantized() - weight).norm() / weight.norm()
    assert 0.05 < error < 0.12
    x = torch.randn(5, columns, generator=generator)
    product = layer(x)
    assert (product - x @ layer.dequantized().t()).norm() < 1e-6 * product.norm()
    assert (product - x @ weight.t()).norm() < 0.12 * product.norm()


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("block_size", [64, 128])
@pytest.mark.parametrize("numel", [1024, 1000, 1001, 30])
def test_blocks_of_zeros_get_the_code_of_zero(
    fmt: QuantFormat, block_size: int, numel: int
) -> None:
    """Blocks of zeros get the CPU's code in place of a wrong code, and nothing else changes.

    A block at the end that is not full gets it too.
    """
    fmt = QuantFormat(fmt.quant_type, fmt.double_quant, block_size)
    elements = torch.randn(numel, generator=torch.Generator().manual_seed(0)).bfloat16()
    is_zero = torch.zeros(numel, dtype=torch.bool)
    is_zero[2 * block_size : 3 * block_size] = True
    is_zero[numel - numel % block_size :] = True
    elements[is_zero] = 0
    packed, absmax = quantize_blocks(elements, fmt)
    absmax[absmax < 1e-30] = 0  # a CPU's constant is not quite zero where such a block is not full
    expected = packed.clone()
    assert (absmax == 0).any() == is_zero.any()
    packed[is_zero[::2]] = 0x3C
    clear_zero_blocks(packed, absmax, fmt)
    if numel % 2:  # the last half byte is nobody's
        packed[-1], expected[-1] = packed[-1] & 0xF0, expected[-1] & 0xF0
    assert torch.equal(packed, expected)
