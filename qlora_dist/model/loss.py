"""The loss: a sum over target tokens, divided once by their number over all ranks.

The logits of all tokens at once are the largest tensors of a training step. In float32, as
log-probabilities and as their gradient, they take 12 bytes per token and vocabulary entry: 6 GiB
for 4,096 tokens and a vocabulary of 128k. Here only target tokens get logits, a bounded number at a
time. Each piece becomes its part of the gradient of the hidden states before the next is made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from qlora_dist.config.schema import IGNORE_INDEX
from qlora_dist.model.attention import model_inputs
from qlora_dist.model.cpu.loss import MAX_ROWS, loss_and_gradient_on_cpu
from qlora_dist.model.cpu.pieces import is_on_cpu
from qlora_dist.model.logits import HALF_GAIN, LogitsTransform, logits_transform, to_gradient
from qlora_dist.model.parts import base_model
from qlora_dist.runtime.shards import is_partitioned

FULL_LOGITS_BYTES = 12
"""Per token and vocabulary entry: logits in float32, as log-probabilities and as their gradient."""

# Bytes of the logits of a chunk. With a vocabulary of 128k they hold 204 rows in bfloat16: enough
# for a GPU to spend as long multiplying with the head's weights as reading them.
_CHUNK_BYTES = 2**28


def target_loss_sum(
    model: PeftModel,
    input_ids: Tensor,
    attention_mask: Tensor,
    labels: Tensor,
    position_ids: Tensor | None = None,
    num_targets: int | None = None,
) -> Tensor:
    """Summed next-token cross-entropy over target tokens.

    The first call for a model runs an additional forward of a few tokens.

    Args:
        input_ids, attention_mask, labels: (batch, seq_len) int64; labels are aligned with input_ids
            and shifted here.
        position_ids: (batch, seq_len) int64 of packed rows. They begin at 0 in each sample, by
            which the model's attention tells samples apart; `attention_mask` is not used then.
        num_targets: number of labels that are targets, without the first column. If None, the
            device is waited for to count them.

    Returns:
        0-dim float32, zero when there is no target.
    """
    form = logits_transform(model)
    # The target of a token is the token after it: (batch * seq_len,), as the logits.
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX).flatten()
    inputs = model_inputs(model, input_ids, attention_mask, position_ids)
    if form is None:
        logits = model(**inputs, use_cache=False).logits.flatten(0, 1).float()
        return F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="sum")
    mask = targets != IGNORE_INDEX
    found = mask.nonzero() if num_targets is None else mask.nonzero_static(size=num_targets)
    rows = found.squeeze(1)  # (num_targets,)
    base = base_model(model)
    head, vocab_size = base.get_output_embeddings(), base.get_input_embeddings().num_embeddings
    with _head_returns(head, _HeadLoss(head, rows, targets[rows], form, vocab_size)) as losses:
        model(**inputs, use_cache=False)
    return losses[0]


def loss_note(model: nn.Module) -> str | None:
    """Return the log's line on a loss that takes all logits at once, else None; a collective."""
    if is_chunked(model):
        return None
    why = "has an output head that learns and is gathered part by part"
    whose = "all target"
    if logits_transform(model) is None:
        why = "makes something of its own of the logits (neither scaling nor soft-capping)"
        whose = "all"
    return (
        f"{type(base_model(model)).__name__} {why}, so logits of {whose} tokens are computed at "
        f"once: {FULL_LOGITS_BYTES} bytes per token and vocabulary entry."
    )


def is_chunked(model: nn.Module) -> bool:
    """True if the loss takes a bounded number of logits at a time; a collective."""
    head = base_model(model).get_output_embeddings()
    return logits_transform(model) is not None and not _is_gathered_inside(head)


# --------------------------------------------------------------------------------------------------
# The loss in the head's place. The head's hooks run around it: by them sharding engines have
# gathered its weights.


