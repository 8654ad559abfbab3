"""Causal attention on a CPU, one block of queries at a time, with gradients of its own.

The order of FlashAttention-2 (https://arxiv.org/abs/2307.08691, algorithms 1 and 2), in whole matrix products: a block
of queries meets all keys it may see, and only those, and what is kept for backward is the input and one number per
query. PyTorch's own kernel cuts both into tiles whose products are too small for a CPU's matrix units, and computes
pairs that a mask forbids. Here a block that lies in one sample of a packed row never looks at another sample.

Everything inside is kept in float32, so results are nearer to exact ones than the usual kernel's, which rounds sums and
gradients to 16 bits too (a CPU's products may round their factors to that, see :func:`_quick_products`). Exponents are
those of 2: torch's exp2 takes a quarter of the time of exp.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "cpu_blocks"
"""What transformers knows it as."""
BLOCK = 128
"""Queries of a block: 64 and 256 were slower at 512 and at 2,048 tokens."""
_LOWEST = -1e30
"""For the largest score of a query that may see nothing: its probabilities become 0 instead of NaN."""
_LOG2_E = math.log2(math.e)


def use_cpu_attention(model: PreTrainedModel) -> None:
    """Let a model that would take SDPA attend in blocks, if its attention is exchangeable."""
    config = model.config.get_text_config()
    is_dropped = bool(getattr(config, "attention_dropout", 0))  # which is left to SDPA
    is_exchangeable = config is model.config and config._attn_implementation == "sdpa"
    if is_exchangeable and model._supports_attention_backend and not is_dropped:
        AttentionInterface.register(NAME, _forward)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        model.set_attn_implementation(NAME)


def _forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers calls. Cached keys, dropout, biases and whatever else is new take SDPA."""
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    is_plain_mask = causal if attention_mask is None else _is_pairs(attention_mask, query)
    unknown = {name for name, given in others.items() if given is not None} - {
        "sliding_window",
        "position_ids",
    }
    is_ours = (
        is_plain_mask
        and not dropout
        and not unknown - {"use_cache", "output_attentions", "output_hidden_states", "return_dict"}
        and not others.get("output_attentions")
        and query.shape[2] == key.shape[2] > 1
        and query.shape[1] % key.shape[1] == 0
        and query.dtype == key.dtype == value.dtype == torch.bfloat16
        and query.device.type == "cpu"
    )
    if not is_ours:
        return sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            is_causal=is_causal,
            **others,
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return attend(query, key, value, attention_mask, scale), None


def _is_pairs(mask: torch.Tensor, query: torch.Tensor) -> bool:
    """Whether a mask says of each pair of tokens, for all heads alike, if they see each other."""
    return (
        mask.dtype == torch.bool
        and mask.ndim == 4
        and mask.shape[1] == 1
        and mask.shape[2] == query.shape[2]
    )


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    """softmax(scale Q K^T) V of each head, differentiable; each group of query heads shares a head of K and V.

    Args:
        query: (batch, heads, seq_len, width). key, value: (batch, kv_heads, seq_len, width), values of any width.
        mask: (batch, 1, seq_len, seq_len) bool, True where a query (row) sees a key; None: those up to itself.

    Returns:
        (batch, seq_len, heads, width of the values), contiguous, in the dtype of `query`. Queries that see nothing
        get 0.
    """
    return torch.ops.qlora_dist.cpu_attention(query, key, value, mask, scale)[0]


# --------------------------------------------------------------------------------------------------------------------
# As operators of torch: to a compiler, and to selective recomputation, each is one thing.


@torch.library.custom_op("qlora_dist::cpu_attention", mutates_args=())
def cpu_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output (batch, seq_len, heads, value width), and the logarithm to base 2 of the sum of exponentials of each
    query's scores, (batch * kv_heads, seq_len * group, 1) float32."""
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
            sums = weights.sum(-1, keepdim=True).clamp_(min=torch.finfo(torch.float32).tiny)
            torch.bmm(weights, block.keys_of(v), out=block.queries_of(outs)).div_(sums)
            block.queries_of(log_sums).copy_(sums.log2_().add_(top))
    return _by_token(outs, query), torch.cat(log_sums, 1)


