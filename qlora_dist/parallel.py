"""How processes share the model and the work: the only module that knows a backend by name."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from typing import Literal, Protocol

import torch
from packaging.version import Version
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard

from qlora_dist.config import OptimConfig, ParallelConfig, TrainConfig
from qlora_dist.config_rules import check_backend_reads
from qlora_dist.errors import LaunchError, TrainingError
from qlora_dist.model.adapters import adapter_parameters, lora_layers, whole_adapter
from qlora_dist.model.footprint import check_memory, parameters_outside, plan_footprint
from qlora_dist.model.integrity import check_gathered, check_shards, loaded_checksums
from qlora_dist.model.shards import shard_group, whole_shape, whole_tensor
from qlora_dist.model.skeleton import base_model, decoder_layers
from qlora_dist.optim import FlatAdamW
from qlora_dist.overlap import overlap_on_cpu
from qlora_dist.runtime import Runtime, launched_world_size
from qlora_dist.zero import (
    Settings,
    ZeroEngine,
    gathered,
    launcher_file,
    launcher_stage,
    partition_skeleton,
    zero_settings,
)

Backend = Literal["single", "ddp", "fsdp", "zero2", "zero3"]


def choose_backend(config: TrainConfig) -> Backend:
    """The backend of this run, from the config and from what the launcher started; needs no process group.

    Raises:
        LaunchError: the launcher and `parallel.backend` contradict each other, or the backend is not installed.
        ConfigError: the launcher's DeepSpeed file cannot be read, or a setting is none of the backend's.
    """
    backend = _asked_backend(config)
    if backend in ("zero2", "zero3") and find_spec("deepspeed") is None:
        raise LaunchError(
            f"the backend is {backend}, which needs DeepSpeed, and that is not installed. "
            "Run: pip install 'qlora-dist[deepspeed]', or set parallel.backend: fsdp."
        )
    if config.parallel.deepspeed_config is not None and backend not in ("zero2", "zero3"):
        raise LaunchError(
            f"parallel.deepspeed_config is {config.parallel.deepspeed_config}, but the backend is {backend}, which "
            "does not read it. Remove it, or set parallel.backend: zero2 or zero3."
        )
    check_backend_reads(config, backend)
    return backend


def _asked_backend(config: TrainConfig) -> Backend:
    asked, world_size = config.parallel.backend, launched_world_size()
    launcher = _launcher_backend()
    if launcher is not None and asked not in ("auto", launcher):
        name = "FSDP" if launcher == "fsdp" else f"DeepSpeed with ZeRO stage {launcher[-1]}"
        option = "--use_fsdp" if launcher == "fsdp" else "--use_deepspeed"
        raise LaunchError(
            f"parallel.backend is {asked}, but the launcher was told to use {name}. "
            f"Remove {option} from the launcher, or set parallel.backend: auto."
        )
    if asked == "single" and world_size > 1:
        raise LaunchError(
            f"parallel.backend is single, but the launcher started {world_size} processes. "
            "Start one process, or set parallel.backend: auto, ddp or fsdp."
        )
    if asked != "auto":
        return asked
    return launcher or ("fsdp" if world_size > 1 else "single")


def _launcher_backend() -> Backend | None:
    """What the launcher was told to use, if anything: Accelerate hands its choice over in the environment."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        stage = launcher_stage()
        if stage not in ("2", "3"):
            raise LaunchError(
                f"the launcher was told to use DeepSpeed with ZeRO stage {stage}. Stages 2 and 3 are supported: "
                "give the launcher --zero_stage 2 or 3, or remove --use_deepspeed and set parallel.backend: ddp."
            )
        return "zero2" if stage == "2" else "zero3"
    return "fsdp" if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true" else None


def engine_settings(config: TrainConfig, backend: Backend) -> Settings | None:
    """What the backend's library is configured with; None for backends that are written here.

    Raises:
        ConfigError: `parallel.deepspeed_config` cannot be read, or contradicts the run's settings.
        LaunchError: the launcher was given another such file.
    """
    if backend not in ("zero2", "zero3"):
        return None
    mine, launchers = config.parallel.deepspeed_config, launcher_file()
    if None not in (mine, launchers) and mine != launchers:
        raise LaunchError(
            f"parallel.deepspeed_config is {mine}, but the launcher was given {launchers}. Keep one of them."
        )
    return zero_settings(config, 2 if backend == "zero2" else 3, launched_world_size(), mine or launchers)


