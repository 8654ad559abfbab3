"""The training step beside the trainers in use today, and the gain of each of its parts.

    python benchmarks/step.py                # after `make demo`; twenty minutes on two cores
    python benchmarks/step.py --check        # two contenders against the committed result

All contenders compute in the type that `model.dtype: auto` takes on this machine, or in `--dtype`.
TRL's own default is bfloat16. Where the type differs, TRL at its defaults is one contender more,
and the base of all comparisons is TRL in the machine's type: a CPU without bfloat16 instructions
emulates its products many times slower, and a lead over that TRL would say nothing about us.

Every contender trains the same 4-bit model with the same LoRA settings on the same token ids and
loss masks in the same order: 2 x 512 tokens a step, no padding. Each runs in a fresh process,
forwards through the list and then backwards, `--rounds` times. The base runs again after every
second contender, and a contender is compared with the two nearest runs of the base, because the
machine's speed drifts. Rates leave out the first two steps and with them any compilation. The
losses of the first step must agree; otherwise the contenders do not compute the same thing. The
machine's rates are measured before, between and after the rounds, and every contender is compared
with the bound that they give for this step with nothing recomputed. Writes
benchmarks/results/step_DEVICE.json and .png.

"TRL, tuned" recomputes nothing. Other tuning has no effect: rows are full, so packing adds nothing,
and TRL itself casts adapters on a 4-bit base to bfloat16. In float32 runs they are cast back,
because their products would be emulated too.

`--check` fails on a loss of 15 % against the committed result, if that was measured in the same
type on a CPU or GPU of the same kind. Otherwise it says so, and fails only if `qlora_dist` is
slower than TRL in the same type.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import textwrap
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import torch
import yaml

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks.apart import in_turns, over_base, run_apart  # noqa: E402
from benchmarks.bound import most_tokens_per_second  # noqa: E402
from benchmarks.conversations import MODEL, check_prepared, write_long_conversations  # noqa: E402
from benchmarks.limits import measure_apart  # noqa: E402
from benchmarks.machine import describe_machine, kind_of  # noqa: E402

NUM_WARMUP = 2
RANK, ALPHA, LR, SEQ_LEN, ROWS = 16, 32, 1e-4, 512, 2
THREADS = 2
LOST = 0.15
"""Share of the lead over TRL whose loss `--check` reports."""
THEIRS = "bfloat16"
"""TRL 1.16's default compute type on every device: `SFTConfig.bf16` is true."""


@dataclass(frozen=True)
class Ours:
    """This program with some of its parts taken out."""

    recompute: str = "none"
    is_loss_chunked: bool = True
    is_fused: bool = True
    is_light: bool = True
    attention: str = "auto"
    is_compiled: bool = False


@dataclass(frozen=True)
class Peer:
    """A trainer in use today."""

    program: Literal["TRL", "HF Trainer"]
    dtype: str
    is_recomputing: bool = False


WHOLE = "qlora_dist"


def base_of(dtype: str) -> str:
    """Name of the base of all comparisons: TRL at its defaults except the compute type."""
    return "TRL, defaults" if dtype == THEIRS else f"TRL, {dtype}"


def contenders_in(dtype: str) -> dict[str, Ours | Peer]:
    """All contenders in their order, the base first.

    Args:
        dtype: the compute type of all. If it is not TRL's default, TRL at its defaults is added.
    """
    in_type = "" if dtype == THEIRS else f", {dtype}"
    norms = "+ norms and SwiGLU as one function each"
    parts = {
        "bfloat16": {norms: Ours(attention="sdpa"), f"+ attention in blocks = {WHOLE}": Ours()},
        "float32": {f"{norms} = {WHOLE}": Ours()},  # float32 takes no attention in blocks
    }
    found: dict[str, Ours | Peer] = {
        base_of(dtype): Peer("TRL", dtype, is_recomputing=True),
        f"TRL, tuned{in_type}": Peer("TRL", dtype),
        f"HF Trainer, no recompute{in_type}": Peer("HF Trainer", dtype),
        "plain loop: peft's layers, all logits, all layers recomputed": Ours(
            "full", False, False, False, "sdpa"
        ),
        "+ nothing recomputed": Ours("none", False, False, False, "sdpa"),
        "+ loss of target rows, in chunks": Ours("none", True, False, False, "sdpa"),
        "+ fused 4-bit layers": Ours("none", True, True, False, "sdpa"),
        **parts[dtype],
        f"{WHOLE}, layers compiled": Ours(is_compiled=True),
        f"{WHOLE}, all layers recomputed": Ours("full"),
    }
    if dtype != THEIRS:
        found["TRL, defaults"] = Peer("TRL", THEIRS, is_recomputing=True)
    return found


