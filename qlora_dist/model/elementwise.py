"""RMSNorm and SwiGLU as one function of autograd each: less is kept for backward than by their single operations.

Written out operation by operation, as models have them, RMSNorm (https://arxiv.org/abs/1910.07467) keeps its input in
float32, and SwiGLU (https://arxiv.org/abs/2002.05202) the gate before and after its activation. Here the one keeps its
input as it came, and the other the two factors: a quarter less of what a Llama keeps when nothing is recomputed.

Families spell these operations in many ways, and round in different places. So no list of families says where they can
stand in: each module is asked for results on a few numbers first, and is left alone unless these have the same bits.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def lighten(model: nn.Module) -> None:
    """Let norms and gated MLPs compute in one function each, where that has the bits of their own forward.

    Before weights are there or after, and before sharding; parameters stay where they are.
    """
    for module in model.modules():
        if _is_like_rms_norm(module) and _same_norm(module):
            module.forward = partial(_norm_forward, module)
        elif _is_like_gated_mlp(module) and _same_mlp(module):
            module.forward = partial(_mlp_forward, module)


def _is_like_rms_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return hasattr(module, "variance_epsilon") and weight is not None and weight.ndim == 1 and not weight.requires_grad


def _is_like_gated_mlp(module: nn.Module) -> bool:
    return {"gate_proj", "up_proj", "down_proj", "act_fn"} <= set(module._modules)


def _norm_forward(norm: Any, x: torch.Tensor) -> torch.Tensor:
    return _RmsNorm.apply(x, norm)


def _mlp_forward(mlp: Any, x: torch.Tensor) -> torch.Tensor:
    return mlp.down_proj(_SwiGlu.apply(mlp.gate_proj(x), mlp.up_proj(x)))


class _RmsNorm(torch.autograd.Function):
    """w * x / rms(x), the quotient in float32 and rounded to the type of x; the gradient of x only, as w is frozen.

    With n = x / rms(x) of d elements and h = w g:   dx = (h - n (h n) / d) / rms(x)
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, norm: Any) -> torch.Tensor:  # x (..., d_model)
        exact = x.float()
        inverse = torch.rsqrt(exact.square().mean(-1, keepdim=True) + norm.variance_epsilon)  # (..., 1)
        ctx.norm = norm  # not its weight, which engines may have let go of by the time of backward
        ctx.save_for_backward(x, inverse)
        # Nothing in place: selective recomputation makes results again that no operation has written to.
        return norm.weight * (exact * inverse).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        x, inverse = ctx.saved_tensors
        normed = x.to(torch.float32, copy=True).mul_(inverse)
        grad = (grads[0] * ctx.norm.weight).float()  # a new tensor: it may be changed in place
        along = torch.linalg.vecdot(grad, normed).unsqueeze_(-1).div_(x.shape[-1])  # (..., 1)
        return grad.sub_(normed.mul_(along)).mul_(inverse).to(x.dtype), None


class _SwiGlu(torch.autograd.Function):
    """silu(gate) * up; backward computes silu(gate) again."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:  # both (..., d_mlp)
        ctx.save_for_backward(gate, up)
        return F.silu(gate) * up

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = ctx.saved_tensors
        grad_up = F.silu(gate).mul_(grads[0])
        return torch.ops.aten.silu_backward(grads[0] * up, gate), grad_up


# --------------------------------------------------------------------------------------------------------------------
# Asking modules.

_NUM_TOKENS, _WIDTH = 8, 64


def _same_norm(norm: nn.Module) -> bool:
    """Whether a norm's own forward has the bits of the one here, for weights and inputs of its type and in float32."""
    dtype = norm.weight.dtype
    probe = _with(norm, _parameters={"weight": _numbers(_WIDTH).to(dtype)})
    return all(_agree(probe.forward, partial(_norm_forward, probe), x_dtype) for x_dtype in {dtype, torch.float32})


def _same_mlp(mlp: nn.Module) -> bool:
    """Whether an MLP's own forward has the bits of the one here, around stand-ins for its projections."""
    stand_ins = {"gate_proj": _Affine(1.5, 0.25), "up_proj": _Affine(-0.75, 0.5), "down_proj": _Affine(2.0, 1.0)}
    probe = _with(mlp, _modules={**mlp._modules, **stand_ins})
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    return all(_agree(probe.forward, partial(_mlp_forward, probe), dtype) for dtype in dtypes)


class _Affine(nn.Module):
    def __init__(self, scale: float, shift: float) -> None:
        super().__init__()
        self.scale, self.shift = scale, shift

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale + self.shift


def _with(module: nn.Module, **state: dict[str, Any]) -> Any:
    """A copy of the module with other parameters or children; what is not replaced is shared."""
    other = copy.copy(module)
    other.__dict__.update(state)
    return other


def _numbers(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def _agree(theirs: Callable[..., Any], ours: Callable[..., Any], dtype: torch.dtype) -> bool:
    x = (4 * _numbers(1, _NUM_TOKENS, _WIDTH)).to(dtype)
    try:
        expected, found = theirs(x), ours(x)
    except (RuntimeError, TypeError, AttributeError):  # it wants something else than one tensor of any width
        return False
    return isinstance(expected, torch.Tensor) and expected.dtype == found.dtype and torch.equal(expected, found)
