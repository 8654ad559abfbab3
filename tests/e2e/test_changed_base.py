"""An adapter whose base model's files have changed since is used, and the log says so."""

import json
import shutil
from pathlib import Path

from tests.support.command import run_forked, write_config

NOTE = "its files are not those that the adapter"


def test_other_files_of_the_base_are_said(tmp_path: Path, run: dict) -> None:
    """Continuing and generating name the folder once its config.json or weights differ, and do not
    while they are the same."""
    base = Path(shutil.copytree(run["model"]["path"], tmp_path / "base"))
    run["model"]["path"] = str(base)
    assert run_forked("train", write_config(tmp_path / "c.yaml", **run)).returncode == 0
    adapter = tmp_path / "out" / "adapter"

    def said(number: int) -> list[str]:
        again = {**run, "output_dir": str(tmp_path / f"again-{number}")}
        again["adapter"] = {**run["adapter"], "path": str(adapter)}
        trained = run_forked("train", write_config(tmp_path / f"{number}.yaml", **again))
        asked = ("--adapter", str(adapter), "--prompt", "dog", "--max-new-tokens", "1")
        generated = run_forked("generate", *asked)
        assert trained.returncode == generated.returncode == 0, trained.stderr + generated.stderr
        return [trained.stdout + trained.stderr, generated.stdout + generated.stderr]

    assert all(NOTE not in text for text in said(0))
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.1}))
    assert all(NOTE in text for text in said(1))
