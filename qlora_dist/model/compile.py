"""Decoder layers compiled by `torch.compile`: the elementwise work between their matrix products in few kernels.

Layer by layer, not the model: layers of a kind share the code, so that compiling takes as long for 80 layers as for
two; sharding gathers and recomputation starts over between layers, outside of what is compiled.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import _dynamo, nn

from qlora_dist.errors import LaunchError

_COMPILER: dict[str, Any] = {
    "backend": "inductor",
    # Dropout draws what it draws without the compiler, whose own generator would make another run of it.
    "options": {"fallback_random": True},
}

_TRACING = {
    # Codes of one layer's function: for each kind of layer (sliding attention or not) one for the first length of rows
    # and one for all others, with a mask and without, for one row and for several. Beyond torch's limit of 8 layers
    # would silently run as they are.
    "recompile_limit": 64
}


def compile_layers(layers: list[nn.Module], device: torch.device) -> None:
    """Let layers compute compiled code while they train, made in the first steps; before recomputation and sharding.

    Evaluation runs the layers as they are: it would need code of its own, for rows of other lengths.

    Raises:
        LaunchError: nothing can be compiled here.
    """
    check_compiler(device)
    for layer in layers:
        layer.forward = CompiledForward(layer)


def check_compiler(device: torch.device) -> None:
    """Compile a trifle; a few seconds, once per machine.

    Raises:
        LaunchError: that failed.
    """
    try:
        torch.compile(_trifle, **_COMPILER)(torch.ones(8, device=device))
    except Exception as error:  # noqa: BLE001 - whatever is missing, each part of the compiler says in its own way
        reason = next(
            (line for line in str(error).splitlines() if line.strip()), type(error).__name__
        )
        needs = (
            "a C++ compiler such as g++"
            if device.type == "cpu"
            else "a C compiler such as gcc, and triton"
        )
        raise LaunchError(
            f"memory.compile is true, but torch.compile does not work on this machine's {device.type}: {reason} "
            f"It needs {needs}. Install that, or set memory.compile: false."
        ) from None


def _trifle(x: torch.Tensor) -> torch.Tensor:
    return x.sin() + 1


class CompiledForward:
    """Stands in the place of a layer's `forward`, not of the layer: hooks stay outside, and names what they are."""

    def __init__(self, layer: nn.Module) -> None:
        self._layer, self._plain = layer, layer.forward
        self._compiled = torch.compile(self._plain, **_COMPILER)

    def __call__(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if not (self._layer.training and torch.is_grad_enabled()):
            return self._plain(hidden_states, *args, **kwargs)
        if not hidden_states.requires_grad:
            # The first layer's input. A gradient of it is of no use, but costs less than a code of its own.
            hidden_states = hidden_states.detach().requires_grad_()
        with _dynamo.config.patch(**_TRACING):
            return self._compiled(hidden_states, *args, **kwargs)