def whole_of(contenders: Mapping[str, Ours | Peer]) -> str:
    """Name of this program with all its parts."""
    return next(name for name, one in contenders.items() if one == Ours())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=8, help="optimizer steps of each run")
    parser.add_argument(
        "--rounds", type=int, default=1, help="times through the list, forwards and backwards"
    )
    parser.add_argument("--out", type=Path, default=None, help="JSON file to write")
    parser.add_argument(
        "--check", action="store_true", help="compare a short run with the committed result"
    )
    parser.add_argument(
        "--dtype",
        choices=("auto", "bfloat16", "float32"),
        default="auto",
        help="compute type of all",
    )
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="of the contenders, besides the base"
    )
    parser.add_argument("--contender", help=argparse.SUPPRESS)  # run one, in this process
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.steps <= NUM_WARMUP:
        parser.error(f"--steps {options.steps}: the first {NUM_WARMUP} do not count. Take more.")
    if options.rounds < 1:
        parser.error(f"--rounds {options.rounds}: there must be one at least.")
    check_prepared()
    if options.contender is not None:
        run_here(contenders_in(options.dtype)[options.contender], options)
        return
    machine, dtype = describe_machine(), compute_type(options.dtype)
    contenders = contenders_in(dtype)
    kept = ROOT / "benchmarks" / "results" / f"step_{'cuda' if machine['num_gpus'] else 'cpu'}.json"
    if options.check:
        names = (base_of(dtype), whole_of(contenders))
        measured, _ = compare(
            {name: contenders[name] for name in names}, dtype, options.steps, options.rounds
        )
        committed = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else None
        print(verdict(measured[names[1]]["times_trl"], committed, machine, dtype))
        return
    measured, limits = compare(contenders, dtype, options.steps, options.rounds, with_limits=True)
    result = {
        "machine": machine,
        "settings": settings(dtype, options.steps, options.rounds),
        "limits": limits,
        "contenders": measured,
    }
    out = options.out or kept
    out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    plot(
        measured,
        [name for name, one in contenders.items() if isinstance(one, Peer)],
        out.with_suffix(".png"),
    )
    print(table(measured))
    print(f"written to {out}")


def compute_type(asked: str) -> str:
    """Resolve `auto` to the type that `model.dtype: auto` takes on this machine.

    Raises:
        SystemExit: that type is float16, which these contenders do not compare.
    """
    if asked != "auto":
        return asked
    from qlora_dist.runtime.compute_type import ability, choose

    torch.set_num_threads(THREADS)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = choose("auto", [ability(device, "auto")])
    print(found.note, flush=True)
    if found.name == "float16":
        raise SystemExit(
            "model.dtype: auto takes float16 on this GPU. Give --dtype bfloat16 or float32."
        )
    return found.name


def settings(dtype: str, steps: int, rounds: int) -> dict[str, Any]:
    """Settings that all contenders share."""
    return {
        "model": MODEL.name,
        "rank": RANK,
        "alpha": ALPHA,
        "target_modules": "all-linear",
        "dtype": dtype,
        "quantization": "nf4",
        "double_quant": True,
        "tokens_per_step": f"{ROWS} x {SEQ_LEN}",
        "threads": THREADS,
        "steps": steps,
        "warmup_steps_dropped": NUM_WARMUP,
        "rounds": rounds,
    }


def verdict(
    lead: float, committed: Mapping[str, Any] | None, machine: Mapping[str, Any], dtype: str
) -> str:
    """Compare a lead over TRL with the committed result, in words.

    Args:
        lead: our rate over TRL's, in the same type.
        committed: a result of this benchmark from any machine; None if there is none.
        machine, dtype: machine and compute type of the lead.

    Raises:
        SystemExit: the lead shrank by more than 15 %; or the committed result is of another kind of
            machine or another type, and we are slower than TRL.
    """
    found = f"{lead:g} times {base_of(dtype)}"
    again = "On a machine with other work this may be chance: ask again with --rounds 3."
    then = (
        None if committed is None else kind_of(committed["machine"], committed["settings"]["dtype"])
    )
    if committed is None or then != kind_of(machine, dtype):
        where = f"the committed result is from {then}, this is {kind_of(machine, dtype)}"
        nothing = f"nothing to compare with: {where if then else 'no result is committed'}"
        if lead < 1:
            raise SystemExit(f"slower than TRL in {dtype}: {found}. {again} ({nothing})")
        return f"not slower than TRL: {found}. ({nothing})"
    before = committed["contenders"][whole_of(contenders_in(dtype))]["times_trl"]
    found = f"{found}; the committed result says {before:g}"
    if lead < (1 - LOST) * before:
        raise SystemExit(f"slower: {found}, and {LOST:.0%} less is too much. {again}")
    return f"as quick as before: {found}"


