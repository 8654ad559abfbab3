"""Matrices that are stored in 4 bits already, as bitsandbytes and transformers write them.

Beside the packed `X.weight` a file holds

    X.weight.absmax                          maxima of blocks, uint8 with double quantization
    X.weight.nested_absmax                   float32, with double quantization
    X.weight.quant_map, .nested_quant_map    code books
    X.weight.quant_state.bitsandbytes__nf4   or __fp4: JSON in a uint8 tensor with shape, block size
                                             and the mean that double quantization subtracted

A rank reads the bytes of its own slices, and no others.
"""

# Tested by tests/unit/weights/test_loading.py and tests/distributed/test_prequantized.py.

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora_dist.atomic import read_json
from qlora_dist.config.schema import ModelConfig
from qlora_dist.errors import ConfigError, ModelError
from qlora_dist.model.nf4 import (
    NESTED_BLOCK_SIZE,
    QuantFormat,
    QuantizedLinear,
    dynamic_code,
    four_bit_code,
)
from qlora_dist.runtime.shards import keep_local, local_part, local_range
from qlora_dist.weights.reader import SafetensorsReader

STORAGE = {
    "uint8": ("U8", 1),
    "int8": ("I8", 1),
    "bfloat16": ("BF16", 2),
    "float16": ("F16", 2),
    "float32": ("F32", 4),
    "float64": ("F64", 8),
}
"""From bitsandbytes' quant_storage to (name of the type in safetensors, bytes of an element)."""
_STATE = ".weight.quant_state.bitsandbytes__"
_REMEDY = (
    "Give the original 16-bit model, which is quantized while it is read, or make a 4-bit model of "
    "that once: qlora-dist quantize MODEL OUT."
)
_COPY = "Copy the model again, or make the 4-bit model anew with `qlora-dist quantize`."


@dataclass(frozen=True)
class StoredState:
    """Quantization state of one stored matrix."""

    format: QuantFormat
    shape: tuple[int, ...]
    """(out_features, in_features)."""
    offset: float | None
    """Mean that double quantization subtracted from the block maxima; float32, exact in JSON."""


def is_prequantized(folder: Path, quantization_config: Mapping[str, Any] | None) -> bool:
    """True if config.json says that the weights are stored in bitsandbytes' 4 bits.

    Raises:
        ModelError: they are quantized in a way that cannot be trained here.
    """
    if quantization_config is None:
        return False
    method = quantization_config.get("quant_method")
    if method is None and {"load_in_4bit", "load_in_8bit"} & quantization_config.keys():
        method = "bitsandbytes"  # as transformers wrote it before there were other methods
    if method == "bitsandbytes" and quantization_config.get("load_in_4bit"):
        return True
    what = str(method or "an unknown method").upper()
    if method == "bitsandbytes":
        what = "bitsandbytes' 8 bits (LLM.int8)"
    raise ModelError(
        f"model.path {folder} is quantized with {what}, as its config.json says "
        "(quantization_config). Trainable are 16-bit models and bitsandbytes' 4 bits (nf4, fp4). "
        f"{_REMEDY}"
    )


def formats_in(folder: Path, config: ModelConfig) -> dict[str, QuantFormat] | None:
    """Return the formats of the layers that the folder holds in 4 bits; None for a 16-bit model.

    Raises:
        ModelError: the folder has no config.json, or its quantization cannot be trained here.
        ConfigError: `config` asks for another 4-bit format.
    """
    stored = read_json(folder / "config.json", ModelError).get("quantization_config")
    if not is_prequantized(folder, stored):
        return None
    with SafetensorsReader(folder) as reader:
        return stored_formats(reader, config)


