"""Optimizer steps of this program on models of real shapes: time, memory and share of the bound."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import nn

from benchmarks.bound import Rates, arithmetic_seconds, bound_seconds, measured_rates
from benchmarks.gpu_parts.models import build, make_batch, make_config
from benchmarks.limits import (
    copy_gib_per_second,
    dequantize_gib_per_second,
    gemm_tflops,
    host_to_device_gib_per_second,
)
from benchmarks.memory import Shape
from qlora_dist.data.batch import MicroBatch
from qlora_dist.memory.auto import RecomputeBudget
from qlora_dist.memory.recompute import recompute_of
from qlora_dist.parallel.replicated import Replicated
from qlora_dist.run.checkpoint import Checkpoints
from qlora_dist.run.state import RunIdentity, TrainState
from qlora_dist.runtime.processes import Runtime, start_runtime
from qlora_dist.train import train_step

GIB = 2**30
NUM_WARMUP = 2
TIMED_SECONDS = 3.0
"""Steps are timed for about so many seconds, and at least three of them."""


def ours(
    shape: Mapping[str, int],
    rows: int,
    seq_len: int,
    *,
    samples_per_row: int = 1,
    num_steps: int | None = None,
    saves: Literal["gather", "write"] | None = None,
    **sections: Mapping[str, Any],
) -> dict[str, Any]:
    """Run `train_step` on one micro-batch of `rows` x `seq_len` tokens.

    Args:
        num_steps: number of timed steps; None: as many as fit into TIMED_SECONDS.
        saves: after the steps, gather the contents of a checkpoint (`gather`), or also write it
            (`write`).
        sections: sections of the configuration that differ from its defaults.
    """
    runtime = start_runtime(seed=0, dtype="bfloat16")
    device = runtime.device
    rates = measured_rates(device)
    reset_peak(device)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        config = make_config(Path(folder), Shape(**shape), rows, seq_len, **sections)
        parts, said = build(config, runtime)
    adapted = parts.model.train()
    engine = Replicated("single", config, runtime).engine(parts)
    batch = make_batch(shape["vocab"], rows, seq_len, samples_per_row)
    if device.type == "cuda":
        batch = batch.pinned()
    build_seconds, build_peak = time.perf_counter() - started, peak_gib(device)
    outside = outside_allocator_gib(device)
    reset_peak(device)

    budget = RecomputeBudget(config, parts, runtime, said.append)
    budget.choose()

    def step() -> float:
        with budget.measuring():
            sums = train_step(
                adapted, engine, [batch], config.optim.lr, config.optim.max_grad_norm, runtime
            )
        budget.after_step([batch])
        return sums.loss.item()

    row = row_of(*timed(step, device, num_steps), batch.num_tokens, device)
    row["busy"] = busy(step, device)
    if saves:
        row["save"] = save(engine, runtime, is_written=saves == "write")
    # selective recomputation repeats no product
    recomputed = recompute_of(parts.layers).num_full / shape["layers"]
    return {
        **row,
        **shares_of(row["seconds_per_step"], adapted, batch, rates, recomputed),
        "build_seconds": round(build_seconds, 1),
        "build_peak_gib": build_peak,
        "outside_allocator_gib": outside,
        "rates": vars(rates),
        "may_use_cudnn_attention": torch.backends.cuda.cudnn_sdp_enabled(),
        "said": said,
    }


def shares_of(
    seconds: float, adapted: nn.Module, batch: MicroBatch, rates: Rates, recomputed: float
) -> dict[str, float]:
    """Model FLOPs utilization of a step, and its shares of the bound.

    Args:
        recomputed: share of the layers that compute their forward twice.
    """
    bound = bound_seconds(adapted, batch, rates)
    with_recompute = bound_seconds(adapted, batch, rates, recomputed)
    return {
        "mfu": round(arithmetic_seconds(adapted, batch, rates) / seconds, 4),
        "bound_tokens_per_second": round(batch.num_tokens / bound, 1),
        "share_of_bound": round(bound / seconds, 4),
        "share_of_bound_with_recompute": round(with_recompute / seconds, 4),
    }


def timed(
    step: Callable[[], float], device: torch.device, num_steps: int | None = None
) -> tuple[list[float], list[float]]:
    """Run a step that returns its loss: twice for warm-up, then as often as fits.

    Returns:
        seconds of each step after warm-up, and the losses of all.
    """
    losses = [step() for _ in range(NUM_WARMUP)]
    seconds: list[float] = []
    while len(seconds) < (num_steps or 3) or (
        num_steps is None and sum(seconds) < TIMED_SECONDS and len(seconds) < 20
    ):
        started = wait(device)
        losses.append(step())
        seconds.append(wait(device) - started)
    return seconds, losses


def row_of(
    seconds: list[float], losses: list[float], tokens: int, device: torch.device
) -> dict[str, Any]:
    """Figures reported for every contender: rate, losses and peaks."""
    median = statistics.median(seconds)
    return {
        "tokens_per_second": round(tokens / median, 1),
        "seconds_per_step": float(f"{median:.5g}"),
        "seconds_of_each_step": [float(f"{second:.4g}") for second in seconds],
        "first_loss": round(losses[0], 4),
        "last_loss": round(losses[-1], 4),
        "peak_allocated_gib": peak_gib(device),
        "peak_reserved_gib": round(torch.cuda.max_memory_reserved(device) / GIB, 2)
        if device.type == "cuda"
        else None,
        "allocation_retries": num_retries(device),
    }


def wait(device: torch.device) -> float:
    """Time at which the device has finished all work given to it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def reset_peak(device: torch.device) -> None:
    """Reset the peak of allocations; unused memory is released first."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        torch.cuda.reset_accumulated_memory_stats(device)


def num_retries(device: torch.device) -> int | None:
    """Allocations since the last reset that first had to free cached memory.

    Each of them waits for the GPU.
    """
    return (
        int(torch.cuda.memory_stats(device)["num_alloc_retries"]) if device.type == "cuda" else None
    )


def outside_allocator_gib(device: torch.device) -> float | None:
    """GPU memory neither free nor the allocator's: CUDA contexts, the next worker's included."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    return round((total - free - torch.cuda.memory_reserved(device)) / GIB, 2)


