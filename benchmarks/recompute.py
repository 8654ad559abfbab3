"""What recomputation costs and frees, and what `memory.recompute: auto` makes of three budgets.

    python benchmarks/recompute.py               # needs what `make demo` prepared; half an hour on two cores
    python benchmarks/recompute.py --in-turns    # after it: the same policies step by step in one process, five minutes

SmolLM2-135M with LoRA of rank 16 on 2 x 512 tokens a step. A budget is what a rank may take for everything; one run of
`none` and one of `full` say what it can be. Then every fixed setting, and `auto` under each budget, run in fresh
processes, forwards through the list and then backwards, as often as `--rounds` says, and `none` again after every
second one: what is compared is the rate of each over that of the runs of `none` next to it, since the speed of a
machine drifts. Rates and peaks leave out the first steps, in which `auto` corrects itself; its peak in those is given
apart. All losses must be the same to the bit. Writes benchmarks/results/recompute_DEVICE.json.

Runs of one and the same setting differ by several per cent from process to process. So `--in-turns` takes, for each
budget, one process with `auto`, and once that has settled, gives its layers another policy at every step: the one that
`auto` chose and those of the fixed settings that fit, forwards through them and then backwards, again and again. That
compares what was chosen, and cannot show what choosing costs: `auto` is at work beside all of them, and a policy that
is also a fixed setting's is compared with itself. Writes benchmarks/results/recompute_in_turns_DEVICE.json.
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
from benchmarks.apart import in_turns, over_base, run_apart  # noqa: E402
from benchmarks.conversations import MODEL, check_prepared, write_long_conversations  # noqa: E402
from benchmarks.machine import describe_machine  # noqa: E402

NUM_WARMUP = 8
"""Steps that do not count. `auto` looks at steps 1, 2, 4 and 8; what it chooses changes after the first three of these,
or later if it takes too much."""
NUM_CYCLES = 4
"""Times forwards and backwards through the policies of `--in-turns`."""
SEQ_LEN, ROWS, THREADS, NUM_LAYERS = 512, 2, 2, 30
FIXED = ("none", 10, 20, "selective", "full")
BASE = "none"
BUDGETS = {"tight": 0.3, "middle": 0.6, "ample": 1.6}
"""Where each budget lies between the peaks of `full` (0) and `none` (1)."""
GIB = 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=13, help="optimizer steps of each run")
    parser.add_argument("--rounds", type=int, default=1, help="times through the list, forwards and backwards")
    parser.add_argument("--out", type=Path, default=None, help="JSON file to write")
    parser.add_argument("--in-turns", action="store_true", help="compare policies within one process")
    parser.add_argument("--worker", help=argparse.SUPPRESS)  # settings as JSON, run in this process
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.steps <= NUM_WARMUP:
        parser.error(f"--steps {options.steps}: the first {NUM_WARMUP} do not count. Take more.")
    if options.rounds < 1:
        parser.error(f"--rounds {options.rounds}: there must be one at least.")
    check_prepared()
    if options.worker is not None:
        measured = measure(json.loads(options.worker), options.rows, options.steps)
        options.out.write_text(json.dumps(measured), encoding="utf-8")
        return
    machine = describe_machine()
    kind = "cuda" if machine["num_gpus"] else "cpu"
    if options.in_turns:
        results = ROOT / "benchmarks" / "results"
        compare_in_turns(results / f"recompute_{kind}.json", options.out or results / f"recompute_in_turns_{kind}.json")
        return
    out = options.out or ROOT / "benchmarks" / "results" / f"recompute_{kind}.json"
    with tempfile.TemporaryDirectory() as name:
        write_long_conversations(Path(name) / "rows.jsonl")
        peaks = [summarise([run({"recompute": value}, Path(name), options.steps)]) for value in ("full", "none")]
        low, high = (row["peak_gib"] for row in peaks)
        budgets = {kind: round(low + where * (high - low), 2) for kind, where in BUDGETS.items()}
        settings: dict[str, dict[str, Any]] = {str(value): {"recompute": value} for value in FIXED}
        settings |= {f"auto, {kind}": {"recompute": "auto", "budget_gib": gib} for kind, gib in budgets.items()}
        measured = compare(settings, Path(name), options.steps, options.rounds)
    result = {
        "machine": machine,
        "settings": {"model": MODEL.name, "rank": 16, "tokens_per_step": f"{ROWS} x {SEQ_LEN}", "threads": THREADS,
                     "steps": options.steps, "warmup_steps_dropped": NUM_WARMUP, "rounds": options.rounds},
        "budgets_gib": budgets,
        "fixed": {str(value): measured[str(value)] for value in FIXED},
        "auto": {kind: measured[f"auto, {kind}"] for kind in budgets},
    }  # fmt: skip
    out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(table(result))
    print(f"written to {out}")
    check_losses(list(measured.values()), tolerance=1e-3 if machine["num_gpus"] else 0)


def compare(settings: dict[str, dict[str, Any]], folder: Path, steps: int, rounds: int) -> dict[str, dict[str, Any]]:
    """Run all, forwards and backwards, `rounds` times; rate, peak and losses of each."""
    in_order: list[tuple[str, dict[str, Any]]] = []
    order = in_turns(list(settings), BASE)
    for name in [*order, *reversed(order)] * rounds:
        print(f"{name} ...", flush=True)
        in_order.append((name, run(settings[name], folder, steps)))
    relative = over_base([(name, statistics.median(counted_rates(found))) for name, found in in_order], BASE)
    return {
        name: summarise([found for other, found in in_order if other == name])
        | {"times_none": round(statistics.mean(relative[name]), 3),
           "times_none_of_each_run": [round(each, 3) for each in relative[name]]}
        for name in settings
    }  # fmt: skip


def run(memory: dict[str, Any], folder: Path, steps: int) -> dict[str, Any]:
    """One setting in a fresh process."""
    out = folder / "measured.json"
    command = [__file__, "--worker", json.dumps(memory), "--steps", str(steps),
               "--rows", str(folder / "rows.jsonl"), "--out", str(out)]  # fmt: skip
    run_apart(command, THREADS, XDG_CACHE_HOME=str(folder / "cache"))
    return dict(json.loads(out.read_text(encoding="utf-8")))


def measure(memory: dict[str, Any], rows: Path, steps: int) -> dict[str, Any]:
    """Train in this process: seconds, peak and recomputation of each step, and the losses.

    Args:
        memory: settings of that section; with `in_turns`, a list of fixed settings, the steps after the first ones
            take these and what `auto` chose in turns.
    """
    from qlora_dist import train as train_module
    from qlora_dist.budget import MemoryMeter
    from qlora_dist.config_file import load_config
    from qlora_dist.model.activations import fixed_recompute
    from qlora_dist.model.recompute import recompute_of, set_recompute
    from qlora_dist.noise import quiet_third_parties

    quiet_third_parties()
    train_step = train_module.train_step
    measured: list[dict[str, Any]] = []
    turns = [fixed_recompute(value, NUM_LAYERS) for value in memory.pop("in_turns", [])]

    def timed(model: Any, *arguments: Any) -> Any:
        if turns and len(measured) >= NUM_WARMUP:
            if len(measured) == NUM_WARMUP:
                turns.insert(0, recompute_of(model))
            cycle = [*turns, *reversed(turns)]
            set_recompute(model, cycle[(len(measured) - NUM_WARMUP) % len(cycle)])
        now, meter = recompute_of(model), MemoryMeter(arguments[4].device)
        forget_peak(arguments[4].device)
        started = time.perf_counter()
        sums = train_step(model, *arguments)
        measured.append({"seconds": time.perf_counter() - started, "peak_gib": meter.peak() / GIB,
                         "num_selective": now.num_selective, "num_full": now.num_full})  # fmt: skip
        return sums

    with tempfile.TemporaryDirectory() as name:
        config = {
            "output_dir": f"{name}/run",
            "model": {"path": str(MODEL)},
            "data": {"train": str(rows), "max_seq_len": SEQ_LEN, "packing": False},
            "optim": {"lr": 1e-4, "schedule": "constant", "max_steps": steps, "micro_batch_size": ROWS},
            "memory": memory,
            "checkpoint": {"every": None},
            "logging": {"tensorboard": False},
        }  # fmt: skip
        file = Path(name) / "config.yaml"
        file.write_text(yaml.safe_dump(config), encoding="utf-8")
        with mock.patch.object(train_module, "train_step", timed):
            train_module.train(load_config(file))
        logged = [json.loads(line) for line in (Path(name) / "run" / "metrics.jsonl").read_text("utf-8").splitlines()]
    return {"steps": measured, "losses": [row["loss"] for row in logged]}


def compare_in_turns(kept: Path, out: Path) -> None:
    """Under each budget of a kept result, what `auto` chose and the fixed settings that fit, step by step in turns."""
    if not kept.is_file():
        sys.exit(f"{kept} is missing. Run `python benchmarks/recompute.py` first, without --in-turns.")
    before = json.loads(kept.read_text(encoding="utf-8"))
    budgets: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        write_long_conversations(Path(name) / "rows.jsonl")
        for kind, budget in before["budgets_gib"].items():
            fixed = [value for value in FIXED if before["fixed"][str(value)]["peak_gib"] <= budget]
            names = ["auto", *map(str, fixed)]
            cycle = [*names, *reversed(names)]
            print(f"{kind}: {', '.join(names)} ...", flush=True)
            memory = {"recompute": "auto", "budget_gib": budget, "in_turns": fixed}
            found = run(memory, Path(name), NUM_WARMUP + NUM_CYCLES * len(cycle))["steps"][NUM_WARMUP:]
            rates: dict[str, list[float]] = {name: [] for name in names}
            for i, step in enumerate(found):
                rates[cycle[i % len(cycle)]].append(round(ROWS * SEQ_LEN / step["seconds"], 1))
            best = max(statistics.median(rates[name]) for name in names[1:])
            budgets[kind] = {
                "budget_gib": budget,
                "auto_num_selective": found[0]["num_selective"],
                "auto_num_full": found[0]["num_full"],
                "tokens_per_second": {name: statistics.median(each) for name, each in rates.items()},
                "tokens_per_second_of_each_step": rates,
                "auto_over_best": round(statistics.median(rates["auto"]) / best, 3),
            }
    result = {"machine": describe_machine(), "settings": {**before["settings"], "steps": None, "rounds": None,
              "cycles": NUM_CYCLES}, "budgets": budgets}  # fmt: skip
    out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    for kind, row in budgets.items():
        share = f"{row['auto_over_best']:.1%} of the best"
        print(f"{kind}, {row['budget_gib']:g} GiB: {row['tokens_per_second']}, auto {share}")
    print(f"written to {out}")


def forget_peak(device: torch.device) -> None:
    """Look for the peak from here on. Nothing is given back to the operating system, which would cost time."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def summarise(repeats: list[dict[str, Any]]) -> dict[str, Any]:
    """Median rate and largest peak after the first steps, the largest peak in them, and what was recomputed."""
    counted = [run["steps"][NUM_WARMUP:] for run in repeats]
    rates = [counted_rates(run) for run in repeats]
    last = counted[0][-1]
    return {
        "tokens_per_second": round(statistics.median(rate for each in rates for rate in each), 1),
        "tokens_per_second_of_each_run": [round(statistics.median(each), 1) for each in rates],
        "peak_gib": round(max(step["peak_gib"] for steps in counted for step in steps), 3),
        "first_peak_gib": round(max(s["peak_gib"] for run in repeats for s in run["steps"][:NUM_WARMUP]), 3),
        "num_selective": last["num_selective"],
        "num_full": last["num_full"],
        "losses": repeats[0]["losses"],
    }


