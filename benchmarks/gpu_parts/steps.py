"""Optimizer steps of this program on models of real shapes: time, memory, and the share of what the device allows."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.bound import arithmetic_seconds, bound_seconds, measured_rates
from benchmarks.gpu_parts.models import build, make_batch, make_config
from benchmarks.memory import Shape
from qlora_dist.budget import RecomputeBudget
from qlora_dist.model.recompute import recompute_of
from qlora_dist.parallel import build_engine
from qlora_dist.runtime import start_runtime
from qlora_dist.train import train_step

GIB = 2**30
NUM_WARMUP = 2
TIMED_SECONDS = 4.0
"""Steps are timed for about so long, and at least three of them."""


def ours(
    shape: Mapping[str, int],
    rows: int,
    seq_len: int,
    *,
    samples_per_row: int = 1,
    num_steps: int | None = None,
    **sections: Mapping[str, Any],
) -> dict[str, Any]:
    """Steps of `train_step` on one micro-batch of `rows` x `seq_len` tokens.

    Args:
        num_steps: instead of as many as fit into some seconds.
        sections: of the configuration, as far as they are not its defaults.
    """
    runtime = start_runtime(seed=0, dtype="bfloat16")
    device = runtime.device
    rates = measured_rates(device)
    reset_peak(device)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        config = make_config(Path(folder), Shape(**shape), rows, seq_len, **sections)
        adapted, said = build(config, runtime)
    engine = build_engine(adapted.train(), config.optim, runtime)
    batch = make_batch(shape["vocab"], rows, seq_len, samples_per_row)
    if device.type == "cuda":
        batch = batch.pinned()
    build_seconds, build_peak = time.perf_counter() - started, peak_gib(device)
    reset_peak(device)

    budget = RecomputeBudget(config, adapted, runtime, said.append)
    budget.choose()

    def step() -> float:
        with budget.measuring():
            sums = train_step(adapted, engine, [batch], config.optim.lr, config.optim.max_grad_norm, runtime)
        budget.after_step([batch])
        return sums.loss.item()

    tokens = batch.num_tokens
    row = row_of(*timed(step, device, num_steps), tokens, device)
    seconds = row["seconds_per_step"]
    share = recompute_of(adapted).num_full / shape["layers"]  # what is recomputed selectively multiplies nothing again
    bound = bound_seconds(adapted, batch, rates)
    return {
        **row,
        "mfu": round(arithmetic_seconds(adapted, batch, rates) / seconds, 4),
        "bound_tokens_per_second": round(tokens / bound, 1),
        "share_of_bound": round(bound / seconds, 4),
        "share_of_bound_with_recompute": round(bound_seconds(adapted, batch, rates, share) / seconds, 4),
        "build_seconds": round(build_seconds, 1),
        "build_peak_gib": build_peak,
        "rates": vars(rates),
        "said": said,
    }  # fmt: skip


def timed(
    step: Callable[[], float], device: torch.device, num_steps: int | None = None
) -> tuple[list[float], list[float]]:
    """Run a step that returns its loss: twice for warm-up, then as often as fits.

    Returns:
        seconds of each step after warm-up, and the losses of all.
    """
    losses = [step() for _ in range(NUM_WARMUP)]
    seconds: list[float] = []
    while len(seconds) < (num_steps or 3) or (num_steps is None and sum(seconds) < TIMED_SECONDS and len(seconds) < 20):
        started = wait(device)
        losses.append(step())
        seconds.append(wait(device) - started)
    return seconds, losses


def row_of(seconds: list[float], losses: list[float], tokens: int, device: torch.device) -> dict[str, Any]:
    """What is reported of every contender: rate, losses and peaks."""
    median = statistics.median(seconds)
    return {
        "tokens_per_second": round(tokens / median, 1),
        "seconds_per_step": float(f"{median:.5g}"),
        "seconds_of_each_step": [float(f"{second:.4g}") for second in seconds],
        "first_loss": round(losses[0], 4),
        "last_loss": round(losses[-1], 4),
        "peak_allocated_gib": peak_gib(device),
        "peak_reserved_gib": round(torch.cuda.max_memory_reserved(device) / GIB, 2) if device.type == "cuda" else None,
    }


def wait(device: torch.device) -> float:
    """The time when the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def reset_peak(device: torch.device) -> None:
    """Begin anew to look for the largest allocation; memory that nobody holds goes back first."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_gib(device: torch.device) -> float | None:
    """Largest allocation since the last reset; not known on the CPU."""
    return round(torch.cuda.max_memory_allocated(device) / GIB, 2) if device.type == "cuda" else None


def limits() -> dict[str, Any]:
    """Everything that `benchmarks/limits.py` measures within one process."""
    from benchmarks.limits import measure

    return measure()
