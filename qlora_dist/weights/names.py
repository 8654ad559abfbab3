"""Names of tensors: in the files of a model, and in the model that reads them."""

# Tested by tests/unit/weights/test_another_model.py.

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from qlora_dist.errors import ModelError
from qlora_dist.model.experts import expert_stacks
from qlora_dist.model.nf4 import QuantFormat
from qlora_dist.model.parts import base_model, decoder_layers
from qlora_dist.model.text_reach import left_out_towers
from qlora_dist.weights.conversion import composed
from qlora_dist.weights.prequantized import has_state
from qlora_dist.weights.reader import SafetensorsReader

_WRAPPERS = re.compile(r"^(?:module\.|_orig_mod\.)+|(?<=\.)_orig_mod\.")
# Tensors of older files that are computed and not learned: rotations, causal masks.
_NO_WEIGHTS = (r"rotary_emb\.inv_freq$", r"\.masked_bias$", r"\.attn\.bias$")
_COMPARED_ROWS = 4096  # of head and embedding at a time


def reader_of(model: nn.Module, folder: Path) -> SafetensorsReader:
    """Return a reader of the folder's tensors by their names in the model, a context.

    Names of older versions and of wrappers are translated. A tied parameter is found by its first
    name, under whichever of its names it is stored.

    Raises:
        ModelError: two tensors of the files have one name in the model.
    """
    reader = SafetensorsReader(folder)
    _rename(base_model(model), reader)
    _find_tied(model, reader)
    return reader


def checkpoint_name(name: str) -> str:
    """Return a parameter's name without the parts that peft adds."""
    return name.removeprefix("base_model.model.").replace(".base_layer", "")


def in_model(formats: Mapping[str, QuantFormat], model: PreTrainedModel) -> dict[str, QuantFormat]:
    """Return formats of 4-bit layers by the layers' names in the model instead of in the files."""
    naming = _naming(model)[0]
    return {
        naming(f"{name}.weight")[0].removesuffix(".weight"): fmt for name, fmt in formats.items()
    }


def _rename(model: PreTrainedModel, reader: SafetensorsReader) -> None:
    """Give the tensors of the files their names in the model, composing those kept in pieces."""
    naming, converters = _naming(model)
    groups: dict[str, list[tuple[str, str]]] = {}

    def model_name(stored: str) -> str | None:
        name, pattern = naming(stored)
        if pattern is None:
            return name
        groups.setdefault(name, []).append((stored, pattern))
        return None

    reader.rename(model_name)
    reader.compose(composed(groups, converters, reader.stored_shape, model))


def _naming(
    model: PreTrainedModel,
) -> tuple[Callable[[str], tuple[str, str | None]], list[WeightConverter]]:
    """Return a function from a tensor's name in the files to that in the model, and converters.

    The function also returns the pattern of the converter that composes the model's tensor of it.
    """
    # transformers has renamed parts of some families over time, and puts others together.
    steps = get_model_conversion_mapping(model)
    renamings = [step for step in steps if isinstance(step, WeightRenaming)]
    converters = [step for step in steps if isinstance(step, WeightConverter)]
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
    own = {checkpoint_name(name): one for name, one in [*named, *expert_stacks(model).items()]}
    prefix = model.base_model_prefix

    def naming(stored: str) -> tuple[str, str | None]:
        # Data-parallel wrappers and torch.compile put their own names in front.
        for candidate in dict.fromkeys((stored, _WRAPPERS.sub("", stored))):
            name, pattern = rename_source_key(candidate, renamings, converters, prefix, own)
            if pattern is not None and name not in own and candidate in own:
                name, pattern = candidate, None  # the model has what a file may hold in pieces
            if name in own:
                break
        return name, pattern

    return naming, converters


def _find_tied(model: nn.Module, reader: SafetensorsReader) -> None:
    """Let a tied parameter be read by its first name, under whichever of its names it is stored."""
    names: dict[int, list[str]] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(param), []).append(checkpoint_name(name))
    for first, *others in names.values():
        stored = next((name for name in others if name in reader), None)
        if first not in reader and stored is not None:
            reader.alias(first, stored)


def own_head(model: PreTrainedModel, folder: Path) -> str | None:
    """Name a head in the files that is not the embedding, though the configuration ties the two.

    Args:
        model: skeleton on the meta device.

    Returns:
        name of the head's weight, or None if the files agree with the configuration.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is not embedding.weight:
        return None
    names = {id(module): f"{name}.weight" for name, module in model.named_modules()}
    ours, theirs = names[id(head)], names[id(embedding)]
    with SafetensorsReader(folder) as reader:
        _rename(model, reader)  # no aliases: the question is which of the two are stored
        if ours not in reader or theirs not in reader:
            return None
        shape = reader.shape(ours)
        if shape != reader.shape(theirs):
            return ours
        for start in range(0, shape[0], _COMPARED_ROWS):
            rows = start, min(start + _COMPARED_ROWS, shape[0])
            if not torch.equal(reader.rows(ours, *rows), reader.rows(theirs, *rows)):
                return ours
    return None


def unused_note(unused: Sequence[str]) -> str:
    """Say which tensors of the files the model has no place for."""
    names = ", ".join(unused[:3]) + (f" and {len(unused) - 3} more" if unused[3:] else "")
    return (
        f"the files hold {len(unused)} tensors that this model has no place for, and that are not "
        f"read: {names}. A model that needs them would have another config.json"
    )


def unused_tensors(model: nn.Module, reader: SafetensorsReader) -> list[str]:
    """List tensors of the files that nothing in the model takes; refuse those of decoder layers.

    Raises:
        ModelError: a decoder layer of the files, or a part of one, has no place in the model.
    """
    base = base_model(model)
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
    taken = {
        checkpoint_name(name) for name in (*(name for name, _ in named), *expert_stacks(model))
    }
    ignored = [*_NO_WEIGHTS, *(getattr(base, "_keys_to_ignore_on_load_unexpected", None) or ())]
    towers = tuple(f"{name}." for name in left_out_towers(base))  # named elsewhere
    unused = [
        name
        for name in reader.names()
        if name not in taken
        and not name.startswith(towers)
        and not has_state(name.partition(".weight.")[0], reader)  # which it may belong to
        and not any(re.search(pattern, name) for pattern in ignored)
    ]
    first = decoder_layers(model)[0]
    place = next(name for name, module in base.named_modules() if module is first)
    prefix = place.rpartition(".")[0] + "."
    if lost := [name for name in unused if name.startswith(prefix)]:
        num_layers = len(decoder_layers(model))
        raise ModelError(
            f"model folder {reader.folder} holds {len(lost)} decoder weights that its config.json "
            f"has no place for, such as {lost[0]} (it describes {num_layers} layers). They would "
            "be left out, and the model would be another one. config.json and weights do not "
            "belong together: copy both from the same place."
        )
    return unused
