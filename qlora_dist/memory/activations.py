"""How much memory a micro-batch takes besides the model, by a formula; and what to change when it does not fit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qlora_dist.config.schema import AdapterConfig
from qlora_dist.memory.policy import Recompute
from qlora_dist.model.loss import FULL_LOGITS_BYTES, loss_bytes


@dataclass(frozen=True)
class LayerBytes:
    """What one decoder layer keeps of a micro-batch for backward, under each policy."""

    none: int
    selective: int
    full: int

    def kept(self, recompute: Recompute) -> int:
        """By all layers."""
        num_others = recompute.num_layers - recompute.num_selective - recompute.num_full
        return (
            num_others * self.none
            + recompute.num_selective * self.selective
            + recompute.num_full * self.full
        )

    def least_recompute(
        self, room: int, num_layers: int, again: int, with_selective: bool
    ) -> Recompute:
        """The least recomputation with which what all layers keep fits into `room` bytes.

        All layers recompute selectively, where that frees anything, before any does fully: products are the last thing
        to compute twice. When nothing fits, all recompute fully.

        Args:
            again: bytes that have to fit too where a layer recomputes fully: all that it makes again.
            with_selective: whether that frees anything here.
        """
        with_selective = with_selective and self.selective < self.none
        choices = [
            Recompute(num_layers, number)
            for number in range(num_layers + 1 if with_selective else 1)
        ]
        choices += [
            Recompute(num_layers, num_layers - number if with_selective else 0, number)
            for number in range(1, num_layers)
        ]
        for choice in choices:
            if self.kept(choice) + (again if choice.num_full else 0) <= room:
                return choice
        return Recompute(num_layers, 0, num_layers)


@dataclass(frozen=True)
class Activations:
    """Bytes that one micro-batch takes on one rank at its peak, beside parameters and optimizer."""

    kept: int
    """For backward, over all layers."""
    working: int
    """Of the layer at work in backward: what it recomputes, and its widest matrix, dequantized."""
    loss: int
    """One chunk of logits, and the gradients of the rows that have targets."""

    @property
    def total(self) -> int:
        """At the peak: the loss is made at the end of forward, and is gone when backward reaches a layer."""
        return self.kept + max(self.working, self.loss)


def layer_bytes(
    model: Any, num_tokens: int, element_size: int, adapter: AdapterConfig, mask_bytes: int = 0
) -> LayerBytes:
    """What a decoder layer keeps, from its dimensions.

    Per token and in the compute type: 8 vectors of d_model (inputs of norms and projections, residuals), 2 of the
    key-value width and 4 of the MLP's width: a layer written out operation by operation. Where norms and MLP are one
    function each (`elementwise.py`) it keeps a quarter less. About half of those of d_model and of the MLP remain when
    norms, activation functions and products are made again; a fully recomputed layer keeps its input. Fitted to what
    follows every storage (`benchmarks/memory.py`), on the safe side.

    Each of the seven linear layers also keeps what LoRA's A made of its input. With dropout it keeps what was left of
    its input, and where (a byte each), which random numbers decided; with DoRA one more vector of its output, and
    recomputing selectively another: of both its products. All layers are counted, adapted or not.

    Args:
        model: the text part of a transformers config.
        num_tokens: padding included.
        mask_bytes: what attention keeps of a mask besides.
    """
    hidden, heads = model.hidden_size, model.num_attention_heads
    key_value = hidden * (getattr(model, "num_key_value_heads", None) or heads) // heads
    width = getattr(model, "intermediate_size", None) or 4 * hidden
    token = num_tokens * element_size
    adapted = token * 7 * adapter.rank
    if adapter.dropout:
        adapted += num_tokens * (element_size + 1) * (6 * hidden + width)
    lengthened = token * (3 * hidden + 2 * key_value + 2 * width) if adapter.use_dora else 0
    return LayerBytes(
        token * (8 * hidden + 2 * key_value + 4 * width) + adapted + lengthened + mask_bytes,
        token * (4 * hidden + 2 * key_value + 2 * width) + adapted + 2 * lengthened + mask_bytes,
        token * hidden,
    )


def activations_of(
    model: Any,
    num_tokens: int,
    num_targets: int,
    recompute: Recompute,
    element_size: int,
    adapter: AdapterConfig,
    *,
    is_loss_chunked: bool = True,
    mask_bytes: int = 0,
) -> Activations:
    """Activations of a decoder, from its dimensions; arguments as in :func:`layer_bytes`.

    Args:
        is_loss_chunked: what :func:`~qlora_dist.model.loss.is_chunked` says of the model.
    """
    hidden = model.hidden_size
    width = getattr(model, "intermediate_size", None) or 4 * hidden
    layer = layer_bytes(model, num_tokens, element_size, adapter, mask_bytes)
    loss = loss_bytes(num_targets, model.vocab_size, hidden, element_size)
    if not is_loss_chunked:
        loss = num_tokens * model.vocab_size * FULL_LOGITS_BYTES
    working = (layer.none if recompute.num_full else 0) + hidden * width * element_size
    return Activations(layer.kept(recompute), working, loss)
