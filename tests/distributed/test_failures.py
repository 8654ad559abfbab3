"""When one process fails, all end soon, and the reason is printed once."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.support.command import ROOT, run_command, write_config


def settings(root: Path, model: Path, data: Path) -> dict:
    """Settings of a run of two processes that would last for minutes."""
    return {
        "output_dir": str(root / "out"),
        "model": {"path": str(model)},
        "data": {"train": str(data), "packing": False},
        "optim": {"max_steps": 100_000},
        "logging": {"tensorboard": False},
    }


def test_a_fault_that_one_rank_meets_is_said_once(
    tmp_path: Path, tiny_llama: Path, chat_file: Path
) -> None:
    """Data that the first process cannot use end both processes with one message, which the
    launcher repeats as the cause."""
    config = settings(tmp_path, tiny_llama, chat_file)
    config["data"]["max_seq_len"] = 2
    started = time.monotonic()
    done = run_command("train", write_config(tmp_path / "config.yaml", **config), processes=2)
    assert done.returncode != 0
    assert time.monotonic() - started < 60
    assert done.stderr.count("error: [rank 0]") == 1
    assert "[rank 1]" not in done.stderr
    assert "Root Cause" in done.stderr
    assert (
        done.stderr.count("none of its 48 rows has a target token") == 2
    )  # ours, and the launcher's
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_takes_the_others_along(
    tmp_path: Path, tiny_llama: Path, chat_file: Path, victim: int
) -> None:
    """SIGKILL of one process during training ends the others within a minute; the launcher names
    rank and signal."""
    config = write_config(tmp_path / "config.yaml", **settings(tmp_path, tiny_llama, chat_file))
    process, log = start(config, tmp_path)
    try:
        wait_for(lambda: "step 2/" in log.read_text(), process, log)
        os.kill(rank_pid(process.pid, victim), signal.SIGKILL)
        process.wait(timeout=60)
    finally:
        process.kill()
    assert process.returncode != 0
    assert f"rank      : {victim}" in log.read_text()
    assert "SIGKILL" in log.read_text()
    assert not children(process.pid)


def start(config: Path, root: Path) -> tuple[subprocess.Popen[bytes], Path]:
    """Start `train` on two processes in the background, writing to a log file."""
    log = root / "log.txt"
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(ROOT / "launch" / "cpu_2.yaml"),
        "--main_process_port",
        "0",
        "-m",
        "qlora_dist",
        "train",
        str(config),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with log.open("wb") as out:
        return subprocess.Popen(command, stdout=out, stderr=out, cwd=ROOT, env=environment), log


def wait_for(condition, process: subprocess.Popen, log: Path, seconds: float = 120) -> None:
    """Poll until the condition holds; fail if the run ends before."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)


def children(pid: int) -> list[int]:
    """Process ids of the direct children of `pid` that are still running."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            found.append(int(status.parent.name))
    return found


def rank_pid(launcher: int, rank: int) -> int:
    """Process id of rank `rank`."""
    for pid in children(launcher):
        if f"RANK={rank}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            return pid
    raise AssertionError(f"no process of rank {rank}")


def test_weights_that_only_one_rank_finds_broken(
    tmp_path: Path, tiny_llama: Path, chat_file: Path
) -> None:
    """A weight file that was cut off after the index was written is refused by name before
    training."""
    model = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-500])
    done = run_command(
        "train",
        write_config(tmp_path / "c.yaml", **settings(tmp_path, model, chat_file)),
        processes=2,
    )
    assert done.returncode != 0
    assert done.stderr.count("error: ") == 1
    assert "model.safetensors" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def slow_to_load(tmp_path_factory, tokenizer) -> Path:
    """A random Llama of 150M parameters: quantizing it takes two processes some seconds."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=12,
        num_attention_heads=16,
        max_position_embeddings=256,
    )
    folder = tmp_path_factory.mktemp("slow-to-load")
    with torch.device("meta"):
        skeleton = LlamaForCausalLM(config).to(torch.bfloat16)
    skeleton.to_empty(device="cpu")
    for param in skeleton.parameters():
        torch.nn.init.normal_(param, std=0.02)
    skeleton.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_dies_while_loading(
    tmp_path: Path, slow_to_load: Path, chat_file: Path, victim: int
) -> None:
    """SIGKILL of one process while the weights are read ends the others within a minute."""
    process, log = start(
        write_config(tmp_path / "config.yaml", **settings(tmp_path, slow_to_load, chat_file)),
        tmp_path,
    )
    try:
        wait_for(
            lambda: "% of them targets" in log.read_text(), process, log
        )  # the line before the weights
        os.kill(rank_pid(process.pid, victim), signal.SIGKILL)
        process.wait(timeout=60)
    finally:
        process.kill()
    text = log.read_text()
    assert "base model: this rank read" not in text
    assert process.returncode != 0
    assert "SIGKILL" in text
    assert f"rank      : {victim}" in text
    assert not (tmp_path / "out").exists()


def test_weights_that_vanish_while_they_are_read(
    tmp_path: Path, slow_to_load: Path, chat_file: Path
) -> None:
    """A weight file that is truncated while it is read ends all processes within a minute, with the
    place in the code."""
    model = Path(shutil.copytree(slow_to_load, tmp_path / "model"))
    config = settings(tmp_path, model, chat_file)
    process, log = start(write_config(tmp_path / "config.yaml", **config), tmp_path)
    try:
        wait_for(lambda: "% of them targets" in log.read_text(), process, log)
        os.truncate(model / "model.safetensors", 4096)
        process.wait(timeout=60)
    finally:
        process.kill()
    text = log.read_text()
    assert "base model: this rank read" not in text
    assert process.returncode != 0
    assert "Bus error" in text or "not a readable safetensors file" in text
    assert not (tmp_path / "out").exists()
