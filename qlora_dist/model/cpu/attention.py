"""Causal attention on a CPU, a block of queries at a time, with gradients of its own.

The order is that of FlashAttention-2 (https://arxiv.org/abs/2307.08691, algorithms 1 and 2), in
whole matrix products. A block of queries meets all keys it may see, and no others. Backward keeps
the input and one number per query. PyTorch's own kernel cuts both queries and keys into tiles,
whose products are too small for a CPU's matrix units, and computes pairs that a mask forbids. Here
a block that lies in one sample of a packed row never looks at the other samples.

Everything inside is kept in float32. So results are nearer to exact ones than the usual kernel's,
which rounds sums and gradients to 16 bits too (a CPU's products may round their factors to that,
see :func:`_quick_products`). Exponents are those of 2: torch's exp2 takes a quarter of the time of
exp.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "cpu_blocks"
"""Name of this attention in transformers' registry."""
BLOCK = 128
"""Queries of a block: 64 and 256 were slower at 512 and at 2,048 tokens."""

# Least value of a query's largest score. The probabilities of a query that may see nothing become
# 0 by it instead of NaN.
_LOWEST = -1e30
_LOG2_E = math.log2(math.e)


def use_cpu_attention(model: PreTrainedModel) -> None:
    """Let a model that would take SDPA attend in blocks, if its attention is exchangeable."""
    config = model.config.get_text_config()
    is_dropped = bool(getattr(config, "attention_dropout", 0))  # dropout is left to SDPA
    is_exchangeable = config is model.config and config._attn_implementation == "sdpa"
    if is_exchangeable and model._supports_attention_backend and not is_dropped:
        AttentionInterface.register(NAME, _forward)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        model.set_attn_implementation(NAME)


def _forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attend as transformers asks for it; leave all but plain causal attention to SDPA.

    Left to SDPA are cached keys, dropout, biases, and arguments that are unknown here.
    """
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    is_plain_mask = causal if attention_mask is None else _is_pairs(attention_mask, query)
    unknown = {name for name, given in others.items() if given is not None}
    unknown -= {"sliding_window", "position_ids"}  # which the mask has taken into account
    unknown -= {"use_cache", "output_attentions", "output_hidden_states", "return_dict"}
    is_ours = (
        is_plain_mask
        and not dropout
        and not unknown
        and not others.get("output_attentions")
        and query.shape[2] == key.shape[2] > 1
        and query.shape[1] % key.shape[1] == 0
        and query.dtype == key.dtype == value.dtype == torch.bfloat16
        and query.device.type == "cpu"
    )
    if not is_ours:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, **others
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return attend(query, key, value, attention_mask, scale), None


def _is_pairs(mask: Tensor, query: Tensor) -> bool:
    """True if a mask tells for each pair of tokens, for all heads alike, if they see each other."""
    is_bool = mask.dtype == torch.bool and mask.ndim == 4
    return is_bool and mask.shape[1] == 1 and mask.shape[2] == query.shape[2]


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """softmax(scale Q K^T) V of each head, differentiable.

    Each group of query heads shares a head of K and V.

    Args:
        query: (batch, heads, seq_len, width).
        key, value: (batch, kv_heads, seq_len, width), values of any width.
        mask: (batch, 1, seq_len, seq_len) bool, True where a query (row) sees a key; if None, a
            query sees the keys up to its own.

    Returns:
        (batch, seq_len, heads, width of the values), contiguous, in the dtype of `query`. Queries
        that see nothing get 0.
    """
    return torch.ops.qlora_dist.cpu_attention(query, key, value, mask, scale)[0]


# --------------------------------------------------------------------------------------------------
# Operators of torch: a compiler and selective recomputation see each as one operation.


@torch.library.custom_op("qlora_dist::cpu_attention", mutates_args=())
def cpu_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend in blocks; arguments as of :func:`attend`.

    Returns:
        the output, (batch, seq_len, heads, value width), and for each query the logarithm to base 2
        of the sum of its scores' exponentials, (batch * kv_heads, seq_len * group, 1) float32.
    """
    kv_heads = key.shape[1]
    k, v = _grouped(key, kv_heads), _grouped(value, kv_heads)
    qs = _in_blocks(query, kv_heads)
    outs = [q.new_zeros(*q.shape[:2], v.shape[-1]) for q in qs]
    log_sums = [q.new_zeros(*q.shape[:2], 1) for q in qs]
    with _quick_products(query.dtype):
        for block in _blocks(mask, len(query), query.shape[2], kv_heads):
            scores = block.scores(qs, k, scale * _LOG2_E)
            top = scores.amax(-1, keepdim=True).clamp_(min=_LOWEST)
            weights = scores.sub_(top).exp2_()
            # At least the smallest normal number: a query that sees nothing gets 0 / tiny = 0.
            sums = weights.sum(-1, keepdim=True).clamp_(min=torch.finfo(torch.float32).tiny)
            torch.bmm(weights, block.keys_of(v), out=block.queries_of(outs)).div_(sums)
            block.queries_of(log_sums).copy_(sums.log2_().add_(top))
    return _by_token(outs, query), torch.cat(log_sums, 1)


