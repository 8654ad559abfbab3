"""Norms and gated MLPs as one function each keep their modules' results, and less memory."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

from qlora_dist.config.schema import AdapterConfig, ModelConfig
from qlora_dist.memory.selective import SelectiveForward
from qlora_dist.model import fused_norm_mlp as elementwise
from qlora_dist.model.adapters import add_adapters
from qlora_dist.model.fused_norm_mlp import fuse_norms_and_mlps
from qlora_dist.model.skeleton import build_skeleton

WIDTH = 96


def norm(kind: type[nn.Module] = LlamaRMSNorm, dtype: torch.dtype = torch.float32) -> nn.Module:
    module = kind(WIDTH, eps=1e-5).to(dtype).requires_grad_(False)
    module.weight.copy_(torch.randn(WIDTH, generator=torch.Generator().manual_seed(0)))
    return module


def mlp(activation: str = "silu", dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=WIDTH, intermediate_size=160, hidden_act=activation)
    return LlamaMLP(config).to(dtype).requires_grad_(False)


def is_lightened(module: nn.Module) -> bool:
    return "forward" in vars(module)


def results(module: Callable, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the output, and the gradient of the input for a fixed gradient of the output."""
    generator = torch.Generator().manual_seed(1)
    x = (
        (3 * torch.randn(2, 50, WIDTH, generator=generator))
        .to(torch.bfloat16)
        .to(dtype)
        .requires_grad_()
    )
    out = module(x)
    out.backward(torch.randn(out.shape, generator=generator).to(torch.bfloat16).to(out.dtype))
    return out.detach(), x.grad


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize("make", [norm, mlp])
def test_float32_is_the_same(make: Callable) -> None:
    """The output has the same bits, and the gradient agrees within 1e-6."""
    module = make()
    out, grad = results(module, torch.float32)
    fuse_norms_and_mlps(module)
    assert is_lightened(module)
    found_out, found_grad = results(module, torch.float32)
    assert torch.equal(found_out, out)
    assert distance(found_grad, grad) <= 1e-6


@pytest.mark.parametrize("make", [norm, mlp])
def test_bfloat16_is_as_exact(make: Callable) -> None:
    """The output has the same bits, and the gradient is as near to float32 as before."""
    module = make(dtype=torch.bfloat16)
    _, exact = results(module.float(), torch.float32)
    out, plain = results(module.bfloat16(), torch.bfloat16)
    fuse_norms_and_mlps(module)
    found_out, found = results(module, torch.bfloat16)
    assert torch.equal(found_out, out)
    assert distance(plain, exact) > 0
    assert distance(found, exact) <= 1.02 * distance(plain, exact)


@pytest.mark.parametrize("kind", [Gemma2RMSNorm, Olmo2RMSNorm])
def test_other_norms_are_left_alone(kind: type[nn.Module]) -> None:
    """Norms that multiply by 1 + w, or round after the weight, are left alone."""
    module = kind(WIDTH).bfloat16().requires_grad_(False)
    module.weight.copy_(torch.randn(WIDTH))
    fuse_norms_and_mlps(module)
    assert not is_lightened(module)


class OnePlus(LlamaRMSNorm):
    """Norm that multiplies by 1 + w, under Llama's names."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * ((1 + self.weight) / self.weight).to(x.dtype)


class Centered(LlamaRMSNorm):
    """Norm that takes the mean off first."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x - x.mean(-1, keepdim=True))


class EpsilonOutside(LlamaRMSNorm):
    """Norm that adds the epsilon to the root instead of under it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        exact = x.float()
        normed = exact / (exact.square().mean(-1, keepdim=True).sqrt() + self.variance_epsilon)
        return self.weight * normed.to(x.dtype)


class Exact(LlamaRMSNorm):
    """Norm that rounds nothing, and so is nearer to float32 than any kernel that does."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.float())


