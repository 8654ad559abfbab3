"""Between keeping everything and recomputing everything: what is quick to compute is made again from what is kept.

While a layer's forward runs, every quick operation in it (elementwise, norms, softmax, copies, joins) is noted with the
tensors that it reads. Where autograd saves a result of such operations, what they began with is kept instead, if that
is less, and in backward they run again just when the result is needed. Products with weights and attention run once. So
do random numbers: a dropout mask is no result of a quick operation, and is kept.

PyTorch's own selective checkpointing (`torch.utils.checkpoint.create_selective_checkpoint_contexts`) runs all of the
layer's Python again in backward and hands out stored results in the order of the calls, which goes wrong where the
layer then changes such a result in place, as a fused 4-bit layer does (`addmm_`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

Recall = Callable[[], torch.Tensor]
"""Gives a tensor back in backward."""
Keep = Callable[[torch.Tensor], Recall]
"""Keeps a tensor until then."""


def keep_here(tensor: torch.Tensor) -> Recall:
    """Keep a tensor where it is.

    The function returned raises RuntimeError when somebody has written to the tensor since.
    """
    version = tensor._version

    def recall() -> torch.Tensor:
        if tensor._version != version:
            raise RuntimeError(
                f"a tensor of shape {tuple(tensor.shape)} that backward needs was changed in place after the decoder "
                "layer that made it. Set memory.recompute: full or none."
            )
        return tensor

    return recall


class SelectiveForward(TorchDispatchMode):
    """A context in which one layer's forward runs once.

    Args:
        outside: tensors that come from outside of the layer and live on anyway, such as rotations and masks.
        keep: how to keep a tensor.
        is_survey: keep all that autograd saves, and only count.
    """

    def __init__(
        self, outside: Iterable[torch.Tensor], keep: Keep = keep_here, is_survey: bool = False
    ) -> None:
        super().__init__()
        self._outside = {storage_address(tensor) for tensor in outside}
        self._keep, self._is_survey = keep, is_survey
        self._made: dict[
            int, _Result
        ] = {}  # by address of the storage; each holds it, so that it is not used again
        self._leaves: dict[int, list[_Leaf]] = {}
        self._saved: list[_Saved] = []
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
        del self._hooks  # which refer back to this object
        if error is None:
            self._settle()
        self._made, self._leaves, self._saved = {}, {}, []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for place in _written(func):
            self._forget(kwargs.get(place[1]) if place[0] >= len(args) else args[place[0]])
        result = func(*args, **kwargs)
        if _is_quick(func):
            self._note(func, args, kwargs, result)
        return result

    def _note(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Remember how the results of an operation were made, if all that it read can be found again."""
        read = [self._readable(value) for value in args]
        if _UNKNOWN in read or any(isinstance(value, torch.Tensor) for value in kwargs.values()):
            return
        operation = _Operation(func, read, kwargs)
        for place, tensor in enumerate((result,) if isinstance(result, torch.Tensor) else result):
            if type(tensor) is torch.Tensor:
                storage = tensor.untyped_storage()
                self._made[storage._cdata] = _Result(operation, place, storage, tensor.dtype)

    def _readable(self, value: Any) -> Any:
        """An argument in a form that can be read again in backward."""
        if isinstance(value, torch.Tensor):
            return self._source(value)
        if isinstance(value, (list, tuple)) and any(
            isinstance(item, torch.Tensor) for item in value
        ):
            items = [self._source(item) for item in value]
            return _UNKNOWN if _UNKNOWN in items else items
        return value

    def _source(self, tensor: torch.Tensor) -> Any:
        key = storage_address(tensor)
        made = self._made.get(key)
        if made is not None:
            return _View(made, tensor) if made.dtype == tensor.dtype else _UNKNOWN
        if type(tensor) is nn.Parameter and tensor.ndim == 1:
            # Its engine may have taken it away by then: a copy of a norm's weight or a bias takes next to nothing.
            tensor = tensor.clone()
            key = storage_address(tensor)
        if type(tensor) is not torch.Tensor:
            return _UNKNOWN
        leaf = _Leaf(tensor.detach())
        self._leaves.setdefault(key, []).append(leaf)
        return leaf

    def _forget(self, tensor: Any) -> None:
        """A tensor will be written to: from then on it is not what was noted, and who read it before needs a copy."""
        for one in tensor if isinstance(tensor, (list, tuple)) else (tensor,):
            if isinstance(one, torch.Tensor):
                self._made.pop(storage_address(one), None)
                for leaf in self._leaves.pop(storage_address(one), ()):
                    leaf.tensor = leaf.tensor.clone()
                    self._leaves.setdefault(storage_address(leaf.tensor), []).append(leaf)

    def _pack(self, tensor: torch.Tensor) -> Any:
        if type(tensor) is not torch.Tensor or tensor.numel() == 0:
            return tensor  # parameters among them: their engine brings them back
        made = self._made.get(storage_address(tensor))
        is_made = made is not None and made.dtype == tensor.dtype
        self._saved.append(
            _Saved(tensor.detach(), _View(made, tensor) if made is not None and is_made else None)
        )
        return self._saved[-1]

    def _settle(self) -> None:
        """Forward is over: decide of each saved tensor whether it is kept."""
        direct = {storage_address(saved.tensor) for saved in self._saved if saved.view is None}
        leaves = {
            saved: {storage_address(leaf.tensor): leaf for leaf in saved.leaves()}
            for saved in self._saved
        }
        results = {
            saved.view.result: keys for saved, keys in leaves.items() if saved.view is not None
        }
        needed = Counter(key for keys in results.values() for key in keys)
        free = direct | self._outside

        def is_worth_it(saved: _Saved) -> bool:
            own = [
                leaf for key, leaf in leaves[saved].items() if key not in free and needed[key] == 1
            ]
            return saved.view is not None and saved.view.result.nbytes > sum(map(_leaf_bytes, own))

        again = {saved for saved in self._saved if is_worth_it(saved)}
        kept = {
            storage_address(saved.tensor): saved.tensor
            for saved in self._saved
            if saved not in again
        }
        sources = {key: leaf.tensor for saved in again for key, leaf in leaves[saved].items()}
        everything = {storage_address(saved.tensor): saved.tensor for saved in self._saved}
        self.kept = self._own_bytes(everything), self._own_bytes({**kept, **sources})
        for saved in self._saved:
            if saved in again and not self._is_survey:
                saved.make_again(self._keep)
            else:
                saved.keep(self._keep)

    def _own_bytes(self, tensors: dict[int, torch.Tensor]) -> int:
        return sum(
            t.untyped_storage().nbytes() for key, t in tensors.items() if key not in self._outside
        )


