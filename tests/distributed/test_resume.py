"""A run that was stopped at any moment goes on as if it had not been."""

import json
import os
import shutil
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import pytest
from safetensors.torch import load_file, save_file

from qlora_dist.data import loader as loader_module
from qlora_dist.errors import CheckpointError
from qlora_dist.run.checkpoint import newest_checkpoint
from tests.distributed.test_equivalence import adapter_vector
from tests.support.processes import run_on_processes
from tests.support.training import adapter_bytes, lasting_rows, train_here

NUM_STEPS = 8
ACCUM = 2


def settings(model: Path, data: Path, backend: str, **optim: object) -> dict:
    """Settings of eight steps over the borders of epochs, with dropout, evaluation and
    checkpoints."""
    return {
        "model": {"path": str(model), "dtype": "float32"},
        "adapter": {"rank": 4, "alpha": 8, "dropout": 0.2},
        "data": {"train": str(data), "eval_fraction": 0.25, "max_seq_len": 96, "packing": False},
        "optim": {
            "max_steps": NUM_STEPS,
            "lr": 2e-3,
            "warmup_steps": 2,
            "grad_accum_steps": ACCUM,
            **optim,
        },
        "parallel": {"backend": backend},
        "checkpoint": {"every": 5},
        "eval": {"every": 4},
        "logging": {"tensorboard": False},
    }


@pytest.fixture(scope="module")
def few_rows(tmp_path_factory, chat_file: Path) -> Path:
    """Twenty conversations, 15 of them to train on: 8 steps of 4 pass two borders of epochs, inside
    a step each."""
    file = tmp_path_factory.mktemp("few") / "few.jsonl"
    file.write_text("".join(chat_file.read_text().splitlines(keepends=True)[:20]))
    return file


