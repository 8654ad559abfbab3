"""Tensors of a model that its files hold in other pieces, such as each expert's matrices apart.

transformers knows for each family which tensors of a file become which of the model, by operations
that stack, join and cut them. Here these operations are applied to the numbers of rows instead of
the rows: the result says for each row of the model's tensor which row of which tensor it is. So a
rank reads the rows of its part, and nothing else.
"""

# Tested by tests/unit/weights/test_conversion.py.

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import Transpose, WeightConverter, dot_natural_key

_ROWS = 2**40  # more than a tensor has


@dataclass(frozen=True)
class Composed:
    """A tensor of the model whose rows are rows of tensors in the files."""

    shape: tuple[int, ...]
    sources: tuple[str, ...]
    """Tensors of the files."""
    places: Tensor | None
    """The row that each of its rows is: number of the source times `_ROWS`, plus the row there.
    (prod(shape[:-1]),) int64; None if the operations change rows, so that all must be read."""
    convert: Callable[[list[Tensor]], Tensor]
    """Makes the whole tensor of its whole sources."""

    def rows(self, first: int, last: int, read: Callable[[str, int, int], Tensor]) -> Tensor:
        """Return rows [first, last), (last - first, shape[-1]).

        Args:
            read: function of a tensor of the files, and the first and last of its rows.
        """
        assert self.places is not None
        places = self.places[first:last]
        found: Tensor | None = None
        source_of = places // _ROWS
        for number in source_of.unique().tolist():
            here = (source_of == number).nonzero().squeeze(1)
            rows = places[here] % _ROWS
            low, high = int(rows.min()), int(rows.max()) + 1
            part = read(self.sources[number], low, high)
            if high - low != len(rows) or not torch.equal(rows, torch.arange(low, high)):
                part = part[rows - low]
            if len(here) == len(places):
                return part
            if found is None:
                found = part.new_empty(len(places), *part.shape[1:])
            found[here] = part
        assert found is not None
        return found


def composed(
    groups: Mapping[str, list[tuple[str, str]]],
    converters: Iterable[WeightConverter],
    shapes: Callable[[str], tuple[int, ...]],
    model: PreTrainedModel,
) -> dict[str, Composed]:
    """Return the composed tensors by name in the model.

    Args:
        groups: by the name that a converter gives, the tensors of the files and the patterns of the
            converter that they match.
        shapes: function of the name of a tensor in the files.
    """
    by_pattern = {pattern: one for one in converters for pattern in one.source_patterns}
    found: dict[str, Composed] = {}
    for name, members in groups.items():
        members = sorted(members, key=lambda member: dot_natural_key(member[0]))
        converter = by_pattern[members[0][1]]
        sources = tuple(stored for stored, _ in members)
        keeps_rows = not any(isinstance(one, Transpose) for one in converter.operations)
        sizes = [shapes(stored) for stored in sources]
        widths = {size[-1] if len(size) > 1 else 1 for size in sizes}

        def convert(
            tensors: list[Tensor], name: str = name, members: Any = members, by: Any = converter
        ) -> dict[str, Tensor]:
            mapping = copy.deepcopy(by)
            for (stored, pattern), tensor in zip(members, tensors, strict=True):
                mapping.add_tensor(name, stored, pattern, tensor)
            made = mapping.convert(name, model=model, config=model.config)
            return {key: one[0] if isinstance(one, list) else one for key, one in made.items()}

        if keeps_rows and len(widths) == 1:
            numbered = [_row_numbers(number, size) for number, size in enumerate(sizes)]
            for target, places in convert(numbered).items():
                shape = tuple(places.shape)
                shape = (*shape[:-1], *widths) if len(sizes[0]) > 1 else shape
                found[target] = Composed(
                    shape, sources, places.reshape(-1).contiguous(), _only(convert, target)
                )
        else:
            described = [torch.empty(size, device="meta") for size in sizes]
            for target, tensor in convert(described).items():
                found[target] = Composed(tuple(tensor.shape), sources, None, _only(convert, target))
    return found


def _only(convert: Callable[[list[Tensor]], dict[str, Tensor]], target: str) -> Any:
    return lambda tensors: convert(tensors)[target]


def _row_numbers(source: int, size: tuple[int, ...]) -> Tensor:
    """Return the places of all rows of a source, in its shape with rows of one element."""
    shape = (*size[:-1], 1) if len(size) > 1 else size
    return (source * _ROWS + torch.arange(prod(shape))).view(shape)
