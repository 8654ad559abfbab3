"""Steps that cannot be taken: gradients that are not finite, and a full GPU memory."""

from __future__ import annotations

import json
import os
from pathlib import Path
from unittest import mock

import pytest

from qlora_dist import train as train_module
from qlora_dist.run.checkpoint import newest_checkpoint
from tests.support.interrupted import settings
from tests.support.processes import exit_code_of, run_on_processes
from tests.support.training import lasting_rows, train_here


def poison(folder: Path, run: dict, which: list[int]) -> None:
    """Train while the loss of some optimizer steps is not finite on one rank only."""
    train_step = train_module.train_step
    micro_step = train_module.micro_step
    step = 0

    def counting(*arguments):
        nonlocal step
        step += 1
        return train_step(*arguments)

    def poisoned(*arguments):
        loss = micro_step(*arguments)
        return loss * float("nan") if step in which and os.environ["RANK"] == "1" else loss

    with (
        mock.patch.object(train_module, "micro_step", poisoned),
        mock.patch.object(train_module, "train_step", counting),
    ):
        try:
            train_here(folder, run)
        except train_module.TrainingError as error:
            if os.environ["RANK"] == "0":
                folder.with_name("message").write_text(str(error))


@pytest.mark.parametrize("backend", ["ddp", "fsdp", "zero2", "zero3"])
def test_steps_that_are_not_finite(
    tmp_path: Path, tiny_llama: Path, chat_file: Path, backend: str
) -> None:
    """After a NaN on one rank all ranks skip the update, count it and train on; the adapter stays
    finite."""
    if backend.startswith("zero"):
        pytest.importorskip("deepspeed")
    run = settings(tiny_llama, chat_file)
    run["parallel"] = {"backend": backend, "check_every": 1}
    run_on_processes(poison, 2, tmp_path / "run", run, [3, 4])
    rows = [row for row in lasting_rows(tmp_path / "run") if "loss" in row]
    assert [row["num_skipped_steps"] for row in rows] == [0, 0, 1, 2, 2, 2, 2, 2]
    assert [row["loss"] is None for row in rows] == [
        False,
        False,
        True,
        True,
        False,
        False,
        False,
        False,
    ]
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_too_many_steps_that_are_not_finite(
    tmp_path: Path, tiny_llama: Path, chat_file: Path
) -> None:
    """After the configured number of such steps in a row the run ends with advice; its last
    checkpoint is from before."""
    run = settings(tiny_llama, chat_file)
    run["optim"]["max_skipped_steps"] = 2
    run["checkpoint"]["every"] = 2
    run["parallel"] = {"backend": "ddp"}
    run_on_processes(poison, 2, tmp_path / "run", run, [4, 6, 7])
    message = (tmp_path / "message").read_text()
    assert "the gradient was not finite in 2 steps in a row" in message
    assert "Lower optim.lr (now 0.002)" in message
    assert (
        json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 7
    )
    assert newest_checkpoint(tmp_path / "run" / "checkpoints", print).state.num_skipped_steps <= 2


def run_out_of_memory(folder: Path, run: dict) -> None:
    """Train until the fifth micro-batch raises a made-up error of a full memory (there may be no
    GPU)."""
    import torch

    micro_step = train_module.micro_step
    num_done = 0

    def too_large(*arguments):
        nonlocal num_done
        num_done += 1
        if num_done == 5:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return micro_step(*arguments)

    with (
        mock.patch.object(train_module, "micro_step", too_large),
        pytest.raises(train_module.TrainingError) as error,
    ):
        train_here(folder, run)
    folder.with_name("message").write_text(str(error.value))


def run_out_of_memory_in_evaluation(folder: Path, run: dict) -> None:
    import torch

    full = mock.patch.object(
        train_module, "evaluate", side_effect=torch.OutOfMemoryError("CUDA out of memory.")
    )
    with (
        full,
        pytest.raises(
            train_module.TrainingError,
            match=r"full in an evaluation.*optim\.micro_batch_size \(now",
        ),
    ):
        train_here(folder, run)


def test_memory_that_is_full_in_an_evaluation(
    tmp_path: Path, tiny_llama: Path, chat_file: Path
) -> None:
    """The message of an evaluation without memory names settings of its own: nothing is kept for
    backward."""
    run = settings(tiny_llama, chat_file)
    assert exit_code_of(run_out_of_memory_in_evaluation, tmp_path / "run", run) == 0


def test_memory_that_is_full(tmp_path: Path, tiny_llama: Path, chat_file: Path) -> None:
    """The message names the micro-batch and the saving of each change for the model at hand."""
    run = settings(tiny_llama, chat_file)
    run["optim"]["micro_batch_size"] = 4
    run["memory"] = {"recompute": 1}
    assert exit_code_of(run_out_of_memory, tmp_path / "run", run) == 0
    message = (tmp_path / "message").read_text()
    assert "a micro-batch of 4 rows of 96 tokens takes about" in message
    for words in (
        "memory.recompute: full saves about",
        "optim.micro_batch_size: 2 with grad_accum_steps: 4",
    ):
        assert words in message
