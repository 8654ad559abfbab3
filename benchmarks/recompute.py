"""Cost and savings of recomputation, and the choices of `memory.recompute: auto` in three budgets.

    python benchmarks/recompute.py      # after `make demo`; three quarters of an hour on two cores

SmolLM2-135M with LoRA of rank 16 trains on 2 x 512 tokens a step, every run in a fresh process. The
fixed settings run first, forwards through the list and then backwards, `--rounds` times, and `none`
runs again after every second one. A setting's result is its rate over that of the nearest runs of
`none`, because the machine's speed drifts. The peaks of `none` and `full` bound the budgets; a
budget covers all memory of a rank.

`auto` then runs under each budget in pairs with the best fixed setting that fits; the two take
turns to go first. Runs of an identical setting differ by several per cent from process to process,
so many pairs are needed, and the result is the mean of their ratios with its standard error. The
best setting is picked beforehand from other runs: the maximum of noisy figures is biased upward.

Rates and peaks leave out the first steps, in which `auto` corrects itself; its peak in those steps
is reported separately. All losses must agree bit for bit. Writes
benchmarks/results/recompute_DEVICE.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import yaml

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks.apart import in_turns, over_base, run_apart, standard_error  # noqa: E402
from benchmarks.conversations import MODEL, check_prepared, write_long_conversations  # noqa: E402
from benchmarks.machine import describe_machine  # noqa: E402

NUM_WARMUP = 8
"""Steps that do not count. `auto` revises its choice after steps 1, 2 and 4, and after step 8 or
later only if it exceeds its budget.
"""
SEQ_LEN, ROWS, THREADS = 512, 2, 2
FIXED = ("none", 10, 20, "selective", "full")
BASE = "none"
BUDGETS = {"tight": 0.3, "middle": 0.6, "ample": 1.6}
"""Position of each budget between the peaks of `full` (0) and `none` (1)."""
GIB = 2**30


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=13, help="optimizer steps of each run")
    parser.add_argument(
        "--rounds", type=int, default=2, help="times through the fixed settings and back"
    )
    parser.add_argument(
        "--pairs", type=int, default=12, help="pairs of runs of `auto` and the best fixed setting"
    )
    parser.add_argument("--out", type=Path, default=None, help="JSON file to write")
    parser.add_argument("--worker", help=argparse.SUPPRESS)  # settings as JSON, run in this process
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.steps <= NUM_WARMUP:
        parser.error(f"--steps {options.steps}: the first {NUM_WARMUP} do not count. Take more.")
    for name, least in (("rounds", 1), ("pairs", 2)):
        if getattr(options, name) < least:
            parser.error(f"--{name} {getattr(options, name)}: there must be {least} at least.")
    check_prepared()
    if options.worker is not None:
        measured = measure(json.loads(options.worker), options.rows, options.steps)
        options.out.write_text(json.dumps(measured), encoding="utf-8")
        return
    machine = describe_machine()
    kind = "cuda" if machine["num_gpus"] else "cpu"
    out = options.out or ROOT / "benchmarks" / "results" / f"recompute_{kind}.json"
    with tempfile.TemporaryDirectory() as name:
        write_long_conversations(Path(name) / "rows.jsonl")
        fixed = compare_fixed(Path(name), options.steps, options.rounds)
        low, high = (fixed[setting]["peak_gib"] for setting in ("full", "none"))
        budgets = {kind: round(low + where * (high - low), 2) for kind, where in BUDGETS.items()}
        auto = compare_auto(fixed, budgets, Path(name), options.steps, options.pairs)
    result = {
        "machine": machine,
        "settings": {
            "model": MODEL.name,
            "rank": 16,
            "tokens_per_step": f"{ROWS} x {SEQ_LEN}",
            "threads": THREADS,
            "steps": options.steps,
            "warmup_steps_dropped": NUM_WARMUP,
            "rounds": options.rounds,
            "pairs": options.pairs,
        },
        "budgets_gib": budgets,
        "fixed": fixed,
        "auto": auto,
    }
    out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(table(result))
    print(f"written to {out}")
    in_pairs = [row["best_fixed_in_pairs"] for row in auto.values()]
    check_losses(
        [*fixed.values(), *auto.values(), *in_pairs], tolerance=1e-3 if machine["num_gpus"] else 0
    )


def compare_fixed(folder: Path, steps: int, rounds: int) -> dict[str, dict[str, Any]]:
    """Run all fixed settings forwards and backwards, `rounds` times.

    Returns:
        rate, peak and losses of each setting.
    """
    settings = {str(value): {"recompute": value} for value in FIXED}
    in_order: list[tuple[str, dict[str, Any]]] = []
    order = in_turns(list(settings), BASE)
    for name in [*order, *reversed(order)] * rounds:
        print(f"{name} ...", flush=True)
        in_order.append((name, run(settings[name], folder, steps)))
    relative = over_base(
        [(name, statistics.median(counted_rates(found))) for name, found in in_order], BASE
    )
    return {
        name: summarize([found for other, found in in_order if other == name])
        | {
            "times_none": round(statistics.mean(relative[name]), 3),
            "times_none_of_each_run": [round(each, 3) for each in relative[name]],
        }
        for name in settings
    }


def compare_auto(
    fixed: dict[str, dict[str, Any]],
    budgets: dict[str, float],
    folder: Path,
    steps: int,
    pairs: int,
) -> dict[str, dict[str, Any]]:
    """Run `auto` and the best fixed setting that fits in pairs, under each budget in turn."""
    best = {kind: best_that_fits(fixed, budget) for kind, budget in budgets.items()}
    found: dict[str, dict[str, list[dict[str, Any]]]] = {
        kind: {"auto": [], "best": []} for kind in budgets
    }
    for i in range(pairs):
        for kind, budget in budgets.items():
            print(
                f"{kind}, {budget:g} GiB: auto and {best[kind]}, pair {i + 1} of {pairs} ...",
                flush=True,
            )
            both: dict[str, dict[str, Any]] = {
                "auto": {"recompute": "auto", "budget_gib": budget},
                "best": {"recompute": next(value for value in FIXED if str(value) == best[kind])},
            }
            for name in sorted(both, reverse=bool(i % 2)):
                found[kind][name].append(run(both[name], folder, steps))
    result = {}
    for kind, runs in found.items():
        rates = {
            name: [statistics.median(counted_rates(one)) for one in each]
            for name, each in runs.items()
        }
        ratios = [auto / other for auto, other in zip(rates["auto"], rates["best"], strict=True)]
        result[kind] = summarize(runs["auto"]) | {
            "best_fixed": best[kind],
            "best_fixed_in_pairs": summarize(runs["best"]),
            "over_best": round(statistics.geometric_mean(ratios), 3),
            "over_best_standard_error": round(standard_error(ratios), 3),
            "over_best_of_each_pair": [round(ratio, 3) for ratio in ratios],
        }
    return result


def best_that_fits(fixed: dict[str, dict[str, Any]], budget: float) -> str:
    """Name of the fastest fixed setting whose peak is within the budget, in GiB."""
    fitting = [name for name, row in fixed.items() if row["peak_gib"] <= budget]
    return max(fitting, key=lambda name: float(fixed[name]["times_none"]))


def run(memory: dict[str, Any], folder: Path, steps: int) -> dict[str, Any]:
    """Measure one setting in a fresh process."""
    out = folder / "measured.json"
    command = [
        __file__,
        "--worker",
        json.dumps(memory),
        "--steps",
        str(steps),
        "--rows",
        str(folder / "rows.jsonl"),
        "--out",
        str(out),
    ]
    run_apart(command, THREADS, XDG_CACHE_HOME=str(folder / "cache"))
    return dict(json.loads(out.read_text(encoding="utf-8")))


def measure(memory: dict[str, Any], rows: Path, steps: int) -> dict[str, Any]:
    """Train in this process; seconds, peak and recomputation of each step, and the losses."""
    from qlora_dist import train as train_module
    from qlora_dist.commands.startup import quiet_third_parties
    from qlora_dist.config.load import load_config
    from qlora_dist.memory.recompute import recompute_of
    from qlora_dist.model.parts import ModelParts
    from qlora_dist.runtime.memory import MemoryMeter

    quiet_third_parties()
    train_step = train_module.train_step
    measured: list[dict[str, Any]] = []

    def timed(model: Any, *arguments: Any) -> Any:
        now, meter = recompute_of(ModelParts(model).layers), MemoryMeter(arguments[4].device)
        forget_peak(arguments[4].device)
        started = time.perf_counter()
        sums = train_step(model, *arguments)
        measured.append(
            {
                "seconds": time.perf_counter() - started,
                "peak_gib": meter.peak() / GIB,
                "num_selective": now.num_selective,
                "num_full": now.num_full,
            }
        )
        return sums

    with tempfile.TemporaryDirectory() as name:
        config = {
            "output_dir": f"{name}/run",
            "model": {"path": str(MODEL)},
            "data": {"train": str(rows), "max_seq_len": SEQ_LEN, "packing": False},
            "optim": {
                "lr": 1e-4,
                "schedule": "constant",
                "max_steps": steps,
                "micro_batch_size": ROWS,
            },
            "memory": memory,
            "checkpoint": {"every": None},
            "logging": {"tensorboard": False},
        }
        file = Path(name) / "config.yaml"
        file.write_text(yaml.safe_dump(config), encoding="utf-8")
        with mock.patch.object(train_module, "train_step", timed):
            train_module.train(load_config(file))
        logged = [
            json.loads(line)
            for line in (Path(name) / "run" / "metrics.jsonl").read_text("utf-8").splitlines()
        ]
    return {"steps": measured, "losses": [row["loss"] for row in logged]}


def forget_peak(device: torch.device) -> None:
    """Reset the peak. Memory is not returned to the operating system, which would cost time."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def summarize(repeats: list[dict[str, Any]]) -> dict[str, Any]:
    """Summary of the runs of one setting.

    Holds the median rate and the largest peak of the counted steps, the largest peak of the first
    steps, the numbers of recomputed layers at the end, and each distinct sequence of losses.
    """
    counted = [run["steps"][NUM_WARMUP:] for run in repeats]
    rates = [counted_rates(run) for run in repeats]
    last = [steps[-1] for steps in counted]
    return {
        "tokens_per_second": round(statistics.median(rate for each in rates for rate in each), 1),
        "tokens_per_second_of_each_run": [round(statistics.median(each), 1) for each in rates],
        "peak_gib": round(max(step["peak_gib"] for steps in counted for step in steps), 3),
        "first_peak_gib": round(
            max(s["peak_gib"] for run in repeats for s in run["steps"][:NUM_WARMUP]), 3
        ),
        "num_selective": sorted({step["num_selective"] for step in last}),
        "num_full": sorted({step["num_full"] for step in last}),
        "losses": [list(each) for each in dict.fromkeys(tuple(run["losses"]) for run in repeats)],
    }


