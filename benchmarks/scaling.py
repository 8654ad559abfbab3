"""Tokens per second over process counts, where the rest goes, and bytes on the wire against the formula.

    python benchmarks/scaling.py                 # needs what `make demo` prepared; half an hour on two cores

Each process has one thread (on a GPU machine: one GPU). Weak scaling keeps the work of a process, strong scaling that
of a step. Beside each run of N processes, N processes that do not know of each other train the same at the same time:
what these lose is the machine's (shared memory bandwidth, shared cores), and only what is lost beyond that is
communication. In one extra step every collective is counted. Runs go through the list forwards, then backwards.
Writes benchmarks/results/scaling_DEVICE.json and .png.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import yaml
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks.conversations import MODEL, check_prepared, write_long_conversations  # noqa: E402
from benchmarks.machine import describe_machine  # noqa: E402

SEQ_LEN, ROWS = 512, 2
"""Each micro-batch is 2 x 512 tokens, every row full."""
STRONG_ROWS = 4
"""Rows of a step when the work of a step is kept."""
NUM_WARMUP, COUNTED_STEP = 2, 2
BACKENDS = ("ddp", "fsdp", "zero3")


@dataclass(frozen=True)
class Case:
    """One way to run."""

    mode: str
    """`weak` or `strong`."""
    backend: str
    """`single` for one process, and for several that do not know of each other."""
    processes: int

    @property
    def cut(self) -> tuple[int, int]:
        """Rows of a micro-batch, and micro-batches of a process in a step."""
        if self.mode == "weak":
            return ROWS, 1
        rows = STRONG_ROWS // self.processes
        return min(rows, ROWS), max(1, rows // ROWS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=7, help="optimizer steps of each run")
    parser.add_argument("--processes", type=int, nargs="+", default=None, help="1 2 4, or as many as there are GPUs")
    parser.add_argument("--modes", nargs="+", default=["weak", "strong"], choices=["weak", "strong"])
    parser.add_argument("--out", type=Path, default=None, help="JSON file to write")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)  # a config to train, counting one step
    options = parser.parse_args()
    if options.worker is not None:
        work(options.worker)
        return
    check_prepared()
    machine = describe_machine()
    counts = options.processes or ([n for n in (1, 2, 4, 8) if n <= machine["num_gpus"]] or [1, 2, 4])
    cases = [Case(mode, "single", n) for mode in options.modes for n in counts]
    cases += [Case(mode, b, n) for mode in options.modes for b in BACKENDS for n in counts if n > 1]
    runs: dict[Case, list[dict[str, Any]]] = {case: [] for case in cases}
    with tempfile.TemporaryDirectory() as name:
        write_long_conversations(Path(name) / "rows.jsonl")
        for case in [*cases, *reversed(cases)]:
            print(f"{case.mode}, {case.processes} x {case.backend} ...", flush=True)
            runs[case].append(run(case, Path(name), options.steps))
    result: dict[str, Any] = {
        "machine": machine,
        "settings": {"model": MODEL.name, "tokens_per_micro_batch": SEQ_LEN * ROWS, "rank": 16, "recompute": "none",
                     "steps": options.steps, "warmup_steps_dropped": NUM_WARMUP, "strong_rows": STRONG_ROWS},
        "runs": summarise(runs),
    }  # fmt: skip
    out = options.out or ROOT / "benchmarks" / "results" / f"scaling_{'cuda' if machine['num_gpus'] else 'cpu'}.json"
    out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    plot(result["runs"], out.with_suffix(".png"))
    print(table(result["runs"]))
    print(f"written to {out}")


# --------------------------------------------------------------------------------------------------------------------
# One run.


def run(case: Case, folder: Path, steps: int) -> dict[str, Any]:
    """Train once; tokens per second of all processes together, and what was counted."""
    with tempfile.TemporaryDirectory(dir=folder) as name:
        alone = case.backend == "single"
        places = [Path(name) / str(i) for i in range(case.processes if alone else 1)]
        started = [start(case, place, folder / "rows.jsonl", steps, 1 if alone else case.processes) for place in places]
        for process in started:
            output, _ = process.communicate()
            if process.returncode:
                sys.exit(f"{case} ended with {process.returncode}:\n{output[-4000:]}")
        logged = [rows_of(place / "run") for place in places]
        counted = json.loads((places[0] / "run" / "counted.json").read_text("utf-8"))
    rates = [sum(row["num_tokens"] for row in rows) / sum(row["step_seconds"] for row in rows) for rows in logged]
    return {
        "tokens_per_second": sum(rates),
        "peak_memory_gib": max(row["peak_memory_gib"] for rows in logged for row in rows),
        **counted,
    }


def rows_of(folder: Path) -> list[dict[str, float]]:
    """The logged steps that count: not the first ones, nor the one in which collectives were counted."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return rows[NUM_WARMUP:]


