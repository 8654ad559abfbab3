"""Token-weighted loss on held-out data, over all ranks, uneven splits included."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

import torch
from peft import PeftModel

from qlora_dist.config.schema import EvalConfig
from qlora_dist.data.batch import collate, eval_batches
from qlora_dist.data.samples import Sample
from qlora_dist.metrics.rows import EvalMetrics
from qlora_dist.model.loss import target_loss_sum
from qlora_dist.runtime.processes import Runtime


def num_eval_batches(
    num_samples: int, config: EvalConfig, micro_batch_size: int, runtime: Runtime
) -> int:
    """Micro-batches of each rank in one evaluation."""
    num_batches = -(-num_samples // (micro_batch_size * runtime.world_size))
    return num_batches if config.max_batches is None else min(num_batches, config.max_batches)


@torch.no_grad()
def evaluate(
    model: PeftModel,
    samples: Sequence[Sample],
    config: EvalConfig,
    runtime: Runtime,
    *,
    micro_batch_size: int,
    pad_token_id: int,
    check_in: Callable[[], None] = lambda: None,
    on_batch: Callable[[int], None] = lambda number: None,
    step: int = 0,
    epoch: float = 0.0,
) -> EvalMetrics:
    """Mean cross-entropy per target token of `samples`; a collective, the same result on every rank.

    Args:
        alive: called before each micro-batch, by all ranks alike; may raise to end it.
        on_batch: called after each, with how many this rank has done.
    """
    started = time.perf_counter()
    was_training = model.training
    model.eval()
    sums = torch.zeros(2, dtype=torch.float64, device=runtime.device)  # loss, target tokens
    for number, indices in enumerate(
        eval_batches(len(samples), micro_batch_size, runtime.rank, runtime.world_size), start=1
    ):
        if config.max_batches is not None and number > config.max_batches:
            break
        check_in()
        batch = collate([samples[i] for i in indices], pad_token_id).to(runtime.device)
        with runtime.autocast():
            sums[0] += target_loss_sum(
                model,
                batch.input_ids,
                batch.attention_mask,
                batch.labels,
                num_targets=batch.num_targets,
            )
        sums[1] += batch.num_targets
        on_batch(number)
    model.train(was_training)
    loss_sum, num_targets = runtime.sum_over_ranks(sums).tolist()
    loss = loss_sum / num_targets
    return EvalMetrics(
        step=step,
        eval_loss=loss,
        eval_perplexity=math.exp(min(loss, 700.0)),  # exp overflows beyond 709
        num_target_tokens=int(num_targets),
        seconds=time.perf_counter() - started,
        epoch=epoch,
    )
