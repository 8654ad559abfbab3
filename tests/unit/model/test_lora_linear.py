"""The fused layer computes what peft composes, at least as exactly, and keeps less of it."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora.bnb import Linear4bit
from torch import nn

from qlora_dist.config.schema import AdapterConfig, ModelConfig
from qlora_dist.model.adapters import add_adapters, lora_layers
from qlora_dist.model.lora_linear import FusedLinear, fuse_adapters
from qlora_dist.model.nf4 import QuantFormat, QuantizedLinear, quantize_matrix
from qlora_dist.model.skeleton import build_skeleton

IN, OUT = 128, 96


def adapted_layer(
    rank: int = 8, dtype: torch.dtype = torch.float32, bias: bool = False, **config: object
) -> Linear4bit:
    """Build peft's layer (OUT x IN, in 4 bits) with random A and B in float32."""
    torch.manual_seed(0)
    fmt = QuantFormat(double_quant=not bias)
    base = QuantizedLinear(IN, OUT, bias, fmt, dtype).to_empty(device="cpu")
    for name, tensor in vars(quantize_matrix(torch.randn(OUT, IN) / math.sqrt(IN), fmt)).items():
        if tensor is not None:
            getattr(base, name).copy_(tensor)
    if bias:
        base.bias.copy_(torch.randn(OUT))
    lora = LoraConfig(r=rank, lora_alpha=16, **config)
    layer = Linear4bit(base, "default", lora, r=rank, lora_alpha=16)
    layer.lora_A.float(), layer.lora_B.float()  # peft does this once it has the whole model
    layer.cast_input_dtype_enabled = False
    nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
    return layer.train()


def results(
    layer: nn.Module, x: torch.Tensor, forward: Callable | None = None
) -> dict[str, torch.Tensor]:
    """Return the output, and gradients of x and the adapter for a fixed gradient of it."""
    x = x.clone().requires_grad_()
    layer.zero_grad()
    dtype = x.dtype
    with torch.autocast("cpu", dtype=dtype) if dtype == torch.bfloat16 else nullcontext():
        out = (layer if forward is None else forward)(x)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype))
    grads = {name: param.grad for name, param in layer.named_parameters() if param.requires_grad}
    return {"out": out.detach(), "x": x.grad, **grads}


@pytest.mark.parametrize("is_adapted", [True, False])
def test_autocast_decides_the_type_of_the_output(is_adapted: bool) -> None:
    """Autocast decides the output's type, as of PyTorch's own linear layers.

    So a float32 input, such as LayerNorm's output on a GPU, does not spread.
    """
    layer = adapted_layer(4, torch.bfloat16)
    fuse_adapters(layer)
    layer = layer if is_adapted else layer.base_layer
    x = torch.randn(3, IN)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (
            layer(x).dtype == nn.functional.linear(x, torch.randn(OUT, IN)).dtype == torch.bfloat16
        )
    assert layer(x).dtype == torch.float32


def both_ways(
    layer: Linear4bit, x: torch.Tensor
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return the results as peft composes them, and fused."""
    plain = results(layer, x)
    assert fuse_adapters(layer) is None
    assert type(layer) is FusedLinear
    return plain, results(layer, x)


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize("rank", [1, 3, 16, 64])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(2, 7), (33,), ()])
def test_float32_equals_peft(rank: int, bias: bool, shape: tuple[int, ...]) -> None:
    """Output and gradients agree within 1e-5 for any rank, with rsLoRA's scaling and a bias."""
    layer = adapted_layer(rank, bias=bias, use_rslora=bias)
    plain, fused = both_ways(layer, torch.randn(*shape, IN))
    assert plain.keys() == fused.keys()
    assert len(plain) == 4
    for name, tensor in plain.items():
        assert fused[name].dtype == tensor.dtype
        assert fused[name].shape == tensor.shape
        assert distance(fused[name], tensor) <= 1e-5, name


@pytest.mark.parametrize("rank", [4, 64])
def test_bfloat16_is_as_exact_as_peft(rank: int) -> None:
    """No result is further from float32 on the same dequantized weight than peft's own."""
    layer = adapted_layer(rank, torch.bfloat16)
    x = torch.randn(4, 128, IN).to(torch.bfloat16)
    weight = layer.base_layer.dequantized().float()
    lora_a, lora_b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    scaling = layer.scaling["default"]
    exact = results(
        layer, x.float(), lambda x: x @ weight.t() + scaling * (x @ lora_a.t() @ lora_b.t())
    )
    plain, fused = both_ways(layer, x)
    for name, tensor in exact.items():
        assert distance(fused[name], tensor) <= 1.05 * distance(plain[name], tensor), name


def test_other_input_types_come_back_as_they_came() -> None:
    """Without autocast a float32 input gives float32, computed in bfloat16, as with peft."""
    layer = adapted_layer(dtype=torch.bfloat16)
    x = torch.randn(5, IN)
    plain = layer(x)
    fuse_adapters(layer)
    fused = layer(x)
    assert plain.dtype == fused.dtype == torch.float32
    assert distance(fused, plain) < 0.01


def kept_for_backward(forward: Callable, x: torch.Tensor) -> list[torch.Tensor]:
    """Return the tensors that autograd keeps of a forward."""
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16),
    ):
        forward(x)
    return kept


