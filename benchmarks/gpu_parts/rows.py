"""Work of many lengths: padded rows in training, and generation token by token.

cuDNN makes a plan for each new shape, and its backward is known to return NaN for some lengths with
a mask. So each kind of work runs with and without cuDNN.
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_parts.attention import check_cudnn, cudnn_attention
from benchmarks.gpu_parts.models import build, make_batch, make_config
from benchmarks.gpu_parts.steps import peak_gib, reset_peak, wait
from benchmarks.memory import Shape
from qlora_dist.config.schema import IGNORE_INDEX
from qlora_dist.data.batch import MicroBatch
from qlora_dist.model.parts import ModelParts
from qlora_dist.parallel.choice import make_backend
from qlora_dist.runtime.processes import start_runtime
from qlora_dist.train import train_step

FILLED = (1.0, 0.8, 0.55, 0.3)
"""Share of each row that is not padding, in turn."""


def padded(
    shape: Mapping[str, int], rows: int, lengths: Sequence[int], with_cudnn: bool
) -> dict[str, Any]:
    """Take two steps at each length; seconds of both, and whether the gradient is finite.

    The weights are random, so no head has the massive activations that make cuDNN's backward fail.
    `attention.py` looks for that case by itself.
    """
    runtime = start_runtime(seed=0, dtype="bfloat16")
    check_cudnn(runtime.device, with_cudnn)
    model, config = _model(shape, rows, max(lengths), runtime)
    engine = make_backend("single", config, runtime).engine(ModelParts(model.train()))
    found: dict[str, Any] = {}
    with cudnn_attention(with_cudnn):
        for length in lengths:
            batch = padded_batch(shape["vocab"], rows, length)
            seconds, finite = [], []
            for _ in range(2):
                started = wait(runtime.device)
                sums = train_step(model, engine, [batch], config.optim.lr, 1.0, runtime)
                finite.append(bool(sums.grad_norm.isfinite()))
                seconds.append(float(f"{wait(runtime.device) - started:.3g}"))
            found[str(length)] = {"seconds": seconds, "is_finite": all(finite)}
    return {"lengths": found, "all_finite": all(one["is_finite"] for one in found.values())}


def padded_batch(vocab: int, rows: int, length: int) -> MicroBatch:
    """Rows of random tokens, padded at their end."""
    whole = make_batch(vocab, rows, length)
    filled = torch.tensor([max(2, int(length * FILLED[row % len(FILLED)])) for row in range(rows)])
    mask = (torch.arange(length) < filled[:, None]).long()
    labels = whole.labels.masked_fill(mask == 0, IGNORE_INDEX)
    targets = int((labels[:, 1:] != IGNORE_INDEX).sum())
    ids = whole.input_ids * mask
    return MicroBatch(ids, mask, labels, None, num_tokens=int(mask.sum()), num_targets=targets)


def generation(
    shape: Mapping[str, int], prompt: int, num_tokens: int, with_cudnn: bool
) -> dict[str, Any]:
    """Seconds of every token that the adapted model generates, as in `qlora-dist generate`."""
    from transformers import StoppingCriteria, StoppingCriteriaList

    runtime = start_runtime(seed=0, dtype="bfloat16")
    check_cudnn(runtime.device, with_cudnn)
    model, _ = _model(shape, 1, prompt + num_tokens, runtime)
    ids = make_batch(shape["vocab"], 1, prompt).input_ids.to(runtime.device)
    times: list[float] = []

    class Clock(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            times.append(wait(runtime.device))
            return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

    reset_peak(runtime.device)
    model.eval()
    with cudnn_attention(with_cudnn), torch.inference_mode(), runtime.autocast():
        times.append(wait(runtime.device))
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            pad_token_id=0,
            min_new_tokens=num_tokens,
            max_new_tokens=num_tokens,
            stopping_criteria=StoppingCriteriaList([Clock()]),
        )
    seconds = [later - earlier for earlier, later in itertools.pairwise(times)]
    return {
        "seconds_per_token": float(f"{statistics.median(seconds[1:]):.4g}"),
        "seconds_of_the_first": float(f"{seconds[0]:.4g}"),
        "seconds_of_each": [float(f"{one:.3g}") for one in seconds[1:]],
        "peak_allocated_gib": peak_gib(runtime.device),
    }


def _model(shape: Mapping[str, int], rows: int, length: int, runtime: Any) -> tuple[Any, Any]:
    with tempfile.TemporaryDirectory() as folder:
        config = make_config(
            Path(folder),
            Shape(**shape),
            rows,
            length,
            memory={"recompute": "none"},
            adapter={"rank": 16},
        )
        model = build(config, runtime)[0].model
    return model, config
