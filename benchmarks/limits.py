"""Limits of this machine: products, dequantization, attention, copies and links between processes.

    python benchmarks/limits.py                  # about a minute

Other results are compared with these. A rate is the median over repeats of a loop of at least a
tenth of a second. Everything runs on the GPU if there is one. Link rates are measured between
`--processes` processes, with gloo on CPUs and nccl on GPUs. Writes
benchmarks/results/limits_DEVICE.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from torch.nn import functional

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks.apart import run_apart  # noqa: E402
from benchmarks.machine import describe_machine  # noqa: E402

REPEATS, LOOP_SECONDS = 5, 0.1
LINK_BYTES = 32 * 2**20


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--processes", type=int, default=2, help="for the link rates; 1 leaves them out"
    )
    parser.add_argument("--out", type=Path, default=None, help="JSON file to write")
    # file of the result; makes this process one rank of the link measurement
    parser.add_argument("--link", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.link is not None:
        measure_link(options.link)
        return
    machine = describe_machine()
    result: dict[str, Any] = {"machine": machine, "threads": torch.get_num_threads(), **measure()}
    if options.processes > 1:
        result["links"] = run_links(options.processes)
    out = (
        options.out
        or ROOT
        / "benchmarks"
        / "results"
        / f"limits_{'cuda' if machine['num_gpus'] else 'cpu'}.json"
    )
    out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))
    print(f"written to {out}")


def measure() -> dict[str, Any]:
    """Rates of this process's device."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    is_gpu = device.type == "cuda"
    size = 8192 if is_gpu else 2048
    tokens = 4096 if is_gpu else 1024
    lengths = (512, 2048, 8192) if is_gpu else (512, 2048)
    result = {
        "gemm_tflops": {
            str(dtype).removeprefix("torch."): gemm_tflops(size, size, size, dtype, device)
            for dtype in (torch.bfloat16, torch.float32)
        },
        "thin_gemm_tflops": {  # tokens x 4,096 by 4,096 x rank, LoRA's products
            f"rank {rank}": gemm_tflops(tokens, 4096, rank, torch.bfloat16, device)
            for rank in (16, 64)
        },
        # large on a GPU: the host prepares each call in Python and must not be the bottleneck
        "dequantize_gib_per_second": dequantize_gib_per_second(16384 if is_gpu else 4096, device),
        "dequantize_float32_gib_per_second": dequantize_gib_per_second(
            16384 if is_gpu else 4096, device, torch.float32
        ),
        "attention_tflops": {
            f"{length} tokens": attention_tflops(length, device) for length in lengths
        },
        "copy_gib_per_second": copy_gib_per_second(2**30 if is_gpu else 2**27, device),
    }
    if is_gpu:
        result["host_to_device_gib_per_second"] = host_to_device_gib_per_second(device)
    return result


