"""Recomputation in the decoder layers, by policies that may change between steps."""

# Tested by tests/distributed/test_recompute.py and tests/unit/memory/test_selective.py.

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qlora_dist.config.schema import MemoryConfig
from qlora_dist.errors import ConfigError
from qlora_dist.memory.activations import LayerBytes
from qlora_dist.memory.offload import Offload
from qlora_dist.memory.policy import Policy, Recompute, fixed_recompute
from qlora_dist.memory.selective import SelectiveForward, keep_here
from qlora_dist.model.compile import CompiledForward


def apply_recompute(layers: list[nn.Module], memory: MemoryConfig) -> None:
    """Give every layer its policy from `memory.recompute`. Must run before sharding.

    Raises:
        ConfigError: `memory.recompute` is larger than the number of layers.
    """
    if isinstance(memory.recompute, int) and memory.recompute > len(layers):
        raise ConfigError(
            f"memory.recompute is {memory.recompute}, but the model has {len(layers)} decoder "
            "layers. Set it to that many at most, or to full."
        )
    offload = Offload() if memory.offload_activations else None
    choice = fixed_recompute(memory.recompute, len(layers))
    for number, layer in enumerate(layers):
        layer.forward = LayerForward(layer, choice.policy(number), offload)


def set_recompute(layers: Iterable[nn.Module], choice: Recompute) -> None:
    """Change the policies of a model's layers; a forward that has run keeps its old policy."""
    for number, forward in enumerate(_forwards(layers)):
        forward.policy = choice.policy(number)


def recompute_of(layers: Iterable[nn.Module]) -> Recompute:
    """Return the policies that the layers have now."""
    policies = [forward.policy for forward in _forwards(layers)]
    return Recompute(len(policies), policies.count("selective"), policies.count("full"))


class KeptBytesProbe:
    """A context that counts the bytes that each policy would keep in the last layer.

    The last layer keeps everything meanwhile. This costs no memory where all layers recompute:
    backward begins with the last layer, and would make all of its tensors again at once.
    """

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        self._forward = list(_forwards(layers))[-1]

    def __enter__(self) -> KeptBytesProbe:
        self._forward.probed = LayerBytes(0, 0, 0)
        return self

    def __exit__(self, *exception: object) -> None:
        found = self._forward.probed
        self.result = found if found is not None and found.none > 0 else None
        """Bytes of the largest micro-batch; None when nothing could be counted."""
        self._forward.probed = None


def is_compiled(layers: Iterable[nn.Module]) -> bool:
    """True if the layers run compiled code, whose compiler decides by itself what to recompute."""
    return all(forward.is_compiled for forward in _forwards(layers))


class LayerForward:
    """A decoder layer's `forward` with recomputation by policy.

    It replaces `forward` and not `__call__`: sharding hooks stay outside and run once, and no
    wrapper module changes the parameter names that adapters are saved under.
    """

    def __init__(self, layer: nn.Module, policy: Policy, offload: Offload | None) -> None:
        self._layer, self._plain, self._offload = layer, layer.forward, offload
        self.policy = policy
        # torch.compile silently runs uncompiled while operations are watched: no selective policy.
        self.is_compiled = isinstance(layer.forward, CompiledForward)
        self.probed: LayerBytes | None = None
        """Largest bytes found so far during a survey; None outside of one."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not (self._layer.training and torch.is_grad_enabled()):
            return self._plain(*args, **kwargs)  # nothing is kept without a backward
        if self._offload is None:
            return self._run(keep_here, args, kwargs)
        with self._offload.layer(self._layer, _tensors((args[1:], kwargs))) as store:
            return self._run(store.keep, args, kwargs)

    def _run(self, keep: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        only_counts = self.probed is not None and not self.is_compiled
        if not only_counts:
            if self.policy == "full":
                # Non-reentrant: needs no input gradient, and hides nothing from autograd or the
                # compiler.
                return checkpoint(self._plain, *args, use_reentrant=False, **kwargs)
            if self.policy == "none" or self.is_compiled:
                return self._plain(*args, **kwargs)
        # All arguments but the hidden state live on outside of the layer anyway: masks, rotations.
        with SelectiveForward(_tensors((args[1:], kwargs)), keep, only_counts) as forward:
            result = self._plain(*args, **kwargs)
        if only_counts:
            inputs = sum(tensor.untyped_storage().nbytes() for tensor in _tensors(args[:1]))
            found = LayerBytes(*forward.kept, inputs)
            self.probed = max(self.probed, found, key=lambda each: each.none)
        return result


def _forwards(layers: Iterable[nn.Module]) -> Iterable[LayerForward]:
    return (layer.forward for layer in layers)


def _tensors(value: Any) -> list[Tensor]:
    """Collect the tensors in a layer's arguments, nested ones included."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (tuple, list)):
        return []
    return [tensor for item in value for tensor in _tensors(item)]
