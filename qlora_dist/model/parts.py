"""Parts of a model, found once: its base, decoder layers, embedding, head and adapters."""

# Tested by tests/unit/memory/test_footprint.py and tests/distributed/test_families.py.

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from qlora_dist.errors import ModelError


@dataclass(frozen=True)
class ModelParts:
    """A model and its parts, once all its modules are in place.

    Modules are looked for once. Parameters are looked for each time, because sharding and loading
    replace them.
    """

    model: PeftModel
    """Wraps the base with adapters, and is called in a step."""

    @cached_property
    def base(self) -> PreTrainedModel:
        """The transformers model, without what peft wrapped around it."""
        return base_model(self.model)

    @cached_property
    def dimensions(self) -> Any:
        """The text part of the model's configuration."""
        return self.base.config.get_text_config()

    @cached_property
    def layers(self) -> list[nn.Module]:
        """The decoder layers in forward order, see :func:`decoder_layers`."""
        return decoder_layers(self.base)

    @cached_property
    def embedding(self) -> nn.Module:
        """Embedding of tokens."""
        return self.base.get_input_embeddings()

    @cached_property
    def head(self) -> nn.Module | None:
        """Output head; None if the model has none."""
        return self.base.get_output_embeddings()

    @property
    def adapters(self) -> dict[str, nn.Parameter]:
        """The trainable parameters by name, in model order."""
        return adapter_parameters(self.model)

    @cached_property
    def gathered_units(self) -> list[nn.Module]:
        """Modules that a sharded model gathers one at a time; the rest of it forms the last unit.

        With a tied embedding the last unit stays gathered: both ends of the model need it.
        """
        assert self.head is not None, "models without an output head are refused"
        is_tied = self.embedding.weight is self.head.weight
        return [*self.layers, *([] if is_tied else [self.embedding, self.head])]


def base_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model, without what peft wrapped around it."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The transformer blocks in forward order: the unit of sharding and of recomputation.

    Raises:
        ModelError: the model has no list of blocks.
    """
    base = base_model(model)
    # A multimodal wrapper has blocks in its towers, too. Some families call their head a decoder.
    names, embedding = set(base._no_split_modules or ()), base.get_input_embeddings()
    for place in (base.get_decoder() or base, base):
        if blocks := _blocks(place, names, embedding):
            return blocks
    name = type(base).__name__
    raise ModelError(f"{name} has no list of decoder layers, so it cannot be trained here.")


def _blocks(place: nn.Module, names: set[str], embedding: nn.Module | None) -> list[nn.Module]:
    """Return the modules of these classes, else the longest list of modules.

    Some families name more than their blocks: what holds the embedding (BERT's), or a part of a
    block (Mamba's mixers). These are left out.
    """
    modules = list(place.modules())
    # FSDP2 puts its name in front of a class's.
    named = [module for module in modules if type(module).__name__.removeprefix("FSDP") in names]
    inner = {id(part) for module in named for part in module.modules() if part is not module}
    blocks = [
        module
        for module in named
        if id(module) not in inner and all(part is not embedding for part in module.modules())
    ]
    # Code that is shipped with a model may not name its blocks.
    lists = (list(module) for module in modules if isinstance(module, nn.ModuleList))
    return blocks or max(lists, key=len, default=[])


def is_linear(module: nn.Module) -> bool:
    """True if a module is a linear layer: `nn.Linear`, or a model's own subclass of it.

    Falcon's and others' have a `forward` of their own that computes the same product. PyTorch's own
    subclasses (in `nn.MultiheadAttention`, or quantized) give their weight to others.
    """
    library = type(module).__module__.partition(".")[0]
    is_own = library not in ("torch", "bitsandbytes", "peft", "qlora_dist")
    return type(module) is nn.Linear or (isinstance(module, nn.Linear) and is_own)


def lora_layers(module: nn.Module) -> Iterator[LoraLayer]:
    """Yield all modules below `module` that carry an adapter, in forward order."""
    return (child for child in module.modules() if isinstance(child, LoraLayer))


def saved_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield a module's own numbers that are saved with a model, but are no parameters, by name."""
    for name, buffer in module.named_buffers(recurse=False):
        if name not in module._non_persistent_buffers_set and buffer.is_floating_point():
            yield name, buffer


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable parameters by name, in model order."""
    return {name: param for name, param in model.named_parameters() if param.requires_grad}
