"""One GPU: how quick, how much memory, how exact, for models of 7B to 65B whose weights are random.

    python benchmarks/gpu.py                             # under ten minutes on an H100; nothing is downloaded
    python benchmarks/gpu.py --parts 7B peers            # only these
    python benchmarks/gpu.py --device cpu --small        # tiny shapes: tries every path, its figures mean nothing

Each part is a list of cases, run by a process of its own. One that fails, does not fit, takes longer than its limit or
asks for what is not there is recorded as "not measured" with the reason, and the rest goes on, in a new process if need
be. Results are written after every case, to benchmarks/results/gpu.json. The share of the bound: bound.py.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import queue
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
START_SECONDS = 60
"""What a process may take to import everything, on top of its first case's limit."""
MARK = "case done: "


@dataclass(frozen=True)
class Case:
    """One call of a function in `benchmarks/gpu_parts`."""

    name: str
    function: str
    """`module.function`."""
    arguments: dict[str, Any] = field(default_factory=dict)
    limit_seconds: int = 60
    needs: str | None = None
    """A package that may not be installed."""


PARTS = (
    "limits",
    "7B",
    "peers",
    "65B",
    "exactness",
    "optimizers",
    "gather",
    "13B",
    "7B compiled",
    "exactness compiled",
)
"""In the order in which they run, what matters most first."""


def all_parts(is_small: bool) -> dict[str, list[Case]]:
    """The cases of each part."""
    cases = {"limits": [Case("rates", "steps.limits")], **speed(is_small), **checks(is_small)}
    return {part: cases[part] for part in PARTS}


def speed(is_small: bool) -> dict[str, list[Case]]:
    """Steps of this program and of others. Small, all shapes are the same tiny one."""
    from benchmarks.memory import SHAPES

    length, short, rank = (64, 32, 4) if is_small else (2048, 512, 64)

    def step(
        name: str, rows: int, recompute: str | int, limit: int = 60, shape: str = "7B", seq_len: int = length,
        memory: dict[str, Any] | None = None, **keywords: Any,
    ) -> Case:  # fmt: skip
        arguments = {"shape": TINY if is_small else vars(SHAPES[shape]), "rows": rows, "seq_len": seq_len,
                     "adapter": {"rank": rank}, "memory": {"recompute": recompute, **(memory or {})},
                     **keywords}  # fmt: skip
        return Case(name, "steps.ours", arguments, limit)

    def peer(name: str, rows: int, function: str, **keywords: Any) -> Case:
        arguments = {"shape": TINY if is_small else vars(SHAPES["7B"]), "rows": rows, "seq_len": length, "rank": rank,
                     **keywords}  # fmt: skip
        return Case(name, f"peers.{function}", arguments, needs="trl" if function == "trl" else None)

    compiled = {"compile": True}
    return {
        "7B": [
            step("8x2048, full", 8, "full"),
            step("8x2048, 16 layers", 8, 1 if is_small else 16),
            step("8x2048, selective", 8, "selective"),
            step("8x2048, auto", 8, "auto"),
            step("4x2048, none", 4, "none"),
            step("1x2048, none", 1, "none"),
            step("1x2048, full", 1, "full"),
            step("8x2048, full, 4 samples a row", 8, "full", samples_per_row=4),
            # Counted from shapes, for one row of as many tokens: 12 GiB with all layers, 70 with none.
            step("8x2048, 8 layers", 8, 1 if is_small else 8),
            step("8x2048, none", 8, "none"),
        ],
        "peers": [
            peer("HF + peft, 8x2048, full", 8, "hf_loop", recompute="full"),
            peer("HF + peft, 1x2048, none", 1, "hf_loop", recompute="none"),
            peer("HF + peft, 1x2048, full", 1, "hf_loop", recompute="full"),
            peer("TRL, 8x2048, defaults", 8, "trl", defaults=True),
            peer("TRL, 1x2048, defaults", 1, "trl", defaults=True),
            peer("TRL, 1x2048, nothing recomputed", 1, "trl", defaults=False),
        ],
        "65B": [
            step("1x512, full, adamw_8bit", 1, "full", 200, "65B", short,
                 optim={"optimizer": "adamw_8bit"}, num_steps=3)
        ],
        "13B": [step("4x2048, full", 4, "full", shape="13B")],
        "7B compiled": [
            step("4x2048, none", 4, "none", 150, memory=compiled),
            step("8x2048, full", 8, "full", 150, memory=compiled),
            step("1x2048, none", 1, "none", 150, memory=compiled),
        ],
    }  # fmt: skip


