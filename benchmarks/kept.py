"""Tensors kept from forward to backward, by form of elementwise work and by recompute policy.

    python benchmarks/kept.py                    # two minutes on two cores; downloads nothing

The model has SmolLM2-135M's shape, random weights and LoRA of rank 16; the micro-batch is 2 x 512
tokens in bfloat16. The first table recomputes nothing and counts each storage that autograd saves
once, the loss included, parameters and 4-bit weights excluded. The second counts one decoder layer
under each policy of `memory.recompute`, as `auto` counts it in the first step. Writes
benchmarks/results/kept_DEVICE.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.autograd.graph import saved_tensors_hooks

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks.machine import describe_machine  # noqa: E402
from benchmarks.memory import Shape  # noqa: E402

SMOLLM2_135M = Shape(576, 1536, 30, 9, 3, 49152)
ROWS, SEQ_LEN = 2, 512
MIB = 2**20
PLAIN = "as the model's code writes it"
FORMS = {
    PLAIN: {"_is_like_rms_norm", "_is_like_gated_mlp"},
    "RMSNorm as one function": {"_is_like_gated_mlp"},
    "SwiGLU as one function": {"_is_like_rms_norm"},
    "both": set(),
}
"""Detector functions disabled in each form; a module they would find keeps the model's own code."""
COMPILED = "`memory.compile: true` instead"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=None, help="JSON file to write")
    options = parser.parse_args()
    from qlora_dist.commands.startup import quiet_third_parties
    from qlora_dist.runtime.processes import start_runtime

    quiet_third_parties()
    machine = describe_machine()
    out = (
        options.out
        or ROOT / "benchmarks" / "results" / f"kept_{'cuda' if machine['num_gpus'] else 'cpu'}.json"
    )
    runtime = start_runtime(seed=0, dtype="bfloat16")
    forms = {}
    for name, left in FORMS.items():
        with left_to_the_model(left):
            forms[name] = saved_bytes(runtime, {"recompute": "none"}) / MIB
    forms[COMPILED] = saved_bytes(runtime, {"recompute": "none", "compile": True}) / MIB
    result = {
        "machine": machine,
        "settings": {
            "shape": vars(SMOLLM2_135M),
            "rank": 16,
            "tokens": f"{ROWS} x {SEQ_LEN}",
            "dtype": "bfloat16",
        },
        "saved_mib": {name: round(value, 1) for name, value in forms.items()},
        "layer_mib": {name: round(value / MIB, 2) for name, value in layer_bytes(runtime).items()},
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(table(result))
    print(f"written to {out}")


@contextmanager
def left_to_the_model(names: set[str]) -> Iterator[None]:
    """Build models whose modules are not recognized by the named detectors."""
    from qlora_dist.model import fused_norm_mlp as elementwise

    with ExitStack() as patches:
        for name in names:
            patches.enter_context(mock.patch.object(elementwise, name, return_value=False))
        yield


def saved_bytes(runtime: Any, memory: dict[str, Any]) -> int:
    """Bytes that autograd holds when the loss has been computed."""
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        # kept alive until counted, so that no address is reused
        storages[storage.data_ptr()] = storage
        return tensor

    model, forward = build_model(runtime, memory)
    forward()  # compiles under memory.compile, which must not be counted
    own = {
        tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]
    }
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(storage.nbytes() for address, storage in storages.items() if address not in own)


def layer_bytes(runtime: Any) -> dict[str, int]:
    """Bytes that one decoder layer keeps, by policy."""
    from qlora_dist.memory.recompute import KeptBytesProbe
    from qlora_dist.model.parts import ModelParts

    model, forward = build_model(runtime, {"recompute": "none"})
    with KeptBytesProbe(ModelParts(model).layers) as survey:
        forward()
    return vars(survey.result)


def build_model(runtime: Any, memory: dict[str, Any]) -> tuple[Any, Callable[[], torch.Tensor]]:
    """Build the model of these settings; returns it with a function that computes its loss."""
    from benchmarks.gpu_parts.models import build, make_batch, make_config
    from qlora_dist.model.loss import target_loss_sum

    with tempfile.TemporaryDirectory() as folder:
        config = make_config(Path(folder), SMOLLM2_135M, ROWS, SEQ_LEN, memory=memory)
        model = build(config, runtime)[0].model
    batch = make_batch(SMOLLM2_135M.vocab, ROWS, SEQ_LEN).to(runtime.device)

    def forward() -> torch.Tensor:
        with runtime.autocast():
            return target_loss_sum(
                model,
                batch.input_ids,
                batch.attention_mask,
                batch.labels,
                num_targets=batch.num_targets,
            )

    return model.train(), forward


def table(result: dict[str, Any]) -> str:
    """Markdown tables of both parts."""
    plain = result["saved_mib"][PLAIN]
    lines = ["| | MiB | |", "|---|---|---|"]
    for name, value in result["saved_mib"].items():
        lines.append(
            f"| {name} | {value:.0f} | {'' if name == PLAIN else f'{value / plain - 1:+.0%}'} |"
        )
    lines += ["", "| policy | MiB of one layer |", "|---|---|"]
    lines += [f"| `{name}` | {value:.1f} |" for name, value in result["layer_mib"].items()]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
