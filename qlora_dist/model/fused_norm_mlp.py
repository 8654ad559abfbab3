"""RMSNorm and SwiGLU as one autograd function each, which keep less than their single operations.

Operation by operation, as models have them, RMSNorm (https://arxiv.org/abs/1910.07467) keeps its
input in float32, and SwiGLU (https://arxiv.org/abs/2002.05202) the gate before and after its
activation. Here RMSNorm keeps its input in the input's type, and SwiGLU the two factors: a quarter
less of what a Llama keeps when nothing is recomputed.

Families spell these operations in many ways, and round in different places. So no list of families
says where the functions can stand in. Each module is asked for results on a few numbers first, and
is left alone unless these have the same bits.

On a GPU PyTorch has RMSNorm as one kernel each way, which moves 10 bytes an element where single
operations move 110. It rounds once, after the weight, so it has the bits of few models. The rule
there: in float32 the module computes the kernel's function, to 1e-6; and in the module's own type
its output and its gradient are at most 1 % nearer to float32 than the kernel's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

_CPU = torch.device("cpu")


def fuse_norms_and_mlps(model: nn.Module, device: torch.device = _CPU) -> None:
    """Let norms and gated MLPs compute in one function each, where the bits of results stay.

    Comes before sharding, with or without weights loaded. Parameters stay where they are.

    Args:
        device: the device that the model will run on. On a GPU norms take PyTorch's kernel where
            it is as exact.
    """
    for module in model.modules():
        if _is_like_rms_norm(module):
            own, plain = module.forward, partial(_norm_forward, module)
            is_same = _same_norm(module)
            if device.type == "cuda" and kernel_is_as_exact(module, device):
                module.forward = partial(_kernel_forward, module, plain if is_same else own)
            elif is_same:
                module.forward = plain
        elif _is_like_gated_mlp(module) and _same_mlp(module):
            module.forward = partial(_mlp_forward, module)


def _is_like_rms_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return (
        hasattr(module, "variance_epsilon")
        and weight is not None
        and weight.ndim == 1
        and not weight.requires_grad
        # Some norms take a gate as well, and would answer a question without it.
        and len(signature(module.forward).parameters) == 1
    )


def _is_like_gated_mlp(module: nn.Module) -> bool:
    return {"gate_proj", "up_proj", "down_proj", "act_fn"} <= set(module._modules)


def _norm_forward(norm: Any, x: Tensor) -> Tensor:
    return _RmsNorm.apply(x, norm)


def _kernel_forward(norm: Any, plain: Callable[..., Tensor], x: Tensor) -> Tensor:
    # The kernel needs x and the weight in one type, and autocast casts neither.
    return _RmsNorm.apply(x, norm, True) if x.dtype == norm.weight.dtype else plain(x)


def _mlp_forward(mlp: Any, x: Tensor) -> Tensor:
    return mlp.down_proj(_SwiGlu.apply(mlp.gate_proj(x), mlp.up_proj(x)))


class _RmsNorm(torch.autograd.Function):
    """w * x / rms(x), the quotient in float32 and rounded to the type of x; w gets no gradient.

    With n = x / rms(x) of d elements and h = w g:   dx = (h - n (h n) / d) / rms(x)

    With `by_kernel`, which needs x and w in one type, only the product with w is rounded.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: Any, by_kernel: bool = False) -> Tensor:
        # x (..., d_model). The norm is kept and not its weight, which an engine may have freed by
        # the time of backward.
        ctx.norm, ctx.by_kernel = norm, by_kernel
        weight, epsilon = norm.weight, norm.variance_epsilon
        if by_kernel:
            out, inverse = torch.ops.aten._fused_rms_norm(x, x.shape[-1:], weight, epsilon)
            ctx.save_for_backward(x, inverse)  # (..., 1) float32
            return out
        exact = x.float()
        inverse = torch.rsqrt(exact.square().mean(-1, keepdim=True) + epsilon)  # (..., 1)
        ctx.save_for_backward(x, inverse)
        # Nothing in place: selective recomputation remakes only results that no operation changes.
        return weight * (exact * inverse).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, out_grad: Tensor) -> tuple[Tensor, None, None]:
        x, inverse = ctx.saved_tensors
        weight = ctx.norm.weight
        if ctx.by_kernel and x.device.type == "cuda":  # a CPU has no kernel for backward
            grad, _ = torch.ops.aten._fused_rms_norm_backward(
                out_grad, x, x.shape[-1:], inverse, weight, [True, False]
            )
            return grad, None, None
        normed = x.to(torch.float32, copy=True).mul_(inverse)
        if ctx.by_kernel:
            out_grad = out_grad.float()  # the kernel does not round the product with the weight
        grad = (out_grad * weight).float()  # a new tensor, so it may be changed in place
        along = torch.linalg.vecdot(grad, normed).unsqueeze_(-1).div_(x.shape[-1])  # (..., 1)
        return grad.sub_(normed.mul_(along)).mul_(inverse).to(x.dtype), None, None


