"""Bytes through FSDP2's gather: integers, and floats of every bit pattern, NaNs among them.

FSDP2 copies shards into its buffers with `torch._foreach_copy_`, which is reported to rewrite NaNs of bfloat16 on CUDA;
packed 4-bit weights in bfloat16 storage would change silently. Integers have no NaNs.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from benchmarks.gpu_parts.models import build, make_batch, make_config
from benchmarks.memory import Shape
from qlora_dist.model.integrity import checksum
from qlora_dist.parallel import _integer_parameters_allowed, build_engine
from qlora_dist.runtime import start_runtime
from qlora_dist.train import train_step

STORAGES = (torch.uint8, torch.bfloat16, torch.float16, torch.float32)
_COPIES = 64
"""Of all 65,536 patterns of two bytes: 8 MiB."""


def start_group() -> torch.device:
    """A process group of this process alone, over NCCL where there is a GPU; the device that it works on."""
    is_gpu = torch.cuda.is_available()
    device = torch.device("cuda", 0) if is_gpu else torch.device("cpu")
    if is_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if is_gpu else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    return device


def patterns(device: torch.device) -> torch.Tensor:
    """Every pattern of two bytes, and so every bfloat16 and float16, (8 MiB,) uint8."""
    return torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.uint8).repeat(_COPIES).to(device)


def storages() -> dict[str, Any]:
    """How many bytes come out changed, by storage type, of a foreach copy, a gather, and FSDP2's whole way."""
    device = start_group()
    before = patterns(device)
    result: dict[str, Any] = {"bytes": before.numel(), "torch": torch.__version__}
    for dtype in STORAGES:
        source = before.view(dtype)
        copied = torch.empty_like(source)
        torch._foreach_copy_([copied], [source])
        gathered = torch.empty_like(source)
        dist.all_gather_into_tensor(gathered, source.clone())
        module = nn.Module()
        with _integer_parameters_allowed():
            module.register_parameter("weight", nn.Parameter(source.clone().view(-1, 64), requires_grad=False))
            fully_shard(module, mesh=init_device_mesh(device.type, (1,)))
        module.unshard()
        result[str(dtype).removeprefix("torch.")] = {
            "foreach_copy": _changed(copied, before),
            "all_gather": _changed(gathered, before),
            "fully_shard": _changed(module.weight.detach(), before),
        }
    return result


def _changed(tensor: torch.Tensor, before: torch.Tensor) -> int:
    """Bytes that are not what they were."""
    return int((tensor.contiguous().view(-1).view(torch.uint8) != before).sum())


def whole_model(shape: dict[str, int], seq_len: int) -> dict[str, Any]:
    """The same model unsharded and under FSDP2 in a group of one: gathered bytes, and the losses of three steps."""
    start_group()
    runtime = start_runtime(seed=0, dtype="bfloat16")
    batch = make_batch(shape["vocab"], 2, seq_len, samples_per_row=2)
    sums: dict[str, dict[str, int]] = {}
    losses: dict[str, list[float]] = {}
    for backend in ("single", "fsdp"):
        with tempfile.TemporaryDirectory() as folder:
            config = make_config(
                Path(folder), Shape(**shape), 2, seq_len, memory={"recompute": "full"}, parallel={"backend": backend},
                adapter={"rank": 8},
            )  # fmt: skip
            model, _ = build(config, runtime)
        sums[backend] = _checksums(model)
        engine = build_engine(model.train(), config.optim, runtime)
        losses[backend] = [
            train_step(model, engine, [batch], config.optim.lr, 1.0, runtime).loss.item() for _ in range(3)
        ]
    return {
        "num_frozen_parameters": len(sums["single"]),
        "same_bytes": sums["single"] == sums["fsdp"],
        "losses": losses,
    }


def _checksums(model: nn.Module) -> dict[str, int]:
    """Of each frozen parameter as the layers see it when they run."""
    units = [module for module in model.modules() if hasattr(module, "unshard")]
    for unit in units:
        unit.unshard()
    found = {name: int(checksum(param, 0, 1)) for name, param in model.named_parameters() if not param.requires_grad}
    for unit in units:
        unit.reshard()
    return found
