"""Activations in host memory: copied out behind a layer's forward, and back before its backward.

The idea is that of `torch.autograd.graph.save_on_cpu`, and of torchtune's version with a stream of
its own. Here parameters and tensors of no single layer (rotations, masks) stay where they are,
tensors that share memory are copied once and share it afterwards, and the backward of a layer
fetches the tensors of the layer before it. `save_on_cpu` would copy 1.3 times the bytes (a small
Llama) and wait for every copy.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from qlora_dist.config.schema import MemoryConfig
from qlora_dist.errors import ConfigError
from qlora_dist.memory.selective import Getter, keep_here, storage_address

_LAYERS_IN_FLIGHT = 2  # whose copies may still run while the next layer computes
_MIN_BYTES = 2**20  # smaller tensors stay: their copy takes longer to start than to run


def check_offload(memory: MemoryConfig, device: torch.device) -> None:
    """Refuse offloading on a CPU.

    Raises:
        ConfigError: activations are in host memory already.
    """
    if memory.offload_activations and device.type == "cpu":
        raise ConfigError(
            "memory.offload_activations is true, but this run computes on the CPU, whose "
            "activations are in host memory already. Set it to false; memory.recompute: full is "
            "what takes the least memory."
        )


class CopyStream:
    """A CUDA stream on which copies run beside the computation; an event marks the end of each.

    A tensor that is being copied is held here until the computation has been told to wait for the
    copy. Its memory can then be reused at once, in the computation's own order. (`record_stream`
    would be simpler, but memory freed under it comes back only when the GPU gets there, and the
    host, which runs ahead, allocates fresh memory instead.)
    """

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None
        self._leaving: deque[list[tuple[Tensor, Any]]] = deque([[]])  # one list a layer

    def to_host(self, tensor: Tensor) -> Tensor:
        """Start a copy into pinned memory; complete once this stream reaches it."""
        host = torch.empty_like(tensor, device="cpu", pin_memory=True)
        with self._behind_the_computation(tensor) as stream:
            host.copy_(tensor, non_blocking=True)
            self._leaving[-1].append((tensor, stream.record_event()))
        return host

    def end_layer(self) -> None:
        """Close a layer's forward: drop the tensors of all layers before the last few."""
        self._leaving.append([])
        self._drop(_LAYERS_IN_FLIGHT)

    def to_device(self, host: Tensor, device: torch.device) -> tuple[Tensor, Any]:
        """Start a copy to the device; returns it with the event to await before use or release."""
        self._drop(0)  # backward has begun
        tensor = torch.empty_like(host, device=device)
        with self._behind_the_computation(tensor) as stream:
            tensor.copy_(host, non_blocking=True)
            return tensor, stream.record_event()

    def wait(self, event: Any) -> None:
        """Let the computation wait for an event."""
        torch.cuda.current_stream().wait_event(event)

    @contextmanager
    def _behind_the_computation(self, tensor: Tensor) -> Iterator[torch.cuda.Stream]:
        stream = self._stream = self._stream or torch.cuda.Stream(tensor.device)
        stream.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(stream):
            yield stream

    def _drop(self, num_layers: int) -> None:
        while len(self._leaving) > num_layers:
            for _, event in self._leaving.popleft():
                self.wait(event)
        if not self._leaving:
            self._leaving.append([])


class Offload:
    """Offloaded tensors of all layers of a model."""

    def __init__(self, stream: Any = None, min_bytes: int = _MIN_BYTES) -> None:
        self.stream = CopyStream() if stream is None else stream
        self.min_bytes = min_bytes
        self._parameters: dict[nn.Module, list[nn.Parameter]] = {}
        self._last: weakref.ref[LayerStore] | None = None

    @contextmanager
    def layer(self, layer: nn.Module, outside: Iterable[Tensor]) -> Iterator[LayerStore]:
        """A context for one forward of a layer, in which autograd's saved tensors are offloaded.

        Args:
            outside: tensors of no single layer, which stay where they are.
        """
        if layer not in self._parameters:
            self._parameters[layer] = list(layer.parameters())
        store = LayerStore(self, self._parameters[layer], outside, self._last)
        self._last = weakref.ref(store)
        with torch.autograd.graph.saved_tensors_hooks(store.pack, _unpack):
            yield store
        store.close()


class LayerStore:
    """Offloaded tensors of one forward of one layer."""

    def __init__(
        self,
        offload: Offload,
        parameters: list[nn.Parameter],
        outside: Iterable[Tensor],
        before: weakref.ref[LayerStore] | None,
    ) -> None:
        self._offload, self._parameters = offload, parameters
        self._outside = {storage_address(tensor) for tensor in outside}
        self._before = before
        self._copies: dict[tuple[int, torch.dtype], _Copy] = {}
        self._all: list[weakref.ref[_Copy]] = []

    def pack(self, tensor: Tensor) -> Any:
        """Return what autograd saves in a tensor's place."""
        return tensor if isinstance(tensor, nn.Parameter) else self.keep(tensor.detach())

    def keep(self, tensor: Tensor) -> Getter:
        """Keep a tensor, in host memory if it is large and belongs to this layer alone."""
        address = storage_address(tensor)
        is_parameter = any(address == storage_address(param) for param in self._parameters)
        is_small = tensor.untyped_storage().nbytes() < self._offload.min_bytes
        if address in self._outside or is_parameter or is_small:
            return keep_here(tensor)
        key = address, tensor.dtype
        if key not in self._copies:
            self._copies[key] = _Copy(self, tensor, self._offload.stream)
            self._all.append(weakref.ref(self._copies[key]))
        copy = self._copies[key]
        shape, stride, offset = tensor.shape, tensor.stride(), tensor.storage_offset()
        return lambda: copy.get().as_strided(shape, stride, offset)

    def close(self) -> None:
        """End the forward; nothing more is kept."""
        self._copies = {}
        self._offload.stream.end_layer()

    def fetch(self) -> None:
        """Start to bring every copy back that backward still needs."""
        for reference in self._all:
            if (copy := reference()) is not None:
                copy.fetch()

    def fetch_before(self) -> None:
        """Start to bring back the copies of the layer before, whose backward comes next."""
        if self._before is not None and (before := self._before()) is not None:
            before.fetch()


class _Copy:
    """A storage in host memory; it lives as long as autograd's graph refers to it."""

    def __init__(self, store: LayerStore, tensor: Tensor, stream: Any) -> None:
        self._there: tuple[Tensor, Any] | None = None
        self._store, self._stream, self._device = store, stream, tensor.device
        storage = tensor.untyped_storage()
        self._address = StorageWeakRef(storage)  # while it lives, no other storage gets the address
        num_elements = storage.nbytes() // tensor.element_size()
        self._host = stream.to_host(tensor.as_strided((num_elements,), (1,), 0))

    def fetch(self) -> None:
        """Start to bring it back, once."""
        if self._there is None:
            self._there = self._stream.to_device(self._host, self._device)

    def get(self) -> Tensor:
        """Return the whole storage on the device. (num_elements,)"""
        self._store.fetch()
        self.fetch()
        assert self._there is not None
        tensor, event = self._there
        self._stream.wait(event)
        self._store.fetch_before()
        return tensor

    def __del__(self) -> None:
        if self._there is not None:  # fetched, and maybe never used
            self._stream.wait(self._there[1])


def _unpack(packed: Any) -> Tensor:
    return packed() if callable(packed) and not isinstance(packed, Tensor) else packed
