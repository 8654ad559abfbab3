"""DoRA (https://arxiv.org/abs/2402.09353): each row of the adapted weight has a trained length.

With W the frozen base, s BA the update and m the magnitudes, a layer computes
m / ||W + s BA|| * (W + s BA) x, row by row (eq. 5). Backward takes the lengths as constants
(section 4.3).

peft's implementation dequantizes only weights of bitsandbytes' own class. It must not look at
parameters that an engine may hold in parts, so it obtains BA by sending an identity matrix of
in_features x in_features through A and B. Here the weights are whole whenever an adapted layer
runs, so BA is one small product, added to W a few rows at a time.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import LoraVariant
from torch import Tensor, nn

from qlora_dist.model.nf4 import QuantizedLinear
from qlora_dist.runtime.shards import keep_local

_ADAPTER = "default"  # peft's name for the only adapter of a model

# Elements of the adapted weight that exist in float32 at a time: 64 MiB, instead of 900 MiB for the
# largest matrix of a 70B model.
_PIECE = 2**24


class Magnitude(nn.Module):
    """Trained lengths of a layer's rows, (out_features,) float32; created empty on meta."""

    def __init__(self, out_features: int, trainable: bool) -> None:
        super().__init__()
        empty = torch.empty(out_features, device="meta", dtype=torch.float32)
        self.weight = nn.Parameter(empty, trainable)
        self._lengths: Tensor | None = None

    def train(self, mode: bool = True) -> Magnitude:
        """Switch the mode and forget the lengths: training in between changes them."""
        self._lengths = None
        return super().train(mode)

    def factor(self, layer: LoraLayer) -> Tensor:
        """Return the factor of each row of W + s BA, (out_features,) float32.

        In eval mode without gradients nothing changes between calls, so only the first one computes
        the lengths. Otherwise each generated token would cost a pass over the dequantized model.
        """
        if self.training or torch.is_grad_enabled():
            return self.weight / row_lengths(layer)
        if self._lengths is None:
            self._lengths = row_lengths(layer)
        return self.weight / self._lengths


class DoraVariant(LoraVariant):
    """DoRA in peft's LoRA layers, in place of peft's own variant."""

    @staticmethod
    def init(module: LoraLayer, adapter_name: str, **kwargs: Any) -> None:
        """Give a layer empty magnitudes, filled by :func:`init_magnitudes` or from a file."""
        trainable = module.lora_A[adapter_name].weight.requires_grad
        module.lora_magnitude_vector[adapter_name] = Magnitude(module.out_features, trainable)
        module.lora_variant[adapter_name] = DoraVariant()
        module.use_dora[adapter_name] = True

    @staticmethod
    def forward(
        module: LoraLayer, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any
    ) -> Tensor:
        """Return the adapted output, (..., out_features) in the dtype of `result`.

        Args:
            x: (..., in_features).
            result: W x + bias, (..., out_features).
        """
        base, dropout = module.get_base_layer(), module.lora_dropout[active_adapter]
        factor = module.lora_magnitude_vector[active_adapter].factor(module)
        is_dropped = module.training and not isinstance(dropout, nn.Identity)
        output = result
        if is_dropped:
            # As in peft: dropout acts on all that DoRA adds, (factor - 1) W x included, but not on
            # W x itself.
            x = dropout(x)
            output = base(x)
        product = output if base.bias is None else output - base.bias
        rest = result - product if is_dropped else base.bias
        update = module.lora_B[active_adapter](module.lora_A[active_adapter](x))
        product = product + update * module.scaling[active_adapter]
        # The factor stays in float32: it can differ from 1 by less than bfloat16 can show.
        scaled = factor * product
        return (scaled if rest is None else scaled + rest).to(result.dtype)


@torch.no_grad()
def row_lengths(layer: LoraLayer) -> Tensor:
    """Return ||W + s BA|| of each row, (out_features,) float32; needs all parameters whole."""
    base, scaling = layer.get_base_layer(), layer.scaling[_ADAPTER]
    weight = base.dequantized() if isinstance(base, QuantizedLinear) else base.weight
    rows = max(1, _PIECE // layer.in_features)
    lora_a, lora_b = layer.lora_A[_ADAPTER].weight, layer.lora_B[_ADAPTER].weight
    with torch.autocast(weight.device.type, enabled=False):
        lengths = [
            torch.linalg.vector_norm(torch.addmm(part.float(), b, lora_a, alpha=scaling), dim=1)
            for part, b in zip(weight.split(rows), lora_b.split(rows), strict=True)
        ]
    return torch.cat(lengths)


@torch.no_grad()
def init_magnitudes(layers: Iterable[LoraLayer]) -> None:
    """Set each magnitude to the length of its row, so that the layer starts as without DoRA.

    A collective.

    Args:
        layers: yields each layer while its parameters are whole. Values are written after the last
            layer, when the parameters are in parts again.
    """
    lengths = {layer: row_lengths(layer) for layer in layers}
    for layer, whole in lengths.items():
        keep_local(layer.lora_magnitude_vector[_ADAPTER].weight, whole)
