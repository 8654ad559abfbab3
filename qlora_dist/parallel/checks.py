"""Checks of all ranks: does the model fit, is it in sync, is it what was loaded?"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.distributed.fsdp import FSDPModule

from qlora_dist.config.schema import ParallelConfig
from qlora_dist.errors import TrainingError
from qlora_dist.memory.footprint import check_memory, plan_footprint
from qlora_dist.model.adapters import adapter_parameters, lora_layers
from qlora_dist.parallel.choice import Backend
from qlora_dist.parallel.fsdp import _num_shards, gathered_units
from qlora_dist.parallel.zero import gathered
from qlora_dist.runtime.processes import Runtime
from qlora_dist.runtime.shards import whole_tensor
from qlora_dist.weights.checksums import check_gathered, check_shards, loaded_checksums


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