def compare(
    contenders: Mapping[str, Ours | Peer],
    dtype: str,
    steps: int,
    rounds: int,
    with_limits: bool = False,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Run all contenders forwards and backwards.

    Returns:
        rate, spread and losses of each contender, and the machine's rates if `with_limits`.
    """
    in_order: list[tuple[str, list[dict[str, float]]]] = []
    order = in_turns(list(contenders), base_of(dtype))
    limits = [measure_apart(THREADS)] if with_limits else []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_long_conversations(folder / "rows.jsonl")
        for turn in (order, order[::-1]) * rounds:
            for contender in turn:
                print(f"{contender} ...", flush=True)
                one = contenders[contender]
                # emulated bfloat16 is many times slower, so its peer runs few steps
                is_emulated = isinstance(one, Peer) and one.dtype != dtype
                num_steps = NUM_WARMUP + 1 if is_emulated else steps
                in_order.append((contender, run(contender, dtype, folder, num_steps)))
            limits += [measure_apart(THREADS)] if with_limits else []
    return summarize(in_order, dtype, limits), limits


def run(contender: str, dtype: str, folder: Path, steps: int) -> list[dict[str, float]]:
    """Run one contender in a fresh process; loss, seconds and num_tokens of each optimizer step."""
    out = folder / "steps.json"
    command = [
        __file__,
        "--contender",
        contender,
        "--dtype",
        dtype,
        "--steps",
        str(steps),
        "--rows",
        str(folder / "rows.jsonl"),
        "--out",
        str(out),
    ]
    run_apart(command, THREADS, XDG_CACHE_HOME=str(folder / "cache"))
    return list(json.loads(out.read_text(encoding="utf-8")))


def run_here(one: Ours | Peer, options: argparse.Namespace) -> None:
    """Train one contender in this process and write its steps."""
    if isinstance(one, Peer):
        measured = run_peer(one, options.rows, options.steps)
    else:
        measured = run_ours(one, options.dtype, options.rows, options.steps)
    options.out.write_text(json.dumps(measured), encoding="utf-8")


# --------------------------------------------------------------------------------------------------
# This program.


def run_ours(ours: Ours, dtype: str, rows: Path, steps: int) -> list[dict[str, float]]:
    """Train as `qlora-dist train` does, with the parts that `ours` names."""
    from qlora_dist import build as assemble
    from qlora_dist import train as train_module
    from qlora_dist.commands.startup import quiet_third_parties
    from qlora_dist.config.load import load_config

    quiet_third_parties()
    with tempfile.TemporaryDirectory() as name:
        config = {
            "output_dir": f"{name}/run",
            "model": {"path": str(MODEL), "dtype": dtype, "attention": ours.attention},
            "adapter": {"rank": RANK, "alpha": ALPHA},
            "data": {"train": str(rows), "max_seq_len": SEQ_LEN, "packing": False},
            "optim": {
                "lr": LR,
                "schedule": "constant",
                "max_steps": steps,
                "micro_batch_size": ROWS,
            },
            "memory": {"recompute": ours.recompute, "compile": ours.is_compiled},
            "checkpoint": {"every": None},
            "logging": {"tensorboard": False},
        }
        file = Path(name) / "config.yaml"
        file.write_text(yaml.safe_dump(config), encoding="utf-8")
        with ExitStack() as patches:
            if not ours.is_fused:
                patches.enter_context(
                    mock.patch.object(assemble, "fuse_adapters", return_value=None)
                )
            if not ours.is_light:
                patches.enter_context(mock.patch.object(assemble, "fuse_norms_and_mlps"))
            if not ours.is_loss_chunked:
                patches.enter_context(
                    mock.patch.object(train_module, "target_loss_sum", all_logits)
                )
            train_module.train(load_config(file))
        logged = [
            json.loads(line)
            for line in (Path(name) / "run" / "metrics.jsonl").read_text("utf-8").splitlines()
        ]
    names = {
        "loss": "loss",
        "seconds": "step_seconds",
        "num_tokens": "num_tokens",
        "num_targets": "num_target_tokens",
    }
    return [{name: row[source] for name, source in names.items()} for row in logged]


def all_logits(
    model: Any, input_ids: Any, attention_mask: Any, labels: Any, *_: Any, **__: Any
) -> torch.Tensor:
    """Sum of the loss as commonly computed: logits of all tokens, in float32."""
    logits = model(
        input_ids=input_ids, attention_mask=attention_mask, use_cache=False
    ).logits.float()
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), shifted.flatten(), reduction="sum"
    )


# --------------------------------------------------------------------------------------------------
# Peers.


def samples_of(rows: Path, tokenizer: Any, num_samples: int) -> Any:
    """Data set of the first samples in the order in which this program takes them."""
    from datasets import Dataset

    from qlora_dist.config.schema import DataConfig
    from qlora_dist.data.dataset import load_data
    from qlora_dist.data.order import SampleOrder

    data = DataConfig(train=str(rows), max_seq_len=SEQ_LEN, packing=False)
    samples = load_data(data, tokenizer, seed=0).train
    chosen = [samples[i] for i in SampleOrder((len(samples),), seed=0).between(0, num_samples)]
    return Dataset.from_list([{"input_ids": s.input_ids, "labels": s.labels} for s in chosen])


def clock_class() -> type:
    """Class of a trainer's callback that records `times` of steps and their `losses`."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.times: list[float] = []
            self.losses: list[float] = []

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.times.append(time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.times.append(time.perf_counter())

        def on_log(
            self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any
        ) -> None:
            if "loss" in logs:
                self.losses.append(float(logs["loss"]))

    return Clock


def run_peer(peer: Peer, rows: Path, steps: int) -> list[dict[str, float]]:
    """Train with a trainer of TRL or transformers, on this program's samples in its order."""
    from peft import LoraConfig
    from torch.utils.data import SequentialSampler
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    table = samples_of(rows, tokenizer, steps * ROWS)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, peer.dtype),
    )
    model = AutoModelForCausalLM.from_pretrained(
        MODEL, dtype=getattr(torch, peer.dtype), quantization_config=quantization
    )
    lora = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    clock = clock_class()()
    with tempfile.TemporaryDirectory() as folder:
        common = {
            "output_dir": folder,
            "max_steps": steps,
            "per_device_train_batch_size": ROWS,
            "learning_rate": LR,
            "lr_scheduler_type": "constant",
            "use_cpu": not torch.cuda.is_available(),
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
        }
        kind, keywords = trainer_of(peer, model, lora, tokenizer, common)

        class InOrder(kind):  # type: ignore[misc, valid-type]
            def _get_train_sampler(self, *_: Any, **__: Any) -> SequentialSampler:
                return SequentialSampler(table)

        trainer = InOrder(train_dataset=table, callbacks=[clock], **keywords)
        for param in trainer.model.parameters():
            if param.requires_grad:
                param.data = param.data.to(getattr(torch, peer.dtype))
        trainer.train()
    seconds = [
        later - earlier for earlier, later in zip(clock.times, clock.times[1:], strict=False)
    ]
    return [
        {"loss": loss, "seconds": second, "num_tokens": ROWS * SEQ_LEN}
        for loss, second in zip(clock.losses, seconds, strict=True)
    ]


