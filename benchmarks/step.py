"""Training throughput beside what people run today: the same model, data, batches and LoRA settings.

    python benchmarks/step.py                    # needs what `make demo` prepared; about ten minutes on two cores

Each contender runs in a fresh process on the demo's data, in the order A B C C B A. Counted are non-padding tokens
over the time of all optimizer steps but the first two. The first losses must agree, or the comparison compares
nothing. Writes benchmarks/results/step_DEVICE.json.
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
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
PREPARED = ROOT / "runs" / "prepared"
MODEL = PREPARED / "SmolLM2-135M-Instruct"
DATA = PREPARED / "stdlib-docstrings" / "train.jsonl"
NUM_WARMUP = 2
RANK, ALPHA, LR, MAX_SEQ_LEN = 16, 32, 1e-3, 384
MICRO_BATCH_SIZE, GRAD_ACCUM_STEPS, WORLD_SIZE = 4, 1, 2
"""The demo's batch: four rows per micro-batch, one micro-batch, two processes."""

CONTENDERS = {
    "qlora_dist, 2 processes, fsdp": "one thread each: what the demo runs",
    "qlora_dist, 1 process": "two threads, twice the accumulation",
    "HF Trainer": "as its tutorials do: prepare_model_for_kbit_training, two threads",
    "HF Trainer, no upcast": "the same without prepare_model_for_kbit_training",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12, help="optimizer steps of each run")
    parser.add_argument("--out", type=Path, default=None, help="JSON file to write")
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)  # run one, in this process
    options = parser.parse_args()
    if not MODEL.is_dir() or not DATA.is_file():
        sys.exit(f"{MODEL} or {DATA} is missing. Run `make demo` first.")
    if options.contender is not None:
        run_hf_trainer(options.steps, options.out, upcast=options.contender == "HF Trainer")
        return
    sys.path.insert(0, str(ROOT))
    from benchmarks.machine import describe_machine

    machine = describe_machine()
    runs: dict[str, list[list[dict[str, float]]]] = {name: [] for name in CONTENDERS}
    for name in [*CONTENDERS, *reversed(CONTENDERS)]:
        print(f"{name} ...", flush=True)
        runs[name].append(run_contender(name, options.steps))
    result = {"machine": machine, "settings": settings(options.steps), "contenders": summarise(runs)}
    out = options.out or ROOT / "benchmarks" / "results" / f"step_{'cuda' if machine['num_gpus'] else 'cpu'}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(table(result))
    print(f"written to {out}")


def settings(steps: int) -> dict[str, Any]:
    """What all contenders share."""
    return {
        "model": MODEL.name, "data": DATA.parent.name, "rank": RANK, "alpha": ALPHA, "target_modules": "all-linear",
        "dtype": "bfloat16", "quantization": "nf4", "double_quant": True, "recompute": "none",
        "global_batch_size": MICRO_BATCH_SIZE * GRAD_ACCUM_STEPS * WORLD_SIZE, "micro_batch_size": MICRO_BATCH_SIZE,
        "max_seq_len": MAX_SEQ_LEN, "lr": LR, "optimizer": "adamw", "steps": steps, "warmup_steps_dropped": NUM_WARMUP,
    }  # fmt: skip


def run_contender(name: str, steps: int) -> list[dict[str, float]]:
    """One fresh process (group); returns a row per optimizer step: loss, seconds, num_tokens."""
    with tempfile.TemporaryDirectory() as folder:
        if name.startswith("qlora_dist"):
            return run_ours(Path(folder), steps, processes=2 if "2 processes" in name else 1)
        out = Path(folder) / "rows.json"
        _call([sys.executable, __file__, "--contender", name, "--steps", str(steps), "--out", str(out)], threads=2)
        return json.loads(out.read_text(encoding="utf-8"))


