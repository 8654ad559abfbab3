"""The parts of a model: its base, decoder layers and linear layers."""

from __future__ import annotations

from peft import PeftModel
from torch import nn
from transformers import (
    PreTrainedModel,
)

from qlora_dist.errors import ModelError


def linear_layers(model: PreTrainedModel) -> list[str]:
    """Names of the linear layers that are kept in 4 bits, as transformers chooses them by default.

    All but the output head, and what the architecture wants in float32 (some routers and gates).
    """
    head = model.get_output_embeddings()
    kept = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    return [
        name
        for name, module in model.named_modules()
        if type(module) is nn.Linear and module is not head and not kept & set(name.split("."))
    ]


def base_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model, without what peft wrapped around it."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The transformer blocks in forward order: the unit of sharding and of recomputation.

    Raises:
        ModelError: the model has no list of blocks.
    """
    base = base_model(model)
    block_names = set(getattr(base, "_no_split_modules", None) or ())
    blocks = [module for module in base.modules() if type(module).__name__.removeprefix("FSDP") in block_names]
    if not blocks:
        lists = [module for module in base.modules() if isinstance(module, nn.ModuleList)]
        blocks = max((list(modules) for modules in lists), key=len, default=[])
    if not blocks:
        raise ModelError(f"{type(base).__name__} has no list of decoder layers, so it cannot be trained here.")
    return blocks
