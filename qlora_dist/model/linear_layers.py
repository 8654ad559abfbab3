"""Linear layers of a model that are kept in 4 bits and adapted, and the others with the reason."""

# Tested by tests/unit/model/test_text_reach.py and tests/distributed/test_families.py.

from __future__ import annotations

import copy
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import PreTrainedModel

from qlora_dist.model.parts import is_linear
from qlora_dist.model.text_reach import layers_read_by_code, reached_by_text

_found: WeakKeyDictionary[nn.Module, dict[str, str]] = WeakKeyDictionary()


def linear_layers(base: PreTrainedModel) -> list[str]:
    """Return the names of the linear layers that are kept in 4 bits and may carry adapters."""
    return [name for name, reason in linear_layers_and_reasons(base).items() if not reason]


def linear_layers_and_reasons(base: PreTrainedModel) -> dict[str, str]:
    """Return each linear layer's name, and the reason why it stays in 16 bits; empty for others.

    These are the output head, layers that the architecture wants in float32 (some routers and
    gates), layers that text does not reach, and those whose weight other code reads. The first call
    for a model comes before its layers are replaced.
    """
    if base not in _found:
        _found[base] = _reasons(base)
    return _found[base]


def _reasons(base: PreTrainedModel) -> dict[str, str]:
    head, reached = base.get_output_embeddings(), reached_by_text(base)
    kept = set(getattr(base, "_keep_in_fp32_modules", None) or ())
    read = layers_read_by_code(base)

    def reason(name: str, module: nn.Module) -> str:
        if module is head:
            return "the output head"
        if kept & set(name.split(".")):
            return "kept in float32 by its architecture"
        if not _makes_product(module):
            return "its class makes more of it than a product"
        if name in read:
            return "its weight is read by the model's own code"
        return "" if reached is None or name in reached else "text does not pass through it"

    named = base.named_modules()
    return {name: reason(name, module) for name, module in named if is_linear(module)}


def _makes_product(module: nn.Linear) -> bool:
    """True if a layer of a model's own class returns one tensor of the product's shape.

    Some routers are linear layers whose forward returns the choice of experts.
    """
    if type(module).forward is nn.Linear.forward:
        return True
    described = copy.deepcopy(module).to("meta")
    try:
        result = described(
            torch.empty(2, module.in_features, device="meta", dtype=module.weight.dtype)
        )
    except Exception:  # noqa: BLE001 - a family's own code
        return False
    return isinstance(result, torch.Tensor) and result.shape == (2, module.out_features)
