"""Attention by kernel: non-finite values, rates, and the cost of a new length.

The shapes are those of a 7B micro-batch, 8 rows x 32 heads x 128. Only operations of causal pairs
count as useful. A kernel that takes a mask computes all pairs, so its rate is lower.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu_parts import NotMeasured
from benchmarks.gpu_parts.steps import this_device, wait
from benchmarks.limits import rate

BACKENDS = {
    "math": SDPBackend.MATH,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
}
TENSORS = ("out", "dq", "dk", "dv")
PAIR_OPERATIONS = 7
"""Operations per pair, element and head, forward and backward, halved because only causal pairs
count.
"""


@contextmanager
def cudnn_attention(is_on: bool) -> Iterator[None]:
    """Allow or forbid cuDNN's kernels in SDPA, whatever the program's own choice is."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(is_on)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def check_cudnn(device: torch.device, is_wanted: bool) -> None:
    """Refuse a comparison that this device cannot make.

    Raises:
        NotMeasured: cuDNN is wanted of a CPU.
    """
    if is_wanted and device.type == "cpu":
        raise NotMeasured("needs a GPU: cuDNN's attention is none of a CPU's")


# --------------------------------------------------------------------------------------------------
# Finite values.


def not_numbers(lengths: Sequence[int]) -> dict[str, Any]:
    """Count non-finite elements of output and gradients, by kernel, for masked bfloat16 attention.

    Queries and keys come in two kinds: ordinary, and those of heads with massive activations, whose
    rows all have a logsumexp near -180. There cuDNN's backward is reported to return NaN when the
    length modulo 128 is 64 (https://github.com/pytorch/pytorch/issues/196678).
    """
    found = {
        f"{name}, {length}, {kind}": _not_finite(backend, length, mean)
        for name, backend in BACKENDS.items()
        for length in lengths
        for kind, mean in (("ordinary", 0.0), ("massive", 4.0))
    }
    counts = {name: row for name, row in found.items() if isinstance(row, dict)}
    return {
        "wrong": [name for name, row in counts.items() if any(row[key] for key in TENSORS)],
        **found,
    }


def _not_finite(backend: SDPBackend, length: int, mean: float) -> dict[str, Any] | str:
    """Counts by tensor, and the distance of all gradients to those of float32."""
    device = this_device()
    generator = torch.Generator(device).manual_seed(0)
    shape = (2, 4, length, 128)
    q, k, v, grad = (torch.randn(shape, generator=generator, device=device) for _ in range(4))
    q, k = (q + mean).bfloat16(), (k - mean).bfloat16()
    v, grad = v.bfloat16(), grad.bfloat16()
    mask = packed_mask(length, device).repeat(2, 1, 1, 1)
    try:
        found = _results(backend, q, k, v, mask, grad)
    except RuntimeError as error:
        if "CUDA error" in str(error):  # the device is unusable from here on
            raise
        return f"refused: {str(error).splitlines()[0][:100]}"
    exact = _results(SDPBackend.MATH, q.float(), k.float(), v.float(), mask, grad.float())
    counts = {name: int((~one.isfinite()).sum()) for name, one in found.items()}
    far = sum(float((found[name].double() - exact[name].double()).square().sum()) for name in exact)
    long = sum(float(exact[name].double().square().sum()) for name in exact)
    distance = math.sqrt(far / long)
    return {
        **counts,
        "distance": float(f"{distance:.3g}") if math.isfinite(distance) else "not a number",
    }


def _results(
    backend: SDPBackend,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor,
    grad: torch.Tensor,
) -> dict[str, torch.Tensor]:
    q, k, v = (one.clone().requires_grad_() for one in (q, k, v))
    with sdpa_kernel(backend):
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        out.backward(grad)
    return dict(zip(TENSORS, (out.detach(), q.grad, k.grad, v.grad), strict=True))


def packed_mask(length: int, device: torch.device) -> torch.Tensor:
    """Mask of a row with two samples, (1, 1, length, length), bool.

    Each token sees the tokens before it in its own sample.
    """
    place = torch.arange(length, device=device)
    sample = place >= length // 3
    return ((place[:, None] >= place) & (sample[:, None] == sample))[None, None]


# --------------------------------------------------------------------------------------------------
# Rates.


