"""What layers keep for backward, in host memory meanwhile: copied out behind the layer, and back before it is needed.

The idea is `torch.autograd.graph.save_on_cpu`, and torchtune's version of it with a stream of its own. Here parameters
and what belongs to no layer (rotations, masks) stay where they are, tensors that share memory are copied once and share
it afterwards, and backward of one layer fetches what the layer before it will need.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from qlora_dist.config.schema import MemoryConfig
from qlora_dist.errors import ConfigError
from qlora_dist.memory.selective import Recall, keep_here, storage_address

_LAYERS_IN_FLIGHT = 2
"""Layers whose copies may still run while the next one computes."""
_MIN_BYTES = 2**20
"""Smaller tensors stay: copying them takes longer to start than to do."""


def check_offload(memory: MemoryConfig, device: torch.device) -> None:
    """Refuse what makes no sense on this device.

    Raises:
        ConfigError: activations are in host memory already.
    """
    if memory.offload_activations and device.type == "cpu":
        raise ConfigError(
            "memory.offload_activations is true, but this run computes on the CPU, whose activations are in host "
            "memory already. Set it to false; memory.recompute: full is what takes the least memory."
        )


class CopyStream:
    """A stream on which copies run beside the computation. An event says when a copy is done.

    What is being copied is held here until the computation has been told to wait for the copy: then its memory can be
    given away at once, in the computation's own order. (`record_stream` would be simpler, but memory that is freed
    under it comes back only when the GPU gets there, and the host, which runs ahead, takes fresh memory instead.)
    """

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None
        self._leaving: deque[list[tuple[torch.Tensor, Any]]] = deque([[]])

    def to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        """A pinned copy, complete when whoever fetches it on this lane gets to it."""
        host = torch.empty_like(tensor, device="cpu", pin_memory=True)
        with self._behind_the_computation(tensor) as stream:
            host.copy_(tensor, non_blocking=True)
            self._leaving[-1].append((tensor, stream.record_event()))
        return host

    def end_layer(self) -> None:
        """A layer's forward is over: let go of what the layers before the last few have left."""
        self._leaving.append([])
        self._let_go(_LAYERS_IN_FLIGHT)

    def to_device(self, host: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, Any]:
        """A copy on the device, and the event after which it is complete; whoever lets go of it waits for that."""
        self._let_go(0)  # backward has begun
        tensor = torch.empty_like(host, device=device)
        with self._behind_the_computation(tensor) as stream:
            tensor.copy_(host, non_blocking=True)
            return tensor, stream.record_event()

    def wait(self, event: Any) -> None:
        """Let the computation wait for an event."""
        torch.cuda.current_stream().wait_event(event)

    @contextmanager
    def _behind_the_computation(self, tensor: torch.Tensor) -> Iterator[torch.cuda.Stream]:
        stream = self._stream = self._stream or torch.cuda.Stream(tensor.device)
        stream.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(stream):
            yield stream

    def _let_go(self, num_layers: int) -> None:
        while len(self._leaving) > num_layers:
            for _, event in self._leaving.popleft():
                self.wait(event)
        if not self._leaving:
            self._leaving.append([])


class Offload:
    """What all layers of a model have put into host memory."""

    def __init__(self, lane: Any = None, min_bytes: int = _MIN_BYTES) -> None:
        self.lane = CopyStream() if lane is None else lane
        self.min_bytes = min_bytes
        self._parameters: dict[nn.Module, list[nn.Parameter]] = {}
        self._last: weakref.ref[LayerStore] | None = None

    @contextmanager
    def layer(self, layer: nn.Module, outside: Iterable[torch.Tensor]) -> Iterator[LayerStore]:
        """A context for one forward of a layer, in which what autograd saves goes to host memory.

        Args:
            outside: tensors that come from outside of the layer and stay where they are.
        """
        if layer not in self._parameters:
            self._parameters[layer] = list(layer.parameters())
        store = LayerStore(
            self, self._parameters[layer], outside, None if self._last is None else self._last()
        )
        self._last = weakref.ref(store)
        with torch.autograd.graph.saved_tensors_hooks(store.pack, _unpack):
            yield store
        store.close()


class LayerStore:
    """What one forward of one layer has put into host memory."""

    def __init__(
        self,
        offload: Offload,
        parameters: list[nn.Parameter],
        outside: Iterable[torch.Tensor],
        before: Any,
    ) -> None:
        self._offload, self._parameters = offload, parameters
        self._outside = {storage_address(tensor) for tensor in outside}
        self._before: weakref.ref[LayerStore] | None = (
            None if before is None else weakref.ref(before)
        )
        self._copies: dict[tuple[int, torch.dtype], _Copy] = {}
        self._all: list[weakref.ref[_Copy]] = []

    def pack(self, tensor: torch.Tensor) -> Any:
        """A hook of autograd: what to save in a tensor's place."""
        return tensor if isinstance(tensor, nn.Parameter) else self.keep(tensor.detach())

    def keep(self, tensor: torch.Tensor) -> Recall:
        """Keep a tensor, in host memory if it is large and is the layer's own."""
        address = storage_address(tensor)
        is_own = address not in self._outside and all(
            address != storage_address(p) for p in self._parameters
        )
        if not is_own or tensor.untyped_storage().nbytes() < self._offload.min_bytes:
            return keep_here(tensor)
        key = address, tensor.dtype
        if key not in self._copies:
            self._copies[key] = _Copy(self, tensor, self._offload.lane)
            self._all.append(weakref.ref(self._copies[key]))
        copy, shape, stride, offset = (
            self._copies[key],
            tensor.shape,
            tensor.stride(),
            tensor.storage_offset(),
        )
        return lambda: copy.recall().as_strided(shape, stride, offset)

    def close(self) -> None:
        """Forward is over; nothing more is kept."""
        self._copies = {}
        self._offload.lane.end_layer()

    def fetch(self) -> None:
        """Begin to bring everything back."""
        for reference in self._all:
            copy = reference()
            if copy is not None:
                copy.fetch()

    def fetch_before(self) -> None:
        """Begin to bring back what the layer before needs, whose backward comes next."""
        before = None if self._before is None else self._before()
        if before is not None:
            before.fetch()


class _Copy:
    """A storage in host memory; it lives as long as something of the graph refers to it."""

    def __init__(self, store: LayerStore, tensor: torch.Tensor, lane: Any) -> None:
        self._there: tuple[torch.Tensor, Any] | None = None
        self._store, self._lane, self._device = store, lane, tensor.device
        self._address = StorageWeakRef(
            tensor.untyped_storage()
        )  # as long as this lives, no other storage gets the same
        num_elements = tensor.untyped_storage().nbytes() // tensor.element_size()
        self._host = lane.to_host(tensor.as_strided((num_elements,), (1,), 0))

    def fetch(self) -> None:
        """Begin to bring it back, unless that was done."""
        if self._there is None:
            self._there = self._lane.to_device(self._host, self._device)

    def recall(self) -> torch.Tensor:
        """All of the storage, (elements,), on the device."""
        self._store.fetch()
        self.fetch()
        assert self._there is not None
        tensor, event = self._there
        self._lane.wait(event)
        self._store.fetch_before()
        return tensor

    def __del__(self) -> None:
        if self._there is not None:  # fetched, and maybe never asked for
            self._lane.wait(self._there[1])


def _unpack(packed: Any) -> torch.Tensor:
    return packed() if callable(packed) and not isinstance(packed, torch.Tensor) else packed
