"""The part of a parameter that this rank holds; a whole (unsharded) parameter is part one of one.

Two engines cut parameters up: FSDP2 by rows, as DTensors, and ZeRO-3 by elements of the flattened
tensor, as plain parameters that are empty between uses and keep this rank's part in the attribute
`ds_tensor`. Either part is a contiguous run of elements in row-major order, and is described as a
pair (first element, one past the last).
"""

# Tested by tests/distributed/test_sharding.py and tests/unit/memory/test_footprint.py.

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


def local_range(param: Tensor) -> tuple[int, int]:
    """Return the range of elements that this rank holds; both ends are equal when it holds none."""
    if is_partitioned(param):
        first = min(param.ds_numel, param.ds_zero_partition_rank * param.ds_tensor.numel())
        return first, min(param.ds_numel, first + param.ds_tensor.numel())
    if not isinstance(param, DTensor):
        return 0, param.numel()
    mesh, placements = param.device_mesh, param.placements
    shape, offset = compute_local_shape_and_global_offset(param.shape, mesh, placements)
    if shape[0] == 0:  # the last ranks hold nothing where there are fewer rows than ranks
        return 0, 0
    row = param.shape[1:].numel()
    return offset[0] * row, (offset[0] + shape[0]) * row


def local_part(param: Tensor) -> Tensor:
    """Return this rank's elements, in the parameter's own memory; flat (ZeRO-3) or in rows."""
    if is_partitioned(param):
        first, end = local_range(param)
        return param.ds_tensor[: end - first]  # the last ranks' parts are padded
    return param.to_local() if isinstance(param, DTensor) else param


def keep_local(param: Tensor, whole: Tensor) -> None:
    """Copy this rank's part of the whole tensor into a parameter."""
    start, stop = local_range(param)
    local_part(param).view(-1).copy_(whole.view(-1)[start:stop])


def shard_group(param: Tensor) -> dist.ProcessGroup | None:
    """Return the ranks that together hold the parameter once; None if this rank holds all of it."""
    if is_partitioned(param):
        return dist.group.WORLD
    if not isinstance(param, DTensor):
        return None
    # With HSDP the mesh has two dimensions: copies (Replicate) and shards.
    dims = [dim for dim, placement in enumerate(param.placements) if isinstance(placement, Shard)]
    return param.device_mesh.get_group(dims[0]) if dims else None


def shard_world(param: Tensor) -> int:
    """Return the number of parts that the parameter is cut into."""
    group = shard_group(param)
    return 1 if group is None else dist.get_world_size(group)


def planned_range(param: Tensor, rank: int) -> tuple[int, int]:
    """Return the range of part `rank`, of ceil(n / parts) rows each; under ZeRO-3, of elements."""
    shape, num_shards = whole_shape(param), shard_world(param)
    if is_partitioned(param):
        return planned_rows(shape.numel(), num_shards, rank)
    start, stop = planned_rows(shape[0], num_shards, rank)
    return start * shape[1:].numel(), stop * shape[1:].numel()


def planned_rows(num_rows: int, num_shards: int, rank: int) -> tuple[int, int]:
    """Return the range of rows of part `rank` when rows are cut into shards as `torch.chunk` does.

    All parts have ceil(num_rows / num_shards) rows, but the last ones are shorter or empty.
    """
    size = -(-num_rows // num_shards)
    return min(num_rows, size * rank), min(num_rows, size * (rank + 1))


def whole_tensor(param: nn.Parameter) -> Tensor:
    """Return the whole parameter on every rank; a collective when it is sharded."""
    if is_partitioned(param):
        # An offloaded part is on the host, where a group of GPUs may be unable to gather.
        part = param.ds_tensor.to(param.device)
        flat = part.new_empty(part.numel() * dist.get_world_size())
        dist.all_gather_into_tensor(flat, part)
        return flat[: param.ds_numel].view(param.ds_shape)
    if isinstance(param, DTensor):  # shards may be offloaded as well
        return param.detach().to(param.device_mesh.device_type).full_tensor()
    return param.detach()


def whole_shape(param: Tensor) -> torch.Size:
    """Return the shape of the whole parameter; under ZeRO-3 its `shape` is (0,) between uses."""
    return param.ds_shape if is_partitioned(param) else param.shape


def local_bytes(module: nn.Module) -> int:
    """Return the bytes of this rank's parts of all parameters."""
    return sum(local_part(p).numel() * p.element_size() for p in module.parameters())


def whole_bytes(module: nn.Module) -> int:
    """Return the bytes of all parameters of the whole model."""
    return sum(whole_shape(p).numel() * p.element_size() for p in module.parameters())


def is_partitioned(param: Tensor) -> bool:
    """True for a parameter that ZeRO-3 has cut up."""
    return getattr(param, "ds_tensor", None) is not None
