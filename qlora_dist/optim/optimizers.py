"""Optimizers by name: how each is made, what its state takes, and groups of parameters."""

# Tested by tests/unit/optim/test_adamw.py.

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from qlora_dist.config.schema import OptimConfig

ADAM_BETAS = (0.9, 0.999)
ADAM_EPS = 1e-8


def parameter_groups(
    params: Mapping[str, nn.Parameter], config: OptimConfig
) -> dict[float, dict[str, nn.Parameter]]:
    """Group named parameters by the multiplier of their learning rate.

    LoRA+ (https://arxiv.org/abs/2402.12354) trains B faster than A.
    """
    groups: dict[float, dict[str, nn.Parameter]] = {}
    for name, param in params.items():
        multiplier = config.lora_plus_ratio or 1.0 if ".lora_B." in name else 1.0
        groups.setdefault(multiplier, {})[name] = param
    return groups


@dataclass(frozen=True)
class OptimizerKind:
    """Facts about an optimizer that the rest of the program needs."""

    make: Callable[..., torch.optim.Optimizer]
    """Called with parameter groups and AdamW's settings by name."""
    state_bytes: int
    """Per trained parameter."""
    is_paged: bool = False
    """Its state can be evicted from a GPU to host memory."""


def _bitsandbytes(name: str) -> Callable[..., torch.optim.Optimizer]:
    """Return the maker of an optimizer of bitsandbytes, which is imported when it is called."""

    def make(groups: list[dict[str, Any]], **settings: Any) -> torch.optim.Optimizer:
        from bitsandbytes import optim

        return getattr(optim, name)(groups, **settings)

    return make


OPTIMIZERS = {
    "adamw": OptimizerKind(partial(torch.optim.AdamW, fused=True), 8),
    "adamw_8bit": OptimizerKind(_bitsandbytes("AdamW8bit"), 2),
    "paged_adamw_8bit": OptimizerKind(_bitsandbytes("PagedAdamW8bit"), 2, is_paged=True),
    "paged_adamw_32bit": OptimizerKind(_bitsandbytes("PagedAdamW32bit"), 8, is_paged=True),
}
"""Optimizers by `optim.optimizer`."""


def build_optimizer(groups_of_params: list[list[nn.Parameter]], config: OptimConfig) -> Any:
    """Make the optimizer that `optim.optimizer` names, with a parameter group for each list."""
    groups = [{"params": params} for params in groups_of_params]
    make = OPTIMIZERS[config.optimizer].make
    return make(
        groups, lr=config.lr, betas=ADAM_BETAS, eps=ADAM_EPS, weight_decay=config.weight_decay
    )
