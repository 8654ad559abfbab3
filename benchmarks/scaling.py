"""Tokens per second over process counts, causes of the loss, and bytes sent against the formula.

    python benchmarks/scaling.py                 # after `make demo`; an hour on two cores

Each process has one thread (on a GPU machine: one GPU). Weak scaling keeps the work of a process,
strong scaling that of a step. Three measurements explain the loss:

- Beside each run of N processes, N independent processes train the same at the same time. Their
  loss is the machine's (shared memory bandwidth, shared cores); any further loss is communication.
- On the CPU every step measures the time that the main thread spends in collectives, waiting for
  other ranks included. The rank that waits least is close to the cost of the transfer itself; the
  others also wait for it.
- One extra step counts the bytes of every collective.

The machine's speed drifts. A single process therefore runs again between the backends, and a run's
efficiency is its rate against the nearest single runs before and after it; the result is the mean
over rounds with its standard error. The rates are also compared with the machine's limits, measured
between rounds. Rounds go through the list forwards and backwards in turn; a rate is the median over
steps. Runs with more processes than cores run in the first and last round only. Writes
benchmarks/results/scaling_DEVICE.json and .png.
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
from collections import Counter
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import yaml
from torch import distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks.apart import neighbors, standard_error  # noqa: E402
from benchmarks.bound import most_tokens_per_second  # noqa: E402
from benchmarks.conversations import MODEL, check_prepared, write_long_conversations  # noqa: E402
from benchmarks.limits import measure_apart  # noqa: E402
from benchmarks.machine import describe_machine  # noqa: E402

SEQ_LEN, ROWS = 512, 2
"""Each micro-batch is 2 x 512 tokens, every row full."""
ADAPTER_RANK = 16
STRONG_ROWS = 4
"""Rows of a step in strong scaling."""
NUM_WARMUP, COUNTED_STEP = 2, 2
BACKENDS = ("ddp", "fsdp", "zero3")


@dataclass(frozen=True)
class Case:
    """Mode, backend and number of processes of a run."""

    mode: str
    """`weak` or `strong`."""
    backend: str
    """`single` for one process and for independent processes."""
    processes: int

    @property
    def alone(self) -> bool:
        """True for a single process, the baseline of all comparisons."""
        return self.processes == 1

    @property
    def cut(self) -> tuple[int, int]:
        """Rows of a micro-batch, and micro-batches of a process in a step."""
        if self.mode == "weak":
            return ROWS, 1
        rows = STRONG_ROWS // self.processes
        return min(rows, ROWS), max(1, rows // ROWS)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=5, help="optimizer steps of each run")
    parser.add_argument("--rounds", type=int, default=4, help="how often each run is repeated")
    parser.add_argument(
        "--processes", type=int, nargs="+", default=None, help="1 2 4, or as many as there are GPUs"
    )
    parser.add_argument(
        "--modes", nargs="+", default=["weak", "strong"], choices=["weak", "strong"]
    )
    parser.add_argument("--out", type=Path, default=None, help="JSON file to write")
    # a config to train, with the collectives of one step counted
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker is not None:
        work(options.worker)
        return
    check_prepared()
    machine = describe_machine()
    counts = options.processes or (
        [n for n in (1, 2, 4, 8) if n <= machine["num_gpus"]] or [1, 2, 4]
    )
    cases = [case for mode in options.modes for case in cases_of(mode, counts)]
    rounds, limits = run_rounds(
        cases, options.rounds, options.steps, machine["num_gpus"] or machine["num_cores"]
    )
    result: dict[str, Any] = {
        "machine": machine,
        "settings": {
            "model": MODEL.name,
            "tokens_per_micro_batch": SEQ_LEN * ROWS,
            "rank": ADAPTER_RANK,
            "recompute": "none",
            "steps": options.steps,
            "rounds": options.rounds,
            "warmup_steps_dropped": NUM_WARMUP,
            "strong_rows": STRONG_ROWS,
        },
        "limits": limits,
        "runs": summarize(rounds, limits),
    }
    out = (
        options.out
        or ROOT
        / "benchmarks"
        / "results"
        / f"scaling_{'cuda' if machine['num_gpus'] else 'cpu'}.json"
    )
    out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    plot(result["runs"], out.with_suffix(".png"))
    print(table(result["runs"]))
    print(f"written to {out}")


def run_rounds(
    cases: list[Case], num_rounds: int, steps: int, at_once: int
) -> tuple[list[list[tuple[Case, dict[str, Any]]]], list[dict[str, Any]]]:
    """Run all rounds, and measure the machine's limits before, between and after them.

    Args:
        at_once: processes that the machine has cores or GPUs for.

    Returns:
        the cases and findings of each round, and the limits.
    """
    rounds: list[list[tuple[Case, dict[str, Any]]]] = []
    limits = [measure_apart(threads=1)]
    with tempfile.TemporaryDirectory() as name:
        write_long_conversations(Path(name) / "rows.jsonl")
        for number in range(num_rounds):
            rounds.append([])
            for case in cases[:: -1 if number % 2 else 1]:
                if case.processes > at_once and 0 < number < num_rounds - 1:
                    continue
                print(
                    f"round {number + 1}: {case.mode}, {case.processes} x {case.backend} ...",
                    flush=True,
                )
                rounds[-1].append((case, run(case, Path(name), steps)))
            limits.append(measure_apart(threads=1))
    return rounds, limits


# --------------------------------------------------------------------------------------------------
# One run.


def cases_of(mode: str, counts: list[int]) -> list[Case]:
    """Runs of one round, with a single process first, last, and between backends."""
    one = Case(mode, "single", 1)
    cases = [one]
    for backend in ("single", *BACKENDS):
        cases += [*(Case(mode, backend, n) for n in counts if n > 1), one]
    return cases


def run(case: Case, folder: Path, steps: int) -> dict[str, Any]:
    """Train once; tokens per second of all processes together, peaks, waiting and counted bytes."""
    with tempfile.TemporaryDirectory(dir=folder) as name:
        apart = case.backend == "single"
        places = [Path(name) / str(i) for i in range(case.processes if apart else 1)]
        started = [
            start(
                case,
                place,
                folder / "rows.jsonl",
                steps,
                {"CUDA_VISIBLE_DEVICES": str(number)} if apart else {},
            )
            for number, place in enumerate(places)
        ]
        for process in started:
            output, _ = process.communicate()
            if process.returncode:
                sys.exit(f"{case} ended with {process.returncode}:\n{output[-4000:]}")
        logged = [rows_of(place / "run") for place in places]
        counted = json.loads((places[0] / "run" / "counted.json").read_text("utf-8"))
        waited = [
            json.loads(file.read_text("utf-8"))
            for file in sorted((places[0] / "run").glob("waited.*.json"))
        ]
    return {
        "tokens_per_second": sum(
            statistics.median(row["tokens_per_second"] for row in rows) for rows in logged
        ),
        "peak_memory_gib": max(row["peak_memory_gib"] for rows in logged for row in rows),
        "target_share": sum(row["num_target_tokens"] for row in logged[0])
        / sum(r["num_tokens"] for r in logged[0]),
        "waiting_share_of_each_rank": waited,
        **counted,
    }


def rows_of(folder: Path) -> list[dict[str, float]]:
    """Logged steps that count: the first steps, the counted step among them, are left out."""
    rows = [
        json.loads(line)
        for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    return rows[NUM_WARMUP:]


def start(
    case: Case, folder: Path, rows: Path, steps: int, where: dict[str, str]
) -> subprocess.Popen[str]:
    """Start a run of this program in one process or several.

    Args:
        where: environment that assigns a GPU to an independent process.
    """
    folder.mkdir()
    micro_batch_size, grad_accum_steps = case.cut
    config = {
        "output_dir": str(folder / "run"),
        "model": {"path": str(MODEL)},
        "adapter": {"rank": ADAPTER_RANK, "alpha": 32},
        "data": {
            "train": str(rows),
            "max_seq_len": SEQ_LEN,
            "packing": False,
            "cache_dir": str(rows.parent / "cache"),
        },
        "optim": {
            "lr": 1e-4,
            "max_steps": steps,
            "micro_batch_size": micro_batch_size,
            "grad_accum_steps": grad_accum_steps,
        },
        "parallel": {"backend": case.backend},
        "memory": {"recompute": "none"},
        "checkpoint": {"every": None},
        "logging": {"tensorboard": False},
    }
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    processes = 1 if case.backend == "single" else case.processes
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        if processes > 1
        else []
    )
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT),
        **where,
    }
    return subprocess.Popen(
        [sys.executable, *launcher, __file__, "--worker", str(file)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def work(file: Path) -> None:
    """Train as the file says; count every collective in one step and time them in later steps."""
    from qlora_dist import train as train_module
    from qlora_dist.commands.startup import quiet_third_parties
    from qlora_dist.config.load import load_config

    quiet_third_parties()
    config, rank = load_config(file), os.environ.get("RANK", "0")
    folder, train_step, clock = Path(config.output_dir), train_module.train_step, WaitingClock()
    ends: list[tuple[float, float]] = []

    def step(model: Any, *arguments: Any) -> Any:
        with CollectiveCounter() if len(ends) == COUNTED_STEP - 1 else nullcontext() as counter:
            sums = train_step(model, *arguments)
        ends.append((time.perf_counter(), clock.seconds))
        if counter is not None and rank == "0":
            found = {
                "bytes_on_the_wire": dict(counter.sent),
                "expected_bytes": expected_bytes(model, config),
            }
            (folder / "counted.json").write_text(json.dumps(found), "utf-8")
        return sums

    with mock.patch.object(train_module, "train_step", step), clock:
        train_module.train(config)
    if not torch.cuda.is_available():  # on a GPU collectives queue up and the host does not wait
        (started, waited_before), (ended, waited) = ends[NUM_WARMUP - 1], ends[-1]
        share = (waited - waited_before) / (ended - started)
        (folder / f"waited.{rank}.json").write_text(json.dumps(round(share, 4)), "utf-8")
    sys.stdout.flush()
    os._exit(0)  # a gloo process may abort on the way out


class WaitingClock:
    """Seconds that this process has spent in waits for collectives, its peers' delays included."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __enter__(self) -> WaitingClock:
        wait = dist.Work.wait

        def timed(*arguments: Any) -> Any:
            started = time.perf_counter()
            try:
                return wait(*arguments)
            finally:
                self.seconds += time.perf_counter() - started

        self._patch = mock.patch.object(dist.Work, "wait", timed)
        self._patch.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._patch.stop()


