"""The result does not depend on how many processes computed it, nor on the backend."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support.command import losses, run_ranks, write_config

NUM_STEPS = 20

# name: (processes, parallel section, micro_batch_size, grad_accum_steps); the global batch is 4
# rows throughout
RUNS = {
    "one process": (1, {"backend": "single"}, 2, 2),
    "ddp": (2, {"backend": "ddp"}, 2, 1),
    "fsdp": (2, {"backend": "fsdp"}, 2, 1),
    "fsdp, accumulating": (2, {"backend": "fsdp"}, 1, 2),
}
RUNS_IN_FLOAT32 = {
    "fsdp, offloaded": (2, {"backend": "fsdp", "cpu_offload": True}, 2, 1),
    "hsdp, 2 copies of 2 shards": (4, {"backend": "fsdp", "replicas": 2}, 1, 1),
    "hsdp, offloaded": (4, {"backend": "fsdp", "replicas": 2, "cpu_offload": True}, 1, 1),
}


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def runs(
    request, tmp_path_factory, tiny_llama: Path, chat_file: Path
) -> tuple[str, dict[str, Path]]:
    """Run folders of one training that is run in each of RUNS through the command line; and its
    dtype."""
    dtype = request.param
    root = tmp_path_factory.mktemp(dtype)
    folders = {}
    ways = {**RUNS, **RUNS_IN_FLOAT32} if dtype == "float32" else RUNS
    for name, (processes, parallel, micro_batch_size, grad_accum_steps) in ways.items():
        folders[name] = root / name.replace(" ", "-")
        config = write_config(
            root / "config.yaml",
            output_dir=str(folders[name]),
            model={"path": str(tiny_llama), "dtype": dtype},
            adapter={"rank": 4, "alpha": 8},
            data={"train": str(chat_file), "max_seq_len": 96},
            optim={
                "max_steps": NUM_STEPS,
                "lr": 2e-3,
                "schedule": "cosine",
                "warmup_steps": 2,
                "micro_batch_size": micro_batch_size,
                "grad_accum_steps": grad_accum_steps,
            },
            parallel=parallel,
            logging={"tensorboard": False},
        )
        for done in run_ranks("train", config, processes=processes):
            assert done.returncode == 0, done.stderr
    return dtype, folders


def test_loss_curves_are_equal(runs) -> None:
    """Every cut of the batch gives the loss curve of one process, within the compute type's
    rounding."""
    dtype, folders = runs
    expected = torch.tensor(losses(folders["one process"]))
    assert len(expected) == NUM_STEPS
    for name, folder in folders.items():
        difference = ((torch.tensor(losses(folder)) - expected) / expected).abs().max().item()
        assert difference <= (1e-6 if dtype == "float32" else 2e-3), name


def test_final_adapters_are_equal(runs) -> None:
    """In float32 the trained adapters of all ways agree to a relative L2 distance of 1e-5."""
    dtype, folders = runs
    if dtype != "float32":
        pytest.skip("bfloat16 rounding makes Adam's sign-like first steps differ in a few elements")
    expected = adapter_vector(folders["one process"])
    for name, folder in folders.items():
        distance = (adapter_vector(folder) - expected).norm() / expected.norm()
        assert distance <= 1e-5, name


def test_two_ranks_give_the_same_bits_sharded_or_not(runs) -> None:
    """Sharding changes no rounding: on two ranks `ddp` and `fsdp` train equal bits, also in
    bfloat16."""
    _, folders = runs
    saved = {
        name: load_file(folders[name] / "adapter" / "adapter_model.safetensors")
        for name in ("ddp", "fsdp")
    }
    assert saved["ddp"].keys() == saved["fsdp"].keys()
    for name, tensor in saved["ddp"].items():
        assert torch.equal(tensor, saved["fsdp"][name]), name


def test_training_reached_every_layer(runs, tiny_llama: Path) -> None:
    """After training, on all layers and projections, every A differs from its initial value and
    every B from zero."""
    from qlora_dist.config.schema import AdapterConfig, ModelConfig
    from qlora_dist.model.adapters import adapter_parameters, add_adapters, init_adapters
    from qlora_dist.model.skeleton import build_skeleton
    from qlora_dist.weights.loading import materialize

    model = add_adapters(build_skeleton(tiny_llama, ModelConfig()), AdapterConfig(rank=4), "base")
    materialize(model, torch.device("cpu"), torch.device("cpu"))
    init_adapters(model, seed=0)
    initial = {
        name.replace(".default.", "."): param.detach()
        for name, param in adapter_parameters(model).items()
    }
    for folder in runs[1].values():
        final = load_file(folder / "adapter" / "adapter_model.safetensors")
        assert final.keys() == initial.keys()
        assert len(final) == 3 * 7 * 2  # layers x projections x (A, B)
        for name, tensor in final.items():
            assert not torch.equal(tensor, initial[name]), name


def adapter_vector(folder: Path) -> torch.Tensor:
    """All adapter values of a run, in one vector."""
    tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
    return torch.cat([tensors[name].double().flatten() for name in sorted(tensors)])
