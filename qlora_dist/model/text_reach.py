"""Modules that text passes through, found by running a description of the model.

A copy on the meta device takes a training step's forward: nothing is computed, but each module that
is called shows. Text does not reach the towers of a multimodal wrapper, nor some layers of a family
whose code takes a weight itself instead of calling the layer.
"""

# Tested by tests/unit/model/test_text_reach.py.

from __future__ import annotations

import copy
import inspect
import re
from itertools import product
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import PreTrainedModel

# Changed in place, or handed to a function as it is. A slice (Bloom's) is taken in rare settings
# only: then the layer is not called, and text does not reach it.
_WEIGHT_READ = re.compile(r"(?<!isinstance\()\bself\.(\w+)\.weight(?:\.data\b|\s*[,)])")
_reached: WeakKeyDictionary[nn.Module, frozenset[str] | None] = WeakKeyDictionary()


def reached_by_text(model: PreTrainedModel) -> frozenset[str] | None:
    """Return the names of the modules that a forward of text calls while the model trains.

    The first call for a model runs it on the meta device: before layers are replaced.

    Returns:
        None if the model's code does not run there, as where it looks at values.
    """
    if model not in _reached:
        _reached[model] = _run_on_meta(model)
    return _reached[model]


@torch.no_grad()
def _run_on_meta(model: PreTrainedModel) -> frozenset[str] | None:
    called: set[str] = set()
    described = copy.deepcopy(model).to("meta").train()
    for name, module in described.named_modules():
        module.register_forward_pre_hook(lambda _, __, name=name: called.add(name))
    ids = torch.zeros(1, 4, dtype=torch.long, device="meta")
    positions = torch.arange(4, device="meta").unsqueeze(0)
    # Masks are made by looking at values, except where the caller brings one of four dimensions.
    mask = torch.ones(1, 1, 4, 4, dtype=torch.bool, device="meta")
    called_with: tuple[dict[str, torch.Tensor], ...] = (
        {"attention_mask": mask, "position_ids": positions},
        {"attention_mask": mask},
        {"position_ids": positions},
        {},
    )
    for attention, inputs in product((None, "eager"), called_with):
        called.clear()
        try:
            if attention:
                described.set_attn_implementation(attention)
            described(input_ids=ids, use_cache=False, **inputs)
        except Exception:  # noqa: BLE001 - a family's own code, or one that came with the model
            continue
        return frozenset(called)
    return None


def layers_read_by_code(model: nn.Module) -> frozenset[str]:
    """Return the names of layers whose weight the model's own code reads, by its source.

    Fused kernels take it (Mamba's), and some families change it in place while they train (Gemma
    3n). Such a weight must stay an ordinary matrix, and an adapter beside it would be passed by.
    """
    kinds = {type(module) for module in model.modules()}
    read = {kind: _weights_read(kind) for kind in kinds}
    return frozenset(
        f"{name}.{child}".lstrip(".")
        for name, module in model.named_modules()
        for child in read[type(module)]
        if child in module._modules
    )


def _weights_read(kind: type[nn.Module]) -> frozenset[str]:
    """Return the names of children whose weight a class reads outside of its initialization."""
    if kind.__module__.partition(".")[0] in ("torch", "peft", "bitsandbytes", "qlora_dist"):
        return frozenset()
    found: set[str] = set()
    for name, method in inspect.getmembers(kind, inspect.isfunction):
        if name in ("__init__", "_init_weights") or method.__qualname__.startswith("Module."):
            continue
        try:
            found.update(_WEIGHT_READ.findall(inspect.getsource(method)))
        except (OSError, TypeError):  # made at run time: there is no source
            continue
    return frozenset(found)


class LeftOut(nn.Module):
    """The names of a module's children, without their weights.

    They stay so that names of adapters tell the language model's layers from those of a tower.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        for name, child in module.named_children():
            self.add_module(name, LeftOut(child))


def leave_out_towers(model: PreTrainedModel) -> None:
    """Replace the parts of a multimodal wrapper that text does not pass through, on meta.

    Nothing is replaced in a model of text alone, or where it is not known what text reaches.
    """
    reached = reached_by_text(model)
    if reached is None or model.config.get_text_config() is model.config:
        return
    kept = {id(module) for module in model.get_decoder().modules()}
    kept |= {id(part) for part in (model.get_input_embeddings(), model.get_output_embeddings())}
    towers: list[str] = []
    for name, module in list(model.named_modules()):
        is_inside = any(name.startswith(f"{tower}.") for tower in towers)
        is_needed = name in reached or any(id(part) in kept for part in module.modules())
        if not is_inside and not is_needed and any(True for _ in module.parameters()):
            towers.append(name)
    for name in towers:
        model.set_submodule(name, LeftOut(model.get_submodule(name)))


def left_out_towers(model: nn.Module) -> list[str]:
    """Return the names of the parts that :func:`leave_out_towers` replaced."""
    names = [name for name, module in model.named_modules() if isinstance(module, LeftOut)]
    return [name for name in names if name.rpartition(".")[0] not in names]
