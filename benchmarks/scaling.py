"""Tokens per second over process counts, where the rest goes, and bytes on the wire against the formula.

    python benchmarks/scaling.py                 # needs what `make demo` prepared; an hour on two cores

Each process has one thread (on a GPU machine: one GPU). Weak scaling keeps the work of a process, strong scaling that
of a step. Three things say where the rest goes:

- Beside each run of N processes, N processes that do not know of each other train the same at the same time. What these
  lose is the machine's (shared memory bandwidth, shared cores); what is lost beyond that is communication.
- On the CPU the time that the main thread spends in collectives is measured in every step, waiting for other ranks
  included. The rank that waits least comes near to what the transfer itself takes; the others wait for that one, too.
- In one extra step every collective is counted.

The machine's speed drifts. So one process runs again between the backends, and the efficiency of a run is its rate
against those just before and behind it; reported are the mean over rounds and its standard error. The rates are also
held against the machine's limits, measured in between. Rounds go through the list forwards and backwards in turn; a
rate is the median over steps. More processes than there are cores run in the first round and in the last one only.
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
    def alone(self) -> bool:
        """Whether it is one process and nothing else, what others are compared with."""
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
    parser.add_argument(
        "--worker", type=Path, help=argparse.SUPPRESS
    )  # a config to train, counting one step
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
    """What each run of each round found, and the machine's limits before and after each round.

    Args:
        at_once: processes that the machine has cores or GPUs for.
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


# --------------------------------------------------------------------------------------------------------------------
# One run.


def cases_of(mode: str, counts: list[int]) -> list[Case]:
    """The runs of one round, with one process at the beginning, at the end, and between backends."""
    one = Case(mode, "single", 1)
    cases = [one]
    for backend in ("single", *BACKENDS):
        cases += [*(Case(mode, backend, n) for n in counts if n > 1), one]
    return cases


def run(case: Case, folder: Path, steps: int) -> dict[str, Any]:
    """Train once; tokens per second of all processes together, and what was counted."""
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
    """The logged steps that count: not the first ones, nor the one in which collectives were counted."""
    rows = [
        json.loads(line)
        for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    return rows[NUM_WARMUP:]


def start(
    case: Case, folder: Path, rows: Path, steps: int, where: dict[str, str]
) -> subprocess.Popen[str]:
    """Begin a run of this program, in one process or several.

    Args:
        where: the GPU that a process is to use which does not know of the others.
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
    """Train as the file says; in one step count every collective of this process, in later ones time them."""
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
    if (
        not torch.cuda.is_available()
    ):  # there, the host does not wait: collectives queue up on the device
        (started, waited_before), (ended, waited) = ends[NUM_WARMUP - 1], ends[-1]
        share = (waited - waited_before) / (ended - started)
        (folder / f"waited.{rank}.json").write_text(json.dumps(round(share, 4)), "utf-8")
    sys.stdout.flush()
    os._exit(0)  # a gloo process may abort on the way out


class WaitingClock:
    """Seconds that this process has waited for collectives since the clock was started: its own and its peers' part."""

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
            tensors = [
                leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)
            ]
            whole = max((tensor.numel() * tensor.element_size() for tensor in tensors), default=0)
            if (
                kind.startswith("allgather_") and len(tensors) > 2
            ):  # a list of parts and this rank's own
                whole = sum(tensor.numel() * tensor.element_size() for tensor in tensors[:-1])
            share = whole * (self._world - 1) / self._world
            self.sent[kind] += round(2 * share if "allreduce" in kind else share)
        return func(*args, **(kwargs or {}))


def expected_bytes(model: Any, config: Any) -> dict[str, int]:
    """What a rank should send in a step.

    Replicated: one all-reduce of the adapters' gradients. Sharded: they are reduced to their shards, and per
    micro-batch parameters are gathered. `fsdp` gathers every decoder layer twice (forward, backward), and once an
    embedding and an output head that are not tied; the rest it has left whole after the first step. `zero3` gathers
    what each module has of its own for its forward and again for its backward, which the input embedding alone does
    not have; an embedding that is tied to the output head is gathered three times.

    `one_gather_of_quantized` is the part of the 4-bit matrices and their constants, 0.516 bytes per weight.
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


# --------------------------------------------------------------------------------------------------------------------
# The report.


def summarize(
    rounds: list[list[tuple[Case, dict[str, Any]]]], limits: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """A row for each case: rate, efficiency against one process, and how much of what is missing is communication."""
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
    """Rates of one process, in the same mode, next before and next behind a run."""
    mode = in_order[place][0].mode
    is_base = [case.alone and case.mode == mode for case, _ in in_order]
    return [in_order[i][1]["tokens_per_second"] for i in neighbors(is_base, place)]


def of_formula(sent: dict[str, int], expected: dict[str, int]) -> float | None:
    """Bytes that were counted, over those of the formula."""
    total = expected["gather"] + expected["reduce"]
    return round(sum(sent.values()) / total, 3) if total else None


def waiting(row: dict[str, Any]) -> tuple[float, float] | None:
    """Share of the time in collectives of the rank that waited least, and on average over ranks; medians of runs."""
    repeats = [shares for shares in row["waiting_share_of_each_rank"] if shares]
    if not repeats:
        return None
    return statistics.median(map(min, repeats)), statistics.median(map(statistics.mean, repeats))


def table(rows: list[dict[str, Any]]) -> str:
    """The result as Markdown."""
    lines = [
        "| scaling | backend | processes | tokens/s | efficiency | without communication | communication | "
        "waiting, least, mean | bytes, of the formula | peak GiB | of the limit |",
        "|---" * 11 + "|",
    ]
    for row in rows:
        each, error = row["of_each_run"], row["efficiency_error"]
        rates = f"{row['tokens_per_second']:g} ({min(each):g} to {max(each):g})"
        efficiency = f"{row['efficiency']:.0%}"
        if error and row["processes"] > 1:
            efficiency += f" ± {100 * error:.1f}, {len(each)} runs"
        waited = waiting(row) if row["backend"] != "single" else None
        lines.append(
            f"| {row['mode']} | {row['backend']} | {row['processes']} | {rates} | {efficiency} | "
            f"{row['efficiency_without_communication']:.0%} | "
            f"{row['communication_share']:.0%} | {'' if waited is None else '{:.1%}, {:.1%}'.format(*waited)} | "
            f"{'' if row['bytes_of_formula'] is None else format(row['bytes_of_formula'], '.3f')} | "
            f"{row['peak_memory_gib']:.2f} | {row['share_of_limit']:.0%} |"
        )
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], file: Path) -> None:
    """For each kind of scaling, efficiency over process counts, and what each run's time went to."""
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
    """A line for each backend, dashed for processes that do not know of each other."""
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
    """A bar for each run: what is left of the rate of processes alone, what the machine takes, what communication."""
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
