"""FSDP2 on the CPU: collectives in gloo's threads while layers compute.

On a GPU they overlap on streams of their own. The CPU has none, and FSDP2 waits there for every
collective where it starts it: at each layer all ranks stand still for the slowest. Here a layer is
gathered while the layer before it computes, and gradients are summed while backward goes on. The
results are those of FSDP2.
"""

# Tested by tests/distributed/test_overlap.py.

from __future__ import annotations

from collections import deque
from itertools import pairwise

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.fsdp import FSDPModule

from qlora_dist.model.parts import ModelParts

# Reductions that run at once; each holds the whole gradients of a layer's adapters.
_NUM_IN_FLIGHT = 2


class Reductions:
    """Running reduce-scatters, in place of FSDP2's own (`FSDPModule.set_custom_reduce_scatter`).

    FSDP2 takes the result for complete and makes it the gradient without reading it. So there must
    be no earlier gradient to add it to, and :meth:`wait` must come before a gradient is read.
    """

    def __init__(self) -> None:
        # The input is held with its reduction, which reads it until it is done.
        self._running: deque[tuple[dist.Work, Tensor]] = deque()

    def allocate(
        self, size: tuple[int, ...], *, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """Return memory for an input or output."""
        return torch.empty(size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: dist.ReduceOp,
        async_op: bool = False,
    ) -> None:
        """Start a reduce-scatter; wait for the oldest when too many are running."""
        work = dist.reduce_scatter_tensor(output_tensor, input_tensor, op, group, async_op=True)
        self._running.append((work, input_tensor))
        while len(self._running) > _NUM_IN_FLIGHT:
            self._running.popleft()[0].wait()

    def wait(self) -> None:
        """Wait until every reduce-scatter has its result."""
        while self._running:
            self._running.popleft()[0].wait()


def overlap_on_cpu(parts: ModelParts) -> Reductions | None:
    """Have a sharded model's collectives overlap, as far as this version of torch can.

    Returns:
        the reductions to wait for after each backward; None where gradients are complete by then.
    """
    units = [module for module in parts.model.modules() if isinstance(module, FSDPModule)]
    for unit in units:
        if hasattr(unit, "_set_unshard_async_op"):
            unit._set_unshard_async_op(True)
    for layer, following in pairwise(parts.layers):
        layer.set_modules_to_forward_prefetch([following])
    param = next(iter(parts.adapters.values()))
    if param.device_mesh.ndim > 1 or not hasattr(FSDPModule, "set_custom_reduce_scatter"):
        return None  # replicas add up the results of the reduce-scatter, which must be complete
    reductions = Reductions()
    for unit in units:
        unit.set_custom_reduce_scatter(reductions)
    return reductions