class CollectiveCounter(TorchDispatchMode):
    """Bytes that a rank sends while the mode is on, by kind of collective.

    As ring algorithms send them: of N ranks and S bytes, a gather or a reduce-scatter sends
    S (N-1)/N, an all-reduce twice that.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sent: Counter[str] = Counter()
        self._world = int(os.environ.get("WORLD_SIZE", "1"))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            kind = str(func).removeprefix("c10d.").partition(".")[0]
            tensors = [
                leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)
            ]
            whole = max((tensor.numel() * tensor.element_size() for tensor in tensors), default=0)
            if kind.startswith("allgather_") and len(tensors) > 2:  # N parts and this rank's own
                whole = sum(tensor.numel() * tensor.element_size() for tensor in tensors[:-1])
            share = whole * (self._world - 1) / self._world
            self.sent[kind] += round(2 * share if "allreduce" in kind else share)
        return func(*args, **(kwargs or {}))


def expected_bytes(model: Any, config: Any) -> dict[str, int]:
    """Bytes that a rank should send in a step, by the formula.

    Replicated backends all-reduce the adapters' gradients once. Sharded backends reduce the
    gradients to their shards, and gather parameters per micro-batch. `fsdp` gathers every decoder
    layer twice (forward, backward), and an untied embedding and output head once; other parameters
    stay gathered after the first step. `zero3` gathers each module's own parameters for forward and
    again for backward, except the input embedding, which has no backward gather. It gathers an
    embedding that is tied to the output head three times.

    `one_gather_of_quantized` is the share of the 4-bit matrices and their constants, 0.516 bytes
    per weight.
    """
    from qlora_dist.model.nf4 import QuantizedLinear
    from qlora_dist.model.parts import ModelParts
    from qlora_dist.runtime.shards import whole_bytes, whole_shape

    world = int(os.environ.get("WORLD_SIZE", "1"))
    share = (world - 1) / world
    parts = ModelParts(model)
    adapters = sum(4 * whole_shape(p).numel() for p in parts.adapters.values())
    if config.parallel.backend in ("single", "ddp"):
        return {"gather": 0, "reduce": round(2 * adapters * share)}
    gathered = sum(map(whole_bytes, [*parts.layers, *parts.gathered_units]))
    if config.parallel.backend == "zero3":
        base = parts.base
        embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
        gathered = 2 * whole_bytes(model) + whole_bytes(embedding) * (
            1 if embedding.weight is head.weight else -1
        )
    matrices = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    quantized = sum(
        whole_shape(p).numel() * p.element_size()
        for module in matrices
        for p in module.parameters(recurse=False)
    )
    return {
        "gather": round(config.optim.grad_accum_steps * gathered * share),
        "reduce": round(adapters * share),
        "one_gather_of_quantized": round(quantized * share),
        "weights": sum(module.in_features * module.out_features for module in matrices),
    }


# --------------------------------------------------------------------------------------------------
# The report.


def summarize(
    rounds: list[list[tuple[Case, dict[str, Any]]]], limits: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Rate, efficiency against a single process, and share lost to communication, by case."""
    runs: dict[Case, list[dict[str, Any]]] = {}
    efficiencies: dict[Case, list[float]] = {}
    for in_order in rounds:
        for place, (case, found) in enumerate(in_order):
            runs.setdefault(case, []).append(found)
            one = statistics.mean(neighboring_rates(in_order, place))
            efficiencies.setdefault(case, []).append(
                found["tokens_per_second"] / (one * case.processes)
            )
    rate = {
        case: statistics.median(r["tokens_per_second"] for r in repeats)
        for case, repeats in runs.items()
    }
    efficiency = {
        case: 1.0 if case.alone else statistics.mean(found) for case, found in efficiencies.items()
    }
    target_share = rounds[0][0][1]["target_share"]
    num_targets = round(ROWS * SEQ_LEN * target_share)
    most = most_tokens_per_second(MODEL, ADAPTER_RANK, ROWS, SEQ_LEN, num_targets, limits)
    rows = []
    for case, repeats in runs.items():
        control = efficiency[Case(case.mode, "single", case.processes)]
        rows.append(
            {
                **asdict(case),
                "tokens_per_second": round(rate[case], 1),
                "of_each_run": [round(r["tokens_per_second"], 1) for r in repeats],
                "efficiency": round(efficiency[case], 3),
                "efficiency_error": round(standard_error(efficiencies[case]), 3)
                if len(repeats) > 1
                else None,
                "efficiency_of_each_run": [round(found, 3) for found in efficiencies[case]],
                "efficiency_without_communication": round(control, 3),
                "communication_share": round(max(0.0, 1 - efficiency[case] / control), 3),
                "waiting_share_of_each_rank": [r["waiting_share_of_each_rank"] for r in repeats],
                "share_of_limit": round(rate[case] / (most * case.processes), 3),
                "peak_memory_gib": round(max(r["peak_memory_gib"] for r in repeats), 3),
                "bytes_on_the_wire": repeats[0]["bytes_on_the_wire"],
                "expected_bytes": repeats[0]["expected_bytes"],
                "bytes_of_formula": of_formula(
                    repeats[0]["bytes_on_the_wire"], repeats[0]["expected_bytes"]
                ),
            }
        )
    return rows


