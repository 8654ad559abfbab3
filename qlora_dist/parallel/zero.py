"""ZeRO-2 and ZeRO-3 through DeepSpeed's engine: the model cut up, and a step taken.

``deepspeed.initialize`` is called directly, on Accelerate's processes. Accelerate's own wrapper of
the engine takes the optimizer step inside ``backward``, before the step's learning rate is known.
It also divides the loss by the number of micro-batches, and this program has divided by tokens
already.

DeepSpeed runs in its float32 mode, whatever `model.dtype` is: its bfloat16 mode would cast the
master adapters and the float32 quantization constants. Autocast decides the compute type here, as
with every other engine.
"""

# Tested by tests/distributed/test_zero.py.

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch import distributed as dist

from qlora_dist.config.schema import BackendName, OptimConfig, TrainConfig
from qlora_dist.model.adapters import whole_adapter
from qlora_dist.model.lora_linear import FusedLinear
from qlora_dist.model.parts import ModelParts, lora_layers
from qlora_dist.optim.moments import BufferSlice, Moments
from qlora_dist.optim.optimizers import build_optimizer, parameter_groups
from qlora_dist.parallel.backend import Backend
from qlora_dist.parallel.deepspeed_config import Settings, run_settings, sized_settings
from qlora_dist.parallel.engine import Engine
from qlora_dist.runtime.processes import Runtime
from qlora_dist.runtime.shards import local_range, whole_shape, whole_tensor


class Zero(Backend):
    """Backend that shards gradients and optimizer state, and with stage 3 every parameter."""

    needs = "DeepSpeed"

    def __init__(self, name: BackendName, config: TrainConfig, runtime: Runtime) -> None:
        super().__init__(name, config, runtime)
        self._stage = int(name.removeprefix("zero"))
        self.settings = run_settings(config, self._stage, runtime.world_size)

    @property
    def num_shards(self) -> int:
        return self.runtime.world_size if self._stage == 3 else 1

    def cut(self, parts: ModelParts) -> None:
        """Allocate and cut up the parameters with stage 3; leave them whole with stage 2."""
        self.runtime.ensure_group()
        if self._stage == 3:
            partition_skeleton(parts, self.settings, self.runtime)

    def engine(self, parts: ModelParts) -> Engine:
        return ZeroEngine(parts, self.config.optim, self.settings, self.runtime)

    def gathered(self, parts: ModelParts) -> Iterator[tuple[str, Tensor]]:
        for name, param in super().gathered(parts):
            yield name, whole_tensor(param)

    def whole_layers(self, parts: ModelParts) -> Iterator[LoraLayer]:
        if self._stage == 2:
            yield from super().whole_layers(parts)
            return
        import deepspeed

        for layer in super().whole_layers(parts):
            with deepspeed.zero.GatheredParameters(list(layer.parameters())):  # to be read only
                yield layer


def partition_skeleton(parts: ModelParts, settings: Settings, runtime: Runtime) -> None:
    """Allocate a meta-device model on this rank's device, keeping 1/N of every parameter (ZeRO-3).

    One decoder layer, or one module outside of them, is allocated whole at a time and cut up before
    the next. The contents are undefined: each rank reads its own parts of the weights afterwards.
    """
    deepspeed, model = _import_deepspeed(runtime), parts.model
    parts.base.tie_weights()  # on meta, each use of a shared parameter may be one of its own
    # From meta to allocated parameters: tied ones stay tied.
    allocated: dict[nn.Parameter, nn.Parameter] = {}
    units = [list(layer.modules()) for layer in parts.layers]
    inside = {module for unit in units for module in unit}
    for unit in [*units, *([module] for module in model.modules() if module not in inside)]:
        fresh = nn.ParameterList()
        for module in unit:
            for name, param in module.named_parameters(recurse=False):
                if param not in allocated:
                    empty = torch.empty_like(param, device=runtime.device)
                    allocated[param] = nn.Parameter(empty, requires_grad=param.requires_grad)
                    fresh.append(allocated[param])
                module._parameters[name] = allocated[param]
        if len(fresh) > 0:
            # This broadcasts the undefined contents of rank 0, a 4-bit model's size in all.
            deepspeed.zero.Init(module=fresh, config_dict_or_path=settings)
    for layer in lora_layers(model):
        if layer.lora_variant or isinstance(layer, FusedLinear):
            # Their forward reads parameters of inner modules, which are gathered only while those
            # modules run.
            for param in layer.parameters():
                deepspeed.zero.register_external_parameter(layer, param)


