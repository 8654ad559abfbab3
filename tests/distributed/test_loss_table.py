"""Every backend and every cut of a batch into ranks, accumulation and rows gives one loss curve."""

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.support.processes import run_on_processes
from tests.support.training import lasting_rows, train_here

NUM_STEPS = 4
GLOBAL_BATCH = 8
WORLD_SIZES = (1, 2, 4)
BACKENDS = ("single", "ddp", "fsdp", "zero2", "zero3")
MICRO_BATCHES = (1, 2)


def backends_of(world_size: int) -> list[str]:
    """Backends that can run on `world_size` ranks here."""
    return [
        backend
        for backend in BACKENDS
        if (backend != "single" or world_size == 1)
        and (not backend.startswith("zero") or find_spec("deepspeed") is not None)
    ]


def train_all(root: Path, world_size: int, model: Path, data: Path) -> None:
    for backend in backends_of(world_size):
        for micro_batch_size in MICRO_BATCHES:
            settings = {
                "model": {"path": str(model), "dtype": "float32"},
                "adapter": {"rank": 4, "alpha": 8},
                "data": {"train": str(data), "max_seq_len": 96, "packing": False},
                "optim": {
                    "max_steps": NUM_STEPS,
                    "lr": 2e-3,
                    "micro_batch_size": micro_batch_size,
                    "grad_accum_steps": GLOBAL_BATCH // (world_size * micro_batch_size),
                },
                "parallel": {"backend": backend},
                "logging": {"tensorboard": False},
            }
            assert train_here(root / f"{world_size}-{backend}-{micro_batch_size}", settings)


@pytest.mark.timeout(900)
def test_all_ways_give_one_loss_curve(tmp_path: Path, tiny_llama: Path, chat_file: Path) -> None:
    """Losses and gradient norms of four steps agree within 1e-5 in float32, on rows with 2 to 90
    targets: on 1, 2 and 4 ranks, with micro-batches of one and two rows, and accumulation up to
    eight rows, under every backend."""
    for world_size in WORLD_SIZES:
        run_on_processes(train_all, world_size, tmp_path, world_size, tiny_llama, chat_file)
    reference = lasting_rows(tmp_path / "1-single-2")
    lines = [
        f"\n{'ranks':>5} {'accum':>5} {'rows':>4}  backend   {'losses':<31}  "
        "largest relative difference"
    ]
    worst = 0.0
    for world_size in WORLD_SIZES:
        for backend in backends_of(world_size):
            for rows in MICRO_BATCHES:
                found = lasting_rows(tmp_path / f"{world_size}-{backend}-{rows}")
                assert len(found) == len(reference) == NUM_STEPS
                difference = max(
                    abs(row[key] / expected[key] - 1)
                    for row, expected in zip(found, reference, strict=True)
                    for key in ("loss", "grad_norm")
                )
                curve = " ".join(f"{row['loss']:.5f}" for row in found)
                accum = GLOBAL_BATCH // (world_size * rows)
                lines.append(
                    f"{world_size:>5} {accum:>5} {rows:>4}  {backend:<8}  {curve}  {difference:.1e}"
                )
                worst = max(worst, difference)
    table = "\n".join(lines)
    sys.stdout.write(table + "\n")
    assert worst <= 1e-5, table
