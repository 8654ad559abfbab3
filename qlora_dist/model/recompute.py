"""Activation checkpointing: which decoder layers recompute their activations in backward instead of keeping them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from qlora_dist.config import MemoryConfig
from qlora_dist.model.activations import num_recomputed_layers


def apply_recompute(layers: list[nn.Module], memory: MemoryConfig) -> int:
    """Make the first layers recompute, as many as `memory.recompute` says; returns how many.

    Must run before sharding. The first layers, because their activations would live longest.
    """
    num_layers = num_recomputed_layers(memory.recompute, len(layers))
    for layer in layers[:num_layers]:
        _recompute(layer)
    return num_layers


def _recompute(layer: nn.Module) -> None:
    """Checkpoint the layer's `forward`, not its `__call__`: sharding hooks then stay outside and run once, and no
    wrapper module changes the parameter names that adapters are saved under."""
    plain = layer.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        if not (layer.training and torch.is_grad_enabled()):
            return plain(*args, **kwargs)
        # Non-reentrant: needs no input gradient, and hides nothing from autograd or the compiler.
        return checkpoint(plain, *args, use_reentrant=False, **kwargs)

    layer.forward = forward
