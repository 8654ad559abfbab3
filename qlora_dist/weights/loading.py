"""Weights from safetensors to their place: each rank reads and quantizes only the rows it keeps.

The whole model never exists in one place. For each tensor, a rank opens the memory-mapped file,
reads the rows that cover its shard, quantizes those, and copies the result into its shard. Ranks
exchange nothing but the float32 maxima of quantization blocks, because double quantization
subtracts their mean over the whole matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch import distributed as dist
from transformers import PreTrainedModel

from qlora_dist.errors import ModelError
from qlora_dist.model.experts import QuantizedStack
from qlora_dist.model.nf4 import QuantizedLinear, quantize_absmax, quantize_blocks
from qlora_dist.model.parts import base_model, decoder_layers, saved_buffers
from qlora_dist.runtime.shards import keep_local, local_part, local_range, shard_group, whole_shape
from qlora_dist.weights.check_headers import check_headers
from qlora_dist.weights.files import weight_files
from qlora_dist.weights.names import checkpoint_name, reader_of, unused_tensors
from qlora_dist.weights.prequantized import has_state, load_prequantized
from qlora_dist.weights.reader import SafetensorsReader

_MAX_MAPPED_BYTES = 2**24
"""Bytes read between two unmappings: pages of mapped files count as this process's memory."""

OnProgress = Callable[[int, int], None]
"""Function of the checkpoint bytes read and the decoder layers filled so far."""


def materialize(
    model: PeftModel | PreTrainedModel, device: torch.device, compute_device: torch.device
) -> None:
    """Allocate this rank's part of every meta parameter, with undefined contents.

    Buffers keep their values. ZeRO-3 has allocated the parameters already: then only buffers move.

    Args:
        device: device of the parameters.
        compute_device: device of the buffers; another one when the shards are offloaded to the
            host.
    """
    # `to_empty` would discard buffers too, and no checkpoint holds them.
    buffers = {
        (module, name): buffer
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
    }
    is_described_only = any(param.is_meta for param in model.parameters())
    if is_described_only:
        model.to_empty(device=device)
    for (module, name), buffer in buffers.items():
        module._buffers[name] = buffer.to(compute_device)
    if is_described_only:
        # `to_empty` gave each use of a shared parameter memory of its own.
        base_model(model).tie_weights()


@dataclass(frozen=True)
class LoadStats:
    """Work that loading took on this rank."""

    bytes_read: int
    elements_quantized: int
    unused: tuple[str, ...] = ()
    """Tensors of the files that the model has no place for."""


@torch.no_grad()
def load_base_weights(
    model: nn.Module, folder: Path, device: torch.device, on_progress: OnProgress = lambda *_: None
) -> LoadStats:
    """Fill the frozen base of a materialized model from `folder`, quantizing on the way.

    Adapters are left alone. Buffers that belong to the saved model (Gemma 4 scales its layers by
    one) get the values of the files, if these hold them.

    Args:
        model: skeleton with adapters, possibly sharded, after :func:`materialize`.
        device: device that quantizes; the parameters themselves may be on the host.

    Raises:
        ModelError: a tensor is missing, not finite, or not of the model's shape or type.
    """
    with reader_of(model, folder) as reader:
        check_files(model, reader)
        unused = unused_tensors(model, reader)
        done: set[int] = set()
        layers = {id(layer): number for number, layer in enumerate(decoder_layers(model))}
        num_layers = released = 0
        finite: dict[str, Tensor] = {}
        group = None
        for name, module in model.named_modules():
            num_layers = layers.get(id(module), num_layers)
            if reader.bytes_read - released > _MAX_MAPPED_BYTES:
                reader.release()
                released = reader.bytes_read
            if isinstance(module, QuantizedLinear):
                stored = checkpoint_name(name)
                load = load_prequantized if has_state(stored, reader) else _load_quantized
                finite[f"{stored}.weight"] = load(stored, module, reader, device)
                group = shard_group(module.weight)
                if module.bias is not None:
                    _load_plain(f"{stored}.bias", module.bias, reader)
            elif isinstance(module, QuantizedStack):
                stored = checkpoint_name(name)
                finite[stored] = _load_stack(stored, module, reader, device)
                group = shard_group(module.weight)
            else:
                for leaf, param in _own_base_parameters(name, module):
                    if id(param) not in done:  # tied embeddings are one parameter under two names
                        stored = checkpoint_name(f"{name}.{leaf}")
                        _load_plain(stored, param, reader)
                        done.add(id(param))
                        # Other types have the range of the stored ones; 65,504 is float16's
                        # largest.
                        if param.dtype == torch.float16:
                            finite[stored] = torch.isfinite(local_part(param)).all().to(device)
            for leaf, buffer in saved_buffers(module):
                if (stored := checkpoint_name(f"{name}.{leaf}")) in reader:
                    buffer.copy_(reader.whole(stored))
            on_progress(reader.bytes_read, num_layers)
        on_progress(reader.bytes_read, len(layers))
    if finite:
        _refuse_not_finite(finite, folder, group)
    return LoadStats(reader.bytes_read, reader.elements_quantized, tuple(unused))


