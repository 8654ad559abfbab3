"""Adam's moments: from the optimizer's flat buffers to whole tensors by parameter, and back.

A moment is saved whole, so that it can be cut anew for a different number of ranks or backend. It
is saved as float32, or as block-wise 8-bit state (https://arxiv.org/abs/2110.02861): the code of
each element, the constant of each block of 256, and the beginnings of blocks. From these follows
the float32 value of every element. Where blocks fall as they did, the very same bytes are put back;
elsewhere the values are quantized again. The tensors:

    PARAMETER.exp_avg           (numel,) float32
    PARAMETER.exp_avg_code      (numel,) uint8, places in the code book
    PARAMETER.exp_avg_absmax    (num_blocks,) float32; NaN where a rank has float32 state
    PARAMETER.block_start       (num_blocks,) int64, first element of each block, ascending
    exp_avg_code_book           (256,) float32

and the same of `exp_avg_sq`. A parameter has the first, or the next three, or all of them: a rank
with a buffer of a few thousand elements keeps float32 whatever the other ranks do. Checkpoints of
format version 1 have float32 values beside the codes, no `block_start`, and the constant of each
element in place of each block.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from bitsandbytes import functional as bnb_functional
from torch import Tensor
from torch import distributed as dist

MOMENTS = ("exp_avg", "exp_avg_sq")
_CODE, _ABSMAX, _BOOK, _STARTS = "_code", "_absmax", "_code_book", "block_start"
_BLOCK_SIZE = 256  # of bitsandbytes' 8-bit optimizers
_CHUNK = 2**16 * _BLOCK_SIZE  # elements that are quantized at a time


@dataclass(frozen=True)
class BufferSlice:
    """Run of a parameter's elements that this rank updates, and its place in the flat buffers."""

    name: str
    """Name of the parameter."""
    first: int
    """First element (row-major) of the run."""
    numel: int
    buffer: int
    """Index of the flat buffer."""
    offset: int
    """First element of the run in that buffer."""


