"""Cost of a checkpoint: seconds to gather and to write it, and the delay of the step beside it.

    python benchmarks/checkpoint.py           # after `make demo`; about four minutes on two cores

Trains SmolLM2-135M with LoRA of rank 64 (a checkpoint of some 230 MB) in fresh processes in the
order A B C C B A: without checkpoints; with a checkpoint after every fourth step, written in the
background as the program does; and with a checkpoint that the loop waits for, as loops commonly do.
Writes results/checkpoint_DEVICE.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks.apart import run_apart  # noqa: E402
from benchmarks.machine import describe_machine  # noqa: E402

PREPARED = ROOT / "runs" / "prepared"
MODES = ("none", "background", "waiting")
STEPS, WARM_UP, EVERY, THREADS = 18, 2, 4, 2


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=None, help="JSON file to write")
    parser.add_argument("--worker", choices=MODES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        sys.stdout.write("\n" + json.dumps(measure(options.worker)) + "\n")
        return
    machine = describe_machine()
    runs: dict[str, list[dict[str, Any]]] = {mode: [] for mode in MODES}
    for mode in (*MODES, *reversed(MODES)):
        said = run_apart([__file__, "--worker", mode], THREADS)
        runs[mode].append(json.loads(said.splitlines()[-1]))
        print(mode, json.dumps(runs[mode][-1]), flush=True)
    losses = {tuple(run["losses"]) for both in runs.values() for run in both}
    if len(losses) != 1:
        sys.exit("the losses differ: saving must not change training")
    step = {mode: fastest_by_step(both) for mode, both in runs.items()}
    # A checkpoint falls between two steps and counts with the later one. Runs have the same rows in
    # the same step, so steps are compared one by one.
    later = [index for index in range(STEPS - WARM_UP) if (WARM_UP + index) % EVERY == 0]
    saving = [run for mode in MODES[1:] for run in runs[mode]]
    result = {
        "machine": machine,
        "adapter_rank": 64,
        "steps": STEPS,
        "warm_up_steps": WARM_UP,
        "checkpoint_every": EVERY,
        "checkpoint_mib": saving[0]["checkpoint_mib"],
        "gather_seconds": median_of(saving, "gather_seconds"),
        "write_seconds": {mode: median_of(runs[mode], "write_seconds") for mode in MODES[1:]},
        "seconds_per_step": {
            mode: round(statistics.median(steps), 3) for mode, steps in step.items()
        },
        "seconds_added_by_a_checkpoint": {
            mode: round(statistics.median(step[mode][i] - step["none"][i] for i in later), 3)
            for mode in MODES[1:]
        },
        "runs": runs,
    }
    out = (
        options.out
        or ROOT
        / "benchmarks"
        / "results"
        / f"checkpoint_{'cuda' if machine['num_gpus'] else 'cpu'}.json"
    )
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(
        json.dumps({key: result[key] for key in result if key not in ("machine", "runs")}, indent=2)
    )
    print(f"written to {out}")


def fastest_by_step(runs: list[dict[str, Any]]) -> list[float]:
    """Seconds of each step in the fastest run; other work on the machine only adds time."""
    return [min(seconds) for seconds in zip(*(run["step_seconds"] for run in runs), strict=True)]


def median_of(runs: list[dict[str, Any]], key: str) -> float:
    """Median over all values of all runs under a key."""
    return round(statistics.median(value for run in runs for value in run[key]), 3)


def config_in(folder: Path) -> dict[str, Any]:
    """Configuration of a run that writes into `folder`."""
    return {
        "output_dir": str(folder / "run"),
        "model": {"path": str(PREPARED / "SmolLM2-135M-Instruct")},
        "adapter": {"rank": 64, "alpha": 64},
        "data": {
            "train": str(PREPARED / "stdlib-docstrings" / "train.jsonl"),
            "max_seq_len": 256,
            "packing": False,
        },
        "optim": {"max_steps": STEPS, "micro_batch_size": 4, "grad_accum_steps": 2},
        "memory": {"recompute": "none"},
        "checkpoint": {"every": EVERY},
        "logging": {"tensorboard": False},
    }


def measure(mode: str) -> dict[str, Any]:
    """Train once in this process and return the times of its steps and checkpoints."""
    from qlora_dist.commands.startup import quiet_third_parties

    quiet_third_parties()
    from qlora_dist.config.load import load_config
    from qlora_dist.run.checkpoint import Checkpoints
    from qlora_dist.train import Training, train

    gather_seconds: list[float] = []
    write_seconds: list[float] = []
    save, write = Training.save, Checkpoints._write

    def timed_save(self: Training, is_trial: bool = False) -> None:
        self.parts.checkpoints.wait()  # the write before this save is not part of gathering
        started = time.perf_counter()
        save(self, is_trial)
        gather_seconds.append(time.perf_counter() - started)
        if mode == "waiting":
            self.parts.checkpoints.wait()

    def timed_write(*arguments: Any) -> None:
        started = time.perf_counter()
        write(*arguments)
        write_seconds.append(time.perf_counter() - started)

    if mode == "none":
        Training.save = lambda *_, **__: None  # type: ignore[method-assign]
    else:
        Training.save = timed_save  # type: ignore[method-assign]
        Checkpoints._write = timed_write  # type: ignore[method-assign, assignment]
    with tempfile.TemporaryDirectory(dir=ROOT / "runs") as name:
        file = Path(name) / "config.yaml"
        file.write_text(json.dumps(config_in(Path(name))))
        train(load_config(file))
        run = Path(name) / "run"
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        newest = sorted((run / "checkpoints").glob("step-*"))[-1:]
        size = sum(
            path.stat().st_size for folder in newest for path in folder.rglob("*") if path.is_file()
        )
    return {
        "step_seconds": [round(row["step_seconds"], 3) for row in rows[WARM_UP:]],
        "losses": [row["loss"] for row in rows],
        "gather_seconds": [round(seconds, 3) for seconds in gather_seconds],
        "write_seconds": [round(seconds, 2) for seconds in write_seconds],
        "checkpoint_mib": round(size / 2**20, 1),
    }


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
