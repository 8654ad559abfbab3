"""Recomputation on two ranks: both choose the same, and training has the same bits."""

import math
from contextlib import AbstractContextManager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from unittest import mock

import pytest
import torch

from qlora_dist.config.schema import (
    AdapterConfig,
    DataConfig,
    MemoryConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
)
from qlora_dist.data.batch import collate
from qlora_dist.data.samples import Sample
from qlora_dist.memory.activations import LayerBytes, Widths, layer_bytes
from qlora_dist.memory.auto import RecomputeBudget
from qlora_dist.memory.policy import Recompute
from qlora_dist.memory.recompute import recompute_of
from qlora_dist.model.adapters import adapter_parameters, whole_adapter
from qlora_dist.model.parts import ModelParts
from qlora_dist.optim.optimizers import OPTIMIZERS
from qlora_dist.runtime.memory import GIB, MemoryMeter
from qlora_dist.runtime.processes import Runtime, start_runtime
from qlora_dist.train import train_step
from tests.support.built import build
from tests.support.processes import run_on_processes

LENGTH = 48
NUM_LAYERS = 3


def train(
    folder: Path, backend: str, recompute: str | int, runtime: Runtime
) -> tuple[list[float], dict]:
    """Losses and final adapter of two steps of two accumulated micro-batches, with dropout."""
    config = TrainConfig(
        model=ModelConfig(path=str(folder), dtype="bfloat16"),
        adapter=AdapterConfig(rank=4, dropout=0.2),
        memory=MemoryConfig(recompute=recompute),
        optim=OptimConfig(lr=1e-2, grad_accum_steps=2),
        data=DataConfig(max_seq_len=LENGTH),
    )
    parts, sharing = build(config, folder, backend, runtime)
    model = parts.model.train()
    engine = sharing.engine(parts)
    budget = RecomputeBudget(config, ModelParts(model), runtime, lambda _: None)
    budget.choose()
    generator = torch.Generator().manual_seed(runtime.rank)
    rows = [torch.randint(3, 300, (LENGTH,), generator=generator).tolist() for _ in range(2)]
    batches = [collate([Sample(ids, ids)], pad_token_id=0) for ids in rows]
    losses, choices = [], []
    for _ in range(2):
        with budget.measuring():
            sums = train_step(model, engine, batches, 1e-2, 1.0, runtime)
        budget.after_step(batches)
        losses.append(runtime.sum_over_ranks(sums.loss).item())
        choices.append(recompute_of(ModelParts(model).layers))
    if recompute == "auto":
        assert choices[0] == Recompute(NUM_LAYERS), "a tiny model fits"
    return losses, {name: tensor.clone() for name, tensor in whole_adapter(model).items()}


def compare_policies(folder: Path, backend: str, settings: tuple[str | int, ...]) -> None:
    runtime = start_runtime(seed=0, dtype="bfloat16")
    expected_losses, expected = train(folder, backend, "none", runtime)
    for recompute in settings:
        losses, found = train(folder, backend, recompute, runtime)
        assert losses == expected_losses, recompute
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), (recompute, name)


def test_training_has_the_same_bits_under_every_policy(tiny_llama: Path) -> None:
    """On two sharded ranks, with accumulation and dropout, losses and adapters do not depend on
    `memory.recompute`."""
    run_on_processes(compare_policies, 2, tiny_llama, "fsdp", ("selective", 1, "auto"))


def test_zero3_has_the_same_bits_under_every_policy(tiny_llama: Path) -> None:
    """ZeRO-3, whose parameters are whole only while their module runs, has equal bits under each
    policy."""
    pytest.importorskip("deepspeed", reason="deepspeed is an optional dependency")
    run_on_processes(compare_policies, 2, tiny_llama, "zero3", ("selective",))