def checks(is_small: bool) -> dict[str, list[Case]]:
    """What is right or wrong."""
    shape = TINY if is_small else EXACT
    layer = {"inner": 128, "outer": 96, "tokens": 32, "rank": 4}
    if not is_small:
        layer = {"inner": 4096, "outer": 11008, "tokens": 2048, "rank": 64}
    sizes = {"shape": shape, "seq_len": 16 if is_small else 512}

    def exact(way: str, limit: int = 60) -> Case:
        needs = "flash_attn" if "flash" in way else None
        return Case(way, "exactness.of_models", {**sizes, "way": way}, limit, needs)

    ways = ("fused layers", "loss in chunks", "recompute: full", "recompute: selective", "attention: sdpa",
            "attention: flash_attention_2", "all of it")  # fmt: skip
    return {
        "exactness": [*map(exact, ways), Case("one fused layer", "exactness.of_layer", layer)],
        "optimizers": [Case("paged beside unpaged", "optimizers.paged")],
        "gather": [
            Case("bytes by storage type", "gather.storages"),
            Case("a model under FSDP2", "gather.whole_model", sizes),
        ],
        "exactness compiled": [exact("compile", 150), exact("all of it, compiled", 150)],
    }


TINY = {"hidden": 64, "intermediate": 176, "layers": 3, "heads": 4, "kv_heads": 2, "vocab": 320}
EXACT = {"hidden": 1024, "intermediate": 2816, "layers": 4, "heads": 16, "kv_heads": 8, "vocab": 8192}