@contextmanager
def _head_returns(head: nn.Module, loss: Callable[[Tensor], Tensor]) -> Iterator[list[Tensor]]:
    """Let a head compute a loss from its input; yields the list that the loss is appended to.

    The model goes on with a single number in place of the logits, which nobody reads.
    """
    losses: list[Tensor] = []

    def keep(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        losses.append(output)
        return output.detach().reshape(1, 1, 1)

    own = head.__dict__.get("forward")
    head.forward = loss
    # The last of the head's hooks, so that what sharding engines tie to the output is kept.
    hook = head.register_forward_hook(keep)
    try:
        yield losses
    finally:
        hook.remove()
        del head.forward
        if own is not None:
            head.forward = own


class _HeadLoss:
    """Summed loss of some rows of hidden states (batch, seq_len, d_model)."""

    def __init__(
        self, head: nn.Module, rows: Tensor, targets: Tensor, form: LogitsTransform, vocab_size: int
    ) -> None:
        self._head, self._forward, self._vocab_size = head, head.forward, vocab_size
        self._rows, self._targets, self._form = rows, targets, form

    @torch.compiler.disable
    def __call__(self, hidden: Tensor) -> Tensor:
        hidden = hidden.flatten(0, 1)
        if not _is_frozen_linear(self._head):
            return self._followed_by_autograd(hidden)
        keep_gradient = hidden.requires_grad and torch.is_grad_enabled()
        weight, bias = self._head.weight, self._head.bias
        return _FrozenHead.apply(
            hidden, self._rows, self._targets, weight, bias, self._form, keep_gradient
        )

    def _followed_by_autograd(self, hidden: Tensor) -> Tensor:
        """Loss of a head that learns, or is none of PyTorch's; backward remakes its logits."""

        def loss_of(rows: Tensor, targets: Tensor) -> Tensor:
            logits = self._form(self._forward(hidden.index_select(0, rows).unsqueeze(0)).squeeze(0))
            return F.cross_entropy(logits.float(), targets, reduction="sum")

        size = rows_per_chunk(self._vocab_size, hidden.element_size())
        if _is_gathered_inside(self._head):
            # One chunk: modules inside of the head gather their parts whenever they run, which all
            # ranks must do equally often.
            size = max(1, len(self._rows))
        # No rows make one chunk, which is empty.
        chunks = zip(self._rows.split(size), self._targets.split(size), strict=True)
        if not torch.is_grad_enabled():
            start = hidden.new_zeros((), dtype=torch.float32)
            return sum((loss_of(*chunk) for chunk in chunks), start=start)
        losses = [checkpoint(loss_of, *chunk, use_reentrant=False) for chunk in chunks]
        return torch.stack(losses).sum()


def _is_gathered_inside(head: nn.Module) -> bool:
    """True if a head learns and its modules gather their parts one by one, as under ZeRO-3."""
    return not _is_frozen_linear(head) and any(map(is_partitioned, head.parameters()))


def _is_frozen_linear(head: nn.Module) -> bool:
    is_linear = isinstance(head, nn.Linear) and type(head).forward is nn.Linear.forward
    return is_linear and not any(param.requires_grad for param in head.parameters())


def rows_per_chunk(vocab_size: int, element_size: int) -> int:
    """Largest number of rows whose logits are made at once.

    An entry takes `element_size` bytes as the head returns it, and twice 4 bytes in float32.
    """
    return max(1, _CHUNK_BYTES // (vocab_size * (element_size + 2 * 4)))


def loss_bytes(num_targets: int, vocab_size: int, hidden_size: int, element_size: int) -> int:
    """Bytes that the loss of a frozen head takes at its peak: a chunk of logits, and gradients.

    The gradients are those of the targets' rows. A CPU makes fewer logits at a time.
    """
    rows = min(num_targets, rows_per_chunk(vocab_size, element_size))
    return rows * vocab_size * (element_size + 2 * 4) + num_targets * hidden_size * element_size


def _loss_and_gradient(
    raw: Tensor, targets: Tensor, form: LogitsTransform, with_gradient: bool
) -> Tensor:
    """Summed loss of some rows, 0-dim float32; can overwrite the head's output with its gradient.

    With p = softmax(logits) and y the target, d loss / d logits = p - onehot(y).

    Args:
        raw: the head's output, (rows, vocab); overwritten.
        targets: (rows,) int64.
    """
    targets = targets.unsqueeze(1)
    if is_on_cpu(raw):
        return loss_and_gradient_on_cpu(raw, targets, form, with_gradient)
    log_p = torch.log_softmax(form(raw), dim=1, dtype=torch.float32)
    loss = -log_p.gather(1, targets).sum()
    if with_gradient:
        to_gradient(log_p.exp_(), targets, raw, form)
    return loss


class _FrozenHead(torch.autograd.Function):
    """Loss of a frozen linear head; keeps the gradient of its input instead of any logits."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,  # (num_tokens, d_model)
        rows: Tensor,  # (num_targets,) int64
        targets: Tensor,  # (num_targets,) int64
        weight: Tensor,  # (vocab, d_model)
        bias: Tensor | None,  # (vocab,)
        form: LogitsTransform,
        keep_gradient: bool,
    ) -> Tensor:  # 0-dim float32
        loss = hidden.new_zeros((), dtype=torch.float32)
        gradient = hidden.new_empty((len(rows), hidden.shape[1])) if keep_gradient else None
        size = rows_per_chunk(weight.shape[0], hidden.element_size())
        if is_on_cpu(hidden):
            size = min(size, MAX_ROWS)
        for start in range(0, len(rows), size):
            chunk = slice(start, start + size)
            raw = F.linear(hidden.index_select(0, rows[chunk]), weight, bias)
            loss += _loss_and_gradient(raw, targets[chunk], form, keep_gradient)
            if gradient is not None:
                gradient[chunk] = raw @ weight  # raw holds the gradient of the head's output now
            del raw  # before the next one is made
        if gradient is not None:
            ctx.save_for_backward(gradient, rows)
            ctx.num_tokens = len(hidden)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, ...]:
        # The factor is 0-dim and on the device: nothing waits for it.
        gradient, rows = ctx.saved_tensors
        to_hidden = gradient.new_zeros((ctx.num_tokens, gradient.shape[1]))
        if gradient.dtype == torch.float16:  # in which the factor itself may be out of range
            gradient = (gradient.float() * (factor / HALF_GAIN)).to(gradient.dtype)
        else:
            gradient = gradient * factor
        to_hidden.index_copy_(0, rows, gradient)
        return to_hidden, None, None, None, None, None, None