class PretendedMeter(MemoryMeter):
    """Memory of a process that holds `base` bytes, and in a step the kept bytes of its layers on
    top."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.base, self.layer, self.model = 0, LayerBytes(0, 0, 0), None

    def held(self) -> int:
        return self.base

    def restart(self) -> None:
        pass

    def peak(self) -> int:
        choice = recompute_of(ModelParts(self.model).layers)
        return self.base + self.layer.kept(choice) + (self.layer.none if choice.num_full else 0)


def as_on_a_gpu() -> AbstractContextManager[object]:
    """Context in which recomputing selectively frees memory, as on a GPU."""
    return mock.patch.object(RecomputeBudget, "_selective_frees", True)


def choices_of(folder: Path, runtime: Runtime, num_layers_less: int) -> list[Recompute]:
    """Choices before and after each of eight steps under a pretended memory.

    Layers turn out to take twice what the formula says; the limit is what three layers take that
    keep everything; and after the second and the fourth step the share of one such layer is freed.

    Args:
        num_layers_less: layers that the second rank has less room for.
    """
    config = TrainConfig(
        model=ModelConfig(path=str(folder), dtype="float32"),
        adapter=AdapterConfig(rank=4),
        data=DataConfig(max_seq_len=LENGTH),
    )
    parts, _ = build(config, folder, "ddp", runtime)
    model = parts.model.train()
    by_formula = layer_bytes(Widths.of(parts), LENGTH, 4, AdapterConfig())
    layer = LayerBytes(*(2 * size for size in vars(by_formula).values()))
    said: list[str] = []
    num_adapted = sum(param.numel() for param in adapter_parameters(model).values())
    each = math.ceil(
        layer.none / num_adapted
    )  # as much as a layer keeps, so that leaving it out is noticed
    state = each * num_adapted
    limit = mock.patch(
        "qlora_dist.memory.auto.memory_limit", return_value=GIB + state + NUM_LAYERS * layer.none
    )
    nothing_left_free = mock.patch.object(RecomputeBudget, "_reserve", 0)
    bytes_of_state = mock.patch.dict(
        OPTIMIZERS,
        {config.optim.optimizer: replace(OPTIMIZERS[config.optim.optimizer], state_bytes=each)},
    )
    pretended = mock.patch("qlora_dist.memory.auto.MemoryMeter", PretendedMeter)
    trimming = mock.patch("qlora_dist.memory.auto.trim_heap")
    trim = trimming.start()
    with pretended, bytes_of_state, limit, nothing_left_free, as_on_a_gpu():
        budget = RecomputeBudget(config, ModelParts(model), runtime, said.append)
        meter = budget._meter
        meter.model, meter.layer = model, layer
        meter.base = GIB + runtime.rank * num_layers_less * layer.none
        budget.choose()
    choices = [recompute_of(ModelParts(model).layers)]
    batch = collate([Sample([1] * LENGTH, [1] * LENGTH)], pad_token_id=0)
    for number in range(1, 9):
        with budget.measuring():
            pass
        if budget._probe is not None:
            budget._probe.result = layer
        with nothing_left_free, as_on_a_gpu():
            budget.after_step([batch])
        meter.base += {1: state, 2: -layer.none, 4: -layer.none}.get(number, 0)
        choices.append(recompute_of(ModelParts(model).layers))
    assert said[0].startswith(f"recompute: {choices[0]}: about ")
    assert said[0].endswith("(chosen by memory.recompute: auto)")
    changes = [later for earlier, later in pairwise(choices) if later != earlier]
    num_to_less = sum(
        layer.kept(later) < layer.kept(earlier) for earlier, later in pairwise(choices)
    )
    trimming.stop()
    assert trim.call_count == 1 + num_to_less  # after loading, and where steps before took more
    assert [line.split(": about")[0] for line in said[1:]] == [
        f"recompute: {choice}" for choice in changes
    ]
    return choices


def choose_together(folder: Path) -> None:
    runtime = start_runtime(seed=0, dtype="float32")
    cases = (
        (0, Recompute(3), Recompute(3)),
        (1, Recompute(3, 3), Recompute(3)),
        (2, Recompute(3, 0, 3), Recompute(3, 1, 2)),
    )
    for num_layers_less, early, late in cases:
        mine = choices_of(folder, runtime, num_layers_less)
        everybodys: list = [None, None]
        torch.distributed.all_gather_object(everybodys, mine)
        assert everybodys[0] == everybodys[1], num_layers_less
        assert mine[1] == mine[2] == mine[3] == early, (num_layers_less, mine)
        assert mine[4] == mine[8] == late, (num_layers_less, mine)


def test_all_ranks_choose_by_the_one_with_the_least_room(tiny_llama: Path) -> None:
    """Ranks that hold unlike amounts decide alike, before and after the first steps, and later ones
    recompute no less; the log names the choice and each change."""
    run_on_processes(choose_together, 2, tiny_llama)
