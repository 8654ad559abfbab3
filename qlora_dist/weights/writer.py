"""Output files of 4-bit models, in the names and layout of bitsandbytes and transformers."""

# Tested by tests/unit/weights/test_quantize.py.

from __future__ import annotations

import json
from pathlib import Path

import torch
from bitsandbytes.functional import QuantState
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from qlora_dist.errors import ModelError
from qlora_dist.model.nf4 import (
    NESTED_BLOCK_SIZE,
    QuantFormat,
    dynamic_code,
    four_bit_code,
    quantize_matrix,
)

MAX_FILE_BYTES = 2 * 2**30
"""Largest size of an output file, which is held in host memory; a larger tensor gets its own."""


class FileWriter:
    """Collects tensors into files of at most MAX_FILE_BYTES, and reads each back to check."""

    def __init__(self, folder: Path) -> None:
        self.num_bytes = 0
        self.num_files = 0
        self._folder = folder
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._files: dict[str, int] = {}

    def add(self, tensors: dict[str, Tensor]) -> None:
        """Take the tensors of one parameter; they go into the same file."""
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        if self._pending and self._pending_bytes + size > MAX_FILE_BYTES:
            self._flush()
        self._pending.update(tensors)
        self._pending_bytes += size
        self.num_bytes += size

    def close(self) -> None:
        """Write the last file, give all files their names, and write an index of several."""
        self._flush()
        last = self.num_files
        if last == 1:
            self._partial_file(1).rename(self._folder / "model.safetensors")
            return
        # The number of files, which is in every name, is known only now.
        names = {i: f"model-{i:05d}-of-{last:05d}.safetensors" for i in range(1, last + 1)}
        for number, name in names.items():
            self._partial_file(number).rename(self._folder / name)
        index = {
            "metadata": {"total_size": self.num_bytes},
            "weight_map": {tensor: names[number] for tensor, number in sorted(self._files.items())},
        }
        text = json.dumps(index, indent=2) + "\n"
        (self._folder / "model.safetensors.index.json").write_text(text)

    def _flush(self) -> None:
        self.num_files += 1
        path = self._partial_file(self.num_files)
        save_file(self._pending, path, metadata={"format": "pt"})
        with safe_open(str(path), framework="pt") as reader:
            for name, tensor in self._pending.items():
                if not torch.equal(_bytes(reader.get_tensor(name)), _bytes(tensor)):
                    raise ModelError(
                        f"{path}: {name} was read back differently from what was written. "
                        "Check the disk."
                    )
        self._files.update(dict.fromkeys(self._pending, self.num_files))
        self._pending, self._pending_bytes = {}, 0

    def _partial_file(self, number: int) -> Path:
        return self._folder / f"{number}.safetensors"


def stored_tensors(name: str, matrix: Tensor, fmt: QuantFormat) -> dict[str, Tensor]:
    """Quantize a matrix into the tensors that bitsandbytes saves for it, on the CPU.

    Args:
        name: name of the weight, with `.weight`.
        matrix: (out_features, in_features) bfloat16.
    """
    made = quantize_matrix(matrix, fmt)
    nested = offset = None
    if made.absmax_offset is not None:
        offset = made.absmax_offset[0]
        code, scale = dynamic_code(matrix.device), made.absmax_scale
        nested = QuantState(scale, code=code, blocksize=NESTED_BLOCK_SIZE, dtype=torch.float32)
    state = QuantState(
        absmax=made.absmax,
        shape=matrix.shape,
        # A copy for each matrix: safetensors saves no two tensors of one memory.
        code=four_bit_code(fmt.quant_type, matrix.device).clone(),
        blocksize=fmt.block_size,
        quant_type=fmt.quant_type,
        dtype=matrix.dtype,
        offset=offset,
        state2=nested,
    )
    constants = state.as_dict(packed=True)
    return {
        name: made.weight.cpu(),
        **{f"{name}.{key}": tensor.cpu() for key, tensor in constants.items()},
    }


def _bytes(tensor: Tensor) -> Tensor:
    # Compared as bytes: NaN is not equal to itself.
    return tensor.reshape(-1).view(torch.uint8)
