"""Settings for tests: the minimum of a run, and the messages with which others are refused."""

from pathlib import Path

import pytest

from qlora_dist.config.load import load_config
from qlora_dist.config.schema import DataConfig, ModelConfig, TrainConfig
from qlora_dist.errors import ConfigError

REQUIRED = {"output_dir": "out", "model": {"path": "m"}, "data": {"train": "t.jsonl"}}
MINIMAL = TrainConfig(
    output_dir="out", model=ModelConfig(path="m"), data=DataConfig(train="t.jsonl")
)


def refusal(path: Path, *overrides: str) -> str:
    """Message with which a config is refused."""
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value)
