"""DoRA (https://arxiv.org/abs/2402.09353): every row of the adapted weight has a trained length of its own.

With W the frozen base, s BA the update and m the magnitudes, a layer computes m / ||W + s BA|| * (W + s BA) x, row by
row (eq. 5), with the lengths taken as constants in backward (section 4.3).

peft's implementation dequantizes only weights of bitsandbytes' own class, and obtains BA by sending an identity matrix
of in_features x in_features through A and B, since it must not look at parameters that an engine may hold in parts.
Here the weights are whole whenever an adapted layer runs, so BA is one small product, added to W a few rows at a time.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import LoraVariant
from torch import nn

from qlora_dist.model.nf4 import QuantizedLinear
from qlora_dist.runtime.shards import keep_local

_ADAPTER = "default"
"""peft's name for the one adapter of a model."""

_PIECE = 2**24
"""Elements of the adapted weight that exist in float32 at a time: 64 MiB instead of 900 for the largest matrix of a
70B model."""


class Magnitude(nn.Module):
    """The trained lengths of a layer's rows, (out_features,) float32; created empty on the meta device."""

    def __init__(self, out_features: int, trainable: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(
            torch.empty(out_features, device="meta", dtype=torch.float32), trainable
        )
        self._lengths: torch.Tensor | None = None

    def train(self, mode: bool = True) -> Magnitude:
        self._lengths = None
        return super().train(mode)

    def factor(self, layer: LoraLayer) -> torch.Tensor:
        """What the rows of W + s BA are multiplied by, (out_features,) float32.

        In eval mode without gradients nothing changes between calls, so lengths are computed at the first one only:
        otherwise each generated token would cost a pass over the whole dequantized model.
        """
        if self.training or torch.is_grad_enabled():
            return self.weight / row_lengths(layer)
        if self._lengths is None:
            self._lengths = row_lengths(layer)
        return self.weight / self._lengths


class DoraVariant(LoraVariant):
    """Takes the place of peft's variant of the same method in its LoRA layers."""

    @staticmethod
    def init(module: LoraLayer, adapter_name: str, **kwargs: Any) -> None:
        """Give a layer its magnitudes, without values; they come with :func:`init_magnitudes` or from a file."""
        trainable = module.lora_A[adapter_name].weight.requires_grad
        module.lora_magnitude_vector[adapter_name] = Magnitude(module.out_features, trainable)
        module.lora_variant[adapter_name] = DoraVariant()
        module.use_dora[adapter_name] = True

    @staticmethod
    def forward(
        module: LoraLayer, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **kwargs: Any
    ) -> (
        torch.Tensor
    ):  # x (..., in_features), result = W x + bias (..., out_features) -> (..., out_features)
        base, dropout = module.get_base_layer(), module.lora_dropout[active_adapter]
        factor = module.lora_magnitude_vector[active_adapter].factor(module)
        if module.training and not isinstance(dropout, nn.Identity):
            # As peft has it: dropout acts on all that DoRA adds, (factor - 1) W x included, but not on W x itself.
            x = dropout(x)
            product = _without_bias(base(x), base)
            rest = result - product
        else:
            product = _without_bias(result, base)
            rest = base.bias
        product = (
            product
            + module.lora_B[active_adapter](module.lora_A[active_adapter](x))
            * module.scaling[active_adapter]
        )
        # The factor stays in float32: it can differ from 1 by less than bfloat16 can show.
        scaled = factor * product
        return (scaled if rest is None else scaled + rest).to(result.dtype)


def _without_bias(output: torch.Tensor, base: nn.Module) -> torch.Tensor:
    return output if base.bias is None else output - base.bias


@torch.no_grad()
def row_lengths(layer: LoraLayer) -> torch.Tensor:
    """||W + s BA|| of each row, (out_features,) float32; all parameters of the layer must be whole."""
    base = layer.get_base_layer()
    weight = base.dequantized() if isinstance(base, QuantizedLinear) else base.weight
    rows = max(1, _PIECE // layer.in_features)
    lora_a, lora_b = layer.lora_A[_ADAPTER].weight, layer.lora_B[_ADAPTER].weight
    with torch.autocast(weight.device.type, enabled=False):
        lengths = [
            torch.linalg.vector_norm(
                torch.addmm(part.float(), b, lora_a, alpha=layer.scaling[_ADAPTER]), dim=1
            )
            for part, b in zip(weight.split(rows), lora_b.split(rows), strict=True)
        ]
    return torch.cat(lengths)


@torch.no_grad()
def init_magnitudes(layers: Iterable[LoraLayer]) -> None:
    """Set each magnitude to the length of its row, so that the layer starts as without DoRA; a collective.

    Args:
        layers: each with its parameters whole while it is the current one. Values are kept after the last of them.
    """
    lengths = {layer: row_lengths(layer) for layer in layers}
    for layer, whole in lengths.items():
        keep_local(layer.lora_magnitude_vector[_ADAPTER].weight, whole)