def counted_rates(run: dict[str, Any]) -> list[float]:
    """Tokens per second of the counted steps."""
    return [ROWS * SEQ_LEN / step["seconds"] for step in run["steps"][NUM_WARMUP:]]


def check_losses(rows: list[dict[str, Any]], tolerance: float) -> None:
    """Check that losses do not depend on recomputation.

    Args:
        tolerance: relative; on a GPU the backward of attention adds in any order.

    Raises:
        SystemExit: two runs differ.
    """
    losses = [of_run for row in rows for of_run in row["losses"]]
    pairs = [pair for of_run in losses for pair in zip(of_run, losses[0], strict=True)]
    if any(abs(loss / first - 1) > tolerance for loss, first in pairs):
        sys.exit(f"the losses depend on what is recomputed: {losses}")


def recomputed(row: dict[str, Any]) -> str:
    """Numbers of layers recomputed in part and in full, as a range where runs differ."""
    return ", ".join(
        "-".join(map(str, sorted({each[0], each[-1]})))
        for each in (row["num_selective"], row["num_full"])
    )


def table(result: dict[str, Any]) -> str:
    """Markdown tables: the fixed settings, and `auto` beside the best setting in each budget."""
    lines = [
        "| setting | partly, fully | tokens/s | x none | each run | peak, GiB |",
        "|---" * 6 + "|",
    ]
    for name, row in result["fixed"].items():
        # the base ran between all others, too often to list
        each = [] if name == BASE else row["times_none_of_each_run"]
        lines.append(
            f"| {name} | {recomputed(row)} | {row['tokens_per_second']:g} | "
            f"{row['times_none']:.2f} | {', '.join(map('{:.2f}'.format, each))} | "
            f"{row['peak_gib']:.2f} |"
        )
    lines += [
        "",
        "| budget, GiB | partly, fully | tokens/s | best fixed setting | of that | each pair "
        "| peak, GiB | in the first steps |",
        "|---" * 8 + "|",
    ]
    for kind, row in result["auto"].items():
        best = row["best_fixed_in_pairs"]
        lines.append(
            f"| {kind}, {result['budgets_gib'][kind]:g} | {recomputed(row)} | "
            f"{row['tokens_per_second']:g} | {row['best_fixed']}: {best['tokens_per_second']:g} | "
            f"{row['over_best']:.1%} ± {row['over_best_standard_error']:.1%} | "
            f"{', '.join(map('{:.2f}'.format, row['over_best_of_each_pair']))} | "
            f"{row['peak_gib']:.2f} | {row['first_peak_gib']:.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
