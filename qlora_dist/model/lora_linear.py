"""4-bit linear layers and their LoRA adapters as one function of autograd: y = W x + b + s B A x, W frozen in 4 bits.

peft composes the same from separate layers (LoRA, https://arxiv.org/abs/2106.09685, section 4.1). That writes a clone
of W x, B A x, its multiple and the sum, each as large as the output, and three gradients of x. Here what the adapter
adds goes into W x, and into W^T g in backward, inside of the matrix product (one rounding instead of three), and the
scaling is a factor of that product or of a small result. Kept for backward are x and A x, and nothing of the weights:
they are asked of the layer again, which under sharding has been gathered anew by then.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import bitsandbytes as bnb
import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.bnb import Linear4bit
from torch import nn
from torch.autograd.function import once_differentiable

from qlora_dist.model.adapters import lora_layers
from qlora_dist.model.nf4 import QuantizedLinear, result_dtype


def fuse_adapters(model: nn.Module) -> str | None:
    """Let every layer with a plain adapter on a 4-bit weight compute in one function; before or after sharding.

    Names, files and results stay what they are. Layers that cannot be fused go on computing as peft composes them.

    Returns:
        what to tell a person of those layers, if there are any.
    """
    obstacles: Counter[str] = Counter()
    num_layers = 0
    for layer in lora_layers(model):
        num_layers += 1
        obstacle = _obstacle(layer)
        if obstacle is None:
            layer.__class__ = FusedLinear  # a class and not a wrapper: parameter names are those of the module tree
        else:
            obstacles[obstacle] += 1
    if not obstacles:
        return None
    reasons = ", ".join(f"{count} for {obstacle}" for obstacle, count in obstacles.items())
    return f"adapters: {obstacles.total()} of {num_layers} layers compute base and adapter one after the other: {reasons}"


def _obstacle(layer: LoraLayer) -> str | None:
    """What keeps a layer from being fused."""
    if not isinstance(layer, (Linear4bit, FusedLinear)) or not isinstance(
        layer.get_base_layer(), QuantizedLinear
    ):
        return "a base that is not in 4 bits"
    if layer.lora_variant:
        return "another kind of adapter than plain LoRA"
    if any(layer.lora_bias.values()):
        return "a bias in the adapter"
    if any(not isinstance(dropout, nn.Identity) for dropout in layer.lora_dropout.values()):
        return "dropout"
    return None


class FusedLinear(Linear4bit):
    """peft's layer, with another way to compute the same.

    Shapes:
        input (..., in_features) to output (..., out_features), in the dtype of the input, or in that of autocast.
    """

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        adapters = self.active_adapters
        if (
            args
            or kwargs
            or self.disable_adapters
            or self.merged
            or len(adapters) != 1
            or adapters[0] not in self.lora_A
        ):
            return super().forward(x, *args, **kwargs)
        lora_a, lora_b = _adapter_weights(self, adapters[0])
        product = _FusedProduct.apply(
            x.to(self.base_layer.compute_dtype), lora_a, lora_b, self, adapters[0]
        )
        return product.to(result_dtype(x))


class _FusedProduct(torch.autograd.Function):
    """W x + b + s B A x, and its gradients with respect to x, A and B.

    With g the gradient of the output (tokens in rows, so that products are transposed):
        dx = g W + s (g B) A,   dA = s (g B)^T x,   dB = s g^T (x A^T)
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        lora_a: torch.Tensor,
        lora_b: torch.Tensor,
        layer: FusedLinear,
        adapter: str,
    ) -> (
        torch.Tensor
    ):  # x (..., in_features) in the compute dtype, A (rank, in_features), B (out_features, rank)
        base = layer.base_layer
        out = bnb.matmul_4bit(x, base.weight, quant_state=base.quant_state_now(), bias=base.bias)
        inner = x.reshape(-1, x.shape[-1]) @ lora_a.to(x.dtype).t()  # (tokens, rank)
        out.view(-1, out.shape[-1]).addmm_(
            inner, lora_b.to(x.dtype).t(), alpha=layer.scaling[adapter]
        )
        ctx.layer, ctx.adapter = layer, adapter
        ctx.save_for_backward(x, inner)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, inner = ctx.saved_tensors
        lora_a, lora_b = _adapter_weights(ctx.layer, ctx.adapter)
        scaling = ctx.layer.scaling[ctx.adapter]
        grad = grads[0].reshape(-1, grads[0].shape[-1])  # (tokens, out_features)
        grad_inner = grad @ lora_b.to(grad.dtype)  # (tokens, rank), not scaled yet
        grad_x = grad_a = grad_b = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ ctx.layer.base_layer.dequantized()
            grad_x = grad_x.addmm_(grad_inner, lora_a.to(grad.dtype), alpha=scaling).view_as(x)
        if ctx.needs_input_grad[1]:
            grad_a = (grad_inner.t() @ x.reshape(-1, x.shape[-1])).to(lora_a.dtype).mul_(scaling)
        if ctx.needs_input_grad[2]:
            grad_b = (grad.t() @ inner).to(lora_b.dtype).mul_(scaling)
        return grad_x, grad_a, grad_b, None, None


def _adapter_weights(layer: LoraLayer, adapter: str) -> tuple[nn.Parameter, nn.Parameter]:
    """A (rank, in_features) and B (out_features, rank), as the engine has them at this moment."""
    return layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
