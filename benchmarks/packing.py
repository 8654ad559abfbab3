"""Gain of packing on conversations of realistic length, and speed of tokenizing.

    python benchmarks/packing.py       # after `make demo`, with trl; ten minutes on two cores

Makes one file of 20,000 conversations (one to four exchanges, log-normal lengths, the text of the
demo's data) and measures three things. Fill: the share of a packed row that is tokens. Training:
target tokens per second, padded and packed, in the order A B C C B A, each run in a fresh process
through the command line. Tokenizing: rows per second from the file to token ids and loss masks,
beside TRL's SFTTrainer. Writes benchmarks/results/packing_DEVICE.json.
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

import yaml

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks.apart import run_apart  # noqa: E402
from benchmarks.conversations import MODEL, check_prepared, write_conversations  # noqa: E402
from benchmarks.machine import describe_machine  # noqa: E402

NUM_ROWS = 20_000
MEDIAN_WORDS, SIGMA = 36, 0.9
"""Log-normal length of an answer. With the questions, conversations have a median of about 190
tokens and a long tail."""
ROW_LENGTHS = (512, 1024, 2048, 4096)
NUM_WARMUP = 2
THREADS = 2
MAX_SEQ_LEN = 512
TRAINING = {
    "padded": {"packing": False, "group_by_length": False},
    "padded, grouped by length": {"packing": False, "group_by_length": True},
    "packed": {"packing": True, "group_by_length": False},
}
MICRO_BATCH_SIZE = {"padded": 6, "padded, grouped by length": 6, "packed": 3}
"""Rows of a micro-batch, chosen so that all settings have about equal useful tokens."""
TOKENIZING = {"qlora_dist": 0, "TRL": 1, "TRL, two processes": 2}
"""Processes that TRL tokenizes with."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=8, help="optimizer steps of each training run")
    parser.add_argument("--out", type=Path, default=None, help="JSON file to write")
    # one contender, in this process
    parser.add_argument("--tokenize", choices=TOKENIZING, help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    check_prepared()
    if options.tokenize is not None:
        options.out.write_text(
            json.dumps(tokenize(options.tokenize, options.rows)), encoding="utf-8"
        )
        return
    machine = describe_machine()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
        rows = folder / "chats.jsonl"
        write_conversations(rows, NUM_ROWS, MEDIAN_WORDS, SIGMA)
        result = {
            "machine": machine,
            "settings": {
                "num_rows": NUM_ROWS,
                "training_max_seq_len": MAX_SEQ_LEN,
                "steps": options.steps,
                "warmup_steps_dropped": NUM_WARMUP,
                "micro_batch_size": MICRO_BATCH_SIZE,
            },
            "fill": [fill(rows, length) for length in ROW_LENGTHS],
            "tokenizing": measure_tokenizing(rows, folder),
            "training": measure_training(rows, folder, options.steps),
        }
    out = (
        options.out
        or ROOT
        / "benchmarks"
        / "results"
        / f"packing_{'cuda' if machine['num_gpus'] else 'cpu'}.json"
    )
    out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(tables(result))
    print(f"written to {out}")


def fill(rows: Path, max_seq_len: int) -> dict[str, float]:
    """Fill of packed rows, and of rows padded to the longest of six random ones."""
    import numpy as np
    import torch
    from transformers import AutoTokenizer

    from qlora_dist.config.schema import DataConfig
    from qlora_dist.data.dataset import load_data

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    plain = DataConfig(train=str(rows), max_seq_len=max_seq_len, packing=False)
    lengths = load_data(plain, tokenizer, seed=0).train.lengths
    packed = load_data(
        DataConfig(train=str(rows), max_seq_len=max_seq_len, packing=True), tokenizer, seed=0
    ).train
    size = MICRO_BATCH_SIZE["padded"]
    order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(0)).numpy()
    batches = lengths[order][: len(lengths) // size * size].reshape(-1, size)
    return {
        "max_seq_len": max_seq_len,
        "median_tokens": float(np.median(lengths)),
        "mean_tokens": round(float(lengths.mean()), 1),
        "packed": round(float(packed.lengths.sum() / (len(packed) * max_seq_len)), 4),
        "padded": round(float(batches.sum() / (batches.max(axis=1) * size).sum()), 4),
    }


def measure_training(rows: Path, folder: Path, steps: int) -> dict[str, Any]:
    """Target tokens per second of each way to make batches."""
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in TRAINING}
    for name in [*TRAINING, *reversed(TRAINING)]:
        print(f"training, {name} ...", flush=True)
        runs[name].append(train(name, rows, folder / f"run-{name}-{len(runs[name])}", steps))
    base = statistics.median(run["target_tokens_per_second"] for run in runs["padded"])
    return {
        name: {
            **{key: round(statistics.median(run[key] for run in repeats), 3) for key in repeats[0]},
            "of_each_run": [round(run["target_tokens_per_second"], 1) for run in repeats],
            "times_padded": round(
                statistics.median(run["target_tokens_per_second"] for run in repeats) / base, 2
            ),
        }
        for name, repeats in runs.items()
    }