def trainer_of(
    peer: Peer, model: Any, lora: Any, tokenizer: Any, common: dict[str, Any]
) -> tuple[type, dict[str, Any]]:
    """Class of a peer's trainer, and its keyword arguments."""
    if peer.program == "TRL":
        from trl import SFTConfig, SFTTrainer

        tuned = {} if peer.is_recomputing else {"gradient_checkpointing": False}
        in_type = {} if peer.dtype == THEIRS else {"bf16": False}
        arguments = SFTConfig(max_length=SEQ_LEN, **tuned, **in_type, **common)
        return SFTTrainer, {
            "model": model,
            "args": arguments,
            "processing_class": tokenizer,
            "peft_config": lora,
        }
    from peft import get_peft_model
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(bf16=peer.dtype == "bfloat16", **common)
    return Trainer, {"model": get_peft_model(model, lora), "args": arguments}


# --------------------------------------------------------------------------------------------------
# The report.


def summarize(
    in_order: list[tuple[str, list[dict[str, float]]]], dtype: str, limits: list[dict[str, Any]]
) -> dict[str, Any]:
    """Median and spread of tokens/s, losses, and share of the bound (with `limits`), by contender.

    Raises:
        SystemExit: first losses differ by more than 1 %, so the contenders do not compute the same
            thing.
    """
    runs: dict[str, list[list[dict[str, float]]]] = {}
    for name, rows in in_order:
        runs.setdefault(name, []).append(rows)
    base = base_of(dtype)
    reference = runs[base][0][0]["loss"]
    result: dict[str, dict[str, Any]] = {}
    bound = at_the_bound(runs, dtype, limits)
    leads = over_base(
        [(name, statistics.median(counted_rates(rows))) for name, rows in in_order], base
    )
    for name, repeats in runs.items():
        first = repeats[0][0]["loss"]
        if abs(first / reference - 1) > 0.01:
            sys.exit(f"{name}: first loss {first:.4f} is not the {reference:.4f} of the others.")
        rate = statistics.median(rate for rows in repeats for rate in counted_rates(rows))
        result[name] = {
            "tokens_per_second": round(rate, 1),
            "tokens_per_second_of_each_run": [
                round(statistics.median(counted_rates(rows)), 1) for rows in repeats
            ],
            "times_trl": round(statistics.mean(leads[name]), 2),
            "times_trl_of_each_run": [round(lead, 2) for lead in leads[name]],
            "share_of_limit": round(rate / bound, 3) if bound else None,
            "first_loss": round(first, 4),
            "last_loss": round(repeats[0][-1]["loss"], 4),
        }
    return result


