"""FSDP2: the base cut by rows, gathered layer by layer, and a step with sharded adapters."""

# Tested by tests/distributed/test_sharding.py and tests/distributed/test_left_whole.py.

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from packaging.version import Version
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard

from qlora_dist.config.schema import BackendName, OptimConfig, TrainConfig
from qlora_dist.errors import LaunchError
from qlora_dist.memory.footprint import parameters_outside
from qlora_dist.model.cpu.overlap import overlap_on_cpu
from qlora_dist.model.parts import ModelParts, lora_layers
from qlora_dist.parallel.backend import Backend
from qlora_dist.parallel.engine import Engine, FlatEngine, squared_norm
from qlora_dist.runtime.processes import Runtime
from qlora_dist.runtime.shards import shard_group


class Fsdp(Backend):
    """Backend that cuts base and adapters by rows (FSDP2) and gathers one layer at a time."""

    def __init__(self, name: BackendName, config: TrainConfig, runtime: Runtime) -> None:
        super().__init__(name, config, runtime)
        if runtime.world_size % config.parallel.replicas:
            raise LaunchError(
                f"parallel.replicas is {config.parallel.replicas}, but {runtime.world_size} "
                "processes cannot be divided into that many groups of equal size. Use a divisor of "
                "the number of processes."
            )

    @property
    def num_shards(self) -> int:
        return self.runtime.world_size // self.config.parallel.replicas

    def cut(self, parts: ModelParts) -> None:
        """Cut a meta-device model into this rank's shards.

        A gathered unit is a decoder layer, the embedding or the head. The rest forms the last unit:
        the final norm, and with a tied embedding that too.
        """
        model: Any = parts.model
        self.runtime.ensure_group()
        offload = OffloadPolicy()
        if self.config.parallel.cpu_offload:
            offload = CPUOffloadPolicy(pin_memory=self.runtime.device.type == "cuda")
        # No mixed-precision policy: it would cast the float32 quantization constants to bfloat16 on
        # the way. The base is frozen in its storage type already, and autocast casts the adapters.
        shard = partial(fully_shard, mesh=self._mesh(), offload_policy=offload)
        with _integer_parameters_allowed():
            for unit in parts.gathered_units:
                # The head's backward follows its forward at once: no second gather between them.
                shard(unit, reshard_after_forward=unit is not parts.head)
            shard(model)
        if isinstance(parts.embedding, FSDPModule):
            # Backward needs nothing of it, but FSDP2 would fetch it ahead at the end of each: 2.1
            # GB for a 70B model.
            parts.embedding.set_unshard_in_backward(False)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                # Losses are divided by the global token count before backward: gradients are
                # summed, not averaged.
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
        # With a tied embedding the last unit stays gathered: both ends of the model need it. It is
        # whole all through a micro-batch; unless it is trained, it stays so for the next ones.
        if not any(p.requires_grad for p in parameters_outside(parts.gathered_units, model)):
            model.set_reshard_after_backward(False, recurse=False)

    def engine(self, parts: ModelParts) -> Engine:
        return ShardedEngine(parts, self.config.optim, self.runtime)

    def gathered(self, parts: ModelParts) -> Iterator[tuple[str, Tensor]]:
        named = parts.model.named_modules()
        units = {name: module for name, module in named if isinstance(module, FSDPModule)}
        for prefix, unit in units.items():
            # Parameters of inner units are not gathered with this one.
            inner = tuple(
                f"{name}." for name in units if name != prefix and name.startswith(prefix)
            )
            unit.unshard()
            for name, param in unit.named_parameters(prefix=prefix):
                if not param.requires_grad and not name.startswith(inner):
                    yield name, param
            unit.reshard()

    def whole_layers(self, parts: ModelParts) -> Iterator[LoraLayer]:
        units = [module for module in parts.model.modules() if isinstance(module, FSDPModule)]
        # Inner units come after outer ones, so the last unit that is set is the innermost.
        unit_of = {layer: unit for unit in units for layer in lora_layers(unit)}
        for unit in dict.fromkeys(unit_of.values()):
            unit.unshard()
            yield from (layer for layer, its_unit in unit_of.items() if its_unit is unit)
            unit.reshard()

    def _mesh(self) -> DeviceMesh:
        """Mesh of the ranks: (shards,), or (replicas, shards) with several copies of the model."""
        device, replicas = self.runtime.device.type, self.config.parallel.replicas
        if replicas == 1:
            return init_device_mesh(device, (self.num_shards,))
        names = ("replicate", "shard")
        return init_device_mesh(device, (replicas, self.num_shards), mesh_dim_names=names)


class ShardedEngine(FlatEngine):
    """Engine on sharded adapters; gradients are reduced to their shards once per step."""

    def __init__(self, parts: ModelParts, config: OptimConfig, runtime: Runtime) -> None:
        super().__init__(parts, config, runtime)
        self._model: Any = parts.model
        self._group = shard_group(next(iter(parts.adapters.values())))
        # FSDP2 overlaps collectives on streams, and a CPU has none: there they run asynchronously.
        self._reductions = overlap_on_cpu(parts) if runtime.device.type == "cpu" else None

    def backward(self, loss: Tensor, is_last_micro_batch: bool) -> None:
        # Until the last micro-batch each rank adds up whole gradients, without a collective.
        self._model.set_requires_gradient_sync(is_last_micro_batch)
        self._model.set_is_last_backward(is_last_micro_batch)
        (loss * self.loss_scale).backward()
        if self._reductions is not None:
            self._reductions.wait()

    def _global_norm(self, gradients: list[Tensor]) -> Tensor:
        # Offloaded gradients are on the host, where the group of a GPU cannot sum.
        squared = squared_norm(gradients).to(self._runtime.device)
        dist.all_reduce(squared, group=self._group)
        return squared.sqrt()


@contextmanager
def _integer_parameters_allowed() -> Iterator[None]:
    """Let `fully_shard` take integer parameters with torch before 2.13."""
    # Older versions first make each sharded parameter trainable and then restore the flag:
    # impossible for the integers of a 4-bit weight. Here such parameters start out frozen.
    if Version(torch.__version__) >= Version("2.13"):
        yield
        return
    original = nn.Parameter.__new__

    def new(cls: type, data: Tensor | None = None, requires_grad: bool = True) -> Tensor:
        return original(cls, data, requires_grad and (data is None or data.is_floating_point()))

    nn.Parameter.__new__ = new
    try:
        yield
    finally:
        nn.Parameter.__new__ = original
