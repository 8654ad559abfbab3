"""A run keeps the compute type that it began with, on any machine; frozen bytes do not depend on
it."""

import json
from contextlib import AbstractContextManager
from pathlib import Path
from unittest import mock

import pytest
import torch
import yaml

from qlora_dist.build import load_trained
from qlora_dist.config.schema import ModelConfig, TrainConfig
from qlora_dist.metrics.console import Reporter
from qlora_dist.run.adapter_folder import read_adapter_record
from qlora_dist.runtime import compute_type
from qlora_dist.runtime.processes import start_runtime
from tests.support.built import build
from tests.support.processes import run_on_processes
from tests.support.training import adapter_bytes, lasting_rows, train_here


def on_a_cpu_that_is_quick_at(dtype: str) -> AbstractContextManager[object]:
    """Context in which `auto` takes that type, on any CPU."""
    return mock.patch.object(
        compute_type, "product_flops", lambda _, name: 1e12 if name == dtype else 1e9
    )


def settings(model: Path, data: Path, **checkpoint: object) -> dict:
    return {
        "model": {"path": str(model)},
        "adapter": {"rank": 4},
        "data": {"train": str(data), "max_seq_len": 64},
        "optim": {"max_steps": 4, "lr": 1e-3},
        "checkpoint": {"every": 1, **checkpoint},
        "logging": {"tensorboard": False},
    }


def said_dtype(folder: Path) -> tuple[str, str]:
    """Types in the resolved configuration and in the adapter's own record."""
    config = yaml.safe_load((folder / "config.yaml").read_text())
    recipe = json.loads((folder / "adapter" / "qlora_dist.json").read_text())
    return config["model"]["dtype"], recipe["base"]["dtype"]


def go_on_elsewhere(root: Path, model: Path, data: Path) -> None:
    with on_a_cpu_that_is_quick_at("bfloat16"):
        assert train_here(root / "whole", settings(model, data))
        assert not train_here(root / "moved", settings(model, data), stop_after=2)
    with on_a_cpu_that_is_quick_at("float32"):
        assert train_here(root / "moved", settings(model, data))
        assert train_here(root / "new", settings(model, data))
        begin = str(root / "whole" / "checkpoints" / "step-00000003")
        assert train_here(root / "branch", settings(model, data, resume=begin))
        assert train_here(root / "whole", settings(model, data, resume="never"))
    assert said_dtype(root / "moved") == said_dtype(root / "branch") == ("bfloat16", "bfloat16")
    assert said_dtype(root / "new") == said_dtype(root / "whole") == ("float32", "float32")
    assert adapter_bytes(root / "branch") == adapter_bytes(root / "moved")
    assert (
        adapter_bytes(root / "whole")
        == adapter_bytes(root / "new")
        != adapter_bytes(root / "moved")
    )
    assert lasting_rows(root / "whole") == lasting_rows(root / "new")


def test_a_run_that_goes_on_elsewhere_keeps_its_type(
    tmp_path: Path, tiny_llama: Path, few_texts: Path
) -> None:
    """A run that stops where bfloat16 is quick and continues where float32 is ends with the bits of
    an undisturbed run; so does one that branches off its checkpoint. A new run takes the machine's
    type."""
    run_on_processes(go_on_elsewhere, 1, tmp_path, tiny_llama, few_texts)


@pytest.fixture
def few_texts(tmp_path: Path) -> Path:
    file = tmp_path / "few.jsonl"
    file.write_text(
        "".join(json.dumps({"text": f"the quick brown fox {n} jumps"}) + "\n" for n in range(12))
    )
    return file


def load_in_every_type(model: Path) -> None:
    frozen: list[dict[str, torch.Tensor]] = []
    for dtype in ("bfloat16", "float16", "float32"):
        runtime = start_runtime(seed=0, dtype=dtype)
        config = TrainConfig(model=ModelConfig(str(model), dtype=dtype))
        parts, _ = build(config, model, "single", runtime)
        loaded = parts.model
        of_layers = {n: p for n, p in loaded.named_parameters() if ".base_layer." in n}
        assert {str(p.dtype) for p in of_layers.values()} == {"torch.uint8", "torch.float32"}
        assert loaded.get_input_embeddings().weight.dtype == getattr(torch, dtype)
        frozen.append({name: param.detach().clone() for name, param in of_layers.items()})
    for other in frozen[1:]:
        assert other.keys() == frozen[0].keys()
        assert all(torch.equal(tensor, frozen[0][name]) for name, tensor in other.items())


def test_frozen_bytes_are_the_same_in_every_type(tiny_llama: Path) -> None:
    """Packed weights and constants have equal bytes in each type; only unquantized weights are kept
    in the compute type."""
    run_on_processes(load_in_every_type, 1, tiny_llama)


def use_elsewhere(root: Path, model: Path, data: Path) -> None:
    with on_a_cpu_that_is_quick_at("bfloat16"):
        assert train_here(root / "run", settings(model, data))
    with on_a_cpu_that_is_quick_at("float32"):
        runtime = start_runtime(seed=0, dtype="auto")
        log = root / "log.txt"
        with log.open("w") as file:
            recipe = read_adapter_record(root / "run" / "adapter")
            loaded, _ = load_trained(
                root / "run" / "adapter",
                recipe,
                runtime=runtime,
                reporter=Reporter(is_main=True, file=file),
            )
        assert loaded.get_input_embeddings().weight.dtype == torch.float32
        first = log.read_text().splitlines()[0]
        assert first.startswith("compute type: float32 (chosen by model.dtype: auto)")
        assert first.endswith("; the adapter was trained in bfloat16")


def test_an_adapter_is_used_in_the_type_of_the_machine(
    tmp_path: Path, tiny_llama: Path, few_texts: Path
) -> None:
    """An adapter is used in the machine's type, and the log names the type that it was trained
    in."""
    run_on_processes(use_elsewhere, 1, tmp_path, tiny_llama, few_texts)
