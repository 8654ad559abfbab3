"""Which part of a parameter this rank holds. A whole (unsharded) parameter is one part of one.

Two engines cut parameters up: FSDP2 by rows, as DTensors, and ZeRO-3 by elements of the flattened tensor, as plain
parameters that are empty between uses and keep this rank's part in an attribute. Either part is a contiguous run of
elements in row-major order, and that is how it is described here.
"""

from __future__ import annotations

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


def local_range(param: torch.Tensor) -> tuple[int, int]:
    """First and one-past-last element (row-major) that this rank holds; equal when it holds nothing."""
    if is_partitioned(param):
        first = min(param.ds_numel, param.ds_zero_partition_rank * param.ds_tensor.numel())
        return first, min(param.ds_numel, first + param.ds_tensor.numel())
    if not isinstance(param, DTensor):
        return 0, param.numel()
    shape, offset = compute_local_shape_and_global_offset(
        param.shape, param.device_mesh, param.placements
    )
    if shape[0] == 0:
        return 0, 0
    row = param.shape[1:].numel()
    return offset[0] * row, (offset[0] + shape[0]) * row


def local_part(param: torch.Tensor) -> torch.Tensor:
    """This rank's elements, sharing memory with the parameter; flat or in rows, as the engine keeps them."""
    if is_partitioned(param):
        first, end = local_range(param)
        return param.ds_tensor[: end - first]  # the last ranks' parts are padded
    return param.to_local() if isinstance(param, DTensor) else param


def keep_local(param: torch.Tensor, whole: torch.Tensor) -> None:
    """Set a parameter from the whole tensor, of which this rank copies its part."""
    start, stop = local_range(param)
    local_part(param).view(-1).copy_(whole.view(-1)[start:stop])


def shard_group(param: torch.Tensor) -> dist.ProcessGroup | None:
    """The ranks that together hold the whole parameter once; None when this rank holds all of it."""
    if is_partitioned(param):
        return dist.group.WORLD
    if not isinstance(param, DTensor):
        return None
    dims = [dim for dim, placement in enumerate(param.placements) if isinstance(placement, Shard)]
    return param.device_mesh.get_group(dims[0]) if dims else None


def shard_world(param: torch.Tensor) -> int:
    """Number of parts that the parameter is cut into."""
    group = shard_group(param)
    return 1 if group is None else dist.get_world_size(group)


def planned_range(param: torch.Tensor, rank: int) -> tuple[int, int]:
    """First and one-past-last element of part `rank`: parts of ceil(n / parts) rows, or elements under ZeRO-3."""
    shape, num_shards = whole_shape(param), shard_world(param)
    if is_partitioned(param):
        return planned_rows(shape.numel(), num_shards, rank)
    start, stop = planned_rows(shape[0], num_shards, rank)
    return start * shape[1:].numel(), stop * shape[1:].numel()


def planned_rows(num_rows: int, num_shards: int, rank: int) -> tuple[int, int]:
    """First and one-past-last row of part `rank` when `num_rows` are cut into `num_shards` as `torch.chunk` does:
    all parts of ceil(num_rows / num_shards) rows, the last ones shorter or empty."""
    size = -(-num_rows // num_shards)
    return min(num_rows, size * rank), min(num_rows, size * (rank + 1))


def whole_tensor(param: nn.Parameter) -> torch.Tensor:
    """The whole parameter on every rank (a collective when it is sharded)."""
    if is_partitioned(param):
        part = param.ds_tensor.to(
            param.device
        )  # an offloaded part is on the host, where not every group can gather
        flat = part.new_empty(part.numel() * dist.get_world_size())
        dist.all_gather_into_tensor(flat, part)
        return flat[: param.ds_numel].view(param.ds_shape)
    if isinstance(param, DTensor):  # shards may be offloaded as well
        return param.detach().to(param.device_mesh.device_type).full_tensor()
    return param.detach()


def whole_shape(param: torch.Tensor) -> torch.Size:
    """Shape of the whole parameter; that of a partitioned one reads (0,) between uses."""
    return param.ds_shape if is_partitioned(param) else param.shape


def local_bytes(module: nn.Module) -> int:
    """Bytes of all parameters as this rank holds them."""
    return sum(local_part(p).numel() * p.element_size() for p in module.parameters())


def whole_bytes(module: nn.Module) -> int:
    """Bytes of all parameters of the whole model."""
    return sum(whole_shape(p).numel() * p.element_size() for p in module.parameters())


def is_partitioned(param: torch.Tensor) -> bool:
    return getattr(param, "ds_tensor", None) is not None
