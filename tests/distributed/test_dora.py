"""DoRA, Gaussian initial values and rsLoRA have equal results on any number of ranks and
backends."""

import gc
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qlora_dist.config.schema import (
    AdapterConfig,
    MemoryConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    TrainConfig,
)
from qlora_dist.data.batch import collate
from qlora_dist.data.samples import Sample
from qlora_dist.model.adapters import adapter_parameters, saved_name, whole_adapter
from qlora_dist.run.adapter_folder import AdapterRecord, save_adapter
from qlora_dist.runtime.processes import start_runtime
from qlora_dist.runtime.shards import local_bytes, whole_bytes, whole_tensor
from qlora_dist.train import train_step
from tests.support.built import build
from tests.support.processes import run_on_processes

ROWS = [
    torch.randint(3, 300, (n,), generator=torch.Generator().manual_seed(n)).tolist()
    for n in (12, 20, 9, 31)
]
NUM_STEPS = 4
LR = 2e-3

SETTINGS = {
    "dora": AdapterConfig(rank=4, use_dora=True, init="gaussian"),
    "rslora": AdapterConfig(rank=4, use_rslora=True),
}
WAYS = {
    "ddp": ("ddp", False, "none"),
    "fsdp": ("fsdp", False, "none"),
    "fsdp, recomputing": ("fsdp", False, "full"),
    "fsdp, offloaded": ("fsdp", True, "full"),
}
ZERO_WAYS = {
    "zero2": ("zero2", False, "none"),
    "zero3": ("zero3", False, "none"),
    "zero3, recomputing": ("zero3", False, "full"),
    "zero3, offloaded": ("zero3", True, "full"),
}


def train(
    folder: Path, adapter: AdapterConfig, dtype: str, backend: str, offload: bool, recompute: str
):
    """Initial adapter, losses and final adapter of a few optimizer steps over ROWS, split over
    ranks."""
    runtime = start_runtime(seed=0, dtype=dtype)
    config = TrainConfig(
        seed=7,
        model=ModelConfig(path=str(folder), dtype=dtype),
        adapter=adapter,
        parallel=ParallelConfig(cpu_offload=offload),
        memory=MemoryConfig(recompute=recompute),
        optim=OptimConfig(lr=LR, grad_accum_steps=len(ROWS) // runtime.world_size),
    )
    parts, sharing = build(config, folder, backend, runtime)
    model = parts.model.train()
    if backend in ("fsdp", "zero3"):
        assert local_bytes(model) <= 0.55 * whole_bytes(model)
    initial = {
        name: whole_tensor(param).clone() for name, param in adapter_parameters(model).items()
    }
    engine = sharing.engine(parts)
    batches = [
        collate([Sample(ids, ids)], pad_token_id=0)
        for ids in ROWS[runtime.rank :: runtime.world_size]
    ]
    losses = []
    for _ in range(NUM_STEPS):
        sums = train_step(model, engine, batches, LR, 1.0, runtime)
        losses.append(runtime.sum_over_ranks(sums.loss).item())
    final = whole_adapter(model)
    del engine, model
    gc.collect()
    return initial, losses, {name: tensor.clone() for name, tensor in final.items()}


def check_equivalence(folder: Path, expected_file: Path, ways: dict, only: str) -> None:
    expected = {name: run for name, run in torch.load(expected_file).items() if only in name}
    bits = {}
    for run, (initial, losses, final) in expected.items():
        key, dtype = run.split(", ")
        for name, way in ways.items():
            found_initial, found_losses, found = train(folder, SETTINGS[key], dtype, *way)
            assert found_initial.keys() == initial.keys()
            for param, tensor in initial.items():
                assert torch.equal(found_initial[param], tensor), (key, name, param)
            assert found_losses == pytest.approx(
                losses, rel=1e-6 if dtype == "float32" else 2e-3
            ), (key, name)
            if dtype == "float32":
                difference = sum(((found[n] - final[n]) ** 2).sum() for n in final).sqrt()
                assert difference <= 1e-5 * sum((t**2).sum() for t in final.values()).sqrt(), (
                    key,
                    name,
                )
            if name in ("ddp", "fsdp"):
                bits[key, dtype, name] = found
        if "ddp" in ways:
            for param, tensor in bits[key, dtype, "ddp"].items():
                assert torch.equal(tensor, bits[key, dtype, "fsdp"][param]), (key, param)


@pytest.fixture(scope="module")
def expected_file(tiny_llama: Path, tmp_path_factory) -> Path:
    """File with the results of one process for each of the SETTINGS."""
    expected = {
        f"{key}, {dtype}": train(tiny_llama, SETTINGS[key], dtype, "single", False, "none")
        for key, dtype in (("dora", "float32"), ("dora", "bfloat16"), ("rslora", "float32"))
    }
    for initial, losses, final in expected.values():
        assert losses[-1] < losses[0] - 0.1
        assert all(not torch.equal(initial[name], tensor) for name, tensor in final.items())
    assert sum("magnitude" in name for name in expected["dora, float32"][2]) == 3 * 7
    file = tmp_path_factory.mktemp("expected") / "expected.pt"
    torch.save(expected, file)
    return file


@pytest.fixture(scope="module")
def saved(tiny_llama: Path, tokenizer, tmp_path_factory) -> Path:
    """Folder with a DoRA adapter of random values."""
    config = TrainConfig(
        model=ModelConfig(str(tiny_llama), dtype="float32"), adapter=SETTINGS["dora"]
    )
    model = build(config, tiny_llama, "single", start_runtime(0, "float32"))[0].model
    tensors = {name: torch.randn(param.shape) for name, param in adapter_parameters(model).items()}
    folder = tmp_path_factory.mktemp("saved") / "adapter"
    save_adapter(folder, model, tensors, tokenizer, AdapterRecord(config.model, "messages"))
    return folder


def check_continued(model_folder: Path, adapter_folder: Path, backend: str) -> None:
    expected = load_file(adapter_folder / "adapter_model.safetensors")
    config = TrainConfig(
        model=ModelConfig(path=str(model_folder), dtype="float32"),
        adapter=AdapterConfig(rank=4, use_dora=True, path=str(adapter_folder)),
    )
    runtime = start_runtime(seed=0, dtype="float32")
    model = build(config, model_folder, backend, runtime)[0].model
    found = {
        saved_name(name): whole_tensor(param) for name, param in adapter_parameters(model).items()
    }
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def check_all(
    folder: Path, expected_file: Path, ways: dict, only: str, saved: Path, backend: str
) -> None:
    check_equivalence(folder, expected_file, ways, only)
    check_continued(folder, saved, backend)


def test_ranks_and_sharding_do_not_matter(
    tiny_llama: Path, expected_file: Path, saved: Path
) -> None:
    """Two ranks start from the initial values of one, bit for bit (Gaussian A, magnitudes of the
    base's rows). In float32 they reach its losses to 1e-6 and its adapter to 1e-5. Sharded or not
    they have equal bits, in each compute type. A saved adapter is read into shards unchanged."""
    run_on_processes(check_all, 2, tiny_llama, expected_file, WAYS, "", saved, "fsdp")


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is an optional dependency")
def test_zero_does_not_matter(tiny_llama: Path, expected_file: Path, saved: Path) -> None:
    """DeepSpeed trains DoRA like one process, also with stage 3, which gathers module by module:
    DoRA needs base, A and B of a layer at once."""
    run_on_processes(
        check_all, 2, tiny_llama, expected_file, ZERO_WAYS, "dora, float32", saved, "zero3"
    )
