"""The compute type suits the weakest device, is alike on all ranks, and is named in the log."""

import os
import time
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from qlora_dist.runtime import compute_type
from qlora_dist.runtime.compute_type import Ability, ability, choose
from qlora_dist.runtime.processes import start_runtime
from tests.support.processes import run_on_processes

AMX = Ability("CPU", False, False, {"bfloat16": 423e9, "float32": 116e9})
AVX2 = Ability("CPU", False, False, {"bfloat16": 1.2e9, "float32": 26e9})
H100, T4 = Ability("H100", True), Ability("Tesla T4", True, has_bfloat16=False)


@pytest.mark.parametrize(
    ("abilities", "expected", "why"),
    [
        ([H100, H100], "bfloat16", "H100 multiplies it"),
        ([T4, T4], "float16", "Tesla T4 only emulates bfloat16"),
        (
            [H100, T4, H100],
            "float16",
            "different GPUs (2 x H100, 1 x Tesla T4), and Tesla T4 only emulates bfloat16",
        ),
        ([AMX], "bfloat16", "bfloat16 at 423.0 GFLOP/s and float32 at 116.0 GFLOP/s a core"),
        ([AVX2], "float32", "bfloat16 at 1.2 GFLOP/s and float32 at 26.0 GFLOP/s a core"),
        (
            [AMX, AVX2],
            "float32",
            "bfloat16 at 1.2 GFLOP/s and float32 at 26.0 GFLOP/s a core on the slowest rank",
        ),
    ],
)
def test_the_weakest_device_decides(abilities: list[Ability], expected: str, why: str) -> None:
    """A GPU takes a 16-bit type that it multiplies, a CPU the quicker type; the log says why."""
    chosen = choose("auto", abilities)
    assert chosen.name == expected
    assert chosen.dtype == getattr(torch, expected)
    assert why in chosen.note


def test_at_equal_speed_half_the_memory_decides() -> None:
    """A CPU whose rates are within a tenth of each other takes bfloat16."""
    equal = Ability("CPU", False, False, {"bfloat16": 95e9, "float32": 100e9})
    assert choose("auto", [equal]).name == "bfloat16"


def test_a_type_that_is_slow_here_is_taken_and_said_to_be() -> None:
    """A slow type that was asked for, or that the run began with, is taken; the log has the factor
    on the worst rank and the remedy."""
    emulating = Ability("Tesla T4", True, False, {"bfloat16": 3e12, "float16": 24e12})
    told = choose("bfloat16", [emulating])
    assert told.name == "bfloat16"
    assert told.note == (
        "compute type: bfloat16. Tesla T4 only emulates it: products take 8.0 times as long as in "
        "float16 (3.0 TFLOP/s against 24.0 TFLOP/s). model.dtype: auto avoids that."
    )
    assert "21.7 times as long as in float32" in choose("bfloat16", [AMX, AVX2]).note
    kept = choose("bfloat16", [AVX2], is_kept=True)
    assert kept.name == "bfloat16"
    assert kept.note.startswith(
        "compute type: bfloat16 (this run began with it). This CPU is slow at it"
    )
    assert kept.note.endswith("It stays, because a run keeps its type.")
    half = Ability("CPU", False, False, {"bfloat16": 423e9, "float32": 116e9, "float16": 20e9})
    assert "21.1 times as long as in bfloat16" in choose("float16", [half]).note


def test_what_is_quick_is_taken_without_a_remark() -> None:
    """The log has no advice where there is nothing to gain."""
    assert choose("bfloat16", [AMX]).note == "compute type: bfloat16"
    assert choose("float32", [Ability("CPU", False)]).note == "compute type: float32"
    assert choose("bfloat16", [H100]).note == "compute type: bfloat16"


def test_the_three_products_of_a_step_are_timed() -> None:
    """x W^T, g W and g^T x are timed in their own layouts: on CPUs that emulate bfloat16 their
    speeds differ by a factor of ten."""
    seen: list[tuple[bool, bool]] = []
    matmul = torch.Tensor.__matmul__

    def spy(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        seen.append((left.is_contiguous(), right.is_contiguous()))
        return matmul(left, right)

    with mock.patch.object(torch.Tensor, "__matmul__", spy):
        flops = compute_type.product_flops(torch.device("cpu"), "float32")
    assert set(seen) == {(True, False), (True, True), (False, True)}
    assert flops > 0


def test_waiting_for_a_core_is_not_the_fault_of_a_type() -> None:
    """On a shared CPU the time of a product is the time it computes, without the time it waits."""
    ones = torch.ones(8, 8)

    def product() -> torch.Tensor:
        time.sleep(0.02)
        return ones @ ones

    assert compute_type._quickest(product, torch.device("cpu")) < 0.01


@pytest.mark.parametrize(
    ("capability", "expected"), [((9, 0), True), ((8, 0), True), ((7, 5), False), ((7, 0), False)]
)
def test_gpus_of_compute_capability_8_multiply_bfloat16(
    capability: tuple[int, int], expected: bool
) -> None:
    """GPUs of capability 8.0 multiply bfloat16; older ones are timed, for the note. No real device
    is used."""
    properties = SimpleNamespace(name="GPU", major=capability[0], minor=capability[1])
    with (
        mock.patch.object(torch.cuda, "get_device_properties", return_value=properties),
        mock.patch.object(
            compute_type, "product_flops", side_effect=lambda _, name: len(name) * 1e12
        ),
    ):
        found = ability(torch.device("cuda", 0), "bfloat16")
    assert found.has_bfloat16 == expected
    assert found.flops == ({} if expected else {"bfloat16": 8e12, "float16": 7e12})


def of_unlike_ranks(expected: str) -> None:
    """Start a rank: rank 1 emulates bfloat16, and only rank 0 knows `model.dtype`."""
    rank = int(os.environ["RANK"])
    rates = (AMX, AVX2)[rank].flops
    with mock.patch.object(
        compute_type, "product_flops", side_effect=lambda device, name: rates[name]
    ):
        runtime = start_runtime(
            seed=0, dtype="auto" if expected == "float32" else ("bfloat16", "auto")[rank]
        )
    assert runtime.dtype_name == expected
    assert "1.2 GFLOP/s" in runtime.compute_note


@pytest.mark.parametrize("expected", ["float32", "bfloat16"])
def test_all_ranks_take_the_same_type(expected: str) -> None:
    """Two processes agree on the type when one is slow, or does not see the run's folder."""
    run_on_processes(of_unlike_ranks, 2, expected)
