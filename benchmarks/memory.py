"""Memory of a training step per rank, for 7B to 70B shapes on 1 to 16 ranks, without those GPUs.

    python benchmarks/memory.py                  # about fifteen minutes on two cores

One process plays rank 0 of N. A pretended process group answers its collectives, FSDP2 cuts the
model for N ranks, and two whole training steps run on tensors that have a shape and no contents.
Every storage is counted from its creation to its release, so the peak is that of this program's own
code: shards, gathered layers, activations, logits, gradients and optimizer state. The allocator's
overhead (rounding, fragments) and the CUDA context are not counted.

Before that, a small model is counted with real tensors and from shapes; the two counts must agree.
On a GPU the allocator's own peak is recorded as well. Writes results/memory.json and a plot of the
peak by row length.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qlora_dist.config.schema import TrainConfig

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks.apart import run_apart  # noqa: E402
from benchmarks.machine import describe_machine  # noqa: E402

WORLD_SIZES = (1, 2, 4, 8, 16)
SEQ_LEN = 2048
SEQ_LENS = (512, 1024, 2048, 4096, 8192, 16384)
RECOMPUTE = ("full", "none")  # selective recomputation needs tensors with contents
BY_LENGTH = (("7B", 1), ("65B", 2))
"""Shapes and numbers of ranks whose row length is varied."""
RANK = 16
GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Shape:
    """Dimensions of a decoder."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int = 32000


# LLaMA (arXiv:2302.13971, table 2); Code Llama 34B and Llama 2 70B (arXiv:2307.09288, config.json)
SHAPES = {
    "7B": Shape(4096, 11008, 32, 32, 32),
    "13B": Shape(5120, 13824, 40, 40, 40),
    "34B": Shape(8192, 22016, 48, 64, 8),
    "65B": Shape(8192, 22016, 80, 64, 64),
    "70B": Shape(8192, 28672, 80, 64, 8),
}
SMALL = Shape(512, 1408, 4, 8, 4, 2048)


@dataclasses.dataclass
class Part:
    """Bytes of a part of the step."""

    before: int = 0
    """Held when the part begins."""
    beyond: int = 0
    """Peak of the part above `before`."""


class StorageCounter(TorchDispatchMode):
    """Bytes of all storages that operations return in this mode, until each is freed or emptied."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}

    def __enter__(self) -> StorageCounter:
        self._resize = resize = torch.UntypedStorage.resize_

        # FSDP2 frees gathered parameters by resizing their storage to zero
        def counted(storage: torch.UntypedStorage, size: int) -> Any:
            result = resize(storage, size)
            if storage._cdata in self._sizes:
                self._set(storage._cdata, size)
            return result

        torch.UntypedStorage.resize_ = counted
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize
        super().__exit__(*exception)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, DTensor):  # a DTensor's own storage has the whole size and no bytes
                leaf = leaf.to_local()
            if isinstance(leaf, torch.Tensor) and not leaf.is_meta:
                self._add(leaf.untyped_storage())
        return result

    @contextmanager
    def counting(self, part: Part) -> Iterator[None]:
        """Count a part of the step by itself as well."""
        peak_so_far, part.before = self.peak, self.now
        self.peak = self.now
        yield
        part.beyond = self.peak - part.before
        self.peak = max(self.peak, peak_so_far)

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = 0
            weakref.finalize(storage, self._gone, key)
            self._set(key, storage.nbytes())

    def _set(self, key: int, size: int) -> None:
        self.now += size - self._sizes[key]
        self._sizes[key] = size
        self.peak = max(self.peak, self.now)

    def _gone(self, key: int) -> None:
        self._set(key, 0)
        del self._sizes[key]


@contextmanager
def counted_step(counter: StorageCounter, of_loss: Part, is_real: bool) -> Iterator[None]:
    """Count all storages, and the loss by itself; compute on shapes unless `is_real`."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from qlora_dist.model.logits import LogitsTransform
    from qlora_dist.model.loss import _HeadLoss

    head_loss = _HeadLoss.__call__

    def counted_loss(loss: _HeadLoss, hidden: torch.Tensor) -> torch.Tensor:
        with counter.counting(of_loss):
            return head_loss(loss, hidden)

    logits, loss_module = LogitsTransform(), "qlora_dist.model.loss"
    with (
        # Tensors without contents cannot answer: the row has one sample, the gradient is finite.
        mock.patch("transformers.masking_utils.find_packed_sequence_indices", return_value=None),
        mock.patch.object(torch.Tensor, "isfinite", return_value=True),
        mock.patch(f"{loss_module}.logits_transform", return_value=logits),
        # The figures are a GPU's; a CPU makes fewer logits at a time.
        mock.patch(f"{loss_module}.is_on_cpu", return_value=False),
        mock.patch.object(_HeadLoss, "__call__", counted_loss),
        nullcontext() if is_real else FakeTensorMode(allow_non_fake_inputs=True),
        counter,
    ):
        yield