class Engine(Protocol):
    """What the loop needs from a backend: one micro-batch's backward, and one update."""

    can_drop_gradients: bool
    """Whether a step can be begun again after an error in forward or backward: no collective is half done then."""
    loss_scale: float
    """Factor of a loss before backward, a power of two; norms and gradients are divided by it."""

    def backward(self, loss: torch.Tensor, is_last_micro_batch: bool) -> None:
        """Add the gradient of `loss` (already divided by the global token count); ranks are summed at the last."""

    def update(self, lr: float, max_grad_norm: float | None) -> torch.Tensor:
        """Clip, step, clear gradients; returns the global gradient norm before clipping (0-dim, on the device).

        A norm that is not finite means that nothing was updated, on no rank. Waits for the device.
        """

    def drop_gradients(self) -> None:
        """Forget what backward has added since the last update."""

    def whole_adapter(self) -> dict[str, torch.Tensor]:
        """All adapter tensors by parameter name on rank 0, nothing elsewhere; a collective."""

    def optimizer_state(self) -> dict[str, torch.Tensor]:
        """The optimizer's moments on rank 0, see `Moments.gather`; a collective, after the first update."""

    def load_optimizer_state(self, saved: Mapping[str, torch.Tensor], num_updates: int) -> None:
        """Take up moments that any engine returned, on any number of ranks, after `num_updates` updates."""


class _FlatEngine(ABC):
    """What the engines written here share: adapters in flat buffers, one norm, one update."""

    can_drop_gradients = False
    loss_scale = 1.0

    def __init__(self, model: nn.Module, config: OptimConfig, runtime: Runtime) -> None:
        self._model = model
        self._runtime = runtime
        self._optimizer = FlatAdamW(adapter_parameters(model), config)

    def update(self, lr: float, max_grad_norm: float | None) -> torch.Tensor:
        self._optimizer.collect_gradients()
        gradients = self._optimizer.gradients
        norm = (self._global_norm(gradients) / self.loss_scale).float()
        if norm.isfinite():
            if self.loss_scale != 1:
                torch._foreach_mul_(gradients, 1 / self.loss_scale)
            _clip(gradients, norm, max_grad_norm)
            self._optimizer.step(lr)
        self._optimizer.clear_gradients()
        return norm

    def drop_gradients(self) -> None:
        self._optimizer.clear_gradients()

    @abstractmethod
    def _global_norm(self, gradients: list[torch.Tensor]) -> torch.Tensor:
        """Norm of the whole gradient, float64; sums it over ranks first where they hold copies."""

    def whole_adapter(self) -> dict[str, torch.Tensor]:
        return whole_adapter(self._model, self._runtime.is_main)

    def optimizer_state(self) -> dict[str, torch.Tensor]:
        sizes = {name: whole_shape(param).numel() for name, param in adapter_parameters(self._model).items()}
        return self._optimizer.moments(self._runtime.device).gather(sizes)

    def load_optimizer_state(self, saved: Mapping[str, torch.Tensor], num_updates: int) -> None:
        self._optimizer.moments(self._runtime.device).scatter(saved, num_updates)


class ReplicatedEngine(_FlatEngine):
    """Every rank holds the whole model; adapter gradients are summed in one flat all-reduce per optimizer step."""

    can_drop_gradients = True

    def backward(self, loss: torch.Tensor, is_last_micro_batch: bool) -> None:
        (loss * self.loss_scale).backward()

    def _global_norm(self, gradients: list[torch.Tensor]) -> torch.Tensor:
        for gradient in gradients:
            self._runtime.sum_over_ranks(gradient)
        return _squared_norm(gradients).sqrt()


class ShardedEngine(_FlatEngine):
    """Base and adapters are sharded layer by layer (FSDP2); gradients are reduced to their shards at the last
    micro-batch of a step."""

    def __init__(self, model: FSDPModule, config: OptimConfig, runtime: Runtime) -> None:
        super().__init__(model, config, runtime)
        self._group = shard_group(next(iter(adapter_parameters(model).values())))
        self._reductions = overlap_on_cpu(model) if runtime.device.type == "cpu" else None

    def backward(self, loss: torch.Tensor, is_last_micro_batch: bool) -> None:
        self._model.set_requires_gradient_sync(is_last_micro_batch)
        self._model.set_is_last_backward(is_last_micro_batch)
        (loss * self.loss_scale).backward()
        if self._reductions is not None:
            self._reductions.wait()

    def _global_norm(self, gradients: list[torch.Tensor]) -> torch.Tensor:
        # Offloaded gradients are on the host, where the group of a GPU cannot sum.
        squared = _squared_norm(gradients).to(self._runtime.device)
        dist.all_reduce(squared, group=self._group)
        return squared.sqrt()


