"""The loss: a sum over target tokens, so that it can be divided once by their number over all ranks.

The logits of all tokens at once are the largest tensors of a training step: in float32, as log-probabilities and as
their gradient they take 12 bytes per token and vocabulary entry, 6 GiB for 4,096 tokens and a vocabulary of 128k. Here
only target tokens get logits, a bounded number at a time, and each piece is turned into its part of the gradient of the
hidden states before the next one is made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.autograd.function import once_differentiable
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
_CHUNK_BYTES = 2**28
"""What the logits of one chunk may take. With a vocabulary of 128k that is 204 rows in bfloat16: enough for a GPU to
spend as long multiplying with the head's weights as reading them."""


def target_loss_sum(
    model: PeftModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    labels: torch.Tensor,
    position_ids: torch.Tensor | None = None,
    num_targets: int | None = None,
) -> torch.Tensor:
    """Summed next-token cross-entropy over target tokens, in float32.

    Args:
        input_ids, attention_mask, labels: (batch, seq_len) int64; labels are aligned with input_ids and shifted here.
        position_ids: (batch, seq_len) int64 of packed rows: they begin at 0 in each sample, which is how the model's
            attention tells samples apart. The mask of padding is not used then.
        num_targets: labels that are targets, first column aside. Without it, the device is waited for to count them.

    Returns:
        0-dim float32, zero when there is no target. The first call for a model takes a forward of a few tokens more.
    """
    form = logits_transform(model)
    targets = nn.functional.pad(
        labels[:, 1:], (0, 1), value=IGNORE_INDEX
    ).flatten()  # (batch * seq_len,), as logits
    inputs = model_inputs(model, input_ids, attention_mask, position_ids)
    if form is None:
        logits = model(**inputs, use_cache=False).logits.flatten(0, 1).float()
        return nn.functional.cross_entropy(
            logits, targets, ignore_index=IGNORE_INDEX, reduction="sum"
        )
    rows = _where(targets != IGNORE_INDEX, num_targets)
    base = base_model(model)
    head, vocab_size = base.get_output_embeddings(), base.get_input_embeddings().num_embeddings
    with _head_returns(head, _HeadLoss(head, rows, targets[rows], form, vocab_size)) as losses:
        model(**inputs, use_cache=False)
    return losses[0]


def _where(mask: torch.Tensor, number: int | None) -> torch.Tensor:
    """Indices of what is true; (number,) int64."""
    if number is None:
        return mask.nonzero().squeeze(1)
    return torch.nonzero_static(mask, size=number).squeeze(1)


def loss_note(model: nn.Module) -> str | None:
    """What to tell the user of this model's loss, if anything; all ranks ask together."""
    if is_chunked(model):
        return None
    if logits_transform(model) is None:
        why, whose = (
            "makes something of its own of the logits (neither scaling nor soft-capping)",
            "all",
        )
    else:
        why, whose = "has an output head that learns and is gathered part by part", "all target"
    return (
        f"{type(base_model(model)).__name__} {why}, so logits of {whose} tokens are computed at once: "
        f"{FULL_LOGITS_BYTES} bytes per token and vocabulary entry."
    )


def is_chunked(model: nn.Module) -> bool:
    """Whether the loss is made of a bounded number of logits at a time; all ranks ask together."""
    return logits_transform(model) is not None and not _is_gathered_inside(
        base_model(model).get_output_embeddings()
    )


# --------------------------------------------------------------------------------------------------------------------
# The loss in the head's place. Its hooks run around it: sharding engines have gathered its weights by then.


@contextmanager
def _head_returns(
    head: nn.Module, loss: Callable[[torch.Tensor], torch.Tensor]
) -> Iterator[list[torch.Tensor]]:
    """Let the head compute a loss from its input; yields the list in which it will be.

    The model goes on with a single number, which nobody looks at.
    """
    losses: list[torch.Tensor] = []

    def keep(_: nn.Module, __: Any, output: torch.Tensor) -> torch.Tensor:
        losses.append(output)
        return output.detach().reshape(1, 1, 1)

    own = head.__dict__.get("forward")
    head.forward = loss
    hook = head.register_forward_hook(
        keep
    )  # the last of its hooks: what sharding engines tie to the output is kept
    try:
        yield losses
    finally:
        hook.remove()
        del head.forward
        if own is not None:
            head.forward = own


