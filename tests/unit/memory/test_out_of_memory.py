"""A first step that does not fit under `memory.recompute: auto` is taken again and keeps less."""

from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import distributed as dist

from qlora_dist import train as train_module
from qlora_dist.errors import TrainingError
from qlora_dist.memory.policy import Recompute
from qlora_dist.memory.recompute import recompute_of
from qlora_dist.model.parts import ModelParts
from tests.support.training import adapter_bytes, lasting_rows, train_here


@pytest.fixture
def run(tmp_path: Path, tiny_llama: Path, chat_file: Path) -> dict:
    """Settings of three steps of two micro-batches."""
    return {
        "model": {"path": str(tiny_llama), "dtype": "float32"},
        "adapter": {"rank": 4, "dropout": 0.1},
        "data": {"train": str(chat_file), "max_seq_len": 64, "cache_dir": str(tmp_path / "cache")},
        "optim": {"lr": 5e-3, "max_steps": 3, "micro_batch_size": 2, "grad_accum_steps": 2},
        "parallel": {"backend": "single"},
        "logging": {"tensorboard": False},
    }


@pytest.fixture(autouse=True)
def _no_group() -> Iterator[None]:
    """Leave the process group that a sharded run in one process makes."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def train_with_errors(
    folder: Path, settings: dict, full_at: tuple[int, ...]
) -> tuple[bool, list[Recompute]]:
    """Train with a memory that is full after the backward of these micro-batches, counted from 1 as
    they are computed; return the policies of the layers in each."""
    found = []
    micro_step = train_module.micro_step

    def limited(model, *arguments):
        found.append(recompute_of(ModelParts(model).layers))
        loss = micro_step(model, *arguments)
        if len(found) in full_at:
            loss.backward()
            raise torch.OutOfMemoryError("injected")
        return loss

    with mock.patch.object(train_module, "micro_step", limited):
        return train_here(folder, settings), found


@pytest.mark.parametrize("full_at", [(1,), (2,), (4,), (2, 6)], ids=str)
def test_a_step_that_did_not_fit_is_taken_again(
    full_at: tuple[int, ...], run: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Losses, gradient norms and the adapter have the bits of an undisturbed run; the log tells of
    the second attempt."""
    assert train_here(tmp_path / "whole", run)
    assert "taken again" not in capsys.readouterr().out
    is_finished, found = train_with_errors(tmp_path / "again", run, full_at)
    assert is_finished
    assert lasting_rows(tmp_path / "again") == lasting_rows(tmp_path / "whole")
    assert adapter_bytes(tmp_path / "again") == adapter_bytes(tmp_path / "whole")
    for number in full_at:
        assert found[number - 1] == Recompute(3), "a tiny model keeps everything at first"
        assert found[number] == Recompute(3, 0, 3)
    text = capsys.readouterr().out
    assert text.count("the memory was full in step") == len(full_at)
    assert "all layers recompute fully now, and the step is taken again" in text


@pytest.mark.parametrize(
    ("changes", "full_at"),
    [
        ({}, (5,)),
        ({}, (1, 2)),
        ({"memory": {"recompute": "none"}}, (1,)),
        ({"parallel": {"backend": "fsdp"}}, (1,)),
    ],
    ids=["later step", "still full", "chosen by hand", "sharded"],
)
def test_otherwise_a_full_memory_ends_the_run(
    changes: dict, full_at: tuple[int, ...], run: dict, tmp_path: Path
) -> None:
    """The run ends with advice: after measured steps, when nothing is left to recompute, when the
    settings fix the recomputation, and if an engine's gathers would be half done."""
    with pytest.raises(
        TrainingError, match=r"the GPU's memory .* is full: a micro-batch of 2 rows"
    ):
        train_with_errors(tmp_path / "run", {**run, **changes}, full_at)
