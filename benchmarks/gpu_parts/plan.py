"""Plan of the benchmark of one GPU: its parts and cases in order, with planned seconds.

Correctness comes first, because figures of a wrong program mean nothing; figures follow by their
value. The seconds are estimates for an H100 and include the start of the part's processes. They add
up to less than nine minutes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

MOST_SECONDS = 540


@dataclass(frozen=True)
class Case:
    """Call of a function in `benchmarks/gpu_parts`."""

    name: str
    function: str
    """`module.function`."""
    arguments: dict[str, Any] = field(default_factory=dict)
    limit_seconds: int = 45
    """Seconds after which the case counts as hanging and its process is ended."""
    own_process: bool = False
    """Begin a new process, because earlier cases leave something behind: TRL patches models."""


@dataclass(frozen=True)
class Part:
    """Cases that share a process."""

    name: str
    seconds: int
    """Seconds reserved while earlier parts run; the part may take longer if they leave time."""
    cases: list[Case]


TINY = {"hidden": 64, "intermediate": 176, "layers": 3, "heads": 4, "kv_heads": 2, "vocab": 320}
EXACT = {
    "hidden": 1024,
    "intermediate": 2816,
    "layers": 4,
    "heads": 16,
    "kv_heads": 8,
    "vocab": 8192,
}
WIDE = {
    "hidden": 4096,
    "intermediate": 11008,
    "layers": 4,
    "heads": 32,
    "kv_heads": 8,
    "vocab": 32000,
}
"""Four layers of a 7B with grouped keys: its attention, quickly made."""

LENGTHS = (512, 704, 960, 1088, 1600, 1999, 2041, 2048)
"""Lengths of padded rows. The second to the fifth are 64 modulo 128, where cuDNN's backward is
known to fail."""
TESTS = "loading or isolation or optim or loader or offload"


def all_parts(is_small: bool) -> list[Part]:
    """The plan; with tiny shapes if `is_small`."""
    parts = [
        Part("device", 70, device_cases(is_small)),
        Part("exactness", 35, exactness_cases(is_small)),
        Part("sharded", 40, sharded_cases(is_small)),
        Part("7B", 100, steps_of_7b(is_small)),
        Part("7B compiled", 90, compiled_cases(is_small)),
        Part("peers", 75, peer_cases(is_small)),
        Part("65B", 40, saving_cases(is_small)),
        Part("rows", 45, row_cases(is_small)),
        Part(
            "tests",
            40,
            [Case("tests/gpu", "suite.run", {"selection": TESTS, "seconds": None}, 300)],
        ),
    ]
    return [_patient(part) for part in parts] if is_small else parts


def _patient(part: Part) -> Part:
    """Part with long limits, which only end hanging cases on a slow CPU."""
    return replace(part, cases=[replace(case, limit_seconds=600) for case in part.cases])


def total_seconds(parts: Sequence[Part]) -> int:
    return sum(part.seconds for part in parts)


def device_cases(is_small: bool) -> list[Case]:
    """Non-finite attention, rates, attention by kernel, and the norm."""
    lengths = {"lengths": [192, 128] if is_small else [704, 1088, 1024]}
    size = {"rows": 1, "heads": 4, "length": 64, "width": 16} if is_small else {}
    ways = ("causal, flash", "causal, cuDNN", "masked, efficient", "masked, cuDNN", "varlen")
    return [
        Case("NaN in masked attention", "attention.not_numbers", lengths),
        Case("rates", "steps.rates"),
        *(Case(f"attention: {way}", "attention.speed", {"way": way, **size}) for way in ways),
        Case("RMSNorm", "norms.compare", {"tokens": 64, "width": 128} if is_small else {}),
    ]


def exactness_cases(is_small: bool) -> list[Case]:
    """Every fast path beside the plain one."""
    layer = {"inner": 4096, "outer": 11008, "tokens": 2048, "rank": 64}
    if is_small:
        layer = {"inner": 128, "outer": 96, "tokens": 32, "rank": 4}
    sizes = {"shape": TINY if is_small else EXACT, "seq_len": 16 if is_small else 512}
    ways = (
        "fused layers",
        "norms and SwiGLU",
        "loss in chunks",
        "recompute: full",
        "recompute: selective",
        "attention: sdpa",
        "all of it",
    )
    return [
        *(Case(way, "exactness.of_models", {**sizes, "way": way}) for way in ways),
        Case("one fused layer", "exactness.of_layer", layer),
    ]


def sharded_cases(is_small: bool) -> list[Case]:
    """FSDP2 on one GPU."""
    arguments = {**_sizes("7B", is_small, 2048), "ranks": 8}
    return [
        Case("bytes of a foreach copy", "gather.foreach_copies"),
        Case("rank 0 of 8, 1x2048, full", "gather.pretended", arguments),
    ]


def steps_of_7b(is_small: bool) -> list[Case]:
    """Optimizer steps of this program."""
    return [
        _step("8x2048, auto", is_small, rows=8, recompute="auto"),
        _step("8x2048, full", is_small, rows=8, recompute="full"),
        _step("4x2048, none", is_small, rows=4, recompute="none"),
        _step("1x2048, none", is_small, rows=1, recompute="none"),
        _step("1x2048, full", is_small, rows=1, recompute="full"),
        _step(
            "8x2048, full, 4 samples a row", is_small, rows=8, recompute="full", samples_per_row=4
        ),
        _step(
            "8x2048, full, dropout 0.05",
            is_small,
            rows=8,
            recompute="full",
            adapter={"dropout": 0.05},
        ),
    ]


def compiled_cases(is_small: bool) -> list[Case]:
    """Optimizer steps with compiled layers."""
    memory = {"compile": True}
    return [
        _step("8x2048, full", is_small, rows=8, recompute="full", memory=memory, limit=120),
        _step("4x2048, none", is_small, rows=4, recompute="none", memory=memory, limit=120),
    ]


def peer_cases(is_small: bool) -> list[Case]:
    """The same model in other trainers.

    liger-kernel patches transformers, so the next case gets a new process.
    """

    def peer(name: str, function: str, rows: int, **keywords: Any) -> Case:
        own_process = function == "peers.trl"
        return Case(
            name,
            function,
            {**_sizes("7B", is_small, 2048), "rows": rows, **keywords},
            60,
            own_process,
        )

    return [
        peer("HF + peft, 8x2048, full", "peers.hf_loop", 8, recompute="full"),
        peer("HF + peft, 1x2048, full", "peers.hf_loop", 1, recompute="full"),
        peer(
            "HF + peft + liger, 8x2048, full", "peers.hf_loop", 8, recompute="full", with_liger=True
        ),
        peer("TRL, 8x2048, defaults", "peers.trl", 8, defaults=True),
    ]


def saving_cases(is_small: bool) -> list[Case]:
    """A large model on one GPU, and the memory and time of a save."""
    eight_bit: dict[str, Any] = {
        "optim": {"optimizer": "adamw_8bit"},
        "num_steps": 3,
        "saves": "gather",
    }
    whole = {**eight_bit, "saves": "write"}
    return [
        _step(
            "1x512, full, adamw_8bit, then gathered",
            is_small,
            shape="65B",
            rows=1,
            seq_len=512,
            recompute="full",
            limit=120,
            **eight_bit,
        ),
        _step(
            "7B, 1x512, full, adamw_8bit, then written",
            is_small,
            rows=1,
            seq_len=512,
            recompute="full",
            **whole,
        ),
    ]


def row_cases(is_small: bool) -> list[Case]:
    """Paged state, and work of many lengths without and with cuDNN's attention."""
    shape, llama = (TINY, TINY) if is_small else (WIDE, _sizes("7B", False, 0)["shape"])
    lengths = [16, 24, 40] if is_small else list(LENGTHS)
    cases = [Case("paged beside unpaged", "optimizers.paged")]
    for with_cudnn in (False, True):
        name = "with cuDNN" if with_cudnn else "without cuDNN"
        tokens = {"num_tokens": 4 if is_small else 16, "prompt": 8 if is_small else 100}
        cases += [
            Case(
                f"padded rows, {name}",
                "rows.padded",
                {"shape": shape, "rows": 4, "lengths": lengths, "with_cudnn": with_cudnn},
                60,
            ),
            Case(
                f"generation, {name}",
                "rows.generation",
                {"shape": llama, **tokens, "with_cudnn": with_cudnn},
                60,
            ),
        ]
    return cases


def _sizes(shape: str, is_small: bool, seq_len: int) -> dict[str, Any]:
    if is_small:
        return {"shape": TINY, "seq_len": 64, "rank": 4}
    from benchmarks.memory import SHAPES  # imports torch, which the small plan does not need

    return {"shape": vars(SHAPES[shape]), "seq_len": seq_len, "rank": 64}


def _step(
    name: str,
    is_small: bool,
    *,
    rows: int,
    recompute: str,
    shape: str = "7B",
    seq_len: int = 2048,
    limit: int = 45,
    **keywords: Any,
) -> Case:
    """Case of `steps.ours`; `memory` and `adapter` among the keywords extend their sections."""
    sizes = _sizes(shape, is_small, seq_len)
    rank = sizes.pop("rank")
    arguments = {
        **sizes,
        "rows": rows,
        "adapter": {"rank": rank, **keywords.pop("adapter", {})},
        "memory": {"recompute": recompute, **keywords.pop("memory", {})},
        **keywords,
    }
    return Case(name, "steps.ours", arguments, limit)
