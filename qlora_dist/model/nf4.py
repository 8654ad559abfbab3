"""4-bit linear layers whose quantization constants are parameters, so that they shard with the weight.

bitsandbytes keeps the constants of a 4-bit weight in a ``QuantState``, a plain Python attribute that every sharding
engine leaves behind: each GPU then holds all of them, 1.0 GiB for a 70B model with double quantization and 4.0 GiB
without. Here they are frozen parameters, next to the packed weight, and the ``QuantState`` is put together from
whatever the parameters hold when the layer runs (gathered by then, under sharding).

The numbers are bitsandbytes' own: NF4 and FP4 of QLoRA (https://arxiv.org/abs/2305.14314, section 3), in blocks of 64,
with the block maxima quantized again to 8 bits in blocks of 256 after their mean is subtracted.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import bitsandbytes as bnb
import torch
from bitsandbytes import functional as bnb_functional
from torch import nn

from qlora_dist.model.cpu.pieces import in_pieces

BLOCK_SIZE = 64
"""Elements that share one quantization constant."""
NESTED_BLOCK_SIZE = 256
"""Quantization constants that share one second-level constant; the only size bitsandbytes' kernels support."""

_CPU_PIECE = 2**18
"""Elements that the CPU quantizes at a time, a multiple of every block size. The kernel makes temporaries of some 24
bytes an element, several times the matrix; in pieces they stay in the cache, and it takes half the time."""


@dataclass(frozen=True)
class QuantFormat:
    """How a matrix is stored in 4 bits."""

    quant_type: Literal["nf4", "fp4"] = "nf4"
    double_quant: bool = True
    block_size: int = BLOCK_SIZE

    def num_blocks(self, numel: int) -> int:
        """Number of quantization constants of a matrix with `numel` elements."""
        return -(-numel // self.block_size)


@dataclass
class QuantizedTensors:
    """The tensors that make up one 4-bit matrix (or a contiguous part of one)."""

    weight: torch.Tensor  # (ceil(numel / 2), 1) uint8, two elements a byte
    absmax: torch.Tensor  # (num_blocks,) float32, or uint8 with double quantization
    absmax_scale: torch.Tensor | None = (
        None  # (ceil(num_blocks / 256),) float32, double quantization only
    )
    absmax_offset: torch.Tensor | None = None  # (1,) float32, double quantization only


class QuantizedLinear(bnb.nn.Linear4bit):
    """bitsandbytes' 4-bit linear with its constants as parameters; created empty on the meta device.

    Shapes:
        input (..., in_features) to output (..., out_features), in the dtype of the input.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool, fmt: QuantFormat, dtype: torch.dtype
    ) -> None:
        super().__init__(
            in_features, out_features, bias, dtype, fmt.double_quant, fmt.quant_type, device="meta"
        )
        self.format = fmt
        numel = in_features * out_features
        num_blocks = fmt.num_blocks(numel)
        self.weight = _frozen(-(-numel // 2), 1, dtype=torch.uint8)
        # peft reads these two from the weight when it wraps the layer.
        self.weight.quant_type = fmt.quant_type
        self.weight.compress_statistics = fmt.double_quant
        self.absmax = _frozen(num_blocks, dtype=torch.uint8 if fmt.double_quant else torch.float32)
        if fmt.double_quant:
            self.absmax_scale = _frozen(-(-num_blocks // NESTED_BLOCK_SIZE), dtype=torch.float32)
            self.absmax_offset = _frozen(1, dtype=torch.float32)
        if bias:
            self.bias = _frozen(out_features, dtype=dtype)

    def quant_state_now(self) -> bnb_functional.QuantState:
        """The bitsandbytes state of the weight, over the parameters as they are now (no copies)."""
        nested = None
        offset = None
        if self.format.double_quant:
            offset = self.absmax_offset[0]
            nested = bnb_functional.QuantState(
                absmax=self.absmax_scale,
                code=dynamic_code(self.weight.device),
                blocksize=NESTED_BLOCK_SIZE,
                dtype=torch.float32,
            )
        return bnb_functional.QuantState(
            absmax=self.absmax,
            shape=torch.Size((self.out_features, self.in_features)),
            code=four_bit_code(self.format.quant_type, self.weight.device),
            blocksize=self.format.block_size,
            quant_type=self.format.quant_type,
            # Backward dequantizes in this dtype and forward in the input's: they must be the same one, or the
            # gradient is not that of the function that was evaluated.
            dtype=self.compute_dtype,
            offset=offset,
            state2=nested,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (..., in_features) -> (..., out_features)
        # Not Linear4bit.forward: on CPUs with AVX512-BF16 it repacks the weight in place in eval mode, after which
        # training yields no gradient; and it looks for the state in attributes that sharding does not carry along.
        return _FrozenMatmul.apply(x.to(self.compute_dtype), self).to(result_dtype(x))

    def dequantized(self) -> torch.Tensor:
        """The weight as (out_features, in_features) in the compute dtype; needs all parameters whole."""
        return bnb_functional.dequantize_4bit(self.weight, self.quant_state_now())


def result_dtype(x: torch.Tensor) -> torch.dtype:
    """Of a linear layer's output: autocast's where that is on, as of PyTorch's own layers.

    On GPUs autocast lets LayerNorm return float32. An output in the type of the input would carry that into the
    residual stream, at twice its size.
    """
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class _FrozenMatmul(torch.autograd.Function):
    """Product with a layer's 4-bit weight that keeps nothing for backward: the layer is asked again for what it holds.

    bitsandbytes' own function keeps a view of the packed weight. Engines that free gathered parameters by letting go
    of them (ZeRO-3) could then free nothing between forward and backward: every rank would come to hold the whole base.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: QuantizedLinear) -> torch.Tensor:
        ctx.layer = layer
        return bnb.matmul_4bit(
            x, layer.weight, quant_state=layer.quant_state_now(), bias=layer.bias
        )

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        (grad,) = grads  # (..., out_features)
        return grad @ ctx.layer.dequantized().to(grad.dtype), None


