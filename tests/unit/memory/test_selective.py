"""Selective recomputation: the bytes it keeps, the operations it repeats, and equal results."""

import dataclasses
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import nn

import qlora_dist.model.compile as compile_module
from benchmarks.memory import StorageCounter
from qlora_dist.config.schema import AdapterConfig
from qlora_dist.data.batch import collate
from qlora_dist.data.samples import Sample
from qlora_dist.memory.activations import LayerBytes, Widths, layer_bytes
from qlora_dist.memory.policy import Recompute
from qlora_dist.memory.recompute import KeptBytesProbe, LayerForward, recompute_of, set_recompute
from qlora_dist.memory.selective import SelectiveForward
from qlora_dist.model.adapters import adapter_parameters
from qlora_dist.model.compile import CompiledForward
from qlora_dist.model.nf4 import QuantizedLinear
from qlora_dist.model.parts import ModelParts
from qlora_dist.runtime.processes import Runtime, start_runtime
from qlora_dist.train import micro_step
from tests.support.adapted import build_adapted

CHOICES = [
    Recompute(2),
    Recompute(2, 2),
    Recompute(2, 0, 2),
    Recompute(2, 1, 1),
    Recompute(2, 1, 0),
]


@pytest.fixture(scope="module")
def runtime() -> Runtime:
    return start_runtime(seed=0, dtype="float32")