class _Operation:
    """A quick operation, and where its arguments come from."""

    def __init__(self, func: Any, args: list[Any], kwargs: dict[str, Any]) -> None:
        self._func, self._args, self._kwargs = func, args, kwargs
        self._results: tuple[torch.Tensor, ...] | None = None
        self._num_uses = 0

    def sources(self) -> Iterator[_Leaf | _View]:
        for value in self._args:
            for source in value if isinstance(value, list) else (value,):
                if isinstance(source, (_Leaf, _View)):
                    yield source

    def plan_use(self, keep: Keep) -> None:
        """Somebody will need the results once more."""
        self._num_uses += 1
        if self._num_uses > 1:
            return
        for source in self.sources():
            if isinstance(source, _View):
                source.result.operation.plan_use(keep)
            else:
                source.keep(keep)

    def run(self) -> tuple[torch.Tensor, ...]:
        """The results; they are remembered until the last of those that need them has come."""
        results = self._results
        if results is None:
            result = self._func(*map(_read_again, self._args), **self._kwargs)
            results = (result,) if isinstance(result, torch.Tensor) else tuple(result)
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
        self._address = StorageWeakRef(
            storage
        )  # as long as this lives, no other storage gets the same one

    def recall(self) -> torch.Tensor:
        return self.operation.run()[self._place]


class _View:
    """A tensor that lies in such a storage."""

    def __init__(self, result: _Result, tensor: torch.Tensor) -> None:
        self.result = result
        self._where = (tensor.shape, tensor.stride(), tensor.storage_offset())

    def recall(self) -> torch.Tensor:
        made = self.result.recall()
        is_all = self._where == (made.shape, made.stride(), made.storage_offset())
        return made if is_all else made.as_strided(*self._where)


class _Leaf:
    """A tensor that is no result of a quick operation, and is read by one."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self._recall: Recall | None = None

    def keep(self, keep: Keep) -> None:
        if self._recall is None:
            self._recall = keep(self.tensor)
            del self.tensor

    def recall(self) -> torch.Tensor:
        assert self._recall is not None
        return self._recall()


class _Saved:
    """A tensor that autograd saved."""

    def __init__(self, tensor: torch.Tensor, view: _View | None) -> None:
        self.tensor, self.view = tensor, view
        self._recall: Recall | None = None

    def leaves(self) -> Iterator[_Leaf]:
        """What would have to be kept to make it again."""
        pending = [] if self.view is None else [self.view.result.operation]
        seen = set(pending)
        while pending:
            for source in pending.pop().sources():
                if isinstance(source, _Leaf):
                    yield source
                elif source.result.operation not in seen:
                    seen.add(source.result.operation)
                    pending.append(source.result.operation)

    def keep(self, keep: Keep) -> None:
        self._recall = keep(self.tensor)
        self.view = None
        del self.tensor

    def make_again(self, keep: Keep) -> None:
        assert self.view is not None
        self.view.result.operation.plan_use(keep)
        self._recall = self.view.recall
        self._device = self.tensor.device.type
        del self.tensor

    def recall(self) -> torch.Tensor:
        assert self._recall is not None
        if self.view is None:
            return self._recall()
        with torch.no_grad(), torch.autocast(self._device, enabled=False):
            return self._recall()


def _unpack(packed: Any) -> torch.Tensor:
    return packed.recall() if isinstance(packed, _Saved) else packed


def storage_address(tensor: torch.Tensor) -> int:
    """The same for all views of one memory, and for nothing else while that lives."""
    return tensor.untyped_storage()._cdata


def _leaf_bytes(leaf: _Leaf) -> int:
    return leaf.tensor.untyped_storage().nbytes()


_UNKNOWN = object()
"""In place of a tensor that cannot be found again."""


def _read_again(argument: Any) -> Any:
    if isinstance(argument, list):
        return [_read_again(item) for item in argument]
    return argument.recall() if isinstance(argument, (_Leaf, _View)) else argument


_aten = torch.ops.aten
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
"""Quick operations that are not elementwise."""


@cache
def _is_quick(func: Any) -> bool:
    if func._schema.is_mutable or func.is_view or torch.Tag.nondeterministic_seeded in func.tags:
        return False
    return func.namespace == "aten" and (torch.Tag.pointwise in func.tags or func in _QUICK)


@cache
def _written(func: Any) -> tuple[tuple[int, str], ...]:
    """Position and name of the arguments that an operation writes to."""
    arguments = enumerate(func._schema.arguments)
    return tuple(
        (i, a.name) for i, a in arguments if a.alias_info is not None and a.alias_info.is_write
    )
