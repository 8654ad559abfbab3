"""A run killed at random again and again ends with the adapter of a run left undisturbed.

    python benchmarks/soak.py                    # after `make demo`; some 12 minutes on two cores

Trains a tiny random Llama on two processes under `fsdp`, with dropout, evaluation and many
checkpoints. SIGKILL hits one rank, the launcher, or all of them at once, at random moments from the
first import on. The command is started again after each kill, and may finish after `--kills` kills.
Writes results/soak.json: every kill with the run's activity at that time, the step that each start
went on from, and whether the adapter's bytes equal those of the undisturbed run.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
WORK = ROOT / "runs" / "soak"
MAX_STEPS = 1000
LONGEST_LIFE_SECONDS = 13.0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "soak.json")
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    from benchmarks.machine import describe_machine

    shutil.rmtree(WORK, ignore_errors=True)
    make_model(WORK / "model")
    started = time.perf_counter()
    undisturbed = start(write_config("undisturbed"), "undisturbed")
    if undisturbed.wait() != 0:
        sys.exit(f"the undisturbed run failed, see {WORK / 'undisturbed.log'}")
    print(f"undisturbed run: {time.perf_counter() - started:.0f} s", flush=True)
    lives = kill_again_and_again(options.kills, random.Random(options.seed))
    expected, found = (
        digest(WORK / name / "adapter" / "adapter_model.safetensors")
        for name in ("undisturbed", "killed")
    )
    rows_agree = lasting_rows("undisturbed") == lasting_rows("killed")
    result = {
        "machine": describe_machine(),
        "steps": MAX_STEPS,
        "kills": sum("killed" in life for life in lives),
        "seconds": round(time.perf_counter() - started),
        "adapter_sha256": {"undisturbed": expected, "killed": found},
        "same_adapter": expected == found,
        "same_metrics": rows_agree,
        "lives": lives,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"{result['kills']} kills; same adapter: {expected == found}; same metrics: {rows_agree}")
    print(f"written to {options.out}")
    sys.exit(0 if expected == found and rows_agree else 1)


def make_model(folder: Path) -> None:
    """Write a Llama of four narrow layers with the demo model's tokenizer, random and untrained."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "runs" / "prepared" / "SmolLM2-135M-Instruct")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_config(name: str) -> Path:
    """Write the run's file; the two runs differ in their folder only."""
    prepared = ROOT / "runs" / "prepared"
    config = {
        "output_dir": str(WORK / name),
        "model": {"path": str(WORK / "model")},
        "adapter": {"rank": 8, "alpha": 16, "dropout": 0.1},
        "data": {
            "train": str(prepared / "stdlib-docstrings" / "train.jsonl"),
            "eval": str(prepared / "stdlib-docstrings" / "eval.jsonl"),
            "max_seq_len": 48,
            "train_on": "all",
            "packing": False,
        },
        "optim": {"max_steps": MAX_STEPS, "lr": 1e-3, "grad_accum_steps": 2},
        "parallel": {"backend": "fsdp"},
        "memory": {"recompute": "none"},
        "checkpoint": {"every": 10},
        "eval": {"every": 25, "max_batches": 2},
        "logging": {"tensorboard": False},
    }
    file = WORK / f"{name}.yaml"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    return file


def start(config: Path, name: str) -> subprocess.Popen[bytes]:
    """Start a run in a process group of its own, with its output in a log."""
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(ROOT / "launch" / "cpu_2.yaml"),
        "--main_process_port",
        "0",
        "-m",
        "qlora_dist",
        "train",
        str(config),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with (WORK / f"{name}.log").open("ab") as log:
        return subprocess.Popen(
            command, stdout=log, stderr=log, cwd=ROOT, env=environment, start_new_session=True
        )


def kill_again_and_again(num_kills: int, rng: random.Random) -> list[dict[str, Any]]:
    """Start and kill the run `num_kills` times, then let it finish; one entry per start."""
    config, log = write_config("killed"), WORK / "killed.log"
    lives: list[dict[str, Any]] = []
    while True:
        offset = log.stat().st_size if log.exists() else 0
        process = start(config, "killed")
        born = time.perf_counter()
        life: dict[str, Any] = {}
        if sum("killed" in earlier for earlier in lives) < num_kills:
            target = rng.choice(["rank 0", "rank 1", "launcher", "all"])
            life = kill(process, target, rng.uniform(1.0, LONGEST_LIFE_SECONDS))
        code = process.wait()
        life |= {"seconds": round(time.perf_counter() - born, 2), **what_happened(log, offset)}
        lives.append(life)
        print(f"{len(lives):>3} {life}", flush=True)
        if "killed" not in life:
            if code != 0:
                sys.exit(f"the run failed by itself with {code}, see {log}")
            return lives


def kill(process: subprocess.Popen[bytes], target: str, delay: float) -> dict[str, Any]:
    """Wait, then SIGKILL the target and every process of the run that outlives it.

    Returns:
        an entry for the kill; empty if the run finished before.
    """
    try:
        process.wait(timeout=delay)
    except subprocess.TimeoutExpired:
        pass
    else:
        return {}
    ranks = rank_pids(process.pid)
    victims = {
        "rank 0": ranks[:1],
        "rank 1": ranks[1:2],
        "launcher": [process.pid],
        "all": [process.pid, *ranks],
    }[target]
    for pid in victims or [process.pid]:
        os.kill(pid, signal.SIGKILL)
    waited = time.perf_counter()
    process.wait(timeout=60)  # after a rank's death the launcher ends the other ranks
    seconds = round(time.perf_counter() - waited, 2)
    for pid in ranks:  # a killed launcher leaves its ranks behind
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    while any(Path(f"/proc/{pid}").exists() for pid in ranks if not is_zombie(pid)):
        time.sleep(0.05)
    return {
        "killed": target if victims else "launcher",
        "after_seconds": round(delay, 2),
        "ended_in_seconds": seconds,
    }


def what_happened(log: Path, offset: int) -> dict[str, Any]:
    """Step that a start went on from, and the activity that its log mentions last."""
    with log.open("rb") as file:
        file.seek(offset)
        text = file.read().decode(errors="replace")
    resumed = re.search(r"going on after step (\d+)", text)
    steps = re.findall(r"^(step|eval at step) (\d+)", text, flags=re.MULTILINE)
    if steps:
        doing = f"{steps[-1][0]} {steps[-1][1]} was the last line"
    elif "base model:" in text:
        doing = "loaded, before its first step"
    elif "% of them targets" in text:
        doing = "loading the model"
    else:
        doing = "starting"
    return {"went_on_after_step": int(resumed[1]) if resumed else 0, "then": doing}


def rank_pids(launcher: int) -> list[int]:
    """Process ids of the ranks, in order."""
    found: dict[int, int] = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(status.read_text().rpartition(")")[2].split()[1]) == launcher:
                environment = (status.parent / "environ").read_bytes().split(b"\0")
                ranks = [int(entry[5:]) for entry in environment if entry.startswith(b"RANK=")]
                found |= {rank: int(status.parent.name) for rank in ranks}
        except OSError:
            continue
    return [found[rank] for rank in sorted(found)]


def is_zombie(pid: int) -> bool:
    """True if a process has ended and its parent has not reaped it yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def lasting_rows(name: str) -> list[dict[str, Any]]:
    """Rows of a run's metrics without times and memory."""
    unstable = ("tokens_per_second", "step_seconds", "peak_memory_gib", "seconds")
    lines = (WORK / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [
        {key: value for key, value in json.loads(line).items() if key not in unstable}
        for line in lines
    ]


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


if __name__ == "__main__":
    main()
