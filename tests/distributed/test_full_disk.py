"""A disk that is full or read-only ends a run with its reason, and costs no checkpoint."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest

from qlora_dist.run import checkpoint as checkpoint_module
from qlora_dist.run.checkpoint import complete_steps
from tests.support.command import run_forked, write_config
from tests.support.interrupted import settings
from tests.support.processes import exit_code_of
from tests.support.training import adapter_bytes, train_here


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Function that mounts a file system of a given size, to be filled up or made read-only."""
    mounted: list[Path] = []

    def make(options: str) -> Path:
        folder = tmp_path / "disk"
        folder.mkdir()
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)],
            capture_output=True,
            check=False,
        )
        if done.returncode:
            pytest.skip(f"needs the right to mount: {done.stderr.decode().strip()}")
        mounted.append(folder)
        return folder

    yield make
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_is_full_from_the_start(
    tmp_path: Path, tiny_llama: Path, chat_file: Path, small_disk
) -> None:
    """A checkpoint that cannot be written is reported at the first step, not after hours, with
    advice."""
    disk = small_disk("size=100k")
    config = write_config(
        tmp_path / "c.yaml", **settings(tiny_llama, chat_file), output_dir=str(disk / "run")
    )
    done = run_forked("train", config)
    assert done.returncode == 2
    assert "the checkpoint cannot be written" in done.stderr
    assert "No space left" in done.stderr
    assert "step 4/" not in done.stdout
    assert not any((disk / "run" / "checkpoints").iterdir()), (
        "the half-written checkpoint gave its space back"
    )


def test_a_disk_that_fills_up(
    tmp_path: Path, tiny_llama: Path, chat_file: Path, small_disk, undisturbed: Path
) -> None:
    """A run on a full disk ends with the reason and keeps its last complete checkpoint. With free
    space it goes on to the undisturbed adapter."""
    disk = small_disk("size=3m")
    run = settings(tiny_llama, chat_file)
    config = write_config(tmp_path / "c.yaml", **run, output_dir=str(disk / "run"))
    assert exit_code_of(train_with_ballast, disk / "run", run, disk / "ballast") != 0
    assert complete_steps(disk / "run" / "checkpoints") == [3]
    (disk / "ballast").unlink()
    assert run_forked("train", config).returncode == 0
    assert adapter_bytes(disk / "run") == adapter_bytes(undisturbed)


def train_with_ballast(folder: Path, run: dict, ballast: Path) -> None:
    """Train; while the checkpoint of step 3 is written, other data fill the disk."""
    rotate = checkpoint_module.Checkpoints._rotate

    def rotate_and_fill(self, state):
        rotate(self, state)
        if state.step == 3:
            with ballast.open("wb", buffering=0) as file:
                try:
                    while True:
                        file.write(bytes(4096))
                except OSError:
                    pass

    with mock.patch.object(checkpoint_module.Checkpoints, "_rotate", rotate_and_fill):
        train_here(folder, run)


def test_a_folder_that_cannot_be_written(
    tmp_path: Path, tiny_llama: Path, chat_file: Path, small_disk
) -> None:
    """A read-only output folder is refused before anything is read, also for root."""
    disk = small_disk("size=3m")
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    for folder in (disk, disk / "run"):
        config = write_config(
            tmp_path / "c.yaml", **settings(tiny_llama, chat_file), output_dir=str(folder)
        )
        done = run_forked("train", config)
        assert done.returncode == 2
        assert f"output_dir {folder}" in done.stderr
        assert "rows" not in done.stdout
