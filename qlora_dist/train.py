"""The training loop: the page to read first.

A run reads its data, describes the model on meta, puts adapters on it, cuts it into shards, streams the weights in,
and then repeats :func:`train_step`. Only the adapters are trained; everything large is frozen.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from peft import PeftModel

from qlora_dist.assemble import build_model, load_tokenizer, pad_token_id
from qlora_dist.checkpoint import Recipe, check_run_folder, create_run_folder, save_adapter
from qlora_dist.config import TrainConfig
from qlora_dist.console import Reporter
from qlora_dist.data.chat import Sample
from qlora_dist.data.dataset import load_dataset
from qlora_dist.data.sampler import BatchPlan, MicroBatch, collate
from qlora_dist.evaluate import evaluate
from qlora_dist.metrics import EvalMetrics, Recorder, StepSums
from qlora_dist.model.files import resolve_model_folder
from qlora_dist.model.loss import target_loss_sum
from qlora_dist.model.shards import local_bytes, whole_bytes
from qlora_dist.optim import check_warmup, lr_at
from qlora_dist.parallel import Engine, build_engine, choose_backend, engine_settings
from qlora_dist.runtime import Runtime, start_runtime


def train(config: TrainConfig) -> None:
    """Run the whole training that `config` describes; every process of the run calls this.

    Raises:
        QloraDistError: the input cannot be used; nothing has been written then.
    """
    backend = choose_backend(config)
    settings = engine_settings(config, backend)
    folder = check_run_folder(config)
    runtime = start_runtime(config.seed, config.model.dtype)
    reporter = Reporter(runtime.is_main)

    with runtime.main_first():
        model_folder = resolve_model_folder(config.model.path)
        tokenizer = load_tokenizer(model_folder, config.model.trust_remote_code)
        data = load_dataset(config.data, tokenizer, config.seed)
    reporter.say("\n".join(data.notes))

    model = build_model(config, model_folder, backend, runtime, reporter, settings)
    engine = build_engine(model, config.optim, runtime, settings)
    plan = BatchPlan(
        num_samples=len(data.train),
        seed=config.seed,
        micro_batch_size=config.optim.micro_batch_size,
        grad_accum_steps=config.optim.grad_accum_steps,
        world_size=runtime.world_size,
    )
    num_steps = plan.num_steps(config.optim)
    check_warmup(num_steps, config.optim)
    reporter.say(
        f"{backend}, {runtime.world_size} x {runtime.device.type}: this rank holds {local_bytes(model) / 2**20:,.0f} "
        f"of {whole_bytes(model) / 2**20:,.0f} MiB | {num_steps:,} steps of {plan.global_batch_size:,} rows"
    )

    def evaluate_at(step: int) -> EvalMetrics:
        return evaluate(
            model, data.eval, config.eval, runtime, micro_batch_size=config.optim.micro_batch_size,
            pad_token_id=pad_token_id(tokenizer), step=step, epoch=plan.epoch_at(step),
        )  # fmt: skip

    if runtime.is_main:
        create_run_folder(folder, config)
    with Recorder(folder, config.logging, runtime, reporter, num_steps) as recorder:
        if config.has_eval:
            recorder.evaluation(evaluate_at(step=0))
        model.train()
        for step in range(1, num_steps + 1):
            batches = step_batches(plan, step, data.train, runtime, pad_token_id(tokenizer))
            lr = lr_at(step, num_steps, config.optim)
            sums = train_step(model, engine, batches, lr, config.optim.max_grad_norm, runtime)
            recorder.step(step, lr, sums, plan.epoch_at(step))
            if config.has_eval and (step == num_steps or is_due(step, config.eval.every)):
                recorder.evaluation(evaluate_at(step))

    adapter = engine.whole_adapter()
    if runtime.is_main:
        save_adapter(folder / "adapter", model, adapter, tokenizer, Recipe(config.model, data.layout))
        reporter.say(f"adapter written to {folder / 'adapter'}")
    runtime.close()


def train_step(
    model: PeftModel,
    engine: Engine,
    batches: Sequence[MicroBatch],
    lr: float,
    max_grad_norm: float | None,
    runtime: Runtime,
) -> StepSums:
    """One optimizer step: forward and backward of each micro-batch, then one synchronisation and one update.

    The loss is the mean over the target tokens of the global batch. Each micro-batch contributes its sum divided by
    the count over all ranks and micro-batches, so the way the batch is cut does not matter. Nothing here waits for
    the device.
    """
    counts = torch.tensor(
        [sum(batch.num_targets for batch in batches), sum(batch.num_tokens for batch in batches)],
        dtype=torch.float32, device=runtime.device,
    )  # fmt: skip
    runtime.sum_over_ranks(counts)
    num_targets = counts[0]
    loss = torch.zeros((), device=runtime.device)
    for number, batch in enumerate(batches, start=1):
        micro_loss = micro_step(model, batch.to(runtime.device), num_targets, runtime)
        engine.backward(micro_loss, is_last_micro_batch=number == len(batches))
        loss += micro_loss.detach()
    grad_norm = engine.update(lr, max_grad_norm)
    return StepSums(loss=loss, grad_norm=grad_norm, num_targets=counts[0], num_tokens=counts[1])


def micro_step(model: PeftModel, batch: MicroBatch, num_targets: torch.Tensor, runtime: Runtime) -> torch.Tensor:
    """This micro-batch's share of the global mean loss, 0-dim float32."""
    with runtime.autocast():
        loss_sum = target_loss_sum(model, batch.input_ids, batch.attention_mask, batch.labels)
    return loss_sum / num_targets


def step_batches(
    plan: BatchPlan, step: int, samples: Sequence[Sample], runtime: Runtime, pad_token_id: int
) -> list[MicroBatch]:
    """The micro-batches of this rank in optimizer step `step`, on the CPU."""
    return [
        collate([samples[index] for index in indices], pad_token_id)
        for indices in plan.micro_batches(step, runtime.rank)
    ]


def is_due(step: int, every: int | None) -> bool:
    """Whether something that happens every `every` steps happens after this one."""
    return every is not None and step % every == 0
