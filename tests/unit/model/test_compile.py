"""Compiled layers keep their results, with a single code for each kind of call."""

import dataclasses
import statistics
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import _dynamo
from torch._dynamo.utils import counters

from qlora_dist.errors import LaunchError
from qlora_dist.model import compile as compile_module
from qlora_dist.model.adapters import adapter_parameters
from qlora_dist.model.compile import check_compiler
from qlora_dist.runtime.processes import Runtime, start_runtime
from tests.support.adapted import build_adapted
from tests.support.compiled import gradient, without_kernels


@pytest.fixture(scope="module")
def runtime() -> Runtime:
    return start_runtime(seed=0, dtype="float32")


def tracing_settings() -> dict:
    return {name: getattr(_dynamo.config, name) for name in compile_module._TRACING}


@pytest.mark.parametrize(
    ("dropout", "recompute"),
    [(0.0, "none"), (0.0, "full"), (0.3, "full")],
    ids=["plain", "recomputing", "dropout"],
)
def test_compiled_gradients_are_the_same(
    tiny_llama: Path, runtime: Runtime, dropout: float, recompute: str
) -> None:
    """Loss and gradients of float32 agree within 1e-5, also with dropout and recomputation."""
    settings = {"dropout": dropout, "recompute": recompute}
    plain = gradient(build_adapted(tiny_llama, runtime, **settings), runtime)
    before = tracing_settings()
    with without_kernels():
        compiled = gradient(
            build_adapted(tiny_llama, runtime, **settings, is_compiled=True), runtime
        )
    assert tracing_settings() == before, "what layers need of torch is set for nothing else"
    assert abs(compiled[0] / plain[0] - 1) <= 1e-6
    assert (compiled[1] - plain[1]).norm() <= 1e-5 * plain[1].norm()


def test_layers_share_their_code(tiny_llama: Path, runtime: Runtime) -> None:
    """Layers have one code for the first length of rows and one for all others, without breaks.

    Evaluation in between adds none.
    """
    torch.compiler.reset()
    with without_kernels():
        model = build_adapted(tiny_llama, runtime, is_compiled=True)
        counters.clear()
        for lengths in ((12, 20), (9, 31), (7, 5), (16, 18)):
            gradient(model, runtime, [lengths])
            model.eval()
            with torch.no_grad():
                model(input_ids=torch.ones(1, 5, dtype=torch.long), use_cache=False)
            model.train()
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]


def test_evaluation_is_not_compiled(tiny_llama: Path, runtime: Runtime) -> None:
    """In eval mode, or without gradients, layers run uncompiled."""
    with without_kernels():
        model = build_adapted(tiny_llama, runtime, is_compiled=True)
    torch.compiler.reset()
    counters.clear()
    ids = torch.ones(1, 5, dtype=torch.long)
    model.eval()(input_ids=ids, use_cache=False)
    with torch.no_grad():
        model.train()(input_ids=ids, use_cache=False)
    assert not counters["frames"]


def test_names_stay_what_they_are(tiny_llama: Path, runtime: Runtime) -> None:
    """Compiling changes no name of an adapter's parameters."""
    with without_kernels():
        compiled = build_adapted(tiny_llama, runtime, is_compiled=True)
    assert list(adapter_parameters(compiled)) == list(
        adapter_parameters(build_adapted(tiny_llama, runtime))
    )


def test_a_machine_that_cannot_compile_is_refused() -> None:
    """Without a compiler, the message says what is missing and how to run uncompiled."""
    with (
        mock.patch(
            "torch._inductor.cpp_builder.get_cpp_compiler",
            side_effect=RuntimeError("No working C++ compiler"),
        ),
        mock.patch.dict(compile_module._COMPILER, options={"fx_graph_cache": False}),
        pytest.raises(
            LaunchError,
            match=r"memory\.compile is true.*No working C\+\+ compiler.*memory\.compile: false",
        ),
    ):
        check_compiler(torch.device("cpu"))


@pytest.mark.slow  # the real compiler takes a minute
def test_real_code_is_as_exact(tiny_llama: Path, runtime: Runtime) -> None:
    """With kernels, float32 gradients agree within 1e-5, and bfloat16 gradients are nearer to them.

    Nearer than without kernels holds in the median: in a single short batch, chance decides.
    """
    torch.compiler.reset()
    in_bfloat16 = dataclasses.replace(runtime, compute_dtype=torch.bfloat16)
    exact, compiled = (
        build_adapted(tiny_llama, runtime, is_compiled=compiled) for compiled in (False, True)
    )
    plain, rounded = (
        build_adapted(tiny_llama, in_bfloat16, is_compiled=compiled) for compiled in (False, True)
    )
    ratios = []
    for lengths in ((12, 20), (9, 31), (7, 5), (16, 18), (30, 30), (25, 14), (60, 61)):
        _, expected = gradient(exact, runtime, [lengths])
        _, found = gradient(compiled, runtime, [lengths])
        assert 0 < (found - expected).norm() <= 1e-5 * expected.norm()
        one, other = (
            gradient(model, in_bfloat16, [lengths])[1] - expected for model in (rounded, plain)
        )
        ratios.append(float(one.norm() / other.norm()))
    assert statistics.median(ratios) <= 1, ratios