class Moments:
    """Optimizer state of flat buffers, as far as a checkpoint needs it.

    Args:
        buffers: flat float32 parameters of `optimizer`.
        pieces: runs of the adapters' parameters that lie in the buffers.
        group: ranks that together hold each parameter once; None when this rank holds all of it.
        device: the device on which `group` communicates.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        buffers: Sequence[Tensor],
        pieces: Sequence[BufferSlice],
        group: dist.ProcessGroup | None,
        device: torch.device,
    ) -> None:
        self._optimizer, self._buffers, self._pieces = optimizer, buffers, pieces
        self._group, self._device = group, device

    @torch.no_grad()
    def gather(self, sizes: Mapping[str, int]) -> dict[str, Tensor]:
        """Gather whole moments on rank 0's CPU; a collective, after the first update.

        The device holds no more than one whole tensor at a time.

        Args:
            sizes: elements of every adapter parameter, in the same order on all ranks.

        Returns:
            the tensors of this module's docstring by name on rank 0, an empty dictionary elsewhere.
        """
        # Only the ranks that hold the state together with rank 0: all others have copies of theirs.
        group = self._group
        if 0 not in ([_rank()] if group is None else dist.get_process_group_ranks(group)):
            return {}
        states = [_tensors(self._optimizer.state[buffer]) for buffer in self._buffers]
        if any(getattr(tensor, "is_paged", False) for state in states for tensor in state.values()):
            # Under WSL the host may not read managed memory while a GPU works.
            torch.cuda.synchronize(self._device)
        mine: dict[str, list[_Part]] = {name: [] for name in sizes}
        for piece in self._pieces:
            if piece.numel:
                mine[piece.name].append(_Part(piece, states[piece.buffer]))
        whole: dict[str, Tensor] = {}
        for (name, numel), counts in zip(sizes.items(), self._counts(mine.values()), strict=True):
            found = self._gather_one(numel, mine[name], counts)
            whole |= {f"{name}.{kind}": tensor for kind, tensor in found.items()}
        if any(name.endswith(_STARTS) for name in whole):
            whole |= {m + _BOOK: book for m, book in zip(MOMENTS, _code_books(), strict=True)}
        return whole

    def _counts(self, parts: Iterable[list[_Part]]) -> list[list[_Count]]:
        """Return for each parameter the counts of each rank of the group."""
        mine = [
            (sum(part.num_blocks for part in some), sum(part.is_8bit for part in some), len(some))
            for some in parts
        ]
        if self._group is None:
            return [[_Count(*one)] for one in mine]
        # (parameters, ranks, 3): each rank fills in its own counts, and the others' are zero.
        counts = torch.zeros(len(mine), dist.get_world_size(self._group), 3, dtype=torch.int64)
        counts[:, dist.get_rank(self._group)] = torch.tensor(mine)
        counts = counts.to(self._device)
        dist.all_reduce(counts, group=self._group)
        return [[_Count(*one) for one in of_ranks] for of_ranks in counts.tolist()]

    def _gather_one(
        self, numel: int, parts: list[_Part], counts: list[_Count]
    ) -> dict[str, Tensor]:
        """Gather a parameter's moments by kind, on rank 0."""
        found: dict[str, Tensor] = {}
        if any(one.num_8bit for one in counts):
            mine = 0 if self._group is None else dist.get_rank(self._group)
            num_blocks = sum(one.num_blocks for one in counts)
            # A rank's blocks lie together, in the order of the ranks.
            first = sum(one.num_blocks for one in counts[:mine])
            places = list(accumulate((part.num_blocks for part in parts), initial=first))[:-1]
            starts = zip(places, (part.starts for part in parts), strict=True)
            self._together(found, _STARTS, num_blocks, torch.int64, starts)
            for moment in MOMENTS:
                absmax = zip(places, (part.absmax(moment) for part in parts), strict=True)
                codes = [(part.first, part.codes(moment)) for part in parts if part.is_8bit]
                self._together(found, moment + _ABSMAX, num_blocks, torch.float32, absmax)
                self._together(found, moment + _CODE, numel, torch.uint8, codes)
        if any(one.num_parts > one.num_8bit for one in counts):
            for moment in MOMENTS:
                values = [(part.first, part.values(moment)) for part in parts if not part.is_8bit]
                self._together(found, moment, numel, torch.float32, values)
        if _STARTS in found:
            order = found[_STARTS].argsort()
            blocks = [_STARTS, *(moment + _ABSMAX for moment in MOMENTS)]
            found |= {kind: found[kind][order] for kind in blocks}
        return found

    def _together(
        self,
        found: dict[str, Tensor],
        kind: str,
        numel: int,
        dtype: torch.dtype,
        parts: Iterable[tuple[int, Tensor]],
    ) -> None:
        """Add a tensor to `found`, on rank 0, of which each rank has parts by first element."""
        device = torch.device("cpu") if self._group is None else self._device
        tensor = torch.zeros(numel, dtype=dtype, device=device)
        for first, values in parts:
            tensor[first : first + values.numel()] = values
        if self._group is not None:  # exactly one rank has each element, and the others add zeros
            dist.reduce(tensor, dst=0, group=self._group)
        if _rank() == 0:
            found[kind] = tensor.cpu()

    @torch.no_grad()
    def scatter(self, saved: Mapping[str, Tensor], num_updates: int) -> None:
        """Set the optimizer's state to saved moments, cut for any number of ranks.

        Args:
            saved: tensors that :meth:`gather` returned, or nothing before the first update.
        """
        reader = _Saved(saved)
        if not reader.names:
            return
        for number, buffer in enumerate(self._buffers):
            pieces = [piece for piece in self._pieces if piece.buffer == number and piece.numel]
            state = _tensors(_new_state(self._optimizer, buffer, num_updates))
            for moment in MOMENTS:
                if moment in state:
                    reader.copy_values(moment, pieces, state[moment])
                    continue
                codes, constants = state[moment + _CODE], state[moment + _ABSMAX]
                absmax = reader.constants(moment, pieces, constants.numel())
                if absmax is None:
                    values = torch.zeros(buffer.numel())
                    reader.copy_values(moment, pieces, values)
                    _quantize(values, state, moment, buffer.device)
                else:
                    constants.copy_(absmax)
                    # Padding becomes zero: its value may not be the largest of its block.
                    codes.fill_(int((state[moment + _BOOK] == 0).nonzero()[0]))
                    reader.copy_codes(moment, pieces, codes)