def shard_skeleton(
    model: PeftModel, backend: Backend, config: ParallelConfig, runtime: Runtime, settings: Settings | None = None
) -> torch.device:
    """Cut a meta-device model into this rank's shards, if the backend does; returns where its parameters will live.

    Units that are gathered at once: each decoder layer, the embedding, the head, and the final norm (with a tied
    embedding, which both ends of the model need). This last one is whole from a micro-batch's first layer to its end;
    it stays so for the next ones, unless it is trained.

    Args:
        settings: what :func:`engine_settings` returned for this backend.

    Raises:
        LaunchError: the number of processes is no multiple of `parallel.replicas`.
    """
    if backend in ("single", "ddp"):
        return runtime.device
    if not dist.is_initialized():  # one process: sharding still needs a group, of itself
        communicator = "cpu:gloo,cuda:nccl" if runtime.device.type == "cuda" else "gloo"
        dist.init_process_group(communicator, store=dist.HashStore(), rank=0, world_size=1)
    if backend == "zero3":
        assert settings is not None
        partition_skeleton(model, settings, runtime)
    if backend != "fsdp":
        return runtime.device
    offload = CPUOffloadPolicy(pin_memory=runtime.device.type == "cuda") if config.cpu_offload else OffloadPolicy()
    # No mixed-precision policy: it would cast the float32 quantisation constants to bfloat16 on the way.
    # The base is frozen in its storage type already, and autocast casts the adapters.
    shard = partial(fully_shard, mesh=_device_mesh(config, runtime), offload_policy=offload)
    head = base_model(model).get_output_embeddings()
    units = gathered_units(model)
    with _integer_parameters_allowed():
        for unit in units:
            # The head's backward follows its forward at once: gathering it twice would be for nothing.
            shard(unit, reshard_after_forward=unit is not head)
        shard(model)
    embedding = base_model(model).get_input_embeddings()
    if isinstance(embedding, FSDPModule):
        # Backward needs nothing of it, but FSDP2 would fetch it ahead at the end of each: 2.1 GB for a 70B model.
        embedding.set_unshard_in_backward(False)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # Losses are divided by the global token count before backward, so gradients are summed, not averaged.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    if not any(param.requires_grad for param in parameters_outside(units, model)):
        model.set_reshard_after_backward(False, recurse=False)
    return torch.device("cpu") if config.cpu_offload else runtime.device


def check_fits(model: PeftModel, backend: Backend, config: ParallelConfig, runtime: Runtime) -> None:
    """Refuse a meta-device model whose share, as this backend cuts it, exceeds the free memory.

    Raises:
        ModelError: with the numbers.
        LaunchError: `parallel.replicas` does not divide the number of processes.
    """
    num_shards = _num_shards(backend, config, runtime)
    footprint = plan_footprint(model, gathered_units(model), num_shards, runtime.rank % num_shards)
    device = torch.device("cpu") if config.cpu_offload else runtime.device
    check_memory(footprint, device, runtime.local_world_size if device.type == "cpu" else 1)
    runtime.barrier()  # no rank may allocate while another still looks at what is free


def gathered_units(model: PeftModel) -> list[nn.Module]:
    """The modules that a sharded model gathers one at a time; what is in none of them forms the last unit."""
    base = base_model(model)
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    ends = [] if embedding.weight is head.weight else [embedding, head]
    return [*decoder_layers(model), *ends]


def check_in_sync(model: nn.Module, step: int, num_samples_seen: int, runtime: Runtime) -> None:
    """Compare what all ranks must have in common: the adapter's bytes, and the position; a collective.

    Under a backend that shards the adapter there is one copy of it in each shard group.

    Raises:
        TrainingError: on every rank, naming what differs.
    """
    if runtime.world_size == 1:
        return
    adapters = adapter_parameters(model)
    position = torch.tensor([step, num_samples_seen], dtype=torch.int64, device=runtime.device)
    mine = torch.cat([loaded_checksums(adapters, runtime.device), position])
    differs = runtime.max_of_each(mine) != -runtime.max_of_each(-mine)
    if differs.any():
        names = [*adapters, "the optimizer step", "the position in the data"]
        found = [name for name, is_bad in zip(names, differs.tolist(), strict=True) if is_bad]
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        raise TrainingError(
            f"after step {step} the ranks no longer agree on {found[0]}{more}. One of them has computed something else "
            "than the others, as faulty memory makes happen. Nothing of this is saved: start the same command again to "
            "go on from the last checkpoint, and watch whether one machine repeats it."
        )


def verify_base(model: PeftModel, backend: Backend, config: ParallelConfig, runtime: Runtime) -> None:
    """After loading: each rank holds its share, and gathered layers have the bytes that were loaded; a collective.

    Raises:
        ModelError: naming the parameter, on every rank.
    """
    check_shards(model, _num_shards(backend, config, runtime))
    params = {name: param for name, param in model.named_parameters() if not param.requires_grad}
    expected = loaded_checksums(params, runtime.device)
    if runtime.world_size > 1:
        check_gathered(params, expected, _gathered(model), runtime.max_of_each)


