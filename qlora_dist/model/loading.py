"""Weights from safetensors straight to their place: each rank reads and quantises only the rows it keeps.

The whole model never exists in one place. For each tensor, a rank opens the memory-mapped file, reads the rows that
cover its shard, quantises those, and copies the result into its shard. The only thing ranks exchange is the float32
maxima of quantisation blocks, because double quantisation subtracts their mean over the whole matrix.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from torch import distributed as dist
from torch import nn
from transformers import PreTrainedModel

from qlora_dist.errors import ModelError
from qlora_dist.model.files import weight_files
from qlora_dist.model.nf4 import QuantizedLinear, quantize_absmax, quantize_blocks
from qlora_dist.model.shards import local_part, local_range, shard_group, whole_shape


class SafetensorsReader:
    """Row-wise access to the tensors of a model folder; files are memory-mapped and opened once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bytes_read = 0
        self._files = weight_files(folder)
        self._open = ExitStack()
        self._readers: dict[Path, Any] = {}

    def __enter__(self) -> SafetensorsReader:
        return self

    def __exit__(self, *exception: object) -> None:
        self._open.close()

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a stored tensor."""
        return tuple(self._slice(name).get_shape())

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of a tensor along dimension 0, on the CPU in the file's dtype.

        Raises:
            ModelError: the file cannot be read.
        """
        try:
            rows = self._slice(name)[start:stop]
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{self._files[name]}: tensor {name} cannot be read ({error}).") from None
        self.bytes_read += rows.numel() * rows.element_size()
        return rows

    def _slice(self, name: str) -> Any:
        file = self._files[name]
        if file not in self._readers:
            try:
                self._readers[file] = self._open.enter_context(safe_open(str(file), framework="pt"))
            except (SafetensorError, OSError) as error:
                raise ModelError(f"{file} is not a readable safetensors file ({error}). Copy it again.") from None
        return self._readers[file].get_slice(name)


def materialize(model: PeftModel | PreTrainedModel, device: torch.device) -> None:
    """Allocate this rank's part of every meta parameter on `device`; contents are undefined, buffers are kept.

    A model whose parameters were allocated while they were cut up only has its buffers moved.
    """
    buffers = {
        (module, name): buffer for module in model.modules() for name, buffer in module.named_buffers(recurse=False)
    }  # to_empty would also throw away what no checkpoint holds
    is_described_only = any(param.is_meta for param in model.parameters())
    if is_described_only:
        model.to_empty(device=device)
    for (module, name), buffer in buffers.items():
        module._buffers[name] = buffer.to(device)
    if is_described_only:
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        base.tie_weights()  # to_empty gave each use of a shared parameter memory of its own


@torch.no_grad()
def load_base_weights(model: nn.Module, folder: Path, on_bytes: Callable[[int], None] = lambda _: None) -> None:
    """Fill the frozen base of a materialised model from `folder`, quantising on the way; adapters are left alone.

    Args:
        model: skeleton with adapters, possibly sharded, after :func:`materialize`.
        on_bytes: called with the number of checkpoint bytes read so far, for progress.

    Raises:
        ModelError: a tensor is missing or has another shape than the model expects.
    """
    with SafetensorsReader(folder) as reader:
        done: set[int] = set()
        for name, module in model.named_modules():
            if isinstance(module, QuantizedLinear):
                _load_quantized(_checkpoint_name(name), module, reader)
            else:
                for leaf, param in _own_base_parameters(name, module):
                    if id(param) not in done:  # tied embeddings are one parameter under two names
                        _load_plain(_checkpoint_name(f"{name}.{leaf}"), param, reader)
                        done.add(id(param))
            on_bytes(reader.bytes_read)


def _own_base_parameters(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    if ".lora_" not in name:
        yield from module.named_parameters(recurse=False)


def _checkpoint_name(name: str) -> str:
    """The name a tensor has in the model's own files, without what peft wrapped around it."""
    return name.removeprefix("base_model.model.").replace(".base_layer", "")


def _load_plain(name: str, param: nn.Parameter, reader: SafetensorsReader) -> None:
    shape = whole_shape(param)
    _check_shape(name, tuple(shape), reader)
    start, stop = local_range(param)
    local_part(param).view(-1).copy_(_read_elements(name, shape[1:].numel(), start, stop, reader))


def _load_quantized(name: str, layer: QuantizedLinear, reader: SafetensorsReader) -> None:
    _check_shape(f"{name}.weight", (layer.out_features, layer.in_features), reader)
    numel, block = layer.out_features * layer.in_features, layer.format.block_size
    first_byte, end_byte = local_range(layer.weight)
    # Elements of the blocks that this rank's bytes touch; the blocks at the borders are quantised by both neighbours.
    first = 2 * first_byte // block * block
    end = min(numel, -(-2 * end_byte // block) * block)
    elements = _read_elements(f"{name}.weight", layer.in_features, first, end, reader).to(
        layer.weight.device, torch.bfloat16
    )
    absmax = torch.zeros(layer.format.num_blocks(numel), dtype=torch.float32, device=layer.weight.device)
    if end > first:
        packed, local_absmax = quantize_blocks(elements, layer.format)
        local_part(layer.weight).view(-1).copy_(packed.view(-1)[first_byte - first // 2 : end_byte - first // 2])
        # Each block is contributed by the one rank that holds its first byte, so that the sum below is exact.
        owned = slice(-(-2 * first_byte // block), -(-2 * end_byte // block))
        absmax[owned] = local_absmax[owned.start - first // block : owned.stop - first // block]
    group = shard_group(layer.weight)
    if group is not None:
        dist.all_reduce(absmax, group=group)
    if layer.format.double_quant:
        quantized, scale, offset = quantize_absmax(absmax)
        _keep_local(layer.absmax, quantized)
        _keep_local(layer.absmax_scale, scale)
        _keep_local(layer.absmax_offset, offset)
    else:
        _keep_local(layer.absmax, absmax)
    if layer.bias is not None:
        _load_plain(f"{name}.bias", layer.bias, reader)


def _read_elements(name: str, columns: int, first: int, end: int, reader: SafetensorsReader) -> torch.Tensor:
    """Elements [first, end) of the row-major flattened tensor, through whole rows of `columns` elements."""
    first_row, end_row = first // columns, -(-end // columns)
    rows = reader.rows(name, first_row, end_row).reshape(-1)
    return rows[first - first_row * columns : end - first_row * columns]


def _keep_local(param: torch.Tensor, whole: torch.Tensor) -> None:
    start, stop = local_range(param)
    local_part(param).view(-1).copy_(whole.view(-1)[start:stop])


def _check_shape(name: str, expected: tuple[int, ...], reader: SafetensorsReader) -> None:
    if name not in reader:
        raise ModelError(
            f"model folder {reader.folder} has no tensor {name}, which its config.json asks for. "
            "The files and the config do not belong together, or the copy is incomplete."
        )
    found = reader.shape(name)
    if found != expected:
        raise ModelError(
            f"model folder {reader.folder}: tensor {name} has shape {list(found)}, "
            f"but its config.json asks for {list(expected)}."
        )


def checkpoint_bytes(folder: Path) -> int:
    """Bytes of all weight files of a model folder."""
    return sum(os.path.getsize(file) for file in set(weight_files(folder).values()))