OWN_PROCESS = {"peers", "gather"}
"""Parts whose cases leave something behind in their process: TRL patches models, a process group can be made once."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, help="all, if not given")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny shapes")
    parser.add_argument("--minutes", type=float, default=9.0, help="cases that have not begun by then are left out")
    parser.add_argument("--out", type=Path, help="JSON file to write; results of other parts in it are kept")
    parser.add_argument("--worker", help=argparse.SUPPRESS)  # cases as JSON; one line each on stdout
    options = parser.parse_args()
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks
    if options.worker:
        work([Case(**case) for case in json.loads(options.worker)])
        return
    import torch

    from benchmarks.machine import describe_machine

    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("there is no CUDA device here. `--device cpu --small` tries every path on tiny shapes.")
    out = options.out or ROOT / "benchmarks" / "results" / ("gpu_small.json" if options.small else "gpu.json")
    result: dict[str, Any] = json.loads(out.read_text(encoding="utf-8")) if out.is_file() else {}
    result |= {"machine": describe_machine(), "is_small": options.small, "adapter_rank": 4 if options.small else 64}
    result.setdefault("parts", {})
    ends = time.monotonic() + 60 * options.minutes
    for part, cases in all_parts(options.small).items():
        if options.parts and part not in options.parts:
            continue
        result["parts"][part] = rows = {}
        groups = [[case] for case in cases] if part in OWN_PROCESS else [cases]
        for group in groups:
            for name, row in run(group, options.device, ends):
                rows[name] = row
                out.parent.mkdir(parents=True, exist_ok=True)
                out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
                print(f"{part} | {name} | {row['seconds']:.1f} s | {in_short(row)}", flush=True)
    print(table(result))
    print(f"written to {out}")


# --------------------------------------------------------------------------------------------------------------------
# Processes.


def run(cases: list[Case], device: str, ends: float) -> Iterator[tuple[str, dict[str, Any]]]:
    """Results of cases that may share a process; after one that takes it down, the next ones get a new one.

    Args:
        ends: when no case may begin any more, in `time.monotonic()`.
    """
    left = []
    for case in cases:
        if case.needs is None or importlib.util.find_spec(case.needs) is not None:
            left.append(case)
        else:
            yield case.name, {"not measured": f"{case.needs} is not installed", "seconds": 0.0}
    while left:
        if time.monotonic() > ends:
            for case in left:
                yield case.name, {"not measured": "the time was used up", "seconds": 0.0}
            return
        with Worker(left, device) as worker:
            while left:
                began = time.monotonic()
                row = worker.next_row(left[0].limit_seconds)
                yield left.pop(0).name, {**row, "seconds": round(time.monotonic() - began, 1)}
                if worker.is_over or is_device_lost(row) or time.monotonic() > ends:
                    break


class Worker:
    """A process that runs cases one after the other and prints a line for each; a context, ended on the way out."""

    def __init__(self, cases: list[Case], device: str) -> None:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        worker = json.dumps([asdict(case) for case in cases])
        command = [sys.executable, __file__, "--device", device, "--worker", worker]
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115 - closed on the way out
        self._process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=self._errors, text=True, env=environment, cwd=ROOT
        )
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._grace = START_SECONDS
        self.is_over = False
        """Whether it ended, or was ended, before its last case."""
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(MARK):
                self._lines.put(line.removeprefix(MARK))
        self._lines.put(None)

    def next_row(self, limit_seconds: float) -> dict[str, Any]:
        """What the next case returned, or why it returned nothing."""
        try:
            line = self._lines.get(timeout=limit_seconds + self._grace)
        except queue.Empty:
            self.is_over = True
            return {"not measured": f"it took longer than {limit_seconds:g} seconds"}
        self._grace = 0
        if line is not None:
            return dict(json.loads(line))
        self.is_over = True
        code = self._process.wait()
        self._errors.seek(0)
        said = self._errors.read().strip().splitlines()
        return {"not measured": f"the process ended with {code}: {said[-1] if said else 'without a word'}"}

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.kill()
        self._process.wait()
        self._errors.close()


def work(cases: list[Case]) -> None:
    """In a worker: run each case, say what it returned, and leave nothing of it behind."""
    import gc

    from qlora_dist.noise import quiet_third_parties

    quiet_third_parties()
    import torch

    for case in cases:
        row = attempt(case)
        print(MARK + json.dumps(row), flush=True)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if is_device_lost(row):
            os._exit(1)
    os._exit(0)  # process groups and compilers may take their time, or abort, on the ordinary way out


def attempt(case: Case) -> dict[str, Any]:
    """What the case returns, or why it does not."""
    import torch

    from qlora_dist.errors import QloraDistError

    try:
        module, _, function = case.function.partition(".")
        return dict(getattr(importlib.import_module(f"benchmarks.gpu_parts.{module}"), function)(**case.arguments))
    except ModuleNotFoundError as error:
        return {"not measured": f"{error.name} is not installed"}
    except torch.OutOfMemoryError as error:
        return {"not measured": f"out of memory: {str(error).splitlines()[0][:300]}"}
    except QloraDistError as error:
        return {"not measured": re.sub(r"\S+/run\.yaml:\d+: ", "", str(error))}
    except Exception as error:  # noqa: BLE001 - whatever it is, the other cases shall run
        import traceback

        where = traceback.extract_tb(error.__traceback__)[-1]
        text = f"{type(error).__name__}: {str(error)[:500]} ({Path(where.filename).name}:{where.lineno})"
        return {"not measured": text}


def is_device_lost(row: dict[str, Any]) -> bool:
    """Whether an error has left the GPU unusable for this process."""
    reason = str(row.get("not measured", ""))
    return any(words in reason for words in ("CUDA error", "CUDA driver error", "cuDNN error", "NCCL error"))


# --------------------------------------------------------------------------------------------------------------------
# The report.


def in_short(row: dict[str, Any]) -> str:
    """A result in a few words."""
    if "not measured" in row:
        return f"not measured: {row['not measured']}"
    if "tokens_per_second" not in row:
        return json.dumps({key: value for key, value in row.items() if key != "seconds"})
    share = f", {row['share_of_bound']:.1%} of the bound" if "share_of_bound" in row else ""
    peak = row["peak_allocated_gib"]
    memory = "" if peak is None else f", {peak:.2f} GiB"
    return f"{row['tokens_per_second']:,.0f} tokens/s, {row['seconds_per_step']:.4g} s a step{share}{memory}"


def table(result: dict[str, Any]) -> str:
    """The steps, and then what was found to be exact, as Markdown."""
    lines = [
        "| model | setting | tokens/s | s/step | MFU | of the bound | with recompute | peak, reserved GiB | loss |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    checks = ["| check | | result |", "|---|---|---|"]
    for part, rows in result["parts"].items():
        for name, row in rows.items():
            if "tokens_per_second" in row:
                shares = [f"{row[k]:.1%}" if k in row else "" for k in
                          ("mfu", "share_of_bound", "share_of_bound_with_recompute")]  # fmt: skip
                peaks = [row["peak_allocated_gib"], row["peak_reserved_gib"]]
                memory = "" if None in peaks else f"{max(peaks[0], row.get('build_peak_gib') or 0):.2f}, {peaks[1]:.2f}"
                lines.append(
                    f"| {part} | {name} | {row['tokens_per_second']:,.0f} | {row['seconds_per_step']:.4g} | "
                    f"{' | '.join(shares)} | {memory} | {row['first_loss']:.4f} → {row['last_loss']:.4f} |"
                )
            elif part[0].isdigit() or part == "peers":
                lines.append(f"| {part} | {name} | not measured: {row['not measured']} | | | | | | |")
            else:
                checks.append(f"| {part} | {name} | {verdict(row)} |")
    return "\n".join([*lines, "", *checks])


def verdict(row: dict[str, Any]) -> str:
    """What a check found."""
    if "not measured" in row:
        return f"not measured: {row['not measured']}"
    found = []
    for dtype in ("float32", "bfloat16"):
        if isinstance(row.get(dtype), dict) and "gradients" in row[dtype]:
            distances = [f"{row[dtype][what][which]:.2g}" for what in ("output", "gradients")
                         for which in ("plain", "quick")]  # fmt: skip
            word = "as exact" if row[dtype]["is_as_exact"] else "LESS EXACT"
            found.append(f"{dtype}: {word} (output {distances[0]} → {distances[1]}, gradients {distances[2]} → "
                         f"{distances[3]})")  # fmt: skip
    return "; ".join(found) or json.dumps({key: value for key, value in row.items() if key != "seconds"})


if __name__ == "__main__":
    main()
