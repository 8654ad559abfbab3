"""Exactness of each fast path: its loss and gradients beside the plain path's and a reference's.

The plain path is peft's composed layers, logits of all tokens, eager attention, no recomputation.
The reference is the plain path in float32 on the same 4-bit bytes. In float32 a fast path must be
within 1e-5 of it.

In bfloat16 a fast path may be 1.25 times as far from the reference as the plain path. Both round in
many and different places, so paths of equal exactness differ in distance by chance: over these few
batches fused layers came to 1.05 times the plain path's distance on a CPU. An error as large as all
of the plain path's own, added to it, would come to 1.41 times.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

from benchmarks.gpu_parts.models import build, make_batch, make_config, random_quantized
from benchmarks.memory import Shape
from qlora_dist import build as assemble
from qlora_dist import train as train_module
from qlora_dist.config.schema import IGNORE_INDEX
from qlora_dist.model.adapters import adapter_parameters
from qlora_dist.model.attention import model_inputs
from qlora_dist.model.lora_linear import fuse_adapters
from qlora_dist.model.nf4 import QuantFormat, QuantizedLinear
from qlora_dist.runtime.processes import start_runtime
from qlora_dist.train import micro_step

NUM_BATCHES = 4

Results = dict[str, torch.Tensor]
"""OUT: the loss, or the output of a layer. Other keys: gradients by name."""
OUT = "output"


@dataclass(frozen=True)
class Way:
    """Setting of a step's fast paths."""

    is_fused: bool = False
    is_light: bool = False
    """Use this program's norms and SwiGLU."""
    is_loss_chunked: bool = False
    memory: Mapping[str, Any] = field(default_factory=lambda: {"recompute": "none"})
    attention: str = "eager"


PLAIN = Way()
WAYS = {
    "fused layers": Way(is_fused=True),
    "norms and SwiGLU": Way(is_light=True),
    "loss in chunks": Way(is_loss_chunked=True),
    "recompute: full": Way(memory={"recompute": "full"}),
    "recompute: selective": Way(memory={"recompute": "selective"}),
    "attention: sdpa": Way(attention="sdpa"),
    "attention: flash_attention_2": Way(attention="flash_attention_2"),
    "all of it": Way(True, True, True, {"recompute": "full"}, "sdpa"),
    "compile": Way(memory={"recompute": "none", "compile": True}),
    "all of it, compiled": Way(True, True, True, {"recompute": "full", "compile": True}, "sdpa"),
}


def of_models(shape: Mapping[str, int], seq_len: int, way: str) -> dict[str, Any]:
    """Distances of loss and gradients of a way, for a small Llama on two rows of two samples each.

    Each distance is the root mean square over several batches.

    Args:
        way: a key of WAYS.
    """
    small, quick_way = Shape(**shape), WAYS[way]
    reference = plain_results(small, seq_len, "float32")
    row: dict[str, Any] = {}
    for dtype in ("float32", "bfloat16"):
        if dtype == "float32" and quick_way.attention == "flash_attention_2":
            continue  # flash-attn has 16-bit types only
        quick = compute(small, seq_len, quick_way, dtype)
        row[dtype] = compared(reference, plain_results(small, seq_len, dtype), quick, dtype)
    return row


@cache
def plain_results(shape: Shape, seq_len: int, dtype: str) -> list[Results]:
    """Results of the plain path."""
    return compute(shape, seq_len, PLAIN, dtype)


def compute(shape: Shape, seq_len: int, way: Way, dtype: str) -> list[Results]:
    """Loss and gradient of every adapter matrix, by batch; all ways and dtypes share the model."""
    runtime = start_runtime(seed=0, dtype=dtype)
    found: list[Results] = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if not way.is_fused:
            stack.enter_context(mock.patch.object(assemble, "fuse_adapters", return_value=None))
        if not way.is_light:
            stack.enter_context(
                mock.patch.object(assemble, "fuse_norms_and_mlps", return_value=None)
            )
        if not way.is_loss_chunked:
            stack.enter_context(mock.patch.object(train_module, "target_loss_sum", all_logits))
        config = make_config(
            folder,
            shape,
            2,
            seq_len,
            memory=way.memory,
            adapter={"rank": 16},
            model={"dtype": dtype, "attention": way.attention},
        )
        model = build(config, runtime)[0].model
        learn_something(model)
        model.train()
        for seed in range(NUM_BATCHES):
            batch = make_batch(shape.vocab, 2, seq_len, samples_per_row=2, seed=seed).to(
                runtime.device
            )
            loss = micro_step(
                model, batch, torch.tensor(float(batch.num_targets), device=runtime.device), runtime
            )
            model.zero_grad()
            loss.backward()
            gradients = {
                name: param.grad.clone() for name, param in adapter_parameters(model).items()
            }
            found.append({OUT: loss.detach(), **gradients})
    return found


@torch.no_grad()
def learn_something(model: nn.Module) -> None:
    """Set B to random values; B starts at zero, and A would have no gradient."""
    generator = torch.Generator().manual_seed(1)
    for name, param in adapter_parameters(model).items():
        if ".lora_B." in name:
            param.copy_(torch.randn(param.shape, generator=generator) * 0.02)


