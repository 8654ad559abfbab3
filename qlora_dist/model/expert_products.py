"""Products of rows, sorted by expert, with the experts' matrices and adapters.

A few experts' matrices at a time are dequantized in forward and again in backward; nothing of them
is kept. On a GPU a group of experts is one grouped product, elsewhere one product after the other.
"""

# Tested by tests/unit/model/test_experts.py.

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_GROUP_BYTES = 2**28
"""Bytes of the matrices that are dequantized at a time, unless one expert's are larger."""


def is_transposed(module: Any) -> bool:
    """True if a module's matrices are stored as (in, out), to be multiplied from the right."""
    if hasattr(module, "is_transposed"):
        return bool(module.is_transposed)
    return bool(module.gate_up_proj.shape[2] == 2 * module.down_proj.shape[1])


class StackProduct(torch.autograd.Function):
    """W_e x + s B_e A_e x for rows x sorted by expert, and its gradients.

    With g the gradient of the output, and rows of one expert at a time:
        dx = g W_e + s (g B_e) A_e,   dA_e = s (g B_e)^T x,   dB_e = s g^T (x A_e^T)
    Backward keeps x and A x, and no weights.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        lora_a: Tensor | None,
        lora_b: Tensor | None,
        module: Any,
        name: str,
        sizes: tuple[int, ...],
    ) -> Tensor:
        # x (rows, in), A (experts * rank, in), B (out, rank * experts)
        transposed = is_transposed(module)
        stack = getattr(module, name)
        out = x.new_empty(len(x), stack.shape[2 if transposed else 1])
        for first, last in _groups(stack.shape, sizes, x.element_size()):
            matrices = _matrices(stack, first, last, x.dtype)
            matrices = matrices if transposed else matrices.transpose(1, 2)  # (n, in, out)
            _multiply(x, matrices, out, sizes, first)
        inner = None
        if lora_a is not None:
            assert lora_b is not None
            is_swapped = module.stack_adapters[name].is_swapped
            a, b = _apart(lora_a, lora_b, len(sizes), x.dtype, is_swapped)
            scaling = module.stack_adapters[name].matrices()[2]
            inner = x.new_empty(len(x), a.shape[1])
            _multiply(x, a.transpose(1, 2), inner, sizes)
            _multiply(inner, b.transpose(1, 2), out, sizes, scaling=scaling, adds=True)
        ctx.module, ctx.name, ctx.sizes = module, name, sizes
        ctx.save_for_backward(*(tensor for tensor in (x, inner) if inner is not None))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        module, name, sizes = ctx.module, ctx.name, ctx.sizes
        stack, transposed = getattr(module, name), is_transposed(module)
        grad = grad.contiguous()  # (rows, out)
        grad_x = grad_a = grad_b = None
        if ctx.needs_input_grad[0]:
            grad_x = grad.new_empty(len(grad), stack.shape[1 if transposed else 2])
            for first, last in _groups(stack.shape, sizes, grad.element_size()):
                matrices = _matrices(stack, first, last, grad.dtype)
                matrices = matrices.transpose(1, 2) if transposed else matrices  # (n, out, in)
                _multiply(grad, matrices, grad_x, sizes, first)
        if saved := ctx.saved_tensors:
            x, inner = saved
            adapter = module.stack_adapters[name]
            lora_a, lora_b, scaling = adapter.matrices()
            a, b = _apart(lora_a, lora_b, len(sizes), grad.dtype, adapter.is_swapped)
            grad_inner = torch.empty_like(inner)  # (rows, rank), not scaled yet
            _multiply(grad, b, grad_inner, sizes)
            if grad_x is not None:
                _multiply(grad_inner, a, grad_x, sizes, scaling=scaling, adds=True)
            grad_a = _outer(grad_inner, x, sizes).mul_(scaling)  # (experts, rank, in)
            grad_b = _outer(grad, inner, sizes).mul_(scaling)  # (experts, out, rank)
            if adapter.is_swapped:
                grad_a, grad_b = grad_b.transpose(1, 2), grad_a.transpose(1, 2)
            grad_a = grad_a.reshape(lora_a.shape).to(lora_a.dtype)
            grad_b = grad_b.permute(1, 2, 0).reshape(lora_b.shape).to(lora_b.dtype)
        return grad_x, grad_a, grad_b, None, None, None


def _matrices(stack: Any, first: int, last: int, dtype: torch.dtype) -> Tensor:
    if isinstance(stack, nn.Parameter):
        return stack[first:last].to(dtype)
    matrices: Tensor = stack.dequantized(first, last, dtype)
    return matrices


def _apart(
    lora_a: Tensor, lora_b: Tensor, num_experts: int, dtype: torch.dtype, is_swapped: bool
) -> tuple[Tensor, Tensor]:
    """Return the experts' A (experts, rank, in) and B (experts, out, rank) of peft's stacks."""
    a = lora_a.to(dtype).view(num_experts, -1, lora_a.shape[-1])
    b = lora_b.to(dtype).view(len(lora_b), -1, num_experts).permute(2, 0, 1).contiguous()
    return (b.transpose(1, 2), a.transpose(1, 2)) if is_swapped else (a, b)


def _groups(
    shape: torch.Size, sizes: tuple[int, ...], element_size: int
) -> Iterator[tuple[int, int]]:
    """Yield ranges of experts that have rows, each of at most `_GROUP_BYTES` of matrices."""
    most = group_size(shape, element_size)
    first = 0
    while first < len(sizes):
        if not sizes[first]:
            first += 1
            continue
        last = first + 1
        while last < len(sizes) and sizes[last] and last - first < most:
            last += 1
        yield first, last
        first = last


def group_size(shape: torch.Size, element_size: int) -> int:
    """Return the number of experts whose matrices are dequantized at a time, at most."""
    return min(shape[0], max(1, _GROUP_BYTES // (shape[1:].numel() * element_size)))


def _multiply(
    x: Tensor,
    matrices: Tensor,
    out: Tensor,
    sizes: tuple[int, ...],
    first: int = 0,
    *,
    scaling: float = 1.0,
    adds: bool = False,
) -> None:
    """Multiply the rows of experts [first, first + n) with their matrices, into rows of `out`.

    Args:
        x: (rows, in) of all experts.
        matrices: (n, in, out).
        out: (rows, out).
        sizes: rows of each expert.
        adds: add to `out`, times `scaling`, instead of replacing it.
    """
    start, sizes = sum(sizes[:first]), sizes[first : first + len(matrices)]
    if _is_grouped(x, matrices.shape[1:]):
        part = slice(start, start + sum(sizes))
        result = nn.functional.grouped_mm(x[part], matrices, offs=_ends(sizes, x.device))
        if adds:
            out[part].add_(result, alpha=scaling)
        else:
            out[part] = result
        return
    for matrix, size in zip(matrices, sizes, strict=True):
        if size:
            part = slice(start, start + size)
            if adds:
                out[part].addmm_(x[part], matrix, alpha=scaling)
            else:
                torch.mm(x[part], matrix, out=out[part])
        start += size


def _outer(left: Tensor, right: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """Return left^T right of each expert's rows, (experts, left's columns, right's)."""
    if _is_grouped(left, (left.shape[1], right.shape[1])):
        ends = _ends(sizes, left.device)
        result = nn.functional.grouped_mm(left.t(), right, offs=ends)
        # What a group without rows gets is not defined.
        has_rows = ends.diff(prepend=ends.new_zeros(1)) > 0
        return result.where(has_rows[:, None, None], 0)
    out = left.new_zeros(len(sizes), left.shape[1], right.shape[1])
    start = 0
    for number, size in enumerate(sizes):
        if size:
            part = slice(start, start + size)
            torch.mm(left[part].t(), right[part], out=out[number])
        start += size
    return out


