"""Write 4-bit tensors into safetensors files, as bitsandbytes and transformers name them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from bitsandbytes.functional import QuantState
from safetensors import safe_open
from safetensors.torch import save_file

from qlora_dist.errors import ModelError
from qlora_dist.model.nf4 import (
    NESTED_BLOCK_SIZE,
    QuantFormat,
    dynamic_code,
    four_bit_code,
    quantize_matrix,
)

MAX_FILE_BYTES = 2 * 2**30
"""Size of an output file, which is also what is held in host memory; a tensor that is larger gets a file of its own."""


class FileWriter:
    """Collects tensors into safetensors files of at most MAX_FILE_BYTES, each compared with what is read back."""

    def __init__(self, folder: Path) -> None:
        self.num_bytes = 0
        self.num_files = 0
        self._folder = folder
        self._pending: dict[str, torch.Tensor] = {}
        self._pending_bytes = 0
        self._files: dict[str, int] = {}

    def add(self, tensors: dict[str, torch.Tensor]) -> None:
        """Take the tensors of one parameter; they stay in one file."""
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        if self._pending and self._pending_bytes + size > MAX_FILE_BYTES:
            self._flush()
        self._pending.update(tensors)
        self._pending_bytes += size
        self.num_bytes += size

    def close(self) -> None:
        """Write what is left, give the files their names, and write the index if there are several."""
        self._flush()
        if self.num_files == 1:
            (self._folder / self._partial_name(1)).rename(self._folder / "model.safetensors")
            return
        names = {
            i: f"model-{i:05d}-of-{self.num_files:05d}.safetensors"
            for i in range(1, self.num_files + 1)
        }
        for number, name in names.items():
            (self._folder / self._partial_name(number)).rename(self._folder / name)
        index = {
            "metadata": {"total_size": self.num_bytes},
            "weight_map": {tensor: names[number] for tensor, number in sorted(self._files.items())},
        }
        (self._folder / "model.safetensors.index.json").write_text(
            json.dumps(index, indent=2) + "\n"
        )

    def _flush(self) -> None:
        self.num_files += 1
        path = self._folder / self._partial_name(self.num_files)
        save_file(self._pending, path, metadata={"format": "pt"})
        with safe_open(str(path), framework="pt") as reader:
            for name, tensor in self._pending.items():
                if not torch.equal(_bytes(reader.get_tensor(name)), _bytes(tensor)):
                    raise ModelError(
                        f"{path}: {name} was read back differently from what was written. Check the disk."
                    )
        self._files.update(dict.fromkeys(self._pending, self.num_files))
        self._pending, self._pending_bytes = {}, 0

    @staticmethod
    def _partial_name(number: int) -> str:
        return f"{number}.safetensors"


def stored_tensors(name: str, matrix: torch.Tensor, fmt: QuantFormat) -> dict[str, torch.Tensor]:
    """A matrix as the tensors that bitsandbytes saves for it, on the CPU.

    Args:
        name: of the weight, with `.weight`.
        matrix: (out_features, in_features) bfloat16.
    """
    made = quantize_matrix(matrix, fmt)
    nested = None
    if made.absmax_offset is not None:
        nested = QuantState(
            absmax=made.absmax_scale,
            code=dynamic_code(matrix.device),
            blocksize=NESTED_BLOCK_SIZE,
            dtype=torch.float32,
        )
    state = QuantState(
        absmax=made.absmax,
        shape=matrix.shape,
        code=four_bit_code(
            fmt.quant_type, matrix.device
        ).clone(),  # safetensors saves no two tensors of one memory
        blocksize=fmt.block_size,
        quant_type=fmt.quant_type,
        dtype=matrix.dtype,
        offset=None if made.absmax_offset is None else made.absmax_offset[0],
        state2=nested,
    )
    tensors = {
        name: made.weight,
        **{f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()},
    }
    return {key: tensor.cpu() for key, tensor in tensors.items()}


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)
