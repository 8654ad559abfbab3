"""RMSNorm of transformers, of this program, and as torch's single kernel."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.gpu_parts.steps import GIB, this_device
from benchmarks.limits import rate
from qlora_dist.model.fused_norm_mlp import fuse_norms_and_mlps

EPSILON = 1e-6
Norm = Callable[[torch.Tensor], torch.Tensor]


def compare(tokens: int = 8 * 2048, width: int = 4096) -> dict[str, Any]:
    """Error and rate of each norm, forward alone and with the gradient of the input.

    A rate counts the traffic of one kernel each way, 2 elements a number forward and 3 backward, so
    that it is comparable with the rate of a copy.
    """
    device = this_device()
    x, grad, weight = _numbers(tokens, width, device)
    bytes_forward = 2 * 2 * x.numel() / GIB
    row: dict[str, Any] = {"shape": [tokens, width]}
    for name, norm in _ways(weight).items():
        row[name] = {
            **distances(norm, x, grad, weight),
            "forward_gib_per_second": rate(bytes_forward, partial(norm, x), device),
            "both_gib_per_second": rate(
                2.5 * bytes_forward, partial(_results, norm, x, grad), device
            ),
        }
    return row


def distances(
    norm: Norm, x: torch.Tensor, grad: torch.Tensor, weight: torch.Tensor
) -> dict[str, float]:
    """Relative errors of a norm's output and gradient, against float64."""

    def exact(x: torch.Tensor) -> torch.Tensor:
        return weight.double() * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPSILON)

    pairs = zip(_results(norm, x, grad), _results(exact, x.double(), grad.double()), strict=True)
    output, gradient = (
        float(f"{float((one.double() - other).norm() / other.norm()):.4g}") for one, other in pairs
    )
    return {"output_distance": output, "gradient_distance": gradient}


def _numbers(
    tokens: int, width: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Input, gradient of the output, and weight."""
    generator = torch.Generator(device).manual_seed(0)
    x, grad = (
        torch.randn(tokens, width, generator=generator, device=device).bfloat16() for _ in range(2)
    )
    return x, grad, (1 + 0.1 * torch.randn(width, generator=generator, device=device)).bfloat16()


def _ways(weight: torch.Tensor) -> dict[str, Norm]:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    def module() -> Any:
        norm = LlamaRMSNorm(weight.numel(), EPSILON)
        norm.weight = nn.Parameter(weight, requires_grad=False)
        return norm

    ours = module()
    fuse_norms_and_mlps(ours)
    return {
        "transformers": module(),
        "this program": ours,
        "one kernel of torch": lambda x: torch.ops.aten._fused_rms_norm(
            x, [weight.numel()], weight, EPSILON
        )[0],
    }


def _results(norm: Norm, x: torch.Tensor, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and gradient of the input."""
    x = x.detach().requires_grad_()
    out = norm(x)
    (dx,) = torch.autograd.grad(out, x, grad)
    return out.detach(), dx