class Gated(LlamaRMSNorm):
    """Norm that is called with a gate in its model, and can do without."""

    def forward(self, x: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        return super().forward(x if gate is None else x * gate)


@pytest.fixture
def kernels_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ask norms on the CPU, whose operator in the kernel's place rounds as the kernel does."""
    ask = elementwise.kernel_is_as_exact
    monkeypatch.setattr(
        elementwise, "kernel_is_as_exact", lambda norm, device: ask(norm, torch.device("cpu"))
    )


GPU = torch.device("cuda")


@pytest.mark.usefixtures("kernels_here")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", [LlamaRMSNorm, Olmo2RMSNorm])
def test_a_kernel_is_as_exact(kind: type[nn.Module], dtype: torch.dtype) -> None:
    """Output and gradient of the kernel that norms take on a GPU are as exact as the module's own.

    In bfloat16 they are no further from float32, whether models round before the weight or after
    it. In float32 they agree within 1e-6.
    """
    module = norm(kind, dtype)
    exact_out, exact = results(module.float(), torch.float32)
    out, plain = results(module.to(dtype), dtype)
    fuse_norms_and_mlps(module, GPU)
    assert is_lightened(module)
    found_out, found = results(module, dtype)
    for ours, theirs, expected in ((found_out, out, exact_out), (found, plain, exact)):
        assert ours.dtype == theirs.dtype
        assert distance(ours, expected) <= max(1.01 * distance(theirs, expected), 1e-6)
    if kind is LlamaRMSNorm and dtype == torch.bfloat16:
        assert distance(found_out, exact_out) < 0.9 * distance(out, exact_out), "it rounds once"


@pytest.mark.usefixtures("kernels_here")
@pytest.mark.parametrize("kind", [Gemma2RMSNorm, OnePlus, Centered, EpsilonOutside, Exact, Gated])
def test_a_kernel_takes_the_place_of_nothing_else(kind: type[nn.Module]) -> None:
    """Norms with a different function, more exactness or more arguments keep their own forward."""
    module = kind(WIDTH).bfloat16().requires_grad_(False)
    module.weight.copy_(torch.randn(WIDTH))
    fuse_norms_and_mlps(module, GPU)
    assert not is_lightened(module)


@pytest.mark.usefixtures("kernels_here")
def test_an_input_of_another_type_is_left_to_the_norm() -> None:
    """A residual stream in float32 is normed as without a GPU: the kernel takes one type only."""
    module, other = norm(dtype=torch.bfloat16), norm(dtype=torch.bfloat16)
    expected = results(module, torch.float32)
    fuse_norms_and_mlps(module, GPU)
    assert all(map(torch.equal, results(module, torch.float32), expected[:1]))
    fuse_norms_and_mlps(other)
    assert torch.equal(results(module, torch.float32)[1], results(other, torch.float32)[1])


def test_other_activations_are_left_alone() -> None:
    """MLPs gated by GELU, or with a different use of the same parts, are left alone."""

    class Other(LlamaMLP):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))

    gelu, other = (
        mlp("gelu_pytorch_tanh"),
        Other(LlamaConfig(hidden_size=WIDTH, intermediate_size=160)),
    )
    assert isinstance(other.act_fn, type(ACT2FN["silu"]))
    for module in (gelu, other):
        fuse_norms_and_mlps(module)
        assert not is_lightened(module)


def test_a_norm_that_learns_is_left_alone() -> None:
    """A norm whose weight needs a gradient keeps its own forward."""
    module = norm().requires_grad_(True)
    fuse_norms_and_mlps(module)
    assert not is_lightened(module)


def kept_bytes(module: Callable, x: torch.Tensor) -> int:
    """Return the bytes that autograd keeps of a forward, without parameters."""
    sizes: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        module(x)
    return sum(sizes.values())


def test_less_is_kept() -> None:
    """A norm keeps its input in the input's type; SwiGLU keeps gate and up, and no third tensor."""
    x = torch.randn(10, WIDTH).bfloat16().requires_grad_()
    module = norm(dtype=torch.bfloat16)
    fuse_norms_and_mlps(module)
    assert kept_bytes(module, x) <= 10 * WIDTH * 2 + 10 * 4 + WIDTH * 2

    gate, up = (torch.randn(10, WIDTH).bfloat16().requires_grad_() for _ in range(2))
    gated = mlp()
    gated.gate_proj, gated.up_proj = (nn.Identity() for _ in range(2))
    gated.gate_proj.forward, gated.up_proj.forward = (lambda x, y=y: y * 1 for y in (gate, up))
    gated.down_proj = nn.Identity()
    before = kept_bytes(gated, x)
    fuse_norms_and_mlps(gated)
    assert before - kept_bytes(gated, x) == 10 * WIDTH * 2


def test_whole_models_are_lightened_by_their_parts(tiny_llama: Path) -> None:
    """All norms and MLPs of a Llama with adapters are fused before weights are loaded.

    Parameters keep their names.
    """
    skeleton = build_skeleton(tiny_llama, ModelConfig(path=str(tiny_llama)))
    model = add_adapters(skeleton, AdapterConfig(rank=2), "base")
    names = list(model.state_dict())
    fuse_norms_and_mlps(model)
    kinds = [type(module).__name__ for module in model.modules() if is_lightened(module)]
    assert sorted(kinds) == ["LlamaMLP"] * 3 + ["LlamaRMSNorm"] * 7
    assert list(model.state_dict()) == names


def test_selective_recomputation_makes_their_results_again() -> None:
    """Selective recomputation keeps neither a norm's output nor the product of gate and up.

    Their inputs are kept.
    """
    weights = [nn.Parameter(torch.eye(WIDTH)) for _ in range(4)]
    with SelectiveForward(()) as forward:
        hidden = torch.ones(16, WIDTH) @ weights[0]
        normed = elementwise._RmsNorm.apply(hidden, norm())
        product = elementwise._SwiGlu.apply(normed @ weights[1], normed @ weights[2])
        product @ weights[3]
    everything, kept = forward.kept
    inverse, weight = 16 * 4, WIDTH * 4  # made again, and copied for it
    assert everything - kept == 2 * 16 * WIDTH * 4 + inverse - weight
