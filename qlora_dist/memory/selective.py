"""Selective recomputation: quick operations of a layer run again in backward, products run once.

While a layer's forward runs, every quick operation in it (elementwise, norms, softmax, copies,
concatenations) is recorded with the tensors that it reads. Where autograd saves a result of such
operations, their inputs are kept instead, if they are smaller, and the operations run again in
backward when the result is needed. Products with weights and attention run once. So do random
numbers: a dropout mask is no result of a quick operation, and is kept.

PyTorch's own selective checkpointing (`create_selective_checkpoint_contexts`) runs the layer's
Python again in backward and returns stored results in the order of the calls. A layer that then
changes such a result in place, as a fused 4-bit layer does (`addmm_`), computes something else.
As one opaque operator the fused layer has the right bits, but 12 % more is kept (three layers of a
small Llama), and its store cannot be offloaded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

Getter = Callable[[], Tensor]
"""Returns a kept tensor in backward."""
Keeper = Callable[[Tensor], Getter]
"""Keeps a tensor from forward to backward."""


def keep_here(tensor: Tensor) -> Getter:
    """Keep a tensor where it is.

    The getter raises RuntimeError when the tensor has been written to since.
    """
    version = tensor._version

    def get() -> Tensor:
        if tensor._version != version:
            raise RuntimeError(
                f"a tensor of shape {tuple(tensor.shape)} that backward needs was changed in place "
                "after the decoder layer that made it. Set memory.recompute: full or none."
            )
        return tensor

    return get


class SelectiveForward(TorchDispatchMode):
    """A context in which one layer's forward runs once.

    Args:
        outside: tensors that outlive the layer anyway, such as rotations and masks.
        keep: how to keep a tensor.
        only_counts: keep all that autograd saves, and only count.
    """

    def __init__(
        self, outside: Iterable[Tensor], keep: Keeper = keep_here, only_counts: bool = False
    ) -> None:
        super().__init__()
        self._outside = {storage_address(tensor) for tensor in outside}
        self._keep, self._only_counts = keep, only_counts
        # By address of the storage. Each result holds its storage, so that no address comes twice.
        self._made: dict[int, _Result] = {}
        self._inputs: dict[int, list[_Input]] = {}
        self._saved: list[_SavedTensor] = []
        self.kept: tuple[int, int] = (0, 0)
        """Afterwards: bytes that are kept without recomputing, and with it."""

    def __enter__(self) -> SelectiveForward:
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack)
        self._hooks.__enter__()
        super().__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        super().__exit__(kind, error, trace)
        self._hooks.__exit__(kind, error, trace)
        del self._hooks  # they refer to this object: a circle would keep every tensor
        if error is None:
            self._decide()
        self._made, self._inputs, self._saved = {}, {}, []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for place, name in _written(func):
            self._forget(kwargs.get(name) if place >= len(args) else args[place])
        result = func(*args, **kwargs)
        if _is_quick(func):
            self._record(func, args, kwargs, result)
        return result

    def _record(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Record how an operation made its results, if all its inputs can be found again."""
        read = [self._readable(value) for value in args]
        if _UNKNOWN in read or any(isinstance(value, Tensor) for value in kwargs.values()):
            return
        operation = _Operation(func, read, kwargs)
        for place, tensor in enumerate((result,) if isinstance(result, Tensor) else result):
            if type(tensor) is Tensor:
                storage = tensor.untyped_storage()
                self._made[storage._cdata] = _Result(operation, place, storage, tensor.dtype)

    def _readable(self, value: Any) -> Any:
        """Return an argument in a form that can be read again in backward."""
        if isinstance(value, Tensor):
            return self._source(value)
        if isinstance(value, (list, tuple)) and any(isinstance(item, Tensor) for item in value):
            items = [self._source(item) for item in value]
            return _UNKNOWN if _UNKNOWN in items else items
        return value

    def _source(self, tensor: Tensor) -> Any:
        key = storage_address(tensor)
        made = self._made.get(key)
        if made is not None:
            # A view in another type (`view(dtype)`) has other strides: it cannot be found again.
            return _ResultView(made, tensor) if made.dtype == tensor.dtype else _UNKNOWN
        if type(tensor) is nn.Parameter and tensor.ndim == 1:
            # A sharding engine may have freed it by then. Norm weights and biases are small: copy.
            tensor = tensor.clone()
            key = storage_address(tensor)
        if type(tensor) is not Tensor:
            return _UNKNOWN
        self._inputs.setdefault(key, []).append(found := _Input(tensor.detach()))
        return found

    def _forget(self, tensor: Any) -> None:
        """Prepare for a write to a tensor: drop its record, give operations that read it a copy."""
        for one in tensor if isinstance(tensor, (list, tuple)) else (tensor,):
            if isinstance(one, Tensor):
                self._made.pop(storage_address(one), None)
                for reader in self._inputs.pop(storage_address(one), ()):
                    reader.tensor = reader.tensor.clone()
                    self._inputs.setdefault(storage_address(reader.tensor), []).append(reader)

    def _pack(self, tensor: Tensor) -> Any:
        if type(tensor) is not Tensor or tensor.numel() == 0:
            return tensor  # parameters among them: their engine brings them back
        made = self._made.get(storage_address(tensor))
        view = _ResultView(made, tensor) if made and made.dtype == tensor.dtype else None
        self._saved.append(_SavedTensor(tensor.detach(), view))
        return self._saved[-1]

    def _decide(self) -> None:
        """Decide for each saved tensor whether it is kept or recomputed; called after forward."""
        direct = {storage_address(saved.tensor) for saved in self._saved if saved.view is None}
        inputs = {
            saved: {storage_address(one.tensor): one for one in saved.inputs()}
            for saved in self._saved
        }
        # Several saved tensors may be views of one result: its inputs are counted once.
        results = {saved.view.result: keys for saved, keys in inputs.items() if saved.view}
        num_readers = Counter(key for keys in results.values() for key in keys)
        free = direct | self._outside  # kept anyway

        def is_worth_it(saved: _SavedTensor) -> bool:
            own = [
                one
                for key, one in inputs[saved].items()
                if key not in free and num_readers[key] == 1
            ]
            return saved.view is not None and saved.view.result.nbytes > sum(
                one.tensor.untyped_storage().nbytes() for one in own
            )

        recomputed = {saved for saved in self._saved if is_worth_it(saved)}
        every = {storage_address(saved.tensor): saved.tensor for saved in self._saved}
        kept = {
            storage_address(saved.tensor): saved.tensor
            for saved in self._saved
            if saved not in recomputed
        }
        for saved in recomputed:
            kept |= {key: one.tensor for key, one in inputs[saved].items()}
        self.kept = self._own_bytes(every), self._own_bytes(kept)
        for saved in self._saved:
            if saved in recomputed and not self._only_counts:
                saved.recompute(self._keep)
            else:
                saved.keep(self._keep)

    def _own_bytes(self, tensors: dict[int, Tensor]) -> int:
        return sum(
            tensor.untyped_storage().nbytes()
            for key, tensor in tensors.items()
            if key not in self._outside
        )


