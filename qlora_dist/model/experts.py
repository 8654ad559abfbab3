"""Experts in 4 bits with LoRA adapters: one function for all families, tokens sorted by expert.

transformers keeps the matrices of all experts of a layer in parameters of three dimensions, and
asks a registry how to compute with them. Here such a stack is stored in 4 bits, and the registry
has one more entry. Each product is y = W_e x + s B_e A_e x, where e is the expert of a token (LoRA,
https://arxiv.org/abs/2106.09685, section 4.1). Nothing of the size of a stack is kept or made: the
matrices of a few experts at a time are dequantized in forward, and again in backward.

peft stacks the adapters of all experts, too: the expert is the slow index of A's rows (expert,
rank), but the fast index of B's columns (rank, expert).
"""

# Tested by tests/unit/model/test_experts.py and tests/distributed/test_experts.py.

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import bitsandbytes as bnb
import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from qlora_dist.model.expert_products import StackProduct, is_transposed
from qlora_dist.model.nf4 import (
    NESTED_BLOCK_SIZE,
    QuantFormat,
    dynamic_code,
    four_bit_code,
    frozen,
    result_dtype,
)

IMPLEMENTATION = "qlora_dist"
"""Name of this function in transformers' registry of experts functions."""
_ROWS_OF_EACH = ("Llama4TextExperts",)
"""Classes that do not ask the registry, and that :func:`rows_of_each_forward` computes."""