def neighboring_rates(in_order: list[tuple[Case, dict[str, Any]]], place: int) -> list[float]:
    """Rates of the nearest single-process runs of equal mode before and after a run."""
    mode = in_order[place][0].mode
    is_base = [case.alone and case.mode == mode for case, _ in in_order]
    return [in_order[i][1]["tokens_per_second"] for i in neighbors(is_base, place)]


def of_formula(sent: dict[str, int], expected: dict[str, int]) -> float | None:
    """Ratio of the counted bytes to those of the formula; None if nothing is sent."""
    total = expected["gather"] + expected["reduce"]
    return round(sum(sent.values()) / total, 3) if total else None


def waiting(row: dict[str, Any]) -> tuple[float, float] | None:
    """Share of time in collectives, least and mean over ranks; medians over runs."""
    repeats = [shares for shares in row["waiting_share_of_each_rank"] if shares]
    if not repeats:
        return None
    return statistics.median(map(min, repeats)), statistics.median(map(statistics.mean, repeats))


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown table of the result."""
    lines = [
        "| scaling | backend | processes | tokens/s | efficiency | without communication "
        "| communication | waiting, least, mean | bytes, of the formula | peak GiB "
        "| of the limit |",
        "|---" * 11 + "|",
    ]
    for row in rows:
        each, error = row["of_each_run"], row["efficiency_error"]
        rates = f"{row['tokens_per_second']:g} ({min(each):g} to {max(each):g})"
        efficiency = f"{row['efficiency']:.0%}"
        if error and row["processes"] > 1:
            efficiency += f" ± {100 * error:.1f}, {len(each)} runs"
        waited = waiting(row) if row["backend"] != "single" else None
        shares = "" if waited is None else "{:.1%}, {:.1%}".format(*waited)
        sent = "" if row["bytes_of_formula"] is None else f"{row['bytes_of_formula']:.3f}"
        lines.append(
            f"| {row['mode']} | {row['backend']} | {row['processes']} | {rates} | {efficiency} | "
            f"{row['efficiency_without_communication']:.0%} | "
            f"{row['communication_share']:.0%} | {shares} | {sent} | "
            f"{row['peak_memory_gib']:.2f} | {row['share_of_limit']:.0%} |"
        )
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], file: Path) -> None:
    """Plot efficiency over process counts and the loss of each run, a column per mode."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    modes = list(dict.fromkeys(row["mode"] for row in rows))
    figure, panels = pyplot.subplots(2, len(modes), figsize=(5.5 * len(modes), 7), squeeze=False)
    for (above, below), mode in zip(panels.T, modes, strict=True):
        mine = [row for row in rows if row["mode"] == mode]
        plot_efficiency(above, mine, mode)
        plot_losses(
            below, [row for row in mine if row["processes"] > 1 and row["backend"] != "single"]
        )
    panels[0][0].set_ylabel("tokens/s per process, of one alone")
    panels[0][0].legend(frameon=False, loc="lower left")
    figure.legend(
        *panels[1][0].get_legend_handles_labels(),
        frameon=False,
        loc="lower center",
        ncol=3,
        fontsize=9,
    )
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    figure.savefig(file, dpi=130)


