"""Runs that several files compare with."""

from pathlib import Path

import pytest

from tests.support.interrupted import settings
from tests.support.processes import exit_code_of
from tests.support.training import train_here


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory, tiny_llama: Path, chat_file: Path) -> Path:
    """Folder of the run that nothing disturbs."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    assert exit_code_of(train_here, folder, settings(tiny_llama, chat_file)) == 0
    return folder
