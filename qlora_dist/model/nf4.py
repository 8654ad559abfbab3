"""4-bit linear layers whose quantization constants are parameters, so that they shard as weights.

bitsandbytes keeps the constants of a 4-bit weight in a ``QuantState``, a plain Python attribute
that every sharding engine leaves behind. Each GPU then holds all of them: 1.0 GiB for a 70B model
with double quantization, and 4.0 GiB without. Here they are frozen parameters next to the packed
weight. The ``QuantState`` is put together when the layer runs, from parameters that are gathered by
then.

The numbers are bitsandbytes' own: NF4 and FP4 of QLoRA (https://arxiv.org/abs/2305.14314,
section 3), in blocks of 64. After their mean is subtracted, the block maxima are quantized to
8 bits in blocks of 256.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import bitsandbytes as bnb
import torch
from torch import Tensor, nn

from qlora_dist.model.cpu.pieces import in_pieces

BLOCK_SIZE = 64
"""Elements that share one quantization constant."""
NESTED_BLOCK_SIZE = 256
"""Quantization constants that share a second-level constant.

bitsandbytes' kernels support no other size.
"""

# Elements that the CPU quantizes at a time, a multiple of every block size. The kernel makes
# temporaries of some 24 bytes an element. In pieces they stay in the cache, and it takes half the
# time.
_CPU_PIECE = 2**18


@dataclass(frozen=True)
class QuantFormat:
    """4-bit storage of a matrix: its type, its blocks, and the form of their constants."""

    quant_type: Literal["nf4", "fp4"] = "nf4"
    double_quant: bool = True
    block_size: int = BLOCK_SIZE

    def num_blocks(self, numel: int) -> int:
        """Return the number of quantization constants of a matrix with `numel` elements."""
        return -(-numel // self.block_size)


@dataclass
class QuantizedTensors:
    """Tensors of a 4-bit matrix, or of a contiguous part of it."""

    weight: Tensor  # (ceil(numel / 2), 1) uint8, two elements a byte
    absmax: Tensor  # (num_blocks,) float32, or uint8 with double quantization
    # With double quantization only: (ceil(num_blocks / 256),) float32 and (1,) float32.
    absmax_scale: Tensor | None = None
    absmax_offset: Tensor | None = None


class QuantizedLinear(bnb.nn.Linear4bit):
    """bitsandbytes' 4-bit linear with its constants as parameters; created empty on meta.

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
        self.weight = frozen(-(-numel // 2), 1, dtype=torch.uint8)
        # peft reads these two from the weight when it wraps the layer.
        self.weight.quant_type = fmt.quant_type
        self.weight.compress_statistics = fmt.double_quant
        self.absmax = frozen(num_blocks, dtype=torch.uint8 if fmt.double_quant else torch.float32)
        if fmt.double_quant:
            self.absmax_scale = frozen(-(-num_blocks // NESTED_BLOCK_SIZE), dtype=torch.float32)
            self.absmax_offset = frozen(1, dtype=torch.float32)
        if bias:
            self.bias = frozen(out_features, dtype=dtype)

    def quant_state_now(self) -> bnb.functional.QuantState:
        """Return bitsandbytes' state of the weight, over the parameters as they are (no copies).

        The parameters must be whole.
        """
        kind, device = self.format.quant_type, self.weight.device
        nested = offset = None
        if self.format.double_quant:
            offset, code = self.absmax_offset[0], dynamic_code(device)
            nested = bnb.functional.QuantState(
                absmax=self.absmax_scale,
                code=code,
                blocksize=NESTED_BLOCK_SIZE,
                dtype=torch.float32,
            )
        return bnb.functional.QuantState(
            absmax=self.absmax,
            shape=torch.Size((self.out_features, self.in_features)),
            code=four_bit_code(kind, device),
            blocksize=self.format.block_size,
            quant_type=kind,
            # Backward dequantizes in this dtype, and forward in the input's. Unless they are equal,
            # the gradient is not that of the function that was evaluated.
            dtype=self.compute_dtype,
            offset=offset,
            state2=nested,
        )

    def forward(self, x: Tensor) -> Tensor:  # (..., in_features) -> (..., out_features)
        # Not Linear4bit.forward. On CPUs with AVX512-BF16 it repacks the weight in place in eval
        # mode, after which training yields no gradient. And it looks for the state in attributes
        # that sharding does not carry along.
        return _FrozenMatmul.apply(x.to(self.compute_dtype), self).to(result_dtype(x))

    def dequantized(self) -> Tensor:
        """Return the weight, (out_features, in_features) in the compute dtype.

        The parameters must be whole.
        """
        state = self.quant_state_now()
        # As one row: with AVX512, bitsandbytes' kernel gives wrong numbers where rows end inside of
        # a block.
        state.shape = torch.Size((1, self.out_features * self.in_features))
        flat: Tensor = bnb.functional.dequantize_4bit(self.weight, state)
        return flat.view(self.out_features, self.in_features)

    def product(self, x: Tensor) -> Tensor:
        """Return W x + b for x (..., in_features) in the compute dtype."""
        if x.device.type == "cpu" and self.in_features % self.format.block_size:
            # bitsandbytes' product would take the wrong numbers that `dequantized` avoids.
            return nn.functional.linear(x, self.dequantized(), self.bias)
        out: Tensor = bnb.matmul_4bit(
            x, self.weight, quant_state=self.quant_state_now(), bias=self.bias
        )
        return out


def result_dtype(x: Tensor) -> torch.dtype:
    """Return the type of a linear layer's output for input `x`, as PyTorch's own layers have it.

    That is autocast's type where autocast is on, and else the input's.
    """
    # On GPUs autocast lets LayerNorm return float32. An output in the type of that input would
    # carry float32 into the residual stream, at twice its size.
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class _FrozenMatmul(torch.autograd.Function):
    """Product with a layer's 4-bit weight; backward asks the layer for the weight again.

    bitsandbytes' own function keeps a view of the packed weight. ZeRO-3 frees gathered parameters
    by letting go of them, so it could free nothing between forward and backward: every rank would
    come to hold the whole base.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.layer = layer
        return layer.product(x).data  # no view of a matrix: some models add to it in place

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # (..., out_features)
        return grad @ ctx.layer.dequantized().to(grad.dtype), None


def quantize_blocks(elements: Tensor, fmt: QuantFormat) -> tuple[Tensor, Tensor]:
    """Quantize a flat run of elements that starts on a block border.

    Args:
        elements: (n,) bfloat16, to which weights are cast whatever the checkpoint holds.

    Returns:
        packed (ceil(n / 2), 1) uint8, and absmax (ceil(n / block_size),) float32.
    """
    pieces = []
    for piece in in_pieces(elements, _CPU_PIECE):
        packed, state = bnb.functional.quantize_4bit(
            piece, blocksize=fmt.block_size, compress_statistics=False, quant_type=fmt.quant_type
        )
        if piece.device.type == "cuda":
            clear_zero_blocks(packed, state.absmax, fmt)
        pieces.append((packed, state.absmax))
    if len(pieces) == 1:
        return pieces[0]
    return torch.cat([packed for packed, _ in pieces]), torch.cat([absmax for _, absmax in pieces])


def clear_zero_blocks(packed: Tensor, absmax: Tensor, fmt: QuantFormat) -> None:
    """Give blocks of nothing but zeros the code of zero, as a CPU does; in place.

    bitsandbytes' CUDA kernel multiplies by 1 / 0 there and compares NaN, which gives the code of
    -1. That is harmless only until the second quantization, after which the block's constant need
    not come back as zero.
    """
    # Bytes of a block, and number of full blocks; the last block may be shorter.
    size, whole = fmt.block_size // 2, 2 * packed.numel() // fmt.block_size
    # Two elements a byte: the code of zero twice.
    is_zero, code = absmax == 0, {"nf4": 0x77, "fp4": 0x00}[fmt.quant_type]
    codes, rest = packed.view(-1)[: whole * size], packed.view(-1)[whole * size :]
    codes.view(whole, size).masked_fill_(is_zero[:whole, None], code)
    rest.masked_fill_(is_zero[whole:], code)


def quantize_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize all block maxima of a matrix (QLoRA section 3, "double quantization").

    Args:
        absmax: (num_blocks,) float32 of the whole matrix: their mean is part of the result.

    Returns:
        absmax (num_blocks,) uint8, scale (ceil(num_blocks / 256),) float32, offset (1,) float32.
    """
    offset = absmax.mean()
    codes, nested = bnb.functional.quantize_blockwise(absmax - offset, blocksize=NESTED_BLOCK_SIZE)
    return codes, nested.absmax, offset.reshape(1)


def quantize_matrix(matrix: Tensor, fmt: QuantFormat) -> QuantizedTensors:
    """Quantize a whole (out_features, in_features) matrix.

    The bytes are those of ``bnb.functional.quantize_4bit``.
    """
    packed, absmax = quantize_blocks(matrix.to(torch.bfloat16).reshape(-1), fmt)
    if not fmt.double_quant:
        return QuantizedTensors(packed, absmax)
    return QuantizedTensors(packed, *quantize_absmax(absmax))


def frozen(*shape: int, dtype: torch.dtype) -> nn.Parameter:
    """Return an empty parameter on meta that is not trained."""
    return nn.Parameter(torch.empty(*shape, dtype=dtype, device="meta"), requires_grad=False)


@torch.compiler.assume_constant_result
def four_bit_code(quant_type: str, device: torch.device) -> Tensor:
    """Return the 16 values of a 4-bit type, (16,) float32."""
    return _four_bit_code(quant_type, device)


@torch.compiler.assume_constant_result
def dynamic_code(device: torch.device) -> Tensor:
    """Return the 256 values of a quantized quantization constant, (256,) float32."""
    return _dynamic_code(device)


# Not cached above: the compiler looks through `cache`, and would trace the making of the values.
@cache
def _four_bit_code(quant_type: str, device: torch.device) -> Tensor:
    return bnb.functional.get_4bit_type(quant_type, device=device)


@cache
def _dynamic_code(device: torch.device) -> Tensor:
    return bnb.functional.create_dynamic_map().to(device)
