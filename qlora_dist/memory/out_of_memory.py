"""The message of a step that did not fit, with what each possible change saves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from qlora_dist.config.schema import TrainConfig
from qlora_dist.data.batch import MicroBatch
from qlora_dist.memory.activations import activations_of
from qlora_dist.memory.policy import Recompute, fixed_recompute
from qlora_dist.memory.recompute import recompute_of
from qlora_dist.model.parts import ModelParts
from qlora_dist.runtime.memory import GIB, total_bytes
from qlora_dist.runtime.shards import local_bytes, whole_bytes


def largest_batch_message(
    config: TrainConfig, modules: ModelParts, batches: Sequence[MicroBatch], device: torch.device
) -> str:
    """The message for a step in which the largest of these micro-batches did not fit."""
    batch = max(batches, key=lambda batch: batch.input_ids.numel())
    rows, length = batch.input_ids.shape
    return out_of_memory_message(
        config,
        modules.dimensions,
        recompute_of(modules.layers),
        rows=rows,
        length=length,
        num_targets=batch.num_targets,
        is_sharded=local_bytes(modules.model) < whole_bytes(modules.model),
        device_bytes=total_bytes(device),
    )


def out_of_memory_message(
    config: TrainConfig,
    model: Any,
    recompute: Recompute,
    *,
    rows: int,
    length: int,
    num_targets: int,
    is_sharded: bool,
    device_bytes: int,
) -> str:
    """What was too large, and what each possible change would save, largest first.

    Args:
        recompute: what the layers did.
        rows, length: shape of the micro-batch that did not fit.
        is_sharded: whether this rank holds only a part of the base.
    """
    element_size = 4 if config.model.dtype == "float32" else 2
    everything = fixed_recompute("full", recompute.num_layers)

    def total(rows: int, length: int, recompute: Recompute) -> int:
        share = num_targets * rows * length // max(1, num_tokens)
        return activations_of(
            model, rows * length, share, recompute, element_size, config.adapter
        ).total

    num_tokens = rows * length
    now = total(rows, length, recompute)
    changes = []
    if recompute != everything:
        changes.append((now - total(rows, length, everything), "memory.recompute: full"))
    if rows > 1:
        accum = config.optim.grad_accum_steps * -(-rows // (rows // 2))
        same = (
            "" if config.adapter.dropout else " (the same result)"
        )  # what is dropped depends on the micro-batch
        text = f"optim.micro_batch_size: {rows // 2} with grad_accum_steps: {accum}{same}"
        changes.append((now - total(rows // 2, length, recompute), text))
    changes.append((now - total(rows, length // 2, recompute), f"data.max_seq_len: {length // 2}"))
    advice = "; ".join(
        f"{text} saves about {saved / GIB:.1f} GiB" for saved, text in sorted(changes, reverse=True)
    )
    if not is_sharded:
        advice += "; parallel.backend: fsdp on more GPUs shards the weights"
    elif not config.parallel.cpu_offload:
        advice += "; more GPUs, or parallel.cpu_offload: true, leave more beside the weights"
    return (
        f"the GPU's memory ({device_bytes / GIB:.1f} GiB) is full: a micro-batch of {rows} rows of {length:,} tokens "
        f"takes about {now / GIB:.1f} GiB on top of weights and optimizer. What would help: {advice}. "
        "The same command with such a change goes on from the last checkpoint."
    )