class _Count(NamedTuple):
    """Counts of a parameter's state on a rank."""

    num_blocks: int
    num_8bit: int  # parts in 8 bits
    num_parts: int


class _Part:
    """Piece of a parameter, with the state of its buffer."""

    def __init__(self, piece: BufferSlice, state: Mapping[str, Tensor]) -> None:
        self.first = piece.first
        self.is_8bit = MOMENTS[0] not in state
        self._state = state
        self._run = slice(piece.offset, piece.offset + piece.numel)
        self._blocks = slice(piece.offset // _BLOCK_SIZE, -(-self._run.stop // _BLOCK_SIZE))
        self._shift = piece.first - piece.offset

    @property
    def num_blocks(self) -> int:
        """Number of blocks with elements of the piece; float32 state is one without a constant."""
        return self._blocks.stop - self._blocks.start if self.is_8bit else 1

    @property
    def starts(self) -> Tensor:
        """First element of each block in the parameter, (num_blocks,) int64."""
        if not self.is_8bit:
            return torch.tensor([self.first])
        borders = torch.arange(self._blocks.start, self._blocks.stop) * _BLOCK_SIZE
        return (borders + self._shift).clamp_(min=self.first)

    def absmax(self, moment: str) -> Tensor:
        """Return the constant of each block, (num_blocks,)."""
        if not self.is_8bit:
            return self._state[moment].new_full((1,), torch.nan)
        return self._state[moment + _ABSMAX][self._blocks]

    def codes(self, moment: str) -> Tensor:
        """Return the code of each element, (numel,) uint8."""
        return self._state[moment + _CODE][self._run]

    def values(self, moment: str) -> Tensor:
        """Return the value of each element, (numel,) float32."""
        return self._state[moment][self._run]


class _Saved:
    """Saved moments, read for the pieces of this rank."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        # The mapping reads a tensor from its file when it is asked for it, with `in` too.
        self.names = set(tensors)

    def copy_values(self, moment: str, pieces: Sequence[BufferSlice], buffer: Tensor) -> None:
        """Write float32 values to their places in a buffer."""
        for piece in pieces:
            buffer[piece.offset : piece.offset + piece.numel] = self._values(moment, piece)

    def copy_codes(self, moment: str, pieces: Sequence[BufferSlice], buffer: Tensor) -> None:
        """Write codes to their places in a buffer."""
        for piece in pieces:
            buffer[piece.offset : piece.offset + piece.numel] = self._of(piece, moment + _CODE)

    def constants(
        self, moment: str, pieces: Sequence[BufferSlice], num_blocks: int
    ) -> Tensor | None:
        """Return the constant of each block of a buffer, (num_blocks,).

        None if blocks do not fall as they did when the moments were saved.
        """
        least, most = (torch.full((num_blocks,), sign * torch.inf) for sign in (1, -1))
        for piece in pieces:
            starts, absmax = self._blocks(moment, piece)
            if absmax is None:
                return None
            ends = torch.cat([starts[1:], torch.tensor([piece.numel])])
            # Blocks fall alike if each of the buffer's meets only one constant. A saved block may
            # lie in two of the buffer's, which its first and its last element find.
            for element in (starts, ends - 1):
                numbers = (element + piece.offset) // _BLOCK_SIZE
                least.scatter_reduce_(0, numbers, absmax, "amin")
                most.scatter_reduce_(0, numbers, absmax, "amax")
        is_empty = least > most
        return least.masked_fill_(is_empty, 0) if ((least == most) | is_empty).all() else None

    def _blocks(self, moment: str, piece: BufferSlice) -> tuple[Tensor, Tensor | None]:
        """Return the beginnings of blocks in a piece, (n,) int64, and their constants.

        The constants are None for state that was saved in float32.
        """
        constants, starts = f"{piece.name}.{moment}{_ABSMAX}", f"{piece.name}.{_STARTS}"
        if constants not in self.names:
            return torch.zeros(1, dtype=torch.int64), None
        if starts not in self.names:  # format version 1
            return torch.arange(piece.numel), self._of(piece, moment + _ABSMAX)
        borders = self._tensors[starts]
        first = int(torch.searchsorted(borders, piece.first, right=True)) - 1
        stop = int(torch.searchsorted(borders, piece.first + piece.numel))
        run = slice(first, stop)
        return (borders[run] - piece.first).clamp_(min=0), self._tensors[constants][run]

    def _values(self, moment: str, piece: BufferSlice) -> Tensor:
        """Return the float32 values of a piece's elements, (numel,)."""
        starts, absmax = self._blocks(moment, piece)
        if absmax is None or f"{piece.name}.{_STARTS}" not in self.names:
            return self._of(piece, moment)
        lengths = torch.diff(starts, append=torch.tensor([piece.numel]))
        scale = absmax.repeat_interleave(lengths)
        values = self._tensors[moment + _BOOK][self._of(piece, moment + _CODE).int()] * scale
        if f"{piece.name}.{moment}" in self.names:  # some rank had float32 state
            values = torch.where(scale.isnan(), self._of(piece, moment), values)
        return values

    def _of(self, piece: BufferSlice, kind: str) -> Tensor:
        """Return the elements of a piece from its parameter's tensor of some kind."""
        return self._tensors[f"{piece.name}.{kind}"][piece.first : piece.first + piece.numel]


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


@cache
def _code_books() -> tuple[Tensor, Tensor]:
    """Values of bitsandbytes' codes of each moment, (256,) float32 each."""
    make = bnb_functional.create_dynamic_map
    return make(signed=True), make(signed=False)


def _tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return a buffer's state by kind.

    Each moment has its float32 values, or its codes, constants and code book.
    """
    found: dict[str, Tensor] = {}
    for number, moment in enumerate(MOMENTS, start=1):
        # torch's name, or bitsandbytes'.
        values = state.get(moment, state.get(f"state{number}"))
        if values is not None and values.dtype == torch.uint8:
            found[moment + _CODE] = values
            found[moment + _ABSMAX] = state[f"absmax{number}"]
            found[moment + _BOOK] = state[f"qmap{number}"]
        elif values is not None:
            found[moment] = values
    return found


def _new_state(
    optimizer: torch.optim.Optimizer, buffer: Tensor, num_updates: int
) -> dict[str, Any]:
    """Make the state of a buffer after `num_updates` updates, with moments of zero."""
    if isinstance(optimizer, torch.optim.AdamW):
        # The count is a tensor on the buffer's device because the fused kernel reads it there.
        count = torch.tensor(float(num_updates), dtype=torch.float32, device=buffer.device)
        moments = {name: torch.zeros_like(buffer) for name in MOMENTS}
        optimizer.state[buffer] = {"step": count, **moments}
    else:
        settings = optimizer.param_groups[0]
        # DeepSpeed puts buffers there during a step only.
        before, settings["params"] = settings["params"], [buffer]
        optimizer.init_state(settings, buffer, 0, 0)  # in managed memory for paged optimizers
        settings["params"] = before
        optimizer.state[buffer]["step"] = num_updates
    return optimizer.state[buffer]


def _quantize(
    values: Tensor, state: Mapping[str, Tensor], moment: str, device: torch.device
) -> None:
    """Fill 8-bit state from float32 values on the host, some blocks at a time."""
    codes, absmax = state[moment + _CODE], state[moment + _ABSMAX]
    pairs = zip(codes.split(_CHUNK), absmax.split(_CHUNK // _BLOCK_SIZE), strict=True)
    for (some_codes, some_absmax), chunk in zip(pairs, values.split(_CHUNK), strict=True):
        quantized, constants = bnb_functional.quantize_blockwise(
            chunk.to(device), code=state[moment + _BOOK], blocksize=_BLOCK_SIZE
        )
        some_codes.copy_(quantized)
        some_absmax.copy_(constants.absmax)
