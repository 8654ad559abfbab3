"""Adam's moments: from the flat buffers that an optimizer works on to whole tensors by parameter, and back.

A moment is saved whole, so that it can be cut anew for another number of ranks or another backend:
as float32, or as block-wise 8-bit state (https://arxiv.org/abs/2110.02861) has it, with the code of
each element, the constant of each block of 256, and where the blocks begin. From these follows the
float32 value of every element. Where blocks fall as they did the very same bytes are put back;
elsewhere the values are quantized again. The tensors:

    PARAMETER.exp_avg           (numel,) float32
    PARAMETER.exp_avg_code      (numel,) uint8, places in the code book
    PARAMETER.exp_avg_absmax    (num_blocks,) float32; NaN where a rank has float32 state
    PARAMETER.block_start       (num_blocks,) int64, first element of each block, ascending
    exp_avg_code_book           (256,) float32

and the same of `exp_avg_sq`. Of a parameter there is the first, or the next three, or all of them:
a rank with a buffer of a few thousand elements keeps float32 whatever the others do. Checkpoints of
format version 1 have float32 values beside the codes, no `block_start`, and the constant of each
element in place of each block.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from bitsandbytes import functional as bnb_functional
from torch import distributed as dist

MOMENTS = ("exp_avg", "exp_avg_sq")
_CODE, _ABSMAX, _BOOK, _STARTS = "_code", "_absmax", "_code_book", "block_start"
_BLOCK_SIZE = 256  # of bitsandbytes' 8-bit optimizers
_CHUNK = 2**16 * _BLOCK_SIZE
"""Elements that are quantized at a time."""


@dataclass(frozen=True)
class BufferSlice:
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
        pieces: Sequence[BufferSlice],
        group: dist.ProcessGroup | None,
        device: torch.device,
    ) -> None:
        self._optimizer = optimizer
        self._buffers = buffers
        self._pieces = pieces
        self._group = group
        self._device = device

    @torch.no_grad()
    def gather(self, sizes: Mapping[str, int]) -> dict[str, torch.Tensor]:
        """Whole moments on rank 0's CPU, nothing elsewhere; a collective, after the first update.

        On the device there is no more than one whole tensor at a time.

        Args:
            sizes: elements of every adapter parameter, in the same order on all ranks.
        """
        # Only the ranks that hold the state together with rank 0: the others have copies of theirs.
        if 0 not in (
            [_rank()] if self._group is None else dist.get_process_group_ranks(self._group)
        ):
            return {}
        states = [_tensors(self._optimizer.state[buffer]) for buffer in self._buffers]
        if any(getattr(tensor, "is_paged", False) for state in states for tensor in state.values()):
            torch.cuda.synchronize(
                self._device
            )  # under WSL nobody else may read it while a GPU works
        mine: dict[str, list[_Part]] = {name: [] for name in sizes}
        for piece in self._pieces:
            if piece.numel:
                mine[piece.name].append(_Part(piece, states[piece.buffer]))
        whole: dict[str, torch.Tensor] = {}
        for (name, numel), counts in zip(sizes.items(), self._counts(mine.values()), strict=True):
            found = self._gather_one(numel, mine[name], counts)
            whole |= {f"{name}.{kind}": tensor for kind, tensor in found.items()}
        if any(name.endswith(_STARTS) for name in whole):
            whole |= {
                moment + _BOOK: book for moment, book in zip(MOMENTS, _code_books(), strict=True)
            }
        return whole

    def _counts(self, parts: Iterable[list[_Part]]) -> list[list[_Count]]:
        """Of each parameter, what each rank of the group has."""
        mine = [
            (
                sum(part.num_blocks for part in of_one),
                sum(part.is_8bit for part in of_one),
                len(of_one),
            )
            for of_one in parts
        ]
        if self._group is None:
            return [[_Count(*one)] for one in mine]
        counts = torch.zeros(len(mine), dist.get_world_size(self._group), 3, dtype=torch.int64)
        counts[:, dist.get_rank(self._group)] = torch.tensor(mine)
        counts = counts.to(self._device)
        dist.all_reduce(counts, group=self._group)
        return [[_Count(*one) for one in of_ranks] for of_ranks in counts.tolist()]

    def _gather_one(
        self, numel: int, parts: list[_Part], counts: list[_Count]
    ) -> dict[str, torch.Tensor]:
        """One parameter's moments by kind, on rank 0."""
        found: dict[str, torch.Tensor] = {}
        if any(one.num_8bit for one in counts):
            mine = 0 if self._group is None else dist.get_rank(self._group)
            place, num_blocks = (
                sum(one.num_blocks for one in some) for some in (counts[:mine], counts)
            )
            # A rank's blocks lie together, in the order of the ranks.
            starts = torch.cat([part.starts for part in parts]) if parts else torch.empty(0)
            self._together(found, _STARTS, (num_blocks, torch.int64), [(place, starts)])
            for moment in MOMENTS:
                absmax = (
                    torch.cat([part.absmax(moment) for part in parts]) if parts else torch.empty(0)
                )
                codes = [(part.first, part.codes(moment)) for part in parts if part.is_8bit]
                self._together(
                    found, moment + _ABSMAX, (num_blocks, torch.float32), [(place, absmax)]
                )
                self._together(found, moment + _CODE, (numel, torch.uint8), codes)
        if any(one.num_parts > one.num_8bit for one in counts):
            for moment in MOMENTS:
                values = [(part.first, part.values(moment)) for part in parts if not part.is_8bit]
                self._together(found, moment, (numel, torch.float32), values)
        if _STARTS in found:
            order = found[_STARTS].argsort()
            blocks = [_STARTS, *(moment + _ABSMAX for moment in MOMENTS)]
            found |= {kind: found[kind][order] for kind in blocks}
        return found

    def _together(
        self,
        found: dict[str, torch.Tensor],
        kind: str,
        like: tuple[int, torch.dtype],
        parts: Iterable[tuple[int, torch.Tensor]],
    ) -> None:
        """Add to `found`, on rank 0, a tensor of which each rank has parts, by their first elements."""
        numel, dtype = like
        device = torch.device("cpu") if self._group is None else self._device
        tensor = torch.zeros(numel, dtype=dtype, device=device)
        for first, values in parts:
            tensor[first : first + values.numel()] = values
        if self._group is not None:  # each element is somebody's: the others add zeros
            dist.reduce(tensor, dst=0, group=self._group)
        if _rank() == 0:
            found[kind] = tensor.cpu()

    @torch.no_grad()
    def scatter(self, saved: Mapping[str, torch.Tensor], num_updates: int) -> None:
        """Take up what :meth:`gather` returned, cut for any number of ranks."""
        reader = _Saved(saved)
        if not reader.names:
            return
        for number, buffer in enumerate(self._buffers):
            pieces = [piece for piece in self._pieces if piece.buffer == number and piece.numel]
            state = _tensors(_new_state(self._optimizer, buffer, num_updates))
            for moment in MOMENTS:
                if moment in state:
                    reader.copy_values(moment, pieces, state[moment])
                elif (
                    absmax := reader.constants(moment, pieces, state[moment + _ABSMAX].numel())
                ) is not None:
                    state[moment + _ABSMAX].copy_(absmax)
                    state[moment + _CODE].fill_(
                        int((state[moment + _BOOK] == 0).nonzero()[0])
                    )  # padding
                    reader.copy_codes(moment, pieces, state[moment + _CODE])
                else:
                    values = torch.zeros(buffer.numel())
                    reader.copy_values(moment, pieces, values)
                    _quantize(values, state, moment, buffer.device)