@torch.library.custom_op("qlora_dist::cpu_attention_backward", mutates_args=())
def cpu_attention_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    log_sums: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key and value.

    With P the probabilities and g the gradient of the output: dV = P^T g, dP = g V^T, dS = P * (dP - rowsum(P * dP)),
    dQ = scale dS K, dK = scale dS^T Q. All keys of a query are in one block, so the sum needs no output kept.
    """
    kv_heads = key.shape[1]
    k, v = _grouped(key, kv_heads), _grouped(value, kv_heads)
    qs = _in_blocks(query, kv_heads)
    gs = _in_blocks(grad.transpose(1, 2), kv_heads)
    sums = log_sums.split([q.shape[1] for q in qs], 1)
    grad_qs, grad_k, grad_v = (
        [torch.zeros_like(q) for q in qs],
        torch.zeros_like(k),
        torch.zeros_like(v),
    )
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
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, heads, seq_len, _ = query.shape
    kv_heads = key.shape[1]
    out = query.new_empty(batch, seq_len, heads, value.shape[-1])
    return out, query.new_empty(
        batch * kv_heads, seq_len * (heads // kv_heads), 1, dtype=torch.float32
    )


@cpu_attention_backward.register_fake
def _(
    grad: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any
) -> Any:
    return tuple(x.new_empty(x.transpose(1, 2).shape).transpose(1, 2) for x in (query, key, value))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    *tensors, scale = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.scale = scale


def _differentiate(ctx: Any, grad: torch.Tensor, _: Any) -> tuple[torch.Tensor | None, ...]:
    grads = torch.ops.qlora_dist.cpu_attention_backward(grad, *ctx.saved_tensors, ctx.scale)
    return *grads, None, None


cpu_attention.register_autograd(_differentiate, setup_context=_save)


# --------------------------------------------------------------------------------------------------------------------
# Blocks.


@dataclass(frozen=True)
class _Block:
    """Some queries of some heads, and the keys they may see."""

    number: int
    heads: slice
    """Of the batch * kv_heads."""
    keys: slice
    bias: torch.Tensor
    """(tokens of the block, the last so many of the keys): minus infinity where a query does not see a key, else 0; all
    keys before are seen."""

    def queries_of(self, blocks: Sequence[torch.Tensor]) -> torch.Tensor:
        """The part of (batch * kv_heads, tokens * group, ...) of each block."""
        return blocks[self.number][self.heads]

    def keys_of(self, whole: torch.Tensor) -> torch.Tensor:
        """The part of (batch * kv_heads, seq_len, width)."""
        return whole[self.heads, self.keys]

    def scores(self, qs: Sequence[torch.Tensor], k: torch.Tensor, scale: float) -> torch.Tensor:
        """(heads, tokens * group, keys), with minus infinity where a query does not see a key."""
        q = self.queries_of(qs)
        # The factor is applied to the product: queries that are multiplied by it are no bfloat16 any more, and units
        # that round to that would change every score.
        scores = torch.baddbmm(
            q.new_zeros(()), q, self.keys_of(k).transpose(1, 2), beta=0, alpha=scale
        )
        num_tokens, num_biased = self.bias.shape
        each = scores.view(
            len(scores), num_tokens, -1, scores.shape[-1]
        )  # (heads, tokens, group, keys)
        each[..., each.shape[-1] - num_biased :] += self.bias.unsqueeze(1)
        return scores


_REMEMBERED = 2
"""Masks whose blocks are kept: some models have one for most of their layers and another for the rest."""
_remembered: dict[tuple[int, ...], tuple[weakref.ref[torch.Tensor] | None, list[_Block]]] = {}


def _blocks(mask: torch.Tensor | None, batch: int, seq_len: int, kv_heads: int) -> list[_Block]:
    """All queries, in blocks; of all rows together where the rows see alike. Made once for all layers of a step."""
    key = (id(mask), batch, seq_len, kv_heads)
    if key in _remembered:
        whose, blocks = _remembered[key]
        if whose is None or whose() is mask:  # an identity may have passed to another mask
            return blocks
        del _remembered[key]
    if len(_remembered) == _REMEMBERED:
        del _remembered[next(iter(_remembered))]
    blocks = list(_make_blocks(mask, batch, seq_len, kv_heads))
    whose = None if mask is None else weakref.ref(mask, lambda _: _remembered.pop(key, None))
    _remembered[key] = whose, blocks
    return blocks


def _make_blocks(
    mask: torch.Tensor | None, batch: int, seq_len: int, kv_heads: int
) -> Iterator[_Block]:
    if mask is None:
        mask = torch.ones(seq_len, seq_len, dtype=torch.bool).tril_().view(1, 1, seq_len, seq_len)
    each = batch * kv_heads // mask.shape[0]
    for row_number, row in enumerate(mask[:, 0]):
        for number, seen in enumerate(row.split(BLOCK)):  # (tokens of the block, seq_len)
            keys = seen.any(0).nonzero().flatten()
            if not len(keys):
                continue
            first, end = int(keys[0]), int(keys[-1]) + 1
            partly = (~seen[:, first:end].all(0)).nonzero().flatten()
            begin = first + int(partly[0]) if len(partly) else end
            yield _Block(
                number,
                slice(row_number * each, (row_number + 1) * each),
                slice(first, end),
                torch.zeros(len(seen), end - begin).masked_fill_(~seen[:, begin:end], -torch.inf),
            )


def _in_blocks(x: torch.Tensor, kv_heads: int) -> list[torch.Tensor]:
    """(batch, heads, seq_len, width) as copies of its blocks, each as :func:`_grouped` makes them."""
    return [_grouped(part, kv_heads) for part in x.split(BLOCK, 2)]


def _grouped(x: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """(batch, heads, seq_len, width) as (batch * kv_heads, seq_len * group, width) float32, a copy: the queries that
    meet the same keys stand together, token by token."""
    batch, heads, seq_len, width = x.shape
    copied = torch.empty(batch, kv_heads, seq_len, heads // kv_heads, width)
    copied.copy_(x.unflatten(1, (kv_heads, -1)).transpose(2, 3))
    return copied.view(batch * kv_heads, -1, width)


def _by_token(blocks: Sequence[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
    """The other way: (batch, seq_len, heads, width) in the dtype of `like`, of whose (batch, heads, seq_len, ...) the
    blocks are; contiguous, as the projections around attention have it."""
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
    """Products of float32 as they are, whatever autocast says; through oneDNN where the inputs were 16 bits wide.

    That is more than twice as quick as the default on an AMD EPYC, with errors of 4e-7. A CPU with units for products
    of bfloat16 rounds factors to that: scores are still exact, whose factors are bfloat16 already, and of the rest it
    does what other kernels do.
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