def run_ours(folder: Path, steps: int, processes: int) -> list[dict[str, float]]:
    """`qlora_dist train` through the command line, on CPU or GPU as the machine has it."""
    config = {
        "output_dir": str(folder / "run"),
        "model": {"path": str(MODEL)},
        "adapter": {"rank": RANK, "alpha": ALPHA},
        "data": {"train": str(DATA), "max_seq_len": MAX_SEQ_LEN, "packing": False},
        "optim": {
            "lr": LR, "schedule": "constant", "max_steps": steps, "max_grad_norm": 1.0,
            "micro_batch_size": MICRO_BATCH_SIZE, "grad_accum_steps": GRAD_ACCUM_STEPS * WORLD_SIZE // processes,
        },
        "memory": {"recompute": "none"},
        "logging": {"tensorboard": False},
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    launcher = [] if processes == 1 else [
        "-m", "accelerate.commands.launch", "--config_file", str(ROOT / "launch" / "cpu_2.yaml"),
    ]  # fmt: skip
    command = [sys.executable, *launcher, "-m", "qlora_dist", "train", str(folder / "config.yaml")]
    _call(command, threads=2 // processes)
    lines = (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [{"loss": r["loss"], "seconds": r["step_seconds"], "num_tokens": r["num_tokens"]} for r in rows]


def run_hf_trainer(steps: int, out: Path, upcast: bool) -> None:
    """A plain transformers Trainer with peft on the same micro-batches in the same order."""
    import torch
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from torch.utils.data import SequentialSampler
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        BitsAndBytesConfig,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    from qlora_dist.config import DataConfig
    from qlora_dist.data.dataset import load_dataset
    from qlora_dist.data.sampler import SampleOrder, collate

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    samples = load_dataset(DataConfig(train=str(DATA), max_seq_len=MAX_SEQ_LEN, packing=False), tokenizer, seed=0).train
    per_step = MICRO_BATCH_SIZE * GRAD_ACCUM_STEPS * WORLD_SIZE
    ordered = [samples[i] for i in SampleOrder((len(samples),), seed=0).between(0, steps * per_step)]

    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.bfloat16, quantization_config=quantization)
    if upcast:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    lora = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, lora)

    class InOrder(Trainer):
        def _get_train_sampler(self, *_: Any) -> SequentialSampler:
            return SequentialSampler(ordered)

    def to_batch(rows: list[Any]) -> dict[str, torch.Tensor]:
        batch = collate(rows, tokenizer.pad_token_id)
        return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "labels": batch.labels}

    class Clock(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.times = [time.perf_counter()]
            self.losses: list[float] = []

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.times.append(time.perf_counter())

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
            if "loss" in logs:
                self.losses.append(float(logs["loss"]))

    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, max_steps=steps, per_device_train_batch_size=MICRO_BATCH_SIZE,
            gradient_accumulation_steps=GRAD_ACCUM_STEPS * WORLD_SIZE, learning_rate=LR,
            lr_scheduler_type="constant", bf16=True, use_cpu=not torch.cuda.is_available(), logging_steps=1,
            save_strategy="no", report_to="none", disable_tqdm=True, remove_unused_columns=False, max_grad_norm=1.0,
        )  # fmt: skip
        InOrder(model, arguments, data_collator=to_batch, train_dataset=ordered, callbacks=[clock]).train()
    seconds = [later - earlier for earlier, later in zip(clock.times, clock.times[1:], strict=False)]
    tokens = [sum(len(s.input_ids) for s in ordered[i * per_step : (i + 1) * per_step]) for i in range(steps)]
    rows = [
        {"loss": loss, "seconds": second, "num_tokens": count}
        for loss, second, count in zip(clock.losses, seconds, tokens, strict=True)
    ]
    out.write_text(json.dumps(rows), encoding="utf-8")


def summarise(runs: dict[str, list[list[dict[str, float]]]]) -> dict[str, Any]:
    """Median and spread of tokens/s of each contender, and its first loss.

    Raises:
        SystemExit: the first losses differ by more than 1 %, so the contenders do not compute the same thing.
    """
    reference = next(iter(runs.values()))[0][0]["loss"]
    result: dict[str, dict[str, Any]] = {}
    for name, repeats in runs.items():
        if abs(repeats[0][0]["loss"] / reference - 1) > 0.01:
            sys.exit(f"{name}: first loss {repeats[0][0]['loss']:.4f} is not the {reference:.4f} of the others.")
        rates = [
            sum(row["num_tokens"] for row in rows[NUM_WARMUP:]) / sum(row["seconds"] for row in rows[NUM_WARMUP:])
            for rows in repeats
        ]
        result[name] = {
            "what": CONTENDERS[name],
            "tokens_per_second": round(statistics.median(rates), 1),
            "tokens_per_second_of_each_run": [round(rate, 1) for rate in rates],
            "first_loss": round(repeats[0][0]["loss"], 4),
            "last_loss": round(repeats[0][-1]["loss"], 4),
        }
    base = result["HF Trainer"]["tokens_per_second"]
    for row in result.values():
        row["times_hf_trainer"] = round(row["tokens_per_second"] / base, 2)
    return result


def table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    lines = ["| contender | tokens/s | runs | x HF Trainer | first, last loss |", "|---|---|---|---|---|"]
    for name, row in result["contenders"].items():
        each = ", ".join(f"{rate:g}" for rate in row["tokens_per_second_of_each_run"])
        lines.append(
            f"| {name} | {row['tokens_per_second']:g} | {each} | {row['times_hf_trainer']:g} | "
            f"{row['first_loss']:.4f}, {row['last_loss']:.4f} |"
        )
    return "\n".join(lines)


def _call(command: list[str], threads: int) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\nended with {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")


if __name__ == "__main__":
    main()
