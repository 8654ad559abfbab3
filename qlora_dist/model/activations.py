"""How much memory a micro-batch takes besides the model, by a formula; and what to change when it does not fit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qlora_dist.config import TrainConfig
from qlora_dist.model.loss import loss_bytes

GIB = 2**30


@dataclass(frozen=True)
class Activations:
    """Bytes that one micro-batch takes on one rank at its peak, beside parameters and optimizer."""

    kept: int
    """For backward, over all layers."""
    working: int
    """Of the layer at work in backward: what it recomputes, and its widest matrix, dequantised."""
    loss: int
    """One chunk of logits, and the gradients of the rows that have targets."""

    @property
    def total(self) -> int:
        """At the peak: the loss is made at the end of forward, and is gone when backward reaches a layer."""
        return self.kept + max(self.working, self.loss)


def activations_of(
    model: Any, num_tokens: int, num_targets: int, num_recomputed: int, element_size: int
) -> Activations:
    """Activations of a decoder, from its dimensions.

    A layer keeps, per token, 8 vectors of d_model (inputs of norms and projections, residuals), 2 of the key-value
    width and 4 of the MLP's width, in the compute type; a recomputed one keeps its input. The counts were fitted to
    `benchmarks/memory.py`, which follows every storage.

    Args:
        model: the text part of a transformers config.
        num_tokens: padding included.
    """
    hidden, layers = model.hidden_size, model.num_hidden_layers
    heads = model.num_attention_heads
    key_value = hidden * (getattr(model, "num_key_value_heads", None) or heads) // heads
    width = getattr(model, "intermediate_size", None) or 4 * hidden
    layer = num_tokens * element_size * (8 * hidden + 2 * key_value + 4 * width)
    recomputed = min(num_recomputed, layers)
    kept = (layers - recomputed) * layer + recomputed * num_tokens * element_size * hidden
    loss = loss_bytes(num_targets, model.vocab_size, hidden, element_size)
    working = (layer if recomputed else 0) + hidden * width * element_size
    return Activations(kept, working, loss)


def num_recomputed_layers(recompute: str | int, num_layers: int) -> int:
    """Layers that `memory.recompute` stands for."""
    if isinstance(recompute, int):
        return min(recompute, num_layers)
    return 0 if recompute == "none" else num_layers


def out_of_memory_message(
    config: TrainConfig, model: Any, *, rows: int, length: int, num_targets: int, is_sharded: bool, device_bytes: int
) -> str:
    """What was too large, and what each possible change would save, largest first.

    Args:
        rows, length: shape of the micro-batch that did not fit.
        is_sharded: whether this rank holds only a part of the base.
    """
    element_size = 2 if config.model.dtype == "bfloat16" else 4
    num_recomputed = num_recomputed_layers(config.memory.recompute, model.num_hidden_layers)

    def total(rows: int, length: int, num_recomputed: int) -> int:
        share = num_targets * rows * length // max(1, num_tokens)
        return activations_of(model, rows * length, share, num_recomputed, element_size).total

    num_tokens = rows * length
    now = total(rows, length, num_recomputed)
    changes = []
    if num_recomputed < model.num_hidden_layers:
        changes.append((now - total(rows, length, model.num_hidden_layers), "memory.recompute: full"))
    if rows > 1:
        accum = config.optim.grad_accum_steps * -(-rows // (rows // 2))
        text = f"optim.micro_batch_size: {rows // 2} with grad_accum_steps: {accum} (the same result)"
        changes.append((now - total(rows // 2, length, num_recomputed), text))
    changes.append((now - total(rows, length // 2, num_recomputed), f"data.max_seq_len: {length // 2}"))
    advice = "; ".join(f"{text} saves about {saved / GIB:.1f} GiB" for saved, text in sorted(changes, reverse=True))
    if not is_sharded:
        advice += "; parallel.backend: fsdp on more GPUs shards the weights"
    elif not config.parallel.cpu_offload:
        advice += "; more GPUs, or parallel.cpu_offload: true, leave more beside the weights"
    return (
        f"the GPU's memory ({device_bytes / GIB:.1f} GiB) is full: a micro-batch of {rows} rows of {length:,} tokens "
        f"takes about {now / GIB:.1f} GiB on top of weights and optimizer. What would help: {advice}. "
        "The same command with such a change goes on from the last checkpoint."
    )
