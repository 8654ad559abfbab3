"""A run says at its start what its model and data are, and keeps that beside its config.yaml."""

import json
from pathlib import Path
from unittest import mock

import pytest

from qlora_dist import train as train_module
from qlora_dist.errors import TrainingError
from tests.support.command import run_forked, write_config
from tests.support.processes import run_on_processes
from tests.support.training import train_here


def test_the_page_is_logged_and_kept(tmp_path: Path, run: dict) -> None:
    """The log says in one line each how parameters are kept and what is adapted; inventory.json has
    the same by name, the bytes of each rank, and the account of the data."""
    run["data"]["eval_fraction"] = 0.25
    done = run_forked("train", write_config(tmp_path / "c.yaml", **run))
    assert done.returncode == 0, done.stderr
    assert "LlamaForCausalLM: " in done.stdout
    assert "| nf4: " in done.stdout
    assert "adapters: " in done.stdout
    assert "none on lm_head (the output head)" in done.stdout
    page = json.loads((tmp_path / "out" / "inventory.json").read_text())
    model, data = page["model"], page["data"]
    assert {share["dtype"] for share in model["shares"]} == {"nf4", "float32"}
    assert (
        sum(share["num_bytes"] for share in model["shares"]) == page["parameter_bytes_by_rank"][0]
    )
    assert model["without_adapter"] == {"lm_head": {"number": 1, "reason": "the output head"}}
    (source,) = data["sources"]
    assert data["train"]["num_rows"] + data["eval"]["num_rows"] == source["num_samples"]
    targets = data["train"]["num_target_tokens"] + data["eval"]["num_target_tokens"]
    assert targets == source["num_targets"]
    assert 0 < targets < source["num_tokens"]


def sharded(root: Path, run: dict) -> None:
    train_here(root / "out", run)


def test_the_bytes_of_each_rank(tmp_path: Path, run: dict) -> None:
    """Each rank of a sharded model tells its bytes, which together are those of the model."""
    run["parallel"] = {"backend": "fsdp"}
    run_on_processes(sharded, 2, tmp_path, run)
    page = json.loads((tmp_path / "out" / "inventory.json").read_text())
    held, whole = (
        page["parameter_bytes_by_rank"],
        sum(s["num_bytes"] for s in page["model"]["shares"]),
    )
    assert len(held) == 2
    assert sum(held) == whole
    assert max(held) < 0.6 * whole


def without_gradient(root: Path, run: dict, backend: str, names: tuple[str, ...]) -> None:
    """Train a model in which the loss does not depend on some layers' results."""
    run["parallel"] = {"backend": backend}
    build = train_module.prepare

    def prepare(*arguments):
        parts = build(*arguments)
        for name, module in parts.modules.base.named_modules():
            if name.endswith(names):
                module.register_forward_hook(lambda _, __, result: result.detach())
        return parts

    with mock.patch.object(train_module, "prepare", prepare):
        try:
            train_here(root / backend, run)
        except TrainingError as error:
            (root / f"{backend}.message").write_text(str(error))


@pytest.mark.parametrize("backend", ["ddp", "fsdp", "zero2", "zero3"])
def test_adapters_without_a_gradient(tmp_path: Path, run: dict, backend: str) -> None:
    """A run whose loss does not depend on some adapted layers ends after its first step, under any
    backend, and names them."""
    if backend.startswith("zero"):
        pytest.importorskip("deepspeed")
    run["memory"] = {"recompute": "none"}
    run["optim"]["max_steps"] = 2
    where = ("layers.0.mlp.down_proj", "layers.1.mlp.down_proj")
    run_on_processes(without_gradient, 2, tmp_path, run, backend, where)
    message = (tmp_path / f"{backend}.message").read_text()
    assert message.startswith("6 of 21 adapters got no gradient in the first step")
    assert "model.layers.0.mlp.gate_proj" in message
    assert message.endswith("Name the layers that do learn in adapter.target_modules.")
    assert not (tmp_path / backend / "adapter").exists()