def measure(
    shape: Shape, world_size: int, seq_len: int, recompute: str, is_real: bool
) -> dict[str, float]:
    """GiB of two training steps of rank 0 among `world_size`, in this process.

    Args:
        is_real: compute on real tensors, whose values are whatever the memory held, instead of on
            shapes.
    """
    from qlora_dist.model.loss import target_loss_sum
    from qlora_dist.model.parts import ModelParts
    from qlora_dist.parallel.choice import make_backend
    from qlora_dist.runtime.shards import local_bytes
    from qlora_dist.weights.loading import materialize

    model, runtime = describe(shape, world_size, seq_len, recompute)
    device = runtime.device
    counter, of_loss = StorageCounter(), Part()
    with counted_step(counter, of_loss, is_real):
        materialize(model, device, device)
        held = counter.now
        engine = make_backend("fsdp", TrainConfig(), runtime).engine(ModelParts(model.train()))
        for _ in range(2):
            ids = torch.zeros(1, seq_len, dtype=torch.int64, device=device)
            positions = torch.arange(seq_len, device=device).unsqueeze(0)
            with runtime.autocast():  # every token is a target, the head's largest case
                loss = target_loss_sum(
                    model, ids, torch.ones_like(ids), ids, positions, num_targets=seq_len - 1
                )
            engine.backward(loss, is_last_micro_batch=True)
            engine.update(lr=1e-3, max_grad_norm=1.0)
        between = counter.now
    row = {
        "parameters_gib": local_bytes(model) / GIB,
        "after_loading_gib": held / GIB,
        "between_steps_gib": between / GIB,
        "before_loss_gib": of_loss.before / GIB,
        "loss_gib": of_loss.beyond / GIB,
        "peak_gib": counter.peak / GIB,
    }
    if is_real and device.type == "cuda":
        row["cuda_peak_gib"] = torch.cuda.max_memory_allocated(device) / GIB
    return {name: round(value, 4) for name, value in row.items()}


