"""Memory for gathering the 8-bit optimizer state of a 65B model, counted.

The meta device stands for a GPU: its tensors have sizes and no contents, and each of its storages
is followed until it is freed. Nothing large is written to on the host either.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qlora_dist.optim import moments as moments_module
from qlora_dist.optim.moments import BufferSlice, Moments

HIDDEN, INTERMEDIATE, LAYERS, RANK = 8192, 22016, 80, 64
"""Llama-65B, with adapters of rank 64 on all its linear layers."""
LINEARS = [(HIDDEN, HIDDEN)] * 4 + [(HIDDEN, INTERMEDIATE)] * 2 + [(INTERMEDIATE, HIDDEN)]
SHAPES = {
    f"{layer}.{number}.{part}": shape
    for layer in range(LAYERS)
    for number, (inputs, outputs) in enumerate(LINEARS)
    for part, shape in (("A", (RANK, inputs)), ("B", (outputs, RANK)))
}
NUMEL = sum(first * second for first, second in SHAPES.values())
META = torch.device("meta")
GIB = 2**30
aten = torch.ops.aten


class Device(TorchDispatchMode):
    """Counter of the bytes alive on the meta device, on which copies do nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.held = self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is aten.copy_.default and args[0].device != args[1].device:
            return args[0]
        if func is aten._to_copy.default and args[0].device != torch.device(
            kwargs.get("device") or args[0].device
        ):
            func, args, kwargs = aten.empty_like.default, args, {**kwargs, "pin_memory": None}
            kwargs = {name: value for name, value in kwargs.items() if name in ("device", "dtype")}
        if func is aten.zeros.default and kwargs["device"].type == "cpu":
            func = aten.empty.memory_format
        result = func(*args, **kwargs)
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.device == META:
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.held += storage.nbytes()
            self.peak = max(self.peak, self.held)
            weakref.finalize(storage, self._let_go, key)

    def _let_go(self, key: int) -> None:
        self.held -= self._sizes.pop(key)


def state_of(num_shards: int, rank: int) -> tuple[dict[str, Any], list[BufferSlice]]:
    """Return a rank's 8-bit state in one buffer, and its pieces: equal shares of the rows."""
    pieces, offset = [], 0
    for name, (rows, columns) in SHAPES.items():
        numel = rows * columns // num_shards
        pieces.append(BufferSlice(name, rank * numel, numel, 0, offset))
        offset += numel
    state: dict[str, Any] = {"step": 1}
    for number in (1, 2):
        state[f"state{number}"] = torch.empty(offset, dtype=torch.uint8, device=META)
        state[f"absmax{number}"] = torch.empty(-(-offset // 256), device=META)
        state[f"qmap{number}"] = torch.empty(256, device=META)
    return state, pieces


@contextmanager
def group_of(size: int, rank: int) -> Iterator[dist.ProcessGroup | None]:
    """Yield a group that this process is a rank of; collectives return at once."""
    if size == 1:
        yield None
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        with mock.patch.object(
            dist, "reduce", _let_be
        ):  # a Mock would remember, and keep, the tensors
            yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


def _let_be(tensor: torch.Tensor, dst: int, group: dist.ProcessGroup) -> None:
    assert tensor.device in (META, torch.device("cpu"))


@pytest.mark.parametrize(("num_ranks", "rank"), [(1, 0), (8, 0), (8, 5)])
def test_gathering_takes_little_beside_what_is_held(
    num_ranks: int, rank: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Gathering 800 million adapter elements takes less than 64 MiB on a GPU, or on each of eight.

    Rank 0's host comes to hold 2.1 bytes an element, and the hosts of all other ranks nothing.
    """
    moments_module._code_books()  # made once, from numbers
    with Device() as device, group_of(num_ranks, rank) as group:
        state, pieces = state_of(num_ranks, rank)
        held = device.held
        assert held == pytest.approx(NUMEL / num_ranks * (2 + 2 * 4 / 256), rel=1e-3)
        optimizer = SimpleNamespace(state={0: state})
        moments = Moments(optimizer, [0], pieces, group, META)
        alike = [
            [moments_module._Count(piece.numel // 256 + 1, 1, 1)] * num_ranks for piece in pieces
        ]
        with mock.patch.object(Moments, "_counts", return_value=alike):
            whole = moments.gather(
                {name: first * second for name, (first, second) in SHAPES.items()}
            )
        extra, host = device.peak - held, sum(tensor.nbytes for tensor in whole.values())
    with capsys.disabled():
        print(  # noqa: T201
            f"\n65B, r = {RANK}: {NUMEL:,} adapter elements, rank {rank} of {num_ranks}: "
            f"{held / GIB:.2f} GiB held, {extra / GIB:.4f} GiB more on the device, "
            f"{host / GIB:.2f} GiB on the host"
        )
    assert NUMEL == 799_539_200
    assert extra < GIB / 16
    assert host <= (2.1 * NUMEL if rank == 0 else 0)
