"""`qlora-dist data` on a real folder: a page, the facts as JSON, and agreement with a run."""

import json
from pathlib import Path

import pytest

from qlora_dist.data.report import Report
from tests.support.command import run_command, run_rows, write_config
from tests.support.training import train_here


@pytest.fixture
def settings(tmp_path: Path, tiny_llama: Path, chat_file: Path) -> dict:
    """Return the settings of a run of one epoch over packed rows."""
    return {
        "output_dir": str(tmp_path / "out"),
        "model": {"path": str(tiny_llama)},
        "data": {
            "train": str(chat_file),
            "eval_fraction": 0.25,
            "max_seq_len": 200,
            "packing": True,
        },
        "optim": {"micro_batch_size": 2, "epochs": 1},
        "logging": {"tensorboard": False},
        "checkpoint": {"every": None},
    }


def test_the_page(tmp_path: Path, settings: dict, tiny_llama: Path) -> None:
    """The page is plain text of at most 80 columns on standard output; standard error is empty.

    The command needs no weights, takes the overrides of `train`, and writes no run.
    """
    (folder := tmp_path / "no-weights").mkdir()
    for file in tiny_llama.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    settings["model"]["path"] = str(folder)
    file = write_config(tmp_path / "config.yaml", **settings)
    done = run_command(
        "data", file, "--show", 2, "--data.packing", "false", "--optim.micro-batch-size=4"
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "48 rows of format messages → 48 samples" in done.stdout
    assert "36 samples, " in done.stdout
    assert "12 samples, " in done.stdout
    assert "micro_batch_size 4 x grad_accum_steps 1 x 1 process = 4 rows a step" in done.stdout
    assert "▸ one sample a row" in done.stdout
    assert "2 of 2: " in done.stdout
    assert "⟦" in done.stdout
    assert "\x1b" not in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert not Path(settings["output_dir"]).exists()


def test_json_agrees_with_the_run(
    tmp_path: Path, settings: dict, capsys: pytest.CaptureFixture[str]
) -> None:
    """Standard output is the JSON object alone, and a run agrees with it.

    The run describes its data in equal words, takes as many steps, and counts as many tokens
    and targets.
    """
    done = run_command("data", write_config(tmp_path / "config.yaml", **settings), "--json")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert train_here(Path(settings["output_dir"]), settings)
    log = capsys.readouterr().out

    [source] = facts["sources"]
    assert Report.from_json(source["report"]).sentence(settings["data"]["max_seq_len"]) in log
    assert f"held out {facts['eval']['num_samples']} of 48 rows for evaluation" in log
    packed = next(batching for batching in facts["batchings"] if batching["is_configured"])
    assert f"packed {facts['train']['num_samples']} samples into {packed['num_rows']} rows" in log
    assert f"{facts['run']['num_steps']} steps of {facts['run']['num_rows_per_step']} rows" in log
    steps = [row for row in run_rows(Path(settings["output_dir"])) if "loss" in row]
    assert len(steps) == facts["run"]["num_steps"] == packed["num_steps"]
    assert (
        sum(row["num_tokens"] for row in steps)
        == facts["train"]["num_tokens"]
        == packed["num_tokens"]
    )
    assert sum(row["num_target_tokens"] for row in steps) == facts["train"]["num_targets"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--show", "-1"], "--show is -1, but must be at least 0."),
        (["--optim.lrr", "1"], "unknown key optim.lrr. Did you mean optim.lr?"),
        (["--data.train", "no-such.jsonl"], "data.train no-such.jsonl does not exist."),
    ],
)
def test_mistakes_are_explained(
    tmp_path: Path, settings: dict, arguments: list[str], message: str
) -> None:
    """A mistake gives one message and exit code 2, as with every command."""
    done = run_command("data", write_config(tmp_path / "config.yaml", **settings), *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {message}")
    assert len(done.stderr.splitlines()) == 1