def stored_formats(reader: SafetensorsReader, config: ModelConfig) -> dict[str, QuantFormat]:
    """Return the format of each linear layer that is stored in 4 bits, by its name in the files.

    Raises:
        ModelError: no matrix has a quantization state, or their formats differ.
        ConfigError: `config` asks for another format.
    """
    names = [name.partition(_STATE)[0] for name in reader.names() if _STATE in name]
    if not names:
        raise ModelError(
            f"model folder {reader.folder}: config.json says that the weights are stored in 4 "
            f"bits, but no tensor has a quantization state (*{_STATE}nf4). If the model was merged "
            f"into 16 bits, remove quantization_config from its config.json. Otherwise: {_COPY}"
        )
    formats = {name: read_state(name, reader).format for name in names}
    kinds = {(fmt.quant_type, fmt.double_quant): name for name, fmt in formats.items()}
    if len(kinds) > 1:
        some = "; ".join(f"{name} {_kind(*kind)}" for kind, name in sorted(kinds.items()))
        raise ModelError(
            f"model folder {reader.folder} holds matrices in different 4-bit formats ({some}). "
            f"{_REMEDY}"
        )
    ((quant_type, double_quant),) = kinds
    if (config.quantization, config.double_quant) != (quant_type, double_quant):
        asked = "none"
        if config.quantization != "none":
            asked = _kind(config.quantization, config.double_quant)
        wanted = [f"model.quantization: {quant_type}"] if config.quantization != quant_type else []
        if config.double_quant != double_quant:
            wanted.append(f"model.double_quant: {str(double_quant).lower()}")
        raise ConfigError(
            f"model.path {reader.folder} is stored as {_kind(quant_type, double_quant)}, but "
            f"model.quantization and model.double_quant ask for {asked}. Stored weights are used "
            f"as they are: set {' and '.join(wanted)}, or give the original 16-bit model."
        )
    return formats


def has_state(name: str, reader: SafetensorsReader) -> bool:
    """True if the linear layer `name` (without `.weight`) is stored in 4 bits."""
    return _state_key(name, reader) is not None


def read_state(name: str, reader: SafetensorsReader) -> StoredState:
    """Read the quantization state of the linear layer `name`.

    Raises:
        ModelError: bitsandbytes writes no such state, or has no kernel for it.
    """
    key = _state_key(name, reader)
    assert key is not None
    try:
        state = json.loads(bytes(reader.whole(key).tolist()).decode("utf-8"))
        nested = "nested_offset" in state
        fmt = QuantFormat(state["quant_type"], nested, int(state["blocksize"]))
        offset = float(state["nested_offset"]) if nested else None
        shape = tuple(int(size) for size in state["shape"])
        nested_block = int(state["nested_blocksize"]) if nested else NESTED_BLOCK_SIZE
    except (ValueError, KeyError, TypeError) as error:
        what = f"is not a quantization state that bitsandbytes writes ({error!r})"
        raise _refusal(reader, key, what, _COPY) from None
    if key != f"{name}{_STATE}{fmt.quant_type}" or fmt.quant_type not in ("nf4", "fp4"):
        what = f"says that the matrix is {fmt.quant_type}, unlike its own name"
        raise _refusal(reader, key, what, _COPY)
    size = fmt.block_size
    if nested_block != NESTED_BLOCK_SIZE or size < 32 or size & (size - 1):
        what = (
            f"has blocks of {size} weights and {nested_block} constants; there are kernels for "
            f"powers of two from 32 up, and {NESTED_BLOCK_SIZE}"
        )
        raise _refusal(reader, key, what, _REMEDY)
    if offset is not None and not math.isfinite(offset):
        raise _refusal(reader, key, f"has the offset {offset}, which is not finite", _COPY)
    return StoredState(fmt, shape, offset)


