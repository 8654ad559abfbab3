"""The training loop: the page to read first.

A run reads its data, describes the model on meta, puts adapters on it, cuts it into shards, streams the weights in,
takes up its newest checkpoint if there is one, and then repeats :func:`train_step`. Only the adapters are trained;
everything large is frozen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from peft import PeftModel

from qlora_dist.adapter_folder import Recipe, save_adapter
from qlora_dist.assemble import build_model, load_tokenizer, pad_token_id
from qlora_dist.checkpoint import Checkpoints, Identity, TrainState, adapter_shapes, choose_checkpoint
from qlora_dist.config import TrainConfig
from qlora_dist.console import Reporter
from qlora_dist.data.chat import Sample
from qlora_dist.data.dataset import load_dataset
from qlora_dist.data.sampler import BatchPlan, MicroBatch, collate, run_end, sample_order, seed_of
from qlora_dist.errors import Stopped, TrainingError
from qlora_dist.evaluate import evaluate
from qlora_dist.metrics import Recorder, StepSums
from qlora_dist.model.files import fingerprint, resolve_model_folder
from qlora_dist.model.loss import target_loss_sum
from qlora_dist.model.shards import local_bytes, whole_bytes
from qlora_dist.optim import check_warmup, lr_at
from qlora_dist.parallel import Backend, Engine, Settings, build_engine, check_in_sync, choose_backend, engine_settings
from qlora_dist.run_folder import check_run_folder, create_run_folder, identity, lock_run_folder, mark_stopped
from qlora_dist.runtime import Runtime, start_runtime
from qlora_dist.stopping import StopRequest
from qlora_dist.watchdog import Watchdog


def train(config: TrainConfig) -> None:
    """Run the training that `config` describes, or what is left of it; every process of the run calls this.

    Raises:
        Stopped: somebody asked for it; what was done is in a checkpoint.
        QloraDistError: the input cannot be used (nothing has been written then), or the run cannot go on.
    """
    folder = check_run_folder(config)
    backend = choose_backend(config)
    settings = engine_settings(config, backend)
    runtime = start_runtime(config.seed, config.model.dtype, config.parallel.hang_timeout_seconds)
    reporter = Reporter(runtime.is_main)
    if runtime.is_main and folder.is_dir():
        lock_run_folder(folder)
    watchdog = Watchdog(config.parallel.hang_timeout_seconds, runtime.rank)
    stop = StopRequest(folder, runtime)

    def alive() -> None:
        """What all ranks call together whenever there was progress; raises `Stopped` on all of them alike."""
        watchdog.beat()
        stop.check()

    try:
        _train(config, folder, backend, settings, runtime, reporter, alive)
    except Stopped as stopped:
        if runtime.is_main:
            mark_stopped(folder, str(stopped))
            reporter.say(f"stopped ({stopped}); the same command goes on from here")
        runtime.close()
        raise
    finally:
        watchdog.close()
    runtime.close()


def _train(
    config: TrainConfig, folder: Path, backend: Backend, settings: Settings | None, runtime: Runtime,
    reporter: Reporter, alive: Callable[[], None],
) -> None:  # fmt: skip
    with runtime.main_first():
        model_folder = resolve_model_folder(config.model.path)
        tokenizer = load_tokenizer(model_folder, config.model.trust_remote_code)
        data = load_dataset(config.data, tokenizer, config.seed)
    reporter.say("\n".join(data.notes))

    checkpoint = choose_checkpoint(folder, config.checkpoint.resume, runtime, reporter.say)
    state = checkpoint.state if checkpoint else TrainState()
    order = sample_order(data, config)
    plan = BatchPlan(
        order, config.optim.micro_batch_size, config.optim.grad_accum_steps, runtime.world_size,
        end=run_end(order, config.optim),
    )  # fmt: skip
    num_steps = plan.num_steps(state.step, state.num_samples_seen, config.optim)
    check_warmup(num_steps, config.optim)
    if state.step >= num_steps and (folder / "adapter").is_dir():
        reporter.say(f"this run is finished: {folder / 'adapter'}. checkpoint.resume: never would start it over.")
        return

    model = build_model(config, model_folder, backend, runtime, reporter, settings, alive)
    belongs_to = Identity(fingerprint(model_folder), data.fingerprint(), adapter_shapes(model), identity(config))
    if checkpoint:
        checkpoint.check(belongs_to, is_same_run=checkpoint.path.parent.parent == folder)
        checkpoint.load_adapter(model)
    engine = build_engine(model, config.optim, runtime, settings)
    if checkpoint:
        engine.load_optimizer_state(checkpoint.optimizer_tensors(), state.num_updates)
        reporter.say(f"going on after step {state.step} from {checkpoint.path}")
    reporter.say(
        f"{backend}, {runtime.world_size} x {runtime.device.type}: this rank holds {local_bytes(model) / 2**20:,.0f} "
        f"of {whole_bytes(model) / 2**20:,.0f} MiB | {num_steps:,} steps of {plan.global_batch_size:,} rows"
    )

    def write_adapter(path: Path, tensors: dict[str, torch.Tensor]) -> None:
        save_adapter(path, model, tensors, tokenizer, Recipe(config.model, data.layout))

    checkpoints = Checkpoints(
        folder / "checkpoints", config.checkpoint.keep, belongs_to, runtime, backend, write_adapter
    )

    def save(is_trial: bool = False) -> None:
        if not checkpoints.has(state.step):
            check_in_sync(model, state.step, state.num_samples_seen, runtime)
            optimizer = engine.optimizer_state() if state.num_updates else {}
            checkpoints.write(state, engine.whole_adapter(), optimizer, is_trial)

    if runtime.is_main:
        create_run_folder(folder, config, resumed_step=state.step if checkpoint else None)
    with Recorder(folder, config.logging, runtime, reporter, num_steps, first_step=state.step + 1) as recorder:
        model.train()
        try:
            while True:
                if _is_evaluation_due(config, state, num_steps):
                    result = evaluate(
                        model, data.eval, config.eval, runtime, micro_batch_size=config.optim.micro_batch_size,
                        pad_token_id=pad_token_id(tokenizer), alive=alive, step=state.step,
                        epoch=plan.epoch_at(state.num_samples_seen),
                    )  # fmt: skip
                    recorder.evaluation(result)
                    if state.count_evaluation(result.eval_loss) and state.step > 0:
                        save()
                if state.step == num_steps or (state.step > 0 and is_due(state.step, config.checkpoint.every)):
                    save()
                elif state.step == 1 and checkpoint is None:
                    save(is_trial=True)
                if state.step == num_steps:
                    break
                batches = step_batches(plan, state.num_samples_seen, data.train, runtime, pad_token_id(tokenizer))
                lr = lr_at(state.step + 1, num_steps, config.optim)
                sums = train_step(model, engine, batches, lr, config.optim.max_grad_norm, runtime, alive)
                state.count_step(plan.after_step(state.num_samples_seen), sums.is_finite)
                recorder.step(state.step, lr, sums, plan.epoch_at(state.num_samples_seen), state.num_skipped_steps)
                if state.num_skipped_in_a_row:
                    _consider_skipped_step(state, config, reporter)
                if is_due(state.step, config.parallel.check_every):
                    check_in_sync(model, state.step, state.num_samples_seen, runtime)
                checkpoints.poll()
        except Stopped:
            save()  # of the last step that was finished
            raise
        finally:
            checkpoints.wait()

    adapter = engine.whole_adapter()
    if runtime.is_main:
        write_adapter(folder / "adapter", adapter)
        reporter.say(f"adapter written to {folder / 'adapter'}")
        if state.best_step not in (None, state.step):
            reporter.say(
                f"the evaluation loss was best after step {state.best_step} ({state.best_eval_loss:.4f}): "
                f"{checkpoints.path(state.best_step) / 'adapter'}"
            )


def train_step(
    model: PeftModel,
    engine: Engine,
    batches: Sequence[MicroBatch],
    lr: float,
    max_grad_norm: float | None,
    runtime: Runtime,
    alive: Callable[[], None] = lambda: None,
) -> StepSums:
    """One optimizer step: forward and backward of each micro-batch, then one synchronisation and one update.

    The loss is the mean over the target tokens of the global batch. Each micro-batch contributes its sum divided by
    the count over all ranks and micro-batches, so the way the batch is cut does not matter. Nothing here waits for
    the device before the update.

    Args:
        alive: called before each micro-batch; may raise to end the step, which then has changed nothing.
    """
    counts = torch.tensor(
        [sum(batch.num_targets for batch in batches), sum(batch.num_tokens for batch in batches)],
        dtype=torch.float32, device=runtime.device,
    )  # fmt: skip
    runtime.sum_over_ranks(counts)
    num_targets = counts[0]
    loss = torch.zeros((), device=runtime.device)
    for number, batch in enumerate(batches, start=1):
        alive()
        micro_loss = micro_step(model, batch.to(runtime.device), num_targets, runtime)
        engine.backward(micro_loss, is_last_micro_batch=number == len(batches))
        loss += micro_loss.detach()
    grad_norm = engine.update(lr, max_grad_norm)
    return StepSums(loss=loss, grad_norm=grad_norm, num_targets=counts[0], num_tokens=counts[1])


def micro_step(model: PeftModel, batch: MicroBatch, num_targets: torch.Tensor, runtime: Runtime) -> torch.Tensor:
    """This micro-batch's share of the global mean loss, 0-dim float32."""
    torch.manual_seed(batch.seed)  # dropout depends on where the batch stands in the data, not on who computes it
    with runtime.autocast():
        loss_sum = target_loss_sum(model, batch.input_ids, batch.attention_mask, batch.labels)
    return loss_sum / num_targets


