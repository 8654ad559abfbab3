"""Which part of a parameter this rank holds. A whole (unsharded) parameter is one part of one."""

from __future__ import annotations

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


def local_rows(param: torch.Tensor) -> tuple[int, int]:
    """First and one-past-last index along dimension 0 that this rank holds; equal when it holds nothing."""
    if not isinstance(param, DTensor):
        return 0, param.shape[0]
    shape, offset = compute_local_shape_and_global_offset(param.shape, param.device_mesh, param.placements)
    if shape[0] == 0:
        return 0, 0
    return offset[0], offset[0] + shape[0]


def local_part(param: torch.Tensor) -> torch.Tensor:
    """This rank's rows, sharing memory with the parameter."""
    return param.to_local() if isinstance(param, DTensor) else param


def shard_group(param: torch.Tensor) -> dist.ProcessGroup | None:
    """The ranks that together hold the whole parameter once; None when this rank holds all of it."""
    if not isinstance(param, DTensor):
        return None
    dims = [dim for dim, placement in enumerate(param.placements) if isinstance(placement, Shard)]
    return param.device_mesh.get_group(dims[0]) if dims else None


def shard_world(param: torch.Tensor) -> int:
    """Number of parts that the parameter is cut into."""
    group = shard_group(param)
    return 1 if group is None else dist.get_world_size(group)


def shard_rank(param: torch.Tensor) -> int:
    """Which of those parts this rank holds."""
    group = shard_group(param)
    return 0 if group is None else dist.get_rank(group)


def planned_rows(num_rows: int, num_shards: int, rank: int) -> tuple[int, int]:
    """First and one-past-last row of part `rank` when `num_rows` are cut into `num_shards` as `torch.chunk` does:
    all parts of ceil(num_rows / num_shards) rows, the last ones shorter or empty."""
    size = -(-num_rows // num_shards)
    return min(num_rows, size * rank), min(num_rows, size * (rank + 1))


def whole_tensor(param: nn.Parameter) -> torch.Tensor:
    """The whole parameter on every rank (a collective when it is sharded)."""
    return param.full_tensor() if isinstance(param, DTensor) else param.detach()


def local_bytes(module: nn.Module) -> int:
    """Bytes of all parameters as this rank holds them."""
    return sum(local_part(p).numel() * p.element_size() for p in module.parameters())


def whole_bytes(module: nn.Module) -> int:
    """Bytes of all parameters of the whole model."""
    return sum(p.numel() * p.element_size() for p in module.parameters())
