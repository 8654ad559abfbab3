"""Runs go on from checkpoints of an earlier format; those of a later format are refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_dist.errors import CheckpointError
from qlora_dist.run import checkpoint as checkpoint_module
from tests.support.training import adapter_bytes, lasting_rows, train_here

MOMENTS = ("exp_avg", "exp_avg_sq")


def as_in_version_1(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """8-bit state with float32 values beside it, and a constant for each element."""
    old = {}
    for name in [
        name.removesuffix(".block_start") for name in tensors if name.endswith(".block_start")
    ]:
        for moment in MOMENTS:
            codes = tensors[f"{name}.{moment}_code"]
            lengths = tensors[f"{name}.block_start"].diff(append=torch.tensor([codes.numel()]))
            old[f"{name}.{moment}_code"] = codes
            old[f"{name}.{moment}_absmax"] = tensors[f"{name}.{moment}_absmax"].repeat_interleave(
                lengths
            )
            values = tensors[f"{moment}_code_book"][codes.long()]
            old[f"{name}.{moment}"] = values * old[f"{name}.{moment}_absmax"]
    return old


def rewrite(folder: Path, version: int) -> None:
    """Give a checkpoint another format version, and the optimizer state of version 1."""
    state, optimizer = folder / "state.json", folder / "optimizer.safetensors"
    content = json.loads(state.read_text())
    assert content["format_version"] == 2
    state.write_text(json.dumps({**content, "format_version": version}))
    if version == 1:
        tensors = load_file(optimizer)
        save_file(as_in_version_1(tensors), optimizer)
        assert optimizer.stat().st_size > 8 * sum(
            t.nbytes for name, t in tensors.items() if name.endswith("_code")
        )
    (folder / "COMPLETE").unlink()
    (folder / "COMPLETE").write_text(json.dumps(checkpoint_module._manifest(folder)))


@pytest.fixture
def run(tmp_path: Path, tiny_llama: Path, chat_file: Path) -> dict:
    """Settings of four steps with 8-bit state."""
    return {
        "model": {"path": str(tiny_llama), "dtype": "float32"},
        "adapter": {"rank": 16},
        "data": {"train": str(chat_file), "max_seq_len": 64, "cache_dir": str(tmp_path / "cache")},
        "optim": {"lr": 5e-3, "max_steps": 4, "micro_batch_size": 2, "optimizer": "adamw_8bit"},
        "parallel": {"backend": "single"},
        "logging": {"tensorboard": False},
    }


def test_a_run_goes_on_from_version_1(run: dict, tmp_path: Path) -> None:
    """A run that goes on from version 1 ends bit for bit like an undisturbed run."""
    assert train_here(tmp_path / "whole", run)
    assert not train_here(tmp_path / "old", run, stop_after=3)
    (folder,) = (tmp_path / "old" / "checkpoints").glob("step-*")
    rewrite(folder, 1)
    assert train_here(tmp_path / "old", run)
    assert adapter_bytes(tmp_path / "old") == adapter_bytes(tmp_path / "whole")
    assert lasting_rows(tmp_path / "old") == lasting_rows(tmp_path / "whole")


def test_later_versions_are_refused(run: dict, tmp_path: Path) -> None:
    """The message has the versions that can be read."""
    assert not train_here(tmp_path / "new", run, stop_after=3)
    (folder,) = (tmp_path / "new" / "checkpoints").glob("step-*")
    rewrite(folder, 3)
    with pytest.raises(
        CheckpointError, match=r"has format version 3, this program reads 1 and 2\."
    ):
        checkpoint_module.read_checkpoint(folder)
