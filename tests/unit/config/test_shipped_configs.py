"""Every YAML file of the repository can be used unchanged."""

import re
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from qlora_dist.config.load import load_config
from qlora_dist.config.schema import flatten
from tests.support.command import ROOT


@pytest.mark.parametrize("file", sorted(ROOT.glob("configs/*.yaml")), ids=lambda file: file.name)
def test_run_file_is_complete(file: Path) -> None:
    """A run file passes all checks, sets every key, and opens with the command that runs it."""
    config = load_config(file)
    text = yaml.safe_load(file.read_text())
    keys = {
        key if not isinstance(value, dict) else f"{key}.{leaf}"
        for key, value in text.items()
        for leaf in (value if isinstance(value, dict) else [None])
    }
    assert keys == set(flatten(config))
    first_line = file.read_text().splitlines()[0]
    assert "train" in first_line
    assert f"configs/{file.name}" in first_line


@pytest.mark.parametrize("file", sorted(ROOT.glob("[cl][oa]*/*.yaml")), ids=lambda file: file.name)
def test_files_named_in_a_comment_are_there(file: Path) -> None:
    """The command at the top of a file names existing files: it can be copied."""
    for name in re.findall(r"\b(?:configs|launch)/\w+\.yaml", file.read_text()):
        assert (ROOT / name).is_file(), name


@pytest.mark.parametrize("file", sorted(ROOT.glob("launch/*.yaml")), ids=lambda file: file.name)
def test_launch_file_is_accepted_by_accelerate(file: Path) -> None:
    """Accelerate reads a launch file, and the file chooses no backend of its own."""
    launch = load_config_from_file(str(file))
    assert launch.num_processes >= 1
    assert launch.distributed_type in ("NO", "MULTI_GPU")
    assert "accelerate launch" in file.read_text().split("\ncompute_environment")[0]