def describe(shape: Shape, world_size: int, seq_len: int, recompute: str) -> tuple[Any, Any]:
    """Model and runtime of rank 0 of `world_size`; the model is on meta, cut into shards."""
    from qlora_dist.commands.startup import quiet_third_parties

    quiet_third_parties()
    from torch import distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from qlora_dist.config.schema import AdapterConfig, MemoryConfig, ModelConfig
    from qlora_dist.memory.recompute import apply_recompute
    from qlora_dist.model.adapters import add_adapters
    from qlora_dist.model.fused_norm_mlp import fuse_norms_and_mlps
    from qlora_dist.model.lora_linear import fuse_adapters
    from qlora_dist.model.nf4 import dynamic_code, four_bit_code
    from qlora_dist.model.parts import ModelParts
    from qlora_dist.model.skeleton import build_skeleton
    from qlora_dist.parallel.choice import make_backend
    from qlora_dist.runtime.processes import start_runtime

    runtime = dataclasses.replace(start_runtime(seed=0, dtype="bfloat16"), world_size=world_size)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    with tempfile.TemporaryDirectory() as folder:
        write_model_config(shape, Path(folder), seq_len)
        skeleton = build_skeleton(Path(folder), ModelConfig(path=folder))
    model = add_adapters(skeleton, AdapterConfig(rank=RANK), "base")
    fuse_adapters(model)
    fuse_norms_and_mlps(model)
    parts = ModelParts(model)
    apply_recompute(parts.layers, MemoryConfig(recompute=recompute))  # type: ignore[arg-type]
    make_backend("fsdp", TrainConfig(), runtime).cut(parts)
    device = runtime.device
    # cached once per process; they need values, so they are made before tensors lose them
    dynamic_code(device), four_bit_code("nf4", device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    return model, runtime


def write_model_config(shape: Shape, folder: Path, seq_len: int) -> None:
    """Write the config.json of a Llama of this shape."""
    from transformers import LlamaConfig

    LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocab,
        max_position_embeddings=seq_len,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "memory.json")
    # arguments of `measure` as JSON; the result goes to stdout
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        arguments = json.loads(options.worker)
        row = measure(Shape(**arguments.pop("shape")), **arguments)
        sys.stdout.write("\n" + json.dumps(row) + "\n")
        sys.stdout.flush()
        os._exit(0)  # a pretended process group cannot be taken down
    check = check_against_real_tensors()
    runs = run_all([(name, n, SEQ_LEN, "full") for name in SHAPES for n in WORLD_SIZES])
    by_length = run_all(
        [(*case, seq_len, how) for case in BY_LENGTH for how in RECOMPUTE for seq_len in SEQ_LENS]
    )
    result = {
        "machine": describe_machine(),
        "seq_len": SEQ_LEN,
        "micro_batch_size": 1,
        "adapter_rank": RANK,
        "optimizer": "adamw, float32",
        "recompute": "full",
        "shapes": {n: vars(s) for n, s in SHAPES.items()},
        "check": check,
        "runs": runs,
        "by_length": by_length,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    plot(by_length, options.out.with_suffix(".png"))
    print(f"{table(runs)}\n\n{table_by_length(by_length)}\nwritten to {options.out}")


def check_against_real_tensors() -> dict[str, dict[str, float]]:
    """Count a small model with real tensors and from shapes.

    Raises:
        SystemExit: the two peaks differ by more than 2 %.
    """
    check = {
        kind: in_process(SMALL, 2, 512, "full", is_real=kind == "real tensors")
        for kind in ("real tensors", "shapes")
    }
    real, pretended = check["real tensors"]["peak_gib"], check["shapes"]["peak_gib"]
    peaks = f"peak {real:.4f} GiB with real tensors, {pretended:.4f} from shapes"
    print(f"check on a small model: {peaks}", flush=True)
    if abs(real - pretended) > 0.02 * real:
        sys.exit("the two differ by more than 2 %: the figures from shapes would mean nothing")
    return check


def run_all(cases: list[tuple[str, int, int, str]]) -> list[dict[str, Any]]:
    """Measure all cases of shape, number of ranks, row length and `memory.recompute`."""
    rows = []
    for name, world_size, seq_len, recompute in cases:
        row = in_process(SHAPES[name], world_size, seq_len, recompute, is_real=False)
        rows.append(
            {
                "shape": name,
                "world_size": world_size,
                "seq_len": seq_len,
                "recompute": recompute,
                **row,
            }
        )
        print(
            f"{name:>4} N={world_size:<3} {seq_len:>6} tokens, recompute {recompute}: parameters "
            f"{row['parameters_gib']:7.2f} GiB, peak {row['peak_gib']:7.2f} GiB",
            flush=True,
        )
    return rows


def in_process(
    shape: Shape, world_size: int, seq_len: int, recompute: str, is_real: bool
) -> dict[str, float]:
    """Run `measure` in a process of its own."""
    arguments = {
        "shape": vars(shape),
        "world_size": world_size,
        "seq_len": seq_len,
        "recompute": recompute,
        "is_real": is_real,
    }
    said = run_apart([__file__, "--worker", json.dumps(arguments)], threads=1)
    return dict(json.loads(said.splitlines()[-1]))


def table(runs: list[dict[str, Any]]) -> str:
    """Markdown table of the peak in GiB, by shape and world size."""
    lines = [
        "| | " + " | ".join(f"N = {n}" for n in WORLD_SIZES) + " |",
        "|---" * (len(WORLD_SIZES) + 1) + "|",
    ]
    for name in SHAPES:
        cells = [
            f"{r['peak_gib']:.1f} ({r['parameters_gib']:.1f})" for r in runs if r["shape"] == name
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def table_by_length(rows: list[dict[str, Any]]) -> str:
    """Markdown table of the peak in GiB by row length.

    In brackets: the peak of the loss beyond the memory held when it begins.
    """
    lines = [
        "| | memory.recompute | " + " | ".join(f"{n:,}" for n in SEQ_LENS) + " |",
        "|---" * (len(SEQ_LENS) + 2) + "|",
    ]
    for (name, world_size), recompute in product(BY_LENGTH, RECOMPUTE):
        cells = [
            f"{r['peak_gib']:.1f} ({r['loss_gib']:.2f})" for r in chosen(rows, name, recompute)
        ]
        lines.append(f"| {name}, N = {world_size} | {recompute} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def chosen(rows: list[dict[str, Any]], name: str, recompute: str) -> list[dict[str, Any]]:
    """Rows of one curve, by length."""
    return [row for row in rows if (row["shape"], row["recompute"]) == (name, recompute)]


def plot(rows: list[dict[str, Any]], file: Path) -> None:
    """Plot the peak by row length, a panel per shape, with the memory of common GPUs as lines."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(BY_LENGTH), figsize=(5 * len(BY_LENGTH), 3.8))
    for panel, (name, world_size) in zip(panels, BY_LENGTH, strict=True):
        for recompute in RECOMPUTE:
            curve = chosen(rows, name, recompute)
            panel.plot(
                [r["seq_len"] for r in curve],
                [r["peak_gib"] for r in curve],
                marker="o",
                label=f"recompute: {recompute}",
            )
        held, loss = curve[0]["between_steps_gib"], [row["loss_gib"] for row in curve]
        panel.axhline(held, color="gray", linestyle=":", label="between two steps")
        panel.plot(SEQ_LENS, loss, color="black", linestyle="--", label="the loss alone")
        for size in (24, 80):
            panel.axhline(size, color="tab:red", linewidth=0.8, alpha=0.6)
            panel.text(SEQ_LENS[0], size, f"{size} GiB", color="tab:red", fontsize=8, va="bottom")
        panel.set(
            title=f"{name}, one rank of {world_size}",
            xlabel="tokens in the row",
            ylabel="GiB",
            yscale="log",
        )
        panel.set_xscale("log", base=2)
        panel.set_xticks(SEQ_LENS, [f"{n:,}" for n in SEQ_LENS], fontsize=8)
        panel.grid(alpha=0.3)
    panels[0].legend(frameon=False, fontsize=8, loc=(0.02, 0.21))
    figure.tight_layout()
    figure.savefig(file, dpi=130)


if __name__ == "__main__":
    main()
