"""Decoder layers compiled by `torch.compile`: elementwise work between products in few kernels.

Each layer is compiled by itself, not the whole model. Layers of a kind share their code, so that
compiling takes as long for 80 layers as for two. Sharding gathers weights, and recomputation
starts over, between layers: outside of the compiled code.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, _dynamo, nn

from qlora_dist.errors import LaunchError

_COMPILER: dict[str, Any] = {
    "backend": "inductor",
    # Dropout draws the numbers that it draws uncompiled: the compiler's own generator would make
    # a different run of it.
    "options": {"fallback_random": True},
}

# Codes of a layer's function. Each kind of layer (sliding attention or not) needs one for the first
# length of rows and one for all others, with a mask and without, for one row and for several.
# Beyond torch's default of 8, layers would silently run uncompiled.
_TRACING = {"recompile_limit": 64}


def compile_layers(layers: list[nn.Module], device: torch.device) -> None:
    """Let layers run compiled code in training, made in the first steps.

    Comes before recomputation and sharding. Evaluation runs the layers uncompiled: rows of its
    lengths would need code of their own.

    Raises:
        LaunchError: nothing can be compiled on this machine.
    """
    check_compiler(device)
    for layer in layers:
        layer.forward = CompiledForward(layer)


def check_compiler(device: torch.device) -> None:
    """Compile a tiny function; takes a few seconds, once per machine.

    Raises:
        LaunchError: the compilation failed.
    """
    try:
        torch.compile(lambda x: x.sin() + 1, **_COMPILER)(torch.ones(8, device=device))
    except Exception as error:  # noqa: BLE001 - each part of the compiler raises its own kind
        reason = next(filter(str.strip, str(error).splitlines()), type(error).__name__)
        is_cpu = device.type == "cpu"
        needs = "a C++ compiler such as g++" if is_cpu else "a C compiler such as gcc, and triton"
        raise LaunchError(
            "memory.compile is true, but torch.compile does not work on this machine's "
            f"{device.type}: {reason} It needs {needs}. "
            "Install that, or set memory.compile: false."
        ) from None


class CompiledForward:
    """Compiled stand-in for a layer's `forward`.

    It replaces the method, not the layer: hooks stay outside, and parameters keep their names.
    """

    def __init__(self, layer: nn.Module) -> None:
        self._layer, self._plain = layer, layer.forward
        self._compiled = torch.compile(self._plain, **_COMPILER)

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not (self._layer.training and torch.is_grad_enabled()):
            return self._plain(hidden_states, *args, **kwargs)
        if not hidden_states.requires_grad:
            # The first layer's input. Its gradient is of no use, but costs less than a separate
            # code for an input without gradient.
            hidden_states = hidden_states.detach().requires_grad_()
        with _dynamo.config.patch(**_TRACING):
            return self._compiled(hidden_states, *args, **kwargs)
