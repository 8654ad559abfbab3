"""A model with experts goes the whole way: data, training, resuming, answers, and stock peft."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from qlora_dist.build import load_trained
from qlora_dist.metrics.console import Reporter
from qlora_dist.run.adapter_folder import read_adapter_record
from qlora_dist.runtime.processes import start_runtime
from tests.support.command import run_forked, run_rows, write_config
from tests.support.expert_families import write_expert_family
from tests.support.models import dequantized_there


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tokenizer) -> Path:
    folder = write_expert_family("qwen3_moe", tmp_path_factory.mktemp("experts"))
    tokenizer.save_pretrained(folder)
    return folder


def test_the_whole_way(tmp_path: Path, model: Path, chat_file: Path, tokenizer) -> None:
    """Training learns and says what it is made of; the adapter answers here, and gives the same
    logits in stock peft on the same weights."""
    config = write_config(
        tmp_path / "c.yaml",
        output_dir=str(tmp_path / "run"),
        model={"path": str(model), "dtype": "float32"},
        adapter={"rank": 4, "alpha": 8},
        data={"train": str(chat_file), "eval_fraction": 0.25, "max_seq_len": 96},
        optim={"max_steps": 6, "lr": 2e-3},
        logging={"tensorboard": False},
    )
    done = run_forked("train", config)
    assert done.returncode == 0, done.stderr
    rows = [row["eval_loss"] for row in run_rows(tmp_path / "run") if "eval_loss" in row]
    assert rows[-1] < rows[0]
    steps = [row for row in run_rows(tmp_path / "run") if "loss" in row]
    # Each token goes through two of eight experts in each of two layers, padding too.
    assert all(8 * row["expert_tokens_mean"] >= 2 * row["num_tokens"] for row in steps)
    assert all(
        row["expert_tokens_least"] <= row["expert_tokens_mean"] <= row["expert_tokens_most"]
        for row in steps
    )
    assert "gate_proj, up_proj (peft takes its name for one of experts)" in done.stdout
    shares = json.loads((tmp_path / "run" / "inventory.json").read_text())["model"]["shares"]
    (experts,) = (share for share in shares if share["what"] == "experts")
    assert experts["dtype"] == "nf4"
    assert experts["num_parameters"] == 2 * 8 * 3 * 64 * 48
    adapter = tmp_path / "run" / "adapter"
    tensors = load_file(adapter / "adapter_model.safetensors")
    assert sum("experts" in name for name in tensors) == 2 * 4

    ids = tokenizer("the quick brown fox", return_tensors="pt").input_ids
    runtime, reporter = start_runtime(seed=0, dtype="float32"), Reporter(is_main=False)
    ours, _ = load_trained(
        adapter, read_adapter_record(adapter), runtime=runtime, reporter=reporter
    )
    stock = PeftModel.from_pretrained(dequantized_there(ours, model), adapter).eval()
    with torch.no_grad():
        expected = stock(input_ids=ids).logits
        assert (ours(input_ids=ids).logits - expected).abs().max() <= 1e-4
        base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        assert (base(input_ids=ids).logits - expected).abs().max() > 1e-2
    said = run_forked("generate", "--adapter", str(adapter), "--prompt", "the quick")
    assert said.returncode == 0, said.stderr