def _num_shards(backend: Backend, config: ParallelConfig, runtime: Runtime) -> int:
    """Number of parts that the base is cut into.

    Raises:
        LaunchError: the processes do not form `parallel.replicas` equal groups.
    """
    if backend == "fsdp":
        if runtime.world_size % config.replicas:
            raise LaunchError(
                f"parallel.replicas is {config.replicas}, but {runtime.world_size} processes cannot be divided into "
                "that many groups of equal size. Use a divisor of the number of processes."
            )
        return runtime.world_size // config.replicas
    return runtime.world_size if backend == "zero3" else 1


def _gathered(model: PeftModel) -> Iterator[tuple[str, torch.Tensor]]:
    """The frozen parameters, gathered unit by unit the way forward does it."""
    units = [(prefix, module) for prefix, module in model.named_modules() if isinstance(module, FSDPModule)]
    for prefix, unit in units:
        others = tuple(f"{other}." for other, _ in units if other != prefix and other.startswith(prefix))
        unit.unshard()
        for name, param in unit.named_parameters(prefix=prefix):
            if not param.requires_grad and not name.startswith(others):
                yield name, param
        unit.reshard()
    if not units:  # whole parameters, or the parts that DeepSpeed makes
        for name, param in model.named_parameters():
            if not param.requires_grad:
                yield name, whole_tensor(param)


def whole_layers(model: PeftModel) -> Iterator[LoraLayer]:
    """The layers with adapters, each with all its parameters whole while it is the current one; a collective.

    No more than one unit (see :func:`shard_skeleton`) is gathered at a time.
    """
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    unit_of = {layer: unit for unit in units for layer in lora_layers(unit)}  # inner units come after outer ones
    for unit in dict.fromkeys(unit_of.values()):
        unit.unshard()
        yield from (layer for layer, its_unit in unit_of.items() if its_unit is unit)
        unit.reshard()
    if not units:
        for layer in lora_layers(model):
            with gathered(layer):
                yield layer


def _device_mesh(config: ParallelConfig, runtime: Runtime) -> DeviceMesh:
    """One dimension to shard over; before it one of copies, when there are several."""
    num_shards = _num_shards("fsdp", config, runtime)
    if config.replicas == 1:
        return init_device_mesh(runtime.device.type, (num_shards,))
    shape = (config.replicas, num_shards)
    return init_device_mesh(runtime.device.type, shape, mesh_dim_names=("replicate", "shard"))


def build_engine(model: nn.Module, config: OptimConfig, runtime: Runtime, settings: Settings | None = None) -> Engine:
    """The engine for a loaded model; builds the optimizer, so the adapters must have their initial values."""
    if settings is not None:
        return ZeroEngine(model, config, settings, runtime)
    if isinstance(model, FSDPModule):
        return ShardedEngine(model, config, runtime)
    return ReplicatedEngine(model, config, runtime)


_CPU_PIECE = 2**17
"""Elements that a CPU squares at a time."""


def _squared_norm(gradients: list[torch.Tensor]) -> torch.Tensor:
    """Sum of squares, in float64: rounded back to float32, the norm then has the same bits however the gradient is cut.
    In float32 it would not, and clipping would carry the difference into every weight. A CPU makes a copy in float64 of
    what it is given: in pieces, this stays in its cache."""
    norms = [
        torch.linalg.vector_norm(piece, dtype=torch.float64)
        for gradient in gradients
        for piece in (gradient.flatten().split(_CPU_PIECE) if gradient.device.type == "cpu" else [gradient])
    ]
    return (torch.stack(norms) ** 2).sum()


def _clip(gradients: list[torch.Tensor], norm: torch.Tensor, max_norm: float | None) -> None:
    if max_norm is not None:
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for gradient in gradients:
            gradient.mul_(factor.to(gradient.device))


@contextmanager
def _integer_parameters_allowed() -> Iterator[None]:
    """Compatibility with torch before 2.13, whose `fully_shard` first makes each sharded parameter trainable and then
    restores what it was: impossible for the integers of a 4-bit weight. Here such parameters start out frozen."""
    if Version(torch.__version__) >= Version("2.13"):
        yield
        return
    original = nn.Parameter.__new__

    def new(cls: type, data: torch.Tensor | None = None, requires_grad: bool = True) -> torch.Tensor:
        return original(cls, data, requires_grad and (data is None or data.is_floating_point()))

    nn.Parameter.__new__ = new
    try:
        yield
    finally:
        nn.Parameter.__new__ = original