def all_logits(
    model: Any, input_ids: Any, attention_mask: Any, labels: Any, position_ids: Any = None, *_: Any
) -> torch.Tensor:
    """Sum of the loss as commonly computed: logits of all tokens, in float32."""
    inputs = model_inputs(model, input_ids, attention_mask, position_ids)
    logits = model(**inputs, use_cache=False).logits.float()
    shifted = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
    return nn.functional.cross_entropy(
        logits.flatten(0, 1), shifted.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
    )


def compared(
    reference: list[Results], plain: list[Results], quick: list[Results], dtype: str
) -> dict[str, Any]:
    """Relative distances to the reference, of the output and of all gradients together."""
    row: dict[str, Any] = {}
    is_as_exact = True
    for what in (OUT, "gradients"):
        names = [name for name in reference[0] if (name == OUT) == (what == OUT)]
        of_plain, of_quick = (distance(found, reference, names) for found in (plain, quick))
        row[what] = {"plain": of_plain, "quick": of_quick}
        limit = 1e-5 if dtype == "float32" else 1.25 * of_plain
        if what == OUT and reference[0][OUT].ndim == 0 and dtype == "bfloat16":
            # the plain path's few losses may by chance be within half a unit in the last place
            limit = max(limit, 2**-9)
        is_as_exact = is_as_exact and of_quick <= limit
    return {**row, "is_as_exact": is_as_exact}


def distance(found: list[Results], expected: list[Results], names: list[str]) -> float:
    """||found - expected|| / ||expected|| in float64 over all batches; 1e300 if not finite."""
    far = long = 0.0
    for mine, exact in zip(found, expected, strict=True):
        far += sum(
            float((mine[name].double() - exact[name].double()).pow(2).sum()) for name in names
        )
        long += sum(float(exact[name].double().pow(2).sum()) for name in names)
    ratio = math.sqrt(far / long) if long else math.inf
    return float(f"{ratio:.4g}") if math.isfinite(ratio) else 1e300  # JSON knows no infinity


# --------------------------------------------------------------------------------------------------
# One layer with the shapes of a large model.


def of_layer(inner: int, outer: int, tokens: int, rank: int) -> dict[str, Any]:
    """Distances of a fused 4-bit layer with an adapter: output, and all gradients."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator(device).manual_seed(2)
    x, grad = (
        torch.randn(tokens, width, generator=generator, device=device) for width in (inner, outer)
    )
    x, grad = x.bfloat16().float(), grad.bfloat16().float()
    row: dict[str, Any] = {}
    reference: Results | None = None
    for dtype in (torch.float32, torch.bfloat16):
        layer = adapted_layer(inner, outer, rank, dtype, device)
        plain = results_of(layer, x.to(dtype), grad.to(dtype))
        fuse_adapters(layer)
        quick = results_of(layer, x.to(dtype), grad.to(dtype))
        reference = reference or exact_results(layer, x, grad)
        name = str(dtype).removeprefix("torch.")
        row[name] = compared([reference], [plain], [quick], name)
    return row


def adapted_layer(
    inner: int, outer: int, rank: int, dtype: torch.dtype, device: torch.device
) -> Any:
    """peft's layer on random 4-bit bytes, with A and B in float32."""
    from peft import LoraConfig
    from peft.tuners.lora.bnb import Linear4bit

    base = QuantizedLinear(inner, outer, False, QuantFormat(), dtype).to_empty(device=device)
    for name, tensor in vars(random_quantized((outer, inner), device)).items():
        getattr(base, name).copy_(tensor)
    layer = Linear4bit(
        base, "default", LoraConfig(r=rank, lora_alpha=16), r=rank, lora_alpha=16
    ).to(device)
    layer.lora_A.float(), layer.lora_B.float()
    layer.cast_input_dtype_enabled = False
    generator = torch.Generator().manual_seed(3)
    for weight in (layer.lora_A["default"].weight, layer.lora_B["default"].weight):
        values = torch.randn(weight.shape, generator=generator) * weight.shape[1] ** -0.5
        weight.data.copy_(values.to(torch.bfloat16))  # equal numbers in every compute type
    return layer.train()


def results_of(layer: nn.Module, x: torch.Tensor, grad: torch.Tensor) -> Results:
    """Output, and gradients of x and of the adapter for a gradient of the output."""
    x = x.clone().requires_grad_()
    layer.zero_grad()
    with torch.autocast(x.device.type, x.dtype) if x.dtype == torch.bfloat16 else nullcontext():
        out = layer(x)
    out.backward(grad.to(out.dtype))
    gradients = {n: p.grad for n, p in layer.named_parameters() if p.requires_grad}
    return {OUT: out.detach(), "x": x.grad, **gradients}


def exact_results(layer: Any, x: torch.Tensor, grad: torch.Tensor) -> Results:
    """Output and gradients of a layer from dense matrices, in float64."""
    weight = layer.base_layer.dequantized().double()
    a, b = (part["default"].weight.detach().double() for part in (layer.lora_A, layer.lora_B))
    x, grad, scaling = x.double(), grad.double(), layer.scaling["default"]
    return {
        OUT: x @ weight.t() + scaling * (x @ a.t()) @ b.t(),
        "x": grad @ weight + scaling * (grad @ b) @ a,
        "lora_A.default.weight": scaling * (grad @ b).t() @ x,
        "lora_B.default.weight": scaling * grad.t() @ (x @ a.t()),
    }