def quantize_blocks(elements: torch.Tensor, fmt: QuantFormat) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize a flat run of elements that starts on a block border.

    Args:
        elements: (n,) bfloat16. Weights are cast to bfloat16 first, whatever the checkpoint holds.

    Returns:
        packed (ceil(n / 2), 1) uint8, and absmax (ceil(n / block_size),) float32.
    """
    pieces = []
    for piece in in_pieces(elements, _CPU_PIECE):
        packed, state = bnb_functional.quantize_4bit(
            piece, blocksize=fmt.block_size, compress_statistics=False, quant_type=fmt.quant_type
        )
        if piece.device.type == "cuda":
            clear_zero_blocks(packed, state.absmax, fmt)
        pieces.append((packed, state.absmax))
    if len(pieces) == 1:
        return pieces[0]
    return torch.cat([packed for packed, _ in pieces]), torch.cat([absmax for _, absmax in pieces])


def clear_zero_blocks(packed: torch.Tensor, absmax: torch.Tensor, fmt: QuantFormat) -> None:
    """Give blocks of nothing but zeros the code of zero, as they have it on a CPU; in place.

    bitsandbytes' CUDA kernel multiplies by 1 / 0 there, and compares NaN: the code of -1. That is
    harmless only until the second quantization: by it, the constant need not come back as zero.
    """
    size, whole = fmt.block_size // 2, 2 * packed.numel() // fmt.block_size
    is_zero, code = absmax == 0, {"nf4": 0x77, "fp4": 0x00}[fmt.quant_type]
    codes, rest = packed.view(-1)[: whole * size], packed.view(-1)[whole * size :]
    codes.view(whole, size).masked_fill_(is_zero[:whole, None], code)
    rest.masked_fill_(is_zero[whole:], code)


def quantize_absmax(absmax: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Second quantization, of all block maxima of one matrix (QLoRA section 3, "double quantization").

    Args:
        absmax: (num_blocks,) float32, the whole matrix's: the mean over all of them is part of the result.

    Returns:
        absmax (num_blocks,) uint8, scale (ceil(num_blocks / 256),) float32, offset (1,) float32.
    """
    offset = absmax.mean()
    quantized, nested = bnb_functional.quantize_blockwise(
        absmax - offset, blocksize=NESTED_BLOCK_SIZE
    )
    return quantized, nested.absmax, offset.reshape(1)


def quantize_matrix(matrix: torch.Tensor, fmt: QuantFormat) -> QuantizedTensors:
    """Quantize a whole (out_features, in_features) matrix, byte for byte as ``bnb.functional.quantize_4bit`` does."""
    packed, absmax = quantize_blocks(matrix.to(torch.bfloat16).reshape(-1), fmt)
    if not fmt.double_quant:
        return QuantizedTensors(packed, absmax)
    return QuantizedTensors(packed, *quantize_absmax(absmax))


def _frozen(*shape: int, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.empty(*shape, dtype=dtype, device="meta"), requires_grad=False)


@torch.compiler.assume_constant_result
def four_bit_code(quant_type: str, device: torch.device) -> torch.Tensor:
    """The 16 values of a 4-bit type, (16,) float32."""
    return _four_bit_code(quant_type, device)


@torch.compiler.assume_constant_result
def dynamic_code(device: torch.device) -> torch.Tensor:
    """The 256 values of a quantized quantization constant, (256,) float32."""
    return _dynamic_code(device)


# Apart, because the compiler looks into what is cached: it would trace how the values are made.
@cache
def _four_bit_code(quant_type: str, device: torch.device) -> torch.Tensor:
    return bnb_functional.get_4bit_type(quant_type, device=device)


@cache
def _dynamic_code(device: torch.device) -> torch.Tensor:
    return bnb_functional.create_dynamic_map().to(device)
