"""When one process fails, all end soon, and the reason is printed once."""

import os
import shutil
import signal
import time
from pathlib import Path
from unittest import mock

import pytest
import torch

from qlora_dist import train as train_module
from qlora_dist.run.checkpoint import complete_steps
from tests.support.command import run_command, write_config
from tests.support.interrupted import children, rank_pid, settings, start, wait_for
from tests.support.processes import run_on_processes
from tests.support.training import train_here


def endless_settings(root: Path, model: Path, data: Path) -> dict:
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
    config = endless_settings(tmp_path, tiny_llama, chat_file)
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
    config = write_config(
        tmp_path / "config.yaml", **endless_settings(tmp_path, tiny_llama, chat_file)
    )
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
        write_config(tmp_path / "c.yaml", **endless_settings(tmp_path, model, chat_file)),
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
        write_config(
            tmp_path / "config.yaml", **endless_settings(tmp_path, slow_to_load, chat_file)
        ),
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
    config = endless_settings(tmp_path, model, chat_file)
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


def hang_on_one_rank(folder: Path, run: dict) -> None:
    micro_step = train_module.micro_step
    num_done = 0

    def sleepy_micro_step(*arguments):
        nonlocal num_done
        num_done += 1
        if num_done == 7 and os.environ["RANK"] == "1":
            time.sleep(1000)
        return micro_step(*arguments)

    log = os.open(folder.with_name(f"rank-{os.environ['RANK']}.txt"), os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 2)
    with mock.patch.object(train_module, "micro_step", sleepy_micro_step):
        train_here(folder, run)


def innermost_frame(report: str) -> str:
    """Innermost frame of the thread that trains, in a dump of all threads."""
    [stack] = [block for block in report.split("Thread 0x") if "in train_here" in block]
    return stack.splitlines()[1]


def test_a_rank_that_hangs(tmp_path: Path, tiny_llama: Path, chat_file: Path) -> None:
    """When one rank hangs, every rank ends after the timeout with the stacks of its threads: the
    culprit's shows the place, the other's shows a collective."""
    run = settings(tiny_llama, chat_file)
    run["parallel"] = {"backend": "fsdp", "hang_timeout_seconds": 8}
    started = time.monotonic()
    with pytest.raises(Exception, match="terminated with exit code 1"):
        run_on_processes(hang_on_one_rank, 2, tmp_path / "run", run)
    assert time.monotonic() - started < 60
    culprit = (tmp_path / "rank-1.txt").read_text()
    assert "[rank 1] no progress for 8 seconds (parallel.hang_timeout_seconds)" in culprit
    assert innermost_frame(culprit).endswith("in sleepy_micro_step")
    other = (tmp_path / "rank-0.txt").read_text()
    assert "[rank 0] no progress for 8 seconds" in other
    assert "torch/distributed" in innermost_frame(other)
    assert complete_steps(tmp_path / "run" / "checkpoints") == [3]


def test_a_rank_that_computes_something_else(
    tmp_path: Path, tiny_llama: Path, chat_file: Path
) -> None:
    """One flipped bit in one rank's copy of the adapter is noticed at the next check and never
    saved."""
    run = settings(tiny_llama, chat_file)
    run["parallel"] = {"backend": "ddp", "check_every": 1}
    run_on_processes(flip_one_bit, 2, tmp_path / "run", run)
    message = (tmp_path / "message").read_text()
    assert "after step 5 the ranks no longer agree on" in message
    assert ".layers.1.mlp.up_proj.lora_B" in message
    assert complete_steps(tmp_path / "run" / "checkpoints") == [3, 4]


def flip_one_bit(folder: Path, run: dict) -> None:
    import torch

    from qlora_dist.errors import TrainingError
    from qlora_dist.model.adapters import adapter_parameters

    train_step = train_module.train_step
    num_steps = 0

    def faulty(model, *arguments):
        nonlocal num_steps
        sums = train_step(model, *arguments)
        num_steps += 1
        if num_steps == 5 and os.environ["RANK"] == "1":
            for name, param in adapter_parameters(model).items():
                if ".layers.1.mlp.up_proj.lora_B" in name:
                    param.data.view(-1)[3:4].view(torch.int32).bitwise_xor_(1)
        return sums

    with (
        mock.patch.object(train_module, "train_step", faulty),
        pytest.raises(TrainingError) as error,
    ):
        train_here(folder, run)
    if os.environ["RANK"] == "0":
        folder.with_name("message").write_text(str(error.value))
