"""The benchmark of one GPU on this machine's CPU: what it reports, what it leaves out and why, and its bound."""

from dataclasses import replace

import pytest
import torch

from benchmarks.gpu import Case, all_parts, attempt, table
from benchmarks.gpu_parts.bound import Rates, bound_seconds
from benchmarks.gpu_parts.models import build, make_batch, make_config
from benchmarks.memory import Shape
from qlora_dist.runtime import start_runtime

SHAPE = Shape(64, 176, 3, 4, 2, 320)


def test_one_case_that_runs_and_one_that_cannot() -> None:
    """A step is reported with its rate and its share of the bound; a setting that is not there, by its name."""
    cases = {case.name: case for case in all_parts(is_small=True)["7B"]}
    case = cases["1x2048, none"]
    row = attempt(replace(case, arguments={**case.arguments, "num_steps": 1}))
    assert row["tokens_per_second"] > 0
    assert 0 < row["share_of_bound"] < 1
    assert len(row["seconds_of_each_step"]) == 1
    refused = attempt(replace(case, arguments={**case.arguments, "memory": {"never": True}}))
    assert refused.keys() == {"not measured"}
    assert "unknown key memory.never" in refused["not measured"]
    report = table({"parts": {"7B": {"one": row, "other": refused}}})
    assert report.count("| 7B |") == 2


def test_a_package_that_is_missing_is_named() -> None:
    """The case is left out; nothing else is."""
    assert attempt(Case("x", "nowhere.function")) == {"not measured": "benchmarks.gpu_parts.nowhere is not installed"}


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> torch.nn.Module:
    """A small model with an adapter of rank 4."""
    config = make_config(tmp_path_factory.mktemp("small"), SHAPE, 2, 32, adapter={"rank": 4})
    return build(config, start_runtime(seed=0, dtype="bfloat16"))[0]


def test_the_bound_is_the_sum_of_its_parts(adapted: torch.nn.Module) -> None:
    """Each term, counted by hand for three layers of 64, 176 and 32 (keys), with the other rates out of sight."""
    batch = make_batch(SHAPE.vocab, 2, 32)
    weights = 3 * (64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 176)
    pairs, targets, tokens, huge = 2 * 32 * 33 // 2, 2 * 31, 64, 1e30
    flops = 4 * weights * tokens + 12 * 64 * 3 * pairs + 4 * 64 * 320 * targets
    assert bound_seconds(adapted, batch, Rates(1.0, huge, 1e-3 * huge)) == pytest.approx(
        flops + 6 * 4 * tokens * 3 * (128 + 2 * 96 + 128 + 3 * 240), rel=1e-6
    )  # here the adapter's arithmetic takes longer than its traffic
    assert bound_seconds(adapted, batch, Rates(huge, 1.0, huge)) == pytest.approx(2.516 * weights * 2)
    lora = 4 * (128 + 2 * 96 + 128 + 3 * 240)
    elementwise = 16 * 64 + 4 * (64 + 32) + 8 * 176
    assert bound_seconds(adapted, batch, Rates(huge, huge, 1.0)) == pytest.approx(3 * tokens * (lora + elementwise) * 2)


def test_recomputing_every_layer_adds_a_forward(adapted: torch.nn.Module) -> None:
    """Half of the arithmetic of linear layers, a third of attention's, and a pass of dequantisation."""
    batch = make_batch(SHAPE.vocab, 2, 32)
    weights = 3 * (64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 176)
    for rates, more in (
        (Rates(1.0, 1e30, 1e27), 2 * weights * 64 + 4 * 64 * 3 * 32 * 33),
        (Rates(1e30, 1.0, 1e30), 2.516 * weights),
    ):
        plain, twice = (bound_seconds(adapted, batch, rates, share) for share in (0.0, 1.0))
        assert twice - plain == pytest.approx(more, rel=1e-6)
