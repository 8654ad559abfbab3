"""The message of a step that did not fit, with what each possible change saves."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from qlora_dist.config.schema import TrainConfig
from qlora_dist.data.batch import MicroBatch
from qlora_dist.memory.activations import Widths, activations_of
from qlora_dist.memory.policy import Recompute, fixed_recompute
from qlora_dist.memory.recompute import recompute_of
from qlora_dist.model.parts import ModelParts
from qlora_dist.runtime.memory import GIB, total_bytes
from qlora_dist.runtime.shards import local_bytes, whole_bytes


def largest_batch_message(
    config: TrainConfig, modules: ModelParts, batches: Sequence[MicroBatch], device: torch.device
) -> str:
    """Return the message of a step whose largest micro-batch did not fit."""
    batch = max(batches, key=lambda batch: batch.input_ids.numel())
    rows, length = batch.input_ids.shape
    return out_of_memory_message(
        config,
        Widths.of(modules),
        recompute_of(modules.layers),
        rows=rows,
        length=length,
        num_targets=batch.num_targets,
        is_sharded=local_bytes(modules.model) < whole_bytes(modules.model),
        device_bytes=total_bytes(device),
    )


def out_of_memory_message(
    config: TrainConfig,
    model: Widths,
    recompute: Recompute,
    *,
    rows: int,
    length: int,
    num_targets: int,
    is_sharded: bool,
    device_bytes: int,
) -> str:
    """Say which micro-batch was too large, and the saving of each possible change, largest first.

    Args:
        recompute: policies of the layers in that step.
        rows, length: shape of the micro-batch that did not fit.
        num_targets: its target tokens.
        is_sharded: true if this rank holds only a part of the base.
    """
    size, adapter = 4 if config.model.dtype == "float32" else 2, config.adapter
    everything = fixed_recompute("full", recompute.num_layers)

    def total(new_rows: int, new_length: int, recompute: Recompute) -> int:
        # Targets are taken to be spread evenly over the tokens.
        num_tokens = new_rows * new_length
        share = num_targets * num_tokens // max(1, rows * length)
        return activations_of(model, num_tokens, share, recompute, size, adapter).total

    now = total(rows, length, recompute)
    changes = []
    if recompute != everything:
        changes.append((now - total(rows, length, everything), "memory.recompute: full"))
    if rows > 1:
        accum = config.optim.grad_accum_steps * -(-rows // (rows // 2))
        # With dropout the random numbers depend on the cut into micro-batches.
        same = "" if config.adapter.dropout else " (the same result)"
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
        f"the GPU's memory ({device_bytes / GIB:.1f} GiB) is full: a micro-batch of {rows} rows of "
        f"{length:,} tokens takes about {now / GIB:.1f} GiB on top of weights and optimizer. "
        f"What would help: {advice}. "
        "The same command with such a change goes on from the last checkpoint."
    )