class _HeadLoss:
    """Hidden states (batch, seq_len, d_model) to the summed loss of some rows of them."""

    def __init__(
        self,
        head: nn.Module,
        rows: torch.Tensor,
        targets: torch.Tensor,
        form: LogitsTransform,
        vocab_size: int,
    ) -> None:
        self._head, self._forward, self._vocab_size = head, head.forward, vocab_size
        self._rows, self._targets, self._form = rows, targets, form

    @torch.compiler.disable
    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = hidden.flatten(0, 1)
        if _is_frozen_linear(self._head):
            keep_gradient = hidden.requires_grad and torch.is_grad_enabled()
            weight, bias = self._head.weight, self._head.bias
            return _FrozenHead.apply(
                hidden, self._rows, self._targets, weight, bias, self._form, keep_gradient
            )
        return self._followed_by_autograd(hidden)

    def _followed_by_autograd(self, hidden: torch.Tensor) -> torch.Tensor:
        """For a head that learns, or is none of PyTorch's: its logits are computed again in backward, by chunks."""

        def loss_of(rows: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            logits = self._form(self._forward(hidden.index_select(0, rows).unsqueeze(0)).squeeze(0))
            return nn.functional.cross_entropy(logits.float(), targets, reduction="sum")

        size = rows_per_chunk(self._vocab_size, hidden.element_size())
        if _is_gathered_inside(self._head):
            # Modules inside of it gather their parts whenever they run, which all ranks must do equally often.
            size = max(1, len(self._rows))
        chunks = zip(
            self._rows.split(size), self._targets.split(size), strict=True
        )  # of no rows, one that is empty
        if not torch.is_grad_enabled():
            return sum(
                (loss_of(*chunk) for chunk in chunks),
                start=hidden.new_zeros((), dtype=torch.float32),
            )
        losses = [checkpoint(loss_of, *chunk, use_reentrant=False) for chunk in chunks]
        return torch.stack(losses).sum()


def _is_gathered_inside(head: nn.Module) -> bool:
    """Whether a head that learns is in parts that its modules gather one by one, as ZeRO-3 does."""
    return not _is_frozen_linear(head) and any(map(is_partitioned, head.parameters()))


def _is_frozen_linear(head: nn.Module) -> bool:
    is_linear = isinstance(head, nn.Linear) and type(head).forward is nn.Linear.forward
    return is_linear and not any(param.requires_grad for param in head.parameters())


def rows_per_chunk(vocab_size: int, element_size: int) -> int:
    """Rows whose logits are made at once, at most: each takes its type's size, and twice that of float32, per entry."""
    return max(1, _CHUNK_BYTES // (vocab_size * (element_size + 2 * 4)))


def loss_bytes(num_targets: int, vocab_size: int, hidden_size: int, element_size: int) -> int:
    """Bytes that the loss of a frozen head takes at its peak: one chunk of logits, and the rows' gradients. Of these, a
    CPU makes fewer logits at a time, and takes less."""
    rows = min(num_targets, rows_per_chunk(vocab_size, element_size))
    return rows * vocab_size * (element_size + 2 * 4) + num_targets * hidden_size * element_size


def _loss_and_gradient(
    raw: torch.Tensor, targets: torch.Tensor, form: LogitsTransform, with_gradient: bool
) -> torch.Tensor:
    """Summed loss of some rows, 0-dim float32; turns what the head returned into its gradient, if that is wanted.

    With p = softmax(logits) and y the target, d loss / d logits = p - onehot(y).

    Args:
        raw: (rows, vocab), overwritten.
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
    """Loss of a linear head without a gradient of its own; keeps the gradient of its input instead of any logits."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,  # (num_tokens, d_model)
        rows: torch.Tensor,  # (num_targets,) int64
        targets: torch.Tensor,  # (num_targets,) int64
        weight: torch.Tensor,  # (vocab, d_model)
        bias: torch.Tensor | None,  # (vocab,)
        form: LogitsTransform,
        keep_gradient: bool,
    ) -> torch.Tensor:  # 0-dim float32
        loss = hidden.new_zeros((), dtype=torch.float32)
        gradient = hidden.new_empty((len(rows), hidden.shape[1])) if keep_gradient else None
        size = rows_per_chunk(weight.shape[0], hidden.element_size())
        if is_on_cpu(hidden):
            size = min(size, MAX_ROWS)
        for start in range(0, len(rows), size):
            chunk = slice(start, start + size)
            raw = nn.functional.linear(hidden.index_select(0, rows[chunk]), weight, bias)
            loss += _loss_and_gradient(raw, targets[chunk], form, keep_gradient)
            if gradient is not None:
                gradient[chunk] = raw @ weight
            del raw  # before the next one is made
        if gradient is not None:
            ctx.save_for_backward(gradient, rows)
            ctx.num_tokens = len(hidden)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gradient, rows = ctx.saved_tensors
        to_hidden = gradient.new_zeros((ctx.num_tokens, gradient.shape[1]))
        factor = grads[0]  # 0-dim, on the device: nothing waits for it
        if gradient.dtype == torch.float16:  # where the factor itself may be out of range
            gradient = (gradient.float() * (factor / HALF_GAIN)).to(gradient.dtype)
        else:
            gradient = gradient * factor
        to_hidden.index_copy_(0, rows, gradient)
        return to_hidden, None, None, None, None, None, None