def plot_efficiency(panel: Any, rows: list[dict[str, Any]], mode: str) -> None:
    """Plot a line per backend, dashed for independent processes."""
    for backend in dict.fromkeys(row["backend"] for row in rows):
        points = {
            (1, 1.0),
            *((row["processes"], row["efficiency"]) for row in rows if row["backend"] == backend),
        }
        alone = backend == "single"
        panel.plot(
            *zip(*sorted(points), strict=True),
            marker="o",
            label="no communication" if alone else backend,
            color="gray" if alone else None,
            linestyle="--" if alone else "-",
        )
    panel.set(title=f"{mode} scaling", xlabel="processes", ylim=(0, 1.1))
    panel.set_xticks(sorted({row["processes"] for row in rows}))
    panel.grid(alpha=0.3)


def plot_losses(panel: Any, rows: list[dict[str, Any]]) -> None:
    """Plot a bar per run: the efficiency, the loss to communication, and the machine's own loss."""
    names = [f"{row['processes']} x {row['backend']}" for row in rows]
    kept = [min(1.0, row["efficiency"]) for row in rows]
    machine = [
        max(0.0, 1 - max(row["efficiency"], row["efficiency_without_communication"]))
        for row in rows
    ]
    rest = [max(0.0, 1 - one - other) for one, other in zip(kept, machine, strict=True)]
    panel.barh(names, kept, color="tab:green", alpha=0.7, label="efficiency")
    panel.barh(names, rest, left=kept, color="tab:orange", label="lost to communication")
    panel.barh(
        names,
        machine,
        left=[a + b for a, b in zip(kept, rest, strict=True)],
        color="lightgray",
        label="lost without it, too",
    )
    for place, share in enumerate(kept):
        panel.text(share - 0.01, place, f"{share:.0%}", ha="right", va="center", fontsize=8)
    panel.set(xlim=(0, 1), xlabel="share of the rate of as many processes, each alone")
    panel.invert_yaxis()


if __name__ == "__main__":
    main()
