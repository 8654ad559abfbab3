"""Everything before the first step: from a configuration to the parts of a run."""

# Tested by tests/distributed/test_resume.py and tests/distributed/test_failing_ranks.py.

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from qlora_dist.build import build_model
from qlora_dist.config.schema import TrainConfig
from qlora_dist.data.dataset import RunData, load_tokenizer_and_data
from qlora_dist.data.loader import StepLoader
from qlora_dist.data.order import BatchPlan, run_end, sample_order
from qlora_dist.data.tokenizer import pad_token_id
from qlora_dist.memory.auto import RecomputeBudget
from qlora_dist.memory.offload import check_offload
from qlora_dist.model.attention import attention_note
from qlora_dist.model.inventory import Inventory
from qlora_dist.model.loss import loss_note
from qlora_dist.model.packing_check import check_causal, check_packing
from qlora_dist.model.parts import ModelParts
from qlora_dist.optim.loss_scale import LossScale
from qlora_dist.optim.optimizers import OPTIMIZERS
from qlora_dist.optim.schedule import check_warmup
from qlora_dist.parallel.backend import Backend
from qlora_dist.parallel.engine import Engine
from qlora_dist.run.adapter_folder import AdapterRecord, save_adapter
from qlora_dist.run.checkpoint import Checkpoint, Checkpoints, adapter_shapes, choose_checkpoint
from qlora_dist.run.folder import identity
from qlora_dist.run.inventory import write_inventory
from qlora_dist.run.session import Session
from qlora_dist.run.state import RunIdentity, TrainState
from qlora_dist.runtime.shards import local_bytes
from qlora_dist.weights.files import model_fingerprint, resolve_model_folder


@dataclass
class RunParts:
    """Parts of a run that are known to fit together."""

    data: RunData
    plan: BatchPlan
    num_steps: int
    loader: StepLoader
    pad_token_id: int
    modules: ModelParts
    engine: Engine
    budget: RecomputeBudget
    checkpoints: Checkpoints
    state: TrainState
    """Position of the run and its counters: all that a checkpoint holds besides tensors."""
    loss_scale: LossScale


def prepare(config: TrainConfig, backend: Backend, session: Session) -> RunParts | None:
    """Make the parts of a run: data, checkpoint, model, engine; None when it is finished already.

    Raises:
        QloraDistError: the input cannot be used, or does not belong together; then nothing was
            written.
    """
    runtime, log, working = session.runtime, session.reporter.log, session.reporter.working
    log(runtime.compute_note)
    check_offload(config.memory, runtime.device)
    with working(f"fetching {config.model.path}"):
        model_folder = runtime.main_first(lambda: resolve_model_folder(config.model.path))
    tokenizer, data = load_tokenizer_and_data(
        config, model_folder, session.reporter, runtime.main_first
    )
    log("\n".join(data.notes))

    checkpoint, state, is_own = _starting_point(config, session)
    plan = _plan(data, config, runtime.world_size)
    num_steps = plan.num_steps(state.step, state.num_samples_seen, config.optim)
    check_warmup(num_steps, config.optim)
    adapter = session.folder / "adapter"
    if state.step >= num_steps and adapter.is_dir():
        log(f"this run is finished: {adapter}. checkpoint.resume: never would start it over.")
        return None

    session.watch()  # all ranks check in from here on; reading data may take any time before
    with working("building the model"):
        longest = max(report.max_sample_len for report in data.reports)
        modules = build_model(
            config, model_folder, backend, session.reporter, session.check_in, longest
        )
    model = modules.model
    shapes, settings = adapter_shapes(model), identity(config)
    belongs_to = RunIdentity(model_fingerprint(model_folder), data.fingerprint(), shapes, settings)
    if checkpoint:
        checkpoint.check(belongs_to, is_own)
    inventory = Inventory.of(modules)
    log("\n".join(inventory.lines()))
    # Counted before the first forward: one without backward leaves some engines' head gathered.
    held = runtime.from_all(local_bytes(model))
    engine = _start_engine(config, backend, session, modules, checkpoint)
    log(_run_note(backend, held[0], inventory.num_bytes, num_steps, plan))
    budget = RecomputeBudget(config, modules, runtime, log)
    budget.choose()

    def write_adapter(path: Path, tensors: dict[str, Tensor]) -> None:
        variables = config.data.template_kwargs or {}
        record = AdapterRecord(config.model, data.layout, variables, belongs_to.base)
        save_adapter(path, model, tensors, tokenizer, record)

    folder, keep = session.folder / "checkpoints", config.checkpoint.keep
    checkpoints = Checkpoints(folder, keep, belongs_to, runtime, backend.name, write_adapter)
    if checkpoint and is_own:
        checkpoints.mark_written(state.step)
    session.claim_folder(resumed_step=state.step if checkpoint else None)
    if runtime.is_main:
        write_inventory(session.folder, inventory, data, held)
    padding = pad_token_id(tokenizer, modules.dimensions.vocab_size)
    is_on_gpu = runtime.device.type == "cuda"
    loader = StepLoader(plan, data.train, runtime.rank, padding, pin_memory=is_on_gpu)
    scale = LossScale(state, runtime, log)
    return RunParts(
        data, plan, num_steps, loader, padding, modules, engine, budget, checkpoints, state, scale
    )