def train(name: str, rows: Path, folder: Path, steps: int) -> dict[str, float]:
    """Run `qlora-dist train` once in a fresh process."""
    config = {
        "output_dir": str(folder),
        "model": {"path": str(MODEL)},
        "adapter": {"rank": 16, "alpha": 32},
        "data": {"train": str(rows), "max_seq_len": MAX_SEQ_LEN, **TRAINING[name]},
        "optim": {
            "lr": 1e-4,
            "schedule": "constant",
            "max_steps": steps,
            "micro_batch_size": MICRO_BATCH_SIZE[name],
        },
        "memory": {"recompute": "none"},
        "checkpoint": {"every": None},
        "logging": {"tensorboard": False},
    }
    file = folder.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    run_apart(["-m", "qlora_dist", "train", str(file)], THREADS)
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    logged = [json.loads(line) for line in lines][NUM_WARMUP:]
    seconds = sum(row["step_seconds"] for row in logged)
    return {
        "target_tokens_per_second": sum(row["num_target_tokens"] for row in logged) / seconds,
        "tokens_per_second": sum(row["num_tokens"] for row in logged) / seconds,
        "data_wait_share": sum(row["data_wait_seconds"] for row in logged) / seconds,
        "first_loss": json.loads(lines[0])["loss"],
    }


def measure_tokenizing(rows: Path, folder: Path) -> dict[str, Any]:
    """Rows per second of each contender, the median of three fresh processes.

    Raises:
        SystemExit: the contenders find different numbers of target tokens.
    """
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in TOKENIZING}
    for name in [*TOKENIZING, *reversed(TOKENIZING), *TOKENIZING]:
        print(f"tokenizing, {name} ...", flush=True)
        out = folder / "tokenized.json"
        command = [__file__, "--tokenize", name, "--rows", str(rows), "--out", str(out)]
        run_apart(command, THREADS, XDG_CACHE_HOME=str(folder / f"cache-{name}-{len(runs[name])}"))
        runs[name].append(json.loads(out.read_text(encoding="utf-8")))
    counts = {name: repeats[0]["num_targets"] for name, repeats in runs.items()}
    if len(set(counts.values())) != 1:
        sys.exit(f"The contenders do not agree on the targets: {counts}.")
    base = statistics.median(run["rows_per_second"] for run in runs["TRL"])
    return {
        name: {
            "rows_per_second": round(
                rate := statistics.median(run["rows_per_second"] for run in repeats)
            ),
            "of_each_run": [round(run["rows_per_second"]) for run in repeats],
            "times_trl": round(rate / base, 2),
            "num_targets": repeats[0]["num_targets"],
        }
        for name, repeats in runs.items()
    }


def tokenize(contender: str, rows: Path) -> dict[str, float]:
    """Tokenize the file once, uncached; imports and the tokenizer's loading do not count."""
    return (
        tokenize_here(rows)
        if contender == "qlora_dist"
        else tokenize_trl(rows, TOKENIZING[contender])
    )


