"""A run that would succeed, for tests that spoil it."""

from pathlib import Path

import pytest


@pytest.fixture
def run(tmp_path: Path, tiny_llama: Path, chat_file: Path) -> dict:
    """Settings that would train for one step."""
    return {
        "output_dir": str(tmp_path / "out"),
        "model": {"path": str(tiny_llama), "dtype": "float32"},
        "adapter": {"rank": 2},
        "data": {
            "train": str(chat_file),
            "max_seq_len": 64,
            "packing": False,
            "cache_dir": str(tmp_path / "cache"),
        },
        "optim": {"max_steps": 1},
        "logging": {"tensorboard": False},
    }
