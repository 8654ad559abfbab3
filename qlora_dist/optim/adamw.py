"""AdamW over flat buffers: parameter groups, and the optimizers to choose from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from operator import is_not

import torch
from torch import Tensor, nn

from qlora_dist.config.schema import OptimConfig
from qlora_dist.optim.moments import BufferSlice, Moments
from qlora_dist.optim.optimizers import build_optimizer, parameter_groups
from qlora_dist.runtime.shards import local_part, local_range, shard_group


class FlatAdamW:
    """AdamW with one contiguous float32 buffer of this rank's parts for each parameter group.

    Optimizers of bitsandbytes refuse sharded tensors, keep state of small tensors in 32 bits, and
    page only tensors of 100,000 elements or more, which single shards of adapters seldom are. A
    flat buffer also makes the norm, the update and (for unsharded parameters) the reduction over
    ranks one operation each.

    Unsharded parameters become views of the buffer and their gradients views of its gradient, so
    nothing is copied. Sharded parameters keep the memory that the sharding engine gathers from, and
    are copied in and out at each step.
    """

    def __init__(self, params: Mapping[str, nn.Parameter], config: OptimConfig) -> None:
        groups = parameter_groups(params, config)
        self._groups = [_FlatGroup(members, multiplier) for multiplier, members in groups.items()]
        self._optimizer = build_optimizer([[group.flat] for group in self._groups], config)

    def moments(self, device: torch.device) -> Moments:
        """Return the optimizer's state, for checkpoints.

        Args:
            device: the device on which the parameters' process group gathers.
        """
        groups = self._groups
        pieces = [piece for i, group in enumerate(groups) for piece in group.pieces(i)]
        shards = shard_group(next(iter(groups[0].params.values())))
        buffers = [group.flat for group in groups]
        return Moments(self._optimizer, buffers, pieces, shards, device)

    @property
    def gradients(self) -> list[Tensor]:
        """This rank's flat float32 gradient of each group."""
        return [group.flat_grad for group in self._groups]

    def collect_gradients(self) -> None:
        """Move the gradients of sharded parameters into the flat buffers."""
        for group in self._groups:
            group.collect_gradients()

    def clear_gradients(self) -> None:
        """Set the flat gradients to zero."""
        for group in self._groups:
            group.flat_grad.zero_()

    def step(self, lr: float) -> None:
        """Update the parameters from the flat gradients."""
        for group, settings in zip(self._groups, self._optimizer.param_groups, strict=True):
            settings["lr"] = lr * group.lr_multiplier
        self._optimizer.step()
        for group in self._groups:
            group.publish()


class _FlatGroup:
    """Parameters that share a learning rate, laid end to end."""

    @torch.no_grad()
    def __init__(self, params: dict[str, nn.Parameter], lr_multiplier: float) -> None:
        self.lr_multiplier = lr_multiplier
        self.params = params
        locals_ = [local_part(param) for param in params.values()]
        self.flat = nn.Parameter(torch.cat([local.reshape(-1) for local in locals_]))
        self.flat_grad = torch.zeros_like(self.flat)
        self.flat.grad = self.flat_grad
        sizes = [local.numel() for local in locals_]
        self._values, self._grads = (
            [part.view_as(local) for part, local in zip(flat.split(sizes), locals_, strict=True)]
            for flat in (self.flat.data, self.flat_grad)
        )
        # An unsharded parameter is its own local part.
        self._sharded = any(map(is_not, locals_, params.values()))
        if not self._sharded:
            for param, value, grad in zip(params.values(), self._values, self._grads, strict=True):
                param.data = value
                param.grad = grad  # backward accumulates into it in place

    def pieces(self, buffer: int) -> Iterator[BufferSlice]:
        """Yield the run of each parameter's elements that lies in this group's buffer."""
        offset = 0
        for name, param in self.params.items():
            first, stop = local_range(param)
            yield BufferSlice(name, first, stop - first, buffer, offset)
            offset += stop - first

    @torch.no_grad()
    def collect_gradients(self) -> None:
        """Move the gradients of sharded parameters into the flat one."""
        if not self._sharded:
            return
        for param, grad in zip(self.params.values(), self._grads, strict=True):
            if param.grad is not None:
                grad.copy_(local_part(param.grad))
                param.grad = None

    @torch.no_grad()
    def publish(self) -> None:
        """Copy the flat values into sharded parameters."""
        if self._sharded:
            torch._foreach_copy_([local_part(p) for p in self.params.values()], self._values)
