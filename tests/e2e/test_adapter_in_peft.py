"""The saved adapter is an ordinary PEFT adapter: stock transformers gives this program's logits."""

import dataclasses
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qlora_dist.build import load_trained
from qlora_dist.config.load import load_config
from qlora_dist.metrics.console import Reporter
from qlora_dist.run.adapter_folder import read_adapter_record
from qlora_dist.runtime.processes import start_runtime
from qlora_dist.train import train
from tests.support.command import run_command, run_rows, write_config
from tests.support.models import mend_bitsandbytes


def config_of_run(root: Path, model: Path, data: Path, adapter: dict, max_steps: int) -> Path:
    """Write the config file of a float32 run with a held-out part; it writes to `root`/out."""
    return write_config(
        root / "config.yaml",
        output_dir=str(root / "out"),
        model={"path": str(model), "dtype": "float32"},
        adapter=adapter,
        data={"train": str(data), "eval_fraction": 0.2, "max_seq_len": 96},
        optim={"max_steps": max_steps, "lr": 1e-2, "micro_batch_size": 2},
    )


@pytest.fixture(scope="module", params=[False, True], ids=["lora", "dora"])
def run(request, tmp_path_factory, tiny_llama: Path, chat_file: Path) -> Path:
    """A run over two processes."""
    root = tmp_path_factory.mktemp("run")
    adapter = {"rank": 4, "alpha": 8, "use_dora": request.param}
    done = run_command(
        "train", config_of_run(root, tiny_llama, chat_file, adapter, max_steps=6), processes=2
    )
    assert done.returncode == 0, done.stderr
    return root / "out"


def test_stock_peft_gives_the_same_logits(run: Path, tiny_llama: Path, tokenizer) -> None:
    """Our logits, to 1e-3 in float32, are those of the adapter on a stock 4-bit transformers model.

    It is loaded with `PeftModel.from_pretrained`, and its logits are not the base model's.
    """
    ids = tokenizer("the quick brown fox jumps over the lazy dog", return_tensors="pt").input_ids
    runtime = start_runtime(seed=0, dtype="float32")
    reporter = Reporter(is_main=False)
    ours, _ = load_trained(
        run / "adapter", read_adapter_record(run / "adapter"), runtime=runtime, reporter=reporter
    )
    mend_bitsandbytes()
    stock_base = AutoModelForCausalLM.from_pretrained(
        tiny_llama,
        dtype=torch.float32,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        ),
    )
    with torch.no_grad():
        base_logits = stock_base.train()(
            ids
        ).logits  # train: in eval mode bitsandbytes uses a lossier CPU kernel
        stock_logits = PeftModel.from_pretrained(stock_base, run / "adapter").train()(ids).logits
        our_logits = ours(input_ids=ids).logits
    assert (our_logits - stock_logits).abs().max() <= 1e-3
    assert (base_logits - stock_logits).abs().max() > 1e-2


def test_evaluation_improved_and_is_reproduced(run: Path) -> None:
    """The run's evaluation rows are at its first and last step, and training lowered the loss."""
    rows = [row for row in run_rows(run) if "eval_loss" in row]
    assert [row["step"] for row in rows] == [0, 6]
    assert rows[1]["eval_loss"] < rows[0]["eval_loss"] - 0.1


def test_a_run_continues_from_an_adapter(
    run: Path, tmp_path: Path, tiny_llama: Path, chat_file: Path
) -> None:
    """A run from an adapter begins with the last evaluation of the run that made the adapter.

    It has another number of ranks, takes the adapter's settings, and improves from there.
    """
    before = [row for row in run_rows(run) if "eval_loss" in row][-1]["eval_loss"]
    continued = {"path": str(run / "adapter")}
    train(load_config(config_of_run(tmp_path, tiny_llama, chat_file, continued, max_steps=3)))
    folder = tmp_path / "out"
    first, last = (row["eval_loss"] for row in run_rows(folder) if "eval_loss" in row)
    assert first == pytest.approx(before, rel=1e-6)
    assert last < first
    there, here = (load_config(each / "config.yaml").adapter for each in (run, folder))
    assert dataclasses.replace(here, path=None, target_modules="all-linear") == there
    assert read_adapter_record(folder / "adapter") == read_adapter_record(run / "adapter")


def test_generate_answers(run: Path) -> None:
    """`generate` loads base and adapter and prints an answer to standard output alone."""
    done = run_command(
        "generate", "--adapter", run / "adapter", "--prompt", "the quick", "--max_new_tokens", "4"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert "base model" in done.stderr