@torch.library.custom_op("qlora_dist::cpu_attention_backward", mutates_args=())
def cpu_attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    log_sums: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value.

    With P the probabilities and g the gradient of the output: dV = P^T g, dP = g V^T,
    dS = P * (dP - rowsum(P * dP)), dQ = scale dS K, dK = scale dS^T Q. All keys of a query are in
    one block, so the row sum needs no output kept.
    """
    kv_heads = key.shape[1]
    k, v = _grouped(key, kv_heads), _grouped(value, kv_heads)
    qs = _in_blocks(query, kv_heads)
    gs = _in_blocks(grad.transpose(1, 2), kv_heads)
    sums = log_sums.split([q.shape[1] for q in qs], 1)
    grad_qs = [torch.zeros_like(q) for q in qs]
    grad_k, grad_v = torch.zeros_like(k), torch.zeros_like(v)
    with _quick_products(query.dtype):
        for block in _blocks(mask, len(query), query.shape[2], kv_heads):
            q, g = block.queries_of(qs), block.queries_of(gs)
            weights = block.scores(qs, k, scale * _LOG2_E).sub_(block.queries_of(sums)).exp2_()
            block.keys_of(grad_v).baddbmm_(weights.transpose(1, 2), g)
            grad_weights = torch.bmm(g, block.keys_of(v).transpose(1, 2))
            grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, torch.float32)
            torch.bmm(grad_scores, block.keys_of(k), out=block.queries_of(grad_qs)).mul_(scale)
            block.keys_of(grad_k).baddbmm_(grad_scores.transpose(1, 2), q)
    grad_k.mul_(scale)
    grads = _by_token(grad_qs, query), _by_token([grad_k], key), _by_token([grad_v], value)
    return grads[0].transpose(1, 2), grads[1].transpose(1, 2), grads[2].transpose(1, 2)


@cpu_attention.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    batch, heads, seq_len, _ = query.shape
    kv_heads = key.shape[1]
    out = query.new_empty(batch, seq_len, heads, value.shape[-1])
    sums_shape = (batch * kv_heads, seq_len * (heads // kv_heads), 1)
    return out, query.new_empty(sums_shape, dtype=torch.float32)


@cpu_attention_backward.register_fake
def _(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> Any:
    return tuple(x.new_empty(x.transpose(1, 2).shape).transpose(1, 2) for x in (query, key, value))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, scale = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.scale = scale


def _differentiate(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    grads = torch.ops.qlora_dist.cpu_attention_backward(grad, *ctx.saved_tensors, ctx.scale)
    return *grads, None, None


cpu_attention.register_autograd(_differentiate, setup_context=_save)


# --------------------------------------------------------------------------------------------------
# Blocks.


@dataclass(frozen=True)
class _Block:
    """Some queries of some heads, and the keys they may see."""

    number: int
    heads: slice  # of batch * kv_heads
    keys: slice
    # (tokens of the block, last keys): minus infinity where a query does not see a key, else 0. All
    # keys before the last ones are seen by every query.
    bias: Tensor

    def queries_of(self, blocks: Sequence[Tensor]) -> Tensor:
        """Return this block's part of tensors by block, each (batch * kv_heads, queries, ...)."""
        return blocks[self.number][self.heads]

    def keys_of(self, whole: Tensor) -> Tensor:
        """Return this block's part of (batch * kv_heads, seq_len, width)."""
        return whole[self.heads, self.keys]

    def scores(self, qs: Sequence[Tensor], k: Tensor, scale: float) -> Tensor:
        """Return (heads, queries, keys), minus infinity where a query does not see a key."""
        q, keys = self.queries_of(qs), self.keys_of(k).transpose(1, 2)
        # The scale is applied to the product. Queries multiplied by it are no bfloat16 any more,
        # and units that round to bfloat16 would change every score.
        scores = torch.baddbmm(q.new_zeros(()), q, keys, beta=0, alpha=scale)
        num_tokens, num_biased = self.bias.shape
        each = scores.unflatten(1, (num_tokens, -1))  # (heads, tokens, group, keys)
        each[..., each.shape[-1] - num_biased :] += self.bias.unsqueeze(1)
        return scores


