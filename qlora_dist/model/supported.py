"""Models that are supported, and refusals of others with the reason."""

# Tested by tests/distributed/test_families.py and tests/unit/model/test_text_reach.py.

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel

from qlora_dist.errors import ModelError
from qlora_dist.model.experts import expert_stacks
from qlora_dist.model.linear_layers import linear_layers
from qlora_dist.model.parts import decoder_layers


def check_supported(model: PreTrainedModel, folder: Path) -> None:
    """Refuse a model of whose decoder most would be neither in 4 bits nor adapted.

    Raises:
        ModelError: it has no linear layers; or less than half of its matrices are in these.
    """
    layers, name = decoder_layers(model), type(model).__name__
    quantized = set(linear_layers(model))
    linear = {module for name, module in model.named_modules() if name in quantized}
    if not linear:
        kinds = sorted({type(module).__name__ for layer in layers for module in layer.modules()})
        raise ModelError(
            f"model.path {folder}: {name} has no nn.Linear in its decoder layers "
            f"(it uses {', '.join(kinds[:6])}), so there is nothing to quantize and nowhere to put "
            "adapters. "
            "Use a model with nn.Linear projections, such as Llama, Mistral, Qwen, Gemma or Phi."
        )
    sizes = matrices(layers)
    inside = {f"{id(module)}.weight" for module in linear}
    stacks = (name.rpartition(".") for name in expert_stacks(model))
    inside |= {f"{id(model.get_submodule(owner))}.{leaf}" for owner, _, leaf in stacks}
    left = {key: size for key, size in sizes.items() if key not in inside}
    num_left, num_all = sum(left.values()), sum(sizes.values())
    if 2 * num_left > num_all:
        raise ModelError(
            f"model.path {folder}: {num_left / num_all:.0%} of the matrices in {name}'s decoder "
            f"layers are in no nn.Linear ({_largest_left(layers, inside)}). They would stay in 16 "
            "bits and get no adapters, so it is refused. Use a model that keeps its weights in "
            "nn.Linear layers, such as Llama, Mistral, Qwen3, Gemma or Phi."
        )


def matrices(layers: Iterable[nn.Module]) -> dict[str, int]:
    """Return the elements of all parameters with two or more dimensions, but for embeddings.

    Returns:
        by the id of the module and the parameter's name, each once.
    """
    return {
        f"{id(module)}.{leaf}": param.numel()
        for layer in layers
        for module in layer.modules()
        for leaf, param in module.named_parameters(recurse=False)
        if param.ndim > 1 and not isinstance(module, nn.Embedding)
    }


def _largest_left(layers: Iterable[nn.Module], inside: set[str]) -> str:
    """Name the largest matrix outside of linear layers, with its shape and what it may be."""
    found = [
        (param.numel(), f"{type(module).__name__}.{leaf}", tuple(param.shape))
        for layer in layers
        for module in layer.modules()
        for leaf, param in module.named_parameters(recurse=False)
        if param.ndim > 1 and f"{id(module)}.{leaf}" not in inside
    ]
    _, name, shape = max(found)
    what = "fused experts, " if len(shape) > 2 else ""
    return f"the largest: {what}{name} of shape {list(shape)}"
