"""Row-wise access to the tensors of a model folder, through memory-mapped files."""

# Tested by tests/unit/weights/test_loading.py.

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qlora_dist.atomic import read_json
from qlora_dist.errors import ModelError
from qlora_dist.weights.conversion import Composed
from qlora_dist.weights.files import weight_files


class SafetensorsReader:
    """The tensors of a model folder by name; a context that opens and maps each file once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bytes_read = self.elements_quantized = 0
        self._files = weight_files(folder)
        self._stored = {name: name for name in self._files}  # from names in the model
        self._composed: dict[str, Composed] = {}
        self._whole: tuple[str, Tensor] | None = None
        self._open = ExitStack()
        self._readers: dict[Path, Any] = {}

    def __enter__(self) -> SafetensorsReader:
        return self

    def __exit__(self, *exception: object) -> None:
        self._open.close()

    def rename(self, model_name: Callable[[str], str | None]) -> None:
        """Rename all tensors: `model_name` translates the names in the files.

        None is for parts of composed tensors, which are not read by themselves.

        Raises:
            ModelError: two tensors would have one name.
        """
        self._stored = {}
        for stored in sorted(self._files):
            name = model_name(stored)
            if name is None:
                continue
            other = self._stored.setdefault(name, stored)
            if other != stored:
                raise ModelError(
                    f"model folder {self.folder} holds {name} twice, as {other} and "
                    f"as {stored}. Nothing says which of them counts: remove the one that does not "
                    "belong to the model."
                )

    def compose(self, tensors: Mapping[str, Composed]) -> None:
        """Let tensors be read that are composed of tensors of the files."""
        self._composed.update(tensors)

    def alias(self, name: str, other: str) -> None:
        """Let a tensor be read under another name, too."""
        if other in self._composed:
            self._composed[name] = self._composed[other]
        else:
            self._stored[name] = self._stored[other]

    def release(self) -> None:
        """Unmap all files; the next read maps them again."""
        # Pages that were read count as this process's memory until then.
        self._open.close()
        self._readers.clear()

    def __contains__(self, name: str) -> bool:
        return name in self._stored or name in self._composed

    @cached_property
    def config(self) -> dict[str, Any]:
        """Content of the folder's config.json."""
        return read_json(self.folder / "config.json", ModelError)

    def names(self) -> list[str]:
        """Return all tensor names, file by file; composed tensors last."""
        return [*self._stored, *self._composed]

    def file(self, name: str) -> Path:
        """Return the file that holds a tensor, or the first part of a composed one."""
        return self._files[self._first_source(name)]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor, from the file's header."""
        if name in self._composed:
            return self._composed[name].shape
        return self.stored_shape(self._stored[name])

    def stored_shape(self, stored: str) -> tuple[int, ...]:
        """Return the shape of a tensor by its name in the files."""
        return tuple(self._slice(stored).get_shape())

    def dtype(self, name: str) -> str:
        """Return the type of a stored tensor as safetensors spells it: BF16, F32, U8 and so on."""
        return str(self._slice(self._first_source(name)).get_dtype())

    def elements(self, name: str, first: int, end: int) -> Tensor:
        """Read elements [first, end) of the row-major flattened tensor; (end - first,).

        Reads whole rows along the last dimension, and no others.
        """
        if first == end:
            return torch.empty(0)
        shape = self.shape(name)
        columns = shape[-1] if len(shape) > 1 else 1
        first_row, end_row = first // columns, -(-end // columns)
        if name not in self._composed:
            rows = self._stored_rows(self._stored[name], first_row, end_row)
        elif self._composed[name].places is not None:
            rows = self._composed[name].rows(first_row, end_row, self._stored_rows)
        else:
            rows = self._made(name).view(-1, columns)[first_row:end_row]
        return rows.reshape(-1)[first - first_row * columns : end - first_row * columns]

    def _first_source(self, name: str) -> str:
        composed = self._composed.get(name)
        return self._stored[name] if composed is None else composed.sources[0]

    def _made(self, name: str) -> Tensor:
        """Make a composed tensor whole; the last one is kept for the next part of it."""
        if self._whole is None or self._whole[0] != name:
            composed = self._composed[name]
            tensors = [self._read(source, ...) for source in composed.sources]
            self._whole = name, composed.convert(tensors).contiguous()
        return self._whole[1]

    def _stored_rows(self, stored: str, first: int, end: int) -> Tensor:
        """Read rows [first, end) along the last dimension of a tensor of the files."""
        shape = self.stored_shape(stored)
        if len(shape) < 3:
            return self._read(stored, slice(first, end))
        inner, columns = prod(shape[1:-1]), shape[-1]
        low, high = first // inner, -(-end // inner)
        if len(shape) > 3 or high - low > 2:
            # Parts of the first and the last are read in vain, at most.
            whole = self._read(stored, slice(low, high)).reshape(-1, columns)
            return whole[first - low * inner : end - low * inner]
        parts = []
        for index in range(low, high):
            rows = slice(max(0, first - index * inner), min(inner, end - index * inner))
            parts.append(self._read(stored, (index, rows)))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Read rows [start, stop) of a tensor along dimension 0, on the CPU in the file's dtype.

        Raises:
            ModelError: the file cannot be read.
        """
        if name in self._composed:
            size = prod(self.shape(name)[1:])
            return self.elements(name, start * size, stop * size).view(-1, *self.shape(name)[1:])
        return self._read(self._stored[name], slice(start, stop))

    def flat(self, name: str, start: int, stop: int) -> Tensor:
        """Read elements [start, stop) of a tensor of shape (n,), (n, 1) or (1, n)."""
        shape = self.shape(name)
        long = max(range(len(shape)), key=shape.__getitem__)
        index = (*[slice(None)] * long, slice(start, stop))
        return self._read(self._stored[name], index).reshape(-1)

    def whole(self, name: str) -> Tensor:
        """Read a whole tensor, on the CPU in the file's dtype."""
        if name in self._composed:
            return self.rows(name, 0, self.shape(name)[0])
        # 0-dim takes no slice
        return self._read(self._stored[name], slice(None) if self.shape(name) else ...)

    def _read(self, stored: str, index: Any) -> Tensor:
        try:
            values = self._slice(stored)[index]
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"{self._files[stored]}: tensor {stored} cannot be read ({error})."
            ) from None
        self.bytes_read += values.numel() * values.element_size()
        return values

    def _slice(self, stored: str) -> Any:
        file = self._files[stored]
        if file not in self._readers:
            try:
                self._readers[file] = self._open.enter_context(safe_open(str(file), framework="pt"))
            except (SafetensorError, OSError) as error:
                raise ModelError(
                    f"{file} is not a readable safetensors file ({error}). Copy it again."
                ) from None
        try:
            return self._readers[file].get_slice(stored)
        except SafetensorError:
            raise ModelError(
                f"{file} has no tensor {stored}, though the index of the folder says that it is "
                "there. Index and files belong to different versions of the model: copy all of "
                "them again."
            ) from None
