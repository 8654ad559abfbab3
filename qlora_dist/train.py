"""The training loop: the page to read first.

A run reads its data, describes the model on meta, puts adapters on it, cuts it into shards, streams the weights in,
takes up its newest checkpoint if there is one, and then repeats :func:`train_step`. Only the adapters are trained;
everything large is frozen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from peft import PeftModel

from qlora_dist.config.schema import TrainConfig
from qlora_dist.data.batch import MicroBatch
from qlora_dist.errors import Stopped, TrainingError
from qlora_dist.evaluate import evaluate, num_eval_batches
from qlora_dist.memory.out_of_memory import largest_batch_message
from qlora_dist.metrics.console import Reporter
from qlora_dist.metrics.profiler import StepProfiler
from qlora_dist.metrics.recorder import Recorder
from qlora_dist.metrics.rows import StepSums
from qlora_dist.model.loss import target_loss_sum
from qlora_dist.model.mfu import Flops, flops_of, peak_flops
from qlora_dist.optim.schedule import lr_at
from qlora_dist.parallel.checks import check_in_sync
from qlora_dist.parallel.choice import choose_backend, make_backend
from qlora_dist.parallel.engine import Engine
from qlora_dist.prepare import RunParts, prepare
from qlora_dist.run.folder import check_run_folder, dtype_of_run
from qlora_dist.run.session import Session
from qlora_dist.run.state import TrainState
from qlora_dist.runtime.processes import Runtime, is_first_process, start_runtime


def train(config: TrainConfig) -> None:
    """Run the training that `config` describes, or what is left of it; every process of the run calls this.

    Raises:
        Stopped: somebody asked for it; what was done is in a checkpoint.
        QloraDistError: the input cannot be used (nothing has been written then), or the run cannot go on.
    """
    folder = check_run_folder(config)
    backend_name = choose_backend(config)
    dtype, is_kept = dtype_of_run(config, folder)
    patience = config.parallel.hang_timeout_seconds
    with Reporter(is_first_process()).working("waiting for all processes to start"):
        runtime = start_runtime(config.seed, dtype, patience, is_dtype_kept=is_kept)
    config = replace(config, model=replace(config.model, dtype=runtime.dtype_name))
    backend = make_backend(backend_name, config, runtime)
    with Session(folder, config, runtime) as session:
        with session.reporter.working("preparing the run"):
            parts = prepare(config, backend, session)
        if parts is not None:
            training = Training(config, session, parts)
            training.run()
            with session.reporter.working("writing the adapter"):
                training.finish()


@dataclass
class Training:
    """A run that is ready to train; the methods are in the order in which they run."""

    config: TrainConfig
    session: Session
    parts: RunParts

    @property
    def state(self) -> TrainState:
        """Everything that a resumed run goes on from, besides tensors."""
        return self.parts.state

    def run(self) -> None:
        """Take optimizer steps until the last; evaluate and save in between.

        Raises:
            Stopped: after a checkpoint of the last step that was finished.
        """
        runtime, reporter, folder = self.session.runtime, self.session.reporter, self.session.folder
        state, num_steps, logging = self.state, self.parts.num_steps, self.config.logging
        profiler = StepProfiler(
            folder / "profile", logging.profile_steps if runtime.is_main else None, reporter
        )
        peak = peak_flops(runtime)
        recorder = Recorder(folder, logging, runtime, reporter, num_steps, state.step + 1, peak)
        with self.parts.loader, recorder, profiler:
            self.parts.modules.model.train()
            try:
                self.after_step(recorder)
                while state.step < num_steps:
                    self.step(recorder)
                    self.after_step(recorder)
                    profiler.step()
            except Stopped:
                self.save()
                raise
            finally:
                with reporter.working("waiting for the checkpoint to be written"):
                    self.parts.checkpoints.wait()

    def step(self, recorder: Recorder) -> None:
        """Take one optimizer step, count it and record it."""
        parts, state = self.parts, self.state
        batches = parts.loader.take(state.num_samples_seen)
        lr = lr_at(state.step + 1, parts.num_steps, self.config.optim)
        with parts.budget.measuring():
            while parts.loss_scale.is_to_repeat(sums := self._attempt(batches, lr)):
                pass
        parts.budget.after_step(batches)
        state.count_step(parts.plan.after_step(state.num_samples_seen), sums.is_finite)
        epoch, flops = (
            parts.plan.epoch_at(state.num_samples_seen),
            sum(map(self._useful_flops, batches)),
        )
        recorder.step(
            state.step, lr, sums, epoch, state.num_skipped_steps, parts.loader.wait_seconds, flops
        )
        if state.num_skipped_in_a_row:
            self._consider_skipped_step()
        if is_due(state.step, self.config.parallel.check_every):
            check_in_sync(
                parts.modules.adapters, state.step, state.num_samples_seen, self.session.runtime
            )
        parts.checkpoints.poll()

    def after_step(self, recorder: Recorder) -> None:
        """Evaluate and save where that is due: before the first step, after some, after the last."""
        state = self.state
        is_last = state.step == self.parts.num_steps
        is_eval_due = state.step == 0 or is_last or is_due(state.step, self.config.eval.every)
        is_evaluated = state.evaluated_step == state.step  # by the run that this one goes on from
        if self.config.has_eval and is_eval_due and not is_evaluated:
            self.evaluate(recorder)
        if state.step == 0:
            return
        if (
            is_last
            or state.best_step == state.step
            or is_due(state.step, self.config.checkpoint.every)
        ):
            self.save()
        elif state.step == 1:
            self.save(is_trial=True)  # what cannot work fails now, not after hours

    def evaluate(self, recorder: Recorder) -> None:
        """Compute the loss on the held-out samples."""
        parts, state, session, settings = self.parts, self.state, self.session, self.config.eval
        micro_batch_size = self.config.optim.micro_batch_size
        num_batches = num_eval_batches(
            len(parts.data.eval), settings, micro_batch_size, session.runtime
        )
        try:
            with session.reporter.working("evaluating batch", num_batches) as update:
                result = evaluate(
                    parts.modules.model,
                    parts.data.eval,
                    settings,
                    session.runtime,
                    micro_batch_size=micro_batch_size,
                    pad_token_id=parts.pad_token_id,
                    check_in=session.check_in,
                    on_batch=update,
                    step=state.step,
                    epoch=parts.plan.epoch_at(state.num_samples_seen),
                )
        except torch.OutOfMemoryError as error:
            raise TrainingError(
                "the GPU's memory is full in an evaluation, which keeps nothing for backward. Lower "
                f"optim.micro_batch_size (now {micro_batch_size}) or data.max_seq_len."
            ) from error
        state.count_evaluation(result.eval_loss)
        recorder.evaluation(result)

    def save(self, is_trial: bool = False) -> None:
        """Save where the run stands, unless that is saved: all ranks gather, rank 0 writes while training goes on."""
        parts, state = self.parts, self.state
        if state.step == 0 or parts.checkpoints.has(state.step):
            return
        with self.session.reporter.working("saving a checkpoint"):  # which waits for the one before
            check_in_sync(
                parts.modules.adapters, state.step, state.num_samples_seen, self.session.runtime
            )
            optimizer = parts.engine.optimizer_state() if state.num_updates else {}
            parts.checkpoints.write(state, parts.engine.whole_adapter(), optimizer, is_trial)

    def finish(self) -> None:
        """Write the trained adapter."""
        adapter = self.parts.engine.whole_adapter()
        if not self.session.runtime.is_main:
            return
        path, state, log = self.session.folder / "adapter", self.state, self.session.reporter.log
        self.parts.checkpoints.write_adapter(path, adapter)
        log(f"adapter written to {path}")
        if state.best_step not in (None, 0, state.step):
            best = self.parts.checkpoints.path(state.best_step) / "adapter"
            log(
                f"the evaluation loss was best after step {state.best_step} ({state.best_eval_loss:.4f}): {best}"
            )

    def _attempt(self, batches: Sequence[MicroBatch], lr: float) -> StepSums:
        """Take a step that may turn out to have changed nothing."""
        engine, budget, modules = self.parts.engine, self.parts.budget, self.parts.modules
        engine.loss_scale = self.parts.loss_scale.value
        make_room = self._make_room if engine.can_drop_gradients and budget.can_make_room else None
        runtime, check_in, max_norm = (
            self.session.runtime,
            self.session.check_in,
            self.config.optim.max_grad_norm,
        )
        try:
            return train_step(
                modules.model, engine, batches, lr, max_norm, runtime, check_in, make_room
            )
        except torch.OutOfMemoryError as error:
            raise TrainingError(
                largest_batch_message(self.config, modules, batches, runtime.device)
            ) from error

    def _make_room(self) -> None:
        self.parts.engine.drop_gradients()
        self.parts.budget.make_room()

    @cached_property
    def _flops(self) -> Flops:
        return flops_of(self.parts.modules)

    def _useful_flops(self, batch: MicroBatch) -> int:
        """Operations that this micro-batch needs."""
        return self._flops.of(
            batch.attention_mask, batch.position_ids, batch.num_tokens, batch.num_targets
        )

    def _consider_skipped_step(self) -> None:
        """Say that a step updated nothing; give up after too many in a row."""
        in_a_row, limit = self.state.num_skipped_in_a_row, self.config.optim.max_skipped_steps
        self.session.reporter.log(
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
    check_in: Callable[[], None] = lambda: None,
    make_room: Callable[[], None] | None = None,
) -> StepSums:
    """One optimizer step: forward and backward of each micro-batch, then one synchronization and one update.

    The loss is the mean over the target tokens of the global batch. Each micro-batch contributes its sum divided by
    the count over all ranks and micro-batches, so the way the batch is cut does not matter. Nothing of this
    program waits for the device before the update (transformers does, once or twice, where it makes a mask).

    Args:
        alive: called before each micro-batch; may raise to end the step, which then has changed nothing.
        make_room: called once if memory is full before the update; then all micro-batches are computed again.
    """
    counts = torch.tensor(
        [sum(batch.num_targets for batch in batches), sum(batch.num_tokens for batch in batches)],
        dtype=torch.float32,
        device=runtime.device,
    )
    runtime.sum_over_ranks(counts)
    num_targets = counts[0]
    loss = None
    try:
        loss = _backward_of_all(model, engine, batches, num_targets, runtime, check_in)
    except torch.OutOfMemoryError:
        if make_room is None:
            raise
    if (
        loss is None
    ):  # out of the handler: the error holds the frames, and these what forward has kept
        assert make_room is not None
        make_room()
        loss = _backward_of_all(model, engine, batches, num_targets, runtime, check_in)
    grad_norm = engine.update(lr, max_grad_norm)
    return StepSums(loss=loss, grad_norm=grad_norm, num_targets=counts[0], num_tokens=counts[1])


def _backward_of_all(
    model: PeftModel,
    engine: Engine,
    batches: Sequence[MicroBatch],
    num_targets: torch.Tensor,
    runtime: Runtime,
    check_in: Callable[[], None],
) -> torch.Tensor:
    """Forward and backward of a step's micro-batches; returns this rank's share of the loss, 0-dim float32."""
    loss = torch.zeros((), device=runtime.device)
    for number, batch in enumerate(batches, start=1):
        check_in()
        micro_loss = micro_step(model, batch.to(runtime.device), num_targets, runtime)
        engine.backward(micro_loss, is_last_micro_batch=number == len(batches))
        loss += micro_loss.detach()
    return loss


def micro_step(
    model: PeftModel, batch: MicroBatch, num_targets: torch.Tensor, runtime: Runtime
) -> torch.Tensor:
    """This micro-batch's share of the global mean loss, 0-dim float32."""
    torch.manual_seed(
        batch.seed
    )  # dropout depends on where the batch stands in the data, not on who computes it
    with runtime.autocast():
        loss_sum = target_loss_sum(
            model,
            batch.input_ids,
            batch.attention_mask,
            batch.labels,
            batch.position_ids,
            batch.num_targets,
        )
    return loss_sum / num_targets


def is_due(step: int, every: int | None) -> bool:
    """Whether something that happens every `every` steps happens after this one."""
    return every is not None and step % every == 0