def counted_rates(rows: list[dict[str, float]]) -> list[float]:
    """Tokens per second of the counted steps."""
    return [row["num_tokens"] / row["seconds"] for row in rows[NUM_WARMUP:]]


def at_the_bound(
    runs: dict[str, list[list[dict[str, float]]]], dtype: str, limits: list[dict[str, Any]]
) -> float | None:
    """Tokens per second of a step at the lower bound of its time, at the machine's rates."""
    if not limits:
        return None
    ours = whole_of(contenders_in(dtype))
    num_targets = statistics.mean(row["num_targets"] for row in runs[ours][0])
    return most_tokens_per_second(MODEL, RANK, ROWS, SEQ_LEN, round(num_targets), limits, dtype)


def table(contenders: dict[str, Any]) -> str:
    """Markdown table of the result."""
    lines = [
        "| contender | tokens/s | each run | x TRL | each run | of the limit "
        "| loss, first and last |",
        "|---|---|---|---|---|---|---|",
    ]
    base = next(iter(contenders))
    for name, row in contenders.items():
        each, leads = row["tokens_per_second_of_each_run"], row["times_trl_of_each_run"]
        if name == base:  # the base ran between all others, too often to list
            each, leads = [min(each), max(each)], []
        lines.append(
            f"| {name} | {row['tokens_per_second']:g} | {', '.join(map('{:g}'.format, each))} | "
            f"{row['times_trl']:g} | "
            f"{', '.join(map('{:g}'.format, leads))} | {row['share_of_limit']:.0%} | "
            f"{row['first_loss']:.4f}, {row['last_loss']:.4f} |"
        )
    return "\n".join(lines)


def plot(contenders: dict[str, Any], peers: Sequence[str], file: Path) -> None:
    """Plot a bar per contender, its runs as marks and the bound as a line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panel = pyplot.subplots(figsize=(8.5, 4))
    names = ["\n".join(textwrap.wrap(name, 42)) for name in contenders]
    rates = [row["tokens_per_second"] for row in contenders.values()]
    colors = ["tab:gray" if name in peers else "tab:blue" for name in contenders]
    panel.barh(names, rates, color=colors, alpha=0.8)
    for place, row in enumerate(contenders.values()):
        each = row["tokens_per_second_of_each_run"]
        panel.plot(each, [place] * len(each), "|", color="black", markersize=8)
        panel.text(max(each) * 1.02, place, f"{row['times_trl']:g} x", va="center", fontsize=9)
    bound = rates[0] / next(iter(contenders.values()))["share_of_limit"]
    panel.axvline(bound, color="tab:red", linestyle="--")
    panel.set_title(
        "dashed: the least work of a step at the rates of this machine", fontsize=9, color="tab:red"
    )
    panel.set(xlabel="tokens/s (marks: each run; x: of TRL, the first)")
    panel.invert_yaxis()
    panel.grid(axis="x", alpha=0.3)
    figure.tight_layout()
    figure.savefig(file, dpi=130)


if __name__ == "__main__":
    main()
