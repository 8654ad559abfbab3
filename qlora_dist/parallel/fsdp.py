"""FSDP2: cut the model, gather its layers, take a step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from packaging.version import Version
from peft import PeftModel
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard

from qlora_dist.config.schema import OptimConfig, ParallelConfig
from qlora_dist.errors import LaunchError
from qlora_dist.memory.footprint import parameters_outside
from qlora_dist.model.adapters import adapter_parameters
from qlora_dist.model.cpu.overlap import overlap_on_cpu
from qlora_dist.model.parts import base_model, decoder_layers
from qlora_dist.parallel.choice import Backend
from qlora_dist.parallel.deepspeed_config import Settings
from qlora_dist.parallel.engine import FlatEngine, squared_norm
from qlora_dist.parallel.zero import partition_skeleton
from qlora_dist.runtime.processes import Runtime
from qlora_dist.runtime.shards import shard_group


class ShardedEngine(FlatEngine):
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
        squared = squared_norm(gradients).to(self._runtime.device)
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


def gathered_units(model: PeftModel) -> list[nn.Module]:
    """The modules that a sharded model gathers one at a time; what is in none of them forms the last unit."""
    base = base_model(model)
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    ends = [] if embedding.weight is head.weight else [embedding, head]
    return [*decoder_layers(model), *ends]


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


def _device_mesh(config: ParallelConfig, runtime: Runtime) -> DeviceMesh:
    """One dimension to shard over; before it one of copies, when there are several."""
    num_shards = _num_shards("fsdp", config, runtime)
    if config.replicas == 1:
        return init_device_mesh(runtime.device.type, (num_shards,))
    shape = (config.replicas, num_shards)
    return init_device_mesh(runtime.device.type, shape, mesh_dim_names=("replicate", "shard"))


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