def check_stored_matrix(name: str, layer: QuantizedLinear, reader: SafetensorsReader) -> None:
    """Refuse a stored matrix that does not fit `layer`; reads headers and the state only.

    Raises:
        ModelError: a tensor is missing, or has another shape or type.
    """
    shape = (layer.out_features, layer.in_features)
    state = read_state(name, reader)
    if state.shape != shape:
        what = (
            f"is stored in 4 bits with the shape {list(state.shape)}, but config.json asks "
            f"for {list(shape)}"
        )
        remedy = "The files and the config do not belong together: copy both from the same place."
        raise _refusal(reader, f"{name}.weight", what, remedy)
    assert state.format == layer.format, "the layer was built from another state"
    storage, size = _storage(reader)
    num_blocks = state.format.num_blocks(math.prod(shape))
    # By suffix: type and number of elements. Two weights in a byte.
    expected = {"": (storage, -(-math.prod(shape) // 2) // size), ".quant_map": ("F32", 16)}
    if state.format.double_quant:
        expected[".absmax"] = ("U8", num_blocks)
        expected[".nested_absmax"] = ("F32", -(-num_blocks // NESTED_BLOCK_SIZE))
        expected[".nested_quant_map"] = ("F32", 256)
    else:
        expected[".absmax"] = ("F32", num_blocks)
    for suffix, (dtype, numel) in expected.items():
        key = f"{name}.weight{suffix}"
        if key not in reader:
            raise ModelError(
                f"model folder {reader.folder} has no tensor {key}, which a 4-bit matrix needs. "
                f"{_COPY}"
            )
        if (found := reader.dtype(key)) != dtype:
            what, remedy = f"has the type {found}, but must have {dtype}", _COPY
            if not suffix:
                rule = f"bnb_4bit_quant_storage {_storage_name(reader)} ({dtype})"
                what = f"has the type {found}, but config.json says {rule}"
                remedy = f"Packed bytes do not survive a conversion to another type. {_COPY}"
            raise _refusal(reader, key, what, remedy)
        # bitsandbytes writes (n, 1); its kernels also take (1, n), and (n,) has the same bytes.
        dims = reader.shape(key)
        if math.prod(dims) != numel or max(dims, default=0) != numel:
            what = f"has the shape {list(dims)}, but must hold {numel} elements"
            raise _refusal(reader, key, what, _COPY)


def load_prequantized(
    name: str, layer: QuantizedLinear, reader: SafetensorsReader, device: torch.device
) -> Tensor:
    """Fill this rank's part of a layer from a stored matrix, bytes as they are.

    Returns:
        0-dim bool on `device`: the quantization constants that this rank read are finite.

    Raises:
        ModelError: the code books are not bitsandbytes'.
    """
    state = read_state(name, reader)
    cpu = torch.device("cpu")
    _check_code(f"{name}.weight.quant_map", four_bit_code(state.format.quant_type, cpu), reader)
    first, end = local_range(layer.weight)
    # Elements of the storage type that cover this rank's bytes.
    size = _storage(reader)[1]
    packed = reader.flat(f"{name}.weight", first // size, -(-end // size))
    # view, never to(): the bytes of a float storage are no numbers, and a conversion rewrites them.
    packed, start = packed.contiguous().view(torch.uint8), first % size
    local_part(layer.weight).view(-1).copy_(packed[start : start + end - first])
    constants = [_fill(layer.absmax, f"{name}.weight.absmax", reader)]
    if state.offset is not None:
        _check_code(f"{name}.weight.nested_quant_map", dynamic_code(cpu), reader)
        constants.append(_fill(layer.absmax_scale, f"{name}.weight.nested_absmax", reader))
        keep_local(layer.absmax_offset, torch.tensor([state.offset], dtype=torch.float32))
    return torch.stack([torch.isfinite(values).all() for values in constants]).all().to(device)


def _fill(param: Tensor, key: str, reader: SafetensorsReader) -> Tensor:
    values = reader.flat(key, *local_range(param))
    local_part(param).copy_(values)
    return values


def _check_code(key: str, code: Tensor, reader: SafetensorsReader) -> None:
    # Not bit for bit: the device that quantized computed the books, and FP4's involves a division.
    if not torch.allclose(reader.whole(key).reshape(-1), code, rtol=0, atol=1e-6):
        raise _refusal(reader, key, "is another code book than bitsandbytes' own", _REMEDY)


def _state_key(name: str, reader: SafetensorsReader) -> str | None:
    keys = (f"{name}{_STATE}{quant_type}" for quant_type in ("nf4", "fp4"))
    return next((key for key in keys if key in reader), None)


def _storage_name(reader: SafetensorsReader) -> str:
    quantization_config = reader.config.get("quantization_config") or {}
    return str(quantization_config.get("bnb_4bit_quant_storage") or "uint8")


def _storage(reader: SafetensorsReader) -> tuple[str, int]:
    name = _storage_name(reader)
    if name not in STORAGE:
        raise ModelError(
            f"model folder {reader.folder}: config.json has bnb_4bit_quant_storage {name}, but "
            f"must have one of {', '.join(STORAGE)}. {_REMEDY}"
        )
    return STORAGE[name]


def _kind(quant_type: str, double_quant: bool) -> str:
    return f"{quant_type} {'with' if double_quant else 'without'} double quantization"


def _refusal(reader: SafetensorsReader, key: str, what: str, remedy: str) -> ModelError:
    return ModelError(f"model folder {reader.folder}: tensor {key} {what}. {remedy}")