def peak_gib(device: torch.device) -> float | None:
    """Largest allocation since the last reset; None on a CPU."""
    return (
        round(torch.cuda.max_memory_allocated(device) / GIB, 2) if device.type == "cuda" else None
    )


def this_device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def rates() -> dict[str, Any]:
    """Rates of products, dequantization and copies; attention is measured kernel by kernel."""
    device = this_device()
    is_gpu = device.type == "cuda"
    size, tokens = (8192, 4096) if is_gpu else (512, 256)
    found: dict[str, Any] = {
        "gemm_tflops": {
            str(dtype).removeprefix("torch."): gemm_tflops(size, size, size, dtype, device)
            for dtype in (torch.bfloat16, torch.float32)
        },
        "thin_gemm_tflops": {
            f"rank {rank}": gemm_tflops(tokens, 4096, rank, torch.bfloat16, device)
            for rank in (16, 64)
        },
        "dequantize_gib_per_second": dequantize_gib_per_second(2 * size, device),
        "copy_gib_per_second": copy_gib_per_second(2**30 if is_gpu else 2**25, device),
    }
    if is_gpu:
        found["host_to_device_gib_per_second"] = host_to_device_gib_per_second(device)
    return found


def busy(step: Callable[[], float], device: torch.device) -> dict[str, Any]:
    """Time of one more step in which at least one kernel or copy ran, and its share of the step.

    A share well below one means that the device waits for the host, which launches the kernels.
    Profiling slows the host down, so the share is a lower bound.
    """
    on_gpu = device.type == "cuda"
    activity = (
        torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU
    )
    started = wait(device)
    with torch.profiler.profile(activities=[activity]) as profiler:
        begun = wait(device)
        step()
        wall = wait(device) - begun
    kind = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
    spans = sorted(
        (event.start_ns(), event.start_ns() + event.duration_ns())
        for event in profiler.profiler.kineto_results.events()
        if event.device_type() == kind
        and not event.is_user_annotation()  # an annotation spans whole phases and their gaps
    )
    covered = union_length(spans) / 1e9
    return {
        "share": round(covered / wall, 3),
        "kernels": len(spans),
        "seconds": float(f"{covered:.4g}"),
        "of_seconds": float(f"{wall:.4g}"),
        "profiling_seconds": round(wait(device) - started, 1),
    }


def union_length(spans: Sequence[tuple[int, int]]) -> int:
    """Total length covered by sorted spans."""
    total, end = 0, None
    for first, last in spans:
        begin = first if end is None else max(first, end)
        total += max(0, last - begin)
        end = last if end is None else max(end, last)
    return total


def save(engine: Any, runtime: Runtime, is_written: bool) -> dict[str, Any]:
    """Seconds and memory of a checkpoint; the memory is the GPU's peak beyond what it holds before.

    Out of memory is a result: the steps before it stay measured.
    """
    device = runtime.device
    reset_peak(device)
    held = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    started = wait(device)
    try:
        state = engine.optimizer_state()
    except torch.OutOfMemoryError as error:
        return {"not measured": f"out of memory: {str(error).splitlines()[0][:300]}"}
    gathered = wait(device)
    row: dict[str, Any] = {
        "optimizer_state_seconds": round(gathered - started, 2),
        "optimizer_state_host_gib": float(f"{sum(one.nbytes for one in state.values()) / GIB:.4g}"),
        "optimizer_state_peak_gib": None,
    }
    if device.type == "cuda":
        row["optimizer_state_peak_gib"] = round(
            (torch.cuda.max_memory_allocated(device) - held) / GIB, 3
        )
    adapter = engine.whole_adapter()
    row["whole_adapter_seconds"] = round(wait(device) - gathered, 2)
    if is_written:
        row |= write_checkpoint(adapter, state, runtime)
    return row


def write_checkpoint(
    adapter: dict[str, torch.Tensor], state: dict[str, torch.Tensor], runtime: Runtime
) -> dict[str, Any]:
    """Seconds of a checkpoint on this disk: written, synchronized, read back and compared."""

    def write_adapter(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
        folder.mkdir()
        save_file(tensors, folder / "adapter_model.safetensors")

    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(
            Path(folder), 1, RunIdentity("", "", {}, {}), runtime, "single", write_adapter
        )
        started = time.perf_counter()
        checkpoints.write(TrainState(step=1), adapter, state, False)
        checkpoints.wait()
        seconds = time.perf_counter() - started
        size = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
    return {"write_seconds": round(seconds, 2), "checkpoint_gib": float(f"{size / GIB:.4g}")}
