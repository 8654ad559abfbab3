"""float16 with loss scaling, under every engine: equal results on one and two ranks, through
overflows and stops."""

import math
from contextlib import AbstractContextManager
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from qlora_dist import train as train_module
from qlora_dist.errors import TrainingError
from qlora_dist.optim import loss_scale as loss_scale_module
from qlora_dist.parallel.replicated import ReplicatedEngine
from qlora_dist.run.checkpoint import newest_checkpoint
from tests.distributed.test_equivalence import adapter_vector
from tests.support.command import losses
from tests.support.processes import run_on_processes
from tests.support.training import adapter_bytes, lasting_rows, train_here

SHARDED = ["fsdp", *(["zero3"] if find_spec("deepspeed") else [])]
BACKENDS = ["ddp", *(["zero2"] if find_spec("deepspeed") else []), *SHARDED]
NUM_STEPS = 4
TOO_LARGE = 2.0**24
"""Initial scale with which the tiny model's gradients overflow; they fit after some halvings."""


def settings(model: Path, data: Path, backend: str, processes: int, dtype: str = "float16") -> dict:
    return {
        "model": {"path": str(model), "dtype": dtype},
        "adapter": {"rank": 4, "alpha": 8},
        "data": {"train": str(data), "max_seq_len": 96},
        "optim": {"max_steps": NUM_STEPS, "lr": 2e-3, "grad_accum_steps": 4 // processes},
        "parallel": {"backend": backend},
        "checkpoint": {"every": None},
        "logging": {"tensorboard": False},
    }


def beginning_with(scale: float) -> AbstractContextManager[object]:
    return mock.patch.object(loss_scale_module, "INITIAL", scale)


def scale_at_the_end(folder: Path) -> float:
    checkpoint = newest_checkpoint(folder / "checkpoints", lambda _: None)
    assert checkpoint is not None
    assert checkpoint.state.num_skipped_steps == 0
    assert checkpoint.state.num_steps_at_scale <= NUM_STEPS
    return float(checkpoint.state.loss_scale)


def train_every_way(
    root: Path, model: Path, data: Path, backends: list[str], processes: int
) -> None:
    for backend in backends:
        run = settings(model, data, backend, processes)
        with beginning_with(TOO_LARGE):
            assert train_here(root / f"{backend}-{processes}", run)
            fitting = scale_at_the_end(root / f"{backend}-{processes}")
            assert 1 < fitting < TOO_LARGE
        # An overflow changes nothing but the scale: a run that begins with the final scale has the
        # same bits.
        with beginning_with(fitting):
            assert train_here(root / f"{backend}-{processes}-fitting", run)
            assert scale_at_the_end(root / f"{backend}-{processes}-fitting") == fitting
        # Stopped after a step whose overflow was found, the run goes on with that scale.
        with beginning_with(TOO_LARGE):
            folder = root / f"{backend}-{processes}-stopped"
            attempts = 1 + int(math.log2(TOO_LARGE / fitting))
            assert not train_here(folder, run, stop_after=(4 // processes) * (attempts + 1))
            assert fitting <= scale_at_the_end(folder) < TOO_LARGE
            assert train_here(folder, run)


def test_every_engine_finds_a_scale_and_loses_nothing(
    tmp_path: Path, tiny_llama: Path, chat_file: Path
) -> None:
    """A run that begins with a scale that overflows ends with the bits of one whose scale fitted at
    once, also when it was stopped in between. One rank and two agree within the type's rounding;
    two ranks with copies and with shards agree to the bit. No step is skipped."""
    run_on_processes(train_every_way, 1, tmp_path, tiny_llama, chat_file, ["single"], 1)
    run_on_processes(train_every_way, 2, tmp_path, tiny_llama, chat_file, BACKENDS, 2)
    ways = ["single-1", *(f"{backend}-2" for backend in BACKENDS)]
    one = torch.tensor(losses(tmp_path / "single-1"))
    assert len(one) == NUM_STEPS
    for way in ways:
        whole = adapter_bytes(tmp_path / way), lasting_rows(tmp_path / way)
        for other in ("fitting", "stopped"):
            found = tmp_path / f"{way}-{other}"
            assert (adapter_bytes(found), lasting_rows(found)) == whole, found.name
        difference = ((torch.tensor(losses(tmp_path / way)) - one) / one).abs().max().item()
        assert difference <= 1e-3, way  # bfloat16, with three bits less, is allowed 2e-3
        factor = (
            2 if "zero" in way else 1
        )  # DeepSpeed averages over ranks, so its loss is multiplied by their number
        assert factor * scale_at_the_end(tmp_path / way) == scale_at_the_end(
            tmp_path / "single-1"
        ), way
    assert adapter_bytes(tmp_path / "ddp-2") == adapter_bytes(tmp_path / "fsdp-2")


def scale_in_float32(
    root: Path, model: Path, data: Path, backends: list[str], processes: int
) -> None:
    """Compare training with and without scaled losses, in float32."""
    train_step = train_module.train_step

    def scaled(model: object, engine: Any, *arguments: object) -> object:
        engine.loss_scale = 2.0**16
        return train_step(model, engine, *arguments)

    for backend in backends:
        run = settings(model, data, backend, processes, "float32")
        assert train_here(root / f"{backend}-{processes}", run)
        with mock.patch.object(train_module, "train_step", scaled):
            assert train_here(root / f"{backend}-{processes}-scaled", run)


def test_scaling_changes_no_bit_in_float32(
    tmp_path: Path, tiny_llama: Path, chat_file: Path
) -> None:
    """Losses times 65,536 before backward change no bit of gradient norms, clipping and updates,
    under every engine. DeepSpeed, which divides by scale and clipping in one product, agrees to
    1e-6."""
    run_on_processes(scale_in_float32, 1, tmp_path, tiny_llama, chat_file, ["single"], 1)
    run_on_processes(scale_in_float32, 2, tmp_path, tiny_llama, chat_file, BACKENDS, 2)
    for way in ["single-1", *(f"{backend}-2" for backend in BACKENDS)]:
        plain, scaled = tmp_path / way, tmp_path / f"{way}-scaled"
        if "zero" in way:
            distance = (adapter_vector(scaled) - adapter_vector(plain)).norm() / adapter_vector(
                plain
            ).norm()
            assert distance <= 1e-6, way
        else:
            assert adapter_bytes(scaled) == adapter_bytes(plain), way
            assert lasting_rows(scaled) == lasting_rows(plain), way


def diverge(root: Path, model: Path, data: Path) -> None:
    micro_step = train_module.micro_step
    run = settings(model, data, "single", 1)
    run["optim"]["max_skipped_steps"] = 3

    def broken(*arguments: object) -> torch.Tensor:
        return micro_step(*arguments) * torch.nan

    with (
        mock.patch.object(train_module, "micro_step", broken),
        pytest.raises(TrainingError) as error,
    ):
        train_here(root / "loss", run)
    assert "not finite in 3 steps in a row (optim.max_skipped_steps)" in str(error.value)

    def infinite(*_: object) -> torch.Tensor:
        return torch.tensor(torch.inf, dtype=torch.float64)

    attempts = 0
    train_step = train_module.train_step

    def counted(*arguments: object) -> object:
        nonlocal attempts
        attempts += 1
        return train_step(*arguments)

    with (
        mock.patch.object(ReplicatedEngine, "_global_norm", infinite),
        mock.patch.object(train_module, "train_step", counted),
        pytest.raises(TrainingError),
    ):
        train_here(root / "gradient", run)
    assert attempts == 3 * 17  # each step at every scale from 2^16 to 1


def test_real_divergence_is_still_caught(tmp_path: Path, tiny_llama: Path, chat_file: Path) -> None:
    """A loss that is not finite is not tried again; gradients that are finite at no scale end the
    run after `optim.max_skipped_steps`, and so does that loss."""
    run_on_processes(diverge, 1, tmp_path, tiny_llama, chat_file)
