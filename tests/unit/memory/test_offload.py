"""Offloading of activations, with a stream that copies on the CPU and remembers its calls."""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from qlora_dist.config.schema import MemoryConfig
from qlora_dist.errors import ConfigError
from qlora_dist.memory.offload import Offload, check_offload
from qlora_dist.memory.policy import Recompute
from qlora_dist.memory.recompute import set_recompute
from qlora_dist.model.parts import ModelParts, decoder_layers
from qlora_dist.runtime.processes import Runtime, start_runtime
from tests.support.adapted import build_adapted
from tests.unit.memory.test_selective import loss_and_gradient


class Lane:
    """Host memory of its own, as far as anybody can see."""

    def __init__(self) -> None:
        self.sources: list[StorageWeakRef] = []
        self.sizes: list[int] = []
        self.addresses: set[int] = set()
        self.events: list[str] = []
        self._copies: list[torch.Tensor] = []

    def to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        self.sources.append(StorageWeakRef(tensor.untyped_storage()))
        self.sizes.append(tensor.numel())
        self.addresses.add(tensor.data_ptr())
        self._copies.append(tensor.clone())
        return self._copies[-1]

    def to_device(self, host: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, str]:
        number = next(i for i, copy in enumerate(self._copies) if copy is host)
        self.events.append(f"fetch {number}")
        return host.clone(), f"wait {number}"

    def end_layer(self) -> None:
        pass

    def wait(self, event: str) -> None:
        self.events.append(event)


def offloading(model: nn.Module, min_bytes: int = 1) -> Lane:
    """Let a model offload to a new lane."""
    lane = Lane()
    offload = Offload(lane, min_bytes)
    for layer in decoder_layers(model):
        layer.forward._offload = offload
    return lane


@pytest.fixture(scope="module")
def runtime() -> Runtime:
    return start_runtime(seed=0, dtype="float32")


@pytest.mark.parametrize(
    "choice", [Recompute(3), Recompute(3, 3), Recompute(3, 0, 3), Recompute(3, 1, 1)]
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_have_the_same_bits(
    tiny_llama: Path, runtime: Runtime, choice: Recompute, dtype: str
) -> None:
    """Under every policy; no parameter and no 4-bit weight is copied, and nothing twice."""
    runtime = dataclasses.replace(runtime, compute_dtype=getattr(torch, dtype))
    model = build_adapted(tiny_llama, runtime, dropout=0.1)
    expected = loss_and_gradient(model, runtime)
    set_recompute(ModelParts(model).layers, choice)
    lane = offloading(model)
    assert all(map(torch.equal, loss_and_gradient(model, runtime), expected))
    assert len(lane.sources) == len({source.cdata for source in lane.sources}) >= 3
    assert not lane.addresses & {param.untyped_storage().data_ptr() for param in model.parameters()}
    assert sum(event.startswith("fetch") for event in lane.events) <= len(lane.sources)


def test_inputs_of_recomputed_layers_come_back_one_layer_ahead(
    tiny_llama: Path, runtime: Runtime
) -> None:
    """Fully recomputed layers offload one input each.

    Backward of a layer first starts to fetch the input of the layer before it.
    """
    model = build_adapted(tiny_llama, runtime)
    loss_and_gradient(model, runtime)
    set_recompute(ModelParts(model).layers, Recompute(3, 0, 3))
    lane = offloading(model)
    loss_and_gradient(model, runtime)
    assert lane.sizes == [2 * 40 * 64] * 3
    assert list(dict.fromkeys(lane.events)) == [
        "fetch 2",
        "wait 2",
        "fetch 1",
        "wait 1",
        "fetch 0",
        "wait 0",
    ]
    assert lane.events.index("fetch 1") < lane.events.index("wait 1")


@pytest.mark.parametrize("choice", [Recompute(3), Recompute(3, 3), Recompute(3, 0, 3)])
def test_what_is_offloaded_is_let_go_of(
    tiny_llama: Path, runtime: Runtime, choice: Recompute
) -> None:
    """Between forward and backward no original is alive, under any policy."""
    model = build_adapted(tiny_llama, runtime)
    set_recompute(ModelParts(model).layers, choice)
    lane = offloading(model)
    loss = model(input_ids=torch.arange(3, 83).reshape(2, 40), use_cache=False).logits.sum()
    assert loss.requires_grad
    alive = [
        size for size, source in zip(lane.sizes, lane.sources, strict=True) if not source.expired()
    ]
    assert not alive
    assert len(lane.sources) >= 3


def test_small_tensors_stay(tiny_llama: Path, runtime: Runtime) -> None:
    """Copying them would take longer to start than to do."""
    model = build_adapted(tiny_llama, runtime)
    lane = offloading(model, min_bytes=2**20)
    loss_and_gradient(model, runtime)
    assert not lane.sources


def test_views_share_a_copy() -> None:
    """Tensors that lie in one storage are copied once, and lie in one storage again."""
    lane = Lane()
    layer = nn.Identity()
    x = torch.randn(6, 8, requires_grad=True)
    with Offload(lane, min_bytes=1).layer(layer, ()):
        whole = x * 1.5
        left, right = whole.chunk(2, dim=-1)
        loss = (left.sin() * right.t().contiguous().t().cos() * left.exp()).sum()
    del whole, left, right
    (expected,) = torch.autograd.grad(
        (x[:, :4] * 1.5).sin().mul((x[:, 4:] * 1.5).cos()).mul((x[:, :4] * 1.5).exp()).sum(), x
    )
    loss.backward()
    assert torch.allclose(x.grad, expected, rtol=1e-6)
    assert len(lane.sources) == len({source.cdata for source in lane.sources})


def test_it_is_refused_where_there_is_nothing_to_offload_to() -> None:
    """On the CPU activations are in host memory as it is; on a GPU it is allowed."""
    with pytest.raises(
        ConfigError, match=r"memory.offload_activations is true.*memory.recompute: full"
    ):
        check_offload(MemoryConfig(offload_activations=True), torch.device("cpu"))
    check_offload(MemoryConfig(offload_activations=True), torch.device("cuda"))
    check_offload(MemoryConfig(), torch.device("cpu"))


def test_memory_that_is_used_again_is_another_tensor() -> None:
    """Originals are freed while the layer still runs, and others get their addresses."""
    lane = Lane()
    x, w = torch.randn(2, 8, 8, generator=torch.Generator().manual_seed(0))
    x.requires_grad_()

    def run() -> torch.Tensor:
        hidden = x
        for _ in range(32):
            hidden = (hidden @ w).sin()
            lane.sources.clear()  # which reserve the addresses
        return hidden.sum()

    (expected,) = torch.autograd.grad(run(), x)
    with Offload(lane, min_bytes=1).layer(nn.Identity(), ()):
        loss = run()
    loss.backward()
    assert torch.equal(x.grad, expected)