def interrupt_everywhere(root: Path, model: Path, data: Path) -> None:
    run = settings(model, data, "fsdp")
    assert train_here(root / "whole", run)
    expected = adapter_bytes(root / "whole"), lasting_rows(root / "whole")
    for step in range(NUM_STEPS):
        # After the last micro-batch of a step, and in the middle of the next one, in turn; on
        # either rank.
        stop_after = ACCUM * step + 1 + step % ACCUM
        folder = root / f"stopped-{stop_after}"
        if not train_here(folder, run, stop_after, stop_on_rank=step // 2 % 2):
            assert train_here(folder, run)
        else:
            assert stop_after == ACCUM * NUM_STEPS  # too late: the run was through
        assert (adapter_bytes(folder), lasting_rows(folder)) == expected, (
            f"stopped after {stop_after} micro-batches"
        )


def test_stopping_anywhere_changes_no_bit(tmp_path: Path, tiny_llama: Path, few_rows: Path) -> None:
    """A run that is stopped at each of eight steps, between steps and amid accumulation, by a
    signal to either of two ranks, and started again has the adapter and every logged number of the
    uninterrupted run bit for bit, with dropout."""
    run_on_processes(interrupt_everywhere, 2, tmp_path, tiny_llama, few_rows)


def interrupt_once(root: Path, model: Path, data: Path, backend: str, optimizer: str) -> None:
    run = settings(model, data, backend, optimizer=optimizer, lora_plus_ratio=4)
    assert train_here(root / "whole", run)
    assert not train_here(root / "stopped", run, stop_after=13)
    assert (root / "stopped" / "STOPPED").read_text() == "SIGUSR1\n"
    assert train_here(root / "stopped", run)
    assert adapter_bytes(root / "stopped") == adapter_bytes(root / "whole")
    assert lasting_rows(root / "stopped") == lasting_rows(root / "whole")
    assert not (root / "stopped" / "STOPPED").exists()


@pytest.mark.parametrize(
    ("backend", "optimizer"),
    [
        ("ddp", "adamw"),
        ("fsdp", "adamw"),
        ("zero2", "adamw"),
        ("zero3", "adamw"),
        ("fsdp", "adamw_8bit"),
        ("zero3", "adamw_8bit"),
    ],
)
def test_every_backend_goes_on_exactly(
    tmp_path: Path, tiny_llama: Path, few_rows: Path, backend: str, optimizer: str
) -> None:
    """Stopped in the middle of a step and started again, two ranks end with the uninterrupted run's
    bits."""
    if backend.startswith("zero") and find_spec("deepspeed") is None:
        pytest.skip("deepspeed is an optional dependency")
    run_on_processes(interrupt_once, 2, tmp_path, tiny_llama, few_rows, backend, optimizer)


def part_of_a_run(folder: Path, run: dict, stop_after: int | None) -> None:
    """Train until the stop; note the samples of each step that counted."""
    seen: list[tuple[int, list[int]]] = []
    step_batches = loader_module.step_batches

    def noted(plan, num_seen, samples, rank, pad_token_id):
        groups = plan.micro_batches(num_seen, rank)
        seen.append((num_seen, [i for group in groups for i in group.indices]))
        return step_batches(plan, num_seen, samples, rank, pad_token_id)

    with mock.patch.object(loader_module, "step_batches", noted):
        assert train_here(folder, run, stop_after) == (stop_after is None)
    stood_at = newest_checkpoint(folder / "checkpoints", print).state.num_samples_seen
    counted = [i for num_seen, indices in seen if num_seen < stood_at for i in indices]
    rank = os.environ.get("RANK", "0")
    with folder.with_name(f"{folder.name}-seen.jsonl").open("a") as out:
        out.write(json.dumps({"rank": rank, "indices": counted}) + "\n")


PARTS = [(2, "fsdp", 3), (3, "ddp", 2), (2, "zero3", 3), (1, "single", 6)]
"""Processes, backend, accumulation; the global batch is six rows throughout."""


def test_a_run_moves_between_world_sizes_and_backends(
    tmp_path: Path, tiny_llama: Path, chat_file: Path
) -> None:
    """Two ranks under fsdp, three under ddp, two under zero3 and one continue one run: together
    they see every sample exactly once, and give the losses, gradient norms and adapter of one
    process, with dropout."""
    parts = [part for part in PARTS if part[1] != "zero3" or find_spec("deepspeed") is not None]
    for number, (processes, backend, accum) in enumerate(parts):
        run = settings(
            tiny_llama, chat_file, backend, max_steps=None, epochs=1, grad_accum_steps=accum
        )
        run["data"]["eval_fraction"] = 0
        run["eval"] = {}
        # 48 rows are eight steps; each part does about two and is stopped amid the next.
        stop_after = 2 * accum + 1 if number < len(parts) - 1 else None
        run_on_processes(part_of_a_run, processes, tmp_path / "moving", run, stop_after)
    run_on_processes(part_of_a_run, 1, tmp_path / "staying", run, None)

    lines = [json.loads(line) for line in (tmp_path / "moving-seen.jsonl").read_text().splitlines()]
    assert sorted(i for line in lines for i in line["indices"]) == list(range(48))
    moving, staying = lasting_rows(tmp_path / "moving"), lasting_rows(tmp_path / "staying")
    assert len(moving) == len(staying) == 8
    for row, reference in zip(moving, staying, strict=True):
        assert row == pytest.approx(reference, rel=1e-5)
        assert row["loss"] == pytest.approx(reference["loss"], rel=1e-6)
    one, other = adapter_vector(tmp_path / "moving"), adapter_vector(tmp_path / "staying")
    assert (one - other).norm() <= 1e-5 * other.norm()


def changed_after_a_stop(folder: Path, run: dict, changes: dict) -> None:
    assert not train_here(folder, run, stop_after=7)
    for section, values in changes.items():
        run[section] = {**run[section], **values}
    before = sorted((path, path.read_bytes()) for path in folder.rglob("*") if path.is_file())
    with pytest.raises(CheckpointError) as error:
        train_here(folder, run)
    (folder / "message").write_text(str(error.value))
    (folder / "message").rename(folder.with_suffix(".message"))
    after = sorted((path, path.read_bytes()) for path in folder.rglob("*") if path.is_file())
    assert [path for path, _ in after] == [path for path, _ in before]
    assert all(
        one == other for one, other in zip(before, after, strict=True) if one[0].name != ".lock"
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"adapter": {"rank": 8}}, "adapter.rank: 4 there, 8 now"),
        ({"data": {"max_seq_len": 50}}, "data.max_seq_len: 96 there, 50 now"),
        ({"optim": {"lr": 1e-3}}, "optim.lr: 0.002 there, 0.001 now"),
    ],
)
def test_another_configuration_in_the_same_folder_is_refused(
    tmp_path: Path, tiny_llama: Path, few_rows: Path, changes: dict, words: str
) -> None:
    """Resuming with other settings is refused with the difference, and the folder stays
    untouched."""
    run = settings(tiny_llama, few_rows, "single")
    run_on_processes(changed_after_a_stop, 1, tmp_path / "run", run, changes)
    assert words in (tmp_path / "run.message").read_text()


@pytest.mark.parametrize("what", ["data", "model"])
def test_other_contents_under_the_same_name_are_refused(
    tmp_path: Path, tiny_llama: Path, few_rows: Path, what: str
) -> None:
    """Rows or weights that were exchanged in place are noticed: a checkpoint belongs to their
    contents."""
    data = Path(shutil.copy(few_rows, tmp_path / "data.jsonl"))
    model = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    run = settings(model, data, "single")
    run_on_processes(exchanged_after_a_stop, 1, tmp_path / "run", run, what)
    words = {"data": "the training data are other ones", "model": "the base model is another one"}[
        what
    ]
    assert words in (tmp_path / "run.message").read_text()


def exchanged_after_a_stop(folder: Path, run: dict, what: str) -> None:
    assert not train_here(folder, run, stop_after=7)
    if what == "data":
        file = Path(run["data"]["train"])
        file.write_text(file.read_text().replace("fox", "ox"))
    else:
        file = Path(run["model"]["path"]) / "model.safetensors"
        tensors = load_file(file)
        tensors["model.norm.weight"] = tensors["model.norm.weight"] * 2
        tensors["lm_head.weight"] = tensors["lm_head.weight"] * 2
        save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError) as error:
        train_here(folder, run)
    folder.with_suffix(".message").write_text(str(error.value))
