"""RMSNorm and SwiGLU as one function of autograd each: less is kept for backward than by their single operations.

Written out operation by operation, as models have them, RMSNorm (https://arxiv.org/abs/1910.07467) keeps its input in
float32, and SwiGLU (https://arxiv.org/abs/2002.05202) the gate before and after its activation. Here the one keeps its
input as it came, and the other the two factors: a quarter less of what a Llama keeps when nothing is recomputed.

Families spell these operations in many ways, and round in different places. So no list of families says where they can
stand in: each module is asked for results on a few numbers first, and is left alone unless these have the same bits.

On a GPU PyTorch has RMSNorm as one kernel each way, which moves 10 bytes an element where single
operations move 110. It rounds once, after the weight, so it has the bits of few models. The rule
there: in float32 the module computes the same function, to 1e-6; and in its own type its output and
its gradient are no nearer to that than the kernel's, but for a hundredth.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

_CPU = torch.device("cpu")


def fuse_norms_and_mlps(model: nn.Module, device: torch.device = _CPU) -> None:
    """Let norms and gated MLPs compute in one function each, where that has the bits of their own forward.

    Before weights are there or after, and before sharding; parameters stay where they are.

    Args:
        device: where the model will run. On a GPU norms take a kernel that is as exact instead.
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
    if (
        not hasattr(module, "variance_epsilon")
        or weight is None
        or weight.ndim != 1
        or weight.requires_grad
    ):
        return False
    return (
        len(signature(module.forward).parameters) == 1
    )  # some take a gate, and do without one as well


def _is_like_gated_mlp(module: nn.Module) -> bool:
    return {"gate_proj", "up_proj", "down_proj", "act_fn"} <= set(module._modules)


def _norm_forward(norm: Any, x: torch.Tensor) -> torch.Tensor:
    return _RmsNorm.apply(x, norm)


def _kernel_forward(norm: Any, plain: Callable[..., torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    # The kernel takes one type for both, and autocast leaves a norm's alone.
    return _RmsNorm.apply(x, norm, True) if x.dtype == norm.weight.dtype else plain(x)


def _mlp_forward(mlp: Any, x: torch.Tensor) -> torch.Tensor:
    return mlp.down_proj(_SwiGlu.apply(mlp.gate_proj(x), mlp.up_proj(x)))


class _RmsNorm(torch.autograd.Function):
    """w * x / rms(x), the quotient in float32 and rounded to the type of x; the gradient of x only, as w is frozen.

    With n = x / rms(x) of d elements and h = w g:   dx = (h - n (h n) / d) / rms(x)

    With `by_kernel`, which needs the type of x and w to be one, only the product with w is rounded.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, norm: Any, by_kernel: bool = False
    ) -> torch.Tensor:  # x (..., d_model)
        ctx.norm = norm  # not its weight, which engines may have let go of by the time of backward
        ctx.by_kernel = by_kernel
        if by_kernel:
            out, inverse = torch.ops.aten._fused_rms_norm(
                x, x.shape[-1:], norm.weight, norm.variance_epsilon
            )
            ctx.save_for_backward(x, inverse)  # (..., 1) float32
            return out
        exact = x.float()
        inverse = torch.rsqrt(
            exact.square().mean(-1, keepdim=True) + norm.variance_epsilon
        )  # (..., 1)
        ctx.save_for_backward(x, inverse)
        # Nothing in place: selective recomputation makes results again that no operation has written to.
        return norm.weight * (exact * inverse).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        x, inverse = ctx.saved_tensors
        if ctx.by_kernel and x.device.type == "cuda":  # a CPU has none for backward
            grad, _ = torch.ops.aten._fused_rms_norm_backward(
                grads[0], x, x.shape[-1:], inverse, ctx.norm.weight, [True, False]
            )
            return grad, None, None
        normed = x.to(torch.float32, copy=True).mul_(inverse)
        out_grad = grads[0].float() if ctx.by_kernel else grads[0]  # the kernel rounds no product
        grad = (out_grad * ctx.norm.weight).float()  # a new tensor: it may be changed in place
        along = torch.linalg.vecdot(grad, normed).unsqueeze_(-1).div_(x.shape[-1])  # (..., 1)
        return grad.sub_(normed.mul_(along)).mul_(inverse).to(x.dtype), None, None


class _SwiGlu(torch.autograd.Function):
    """silu(gate) * up; backward computes silu(gate) again."""

    @staticmethod
    def forward(
        ctx: Any, gate: torch.Tensor, up: torch.Tensor
    ) -> torch.Tensor:  # both (..., d_mlp)
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
    return all(
        _agree(probe.forward, partial(_norm_forward, probe), x_dtype)
        for x_dtype in {dtype, torch.float32}
    )


def kernel_is_as_exact(norm: nn.Module, device: torch.device) -> bool:
    """Whether the kernel may stand in for a norm, by the rule at the head of this page."""
    dtype = norm.weight.dtype
    weight = _numbers(_WIDTH).to(device, dtype)
    probe, probe32 = (_with(norm, _parameters={"weight": of}) for of in (weight, weight.float()))
    for scale in (4, 1e-3):  # small inputs show where the epsilon is added
        x = (scale * _numbers(1, _NUM_TOKENS, _WIDTH)).to(device, dtype)
        try:
            own, exact = _out_and_grad(probe.forward, x), _out_and_grad(probe32.forward, x.float())
        except (
            RuntimeError,
            TypeError,
            AttributeError,
        ):  # it wants something else than one tensor of any width
            return False
        found = _out_and_grad(partial(_kernel_forward, probe, probe.forward), x)
        found32 = _out_and_grad(partial(_kernel_forward, probe32, probe32.forward), x.float())
        for ours, theirs, ours32, expected in zip(found, own, found32, exact, strict=True):
            # The hundredth is for what the same rounding makes of sums in another order.
            allowed = max(1.01 * _distance(theirs, expected), 1e-6)
            if (
                theirs.dtype != dtype
                or _distance(ours, expected) > allowed
                or _distance(ours32, expected) > 1e-6
            ):
                return False
    return True


def _out_and_grad(
    forward: Callable[..., torch.Tensor], x: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output, and the gradient of the input for some gradient of the output."""
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        out = forward(x)
    return out.detach(), torch.autograd.grad(out, x, _numbers(*out.shape).flip(-1).to(out))[0]


def _distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative, in the Euclidean norm."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def _same_mlp(mlp: nn.Module) -> bool:
    """Whether an MLP's own forward has the bits of the one here, around stand-ins for its projections."""
    stand_ins = {
        "gate_proj": _Affine(1.5, 0.25),
        "up_proj": _Affine(-0.75, 0.5),
        "down_proj": _Affine(2.0, 1.0),
    }
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
    except (
        RuntimeError,
        TypeError,
        AttributeError,
    ):  # it wants something else than one tensor of any width
        return False
    return (
        isinstance(expected, torch.Tensor)
        and expected.dtype == found.dtype
        and torch.equal(expected, found)
    )