def check_files(model: nn.Module, reader: SafetensorsReader) -> None:
    """Hold the headers of the files against a model, described or materialized.

    Raises:
        ModelError: see :func:`~qlora_dist.weights.check_headers.check_headers`.
    """
    plain: dict[str, tuple[int, ...]] = {}
    layers: dict[str, QuantizedLinear] = {}
    done: set[int] = set()
    for name, module in model.named_modules():
        own = dict(_own_base_parameters(name, module))
        if isinstance(module, QuantizedLinear):
            layers[checkpoint_name(name)] = module
            own = {"bias": module.bias} if module.bias is not None else {}
        elif isinstance(module, QuantizedStack):
            plain[checkpoint_name(name)] = tuple(module.shape)
            own = {}
        for leaf, param in own.items():
            if id(param) not in done:
                plain[checkpoint_name(f"{name}.{leaf}")] = tuple(whole_shape(param))
                done.add(id(param))
        for leaf, buffer in saved_buffers(module):
            if (stored := checkpoint_name(f"{name}.{leaf}")) in reader:
                plain[stored] = tuple(buffer.shape)
    check_headers(plain, layers, reader)


def _refuse_not_finite(
    finite: dict[str, Tensor], folder: Path, group: dist.ProcessGroup | None
) -> None:
    """Refuse weights that are not finite, on all ranks; a collective of one sum for the model."""
    # Only the rank whose rows hold a NaN can see it, but all must stop. (num_tensors,) float32
    bad = torch.stack(list(finite.values())).logical_not().float()
    if group is not None:
        dist.all_reduce(bad, group=group)
    names = [name for name, is_bad in zip(finite, bad.tolist(), strict=True) if is_bad]
    if names:
        more = f" (and in {len(names) - 1} more)" if len(names) > 1 else ""
        raise ModelError(
            f"model folder {folder}: tensor {names[0]} holds values that are not finite (NaN or "
            f"infinity){more}. Every output of the model would be NaN. Copy the model again, or "
            "use another version of it. With model.dtype: float16, values above 65,504 become "
            "infinite: set model.dtype: bfloat16 or float32."
        )