class QuantizedStack(nn.Module):
    """Matrices of all experts in 4 bits, one after the other; created empty on meta.

    Each matrix has blocks and, with double quantization, a mean of its own: its bytes are those
    that bitsandbytes makes of it alone, so that a rank quantizes its experts without the others.
    All parameters are flat, so that sharding cuts them into equal parts for any number of ranks.
    """

    def __init__(self, shape: torch.Size, fmt: QuantFormat, dtype: torch.dtype) -> None:
        super().__init__()
        self.shape, self.format, self.compute_dtype = shape, fmt, dtype
        num_experts, num_blocks = shape[0], fmt.num_blocks(self.numel)
        self.weight = frozen(num_experts * -(-self.numel // 2), 1, dtype=torch.uint8)
        constants = torch.uint8 if fmt.double_quant else torch.float32
        self.absmax = frozen(num_experts * num_blocks, dtype=constants)
        if fmt.double_quant:
            num_nested = -(-num_blocks // NESTED_BLOCK_SIZE)
            self.absmax_scale = frozen(num_experts * num_nested, dtype=torch.float32)
            self.absmax_offset = frozen(num_experts, dtype=torch.float32)

    @property
    def numel(self) -> int:
        """Elements of one expert's matrix."""
        return self.shape[1] * self.shape[2]

    def dequantized(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        """Return the matrices of experts [first, last), (last - first, *shape[1:]).

        The parameters must be whole.
        """
        number, fmt = last - first, self.format
        packed = self.weight.view(self.shape[0], -1)[first:last]  # (number, bytes)
        absmax = self._absmax(first, last)  # (number, num_blocks)
        code = four_bit_code(fmt.quant_type, packed.device)

        def dequantize(packed: Tensor, absmax: Tensor, num_matrices: int) -> Tensor:
            state = bnb.functional.QuantState(
                absmax=absmax.reshape(-1),
                shape=torch.Size((1, num_matrices * self.numel)),  # see QuantizedLinear.dequantized
                code=code,
                blocksize=fmt.block_size,
                quant_type=fmt.quant_type,
                dtype=dtype,
            )
            return bnb.functional.dequantize_4bit(packed.reshape(-1, 1), state)

        if self.numel % fmt.block_size == 0:  # no block crosses from one expert to the next
            flat = dequantize(packed, absmax, number)
        else:
            flat = torch.cat([dequantize(*one, 1) for one in zip(packed, absmax, strict=True)])
        return flat.view(number, *self.shape[1:])

    def _absmax(self, first: int, last: int) -> Tensor:
        """Return the block maxima of experts [first, last), (last - first, num_blocks) float32."""
        absmax = self.absmax.view(self.shape[0], -1)[first:last]
        if not self.format.double_quant:
            return absmax
        scale = self.absmax_scale.view(self.shape[0], -1)[first:last]
        scale = scale.repeat_interleave(NESTED_BLOCK_SIZE, dim=1)[:, : absmax.shape[1]]
        values = dynamic_code(absmax.device)[absmax.int()]
        return values.mul_(scale).add_(self.absmax_offset[first:last, None])


def expert_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules that hold the matrices of all experts of a layer, with their names."""
    for name, module in model.named_modules():
        is_experts = _asks_registry(module) or _takes_rows_of_each(module)
        if is_experts and not isinstance(module, ParamWrapper):
            yield name, module


def _asks_registry(module: nn.Module) -> bool:
    """True of a class with transformers' decorator, by what that sets."""
    return all(hasattr(module, flag) for flag in ("has_gate", "has_bias", "is_transposed"))


def _takes_rows_of_each(module: nn.Module) -> bool:
    """True of experts that take one tensor: as many rows for each expert, one after the other.

    By name, because what they compute cannot be told from their parameters.
    """
    return type(module).__name__ in _ROWS_OF_EACH


def expert_stacks(model: nn.Module) -> dict[str, nn.Parameter | QuantizedStack]:
    """Return the stacks of matrices of all experts by name, quantized or not."""
    return {
        f"{name}.{leaf}": stack
        for name, module in expert_modules(model)
        for leaf, stack in _stacks(module).items()
    }


def _stacks(module: nn.Module) -> dict[str, nn.Parameter | QuantizedStack]:
    """Return the stacks of one module by the names that they have there."""
    found: dict[str, nn.Parameter | QuantizedStack] = {
        leaf: param for leaf, param in module.named_parameters(recurse=False) if param.ndim == 3
    }
    children = module.named_children()
    return found | {leaf: child for leaf, child in children if isinstance(child, QuantizedStack)}


def experts_per_token(config: Any) -> int:
    """Return the number of routed experts that a token goes through, by a text configuration."""
    keys = ("num_experts_per_tok", "moe_k", "moe_topk", "moe_top_k", "top_k_experts")
    values = (getattr(config, key, None) for key in keys)
    return next((value for value in values if isinstance(value, int)), 1)


def take_token_counts(model: nn.Module) -> Tensor | None:
    """Return the tokens that each expert got on this rank in training since the last call.

    Returns:
        (experts of all layers,) int64; None for a model without experts.
    """
    counts = [module.token_counts for _, module in expert_modules(model) if _has_counts(module)]
    for _, module in expert_modules(model):
        module.token_counts = None
    return torch.cat(counts) if counts else None


def _has_counts(module: nn.Module) -> bool:
    return getattr(module, "token_counts", None) is not None


def quantize_stacks(model: nn.Module, fmt: QuantFormat | None, dtype: torch.dtype) -> None:
    """Let a meta-device model compute its experts here; in 4 bits, unless the format is None."""
    for _, module in list(expert_modules(model)):
        if _asks_registry(module):
            module.config._experts_implementation = IMPLEMENTATION
        else:
            module.forward = partial(rows_of_each_forward, module)
        for leaf, param in list(module.named_parameters(recurse=False)):
            if fmt is not None and param.ndim == 3:
                delattr(module, leaf)
                module.add_module(leaf, QuantizedStack(param.shape, fmt, dtype))


@contextmanager
def stacks_as_parameters(model: nn.Module) -> Iterator[None]:
    """Let the stacks be parameters of three dimensions meanwhile, on meta, as peft knows them."""
    stacks = {name: one for name, one in expert_stacks(model).items() if isinstance(one, nn.Module)}
    owners = {name: model.get_submodule(name.rpartition(".")[0]) for name in stacks}
    for name, stack in stacks.items():
        leaf = name.rpartition(".")[2]
        delattr(owners[name], leaf)
        param = torch.empty(stack.shape, dtype=stack.compute_dtype, device="meta")
        owners[name].register_parameter(leaf, nn.Parameter(param, requires_grad=False))
    try:
        yield
    finally:
        for name, stack in stacks.items():
            leaf = name.rpartition(".")[2]
            delattr(owners[name], leaf)
            owners[name].add_module(leaf, stack)


class StackAdapter(ParamWrapper):
    """peft's adapter of a stack, whose parameters :func:`experts_forward` uses itself.

    peft would make the sum of base and adapter for all experts, in 16 or 32 bits.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the experts make, which add this adapter by themselves."""
        return self.base_layer(*args, **kwargs)

    @property
    def is_swapped(self) -> bool:
        """True if peft takes a matrix for (out, in) that is (in, out): B comes before A then."""
        return self._did_swap_in_out_features and is_transposed(self.get_base_layer())

    def matrices(self) -> tuple[Tensor, Tensor, float] | None:
        """Return A, B and the scaling, as the engine holds them now; None if switched off."""
        names = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or not names:
            return None
        (name,) = names
        return self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name]


def use_stack_adapters(model: nn.Module) -> None:
    """Let the experts of an adapted model add the adapters of their stacks by themselves."""
    for module in list(model.modules()):
        if isinstance(module, ParamWrapper):
            experts = module.get_base_layer()
            module.__class__ = StackAdapter
            # No registered child: the adapter wraps the experts, not the other way round.
            vars(experts).setdefault("stack_adapters", {})[module.parameter_name] = module


@torch.compiler.disable  # sizes of products follow from the tokens
def experts_forward(
    self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Compute a layer's routed experts.

    Args:
        self: the module of the experts.
        hidden_states: (tokens, d_model).
        top_k_index: (tokens, k) int64, the experts of each token.
        top_k_weights: (tokens, k), their weights.

    Returns:
        (tokens, d_model), in the dtype of `hidden_states`.
    """
    stack = next(iter(_stacks(self).values()))
    num_experts, top_k = stack.shape[0], top_k_index.shape[-1]
    ids = top_k_index.reshape(-1)
    order = torch.argsort(ids, stable=True)  # (tokens * k,)
    ones = torch.ones_like(ids)
    counts = ids.new_zeros(num_experts).index_add_(0, ids, ones)
    _count_tokens(self, counts)
    # The products' sizes: one wait for the device in each layer.
    sizes = tuple(counts.tolist())
    expert_of_row = ids[order]
    rows = hidden_states[order // top_k]

    def product(name: str, rows: Tensor) -> Tensor:
        result = _product(self, name, rows, sizes)
        return result + getattr(self, f"{name}_bias")[expert_of_row] if self.has_bias else result

    if self.has_gate:
        inner = self._apply_gate(product("gate_up_proj", rows))
    else:
        inner = self.act_fn(product("up_proj", rows))
    out = product("down_proj", inner)  # (tokens * k, d_model)
    if getattr(self, "has_post_expert_norm", False):
        out = self.post_expert_norm(out)
    out = out * top_k_weights.reshape(-1)[order].unsqueeze(-1)
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    # A sum of k rows: adding in place to one row of each token would be in no fixed order on a GPU.
    out = out[back].view(-1, top_k, out.shape[-1]).sum(dim=1)
    return out.to(hidden_states.dtype)


@torch.compiler.disable
def rows_of_each_forward(self: Any, hidden_states: Tensor) -> Tensor:
    """Compute experts that take as many rows for each of them, zeros where none is meant.

    Without biases a row of zeros gives zeros, and no gradient reaches it: its weight is zero, too.

    Args:
        self: the module of the experts.
        hidden_states: (experts * tokens, d_model).

    Returns:
        (experts * tokens, d_model).
    """
    num_experts = next(iter(_stacks(self).values())).shape[0]
    is_meant = hidden_states.detach().any(dim=-1)
    counts = is_meant.view(num_experts, -1).sum(dim=1)
    _count_tokens(self, counts)
    sizes = tuple(counts.tolist())
    kept = is_meant.nonzero().squeeze(1)
    gate, up = _product(self, "gate_up_proj", hidden_states[kept], sizes).chunk(2, dim=-1)
    rows = _product(self, "down_proj", up * self.act_fn(gate), sizes)
    out = torch.zeros_like(hidden_states, dtype=rows.dtype)
    return out.index_copy(0, kept, rows)


def _count_tokens(module: Any, counts: Tensor) -> None:
    """Add to the tokens that each expert got in training, (experts,)."""
    # Not when a layer is recomputed: that happens inside of backward.
    if module.training and torch._C._current_graph_task_id() == -1:
        before = getattr(module, "token_counts", None)
        module.token_counts = counts if before is None else before + counts


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)


def _product(module: Any, name: str, rows: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """Multiply rows, sorted by expert, with the stack `name` and its adapter."""
    stack = getattr(module, name)
    dtype = stack.compute_dtype if isinstance(stack, QuantizedStack) else result_dtype(rows)
    adapter = getattr(module, "stack_adapters", {}).get(name)
    matrices = None if adapter is None else adapter.matrices()
    lora_a, lora_b, _ = matrices or (None, None, 1.0)
    out = StackProduct.apply(rows.to(dtype), lora_a, lora_b, module, name, sizes)
    return out.to(result_dtype(rows))
