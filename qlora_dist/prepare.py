"""Everything before the first step: from a configuration to the parts of a run."""

from __future__ import annotations

from pathlib import Path

import torch

from qlora_dist.build import build_model
from qlora_dist.config.schema import TrainConfig
from qlora_dist.data.dataset import load_inputs
from qlora_dist.data.loader import StepLoader
from qlora_dist.data.order import BatchPlan, run_end, sample_order
from qlora_dist.data.tokenizer import pad_token_id
from qlora_dist.memory.auto import RecomputeBudget
from qlora_dist.memory.offload import check_offload
from qlora_dist.model.attention import attention_note
from qlora_dist.model.loss import loss_note
from qlora_dist.model.packing_check import check_isolation
from qlora_dist.model.parts import base_model
from qlora_dist.optim.loss_scale import LossScale
from qlora_dist.optim.schedule import check_warmup
from qlora_dist.parallel.choice import Backend, Settings, build_engine
from qlora_dist.run.adapter_folder import Recipe, save_adapter
from qlora_dist.run.checkpoint import Checkpoints, adapter_shapes, choose_checkpoint
from qlora_dist.run.folder import identity
from qlora_dist.run.session import Session
from qlora_dist.run.state import Identity, TrainState
from qlora_dist.runtime.shards import local_bytes, whole_bytes
from qlora_dist.train import Training
from qlora_dist.weights.files import fingerprint, resolve_model_folder


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