def step_batches(
    plan: BatchPlan, num_samples_seen: int, samples: Sequence[Sample], runtime: Runtime, pad_token_id: int
) -> list[MicroBatch]:
    """The micro-batches of this rank in the optimizer step that begins at that position, on the CPU."""
    return [
        collate([samples[i] for i in group.indices], pad_token_id, seed_of(plan.order.seed, "dropout", group.position))
        for group in plan.micro_batches(num_samples_seen, runtime.rank)
    ]


def is_due(step: int, every: int | None) -> bool:
    """Whether something that happens every `every` steps happens after this one."""
    return every is not None and step % every == 0


def _is_evaluation_due(config: TrainConfig, state: TrainState, num_steps: int) -> bool:
    """At the start, at the end and every so often; not again when the run goes on from where it was done."""
    if not config.has_eval or state.evaluated_step == state.step:
        return False
    return state.step in (0, num_steps) or is_due(state.step, config.eval.every)


def _consider_skipped_step(state: TrainState, config: TrainConfig, reporter: Reporter) -> None:
    """Say that a step updated nothing; give up after too many in a row."""
    in_a_row, limit = state.num_skipped_in_a_row, config.optim.max_skipped_steps
    reporter.say(f"step {state.step} skipped: its gradient is not finite ({in_a_row} in a row, at most {limit})")
    if in_a_row >= limit:
        raise TrainingError(
            f"the gradient was not finite in {in_a_row} steps in a row (optim.max_skipped_steps), so nothing is "
            f"learned any more. Lower optim.lr (now {config.optim.lr:g}), set optim.max_grad_norm, or look at the rows "
            f"around sample {state.num_samples_seen:,}; the last checkpoint is from before."
        )