def measure_apart(threads: int) -> dict[str, Any]:
    """Rates of this machine now, without links, from a fresh process with `threads` threads."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "limits.json"
        run_apart([__file__, "--processes", "1", "--out", str(out)], threads)
        measured = json.loads(out.read_text(encoding="utf-8"))
    return {name: value for name, value in measured.items() if name != "machine"}


def rate(work: float, run: Callable[[], object], device: torch.device) -> float:
    """`work` per second: median of several loops, rounded to four digits."""

    def wait() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    run()
    started = wait()
    run()
    rounds = max(1, round(LOOP_SECONDS / max(wait() - started, 1e-6)))
    rates = []
    for _ in range(REPEATS):
        started = wait()
        for _ in range(rounds):
            run()
        rates.append(work * rounds / (wait() - started))
    return float(f"{statistics.median(rates):.4g}")


def gemm_tflops(
    rows: int, inner: int, columns: int, dtype: torch.dtype, device: torch.device
) -> float:
    """TFLOP/s of a matrix product, 2 * rows * inner * columns operations each."""
    a = torch.randn(rows, inner, device=device).to(dtype)
    b = torch.randn(columns, inner, device=device).to(dtype)
    return rate(2 * rows * inner * columns / 1e12, lambda: functional.linear(a, b), device)


def dequantize_gib_per_second(
    size: int, device: torch.device, dtype: torch.dtype = torch.bfloat16
) -> float:
    """GiB/s of dequantizing NF4 with double quantization to `dtype`.

    Bytes read and written count: 0.516 per weight, and those of `dtype`.
    """
    import bitsandbytes.functional as bnb

    packed, state = bnb.quantize_4bit(
        torch.randn(size, size, device=device).to(dtype), quant_type="nf4", compress_statistics=True
    )
    return rate(
        (0.516 + dtype.itemsize) * size**2 / 2**30,
        lambda: bnb.dequantize_4bit(packed, state),
        device,
    )


def attention_tflops(length: int, device: torch.device) -> float:
    """TFLOP/s of causal SDPA, forward and backward, with 8 heads of width 64.

    Half of all pairs count: 7 * heads * length^2 * 64 operations.
    """
    q, k, v = (
        torch.randn(1, 8, length, 64, device=device, dtype=torch.bfloat16, requires_grad=True)
        for _ in range(3)
    )
    grad = torch.ones_like(q)

    def run() -> None:
        functional.scaled_dot_product_attention(q, k, v, is_causal=True).backward(grad)
        q.grad = k.grad = v.grad = None

    return rate(7 * 8 * length**2 * 64 / 1e12, run, device)


def copy_gib_per_second(num_bytes: int, device: torch.device) -> float:
    """GiB/s read and written by a copy too large for any cache."""
    source = torch.ones(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return rate(2 * num_bytes / 2**30, lambda: target.copy_(source), device)


def host_to_device_gib_per_second(device: torch.device) -> float:
    """GiB/s of a copy from pinned host memory to the GPU."""
    source = torch.ones(2**28, dtype=torch.uint8).pin_memory()
    target = torch.empty_like(source, device=device)
    return rate(2**28 / 2**30, lambda: target.copy_(source, non_blocking=True), device)


def run_links(processes: int) -> dict[str, Any]:
    """Start processes that measure the rates between them."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "links.json"
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={processes}",
            __file__,
            "--link",
            str(out),
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            return {"processes": processes, "not measured": done.stderr.strip().splitlines()[-1]}
        return dict(json.loads(out.read_text(encoding="utf-8")))


def measure_link(out: Path) -> None:
    """Write the bytes per second that a rank sends in an all-gather and in an all-reduce.

    Of N ranks and S bytes, a gather sends S (N-1)/N and an all-reduce sends twice that.
    """
    is_gpu = torch.cuda.is_available()
    if is_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if is_gpu else "gloo")
    world, device = dist.get_world_size(), torch.device("cuda" if is_gpu else "cpu")
    part = torch.ones(LINK_BYTES // world, dtype=torch.uint8, device=device)
    whole = torch.empty(LINK_BYTES // world * world, dtype=torch.uint8, device=device)
    summed = torch.ones(LINK_BYTES // 4, device=device)
    sent = LINK_BYTES * (world - 1) / world / 2**30

    def timed(work: float, run: Callable[[], object]) -> float:
        run()
        rates = []
        for _ in range(REPEATS):
            dist.barrier()
            started = time.perf_counter()
            for _ in range(8):
                run()
            if is_gpu:
                torch.cuda.synchronize()
            rates.append(8 * work / (time.perf_counter() - started))
        return float(f"{statistics.median(rates):.4g}")

    found = {
        "backend": dist.get_backend(),
        "processes": world,
        "gather_gib_per_second": timed(sent, lambda: dist.all_gather_into_tensor(whole, part)),
        "all_reduce_gib_per_second": timed(2 * sent, lambda: dist.all_reduce(summed)),
    }
    if dist.get_rank() == 0:
        out.write_text(json.dumps(found), encoding="utf-8")
    dist.barrier()
    os._exit(0)  # a gloo process may abort on the way out


if __name__ == "__main__":
    main()
