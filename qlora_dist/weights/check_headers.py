"""Comparison of a model's parameters with the headers of its files, before any weight is read.

Every rank reads the same headers and finds the same mistake, before it waits for another rank in a
collective.
"""

# Tested by tests/unit/weights/test_loading.py and tests/distributed/test_prequantized.py.

from __future__ import annotations

import difflib
from collections.abc import Mapping

from qlora_dist.errors import ModelError
from qlora_dist.model.nf4 import QuantizedLinear
from qlora_dist.weights.prequantized import check_stored_matrix, has_state
from qlora_dist.weights.reader import SafetensorsReader

FLOATS = ("BF16", "F16", "F32", "F64")
"""Types of ordinary weights. 8-bit floats are missing: they mean nothing without their scales."""


def check_headers(
    plain: Mapping[str, tuple[int, ...]],
    layers: Mapping[str, QuantizedLinear],
    reader: SafetensorsReader,
) -> None:
    """Refuse files that lack a tensor of the model, or hold it in another shape or type.

    Args:
        plain: shapes of the tensors that are not in 4 bits, by name in the files.
        layers: the 4-bit linear layers, by name in the files without `.weight`; stored in 4 bits or
            in 16.

    Raises:
        ModelError: a tensor is missing, or has another shape or type.
    """
    _check_names([*(f"{name}.weight" for name in layers), *plain], reader)
    for name, shape in plain.items():
        _check_plain(name, shape, reader)
    for name, layer in layers.items():
        if has_state(name, reader) and "quantization_config" in reader.config:
            check_stored_matrix(name, layer, reader)
        else:
            _check_plain(f"{name}.weight", (layer.out_features, layer.in_features), reader)


def _check_names(needed: list[str], reader: SafetensorsReader) -> None:
    missing = [name for name in needed if name not in reader]
    if not missing:
        return
    if 2 * len(missing) >= len(needed):  # another architecture, not an incomplete copy
        unused = sorted(set(reader.names()) - set(needed))[:1000]
        kind = reader.config.get("model_type", "an unknown architecture")
        named = reader.config.get("architectures") or [kind]
        near = difflib.get_close_matches(missing[0], unused, n=1, cutoff=0) or ["nothing else"]
        raise ModelError(
            f"model folder {reader.folder}: its config.json describes "
            f"{', '.join(map(str, named))}, but {len(missing)} of the {len(needed)} tensors of "
            f"that architecture are not in the files: {missing[0]}, for example, where the files "
            f"hold {near[0]}. config.json and weights belong to different models: copy both from "
            "the same place."
        )
    raise ModelError(
        f"model folder {reader.folder} has no tensor {missing[0]}, which its config.json asks for. "
        "The files and the config do not belong together, or the copy is incomplete."
    )


def _check_plain(name: str, expected: tuple[int, ...], reader: SafetensorsReader) -> None:
    found, dtype = reader.shape(name), reader.dtype(name)
    if f"{name}.absmax" in reader:
        raise ModelError(_explain_packed(name, reader))
    if found != expected:
        raise ModelError(
            f"model folder {reader.folder}: tensor {name} has shape {list(found)}, "
            f"but its config.json asks for {list(expected)}. "
            "The files and the config do not belong together: copy both from the same place."
        )
    if dtype not in FLOATS:
        raise ModelError(
            f"model folder {reader.folder}: tensor {name} has the type {dtype}, not one of "
            f"{', '.join(FLOATS)}. Weights of another type are meaningless without their scales: "
            "give the original 16-bit model."
        )


def _explain_packed(name: str, reader: SafetensorsReader) -> str:
    """Say why a tensor that is stored in 4 bits cannot be read as an ordinary one."""
    stored = f"model folder {reader.folder}: tensor {name} is stored in 4 bits"
    if has_state(name.removesuffix(".weight"), reader):
        why = "config.json has no quantization_config"
        if "quantization_config" in reader.config:
            why = "is not a linear layer of this architecture"
        return f"{stored}, but {why}. Copy config.json and weights from the same place."
    return (
        f"{stored} (there is a {name}.absmax), but without its quantization state, "
        f"{name}.quant_state.bitsandbytes__nf4 or __fp4. Shape and block size are unknown without "
        "it: copy the model again, or make the 4-bit model anew with `qlora-dist quantize`."
    )