def start(case: Case, folder: Path, rows: Path, steps: int, processes: int) -> subprocess.Popen[str]:
    """Begin a run of this program, in one process or several."""
    folder.mkdir()
    micro_batch_size, grad_accum_steps = case.cut
    config = {
        "output_dir": str(folder / "run"),
        "model": {"path": str(MODEL)},
        "adapter": {"rank": 16, "alpha": 32},
        "data": {"train": str(rows), "max_seq_len": SEQ_LEN, "packing": False, "cache_dir": str(rows.parent / "cache")},
        "optim": {"lr": 1e-4, "max_steps": steps, "micro_batch_size": micro_batch_size,
                  "grad_accum_steps": grad_accum_steps},
        "parallel": {"backend": case.backend},
        "memory": {"recompute": "none"},
        "checkpoint": {"every": None},
        "logging": {"tensorboard": False},
    }  # fmt: skip
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, *launcher, __file__, "--worker", str(file)],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def work(file: Path) -> None:
    """Train as the file says; in one step count every collective of this process."""
    from qlora_dist import train as train_module
    from qlora_dist.config import load_config
    from qlora_dist.noise import quiet_third_parties

    quiet_third_parties()
    config = load_config(file)
    train_step, done = train_module.train_step, 0

    def step(model: Any, *arguments: Any) -> Any:
        nonlocal done
        done += 1
        if done != COUNTED_STEP:
            return train_step(model, *arguments)
        with CollectiveCounter() as counter:
            sums = train_step(model, *arguments)
        if int(os.environ.get("RANK", "0")) == 0:
            found = {"bytes_on_the_wire": dict(counter.sent), "expected_bytes": expected_bytes(model, config)}
            (Path(config.output_dir) / "counted.json").write_text(json.dumps(found), "utf-8")
        return sums

    with mock.patch.object(train_module, "train_step", step):
        train_module.train(config)
    sys.stdout.flush()
    os._exit(0)  # a gloo process may abort on the way out