def tokenize_here(rows: Path) -> dict[str, float]:
    """Tokenize with this program, as `train` does before it loads the model."""
    from transformers import AutoTokenizer

    from qlora_dist.config.schema import DataConfig
    from qlora_dist.data.dataset import load_data

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    started = time.perf_counter()
    data = load_data(
        DataConfig(train=str(rows), max_seq_len=MAX_SEQ_LEN, packing=False), tokenizer, seed=0
    )
    seconds = time.perf_counter() - started
    return {"rows_per_second": NUM_ROWS / seconds, "num_targets": data.reports[0].num_targets}


def tokenize_trl(rows: Path, num_processes: int) -> dict[str, float]:
    """Tokenize with the constructor of SFTTrainer, with the loss on the assistant's tokens."""
    from datasets import load_dataset
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    answer = "message['content'] + '<|im_end|>'"
    whole = "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    # TRL finds the assistant's tokens by `generation` marks, which this template lacks
    marked = (
        "{% if message['role'] == 'assistant' %}{{ '<|im_start|>assistant\n' }}"
        f"{{% generation %}}{{{{ {answer} }}}}{{% endgeneration %}}{{{{ '\n' }}}}"
        f"{{% else %}}{whole}{{% endif %}}"
    )
    assert tokenizer.chat_template.count(whole) == 1
    tokenizer.chat_template = tokenizer.chat_template.replace(whole, marked)
    shape = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
    }
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape))
    with tempfile.TemporaryDirectory() as folder:
        arguments = SFTConfig(
            output_dir=folder,
            use_cpu=True,
            bf16=False,
            report_to="none",
            max_length=MAX_SEQ_LEN,
            assistant_only_loss=True,
            dataset_num_proc=num_processes if num_processes > 1 else None,
        )

        def build(split: str) -> tuple[float, Any]:
            started = time.perf_counter()
            table = load_dataset(
                "json", data_files=str(rows), split=split, cache_dir=f"{folder}/{split}"
            )
            trainer = SFTTrainer(
                model, args=arguments, train_dataset=table, processing_class=tokenizer
            )
            return time.perf_counter() - started, trainer

        build("train[:64]")  # warm-up
        fixed, _ = build("train[:16]")
        seconds, trainer = build("train")
        num_targets = 0
        for row in trainer.train_dataset:
            mask = (
                row["labels"][1:MAX_SEQ_LEN]
                if "labels" in row
                else row["assistant_masks"][1:MAX_SEQ_LEN]
            )
            num_targets += sum(label != -100 for label in mask) if "labels" in row else sum(mask)
    return {"rows_per_second": NUM_ROWS / (seconds - fixed), "num_targets": num_targets}


def tables(result: dict[str, Any]) -> str:
    """Markdown tables of the result."""
    lines = [
        "| row length | tokens of a conversation, median, mean | packed | padded |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {row['max_seq_len']:,} | {row['median_tokens']:.0f}, {row['mean_tokens']:.0f} | "
        f"{row['packed']:.1%} | {row['padded']:.1%} |"
        for row in result["fill"]
    ]
    lines += [
        "",
        "| batches | target tokens/s | each run | x padded | waiting for data |",
        "|---|---|---|---|---|",
    ]
    for name, row in result["training"].items():
        each = ", ".join(f"{rate:g}" for rate in row["of_each_run"])
        lines.append(
            f"| {name} | {row['target_tokens_per_second']:.1f} | {each} | "
            f"{row['times_padded']:g} | {row['data_wait_share']:.2%} |"
        )
    lines += ["", "| tokenizing | rows/s | each run | x TRL |", "|---|---|---|---|"]
    for name, row in result["tokenizing"].items():
        each = ", ".join(f"{rate:,}" for rate in row["of_each_run"])
        lines.append(f"| {name} | {row['rows_per_second']:,} | {each} | {row['times_trl']:g} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