def _ends(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """Return the row after the last one of each expert, (experts,) int32."""
    return torch.tensor(sizes, dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)


def _is_grouped(x: Tensor, widths: tuple[int, ...]) -> bool:
    """True if one kernel multiplies the rows of all experts: on a GPU that does it right."""
    # Rows must begin at multiples of 16 bytes.
    is_aligned = all(width * x.element_size() % 16 == 0 for width in widths)
    return x.device.type == "cuda" and is_aligned and groups_are_right(x.device, x.dtype)


@cache
def groups_are_right(device: torch.device, dtype: torch.dtype) -> bool:
    """Compare PyTorch's grouped products with single ones on this device, once.

    Some versions are silently wrong on some GPUs (pytorch#186365), or need a newer GPU.
    """
    sizes, generator = (3, 0, 21, 8), torch.Generator().manual_seed(0)
    x, matrices = (
        torch.randn(32, 64, generator=generator),
        torch.randn(4, 48, 64, generator=generator),
    )
    x, matrices = x.to(device, dtype), matrices.to(device, dtype)
    ends = _ends(sizes, device)
    try:
        product = nn.functional.grouped_mm(x, matrices.transpose(1, 2), offs=ends)
        outer = nn.functional.grouped_mm(x.t(), product, offs=ends)
    except (RuntimeError, AttributeError):  # an older GPU or PyTorch
        return False
    for expert, (last, size) in enumerate(zip(ends.tolist(), sizes, strict=True)):
        rows = slice(last - size, last)
        expected = x[rows] @ matrices[expert].t()
        pairs = [(product[rows], expected), (outer[expert], x[rows].t() @ product[rows])]
        # Several times the rounding of 16 bits; what is wrong is wrong by much more.
        is_near = all((one - other).norm() <= 2e-2 * other.norm() for one, other in pairs)
        if size and not is_near:
            return False
    return True
