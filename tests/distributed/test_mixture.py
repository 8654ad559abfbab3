"""Runs over several weighted files."""

import json
from pathlib import Path

import pytest

from tests.support.command import losses, run_ranks, run_rows, write_config


@pytest.fixture
def settings(tmp_path: Path, tiny_llama: Path, chat_file: Path) -> dict:
    """Settings of one epoch of 12 * 0.5 + 7 * 2 = 20 places, in batches of 6: three full steps and
    one of 2 rows."""
    rows = chat_file.read_text().splitlines(keepends=True)
    (tmp_path / "chat.jsonl").write_text("".join(rows[:12]))
    plain = [{"prompt": f"{i} and {i} is ", "completion": str(2 * i)} for i in range(7)]
    (tmp_path / "plain.jsonl").write_text("".join(json.dumps(row) + "\n" for row in plain))
    return {
        "model": {"path": str(tiny_llama), "dtype": "float32"},
        "adapter": {"dropout": 0.1},
        "data": {
            "train": [
                {"path": str(tmp_path / "chat.jsonl"), "weight": 0.5},
                {"path": str(tmp_path / "plain.jsonl"), "weight": 2},
            ],
            "packing": False,
            "group_by_length": True,
        },
        "optim": {"epochs": 1, "lr": 1e-2, "micro_batch_size": 1},
        "logging": {"tensorboard": False},
    }


@pytest.mark.parametrize("backend", ["ddp", "fsdp"])
def test_a_mixture_trains_alike_on_one_process_and_on_three(
    tmp_path: Path, settings: dict, backend: str
) -> None:
    """The same rows in the same steps, dropout included, with a last step in which one of three
    ranks has none.

    Relative difference as in test_equivalence.py: sums in another order, in float32.
    """
    runs = {}
    for name, processes, accum in (("single", 1, 6), (backend, 3, 2)):
        settings["output_dir"] = str(tmp_path / name)
        settings["optim"]["grad_accum_steps"] = accum
        settings["parallel"] = {"backend": name}
        config = write_config(tmp_path / f"{name}.yaml", **settings)
        for done in run_ranks("train", config, processes=processes):
            assert done.returncode == 0, done.stderr
        runs[name] = run_rows(tmp_path / name)
    one, three = runs["single"], runs[backend]
    assert [row["epoch"] for row in one] == pytest.approx([0.3, 0.6, 0.9, 1.0])
    for key in ("step", "epoch", "num_tokens", "num_target_tokens"):
        assert [row[key] for row in one] == [row[key] for row in three]
    assert losses(tmp_path / backend) == pytest.approx(losses(tmp_path / "single"), rel=1e-5)
