"""The training loop: the page to read first.

A run reads its data, describes the model on meta, puts adapters on it, cuts it into shards, streams the weights in,
takes up its newest checkpoint if there is one, and then repeats :func:`train_step`. Only the adapters are trained;
everything large is frozen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from peft import PeftModel

from qlora_dist.adapter_folder import Recipe, save_adapter
from qlora_dist.assemble import build_model
from qlora_dist.budget import RecomputeBudget
from qlora_dist.checkpoint import Checkpoints, Identity, TrainState, adapter_shapes, choose_checkpoint
from qlora_dist.config import TrainConfig
from qlora_dist.console import Reporter
from qlora_dist.data.dataset import Dataset
from qlora_dist.data.loader import StepLoader
from qlora_dist.data.sampler import BatchPlan, MicroBatch, run_end, sample_order
from qlora_dist.errors import Stopped, TrainingError
from qlora_dist.evaluate import evaluate, num_eval_batches
from qlora_dist.inputs import load_inputs
from qlora_dist.loss_scale import LossScale
from qlora_dist.metrics import Recorder, StepSums
from qlora_dist.model.activations import out_of_memory_message
from qlora_dist.model.attention import attention_note
from qlora_dist.model.files import fingerprint, resolve_model_folder
from qlora_dist.model.flops import Flops, flops_of
from qlora_dist.model.footprint import total_bytes
from qlora_dist.model.isolation import check_isolation
from qlora_dist.model.loss import loss_note, target_loss_sum
from qlora_dist.model.offload import check_offload
from qlora_dist.model.recompute import recompute_of
from qlora_dist.model.shards import local_bytes, whole_bytes
from qlora_dist.model.skeleton import base_model
from qlora_dist.optim import check_warmup, lr_at
from qlora_dist.parallel import Backend, Engine, Settings, build_engine, check_in_sync, choose_backend, engine_settings
from qlora_dist.peak import peak_flops
from qlora_dist.profiler import StepProfiler
from qlora_dist.run_folder import check_run_folder, dtype_of_run, identity
from qlora_dist.runtime import Runtime, is_first_process, start_runtime
from qlora_dist.session import Session
from qlora_dist.tokenizer import pad_token_id


def train(config: TrainConfig) -> None:
    """Run the training that `config` describes, or what is left of it; every process of the run calls this.

    Raises:
        Stopped: somebody asked for it; what was done is in a checkpoint.
        QloraDistError: the input cannot be used (nothing has been written then), or the run cannot go on.
    """
    folder = check_run_folder(config)
    backend = choose_backend(config)
    dtype, is_kept = dtype_of_run(config, folder)
    patience = config.parallel.hang_timeout_seconds
    with Reporter(is_first_process()).working("waiting for all processes to start"):
        runtime = start_runtime(config.seed, dtype, patience, is_dtype_kept=is_kept)
    config = replace(config, model=replace(config.model, dtype=runtime.dtype_name))
    settings = engine_settings(config, backend)
    with Session(folder, config, runtime) as session:
        with session.reporter.working("preparing the run"):
            training = prepare(config, backend, settings, session)
        if training is not None:
            training.run()
            with session.reporter.working("writing the adapter"):
                training.finish()


def prepare(config: TrainConfig, backend: Backend, settings: Settings | None, session: Session) -> Training | None:
    """Everything before the first step: data, checkpoint, model, engine; None when the run is finished already."""
    runtime, say, working = session.runtime, session.reporter.say, session.reporter.working
    say(runtime.compute_note)
    check_offload(config.memory, runtime.device)
    with working(f"fetching {config.model.path}"):
        model_folder = runtime.main_first(lambda: resolve_model_folder(config.model.path))
    tokenizer, data = load_inputs(config, model_folder, session.reporter, runtime.main_first)
    say("\n".join(data.notes))

    with working("looking for a checkpoint"):
        checkpoint = choose_checkpoint(session.folder, config.checkpoint.resume, runtime, say)
    state = checkpoint.state if checkpoint else TrainState()
    is_own = checkpoint is not None and checkpoint.path.parent.parent == session.folder
    if not is_own:
        state.best_eval_loss = state.best_step = None  # another run's best is not among this one's checkpoints
    plan = BatchPlan(
        order := sample_order(data, config),
        config.optim.micro_batch_size, config.optim.grad_accum_steps, runtime.world_size, run_end(order, config.optim),
    )  # fmt: skip
    num_steps = plan.num_steps(state.step, state.num_samples_seen, config.optim)
    check_warmup(num_steps, config.optim)
    adapter = session.folder / "adapter"
    if state.step >= num_steps and adapter.is_dir():
        say(f"this run is finished: {adapter}. checkpoint.resume: never would start it over.")
        return None

    session.watch()
    with working("building the model"):
        model = build_model(config, model_folder, backend, runtime, session.reporter, settings, session.alive)
    held_bytes = local_bytes(model)  # a forward without a backward leaves some engines' output head gathered
    belongs_to = Identity(fingerprint(model_folder), data.fingerprint(), adapter_shapes(model), identity(config))
    if checkpoint:
        checkpoint.check(belongs_to, is_own)
        checkpoint.load_adapter(model)
    engine = build_engine(model, config.optim, runtime, settings)
    with runtime.autocast():  # both run the model, which some engines prepare for that
        if config.data.packing:
            check_isolation(model, runtime.device)
        if note := loss_note(model):
            say(note)
    if checkpoint:
        engine.load_optimizer_state(checkpoint.optimizer_tensors(), state.num_updates)
        say(f"going on after step {state.step} from {checkpoint.path}")
    if runtime.device.type == "cpu" and config.optim.optimizer.startswith("paged_"):
        say(f"{config.optim.optimizer}: without a GPU there is nothing to page, its state is in host memory anyway")
    say(attention_note(model, config.model, is_packed=config.data.packing))
    say(
        f"{backend}, {runtime.world_size} x {runtime.device.type}: this rank holds {held_bytes / 2**20:,.0f} "
        f"of {whole_bytes(model) / 2**20:,.0f} MiB | {num_steps:,} steps of {plan.global_batch_size:,} rows"
    )

    budget = RecomputeBudget(config, model, runtime, say)
    budget.choose()

    def write_adapter(path: Path, tensors: dict[str, torch.Tensor]) -> None:
        save_adapter(path, model, tensors, tokenizer, Recipe(config.model, data.layout))

    checkpoints = Checkpoints(
        session.folder / "checkpoints", config.checkpoint.keep, belongs_to, runtime, backend, write_adapter
    )
    if checkpoint and is_own:
        checkpoints.note(state.step)
    session.claim_folder(resumed_step=state.step if checkpoint else None)
    padding = pad_token_id(tokenizer, base_model(model).config.get_text_config().vocab_size)
    loader = StepLoader(plan, data.train, runtime.rank, padding, pin_memory=runtime.device.type == "cuda")
    return Training(
        config, session, data, padding, plan, loader, num_steps, model, engine, budget, checkpoints, state,
        LossScale(state, runtime, say),
    )  # fmt: skip


@dataclass
class Training:
    """A run that is ready to train; the methods are in the order in which they run."""

    config: TrainConfig
    session: Session
    data: Dataset
    pad_token_id: int
    plan: BatchPlan
    loader: StepLoader
    num_steps: int
    model: PeftModel
    engine: Engine
    budget: RecomputeBudget
    checkpoints: Checkpoints
    state: TrainState
    """Everything that a resumed run goes on from, besides tensors."""
    loss_scale: LossScale

    def run(self) -> None:
        """Take optimizer steps until the last; evaluate and save in between.

        Raises:
            Stopped: after a checkpoint of the last step that was finished.
        """
        runtime, reporter = self.session.runtime, self.session.reporter
        first_step = self.state.step + 1
        folder, logging, peak = self.session.folder, self.config.logging, peak_flops(runtime)
        profiler = StepProfiler(folder / "profile", logging.profile_steps if runtime.is_main else None, reporter)
        with (
            self.loader,
            Recorder(folder, logging, runtime, reporter, self.num_steps, first_step, peak) as recorder,
            profiler,
        ):
            self.model.train()
            try:
                self.look_back(recorder)
                while self.state.step < self.num_steps:
                    self.step(recorder)
                    self.look_back(recorder)
                    profiler.step()
            except Stopped:
                self.save()
                raise
            finally:
                with reporter.working("waiting for the checkpoint to be written"):
                    self.checkpoints.wait()

    def step(self, recorder: Recorder) -> None:
        """One optimizer step, counted and recorded."""
        state, optim = self.state, self.config.optim
        batches = self.loader.take(state.num_samples_seen)
        lr = lr_at(state.step + 1, self.num_steps, optim)
        with self.budget.measuring():
            while self.loss_scale.is_to_repeat(sums := self._attempt(batches, lr)):
                pass
        self.budget.after_step(batches)
        state.count_step(self.plan.after_step(state.num_samples_seen), sums.is_finite)
        epoch, flops = self.plan.epoch_at(state.num_samples_seen), sum(map(self._useful_flops, batches))
        recorder.step(state.step, lr, sums, epoch, state.num_skipped_steps, self.loader.wait_seconds, flops)
        if state.num_skipped_in_a_row:
            self._consider_skipped_step()
        if is_due(state.step, self.config.parallel.check_every):
            check_in_sync(self.model, state.step, state.num_samples_seen, self.session.runtime)
        self.checkpoints.poll()

    def _attempt(self, batches: Sequence[MicroBatch], lr: float) -> StepSums:
        """A step that may turn out to have changed nothing."""
        self.engine.loss_scale = self.loss_scale.value
        try:
            return train_step(
                self.model, self.engine, batches, lr, self.config.optim.max_grad_norm, self.session.runtime,
                self.session.alive,
                self._make_room if self.engine.can_drop_gradients and self.budget.can_make_room else None,
            )  # fmt: skip
        except torch.OutOfMemoryError as error:
            raise TrainingError(self._too_large(batches)) from error

    def look_back(self, recorder: Recorder) -> None:
        """What may be due between two steps: an evaluation, a checkpoint."""
        state = self.state
        is_last = state.step == self.num_steps
        is_eval_due = state.step == 0 or is_last or is_due(state.step, self.config.eval.every)
        is_evaluated = state.evaluated_step == state.step  # by the run that this one goes on from
        if self.config.has_eval and is_eval_due and not is_evaluated:
            self.evaluate(recorder)
        if state.step == 0:
            return
        if is_last or state.best_step == state.step or is_due(state.step, self.config.checkpoint.every):
            self.save()
        elif state.step == 1:
            self.save(is_trial=True)  # what cannot work fails now, not after hours

    def evaluate(self, recorder: Recorder) -> None:
        """Loss on the held-out samples."""
        samples, settings, runtime = self.data.eval, self.config.eval, self.session.runtime
        micro_batch_size = self.config.optim.micro_batch_size
        num_batches = num_eval_batches(len(samples), settings, micro_batch_size, runtime)
        try:
            with self.session.reporter.working("evaluating batch", num_batches) as update:
                result = evaluate(
                    self.model, samples, settings, runtime, micro_batch_size=micro_batch_size,
                    pad_token_id=self.pad_token_id, alive=self.session.alive, on_batch=update,
                    step=self.state.step, epoch=self.plan.epoch_at(self.state.num_samples_seen),
                )  # fmt: skip
        except torch.OutOfMemoryError as error:
            raise TrainingError(
                "the GPU's memory is full in an evaluation, which keeps nothing for backward. Lower "
                f"optim.micro_batch_size (now {micro_batch_size}) or data.max_seq_len."
            ) from error
        self.state.count_evaluation(result.eval_loss)
        recorder.evaluation(result)

    def save(self, is_trial: bool = False) -> None:
        """A checkpoint of where the run stands, unless there is one: all ranks gather, rank 0 writes meanwhile."""
        state = self.state
        if state.step == 0 or self.checkpoints.has(state.step):
            return
        with self.session.reporter.working("saving a checkpoint"):  # which waits for the one before
            check_in_sync(self.model, state.step, state.num_samples_seen, self.session.runtime)
            optimizer = self.engine.optimizer_state() if state.num_updates else {}
            self.checkpoints.write(state, self.engine.whole_adapter(), optimizer, is_trial)

    def finish(self) -> None:
        """Write the trained adapter."""
        adapter = self.engine.whole_adapter()
        if not self.session.runtime.is_main:
            return
        path, state, say = self.session.folder / "adapter", self.state, self.session.reporter.say
        self.checkpoints.write_adapter(path, adapter)
        say(f"adapter written to {path}")
        if state.best_step not in (None, 0, state.step):
            best = self.checkpoints.path(state.best_step) / "adapter"
            say(f"the evaluation loss was best after step {state.best_step} ({state.best_eval_loss:.4f}): {best}")

    @cached_property
    def _flops(self) -> Flops:
        return flops_of(self.model)

    def _useful_flops(self, batch: MicroBatch) -> int:
        """Operations that this micro-batch needs."""
        return self._flops.of(batch.attention_mask, batch.position_ids, batch.num_tokens, batch.num_targets)

    def _make_room(self) -> None:
        self.engine.drop_gradients()
        self.budget.make_room()

    def _too_large(self, batches: Sequence[MicroBatch]) -> str:
        """What to change when the largest of these micro-batches did not fit."""
        batch = max(batches, key=lambda batch: batch.input_ids.numel())
        rows, length = batch.input_ids.shape
        runtime, model = self.session.runtime, base_model(self.model).config.get_text_config()
        return out_of_memory_message(
            self.config, model, recompute_of(self.model), rows=rows, length=length, num_targets=batch.num_targets,
            is_sharded=local_bytes(self.model) < whole_bytes(self.model),
            device_bytes=total_bytes(runtime.device),
        )  # fmt: skip

    def _consider_skipped_step(self) -> None:
        """Say that a step updated nothing; give up after too many in a row."""
        in_a_row, limit = self.state.num_skipped_in_a_row, self.config.optim.max_skipped_steps
        self.session.reporter.say(
            f"step {self.state.step} skipped: its gradient is not finite ({in_a_row} in a row, at most {limit})"
        )
        if in_a_row >= limit:
            raise TrainingError(
                f"the gradient was not finite in {in_a_row} steps in a row (optim.max_skipped_steps), so nothing is "
                f"learned any more. Lower optim.lr (now {self.config.optim.lr:g}), set optim.max_grad_norm, or look "
                f"at the rows of these steps; the last checkpoint is from before."
            )


def train_step(
    model: PeftModel,
    engine: Engine,
    batches: Sequence[MicroBatch],
    lr: float,
    max_grad_norm: float | None,
    runtime: Runtime,
    alive: Callable[[], None] = lambda: None,
    make_room: Callable[[], None] | None = None,
) -> StepSums:
    """One optimizer step: forward and backward of each micro-batch, then one synchronisation and one update.

    The loss is the mean over the target tokens of the global batch. Each micro-batch contributes its sum divided by
    the count over all ranks and micro-batches, so the way the batch is cut does not matter. Nothing of this
    program waits for the device before the update (transformers does, once or twice, where it makes a mask).

    Args:
        alive: called before each micro-batch; may raise to end the step, which then has changed nothing.
        make_room: called once if memory is full before the update; then all micro-batches are computed again.
    """
    counts = torch.tensor(
        [sum(batch.num_targets for batch in batches), sum(batch.num_tokens for batch in batches)],
        dtype=torch.float32, device=runtime.device,
    )  # fmt: skip
    runtime.sum_over_ranks(counts)
    num_targets = counts[0]
    loss = None
    try:
        loss = _backward_of_all(model, engine, batches, num_targets, runtime, alive)
    except torch.OutOfMemoryError:
        if make_room is None:
            raise
    if loss is None:  # out of the handler: the error holds the frames, and these what forward has kept
        assert make_room is not None
        make_room()
        loss = _backward_of_all(model, engine, batches, num_targets, runtime, alive)
    grad_norm = engine.update(lr, max_grad_norm)
    return StepSums(loss=loss, grad_norm=grad_norm, num_targets=counts[0], num_tokens=counts[1])


def _backward_of_all(
    model: PeftModel,
    engine: Engine,
    batches: Sequence[MicroBatch],
    num_targets: torch.Tensor,
    runtime: Runtime,
    alive: Callable[[], None],
) -> torch.Tensor:
    """Forward and backward of a step's micro-batches; returns this rank's share of the loss, 0-dim float32."""
    loss = torch.zeros((), device=runtime.device)
    for number, batch in enumerate(batches, start=1):
        alive()
        micro_loss = micro_step(model, batch.to(runtime.device), num_targets, runtime)
        engine.backward(micro_loss, is_last_micro_batch=number == len(batches))
        loss += micro_loss.detach()
    return loss


def micro_step(model: PeftModel, batch: MicroBatch, num_targets: torch.Tensor, runtime: Runtime) -> torch.Tensor:
    """This micro-batch's share of the global mean loss, 0-dim float32."""
    torch.manual_seed(batch.seed)  # dropout depends on where the batch stands in the data, not on who computes it
    with runtime.autocast():
        loss_sum = target_loss_sum(
            model, batch.input_ids, batch.attention_mask, batch.labels, batch.position_ids, batch.num_targets
        )
    return loss_sum / num_targets


def is_due(step: int, every: int | None) -> bool:
    """Whether something that happens every `every` steps happens after this one."""
    return every is not None and step % every == 0