def speed(
    way: str, rows: int = 8, heads: int = 32, length: int = 2048, width: int = 128
) -> dict[str, Any]:
    """TFLOP/s of forward and backward, and seconds of the first call for lengths not met before.

    Args:
        way: `varlen`, or `causal` or `masked` and a kernel's name.
    """
    device = this_device()
    if device.type == "cpu" and ("cuDNN" in way or way in ("varlen", "masked, efficient")):
        raise NotMeasured("needs a GPU: there is no such kernel for a CPU")
    run = (
        _varlen(rows, heads, width, device)
        if way == "varlen"
        else _sdpa(way, rows, heads, width, device)
    )
    work = PAIR_OPERATIONS * rows * heads * length**2 * width / 1e12  # half of all pairs
    row: dict[str, Any] = {
        "shape": [rows, heads, length, width],
        "tflops": rate(work, lambda: run(length), device),
    }
    row["new_lengths"] = {
        str(one): _first_calls(run, one, device) for one in (length - 1, length - 7, length - 49)
    }
    if way == "varlen":
        row["fewer_key_heads"] = _fewer_key_heads(rows, heads, length, width, device)
    return row


def _first_calls(run: Callable[[int], None], length: int, device: torch.device) -> list[float]:
    """Seconds of the first and the second call."""
    seconds = []
    for _ in range(2):
        started = wait(device)
        run(length)
        seconds.append(float(f"{wait(device) - started:.3g}"))
    return seconds


def _sdpa(
    way: str, rows: int, heads: int, width: int, device: torch.device
) -> Callable[[int], None]:
    kind, _, kernel = way.partition(", ")

    def run(length: int) -> None:
        q, k, v = _inputs((rows, heads, length, width), device)
        masked = {"attn_mask": masks(length)} if kind == "masked" else {"is_causal": True}
        with sdpa_kernel(BACKENDS[kernel]):
            out = F.scaled_dot_product_attention(q, k, v, **masked)
            out.backward(v.detach())

    made: dict[int, torch.Tensor] = {}

    def masks(length: int) -> torch.Tensor:
        if length not in made:
            # (rows, 1, length, length), as models pass it
            made[length] = packed_mask(length, device).repeat(rows, 1, 1, 1)
        return made[length]

    return run


def _varlen(
    rows: int, heads: int, width: int, device: torch.device, kv_heads: int = 0
) -> Callable[[int], None]:
    """FlashAttention-2 inside torch, on concatenated rows."""
    varlen_attn = _find_varlen()

    def run(length: int) -> None:
        q, k, v = _inputs(
            (rows * length, heads, width), device, (rows * length, kv_heads or heads, width)
        )
        begins = torch.arange(0, (rows + 1) * length, length, device=device, dtype=torch.int32)
        out = varlen_attn(q, k, v, begins, begins, length, length, **_causal(varlen_attn))
        out.backward(torch.ones_like(out))

    return run


def _find_varlen() -> Callable[..., torch.Tensor]:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError as error:
        raise NotMeasured(f"torch {torch.__version__} has no varlen_attn") from error
    return varlen_attn


def _causal(varlen_attn: Callable[..., Any]) -> dict[str, Any]:
    """Arguments that make attention causal in this version of torch."""
    import inspect

    return (
        {"is_causal": True}
        if "is_causal" in inspect.signature(varlen_attn).parameters
        else {"window_size": (-1, 0)}
    )


def _fewer_key_heads(rows: int, heads: int, length: int, width: int, device: torch.device) -> str:
    """Text that tells whether the kernel takes grouped keys as they are."""
    try:
        started = time.perf_counter()
        _varlen(rows, heads, width, device, heads // 4)(length)
    except (RuntimeError, ValueError) as error:
        return f"refused: {str(error).splitlines()[0][:200]}"
    return f"taken, {wait(device) - started:.3g} s"


def _inputs(
    shape: tuple[int, ...], device: torch.device, keys: tuple[int, ...] | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random queries, keys and values, cached by shape because making them takes time."""
    return tuple(
        _random(size, device).detach().requires_grad_()
        for size in (shape, keys or shape, keys or shape)
    )


_MADE: dict[tuple[int, ...], torch.Tensor] = {}


def _random(shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    if shape not in _MADE:
        if len(_MADE) > 2:
            _MADE.clear()
        _MADE[shape] = torch.randn(shape, device=device, dtype=torch.bfloat16)
    return _MADE[shape]
