"""Check after loading: each rank holds its share, and gathered layers have the loaded bytes.

Sharding a 4-bit model can fail silently: a parameter that the engine left out is replicated
(nothing is saved), and floating-point storage can come out of an all-gather with changed bits. Both
are checked once, before the first step, through the gather that training uses.
"""

# Tested by tests/distributed/test_sharding.py and tests/distributed/test_zero.py.

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch import distributed as dist

from qlora_dist.errors import ModelError
from qlora_dist.runtime.shards import (
    local_part,
    local_range,
    planned_range,
    shard_group,
    shard_world,
    whole_shape,
)

_CHUNK_WORDS = 2**20
# 2^64 / golden ratio as a signed odd number: Knuth's multiplicative hash.
_MULTIPLIER = -7046029254386353131


def check_shards(model: nn.Module, num_shards: int) -> None:
    """Check that this rank holds one of `num_shards` equal parts of each parameter.

    Raises:
        ModelError: naming the parameter that is not cut, or cut differently.
    """
    for name, param in model.named_parameters():
        held = local_part(param).numel()
        if shard_world(param) == num_shards:
            group = shard_group(param)
            start, stop = planned_range(param, 0 if group is None else dist.get_rank(group))
            if held == stop - start:
                continue
        raise ModelError(
            f"after sharding over {num_shards}, this rank holds {held:,} of "
            f"{whole_shape(param).numel():,} elements of {name}, which is not its share. The "
            "installed libraries shard it differently; use the versions in constraints.txt."
        )


def loaded_checksums(params: dict[str, nn.Parameter], device: torch.device) -> Tensor:
    """Checksum of each whole parameter, from its loaded parts: (num_params,) int64; a collective.

    Checksums of parts add up to that of the whole parameter, so no parameter is gathered.
    """
    sums, group = [], None
    for param in params.values():
        first_byte = local_range(param)[0] * param.element_size()
        sums.append(checksum(local_part(param), first_byte, _word_bytes(param)).to(device))
        group = shard_group(param) or group
    total = torch.stack(sums)
    if group is not None:
        dist.all_reduce(total, group=group)
    return total


def check_gathered(
    params: dict[str, nn.Parameter],
    expected: Tensor,
    gathered: Iterator[tuple[str, Tensor]],
    agree: Callable[[Tensor], Tensor],
) -> None:
    """Compare parameters, gathered as in training, with their loaded bytes.

    Args:
        expected: result of :func:`loaded_checksums` for `params`.
        gathered: yields (name, whole tensor) in any order, each valid until the next is asked for.
        agree: makes the largest of each element known to all ranks, so that all of them stop with
            the same message.

    Raises:
        ModelError: naming the first parameter whose bytes changed, on every rank.
    """
    index = {name: i for i, name in enumerate(params)}
    differs = torch.zeros_like(expected)
    for name, whole in gathered:
        found = checksum(whole, 0, _word_bytes(params[name])).to(expected.device)
        differs[index[name]] = (found != expected[index[name]]).to(torch.int64)
    # Replicas that loaded different bytes would each agree with themselves: compare them with one
    # another as well. (2 * num_params,)
    bad = agree(torch.cat([differs, (agree(expected) != expected).to(torch.int64)]))
    if bool(bad.any()):
        name = list(params)[int(bad.nonzero()[0]) % len(params)]
        raise ModelError(
            f"{name} does not have the same bytes on all ranks, or not those that were loaded. The "
            "weights would be silently wrong. Check that all machines have the same model files "
            "and library versions."
        )


def checksum(tensor: Tensor, first_byte: int, word_bytes: int) -> Tensor:
    """Position-dependent sum of a tensor's bytes, 0-dim int64 (arithmetic modulo 2^64).

    Args:
        first_byte: place of the tensor in the whole parameter; a multiple of `word_bytes`.
        word_bytes: 1, 2, 4 or 8; bytes are summed in words of this size, for speed.
    """
    data = tensor.detach().contiguous().view(-1).view(torch.uint8)
    if data.numel() % word_bytes:
        data = nn.functional.pad(data, (0, word_bytes - data.numel() % word_bytes))
    words = data.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[word_bytes])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for begin in range(0, words.numel(), _CHUNK_WORDS):
        part = words[begin : begin + _CHUNK_WORDS].to(torch.int64)
        first = first_byte // word_bytes + begin + 1
        weight = torch.arange(first, first + part.numel(), device=part.device) * _MULTIPLIER
        # Odd weights: no change of a single word goes unseen.
        total += (part * ((weight ^ (weight >> 29)) | 1)).sum()
    return total


def _word_bytes(param: Tensor) -> int:
    """Size of the largest word that no border between shards cuts."""
    return math.gcd(8, planned_range(param, 0)[1] * param.element_size())