def test_the_input_is_kept_once_and_weights_never() -> None:
    """Two layers on one input keep a single copy of it, and A x of each, and nothing else."""
    rank, x = 4, torch.randn(50, IN).to(torch.bfloat16).requires_grad_()
    layers = [adapted_layer(rank, torch.bfloat16) for _ in range(2)]
    for layer in layers:
        fuse_adapters(layer)
    kept = kept_for_backward(lambda x: [layer(x) for layer in layers], x)
    sizes = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept
    }
    assert sum(sizes.values()) == 50 * (IN + 2 * rank) * 2
    assert x.untyped_storage().data_ptr() in sizes


def test_gradients_that_nobody_asks_for_are_not_computed() -> None:
    """A layer whose input needs no gradient does not dequantize its weight in backward."""
    layer = adapted_layer()
    fuse_adapters(layer)
    expected = results(layer, torch.ones(3, IN))
    layer.zero_grad()
    out = layer(torch.ones(3, IN))
    layer.base_layer.dequantized = None  # would fail
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(1)))
    assert torch.equal(layer.lora_A["default"].weight.grad, expected["lora_A.default.weight"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_evaluation_computes_the_same_and_leaves_no_trace(dtype: torch.dtype) -> None:
    """Without gradients the output has the same bits, and so has training afterwards."""
    layer, x = adapted_layer(dtype=dtype, bias=True), torch.randn(3, IN).to(dtype)
    fuse_adapters(layer)
    before = results(layer, x)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            assert torch.equal(layer.eval()(x), before["out"])
    after = results(layer.train(), x)
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name


def test_adapters_can_be_switched_while_fused() -> None:
    """With its adapter off, or a second adapter active, the layer computes what peft does."""
    layer, x = adapted_layer(), torch.randn(3, IN)
    layer.update_layer(
        "second", 4, lora_alpha=8, config=LoraConfig(r=4, lora_alpha=8, init_lora_weights=False)
    )
    expected = {}
    for way in ("composed", "fused"):
        if way == "fused":
            assert fuse_adapters(layer) is None
        layer.set_adapter(["default", "second"])
        expected[way] = [layer(x)]
        layer.set_adapter("second")
        expected[way] += [layer(x), layer(x, adapter_names=["default", "second", "__base__"])]
        layer.enable_adapters(False)
        expected[way] += [layer(x)]
        layer.enable_adapters(True)
    for plain, fused in zip(expected["composed"], expected["fused"], strict=True):
        assert distance(fused, plain) <= 1e-6
    assert len({out.sum().item() for out in expected["composed"]}) == 4


@pytest.mark.parametrize("is_fused", [True, False])
def test_the_result_may_be_changed_in_place(is_fused: bool) -> None:
    """A model that adds to a layer's result in place trains as one that adds beside it."""
    layer, x = adapted_layer(dtype=torch.bfloat16, bias=True), torch.randn(2, 5, IN)
    x = x.to(torch.bfloat16)
    if is_fused:
        fuse_adapters(layer)
    gradients = []
    for in_place in (True, False):
        given = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            result = layer(given)
        result = result.add_(1) if in_place else result + 1
        (result.float() ** 2).sum().backward()
        gradients.append(given.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("shape", [(2, 5), (9,)])
def test_the_compiler_traces_it_whole(shape: tuple[int, ...]) -> None:
    """Compiled code has no break in its graph, keeps the bits, and keeps no weight."""
    layer, x = adapted_layer(dtype=torch.bfloat16), torch.randn(*shape, IN).to(torch.bfloat16)
    fuse_adapters(layer)
    expected = results(layer, x)
    torch.compiler.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    found = results(layer, x, compiled)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    kept = kept_for_backward(compiled, x.requires_grad_())
    assert all(tensor.numel() < OUT * IN for tensor in kept)


@pytest.mark.parametrize(
    ("adapter", "quantization", "reason"),
    [
        ({"dropout": 0.1}, "nf4", "dropout"),
        ({"use_dora": True}, "nf4", "another kind of adapter than plain LoRA"),
        ({}, "none", "a base that is not in 4 bits"),
    ],
)
def test_what_cannot_be_fused_is_left_to_peft_and_named(
    tiny_llama: Path, adapter: dict, quantization: str, reason: str
) -> None:
    """Layers with dropout, DoRA or a 16-bit base stay as peft composes them; the log says so."""
    skeleton = build_skeleton(
        tiny_llama, ModelConfig(path=str(tiny_llama), quantization=quantization)
    )
    model = add_adapters(skeleton, AdapterConfig(rank=2, **adapter), "base")
    said = fuse_adapters(model)
    assert said is not None
    assert said.endswith(
        f"21 of 21 layers compute base and adapter one after the other: 21 for {reason}"
    )
    assert not any(isinstance(layer, FusedLinear) for layer in lora_layers(model))


def test_names_stay_those_of_peft(tiny_llama: Path) -> None:
    """Fusing changes no parameter's name, and all layers of a plain run are fused."""
    model = add_adapters(
        build_skeleton(tiny_llama, ModelConfig(path=str(tiny_llama))), AdapterConfig(rank=2), "base"
    )
    names = list(model.state_dict())
    assert fuse_adapters(model) is None
    assert list(model.state_dict()) == names
    assert [type(layer) for layer in lora_layers(model)] == [FusedLinear] * 21
