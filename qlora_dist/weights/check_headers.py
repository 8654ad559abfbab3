"""What a model asks of its files against what the files hold, from their headers alone.

Every rank reads the same headers, so all of them find the same mistake, before any of them waits for another in a
collective and before a byte of weights is read.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping

from qlora_dist.errors import ModelError
from qlora_dist.model.nf4 import QuantizedLinear
from qlora_dist.weights.prequantized import check_stored_matrix, has_state
from qlora_dist.weights.reader import SafetensorsReader

FLOATS = ("BF16", "F16", "F32", "F64")
"""Types of ordinary weights. 8-bit floats are left out: their scales are kept elsewhere."""


def check_headers(
    plain: Mapping[str, tuple[int, ...]],
    layers: Mapping[str, QuantizedLinear],
    reader: SafetensorsReader,
) -> None:
    """Refuse files that do not hold what the model needs.

    Args:
        plain: shapes of the tensors that are not in 4 bits, by name in the files.
        layers: the 4-bit linear layers, by name in the files without `.weight`; they may be stored in 4 bits or not.

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
    if 2 * len(missing) >= len(needed):
        unused = sorted(set(reader.names()) - set(needed))[:1000]
        near = difflib.get_close_matches(missing[0], unused, n=1, cutoff=0) or ["nothing else"]
        raise ModelError(
            f"model folder {reader.folder}: its config.json describes {_architecture(reader)}, but {len(missing)} of "
            f"the {len(needed)} tensors of that architecture are not in the files: {missing[0]}, for example, where "
            f"the files hold {near[0]}. config.json and weights belong to different models: copy both from the same "
            "place."
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
            f"model folder {reader.folder}: tensor {name} has the type {dtype}, not one of {', '.join(FLOATS)}. "
            "Weights of another type are meaningless without their scales: give the original 16-bit model."
        )


def _explain_packed(name: str, reader: SafetensorsReader) -> str:
    """A tensor that is stored in 4 bits where an ordinary one is needed."""
    if has_state(name.removesuffix(".weight"), reader):
        why = (
            "is stored in 4 bits, but config.json has no quantization_config"
            if "quantization_config" not in reader.config
            else "is stored in 4 bits, but is not a linear layer of this architecture"
        )
        return f"model folder {reader.folder}: tensor {name} {why}. Copy config.json and weights from the same place."
    return (
        f"model folder {reader.folder}: tensor {name} is stored in 4 bits (there is a {name}.absmax), but without its "
        f"quantization state, {name}.quant_state.bitsandbytes__nf4 or __fp4. Shape and block size are unknown without "
        "it: copy the model again, or make the 4-bit model anew with `qlora-dist quantize`."
    )


def _architecture(reader: SafetensorsReader) -> str:
    named = reader.config.get("architectures") or [
        reader.config.get("model_type", "an unknown architecture")
    ]
    return ", ".join(map(str, named))