class ZeroEngine:
    """DeepSpeed's engine behind the interface of :class:`~qlora_dist.parallel.engine.Engine`."""

    can_drop_gradients = False  # DeepSpeed's buckets and hooks cannot be put back
    loss_scale = 1.0

    def __init__(
        self, parts: ModelParts, config: OptimConfig, settings: Settings, runtime: Runtime
    ) -> None:
        deepspeed = _import_deepspeed(runtime)
        groups = parameter_groups(parts.adapters, config)
        members = [list(group.values()) for group in groups.values()]
        self._parts, self._runtime = parts, runtime
        self._stage = settings["zero_optimization"]["stage"]
        self._lr_multipliers = list(groups)
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=parts.model,
            optimizer=build_optimizer(members, config),
            config=sized_settings(settings, parts),
            dist_init_required=False,
        )
        self._accumulation = ExitStack()
        self._is_accumulating = False

    def backward(self, loss: Tensor, is_last_micro_batch: bool) -> None:
        # All micro-batches but the last add up without a collective.
        if not is_last_micro_batch and not self._is_accumulating:
            self._accumulation.enter_context(self._engine.coalesce_grad_reduction())
            self._is_accumulating = True
        # DeepSpeed averages over ranks, but the loss is divided by the global token count already:
        # the ranks must be summed.
        loss = loss * (self.loss_scale * self._runtime.world_size)
        # The loop calls the model and not the engine, whose forward would prepare backward. It is
        # prepared in a hook: DeepSpeed takes the graph from the running backward.
        self._optimizer.clear_backward_seen_flag()
        loss.register_hook(lambda _: self._engine._backward_prologue())
        self._engine.backward(loss, scale_wrt_gas=False)
        if is_last_micro_batch and self._is_accumulating:
            self._accumulation.close()  # reduces the accumulated gradients
            self._is_accumulating = False

    def update(self, lr: float, max_grad_norm: float | None) -> Tensor:
        engine, optimizer = self._engine, self._optimizer
        for group, multiplier in zip(optimizer.param_groups, self._lr_multipliers, strict=True):
            group["lr"] = lr * multiplier
        optimizer.clip_grad = max_grad_norm or 0.0
        engine.set_gradient_accumulation_boundary(True)
        optimizer.loss_scale = self.loss_scale  # during this call only: backward would apply it too
        engine.step()
        optimizer.loss_scale = 1.0
        if optimizer.overflow:  # gradients are not finite: DeepSpeed has updated nothing
            return torch.tensor(torch.nan, device=engine.device)
        norm = engine.get_global_grad_norm()
        return torch.as_tensor(norm, dtype=torch.float32, device=engine.device)

    def drop_gradients(self) -> None:
        raise NotImplementedError("DeepSpeed's buckets and hooks cannot be put back")

    def whole_adapter(self) -> dict[str, Tensor]:
        return whole_adapter(self._parts.model, self._runtime.is_main)

    def optimizer_state(self) -> dict[str, Tensor]:
        sizes = {name: whole_shape(param).numel() for name, param in self._parts.adapters.items()}
        return self._moments().gather(sizes)

    def load_optimizer_state(self, saved: Mapping[str, Tensor], num_updates: int) -> None:
        self._moments().scatter(saved, num_updates)

    def _moments(self) -> Moments:
        """View the optimizer's moments by parameter."""
        # DeepSpeed lays this rank's parts of the parameters end to end in buffers, and gives its
        # optimizer the buffers as parameters.
        adapters, optimizer = self._parts.adapters, self._optimizer
        pieces: list[BufferSlice] = []
        if self._stage == 3:
            buffers = optimizer.fp32_partitioned_groups_flat
            for name, param in adapters.items():
                first, stop = local_range(param)
                buffer, offset, _ = optimizer.grad_position[optimizer.get_param_id(param)]
                pieces.append(BufferSlice(name, first, stop - first, buffer, offset))
        else:
            buffers = optimizer.single_partition_of_fp32_groups
            for name, param in adapters.items():
                if (at := param._hp_mapping) is not None:  # None: other ranks hold all of it
                    low, high = at.lp_fragment_address, at.hp_fragment_address
                    group = at.param_group_index
                    pieces.append(BufferSlice(name, low.start, low.numel, group, high.start))
        return Moments(optimizer.optimizer, buffers, pieces, dist.group.WORLD, self._engine.device)


def _import_deepspeed(runtime: Runtime) -> Any:
    """Import DeepSpeed for this run's device and process group, with its log switched off."""
    if runtime.device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # by default: the accelerator that is installed
    os.environ.setdefault("LOCAL_RANK", str(runtime.local_rank))
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # On CPU it would compile a collective of its own, at the start of the run, with the user's
    # compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(auto_mpi_discovery=False, dist_init_required=True)
    return deepspeed
