"""Models of real shapes with random weights, made on the device by the program's own assembly."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import yaml
from torch import nn

from benchmarks.memory import Shape, write_model_config
from qlora_dist import build as assemble
from qlora_dist.config.load import load_config
from qlora_dist.config.schema import IGNORE_INDEX, TrainConfig
from qlora_dist.data.batch import MicroBatch
from qlora_dist.metrics.console import Reporter
from qlora_dist.model.nf4 import QuantFormat, QuantizedLinear, QuantizedTensors, quantize_matrix
from qlora_dist.model.parts import ModelParts
from qlora_dist.parallel.choice import choose_backend, make_backend
from qlora_dist.runtime.processes import Runtime
from qlora_dist.runtime.shards import keep_local, whole_shape
from qlora_dist.weights.loading import LoadStats

SHARED_ABOVE = 2**22
"""Matrices with more elements share their bytes by shape. Speed and memory are those of different
bytes, and a 65B model is ready in seconds.
"""


def make_config(
    folder: Path, shape: Shape, rows: int, seq_len: int, **sections: Mapping[str, Any]
) -> TrainConfig:
    """Configuration of a run on `rows` x `seq_len` tokens; writes the model's config.json too.

    Args:
        folder: receives config.json and the run's file.
        sections: further keys, such as memory={"recompute": "none"}.

    Raises:
        ConfigError: this version does not know a setting.
    """
    write_model_config(shape, folder, seq_len)
    settings: dict[str, dict[str, Any]] = {
        "model": {"path": str(folder), "dtype": "bfloat16"},
        "data": {"train": str(folder / "none.jsonl"), "max_seq_len": seq_len},
        "optim": {"micro_batch_size": rows, "lr": 1e-4, "schedule": "constant", "max_steps": 100},
    }
    for name, section in sections.items():
        settings.setdefault(name, {}).update(section)
    file = folder / "run.yaml"
    file.write_text(
        yaml.safe_dump({"output_dir": str(folder / "run"), **settings}), encoding="utf-8"
    )
    return load_config(file)


def build(config: TrainConfig, runtime: Runtime) -> tuple[ModelParts, list[str]]:
    """Build the configuration's adapted model with random weights.

    Returns:
        the model's parts, and the lines that `build_model` reported.
    """
    said = io.StringIO()
    with random_weights_instead():
        backend = make_backend(choose_backend(config), config, runtime)
        parts = assemble.build_model(
            config, Path(config.model.path), backend, Reporter(is_main=True, file=said)
        )
    return parts, [
        line for line in said.getvalue().splitlines() if not line.startswith("base model:")
    ]


@contextmanager
def random_weights_instead() -> Iterator[None]:
    """Build models with random weights instead of reading files."""
    with (
        mock.patch.object(assemble, "load_base_weights", fill),
        mock.patch.object(assemble, "checkpoint_bytes", return_value=0),
    ):
        yield


@torch.no_grad()
def fill(model: nn.Module, folder: Path, device: torch.device, *_: Any) -> LoadStats:
    """Fill the frozen base with random values, equal for any dtype.

    Stands in for `load_base_weights`.
    """
    generator = torch.Generator(device).manual_seed(0)
    made: dict[object, QuantizedTensors] = {}
    num_quantized = 0
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            shape = (module.out_features, module.in_features)
            key: object = shape if shape[0] * shape[1] > SHARED_ABOVE else name
            if key not in made:
                made[key] = quantize_matrix(random_matrix(shape, generator), module.format)
                num_quantized += shape[0] * shape[1]
            for leaf, tensor in vars(made[key]).items():
                if tensor is not None:
                    keep_local(getattr(module, leaf), tensor)
        elif ".lora_" not in name:
            for param in module.parameters(recurse=False):
                size = whole_shape(param)
                whole = (
                    random_matrix((size[0], size[1]), generator)
                    if len(size) == 2
                    else torch.ones(size)
                )
                keep_local(param, whole.to(device=device, dtype=param.dtype))
    return LoadStats(bytes_read=0, elements_quantized=num_quantized)


def random_matrix(shape: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    """(out_features, in_features) bfloat16, normal with deviation 1 / sqrt(in_features)."""
    matrix = torch.randn(shape, generator=generator, device=generator.device, dtype=torch.bfloat16)
    return matrix.mul_(shape[1] ** -0.5)


def random_quantized(
    shape: tuple[int, int], device: torch.device, fmt: QuantFormat | None = None
) -> QuantizedTensors:
    """Random matrix in 4 bits."""
    return quantize_matrix(
        random_matrix(shape, torch.Generator(device).manual_seed(0)), fmt or QuantFormat()
    )


def make_batch(
    vocab: int, rows: int, seq_len: int, samples_per_row: int = 1, seed: int = 0
) -> MicroBatch:
    """Full rows of random tokens on the CPU; all but each sample's first are targets.

    Args:
        samples_per_row: samples of equal length; with several, the rows are packed.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocab, (rows, seq_len), generator=generator)
    length = seq_len // samples_per_row
    positions = (torch.arange(seq_len) % length).repeat(rows, 1)
    labels = ids.masked_fill(positions == 0, IGNORE_INDEX)
    return MicroBatch(
        ids,
        torch.ones_like(ids),
        labels,
        positions if samples_per_row > 1 else None,
        num_tokens=ids.numel(),
        num_targets=int((labels[:, 1:] != IGNORE_INDEX).sum()),
    )
