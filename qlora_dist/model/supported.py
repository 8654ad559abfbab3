"""Models that are supported, and refusals of others with the reason."""

# Tested by tests/distributed/test_families.py.

from __future__ import annotations

from pathlib import Path

from torch import nn
from transformers import PreTrainedModel

from qlora_dist.errors import ModelError
from qlora_dist.model.parts import decoder_layers


def check_supported(model: PreTrainedModel, folder: Path) -> None:
    """Refuse a model whose decoder layers cannot be kept in 4 bits with adapters.

    Raises:
        ModelError: they have fused experts or convolutions, or no linear layers.
    """
    layers = decoder_layers(model)
    fused = [name for layer in layers for name, param in layer.named_parameters() if param.ndim > 2]
    if fused:
        raise ModelError(
            f"model.path {folder}: {type(model).__name__} keeps fused experts or convolutions "
            f"({fused[0]} and {len(fused) - 1} more) instead of nn.Linear layers. They would stay "
            "in 16 bits and get no adapters, so it is refused. "
            "Use a dense model, such as Llama, Mistral, Qwen, Gemma or Phi."
        )
    if not any(isinstance(module, nn.Linear) for layer in layers for module in layer.modules()):
        kinds = sorted({type(module).__name__ for layer in layers for module in layer.modules()})
        raise ModelError(
            f"model.path {folder}: {type(model).__name__} has no nn.Linear in its decoder layers "
            f"(it uses {', '.join(kinds[:6])}), so there is nothing to quantize and nowhere to put "
            "adapters. "
            "Use a model with nn.Linear projections, such as Llama, Mistral, Qwen, Gemma or Phi."
        )