def _own_base_parameters(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    if ".lora_" not in name:
        yield from module.named_parameters(recurse=False)


def _load_plain(name: str, param: nn.Parameter, reader: SafetensorsReader) -> None:
    local_part(param).view(-1).copy_(reader.elements(name, *local_range(param)))


def _load_quantized(
    name: str, layer: QuantizedLinear, reader: SafetensorsReader, device: torch.device
) -> Tensor:
    """Fill this rank's part of a layer from a 16-bit matrix.

    Returns:
        0-dim bool on `device`: all values that this rank read are finite.
    """
    numel = layer.out_features * layer.in_features
    absmax = torch.zeros(layer.format.num_blocks(numel), dtype=torch.float32, device=device)
    own = local_range(layer.weight)
    packed, is_finite = _quantize_part(f"{name}.weight", 0, own, absmax, layer, reader)
    local_part(layer.weight).view(-1).copy_(packed)
    group = shard_group(layer.weight)
    if group is not None:
        dist.all_reduce(absmax, group=group)
    if layer.format.double_quant:
        absmax, scale, offset = quantize_absmax(absmax)
        keep_local(layer.absmax_scale, scale)
        keep_local(layer.absmax_offset, offset)
    keep_local(layer.absmax, absmax)
    return is_finite


def _load_stack(
    name: str, stack: QuantizedStack, reader: SafetensorsReader, device: torch.device
) -> Tensor:
    """Fill this rank's part of a stack of experts, each of them a matrix of its own.

    Returns:
        0-dim bool on `device`: all values that this rank read are finite.
    """
    num_experts, numel = stack.shape[0], stack.numel
    num_bytes, num_blocks = -(-numel // 2), stack.format.num_blocks(numel)
    first, end = local_range(stack.weight)
    absmax = torch.zeros(num_experts, num_blocks, dtype=torch.float32, device=device)
    finite, part = torch.tensor(True, device=device), local_part(stack.weight).view(-1)
    for expert in range(first // num_bytes, -(-end // num_bytes)):
        begin = expert * num_bytes
        own = max(first, begin) - begin, min(end, begin + num_bytes) - begin
        packed, is_finite = _quantize_part(name, expert * numel, own, absmax[expert], stack, reader)
        part[begin + own[0] - first : begin + own[1] - first].copy_(packed)
        finite = finite & is_finite
    group = shard_group(stack.weight)
    if group is not None:
        dist.all_reduce(absmax, group=group)
    if stack.format.double_quant:
        nested = [quantize_absmax(one) for one in absmax]
        codes, scale, offset = (torch.cat(parts) for parts in zip(*nested, strict=True))
        keep_local(stack.absmax_scale, scale)
        keep_local(stack.absmax_offset, offset)
        absmax = codes
    keep_local(stack.absmax, absmax)
    return finite


def _quantize_part(
    name: str,
    offset: int,
    own: tuple[int, int],
    absmax: Tensor,
    layer: QuantizedLinear | QuantizedStack,
    reader: SafetensorsReader,
) -> tuple[Tensor, Tensor]:
    """Quantize this rank's part of one matrix.

    Args:
        offset: the matrix's first element in the tensor `name`.
        own: range of the packed bytes of the matrix that this rank keeps.
        absmax: (num_blocks,) float32, zeros; gets the maxima of the blocks that begin in `own`.

    Returns:
        those bytes, (end - first,) uint8, and true if all values are finite, 0-dim bool.
    """
    fmt, (first_byte, end_byte) = layer.format, own
    numel = (
        layer.numel if isinstance(layer, QuantizedStack) else layer.out_features * layer.in_features
    )
    # Elements of the blocks that these bytes touch, two elements in a byte. A block at a border is
    # quantized by both neighbors.
    block = fmt.block_size
    first = 2 * first_byte // block * block
    end = min(numel, -(-2 * end_byte // block) * block)
    if end <= first:
        nothing = torch.empty(0, dtype=torch.uint8, device=absmax.device)
        return nothing, torch.tensor(True, device=absmax.device)
    stored = reader.elements(name, offset + first, offset + end)
    elements = stored.to(absmax.device, torch.bfloat16)
    reader.elements_quantized += end - first
    packed, local_absmax = quantize_blocks(elements, fmt)
    # Only the rank that holds a block's first byte contributes it, so that the sum is exact.
    owned = slice(-(-2 * first_byte // block), -(-2 * end_byte // block))
    absmax[owned] = local_absmax[owned.start - first // block : owned.stop - first // block]
    own_bytes = packed.view(-1)[first_byte - first // 2 : end_byte - first // 2]
    return own_bytes, torch.isfinite(elements).all()


def checkpoint_bytes(folder: Path) -> int:
    """Return the bytes of all weight files of a model folder."""
    return sum(file.stat().st_size for file in set(weight_files(folder).values()))
