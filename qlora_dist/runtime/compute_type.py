"""The type that a run computes in: one that its processors multiply quickly, agreed by all ranks.

GPUs that multiply bfloat16 take it (NVIDIA's of compute capability 8.0 and up, AMD's), other GPUs
take float16. A CPU without bfloat16 instructions emulates the products, 10 to 100 times slower than
in float32, without a word: on CPUs the three matrix products of a training step are timed.

The frozen base does not depend on the type: weights are always cast to bfloat16 before they are
quantized.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

DType = Literal["bfloat16", "float16", "float32"]

_NUM_TOKENS, _WIDTH = 128, 512
"""Sizes of the timed products: 67 MFLOP each, 0.06 s on the slowest CPU seen (1.1 GFLOP/s)."""
_FORM_SECONDS = 0.03
_TIE = 0.9
"""Share of bfloat16's time that float32 must stay below: at equal speed half the memory decides."""
_WORTH_SAYING = 1.5
"""Factor by which a chosen type must be slower than another for a remark in the log."""


@dataclass(frozen=True)
class Ability:
    """Types that one rank's device multiplies, and their speeds."""

    device: str
    """Name of the device."""
    is_gpu: bool
    has_bfloat16: bool = True
    """False for a GPU that only emulates bfloat16."""
    flops: dict[str, float] = field(default_factory=dict)
    """Floating-point operations per second by type, on a CPU those of one core; measured only for
    types that the choice, or its note, depends on."""


@dataclass(frozen=True)
class ComputeType:
    """Chosen type, and the log's line about it."""

    name: DType
    note: str

    @property
    def dtype(self) -> torch.dtype:
        """The type as torch has it."""
        found: torch.dtype = getattr(torch, self.name)
        return found


def ability(device: torch.device, asked: str) -> Ability:
    """Look at this rank's device, and time the types that the choice or its note depends on.

    Args:
        asked: `model.dtype`.
    """
    name, is_gpu, has_bfloat16 = "CPU", device.type == "cuda", True
    timed: tuple[str, ...] = () if asked == "float32" else ("bfloat16", "float32")
    if is_gpu:
        properties = torch.cuda.get_device_properties(device)
        name = properties.name
        has_bfloat16 = torch.version.hip is not None or properties.major >= 8
        timed = ("bfloat16", "float16") if asked == "bfloat16" and not has_bfloat16 else ()
    elif asked == "float16":
        timed += ("float16",)
    flops = {each: product_flops(device, each) for each in timed}
    return Ability(name, is_gpu, has_bfloat16, flops)


def choose(asked: str, abilities: Sequence[Ability], is_kept: bool = False) -> ComputeType:
    """Choose the compute type of a run; a pure function, so that all ranks choose alike.

    Args:
        asked: `model.dtype`.
        abilities: those of all ranks.
        is_kept: True if the run began with this type, which it keeps on any machine.
    """
    if asked == "auto":
        name, why = _best(abilities)
        return ComputeType(name, f"compute type: {name} (chosen by model.dtype: auto): {why}")
    assert asked in ("bfloat16", "float16", "float32")
    note = f"compute type: {asked}" + (" (this run began with it)" if is_kept else "")
    if slowness := _slowness(asked, abilities):
        kept, remedy = "It stays, because a run keeps its type", "model.dtype: auto avoids that"
        note += f". {slowness}. {kept if is_kept else remedy}."
    return ComputeType(asked, note)  # type: ignore[arg-type]


def product_flops(device: torch.device, name: str) -> float:
    """Time the matrix products of a training step; return their operations per second.

    The products are x W^T, g W and g^T x with x (tokens, in_features), W (out_features,
    in_features) and g (tokens, out_features). A CPU is measured on one core.
    """
    dtype = getattr(torch, name)
    x, grad = (torch.ones(_NUM_TOKENS, _WIDTH, dtype=dtype, device=device) for _ in range(2))
    weight = torch.ones(_WIDTH, _WIDTH, dtype=dtype, device=device)
    # All three: on a CPU that emulates bfloat16 their speeds differ by a factor of ten.
    forms = (lambda: x @ weight.t(), lambda: grad @ weight, lambda: grad.t() @ x)
    operations = 2 * _NUM_TOKENS * _WIDTH * _WIDTH
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # threads that wait for each other would add their processor time
    try:
        return len(forms) * operations / sum(_quickest(form, device) for form in forms)
    finally:
        torch.set_num_threads(num_threads)


def _quickest(product: Callable[[], Tensor], device: torch.device) -> float:
    """Return the seconds of the quickest of at least three runs in 0.03 s."""
    is_gpu = device.type == "cuda"
    # Processor time on a CPU: on a shared machine a product may wait longer than it computes.
    clock = time.perf_counter if is_gpu else time.process_time
    seconds: list[float] = []
    while len(seconds) < 3 or sum(seconds) < _FORM_SECONDS:  # the first run also makes a plan
        started = clock()
        product()
        if is_gpu:
            torch.cuda.synchronize(device)
        seconds.append(clock() - started)
    return min(seconds)


def _best(abilities: Sequence[Ability]) -> tuple[DType, str]:
    """Choose the type that suits the weakest of all ranks' devices; return it and the reason."""
    if all(one.is_gpu for one in abilities):
        devices = Counter(one.device for one in abilities)
        emulating = {one.device for one in abilities if not one.has_bfloat16}
        if not emulating:
            return "bfloat16", f"{', '.join(devices)} multiplies it"
        why = f"{', '.join(sorted(emulating))} only emulates bfloat16"
        if len(devices) > 1:
            each = ", ".join(f"{count} x {name}" for name, count in devices.items())
            why = f"the ranks have different GPUs ({each}), and {why}"
        return "float16", why
    # All ranks wait for the slowest.
    half, single = (min(one.flops[name] for one in abilities) for name in ("bfloat16", "float32"))
    name: DType = "float32" if half < _TIE * single else "bfloat16"
    where = "a core" + (" on the slowest rank" if len(abilities) > 1 else "")
    rates = f"bfloat16 at {_rate(half)} and float32 at {_rate(single)} {where}"
    return name, f"this CPU multiplies {rates}"


def _slowness(asked: str, abilities: Sequence[Ability]) -> str | None:
    """Describe how much slower a type is than the best one, on the rank with the worst factor."""
    found: list[tuple[float, str]] = []
    for one in abilities:
        others = {name: rate for name, rate in one.flops.items() if name != asked}
        if asked not in one.flops or not others:
            continue
        best = max(others, key=lambda name: others[name])
        factor = others[best] / one.flops[asked]
        if factor >= _WORTH_SAYING or one.is_gpu:
            whose = f"{one.device} only emulates it" if one.is_gpu else "This CPU is slow at it"
            rates = f"{_rate(one.flops[asked])} against {_rate(others[best])}"
            text = f"{whose}: products take {factor:.1f} times as long as in {best} ({rates})"
            found.append((factor, text))
    return max(found)[1] if found else None


def _rate(flops: float) -> str:
    """Return a speed as the log shows it."""
    return f"{flops / 1e9:,.1f} GFLOP/s" if flops < 1e12 else f"{flops / 1e12:,.1f} TFLOP/s"
