"""Memory of a micro-batch besides the model, by a formula; and the recomputation that fits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qlora_dist.config.schema import AdapterConfig
from qlora_dist.memory.policy import Recompute
from qlora_dist.model.loss import FULL_LOGITS_BYTES, loss_bytes


@dataclass(frozen=True)
class LayerBytes:
    """Bytes that one decoder layer keeps of a micro-batch for backward, under each policy."""

    none: int
    selective: int
    full: int

    def kept(self, recompute: Recompute) -> int:
        """Bytes that all layers keep under these policies."""
        num_selective, num_full = recompute.num_selective, recompute.num_full
        num_none = recompute.num_layers - num_selective - num_full
        return num_none * self.none + num_selective * self.selective + num_full * self.full

    def least_recompute(
        self, room: int, num_layers: int, again: int, with_selective: bool
    ) -> Recompute:
        """Find the least recomputation with which the kept bytes of all layers fit into `room`.

        When nothing fits, all layers recompute fully.

        Args:
            room: bytes that are free for all layers.
            again: bytes that have to fit too once a layer recomputes fully: its tensors in
                backward.
            with_selective: false rules the selective policy out.
        """
        # All layers recompute selectively, where that frees anything, before any does fully: matrix
        # products are the last thing to compute twice.
        most = num_layers if with_selective and self.selective < self.none else 0
        choices = [Recompute(num_layers, number) for number in range(most + 1)]
        choices += [
            Recompute(num_layers, max(0, most - number), number) for number in range(1, num_layers)
        ]
        for choice in choices:
            if self.kept(choice) + (again if choice.num_full else 0) <= room:
                return choice
        return Recompute(num_layers, 0, num_layers)


@dataclass(frozen=True)
class Activations:
    """Bytes that one micro-batch takes on one rank at its peak, beside parameters and optimizer."""

    kept: int
    """Kept for backward by all layers."""
    working: int
    """The layer at work in backward: its recomputed tensors, and its widest matrix, dequantized."""
    loss: int
    """One chunk of logits, and the gradients of the rows that have targets."""

    @property
    def total(self) -> int:
        """Bytes at the peak; the loss is gone when backward reaches a layer."""
        return self.kept + max(self.working, self.loss)


def layer_bytes(
    model: Any, num_tokens: int, element_size: int, adapter: AdapterConfig, mask_bytes: int = 0
) -> LayerBytes:
    """Estimate the bytes that a decoder layer keeps, from its dimensions.

    The formula is fitted, on the safe side, to a count of every storage (`benchmarks/memory.py`).
    It takes all seven linear layers for adapted.

    Args:
        model: the text part of a transformers config.
        num_tokens: padding included.
        element_size: bytes of an element of the compute type.
        mask_bytes: bytes of a mask that attention keeps besides.
    """
    hidden, heads = model.hidden_size, model.num_attention_heads
    key_value = hidden * (getattr(model, "num_key_value_heads", None) or heads) // heads
    width = getattr(model, "intermediate_size", None) or 4 * hidden
    token = num_tokens * element_size
    # LoRA's A(x) of seven linear layers: (tokens, rank) each.
    others = token * 7 * adapter.rank + mask_bytes
    if adapter.dropout:
        # The remaining input, and a byte per element that says which remained.
        others += num_tokens * (element_size + 1) * (6 * hidden + width)
    # DoRA keeps one more vector of each output, and a second one when it recomputes selectively: of
    # both products.
    outputs = token * (3 * hidden + 2 * key_value + 2 * width) if adapter.use_dora else 0
    # 8 vectors of d_model (inputs of norms and projections, residuals), 2 of keys and values, 4 of
    # the MLP: a layer written out operation by operation. Norms and MLPs that are one function each
    # (`fused_norm_mlp.py`) keep a quarter less.
    none = token * (8 * hidden + 2 * key_value + 4 * width) + others + outputs
    # Half of d_model's and the MLP's remain: norms, activations and products are made again.
    selective = token * (4 * hidden + 2 * key_value + 2 * width) + others + 2 * outputs
    return LayerBytes(none, selective, full=token * hidden)


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
    """Estimate the activations of a decoder, with the arguments of :func:`layer_bytes`.

    Args:
        num_targets: tokens whose logits are computed.
        is_loss_chunked: result of :func:`~qlora_dist.model.loss.is_chunked` for the model.
    """
    hidden = model.hidden_size
    width = getattr(model, "intermediate_size", None) or 4 * hidden
    layer = layer_bytes(model, num_tokens, element_size, adapter, mask_bytes)
    loss = loss_bytes(num_targets, model.vocab_size, hidden, element_size)
    if not is_loss_chunked:
        loss = num_tokens * model.vocab_size * FULL_LOGITS_BYTES
    working = (layer.none if recompute.num_full else 0) + hidden * width * element_size
    return Activations(layer.kept(recompute), working, loss)
