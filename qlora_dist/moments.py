"""Adam's moments: from the flat buffers that an optimizer works on to whole tensors by parameter, and back.

A moment is saved whole, as float32, so that it can be cut anew for another number of ranks or another backend.
Block-wise 8-bit state (https://arxiv.org/abs/2110.02861) does not survive that exactly: its blocks of 256 elements lie
elsewhere then. Its codes and the constant of each element's block are therefore saved beside it, and where the blocks
fall as they did the very same bytes are put back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from bitsandbytes import functional as bnb_functional
from torch import distributed as dist

MOMENTS = ("exp_avg", "exp_avg_sq")
_CODE, _ABSMAX = "_code", "_absmax"
_BLOCK_SIZE = 256  # of bitsandbytes' 8-bit optimizers


@dataclass(frozen=True)
class Piece:
    """A run of elements of a parameter that this rank updates, and where it lies among the optimizer's buffers."""

    name: str
    """The parameter."""
    first: int
    """First element (row-major) of the run."""
    numel: int
    buffer: int
    """Index of the flat buffer."""
    offset: int
    """First element of the run in that buffer."""


class Moments:
    """The optimizer state of flat buffers, as far as a checkpoint needs it.

    Args:
        buffers: flat float32 parameters of `optimizer`.
        pieces: what of the adapters lies in them.
        group: ranks that together hold each parameter once; None when this rank holds all of it.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        buffers: Sequence[torch.Tensor],
        pieces: Sequence[Piece],
        group: dist.ProcessGroup | None,
        device: torch.device,
    ) -> None:
        self._optimizer = optimizer
        self._buffers = buffers
        self._pieces = pieces
        self._group = group
        self._device = device

    def gather(self, sizes: Mapping[str, int]) -> dict[str, torch.Tensor]:
        """Whole moments by `{parameter}.{moment}`, (numel,) each, on the CPU; a collective, after the first update.

        Args:
            sizes: elements of every adapter parameter, in the same order on all ranks.
        """
        local = [_read(self._optimizer.state[buffer]) for buffer in self._buffers]
        kinds = dict.fromkeys(MOMENTS, torch.float32)
        if _is_8bit(self._optimizer):  # of the optimizer: a small buffer's state is float32 all the same
            kinds |= {name + _CODE: torch.uint8 for name in MOMENTS} | {n + _ABSMAX: torch.float32 for n in MOMENTS}
        mine: dict[str, list[Piece]] = {name: [] for name in sizes}
        for piece in self._pieces:
            mine[piece.name].append(piece)
        whole: dict[str, torch.Tensor] = {}
        for name, numel in sizes.items():
            for kind, dtype in kinds.items():
                tensor = torch.zeros(numel, dtype=dtype, device=self._device)
                for piece in mine[name]:
                    values = local[piece.buffer].get(kind)
                    run = slice(piece.first, piece.first + piece.numel)
                    if values is not None:
                        tensor[run] = values[piece.offset : piece.offset + piece.numel]
                    elif dtype.is_floating_point:
                        tensor[run] = torch.nan  # no block, no constant: `_absmax_of_blocks` will find none
                if self._group is not None:
                    dist.all_reduce(tensor, group=self._group)  # every element is somebody's: the others add zeros
                whole[f"{name}.{kind}"] = tensor.cpu()
        return whole

    def scatter(self, saved: Mapping[str, torch.Tensor], num_updates: int) -> None:
        """Take up what :meth:`gather` returned, cut for any number of ranks."""
        kinds = sorted({name.rpartition(".")[2] for name in saved})
        if not kinds:
            return
        moments: list[dict[str, torch.Tensor]] = []
        for buffer in self._buffers:
            dtypes = {kind: torch.uint8 if kind.endswith(_CODE) else torch.float32 for kind in kinds}
            moments.append({kind: torch.zeros(buffer.numel(), dtype=dtype) for kind, dtype in dtypes.items()})
        for piece in self._pieces:
            for kind in kinds:
                values = saved[f"{piece.name}.{kind}"][piece.first : piece.first + piece.numel]
                moments[piece.buffer][kind][piece.offset : piece.offset + piece.numel] = values
        for buffer, values in zip(self._buffers, moments, strict=True):
            _write(self._optimizer, buffer, values, num_updates)


def _is_8bit(optimizer: torch.optim.Optimizer) -> bool:
    return not isinstance(optimizer, torch.optim.AdamW) and optimizer.args.optim_bits == 8


def _read(state: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """`exp_avg` and `exp_avg_sq`, (n,) float32; of 8-bit state also `_code` (n,) uint8 and `_absmax` (n,) float32."""
    found: dict[str, torch.Tensor] = {}
    for number, name in enumerate(MOMENTS, start=1):
        if name in state:
            found[name] = state[name]
        elif f"state{number}" in state:
            values = state[f"state{number}"]
            if values.dtype == torch.uint8:
                absmax, codes = state[f"absmax{number}"], state[f"qmap{number}"]
                found[name + _CODE] = values
                found[name + _ABSMAX] = absmax.repeat_interleave(_BLOCK_SIZE)[: values.numel()]
                values = codes[values.long()] * found[name + _ABSMAX]
            found[name] = values
    return found


def _write(
    optimizer: torch.optim.Optimizer, buffer: torch.Tensor, moments: Mapping[str, torch.Tensor], num_updates: int
) -> None:
    if isinstance(optimizer, torch.optim.AdamW):
        # The count is a tensor on the buffer's device because the fused kernel reads it there.
        count = torch.tensor(float(num_updates), dtype=torch.float32, device=buffer.device)
        values = {name: moments[name].to(buffer.device, copy=True) for name in MOMENTS}
        optimizer.state[buffer] = {"step": count, **values}
        return
    settings = optimizer.param_groups[0]
    before, settings["params"] = settings["params"], [buffer]  # DeepSpeed puts buffers there during a step only
    optimizer.init_state(settings, buffer, 0, 0)  # allocates, in managed memory when it is paged
    settings["params"] = before
    state = optimizer.state[buffer]
    state["step"] = num_updates
    for number, name in enumerate(MOMENTS, start=1):
        if state[f"state{number}"].dtype == torch.uint8:
            _write_8bit(state, number, name, moments, buffer.device)
        else:
            state[f"state{number}"].copy_(moments[name])


def _write_8bit(
    state: dict[str, Any], number: int, name: str, moments: Mapping[str, torch.Tensor], device: torch.device
) -> None:
    absmax = _absmax_of_blocks(moments.get(name + _ABSMAX))
    if absmax is not None:
        state[f"state{number}"].copy_(moments[name + _CODE])
        state[f"absmax{number}"].copy_(absmax)
        return
    codes, quantized = bnb_functional.quantize_blockwise(
        moments[name].to(device), code=state[f"qmap{number}"], blocksize=_BLOCK_SIZE
    )
    state[f"state{number}"].copy_(codes)
    state[f"absmax{number}"].copy_(quantized.absmax)


def _absmax_of_blocks(of_elements: torch.Tensor | None) -> torch.Tensor | None:
    """The constant of each block, (num_blocks,); None when elements of one block come from different ones."""
    if of_elements is None:
        return None
    firsts = of_elements[::_BLOCK_SIZE]
    if not torch.equal(firsts.repeat_interleave(_BLOCK_SIZE)[: of_elements.numel()], of_elements):
        return None
    return firsts
