"""Fixtures of several unit tests."""

from pathlib import Path

import pytest
import yaml

from tests.support.settings import REQUIRED


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    """Config file with the required keys only."""
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(REQUIRED))
    return path