def loss_and_gradient(
    model, runtime: Runtime, length: int = 40
) -> tuple[torch.Tensor, torch.Tensor]:
    """Train one micro-batch of two rows: loss, 0-dim, and all gradients in one vector."""
    model.zero_grad()
    rows = [
        torch.randint(3, 300, (length,), generator=torch.Generator().manual_seed(n)).tolist()
        for n in range(2)
    ]
    batch = collate([Sample(ids, ids) for ids in rows], pad_token_id=0).to(runtime.device)
    loss = micro_step(model, batch, torch.tensor(float(2 * length), device=runtime.device), runtime)
    loss.backward()
    return loss.detach(), torch.cat(
        [param.grad.flatten() for param in adapter_parameters(model).values()]
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_every_family_has_the_same_bits_under_every_policy(
    families: dict[str, Path], runtime: Runtime, dtype: str, dropout: float
) -> None:
    """Loss and gradients have the same bits under every policy, dropout included.

    Policies change from step to step without building the model again.
    """
    runtime = dataclasses.replace(runtime, compute_dtype=getattr(torch, dtype))
    for name, folder in families.items():
        model = build_adapted(folder, runtime, dropout=dropout)
        expected = loss_and_gradient(model, runtime)
        assert expected[1].norm() > 0
        for choice in CHOICES:
            set_recompute(ModelParts(model).layers, choice)
            assert recompute_of(ModelParts(model).layers) == choice
            found = loss_and_gradient(model, runtime)
            assert all(map(torch.equal, found, expected)), (name, choice)


def test_eager_attention_has_the_same_bits(families: dict[str, Path], runtime: Runtime) -> None:
    """Attention made of single operations: its quick ones are recomputed, its products run once."""
    model = build_adapted(families["qwen3"], runtime, attention="eager")
    expected = loss_and_gradient(model, runtime)
    set_recompute(ModelParts(model).layers, Recompute(2, 2))
    assert all(map(torch.equal, loss_and_gradient(model, runtime), expected))


def test_products_run_once(tiny_llama: Path, runtime: Runtime) -> None:
    """Selectively, no 4-bit product is computed again; fully, all are."""
    model = build_adapted(tiny_llama, runtime)
    loss_and_gradient(model, runtime)  # the first one asks the model for more
    run = QuantizedLinear.product
    with mock.patch.object(QuantizedLinear, "product", autospec=True, side_effect=run) as product:
        counts = []
        for choice in (Recompute(3), Recompute(3, 3), Recompute(3, 0, 3)):
            set_recompute(ModelParts(model).layers, choice)
            product.reset_mock()
            loss_and_gradient(model, runtime)
            counts.append(product.call_count)
    assert counts[0] == counts[1] == 3 * 7
    assert counts[2] == 2 * counts[0]


def test_what_is_kept_is_what_was_counted(tiny_llama: Path, runtime: Runtime) -> None:
    """Counted bytes are, to the byte, those of storages that are alive after forward.

    Selectively they are 0.7 of all in bfloat16 (0.5 where norms and MLP are not one function each).
    """
    runtime = dataclasses.replace(runtime, compute_dtype=torch.bfloat16)
    model = build_adapted(tiny_llama, runtime)
    ids = torch.arange(3, 259).reshape(2, 128)
    with KeptBytesProbe(ModelParts(model).layers) as probe, runtime.autocast():
        model(input_ids=ids, use_cache=False)

    outputs = []

    def alive(*choice: int) -> int:
        set_recompute(ModelParts(model).layers, Recompute(3, *choice))
        with runtime.autocast(), StorageCounter() as counter:
            outputs.append(model(input_ids=ids, use_cache=False))
            now = counter.now
        outputs.clear()
        return now

    layer = probe.result
    # Not the first layer: its input needs no gradient, and its norm keeps nothing.
    assert alive(1) - alive(3) == 2 * (layer.none - layer.selective)
    assert alive(0, 1) - alive(0, 3) == 2 * (layer.none - layer.full)
    assert layer.full == ids.numel() * 64 * 2
    assert 0.65 < layer.selective / layer.none < 0.75


@pytest.mark.parametrize(
    "kind", [{}, {"dropout": 0.1}, {"use_dora": True}, {"dropout": 0.1, "use_dora": True}], ids=str
)
def test_the_formula_is_on_the_safe_side(
    families: dict[str, Path], runtime: Runtime, kind: dict
) -> None:
    """The formula's bytes of a layer cover the counted ones, dropout and DoRA included.

    They are at most twice as many.
    """
    runtime = dataclasses.replace(runtime, compute_dtype=torch.bfloat16)
    model = build_adapted(families["qwen2"], runtime, **kind)
    ids = torch.arange(3, 259).reshape(2, 128)
    with runtime.autocast():
        model(input_ids=ids, use_cache=False)  # the first one asks the model for more
        with KeptBytesProbe(ModelParts(model).layers) as probe:
            model(input_ids=ids, use_cache=False)
    expected = layer_bytes(
        Widths.of(ModelParts(model)), ids.numel(), 2, AdapterConfig(rank=4, **kind)
    )
    for found, formula in zip(vars(probe.result).values(), vars(expected).values(), strict=True):
        assert 0.5 <= found / formula <= 1.05, (probe.result, expected)


def test_forward_without_gradients_keeps_nothing(tiny_llama: Path, runtime: Runtime) -> None:
    """In evaluation policies do nothing."""
    model = build_adapted(tiny_llama, runtime).eval()
    set_recompute(ModelParts(model).layers, Recompute(3, 3))
    with (
        mock.patch.object(SelectiveForward, "__enter__", side_effect=AssertionError),
        torch.no_grad(),
    ):
        model(input_ids=torch.arange(9).unsqueeze(0))


def gradient_of(function, *inputs: torch.Tensor, selectively: bool) -> list[torch.Tensor]:
    inputs = tuple(tensor.detach().clone().requires_grad_() for tensor in inputs)
    if selectively:
        with SelectiveForward(()) as forward:
            result = function(*inputs)
        assert forward.kept[1] < forward.kept[0], (
            "otherwise nothing is recomputed, and nothing tested"
        )
    else:
        result = function(*inputs)
    result.sum().backward()
    return [tensor.grad for tensor in inputs]


def written_after_it_was_read(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    hidden = x @ w
    product = (2 * hidden).sin() @ w + (hidden * 3).sin().exp() @ w
    hidden += 1  # what the recomputation begins with
    return product


def result_written_to(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    hidden = x @ w
    shifted = hidden * 3
    shifted.add_(hidden)  # no longer what the multiplication gave
    return (shifted.sin() @ w) + (hidden.cos().exp() @ w)


def views(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    gate, up = (x @ w).chunk(2, dim=-1)
    inner = (nn.functional.silu(gate) * up).view(2, -1, 4).transpose(0, 1)
    return torch.cat([inner, inner.exp()], dim=-1).reshape(-1, 8) @ w


def made_and_dropped(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    for _ in range(8):  # addresses of freed tensors are used again by others
        x = (x @ w).tanh().mul(2).sin()
    return x


@pytest.mark.parametrize(
    "function", [written_after_it_was_read, result_written_to, views, made_and_dropped]
)
def test_memory_that_is_written_to_shared_or_used_again(function) -> None:
    """Recomputed values are those of the first computation."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(8, 8, generator=generator), torch.randn(8, 8, generator=generator)
    expected = gradient_of(function, *inputs, selectively=False)
    assert all(map(torch.equal, gradient_of(function, *inputs, selectively=True), expected))


def test_compiled_layers_stay_compiled() -> None:
    """They run as they are where others recompute selectively, and are not counted."""
    from torch._dynamo.testing import CompileCounter

    layer, counter = nn.Linear(8, 8), CompileCounter()
    with mock.patch.dict(compile_module._COMPILER, {"backend": counter, "options": None}):
        layer.forward = CompiledForward(layer)
    forward = LayerForward(layer, "selective", None)
    forward.probed = LayerBytes(0, 0, 0)
    forward(torch.ones(2, 8)).sum().backward()
    assert counter.frame_count == 1
    assert forward.probed == LayerBytes(0, 0, 0)


def test_a_change_behind_the_layer_is_noticed() -> None:
    """Like autograd, which would refuse it, had it saved the tensor itself."""
    x = torch.ones(8, 8, requires_grad=True)
    hidden = x @ torch.eye(8)
    with SelectiveForward(()):
        result = hidden.sin().exp() + hidden.mul(2).cos()
    with torch.no_grad():
        hidden += 1
    with pytest.raises(RuntimeError, match=r"in place|inplace"):
        result.sum().backward()
