"""Token-weighted loss on held-out data, over all ranks, uneven splits included."""

# Tested by tests/distributed/test_zero.py.

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice

import torch
from peft import PeftModel

from qlora_dist.config.schema import EvalConfig
from qlora_dist.data.batch import MicroBatch, collate, eval_batches
from qlora_dist.data.samples import Sample
from qlora_dist.metrics.rows import EvalMetrics
from qlora_dist.model.loss import target_loss_sum
from qlora_dist.runtime.processes import Runtime


def eval_micro_batches(
    samples: Sequence[Sample],
    config: EvalConfig,
    micro_batch_size: int,
    pad_token_id: int,
    runtime: Runtime,
) -> tuple[int, Iterator[MicroBatch]]:
    """Number of this rank's micro-batches in one evaluation; and the micro-batches.

    The number is equal on all ranks. The iterator collates the micro-batches one at a time.
    """
    own = eval_batches(len(samples), micro_batch_size, runtime.rank, runtime.world_size)
    groups = list(islice(own, config.max_batches))
    return len(groups), (collate([samples[i] for i in group], pad_token_id) for group in groups)


@torch.no_grad()
def evaluate(
    model: PeftModel,
    batches: Iterable[MicroBatch],
    runtime: Runtime,
    check_in: Callable[[], None] = lambda: None,
    on_batch: Callable[[int], None] = lambda number: None,
    step: int = 0,
    epoch: float = 0.0,
) -> EvalMetrics:
    """Mean cross-entropy per target token over the micro-batches of all ranks; a collective.

    Every rank gets the same result.

    Args:
        batches: this rank's micro-batches, as many as each other rank has.
        check_in: called before each micro-batch, by all ranks alike; may raise to end the
            evaluation.
        on_batch: called after each micro-batch with the number that this rank has done.
        step, epoch: position of the run, copied into the result.
    """
    started = time.perf_counter()
    was_training = model.training
    model.eval()
    # (2,): loss, target tokens; float64, where the order of the sum changes no visible digit.
    sums = torch.zeros(2, dtype=torch.float64, device=runtime.device)
    for number, batch in enumerate(batches, start=1):
        check_in()
        batch = batch.to(runtime.device)
        ids, mask, labels = batch.input_ids, batch.attention_mask, batch.labels
        with runtime.autocast():
            # Evaluation rows hold one sample each: no positions.
            sums[0] += target_loss_sum(model, ids, mask, labels, num_targets=batch.num_targets)
        sums[1] += batch.num_targets
        on_batch(number)
    model.train(was_training)
    loss_sum, num_targets = runtime.sum_over_ranks(sums).tolist()
    loss = loss_sum / num_targets
    perplexity = math.exp(min(loss, 700.0))  # exp overflows beyond 709
    seconds = time.perf_counter() - started
    return EvalMetrics(step, loss, perplexity, int(num_targets), seconds, epoch)
