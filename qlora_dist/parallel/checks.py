"""Checks across ranks: the model fits, the ranks agree, the base has the bytes of its files."""

# Tested by tests/distributed/test_failing_ranks.py and tests/distributed/test_sharding.py.

from __future__ import annotations

import torch
from torch import nn

from qlora_dist.errors import TrainingError
from qlora_dist.memory.footprint import check_memory, plan_footprint
from qlora_dist.model.parts import ModelParts
from qlora_dist.parallel.backend import Backend
from qlora_dist.runtime.processes import Runtime
from qlora_dist.runtime.shards import local_part
from qlora_dist.weights.checksums import check_gathered, check_shards, loaded_checksums


def check_fits(parts: ModelParts, backend: Backend) -> None:
    """Refuse a meta-device model whose share, as this backend cuts it, exceeds the free memory.

    Raises:
        ModelError: naming the bytes that are needed and free.
    """
    runtime, device = backend.runtime, backend.home
    # Replicas are the outer dimension: shard groups are runs of neighboring ranks.
    rank = runtime.rank % backend.num_shards
    footprint = plan_footprint(parts.model, parts.gathered_units, backend.num_shards, rank)
    # All processes of a node share its host memory; each has a GPU of its own.
    check_memory(footprint, device, runtime.local_world_size if device.type == "cpu" else 1)
    runtime.barrier()  # no rank may allocate while another still looks at what is free


def check_in_sync(
    adapters: dict[str, nn.Parameter], step: int, num_samples_seen: int, runtime: Runtime
) -> None:
    """Compare the adapter's bytes and the position in the data over all ranks; a collective.

    Under a backend that shards the adapter, each shard group holds one copy of it.

    Raises:
        TrainingError: on every rank, naming the first difference.
    """
    if runtime.world_size == 1:
        return
    position = torch.tensor([step, num_samples_seen], dtype=torch.int64, device=runtime.device)
    mine = torch.cat([loaded_checksums(adapters, runtime.device), position])
    # The minimum as a maximum: all ranks agree where both are equal.
    differs = runtime.max_of_each(mine) != -runtime.max_of_each(-mine)
    if differs.any():
        names = [*adapters, "the optimizer step", "the position in the data"]
        found = [name for name, is_bad in zip(names, differs.tolist(), strict=True) if is_bad]
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        raise TrainingError(
            f"after step {step} the ranks no longer agree on {found[0]}{more}. One of them has "
            "computed something else than the others, as faulty memory makes happen. Nothing of "
            "this is saved: start the same command again to go on from the last checkpoint, and "
            "watch whether one machine repeats it."
        )


def check_all_learn(adapters: dict[str, nn.Parameter], runtime: Runtime) -> None:
    """Refuse adapters that the first update of a run has left as they were; a collective.

    B is zero before it, and differs from zero wherever its gradient does.

    Args:
        adapters: this rank's parts.

    Raises:
        TrainingError: on every rank, naming the adapters without a gradient.
    """
    matrices = {name: param for name, param in adapters.items() if ".lora_B." in name}
    parts = (local_part(param) for param in matrices.values())
    moved = torch.stack([part.count_nonzero().gt(0).float() for part in parts])  # (num_matrices,)
    reached = runtime.max_of_each(moved.to(runtime.device)).bool().tolist()
    still = [name for name, is_moved in zip(matrices, reached, strict=True) if not is_moved]
    if not still:
        return
    layers = [name.removeprefix("base_model.model.").partition(".lora_B.")[0] for name in still]
    more = f" and {len(layers) - 3} more" if layers[3:] else ""
    raise TrainingError(
        f"{len(layers)} of {len(matrices)} adapters got no gradient in the first step: "
        f"{', '.join(layers[:3])}{more}. They would stay without effect: the loss does not depend "
        "on their layers. Name the layers that do learn in adapter.target_modules."
    )


def verify_base(parts: ModelParts, backend: Backend) -> None:
    """Check a loaded model: each rank holds its share, and gathered layers have the loaded bytes.

    A collective.

    Raises:
        ModelError: naming the parameter, on every rank.
    """
    model, runtime = parts.model, backend.runtime
    check_shards(model, backend.num_shards)
    params = {name: param for name, param in model.named_parameters() if not param.requires_grad}
    expected = loaded_checksums(params, runtime.device)
    if runtime.world_size > 1:
        check_gathered(params, expected, backend.gathered(parts), runtime.max_of_each)