class _Count(NamedTuple):
    """What a rank has of a parameter's state."""

    num_blocks: int
    num_8bit: int
    """Parts in 8 bits."""
    num_parts: int


class _Part:
    """A piece of a parameter, and the state of its buffer."""

    def __init__(self, piece: BufferSlice, state: Mapping[str, torch.Tensor]) -> None:
        self.first = piece.first
        self.is_8bit = MOMENTS[0] not in state
        self._state = state
        self._run = slice(piece.offset, piece.offset + piece.numel)
        self._blocks = slice(piece.offset // _BLOCK_SIZE, -(-self._run.stop // _BLOCK_SIZE))
        self._shift = piece.first - piece.offset

    @property
    def num_blocks(self) -> int:
        """Blocks that it has elements of; float32 state is one without a constant."""
        return self._blocks.stop - self._blocks.start if self.is_8bit else 1

    @property
    def starts(self) -> torch.Tensor:
        """First element of each in the parameter, (num_blocks,) int64."""
        if not self.is_8bit:
            return torch.tensor([self.first])
        borders = torch.arange(self._blocks.start, self._blocks.stop) * _BLOCK_SIZE
        return (borders + self._shift).clamp_(min=self.first)

    def absmax(self, moment: str) -> torch.Tensor:
        """The constant of each, (num_blocks,)."""
        if not self.is_8bit:
            return self._state[moment].new_full((1,), torch.nan)
        return self._state[moment + _ABSMAX][self._blocks]

    def codes(self, moment: str) -> torch.Tensor:
        """Of each element, (numel,) uint8."""
        return self._state[moment + _CODE][self._run]

    def values(self, moment: str) -> torch.Tensor:
        """Of each element, (numel,) float32."""
        return self._state[moment][self._run]


class _Saved:
    """Moments as they were gathered, asked for what this rank needs of them."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = tensors
        self.names = set(tensors)

    def copy_values(self, moment: str, pieces: Sequence[BufferSlice], buffer: torch.Tensor) -> None:
        """Write float32 values to where they lie in a buffer."""
        for piece in pieces:
            buffer[piece.offset : piece.offset + piece.numel] = self._values(moment, piece)

    def copy_codes(self, moment: str, pieces: Sequence[BufferSlice], buffer: torch.Tensor) -> None:
        """Write codes to where they lie in a buffer."""
        for piece in pieces:
            codes = self._of(piece, f"{moment}{_CODE}")
            buffer[piece.offset : piece.offset + piece.numel] = codes

    def constants(
        self, moment: str, pieces: Sequence[BufferSlice], num_blocks: int
    ) -> torch.Tensor | None:
        """The constant of each block of a buffer, (num_blocks,); None when blocks do not fall as they did."""
        least, most = (torch.full((num_blocks,), sign * torch.inf) for sign in (1, -1))
        for piece in pieces:
            starts, absmax = self._blocks(moment, piece)
            if absmax is None:
                return None
            ends = torch.cat([starts[1:], torch.tensor([piece.numel])])
            for element in (starts, ends - 1):  # a block from elsewhere may lie in two of these
                numbers = (element + piece.offset) // _BLOCK_SIZE
                least.scatter_reduce_(0, numbers, absmax, "amin")
                most.scatter_reduce_(0, numbers, absmax, "amax")
        is_empty = least > most
        return least.masked_fill_(is_empty, 0) if ((least == most) | is_empty).all() else None

    def _blocks(self, moment: str, piece: BufferSlice) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Where blocks begin in a piece, (n,) int64, and their constants; without these its state is in float32."""
        constants, starts = f"{piece.name}.{moment}{_ABSMAX}", f"{piece.name}.{_STARTS}"
        if constants not in self.names:
            return torch.zeros(1, dtype=torch.int64), None
        if starts not in self.names:  # format version 1
            return torch.arange(piece.numel), self._of(piece, moment + _ABSMAX)
        borders = self._tensors[starts]
        first = int(torch.searchsorted(borders, piece.first, right=True)) - 1
        stop = int(torch.searchsorted(borders, piece.first + piece.numel))
        return (borders[first:stop] - piece.first).clamp_(min=0), self._tensors[constants][
            first:stop
        ]

    def _values(self, moment: str, piece: BufferSlice) -> torch.Tensor:
        starts, absmax = self._blocks(moment, piece)
        if absmax is None or f"{piece.name}.{_STARTS}" not in self.names:
            return self._of(piece, moment)
        lengths = torch.diff(starts, append=torch.tensor([piece.numel]))
        scale = absmax.repeat_interleave(lengths)
        values = self._tensors[moment + _BOOK][self._of(piece, moment + _CODE).int()] * scale
        if f"{piece.name}.{moment}" in self.names:
            values = torch.where(scale.isnan(), self._of(piece, moment), values)
        return values

    def _of(self, piece: BufferSlice, kind: str) -> torch.Tensor:
        """The elements of a piece."""
        return self._tensors[f"{piece.name}.{kind}"][piece.first : piece.first + piece.numel]


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


@cache
def _code_books() -> tuple[torch.Tensor, torch.Tensor]:
    """The values that bitsandbytes' codes of each moment stand for, (256,) float32 each."""
    return bnb_functional.create_dynamic_map(signed=True), bnb_functional.create_dynamic_map(
        signed=False
    )


def _tensors(state: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """A buffer's state by kind: of each moment its float32 values, or codes, constants and code book."""
    found: dict[str, torch.Tensor] = {}
    for number, moment in enumerate(MOMENTS, start=1):
        values = state.get(moment, state.get(f"state{number}"))
        if values is None:
            continue
        if values.dtype == torch.uint8:
            found[moment + _CODE] = values
            found[moment + _ABSMAX], found[moment + _BOOK] = (
                state[f"absmax{number}"],
                state[f"qmap{number}"],
            )
        else:
            found[moment] = values
    return found


def _new_state(
    optimizer: torch.optim.Optimizer, buffer: torch.Tensor, num_updates: int
) -> dict[str, Any]:
    """Make the state of a buffer that was updated so often, with moments of zero."""
    if isinstance(optimizer, torch.optim.AdamW):
        # The count is a tensor on the buffer's device because the fused kernel reads it there.
        count = torch.tensor(float(num_updates), dtype=torch.float32, device=buffer.device)
        optimizer.state[buffer] = {
            "step": count,
            **{name: torch.zeros_like(buffer) for name in MOMENTS},
        }
        return optimizer.state[buffer]
    settings = optimizer.param_groups[0]
    before, settings["params"] = (
        settings["params"],
        [buffer],
    )  # DeepSpeed puts buffers there during a step only
    optimizer.init_state(settings, buffer, 0, 0)  # allocates, in managed memory when it is paged
    settings["params"] = before
    optimizer.state[buffer]["step"] = num_updates
    return optimizer.state[buffer]


def _quantize(
    values: torch.Tensor, state: Mapping[str, torch.Tensor], moment: str, device: torch.device
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