# Masks whose blocks are kept: some models have one for most of their layers and one for the rest.
_REMEMBERED = 2
_remembered: dict[tuple[int, ...], tuple[weakref.ref[Tensor] | None, list[_Block]]] = {}


def _blocks(mask: Tensor | None, batch: int, seq_len: int, kv_heads: int) -> list[_Block]:
    """Cut all queries into blocks; made once for all layers of a step.

    A block spans all rows of the batch if they share a mask.
    """
    key = (id(mask), batch, seq_len, kv_heads)
    if key in _remembered:
        whose, blocks = _remembered[key]
        if whose is None or whose() is mask:  # an id may have passed to a new mask
            return blocks
        del _remembered[key]
    if len(_remembered) == _REMEMBERED:
        del _remembered[next(iter(_remembered))]
    blocks = list(_make_blocks(mask, batch, seq_len, kv_heads))
    whose = None if mask is None else weakref.ref(mask, lambda _: _remembered.pop(key, None))
    _remembered[key] = whose, blocks
    return blocks


def _make_blocks(mask: Tensor | None, batch: int, seq_len: int, kv_heads: int) -> Iterator[_Block]:
    if mask is None:
        mask = torch.ones(seq_len, seq_len, dtype=torch.bool).tril_().view(1, 1, seq_len, seq_len)
    each = batch * kv_heads // mask.shape[0]
    for row_number, row in enumerate(mask[:, 0]):
        heads = slice(row_number * each, (row_number + 1) * each)
        for number, seen in enumerate(row.split(BLOCK)):  # (tokens of the block, seq_len)
            keys = seen.any(0).nonzero().flatten()
            if not len(keys):
                continue
            first, end = int(keys[0]), int(keys[-1]) + 1
            # From the first key that some query does not see.
            partly = (~seen[:, first:end].all(0)).nonzero().flatten()
            begin = first + int(partly[0]) if len(partly) else end
            bias = torch.zeros(len(seen), end - begin).masked_fill_(~seen[:, begin:end], -torch.inf)
            yield _Block(number, heads, slice(first, end), bias)


def _in_blocks(x: Tensor, kv_heads: int) -> list[Tensor]:
    """Copy (batch, heads, seq_len, width) into blocks, each as :func:`_grouped` makes it."""
    return [_grouped(part, kv_heads) for part in x.split(BLOCK, 2)]


def _grouped(x: Tensor, kv_heads: int) -> Tensor:
    """Copy (batch, heads, seq_len, width) to (batch * kv_heads, seq_len * group, width) float32.

    Queries that meet the same keys stand together, token by token.
    """
    batch, heads, seq_len, width = x.shape
    copied = torch.empty(batch, kv_heads, seq_len, heads // kv_heads, width)
    copied.copy_(x.unflatten(1, (kv_heads, -1)).transpose(2, 3))
    return copied.view(batch * kv_heads, -1, width)


def _by_token(blocks: Sequence[Tensor], like: Tensor) -> Tensor:
    """Join blocks of :func:`_grouped` to (batch, seq_len, heads, width) in the dtype of `like`.

    Args:
        like: (batch, heads, seq_len, ...), in which the blocks lie.

    Returns:
        a contiguous tensor, as the projections around attention have it.
    """
    batch, heads, seq_len, _ = like.shape
    kv_heads = len(blocks[0]) // batch
    whole = like.new_empty(batch, seq_len, kv_heads, heads // kv_heads, blocks[0].shape[-1])
    start = 0
    for block in blocks:
        by_head = block.view(batch, kv_heads, -1, heads // kv_heads, block.shape[-1])
        whole[:, start : start + by_head.shape[2]] = by_head.transpose(1, 2)
        start += by_head.shape[2]
    return whole.flatten(2, 3)


@contextmanager
def _quick_products(dtype: torch.dtype) -> Iterator[None]:
    """Multiply float32 in float32 despite autocast, through oneDNN for inputs of 16 bits.

    oneDNN is more than twice as quick as the default on an AMD EPYC, with errors of 4e-7. A CPU
    with units for products of bfloat16 rounds factors to bfloat16. Scores stay exact, since their
    factors are bfloat16 already; all other products are rounded as in other kernels.
    """
    products = torch.backends.mkldnn.matmul
    before = products.fp32_precision
    if dtype == torch.bfloat16:
        products.fp32_precision = "bf16"
    try:
        with torch.autocast("cpu", enabled=False):
            yield
    finally:
        products.fp32_precision = before
