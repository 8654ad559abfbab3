"""Optimizers with paged state, compared bit for bit with their unpaged versions on the GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from qlora_dist.config.schema import OptimConfig
from qlora_dist.optim.optimizers import build_optimizer

_NUMEL = 2**18
"""Elements: above the 100,000 from which bitsandbytes pages; a megabyte of managed memory."""


def paged() -> dict[str, Any]:
    """Compare three steps of each paged optimizer with its unpaged version, bit for bit."""
    import bitsandbytes as bnb

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    keywords = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
    result: dict[str, Any] = {"elements": _NUMEL, "steps": 3}
    for name, plain in (
        ("paged_adamw_8bit", bnb.optim.AdamW8bit),
        ("paged_adamw_32bit", bnb.optim.AdamW32bit),
    ):
        values = torch.randn(_NUMEL, generator=torch.Generator().manual_seed(0)).to(device)
        ours, other = nn.Parameter(values.clone()), nn.Parameter(values.clone())
        config = OptimConfig(optimizer=name, lr=1e-3)  # type: ignore[arg-type]
        optimizers = build_optimizer([[ours]], config), plain([other], **keywords)
        for step in range(3):
            gradient = torch.randn(_NUMEL, generator=torch.Generator().manual_seed(step)).to(device)
            for param, optimizer in zip((ours, other), optimizers, strict=True):
                param.grad = gradient.clone()
                optimizer.step()
        state, others = optimizers[0].state[ours], optimizers[1].state[other]
        result[name] = {
            "is_paged": bool(getattr(state["state1"], "is_paged", False)),
            "same_parameters": torch.equal(ours, other),
            "same_state": all(
                torch.equal(state[key].cpu(), others[key].cpu()) for key in ("state1", "state2")
            ),
            "moved": float((ours.detach() - values).abs().max()),
        }
    return result
