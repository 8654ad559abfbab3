"""Whole runs on the GPU: trained, saved, resumed, and out of memory."""

from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import multiprocessing

from qlora_dist import train as train_module
from qlora_dist.errors import TrainingError
from tests.support.command import losses, run_rows
from tests.support.training import train_here


@pytest.fixture
def run(tmp_path: Path, tiny_llama: Path, chat_file: Path) -> dict:
    """Settings of eight steps."""
    return {
        # SDPA's backward adds in any order
        "model": {"path": str(tiny_llama), "dtype": "bfloat16", "attention": "eager"},
        "adapter": {"rank": 64},  # large enough for bitsandbytes to page its state
        "data": {"train": str(chat_file), "max_seq_len": 128, "cache_dir": str(tmp_path / "cache")},
        "optim": {"lr": 5e-3, "max_steps": 8, "micro_batch_size": 2, "schedule": "constant"},
        "checkpoint": {"every": 3},
        "logging": {"tensorboard": False},
    }


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"model": {"attention": "sdpa"}},
        {"memory": {"recompute": "none"}},
        {"adapter": {"dropout": 0.1}},
        {"adapter": {"use_dora": True}},
        {"optim": {"optimizer": "adamw_8bit"}},
        {"optim": {"optimizer": "paged_adamw_8bit"}},
        {"optim": {"optimizer": "paged_adamw_32bit"}},
    ],
    ids=str,
)
def test_a_stopped_run_goes_on_where_it_was(
    changes: dict, run: dict, device: torch.device, tmp_path: Path
) -> None:
    """Losses of a stopped and resumed run equal those of an undisturbed run, and they fall."""
    settings = {
        **run,
        **{section: {**run.get(section, {}), **keys} for section, keys in changes.items()},
    }
    assert train_here(tmp_path / "whole", settings)
    assert not train_here(tmp_path / "stopped", settings, stop_after=5)
    assert train_here(tmp_path / "stopped", settings)
    whole, stopped = losses(tmp_path / "whole"), losses(tmp_path / "stopped")
    assert len(whole) == len(stopped) == 8
    assert stopped == pytest.approx(whole, rel=1e-2 if "model" in changes else 1e-3)
    assert min(whole[5:]) < 0.9 * whole[0]
    assert (tmp_path / "stopped" / "adapter" / "adapter_model.safetensors").is_file()


def test_rows_say_what_the_gpu_held(run: dict, device: torch.device, tmp_path: Path) -> None:
    """Peak memory is the allocator's, bounded by a tiny model and MFU's own products."""
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device) / 2**30
    assert train_here(tmp_path / "run", run)
    for row in run_rows(tmp_path / "run"):
        assert before + 0.001 < row["peak_memory_gib"] < before + 2
        assert 0 < row["mfu"] < 1


def train_sharded(folder: Path, run: dict) -> None:
    parallel = {"whole": "single", "sharded": "fsdp", "offloaded": "fsdp"}
    for name, backend in parallel.items():
        settings = {**run, "parallel": {"backend": backend, "cpu_offload": name == "offloaded"}}
        assert not train_here(folder / name, settings, stop_after=5)
        assert train_here(folder / name, settings)
    whole = losses(folder / "whole")
    assert len(whole) == 8
    for name in ("sharded", "offloaded"):
        assert losses(folder / name) == pytest.approx(whole, rel=2e-3), name


def test_a_sharded_run_on_one_gpu_is_the_same_run(run: dict, tmp_path: Path) -> None:
    """A resumed FSDP2 run in a group of one has the losses of an unsharded run.

    Its shards are on the GPU or on the host.
    """
    process = multiprocessing.get_context("spawn").Process(
        target=train_sharded, args=(tmp_path, run)
    )
    process.start()
    process.join(300)
    assert process.exitcode == 0


@pytest.fixture
def little_memory(device: torch.device) -> Iterator[None]:
    """Allow this process four MiB more than it holds, from the first micro-batch on."""
    micro_step = train_module.micro_step

    def limited(*arguments):
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(
            (torch.cuda.memory_reserved(device) + 2**22) / total, device
        )
        return micro_step(*arguments)

    with mock.patch.object(train_module, "micro_step", limited):
        yield
    torch.cuda.set_per_process_memory_fraction(1.0, device)


@pytest.mark.usefixtures("little_memory")
def test_a_full_memory_is_an_error_with_advice(run: dict, tmp_path: Path) -> None:
    """The error names the micro-batch, its memory and helpful keys; no file is half-written."""
    settings = {
        **run,
        "data": {**run["data"], "max_seq_len": 512},
        "optim": {**run["optim"], "micro_batch_size": 32},
        "memory": {"recompute": "none"},
    }
    with pytest.raises(
        TrainingError, match=r"the GPU's memory .* is full: a micro-batch of 32 rows of"
    ) as raised:
        train_here(tmp_path / "run", settings)
    for key in (
        "memory.recompute: full saves about",
        "optim.micro_batch_size: 16",
        "data.max_seq_len:",
    ):
        assert key in str(raised.value)
    assert not list((tmp_path / "run" / "checkpoints").glob("step-*"))