class CollectiveCounter(TorchDispatchMode):
    """Bytes that a rank sends while the mode is on, by kind of collective, as ring algorithms do.

    Of N ranks: a gather or a reduce-scatter of a whole of S bytes sends S (N-1)/N, an all-reduce twice that.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sent: Counter[str] = Counter()
        self._world = int(os.environ.get("WORLD_SIZE", "1"))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            kind = str(func).removeprefix("c10d.").partition(".")[0]
            tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
            whole = max((tensor.numel() * tensor.element_size() for tensor in tensors), default=0)
            if kind.startswith("allgather_") and len(tensors) > 2:  # a list of parts and this rank's own
                whole = sum(tensor.numel() * tensor.element_size() for tensor in tensors[:-1])
            share = whole * (self._world - 1) / self._world
            self.sent[kind] += round(2 * share if "allreduce" in kind else share)
        return func(*args, **(kwargs or {}))


def expected_bytes(model: Any, config: Any) -> dict[str, int]:
    """What a rank should send in a step.

    Sharded: per micro-batch every decoder layer is gathered twice (forward, backward) and the rest of the model once;
    gradients of adapters are reduced to their shards once a step. Replicated: one all-reduce of them a step.
    `one_gather_of_quantized` is the part of the 4-bit matrices and their constants, 0.516 bytes per weight.
    """
    from qlora_dist.model.nf4 import QuantizedLinear
    from qlora_dist.model.shards import whole_bytes, whole_shape
    from qlora_dist.model.skeleton import decoder_layers

    world = int(os.environ.get("WORLD_SIZE", "1"))
    share = (world - 1) / world
    adapters = sum(4 * whole_shape(p).numel() for p in model.parameters() if p.requires_grad)
    if config.parallel.backend in ("single", "ddp"):
        return {"gather": 0, "reduce": round(2 * adapters * share)}
    layers = sum(whole_bytes(layer) for layer in decoder_layers(model))
    rest = whole_bytes(model) - layers
    matrices = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    quantized = sum(
        whole_shape(p).numel() * p.element_size() for module in matrices for p in module.parameters(recurse=False)
    )
    return {
        "gather": round(config.optim.grad_accum_steps * (2 * layers + rest) * share),
        "reduce": round(adapters * share),
        "one_gather_of_quantized": round(quantized * share),
        "weights": sum(module.in_features * module.out_features for module in matrices),
    }


# --------------------------------------------------------------------------------------------------------------------
# The report.


def summarise(runs: dict[Case, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """A row for each case: rate, efficiency against one process, and how much of what is missing is communication."""
    rate = {case: statistics.median(r["tokens_per_second"] for r in repeats) for case, repeats in runs.items()}
    rows = []
    for case, repeats in runs.items():
        one = rate[Case(case.mode, "single", 1)]
        control = rate[Case(case.mode, "single", case.processes)]
        rows.append({
            **asdict(case),
            "tokens_per_second": round(rate[case], 1),
            "of_each_run": [round(r["tokens_per_second"], 1) for r in repeats],
            "efficiency": round(rate[case] / (one * case.processes), 3),
            "efficiency_without_communication": round(control / (one * case.processes), 3),
            "communication_share": round(max(0.0, 1 - rate[case] / control), 3),
            "peak_memory_gib": round(max(r["peak_memory_gib"] for r in repeats), 3),
            "bytes_on_the_wire": repeats[0]["bytes_on_the_wire"],
            "expected_bytes": repeats[0]["expected_bytes"],
        })  # fmt: skip
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The result as Markdown."""
    lines = [
        "| scaling | backend | processes | tokens/s | efficiency | without communication | communication | peak GiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['mode']} | {row['backend']} | {row['processes']} | {row['tokens_per_second']:g} | "
        f"{row['efficiency']:.0%} | {row['efficiency_without_communication']:.0%} | "
        f"{row['communication_share']:.0%} | {row['peak_memory_gib']:.2f} |"
        for row in rows
    ]
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], file: Path) -> None:
    """Efficiency over process counts, a panel for each kind of scaling."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    modes = list(dict.fromkeys(row["mode"] for row in rows))
    figure, panels = pyplot.subplots(1, len(modes), figsize=(5 * len(modes), 3.6), sharey=True, squeeze=False)
    for panel, mode in zip(panels[0], modes, strict=True):
        for backend in dict.fromkeys(row["backend"] for row in rows):
            points = [(r["processes"], r["efficiency"]) for r in rows if (r["mode"], r["backend"]) == (mode, backend)]
            label = "no communication" if backend == "single" else backend
            panel.plot(*zip(*sorted({(1, 1.0), *points}), strict=True), marker="o", label=label,
                       linestyle="--" if backend == "single" else "-")  # fmt: skip
        panel.set(title=f"{mode} scaling", xlabel="processes", ylim=(0, 1.1))
        panel.set_xticks(sorted({row["processes"] for row in rows}))
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("tokens/s per process, of one alone")
    panels[0][-1].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(file, dpi=130)


if __name__ == "__main__":
    main()
