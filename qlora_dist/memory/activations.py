"""Memory of a micro-batch besides the model, by a formula; and the recomputation that fits."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from qlora_dist.config.schema import AdapterConfig
from qlora_dist.memory.policy import Recompute
from qlora_dist.model.expert_products import group_size, is_transposed
from qlora_dist.model.experts import expert_modules, expert_stacks, experts_per_token
from qlora_dist.model.loss import FULL_LOGITS_BYTES, loss_bytes
from qlora_dist.model.parts import ModelParts, lora_layers


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


@dataclass(frozen=True)
class Widths:
    """Widths of a decoder layer's tensors, in elements a token."""

    hidden: int
    """d_model."""
    inputs: tuple[int, ...]
    """in_features of each linear layer."""
    outputs: tuple[int, ...]
    """out_features of each."""
    vocab: int = 0
    """Entries of the vocabulary."""
    group: int = 0
    """Elements of the matrices of experts that are dequantized at a time."""

    @property
    def largest_matrix(self) -> int:
        """Elements of the largest matrix, or group of matrices, that is dequantized at a time."""
        return max((self.group, *map(int.__mul__, self.inputs, self.outputs)))

    @classmethod
    def of(cls, parts: ModelParts) -> Widths:
        """Return the widths of a model's widest layer: those of some families differ."""
        hidden, vocab = parts.dimensions.hidden_size, parts.embedding.num_embeddings
        active = experts_per_token(parts.dimensions)
        stacks = (stack.shape for stack in expert_stacks(parts.base).values())
        # In 16 bits: groups of float32 have half of the elements, and as many bytes.
        groups = (group_size(shape, 2) * shape[1:].numel() for shape in stacks)
        sizes = int(vocab), max(groups, default=0)
        layers = [cls(hidden, *_features(layer, active), *sizes) for layer in parts.layers]
        return max(layers, key=lambda widths: (sum(widths.outputs), sum(widths.inputs)))


def _features(layer: nn.Module, num_active: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return in_features and out_features of the linear layers, without those of adapters.

    Those of routed experts count for each expert that a token goes through.
    """
    of_adapters = {
        module
        for adapter in lora_layers(layer)
        for kind in (adapter.lora_A, adapter.lora_B)
        for module in kind.modules()
    }
    found = [
        (module.in_features, module.out_features)
        for module in layer.modules()
        if isinstance(module, nn.Linear) and module not in of_adapters
    ]
    for module in dict(expert_modules(layer)).values():
        for stack in expert_stacks(module).values():
            rows, columns = stack.shape[1:]
            sizes = (rows, columns) if is_transposed(module) else (columns, rows)
            found += [sizes] * num_active
    return tuple(size for size, _ in found), tuple(size for _, size in found)


def layer_bytes(
    model: Widths, num_tokens: int, element_size: int, adapter: AdapterConfig, mask_bytes: int = 0
) -> LayerBytes:
    """Estimate the bytes that a decoder layer keeps, from its widths.

    The formula is fitted, on the safe side, to a count of every storage (`benchmarks/memory.py`).
    It takes all linear layers for adapted.

    Args:
        num_tokens: padding included.
        element_size: bytes of an element of the compute type.
        mask_bytes: bytes of a mask that attention keeps besides.
    """
    hidden, outputs, widest = model.hidden, sum(model.outputs), max(model.inputs, default=0)
    token = num_tokens * element_size
    # LoRA's A(x) of each linear layer: (tokens, rank).
    others = token * len(model.outputs) * adapter.rank + mask_bytes
    if adapter.dropout:
        # The remaining input, and a byte per element that says which remained.
        others += num_tokens * (element_size + 1) * sum(model.inputs)
    # DoRA keeps one more vector of each output, and a second one when it recomputes selectively: of
    # both products.
    for_dora = token * outputs if adapter.use_dora else 0
    # The outputs of all products, five vectors of d_model (inputs of norms and projections,
    # residuals) and two of the MLP: a layer written out operation by operation. Norms and MLPs
    # that are one function each (`fused_norm_mlp.py`) keep a quarter less.
    none = token * (outputs + 5 * hidden + 2 * widest) + others + for_dora
    # The outputs and an input remain: norms, activations and products are made again.
    selective = token * (outputs + hidden) + others + 2 * for_dora
    return LayerBytes(none, selective, full=token * hidden)


def activations_of(
    model: Widths,
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
    layer = layer_bytes(model, num_tokens, element_size, adapter, mask_bytes)
    loss = loss_bytes(num_targets, model.vocab, model.hidden, element_size)
    if not is_loss_chunked:
        loss = num_tokens * model.vocab * FULL_LOGITS_BYTES
    working = (layer.none if recompute.num_full else 0) + model.largest_matrix * element_size
    return Activations(layer.kept(recompute), working, loss)
