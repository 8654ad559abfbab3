"""Command `quantize`: a 4-bit copy of a 16-bit model."""

# Tested by tests/unit/test_cli.py and tests/unit/weights/test_quantize.py.

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from qlora_dist.commands.startup import loading_libraries, option_named, parse


@dataclass(frozen=True)
class Options:
    """Write a model in 4 bits, so that it loads without quantizing, here and in transformers."""

    model: Annotated[str, option_named("MODEL")]
    """Folder or hub name of a 16-bit model with safetensors weights."""
    out: Annotated[str, option_named("OUT")]
    """Folder to write, new or empty."""
    quantization: Literal["nf4", "fp4"] = "nf4"
    """4-bit data type."""
    double_quant: Literal["true", "false"] = "true"
    """Quantize the quantization constants too (0.37 bits per parameter less)."""
    block_size: Literal[64, 128] = 64
    """Weights that share one quantization constant."""


def main(argv: list[str]) -> None:
    """Write MODEL in 4 bits to OUT."""
    options = parse(Options, argv, "qlora-dist quantize", positional=True)
    from qlora_dist.weights.files import check_new_folder, looks_like_hub_name, resolve_model_folder

    # Both folders are checked before torch loads.
    check_new_folder(Path(options.out))
    if not looks_like_hub_name(options.model):
        resolve_model_folder(options.model)
    with loading_libraries(sys.stdout):
        from qlora_dist.model.nf4 import QuantFormat
        from qlora_dist.weights.quantize import quantize

    fmt = QuantFormat(options.quantization, options.double_quant == "true", options.block_size)
    quantize(options.model, options.out, fmt)
