"""The training loop: the page to read first, in the order of a run.

:func:`train` starts the processes and prepares the run: it reads the data, describes the model on
the meta device, puts adapters on it, cuts it into shards, streams the weights in, and loads the
newest checkpoint if there is one. :class:`Training` takes one optimizer step after the other,
evaluates and saves where due, and writes the adapter at the end. A step is :func:`train_step`:
forward and backward of each micro-batch (:func:`micro_step`), then one synchronization and one
update. Only the adapters are trained; the 4-bit base model is frozen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from peft import PeftModel
from torch import Tensor

from qlora_dist.config.schema import TrainConfig
from qlora_dist.data.batch import MicroBatch
from qlora_dist.errors import Stopped, TrainingError
from qlora_dist.evaluate import eval_micro_batches, evaluate
from qlora_dist.memory.out_of_memory import largest_batch_message
from qlora_dist.metrics.console import Reporter
from qlora_dist.metrics.profiler import StepProfiler
from qlora_dist.metrics.recorder import Recorder
from qlora_dist.metrics.rows import StepSums
from qlora_dist.model.experts import take_token_counts
from qlora_dist.model.loss import target_loss_sum
from qlora_dist.model.mfu import Flops, flops_of, peak_flops
from qlora_dist.optim.schedule import lr_at
from qlora_dist.parallel.checks import check_all_learn, check_in_sync
from qlora_dist.parallel.choice import choose_backend, make_backend
from qlora_dist.parallel.engine import Engine
from qlora_dist.prepare import RunParts, prepare
from qlora_dist.run.folder import check_run_folder, date_of_run, dtype_of_run
from qlora_dist.run.session import Session
from qlora_dist.run.state import TrainState
from qlora_dist.runtime.processes import Runtime, is_first_process, start_runtime


def train(config: TrainConfig) -> None:
    """Run the training that `config` describes, or resume it; every process of the run calls this.

    Raises:
        Stopped: somebody asked the run to stop; its last finished step is in a checkpoint.
        QloraDistError: the input cannot be used (then nothing was written), or the run cannot go
            on.
    """
    # Mistakes in the configuration show here, before any process waits for another.
    folder = check_run_folder(config)
    backend_name = choose_backend(config)
    dtype, is_kept = dtype_of_run(config, folder)
    patience = config.parallel.hang_timeout_seconds
    with Reporter(is_first_process()).working("waiting for all processes to start"):
        runtime = start_runtime(config.seed, dtype, patience, is_dtype_kept=is_kept)
    # `model.dtype: auto` and the date are settled now: the processes have agreed on them.
    config = replace(config, model=replace(config.model, dtype=runtime.dtype_name))
    date = runtime.from_main(date_of_run(config, folder))
    config = replace(config, data=replace(config.data, template_date=date))
    backend = make_backend(backend_name, config, runtime)
    with Session(folder, config, runtime) as session:
        with session.reporter.working("preparing the run"):
            parts = prepare(config, backend, session)
        if parts is None:  # the run was finished before
            return
        training = Training(config, session, parts)
        training.run()
        with session.reporter.working("writing the adapter"):
            training.finish()


@dataclass
class Training:
    """A prepared run; its methods stand in the order in which they first run."""

    config: TrainConfig
    session: Session
    parts: RunParts

    @property
    def state(self) -> TrainState:
        """Position of the run and its counters: all that a checkpoint holds besides tensors."""
        return self.parts.state

    @cached_property
    def recorder(self) -> Recorder:
        """Writer of metrics.jsonl, TensorBoard events and progress."""
        runtime, reporter = self.session.runtime, self.session.reporter
        folder, logging, num_steps = self.session.folder, self.config.logging, self.parts.num_steps
        first_step, peak = self.state.step + 1, peak_flops(runtime)
        counts = partial(take_token_counts, self.parts.modules.base)
        return Recorder(folder, logging, runtime, reporter, num_steps, first_step, peak, counts)

    @cached_property
    def flops(self) -> Flops:
        """Useful operations per token, per target and per attended pair of this model."""
        return flops_of(self.parts.modules)

    def run(self) -> None:
        """Take optimizer steps until the last; evaluate and save in between.

        Raises:
            Stopped: after a checkpoint of the last finished step.
        """
        session, parts, state = self.session, self.parts, self.state
        num_traced = self.config.logging.profile_steps if session.runtime.is_main else None
        profiler = StepProfiler(session.folder / "profile", num_traced, session.reporter)
        with parts.loader, self.recorder, profiler:
            parts.modules.model.train()
            try:
                self.after_step()  # at step 0, or what a resumed run still owes after its last step
                while state.step < parts.num_steps:
                    self.step()
                    self.after_step()
                    profiler.step()
            except Stopped:
                self.save()
                raise
            finally:
                with session.reporter.working("waiting for the checkpoint to be written"):
                    parts.checkpoints.wait()

    def step(self) -> None:
        """Take one optimizer step, count it and record it.

        Raises:
            Stopped: a stop was requested; the step has changed nothing.
            TrainingError: the memory is full, the ranks disagree, an adapter gets no gradient, or
                too many steps were skipped.
        """
        parts, state = self.parts, self.state
        batches = parts.loader.take(state.num_samples_seen)
        lr = lr_at(state.step + 1, parts.num_steps, self.config.optim)
        with parts.budget.measuring():
            # float16 gradients may overflow: the step then changed nothing and the scale is halved.
            while parts.loss_scale.is_to_repeat(sums := self._attempt(batches, lr)):
                pass
        # With `memory.recompute: auto`, choose anew what layers recompute, by this step's memory.
        parts.budget.after_step(batches)
        state.count_step(parts.plan.after_step(state.num_samples_seen), sums.is_finite)
        epoch = parts.plan.epoch_at(state.num_samples_seen)
        skipped, waited = state.num_skipped_steps, parts.loader.wait_seconds
        flops = sum(
            self.flops.of(one.attention_mask, one.position_ids, one.num_tokens, one.num_targets)
            for one in batches
        )
        self.recorder.step(state.step, lr, sums, epoch, skipped, waited, flops)
        if state.num_skipped_in_a_row:
            self._report_skipped_step()
        if state.num_updates == 1 and sums.is_finite and self.config.adapter.path is None:
            check_all_learn(parts.modules.adapters, self.session.runtime)
        if is_due(state.step, self.config.parallel.check_every):
            self._check_in_sync()
        parts.checkpoints.poll()  # raises errors of the thread that writes checkpoints

    def _attempt(self, batches: Sequence[MicroBatch], lr: float) -> StepSums:
        """Call :func:`train_step` with the current loss scale, which a later attempt may halve."""
        parts, session = self.parts, self.session
        engine, model, runtime = parts.engine, parts.modules.model, session.runtime
        max_norm, check_in = self.config.optim.max_grad_norm, session.check_in
        engine.loss_scale = parts.loss_scale.value
        can_repeat = engine.can_drop_gradients and parts.budget.can_make_room
        make_room = self._make_room if can_repeat else None
        try:
            return train_step(model, engine, batches, lr, max_norm, runtime, check_in, make_room)
        except torch.OutOfMemoryError as error:
            message = largest_batch_message(self.config, parts.modules, batches, runtime.device)
            raise TrainingError(message) from error

    def _make_room(self) -> None:
        """Free memory for a second try of this step: drop gradients, recompute all layers."""
        self.parts.engine.drop_gradients()
        self.parts.budget.make_room()

    def _report_skipped_step(self) -> None:
        """Log that a step updated nothing; give up after `optim.max_skipped_steps` in a row."""
        in_a_row, limit = self.state.num_skipped_in_a_row, self.config.optim.max_skipped_steps
        self.session.reporter.log(
            f"step {self.state.step} skipped: its gradient is not finite "
            f"({in_a_row} in a row, at most {limit})"
        )
        if in_a_row >= limit:
            raise TrainingError(
                f"the gradient was not finite in {in_a_row} steps in a row "
                "(optim.max_skipped_steps), so nothing is learned any more. Lower optim.lr (now "
                f"{self.config.optim.lr:g}), set optim.max_grad_norm, or look at the rows of these "
                "steps; the last checkpoint is from before."
            )

    def _check_in_sync(self) -> None:
        adapters, state = self.parts.modules.adapters, self.state
        check_in_sync(adapters, state.step, state.num_samples_seen, self.session.runtime)

    def after_step(self) -> None:
        """Evaluate and save where due: before the first step, after some steps, after the last."""
        config, state = self.config, self.state
        is_last = state.step == self.parts.num_steps
        is_eval_due = state.step == 0 or is_last or is_due(state.step, config.eval.every)
        # The run that this one resumes may have evaluated this step already.
        if config.has_eval and is_eval_due and state.evaluated_step != state.step:
            self.evaluate()
        is_best = state.best_step == state.step
        if state.step and (is_last or is_best or is_due(state.step, config.checkpoint.every)):
            self.save()
        elif state.step == 1:
            self.save(is_trial=True)  # a disk that takes no checkpoint fails now, not in hours

    def evaluate(self) -> None:
        """Compute the loss on the held-out samples, record it, and note the best step.

        Raises:
            TrainingError: the memory is full.
        """
        parts, state, session = self.parts, self.state, self.session
        size = self.config.optim.micro_batch_size
        epoch = parts.plan.epoch_at(state.num_samples_seen)
        num_batches, batches = eval_micro_batches(
            parts.data.eval, self.config.eval, size, parts.pad_token_id, session.runtime
        )
        model, runtime, check_in = parts.modules.model, session.runtime, session.check_in
        try:
            with session.reporter.working("evaluating batch", num_batches) as update:
                row = evaluate(model, batches, runtime, check_in, update, state.step, epoch)
        except torch.OutOfMemoryError as error:
            raise TrainingError(
                "the GPU's memory is full in an evaluation, which keeps nothing for backward. "
                f"Lower optim.micro_batch_size (now {size}) or data.max_seq_len."
            ) from error
        state.count_evaluation(row.eval_loss)
        self.recorder.evaluation(row)

    def save(self, is_trial: bool = False) -> None:
        """Save the run at its current step, unless that checkpoint exists; a collective.

        All ranks gather the tensors; rank 0 writes them while training goes on.

        Args:
            is_trial: only proves that checkpoints can be written; the next regular one replaces it.
        """
        parts, state = self.parts, self.state
        if state.step == 0 or parts.checkpoints.has(state.step):
            return
        # This waits for the checkpoint before, if that is still being written.
        with self.session.reporter.working("saving a checkpoint"):
            self._check_in_sync()
            # Moments exist from the first update on; skipped steps make none.
            optimizer = parts.engine.optimizer_state() if state.num_updates else {}
            parts.checkpoints.write(state, parts.engine.whole_adapter(), optimizer, is_trial)

    def finish(self) -> None:
        """Write the trained adapter to `adapter/` in the run's folder; a collective."""
        checkpoints, state, log = self.parts.checkpoints, self.state, self.session.reporter.log
        adapter = self.parts.engine.whole_adapter()
        if not self.session.runtime.is_main:
            return
        path = self.session.folder / "adapter"
        checkpoints.write_adapter(path, adapter)
        log(f"adapter written to {path}")
        if state.best_step not in (None, 0, state.step):
            best = checkpoints.path(state.best_step) / "adapter"
            log(
                f"the evaluation loss was best after step {state.best_step} "
                f"({state.best_eval_loss:.4f}): {best}"
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
    """Run forward and backward of each micro-batch, then synchronize and update once; a collective.

    The loss is the mean over the target tokens of the global batch: each micro-batch contributes
    its sum divided by the count over all ranks and micro-batches. So the cut into micro-batches
    does not change it. No line here waits for the device before the update; transformers does, once
    or twice, where it makes a mask.

    Args:
        check_in: called before each micro-batch; may raise to end the step, which then has changed
            nothing.
        make_room: called once if memory is full before the update; then all micro-batches are
            computed again.
    """
    own = [sum(batch.num_targets for batch in batches), sum(batch.num_tokens for batch in batches)]
    counts = torch.tensor(own, dtype=torch.float32, device=runtime.device)  # (2,)
    num_targets, num_tokens = runtime.sum_over_ranks(counts).unbind()

    def forward_and_backward() -> Tensor:
        loss = torch.zeros((), device=runtime.device)  # this rank's share
        for number, batch in enumerate(batches, start=1):
            check_in()
            micro_loss = micro_step(model, batch.to(runtime.device), num_targets, runtime)
            engine.backward(micro_loss, is_last_micro_batch=number == len(batches))
            loss += micro_loss.detach()
        return loss

    loss = None
    try:
        loss = forward_and_backward()
    except torch.OutOfMemoryError:
        if make_room is None:
            raise
    # Repeat outside the handler: there the error keeps frames alive, and with them the activations.
    if loss is None:
        assert make_room is not None
        make_room()
        loss = forward_and_backward()
    grad_norm = engine.update(lr, max_grad_norm)
    return StepSums(loss, grad_norm, num_targets, num_tokens)


def micro_step(
    model: PeftModel, batch: MicroBatch, num_targets: Tensor, runtime: Runtime
) -> Tensor:
    """Return the micro-batch's share of the global mean loss, 0-dim float32.

    Args:
        num_targets: target tokens of the global batch, 0-dim float32.
    """
    # Dropout follows the batch's place in the data: any number of ranks draws the same numbers.
    torch.manual_seed(batch.seed)
    ids, mask, labels = batch.input_ids, batch.attention_mask, batch.labels
    with runtime.autocast():
        loss_sum = target_loss_sum(model, ids, mask, labels, batch.position_ids, batch.num_targets)
    return loss_sum / num_targets


def is_due(step: int, every: int | None) -> bool:
    """True if an action of every `every` steps is due after this step; None means never."""
    return every is not None and step % every == 0