class _Operation:
    """A quick operation, and where its arguments come from."""

    def __init__(self, func: Any, args: list[Any], kwargs: dict[str, Any]) -> None:
        self._func, self._args, self._kwargs = func, args, kwargs
        self._results: tuple[Tensor, ...] | None = None
        self._num_uses = 0

    def sources(self) -> Iterator[_Input | _ResultView]:
        for value in self._args:
            for source in value if isinstance(value, list) else (value,):
                if isinstance(source, (_Input, _ResultView)):
                    yield source

    def plan_use(self, keep: Keeper) -> None:
        """Count one more use of the results in backward; keep the inputs at the first."""
        self._num_uses += 1
        if self._num_uses > 1:
            return
        for source in self.sources():
            if isinstance(source, _ResultView):
                source.result.operation.plan_use(keep)
            else:
                source.keep(keep)

    def run(self) -> tuple[Tensor, ...]:
        """Return the results, which stay until their last use."""
        results = self._results
        if results is None:
            result = self._func(*map(_read_again, self._args), **self._kwargs)
            results = (result,) if isinstance(result, Tensor) else tuple(result)
        self._num_uses -= 1
        self._results = results if self._num_uses > 0 else None
        return results


class _Result:
    """A storage that an operation filled."""

    def __init__(
        self, operation: _Operation, place: int, storage: torch.UntypedStorage, dtype: torch.dtype
    ) -> None:
        self.operation, self._place, self.dtype = operation, place, dtype
        self.nbytes = storage.nbytes()
        self._address = StorageWeakRef(storage)  # while it lives, no other storage gets the address

    def get(self) -> Tensor:
        return self.operation.run()[self._place]