def counted_rates(run: dict[str, Any]) -> list[float]:
    """Tokens per second of the steps that count."""
    return [ROWS * SEQ_LEN / step["seconds"] for step in run["steps"][NUM_WARMUP:]]


def check_losses(rows: list[dict[str, Any]], tolerance: float) -> None:
    """End the program when what was recomputed can be seen in the losses.

    Args:
        tolerance: relative; on a GPU the backward of attention adds in any order.

    Raises:
        SystemExit: two runs differ.
    """
    pairs = [pair for row in rows for pair in zip(row["losses"], rows[0]["losses"], strict=True)]
    if any(abs(loss / first - 1) > tolerance for loss, first in pairs):
        sys.exit(f"the losses depend on what is recomputed: {[row['losses'] for row in rows]}")


def table(result: dict[str, Any]) -> str:
    """The result as Markdown: `auto` under each budget, beside the fixed settings that fit."""
    lines = [
        "| budget, GiB | setting | partly, fully | tokens/s | x none | each run | peak, GiB | in the first steps |",
        "|---" * 8 + "|",
    ]
    for kind, budget in result["budgets_gib"].items():
        fitting = {name: row for name, row in result["fixed"].items() if row["peak_gib"] <= budget}
        best = max((row["times_none"] for row in fitting.values()), default=None)
        for name, row in {**fitting, "auto": result["auto"][kind]}.items():
            share = f" ({row['times_none'] / best:.0%} of the best)" if name == "auto" and best else ""
            each = row["times_none_of_each_run"]
            if name == BASE:  # it ran between all others
                each = []
            lines.append(
                f"| {kind}, {budget:g} | {name} | {row['num_selective']}, {row['num_full']} | "
                f"{row['tokens_per_second']:g} | {row['times_none']:.2f}{share} | "
                f"{', '.join(map('{:.2f}'.format, each))} | {row['peak_gib']:.2f} | {row['first_peak_gib']:.2f} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