class _SwiGlu(torch.autograd.Function):
    """silu(gate) * up, of two (..., d_mlp) tensors; backward computes silu(gate) again."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate) * up

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        grad_up = F.silu(gate).mul_(grad)
        return torch.ops.aten.silu_backward(grad * up, gate), grad_up


# --------------------------------------------------------------------------------------------------
# Questions to modules.

_NUM_TOKENS, _WIDTH = 8, 64
# From a module that wants something else than one tensor of any width.
_REFUSALS = (RuntimeError, TypeError, AttributeError)


def _same_norm(norm: nn.Module) -> bool:
    """True if a norm's own forward has the bits of :class:`_RmsNorm`.

    Compared for its own type of weights, with inputs in that type and in float32.
    """
    dtype = norm.weight.dtype
    probe = _with(norm, _parameters={"weight": _numbers(_WIDTH).to(dtype)})
    ours = partial(_norm_forward, probe)
    return all(_agree(probe.forward, ours, x_dtype) for x_dtype in {dtype, torch.float32})


def kernel_is_as_exact(norm: nn.Module, device: torch.device) -> bool:
    """True if the kernel may stand in for a norm, by the rule in this module's docstring."""
    dtype = norm.weight.dtype
    weight = _numbers(_WIDTH).to(device, dtype)
    probe, probe32 = (_with(norm, _parameters={"weight": of}) for of in (weight, weight.float()))
    for scale in (4, 1e-3):  # small inputs show where the epsilon is added
        x = (scale * _numbers(1, _NUM_TOKENS, _WIDTH)).to(device, dtype)
        try:
            own, exact = _out_and_grad(probe.forward, x), _out_and_grad(probe32.forward, x.float())
        except _REFUSALS:
            return False
        found = _out_and_grad(partial(_kernel_forward, probe, probe.forward), x)
        found32 = _out_and_grad(partial(_kernel_forward, probe32, probe32.forward), x.float())
        for ours, theirs, ours32, expected in zip(found, own, found32, exact, strict=True):
            # The 1 % allows for sums that are rounded alike but added in a different order.
            allowed = max(1.01 * _distance(theirs, expected), 1e-6)
            error, error32 = _distance(ours, expected), _distance(ours32, expected)
            if theirs.dtype != dtype or error > allowed or error32 > 1e-6:
                return False
    return True


def _out_and_grad(forward: Callable[..., Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the output, and the gradient of the input for a fixed gradient of the output."""
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        out = forward(x)
    return out.detach(), torch.autograd.grad(out, x, _numbers(*out.shape).flip(-1).to(out))[0]


def _distance(found: Tensor, expected: Tensor) -> float:
    """Relative error in the Euclidean norm."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def _same_mlp(mlp: nn.Module) -> bool:
    """True if an MLP's own forward has the bits of :class:`_SwiGlu` around its projections."""
    stand_ins = {
        "gate_proj": lambda x: x * 1.5 + 0.25,
        "up_proj": lambda x: x * -0.75 + 0.5,
        "down_proj": lambda x: x * 2.0 + 1.0,
    }
    probe = _with(mlp, _modules={**mlp._modules, **stand_ins})
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    return all(_agree(probe.forward, partial(_mlp_forward, probe), dtype) for dtype in dtypes)


def _with(module: nn.Module, **state: dict[str, Any]) -> Any:
    """Copy a module with some attributes replaced, such as its parameters; share all others."""
    other = copy.copy(module)
    other.__dict__.update(state)
    return other


def _numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def _agree(theirs: Callable[..., Any], ours: Callable[..., Any], dtype: torch.dtype) -> bool:
    """True if two forwards give the same bits for a few numbers of type `dtype`."""
    x = (4 * _numbers(1, _NUM_TOKENS, _WIDTH)).to(dtype)
    try:
        expected, found = theirs(x), ours(x)
    except _REFUSALS:
        return False
    is_alike = isinstance(expected, Tensor) and expected.dtype == found.dtype
    return is_alike and torch.equal(expected, found)
