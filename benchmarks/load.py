"""Cost of loading per rank: bytes read, elements quantized, seconds and memory.

    python benchmarks/load.py                    # about five minutes on two cores, 4 GB in runs/

Makes a random Llama of 1.1B parameters once (shapes of TinyLlama) and stores it in 4 bits with
`quantize`. Loads both on 1, 2 and 4 processes, and with transformers' `from_pretrained` on one.
Each run has fresh processes of one thread. Writes results/load_DEVICE.json.

Memory is the largest private resident set during loading, above that of the interpreter and its
libraries: `RssAnon` and `RssShmem`, sampled every 5 ms, plus the mapped pages of the files that the
loader holds open (`RssFile`).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks.apart import run_apart  # noqa: E402
from benchmarks.machine import describe_machine  # noqa: E402

MODELS = ROOT / "runs" / "bench-load"
SHAPE = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
}
WORLD_SIZES = (1, 2, 4)
MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=None, help="JSON file to write")
    # MODEL OUT: load in this process, with this program or through from_pretrained
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--stock", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker or options.stock:
        model, out = map(Path, options.worker or options.stock)
        measure(load_ours if options.worker else load_stock, model, out)
        return
    machine = describe_machine()
    sources = {"16-bit": make_model(MODELS / "bf16"), "4-bit": MODELS / "nf4"}
    quantize_seconds = quantize(sources["16-bit"], sources["4-bit"])
    runs = []
    for source, folder in sources.items():
        for world_size in WORLD_SIZES:
            runs.append(
                {"loader": "qlora_dist", "source": source, "ranks": run_ranks(folder, world_size)}
            )
            print(line(runs[-1]), flush=True)
        runs.append({"loader": "from_pretrained", "source": source, "ranks": [run_stock(folder)]})
        print(line(runs[-1]), flush=True)
    result = {
        "machine": machine,
        "shape": SHAPE,
        "threads_per_process": 1,
        "quantize_seconds": quantize_seconds,
        "runs": runs,
        "targets": check_targets(runs),
    }
    out = (
        options.out
        or ROOT / "benchmarks" / "results" / f"load_{'cuda' if machine['num_gpus'] else 'cpu'}.json"
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result["targets"], indent=2))
    print(f"written to {out}")


def make_model(folder: Path) -> Path:
    """Make a random bfloat16 Llama in several files, layer by layer; keep it for later runs."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

    if (folder / "model.safetensors.index.json").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    LlamaConfig(
        **SHAPE, tie_word_embeddings=False, architectures=["LlamaForCausalLM"]
    ).save_pretrained(folder)
    with torch.device("meta"):
        shapes = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).state_dict()
    generator = torch.Generator().manual_seed(0)
    index: dict[str, str] = {}
    groups: dict[str, list[str]] = {}
    for name in shapes:
        parts = name.split(".")
        groups.setdefault(
            f"layer{int(parts[2]) // 4}" if parts[1] == "layers" else "ends", []
        ).append(name)
    for number, names in enumerate(groups.values(), start=1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        tensors = {
            name: torch.empty(shapes[name].shape, dtype=torch.bfloat16).normal_(
                std=0.02, generator=generator
            )
            for name in names
        }
        save_file(tensors, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": index})
    )
    return folder


def quantize(model: Path, out: Path) -> float | None:
    """Seconds of `qlora-dist quantize`; None if its result exists already."""
    if out.is_dir():
        return None
    started = time.perf_counter()
    run_apart(["-m", "qlora_dist", "quantize", str(model), str(out)], threads=1)
    return round(time.perf_counter() - started, 1)


def run_ranks(folder: Path, world_size: int) -> list[dict[str, float]]:
    """Load on `world_size` fresh processes; one row per rank."""
    with tempfile.TemporaryDirectory() as out:
        worker = [__file__, "--worker", str(folder), out]
        launcher = [
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            str(world_size),
        ]
        run_apart([*launcher, *worker] if world_size > 1 else worker, threads=1)
        return [json.loads((Path(out) / f"{rank}.json").read_text()) for rank in range(world_size)]


def run_stock(folder: Path) -> dict[str, float]:
    """Load through transformers in one fresh process.

    Every rank of a distributed run would repeat this load.
    """
    with tempfile.TemporaryDirectory() as out:
        run_apart([__file__, "--stock", str(folder), out], threads=1)
        return json.loads((Path(out) / "0.json").read_text())


def measure(load: Any, folder: Path, out: Path) -> None:
    """Run one load in this process and write its row."""
    prepared = load(folder)
    before = resident_bytes()
    peak = [before]
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            peak[0] = max(peak[0], resident_bytes())
            time.sleep(0.005)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    started = time.perf_counter()
    row = prepared()
    row["seconds"] = round(time.perf_counter() - started, 2)
    done.set()
    watcher.join()
    row["peak_mib_above_baseline"] = round((peak[0] - before) / MIB, 1)
    row["baseline_mib"] = round(before / MIB, 1)
    (out / f"{os.environ.get('RANK', '0')}.json").write_text(json.dumps(row))
    sys.stdout.flush()
    os._exit(0)


def load_ours(folder: Path) -> Any:
    """Prepare a load with this program.

    Returns:
        a function that reads the weights.
    """
    from qlora_dist.commands.startup import quiet_third_parties

    quiet_third_parties()
    from qlora_dist.config.schema import AdapterConfig, ModelConfig, TrainConfig
    from qlora_dist.model.adapters import add_adapters
    from qlora_dist.model.parts import ModelParts
    from qlora_dist.model.skeleton import build_skeleton
    from qlora_dist.parallel.choice import make_backend
    from qlora_dist.runtime.processes import start_runtime
    from qlora_dist.runtime.shards import local_part
    from qlora_dist.weights.loading import load_base_weights, materialize

    runtime = start_runtime(seed=0, dtype="bfloat16")
    model = add_adapters(
        build_skeleton(folder, ModelConfig(path=str(folder))), AdapterConfig(rank=8), str(folder)
    )
    make_backend("fsdp" if runtime.world_size > 1 else "single", TrainConfig(), runtime).cut(
        ModelParts(model)
    )

    def load() -> dict[str, float]:
        materialize(model, runtime.device, runtime.device)
        stats = load_base_weights(model, folder, runtime.device)
        shard = sum(local_part(param).nbytes for param in model.parameters())
        runtime.barrier()
        return {
            "bytes_read": stats.bytes_read,
            "elements_quantized": stats.elements_quantized,
            "shard_mib": round(shard / MIB, 1),
        }

    return load


def load_stock(folder: Path) -> Any:
    """Prepare a load with transformers on the same device.

    Returns:
        a function that reads the weights.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

    stored = getattr(AutoConfig.from_pretrained(folder), "quantization_config", None)
    config = (
        None
        if stored
        else BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    )

    def load() -> dict[str, float]:
        # passing None would override the quantization_config of the folder's config.json
        quantization = {} if config is None else {"quantization_config": config}
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **quantization)
        shard = sum(param.nbytes for param in model.parameters())
        linear = (
            0
            if stored
            else sum(p.numel() * 2 for p in model.parameters() if p.dtype == torch.uint8)
        )
        files = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        return {
            "bytes_read": files,
            "elements_quantized": linear,
            "shard_mib": round(shard / MIB, 1),
        }

    return load


def resident_bytes() -> int:
    """Resident set of this process, mapped files included."""
    with open("/proc/self/status", encoding="utf-8") as file:
        fields = dict(line.split(":", 1) for line in file)
    return sum(int(fields[name].split()[0]) for name in ("RssAnon", "RssFile", "RssShmem")) * 1024


def check_targets(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Measured figures beside the targets of the loader."""
    by = {(run["loader"], run["source"], len(run["ranks"])): run["ranks"] for run in runs}
    one, two = by["qlora_dist", "16-bit", 1][0], by["qlora_dist", "16-bit", 2]
    stored = by["qlora_dist", "4-bit", 1][0]
    largest_tensor = SHAPE["vocab_size"] * SHAPE["hidden_size"] * 2 / MIB
    return {
        "two ranks, bytes read over one rank's (at most 0.58)": round(
            max(rank["bytes_read"] for rank in two) / one["bytes_read"], 3
        ),
        "two ranks, elements quantized over one rank's (at most 0.58)": round(
            max(rank["elements_quantized"] for rank in two) / one["elements_quantized"], 3
        ),
        "two ranks, host peak above baseline in MiB, and shard + 2 largest tensors": [
            max(rank["peak_mib_above_baseline"] for rank in two),
            round(max(rank["shard_mib"] for rank in two) + 2 * largest_tensor, 1),
        ],
        "seconds from 16 bits over seconds from 4 bits (at least 5)": round(
            one["seconds"] / stored["seconds"], 1
        ),
    }


def line(run: dict[str, Any]) -> str:
    """One line of text about a run."""
    ranks = run["ranks"]
    peak = max(r["peak_mib_above_baseline"] for r in ranks)
    return (
        f"{run['loader']:<16} {run['source']:<7} N={len(ranks)}  "
        f"{max(r['bytes_read'] for r in ranks) / MIB:8,.0f} MiB read, "
        f"{max(r['elements_quantized'] for r in ranks) / 1e6:7,.0f} M quantized, "
        f"{max(r['seconds'] for r in ranks):6.1f} s, peak +{peak:,.0f} MiB "
        f"(shard {max(r['shard_mib'] for r in ranks):,.0f})"
    )


if __name__ == "__main__":
    main()
