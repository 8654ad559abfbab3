"""4-bit linear layers and their LoRA adapters as one autograd function: y = W x + b + s B A x.

peft composes y from separate layers (LoRA, https://arxiv.org/abs/2106.09685, section 4.1). That
writes a clone of W x, B A x, its multiple and the sum, each as large as the output, and three
gradients of x. Here the adapter's part goes into W x, and into W^T g in backward, inside of the
matrix product: one rounding instead of three. The scaling is a factor of that product or of a small
result. Backward keeps x and A x, and no weights: it asks the layer for them, which under sharding
have been gathered anew by then.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.bnb import Linear4bit
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from qlora_dist.model.nf4 import QuantizedLinear, result_dtype
from qlora_dist.model.parts import lora_layers


def fuse_adapters(model: nn.Module) -> str | None:
    """Let every layer with a plain adapter on a 4-bit weight compute in one function.

    Comes before or after sharding. Names, files and results stay. Layers that cannot be fused are
    computed as peft composes them.

    Returns:
        a line for the log about the layers that cannot be fused; None if there are none.
    """
    obstacles: Counter[str] = Counter()
    layers = list(lora_layers(model))
    for layer in layers:
        obstacle = _obstacle(layer)
        if obstacle is None:
            # A new class and no wrapper: parameter names come from the module tree.
            layer.__class__ = FusedLinear
        else:
            obstacles[obstacle] += 1
    if not obstacles:
        return None
    reasons = ", ".join(f"{count} for {obstacle}" for obstacle, count in obstacles.items())
    return (
        f"adapters: {obstacles.total()} of {len(layers)} layers compute base and adapter "
        f"one after the other: {reasons}"
    )


def _obstacle(layer: LoraLayer) -> str | None:
    """Return the reason why a layer cannot be fused, if there is one."""
    if not (isinstance(layer, Linear4bit) and isinstance(layer.get_base_layer(), QuantizedLinear)):
        return "a base that is not in 4 bits"
    if layer.lora_variant:
        return "another kind of adapter than plain LoRA"
    if any(layer.lora_bias.values()):
        return "a bias in the adapter"
    if any(not isinstance(dropout, nn.Identity) for dropout in layer.lora_dropout.values()):
        return "dropout"
    return None


class FusedLinear(Linear4bit):
    """peft's layer with base and adapter computed in one function.

    Shapes:
        input (..., in_features) to output (..., out_features), in the dtype of the input, or in
        that of autocast.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return W x + b + s B A x; let peft compute all but a single active adapter."""
        names = self.active_adapters
        is_single = len(names) == 1 and names[0] in self.lora_A
        if args or kwargs or self.disable_adapters or self.merged or not is_single:
            return super().forward(x, *args, **kwargs)
        weights = _adapter_weights(self, names[0])
        product = _FusedProduct.apply(x.to(self.base_layer.compute_dtype), *weights, self, names[0])
        return product.to(result_dtype(x))


class _FusedProduct(torch.autograd.Function):
    """W x + b + s B A x, and its gradients with respect to x, A and B.

    With g the gradient of the output (tokens in rows, so that products are transposed):
        dx = g W + s (g B) A,   dA = s (g B)^T x,   dB = s g^T (x A^T)
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, lora_a: Tensor, lora_b: Tensor, layer: FusedLinear, adapter: str
    ) -> Tensor:
        # x (..., in_features) in the compute dtype, A (rank, in_features), B (out_features, rank)
        base, scaling = layer.base_layer, layer.scaling[adapter]
        out = base.product(x)
        inner = x.reshape(-1, x.shape[-1]) @ lora_a.to(x.dtype).t()  # (tokens, rank)
        out.view(-1, out.shape[-1]).addmm_(inner, lora_b.to(x.dtype).t(), alpha=scaling)
        ctx.layer, ctx.adapter = layer, adapter
        ctx.save_for_backward(x, inner)
        return out.data  # no view of a matrix: some models (RoCBert) add to it in place

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, inner = ctx.saved_tensors
        lora_a, lora_b = _adapter_weights(ctx.layer, ctx.adapter)
        scaling = ctx.layer.scaling[ctx.adapter]
        grad = grad.reshape(-1, grad.shape[-1])  # (tokens, out_features)
        grad_inner = grad @ lora_b.to(grad.dtype)  # (tokens, rank), not scaled yet
        grad_x = grad_a = grad_b = None
        if ctx.needs_input_grad[0]:  # not in the first layer
            grad_x = grad @ ctx.layer.base_layer.dequantized()
            grad_x = grad_x.addmm_(grad_inner, lora_a.to(grad.dtype), alpha=scaling).view_as(x)
        if ctx.needs_input_grad[1]:
            grad_a = (grad_inner.t() @ x.reshape(-1, x.shape[-1])).to(lora_a.dtype).mul_(scaling)
        if ctx.needs_input_grad[2]:
            grad_b = (grad.t() @ inner).to(lora_b.dtype).mul_(scaling)
        return grad_x, grad_a, grad_b, None, None


def _adapter_weights(layer: LoraLayer, adapter: str) -> tuple[nn.Parameter, nn.Parameter]:
    """A (rank, in_features) and B (out_features, rank), as the engine holds them now."""
    return layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
