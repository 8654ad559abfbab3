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
from transformers.core_model_loading import WeightRenaming, rename_source_key

from qlora_dist.errors import ModelError
from qlora_dist.model.nf4 import QuantFormat
from qlora_dist.model.parts import base_model, decoder_layers
from qlora_dist.model.text_reach import left_out_towers
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
    reader.rename(_renaming(base_model(model)))
    _find_tied(model, reader)
    return reader


def checkpoint_name(name: str) -> str:
    """Return a parameter's name without the parts that peft adds."""
    return name.removeprefix("base_model.model.").replace(".base_layer", "")


def in_model(formats: Mapping[str, QuantFormat], model: PreTrainedModel) -> dict[str, QuantFormat]:
    """Return formats of 4-bit layers by the layers' names in the model instead of in the files."""
    model_name = _renaming(model)
    return {
        model_name(f"{name}.weight").removesuffix(".weight"): fmt for name, fmt in formats.items()
    }


def _renaming(model: PreTrainedModel) -> Callable[[str], str]:
    """Return a function from the name of a tensor in the files to its name in the model."""
    # transformers has renamed parts of some families over time.
    steps = get_model_conversion_mapping(model)
    renamings = [step for step in steps if isinstance(step, WeightRenaming)]
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
    own, prefix = {checkpoint_name(name): tensor for name, tensor in named}, model.base_model_prefix

    def model_name(stored: str) -> str:
        name: str = rename_source_key(stored, renamings, [], prefix, own)[0]
        if name in own:
            return name
        # Data-parallel wrappers and torch.compile put their own names in front.
        bare = _WRAPPERS.sub("", stored)
        return name if bare == stored else rename_source_key(bare, renamings, [], prefix, own)[0]

    return model_name


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
        reader.rename(_renaming(model))  # no aliases: the question is which of the two are stored
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
    taken = {checkpoint_name(name) for name, _ in named}
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
