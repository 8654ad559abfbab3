"""Row-wise access to the tensors of a model folder, through memory-mapped files."""

# Tested by tests/unit/weights/test_loading.py.

from __future__ import annotations

from collections.abc import Callable, KeysView
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from qlora_dist.atomic import read_json
from qlora_dist.errors import ModelError
from qlora_dist.weights.files import weight_files


class SafetensorsReader:
    """The tensors of a model folder by name; a context that opens and maps each file once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bytes_read = self.elements_quantized = 0
        self._files = weight_files(folder)
        self._stored = {name: name for name in self._files}  # from names in the model
        self._open = ExitStack()
        self._readers: dict[Path, Any] = {}

    def __enter__(self) -> SafetensorsReader:
        return self

    def __exit__(self, *exception: object) -> None:
        self._open.close()

    def rename(self, model_name: Callable[[str], str]) -> None:
        """Rename all tensors: `model_name` translates the names in the files.

        Raises:
            ModelError: two tensors would have one name.
        """
        self._stored = {}
        for stored in sorted(self._files):
            other = self._stored.setdefault(model_name(stored), stored)
            if other != stored:
                raise ModelError(
                    f"model folder {self.folder} holds {model_name(stored)} twice, as {other} and "
                    f"as {stored}. Nothing says which of them counts: remove the one that does not "
                    "belong to the model."
                )

    def alias(self, name: str, other: str) -> None:
        """Let a tensor be read under another name, too."""
        self._stored[name] = self._stored[other]

    def release(self) -> None:
        """Unmap all files; the next read maps them again."""
        # Pages that were read count as this process's memory until then.
        self._open.close()
        self._readers.clear()

    def __contains__(self, name: str) -> bool:
        return name in self._stored

    @cached_property
    def config(self) -> dict[str, Any]:
        """Content of the folder's config.json."""
        return read_json(self.folder / "config.json", ModelError)

    def names(self) -> KeysView[str]:
        """Return all tensor names, file by file."""
        return self._stored.keys()

    def file(self, name: str) -> Path:
        """Return the file that holds a tensor."""
        return self._files[self._stored[name]]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a stored tensor, from the file's header."""
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """Return the type of a stored tensor as safetensors spells it: BF16, F32, U8 and so on."""
        return str(self._slice(name).get_dtype())

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Read rows [start, stop) of a tensor along dimension 0, on the CPU in the file's dtype.

        Raises:
            ModelError: the file cannot be read.
        """
        return self._read(name, slice(start, stop))

    def flat(self, name: str, start: int, stop: int) -> Tensor:
        """Read elements [start, stop) of a tensor of shape (n,), (n, 1) or (1, n)."""
        shape = self.shape(name)
        long = max(range(len(shape)), key=shape.__getitem__)
        return self._read(name, (*[slice(None)] * long, slice(start, stop))).reshape(-1)

    def whole(self, name: str) -> Tensor:
        """Read a whole tensor, on the CPU in the file's dtype."""
        return self._read(name, slice(None) if self.shape(name) else ...)  # 0-dim takes no slice

    def _read(self, name: str, index: Any) -> Tensor:
        try:
            values = self._slice(name)[index]
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"{self.file(name)}: tensor {name} cannot be read ({error})."
            ) from None
        self.bytes_read += values.numel() * values.element_size()
        return values

    def _slice(self, name: str) -> Any:
        file = self.file(name)
        if file not in self._readers:
            try:
                self._readers[file] = self._open.enter_context(safe_open(str(file), framework="pt"))
            except (SafetensorError, OSError) as error:
                raise ModelError(
                    f"{file} is not a readable safetensors file ({error}). Copy it again."
                ) from None
        try:
            return self._readers[file].get_slice(self._stored[name])
        except SafetensorError:
            raise ModelError(
                f"{file} has no tensor {name}, though the index of the folder says that it is "
                "there. Index and files belong to different versions of the model: copy all of "
                "them again."
            ) from None
