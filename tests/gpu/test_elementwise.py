"""RMSNorm's kernel on the GPU is as exact as the model's own operations, and runs once each way."""

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

from qlora_dist.model.fused_norm_mlp import fuse_norms_and_mlps

TOKENS, WIDTH = 3000, 4096


def results(
    norm: nn.Module, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output, and gradient of the input for a fixed gradient of the output."""
    generator = torch.Generator().manual_seed(1)
    x = (
        (3 * torch.randn(2, TOKENS, WIDTH, generator=generator))
        .to(torch.bfloat16)
        .to(device, dtype)
        .requires_grad_()
    )
    out = norm(x)
    out.backward(
        torch.randn(out.shape, generator=generator).to(torch.bfloat16).to(device, out.dtype)
    )
    return out.detach(), x.grad


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kind", [LlamaRMSNorm, Olmo2RMSNorm])
def test_a_kernel_is_as_exact(
    kind: type[nn.Module], dtype: torch.dtype, device: torch.device
) -> None:
    """Output and gradient are no further from float32 than those of the norm's own operations."""
    norm = kind(WIDTH, eps=1e-5).to(device, dtype).requires_grad_(False)
    norm.weight.copy_(torch.randn(WIDTH, generator=torch.Generator().manual_seed(0)))
    exact = results(norm.float(), torch.float32, device)
    plain = results(norm.to(dtype), dtype, device)
    fuse_norms_and_mlps(norm, device)
    assert "forward" in vars(norm)
    for ours, theirs, expected in zip(results(norm, dtype, device), plain, exact, strict=True):
        assert ours.dtype == theirs.dtype
        assert distance(ours, expected) <= max(1.01 * distance(theirs, expected), 1e-6)


def test_it_is_one_kernel_each_way(device: torch.device) -> None:
    """A norm runs one kernel forward and one backward, and keeps its input's layout."""
    norm = LlamaRMSNorm(WIDTH).to(device, torch.bfloat16).requires_grad_(False)
    fuse_norms_and_mlps(norm, device)
    x = torch.randn(2, TOKENS, WIDTH, device=device).bfloat16().requires_grad_()
    gradient = torch.randn_like(x)
    torch.autograd.grad(norm(x), x, gradient)  # loads the kernels
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        torch.autograd.grad(norm(x), x, gradient)
        torch.cuda.synchronize(device)
    kernels = [
        event.name
        for event in profiled.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    ]
    assert len(kernels) == 2, kernels
