"""The type that a run computes in: what its processors multiply quickly, agreed by all ranks.

bfloat16 on GPUs that multiply it (NVIDIA's of compute capability 8.0 and up, AMD's), float16 on those that do not. A
CPU without bfloat16 instructions emulates its products, 10 to 100 times slower than float32's, and nothing says so:
there the products of a training step are timed, in the three forms that it takes.

The type does not touch what is frozen: weights are cast to bfloat16 before they are quantized, whatever it is.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

DType = Literal["bfloat16", "float16", "float32"]

_NUM_TOKENS, _WIDTH = 128, 512
"""Sizes of the timed products: 67 MFLOP each, 0.06 s where they are slowest (1.1 GFLOP/s)."""
_FORM_SECONDS = 0.03
"""For which each form is repeated; at least three times, because the first makes a plan."""
_TIE = 0.9
"""float32 must take less than this share of bfloat16's time: at equal speed, half the memory decides."""
_WORTH_SAYING = 1.5
"""A chosen type that takes so many times as long as another is worth a line."""


@dataclass(frozen=True)
class Ability:
    """The types that one rank's device multiplies, and how quickly."""

    device: str
    """Its name."""
    is_gpu: bool
    has_bfloat16: bool = True
    """True for a GPU that multiplies it by itself."""
    flops: dict[str, float] = field(default_factory=dict)
    """Measured floating-point operations per second by type, of a CPU those of a core; of types that nobody asks for,
    none."""


@dataclass(frozen=True)
class ComputeType:
    """The type chosen, and the log's line about it."""

    name: DType
    note: str

    @property
    def dtype(self) -> torch.dtype:
        """The type itself."""
        found: torch.dtype = getattr(torch, self.name)
        return found


def ability(device: torch.device, asked: str) -> Ability:
    """Look at this rank's device, and time what the choice or its note depends on.

    Args:
        asked: `model.dtype`.
    """
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        has_bfloat16 = torch.version.hip is not None or (properties.major, properties.minor) >= (
            8,
            0,
        )
        timed = ["bfloat16", "float16"] if asked == "bfloat16" and not has_bfloat16 else []
        return Ability(
            properties.name,
            True,
            has_bfloat16,
            {name: product_flops(device, name) for name in timed},
        )
    timed = (
        [] if asked == "float32" else ["bfloat16", "float32"] + ["float16"] * (asked == "float16")
    )
    return Ability("CPU", False, flops={name: product_flops(device, name) for name in timed})


def choose(asked: str, abilities: Sequence[Ability], is_kept: bool = False) -> ComputeType:
    """The compute type of a run; a pure function, so that all ranks come to the same.

    Args:
        asked: `model.dtype`.
        abilities: of all ranks.
        is_kept: whether the type is that with which the run began, which it keeps on any machine.
    """
    if asked == "auto":
        name, why = _best(abilities)
        return ComputeType(name, f"compute type: {name} (chosen by model.dtype: auto): {why}")
    assert asked in ("bfloat16", "float16", "float32")
    note = f"compute type: {asked}" + (" (this run began with it)" if is_kept else "")
    if slowness := _slowness(asked, abilities):
        remedy = (
            "It stays, because a run keeps its type" if is_kept else "model.dtype: auto avoids that"
        )
        note += f". {slowness}. {remedy}."
    return ComputeType(asked, note)  # type: ignore[arg-type]


def product_flops(device: torch.device, name: str) -> float:
    """Operations per second, of a CPU by one core, of x W^T, g W and g^T x together: the forms of a training step.

    With x (tokens, in_features), W (out_features, in_features) and g (tokens, out_features).
    """
    dtype = getattr(torch, name)
    x, grad = (torch.ones(_NUM_TOKENS, _WIDTH, dtype=dtype, device=device) for _ in range(2))
    weight = torch.ones(_WIDTH, _WIDTH, dtype=dtype, device=device)
    forms: tuple[Callable[[], torch.Tensor], ...] = (
        lambda: x @ weight.t(),
        lambda: grad @ weight,
        lambda: grad.t() @ x,
    )
    operations = 2 * _NUM_TOKENS * _WIDTH * _WIDTH
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several that wait for each other spend processor time on it
    try:
        return len(forms) * operations / sum(_quickest(form, device) for form in forms)
    finally:
        torch.set_num_threads(num_threads)


def _quickest(product: Callable[[], torch.Tensor], device: torch.device) -> float:
    """Seconds of the quickest of at least three: on a CPU of its processor, since on one that others use as well a
    product is now and then left waiting for longer than it takes, which would be taken for the type's fault."""
    is_gpu = device.type == "cuda"
    clock = time.perf_counter if is_gpu else time.process_time
    seconds: list[float] = []
    while len(seconds) < 3 or sum(seconds) < _FORM_SECONDS:
        started = clock()
        product()
        if is_gpu:
            torch.cuda.synchronize(device)
        seconds.append(clock() - started)
    return min(seconds)


def _best(abilities: Sequence[Ability]) -> tuple[DType, str]:
    """Choose what suits the weakest of all ranks' devices; returns the type and the reason."""
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
    return (
        name,
        f"this CPU multiplies bfloat16 at {_rate(half)} and float32 at {_rate(single)} {where}",
    )


def _slowness(asked: str, abilities: Sequence[Ability]) -> str | None:
    """Describe by how much a type is slower than the best one, on the rank where that is worst."""
    found: list[tuple[float, str]] = []
    for one in abilities:
        others = {name: rate for name, rate in one.flops.items() if name != asked}
        if asked not in one.flops or not others:
            continue
        best = max(others, key=lambda name: others[name])
        factor = others[best] / one.flops[asked]
        if factor >= _WORTH_SAYING or one.is_gpu:
            whose = f"{one.device} only emulates it" if one.is_gpu else "This CPU is slow at it"
            text = f"{whose}: products take {factor:.1f} times as long as in {best}"
            found.append(
                (factor, f"{text} ({_rate(one.flops[asked])} against {_rate(others[best])})")
            )
    return max(found)[1] if found else None


def _rate(flops: float) -> str:
    return f"{flops / 1e9:,.1f} GFLOP/s" if flops < 1e12 else f"{flops / 1e12:,.1f} TFLOP/s"