class _ResultView:
    """A tensor that lies in the storage of a result."""

    def __init__(self, result: _Result, tensor: Tensor) -> None:
        self.result = result
        self._where = (tensor.shape, tensor.stride(), tensor.storage_offset())

    def get(self) -> Tensor:
        made = self.result.get()
        is_all = self._where == (made.shape, made.stride(), made.storage_offset())
        return made if is_all else made.as_strided(*self._where)


class _Input:
    """A tensor that a quick operation reads, and that is no result of another."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self._get: Getter | None = None

    def keep(self, keep: Keeper) -> None:
        if self._get is None:
            self._get = keep(self.tensor)
            del self.tensor

    def get(self) -> Tensor:
        assert self._get is not None
        return self._get()


class _SavedTensor:
    """A tensor that autograd saved."""

    def __init__(self, tensor: Tensor, view: _ResultView | None) -> None:
        self.tensor, self.view = tensor, view
        self._get: Getter | None = None

    def inputs(self) -> Iterator[_Input]:
        """Yield the tensors that would have to be kept to recompute this one."""
        pending = [] if self.view is None else [self.view.result.operation]
        seen = set(pending)
        while pending:
            for source in pending.pop().sources():
                if isinstance(source, _Input):
                    yield source
                elif source.result.operation not in seen:
                    seen.add(source.result.operation)
                    pending.append(source.result.operation)

    def keep(self, keep: Keeper) -> None:
        self._get = keep(self.tensor)
        self.view = None
        del self.tensor

    def recompute(self, keep: Keeper) -> None:
        assert self.view is not None
        self.view.result.operation.plan_use(keep)
        self._get = self.view.get
        self._device = self.tensor.device.type
        del self.tensor

    def get(self) -> Tensor:
        assert self._get is not None
        if self.view is None:
            return self._get()
        # The recorded operations have their casts among them: autocast would add others.
        with torch.no_grad(), torch.autocast(self._device, enabled=False):
            return self._get()


def _unpack(packed: Any) -> Tensor:
    return packed.get() if isinstance(packed, _SavedTensor) else packed


def storage_address(tensor: Tensor) -> int:
    """Return a number that all views of one storage share, and no other storage while it lives."""
    return tensor.untyped_storage()._cdata


_UNKNOWN = object()  # in place of a tensor that cannot be found again


def _read_again(argument: Any) -> Any:
    if isinstance(argument, list):
        return [_read_again(item) for item in argument]
    return argument.get() if isinstance(argument, (_Input, _ResultView)) else argument


_aten = torch.ops.aten
# Quick operations that PyTorch does not tag as pointwise.
_QUICK = {
    _aten._to_copy.default,
    _aten.cat.default,
    _aten.stack.default,
    _aten.mean.dim,
    _aten.sum.dim_IntList,
    _aten.linalg_vector_norm.default,
    _aten._softmax.default,
    _aten.native_layer_norm.default,
    _aten._fused_rms_norm.default,
}


@cache
def _is_quick(func: Any) -> bool:
    if func._schema.is_mutable or func.is_view or torch.Tag.nondeterministic_seeded in func.tags:
        return False
    return func.namespace == "aten" and (torch.Tag.pointwise in func.tags or func in _QUICK)


@cache
def _written(func: Any) -> tuple[tuple[int, str], ...]:
    """Position and name of the arguments that an operation writes to."""
    arguments = enumerate(func._schema.arguments)
    return tuple((i, a.name) for i, a in arguments if a.alias_info and a.alias_info.is_write)