def _run_note(
    backend: Backend, held_bytes: int, whole_bytes: int, num_steps: int, plan: BatchPlan
) -> str:
    """Sum up how a run uses its processes."""
    runtime = backend.runtime
    return (
        f"{backend.name}, {runtime.world_size} x {runtime.device.type}: this rank holds "
        f"{held_bytes / 2**20:,.0f} of {whole_bytes / 2**20:,.0f} MiB | {num_steps:,} steps of "
        f"{plan.global_batch_size:,} rows"
    )


def _starting_point(
    config: TrainConfig, session: Session
) -> tuple[Checkpoint | None, TrainState, bool]:
    """Checkpoint to resume from, state to begin with, and true for this run's own checkpoint."""
    log, resume = session.reporter.log, config.checkpoint.resume
    with session.reporter.working("looking for a checkpoint"):
        checkpoint = choose_checkpoint(session.folder, resume, session.runtime, log)
    state = checkpoint.state if checkpoint else TrainState()
    is_own = checkpoint is not None and checkpoint.path.parent.parent == session.folder
    if not is_own:
        # The best step of another run is not among the checkpoints of this run.
        state.best_eval_loss = state.best_step = None
    return checkpoint, state, is_own


def _plan(data: RunData, config: TrainConfig, world_size: int) -> BatchPlan:
    order, optim = sample_order(data, config), config.optim
    end = run_end(order, optim)
    return BatchPlan(order, optim.micro_batch_size, optim.grad_accum_steps, world_size, end)


def _start_engine(
    config: TrainConfig,
    backend: Backend,
    session: Session,
    modules: ModelParts,
    checkpoint: Checkpoint | None,
) -> Engine:
    """Build the engine of a loaded model, resume from `checkpoint`, log both; a collective."""
    model, device, log = modules.model, session.runtime.device, session.reporter.log
    if checkpoint:
        checkpoint.load_adapter(model)  # before the engine, which copies the adapter to its buffers
    engine = backend.engine(modules)
    # These run the model, so they come after the engine, which has prepared forward.
    with session.runtime.autocast():
        check_causal(model, device)
        if config.data.packing:
            check_packing(model, device, config.data.max_seq_len)
        if note := loss_note(model):
            log(note)
    if checkpoint:
        engine.load_optimizer_state(checkpoint.optimizer_tensors(), checkpoint.state.num_updates)
        log(f"going on after step {checkpoint.state.step} from {checkpoint.path}")
    if device.type == "cpu" and OPTIMIZERS[config.optim.optimizer].is_paged:
        log(
            f"{config.optim.optimizer}: without a GPU there is nothing to page, its state is in "
            "host memory anyway"
        )
    log(attention_note(model, config.model, is_packed=config.data.packing))
    return engine
