"""Help is there at once: it imports nothing heavy."""

import statistics
import subprocess
import sys
import time

import pytest

from tests.support.command import run_command


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"]])
def test_help_takes_less_than_half_a_second(arguments: list[str]) -> None:
    """The median of five runs, the interpreter's own start included."""
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        done = run_command(*arguments)
        seconds.append(time.perf_counter() - started)
        assert done.returncode == 0
    assert statistics.median(seconds) < 0.5


def test_help_and_config_errors_import_no_torch() -> None:
    """Neither the help nor a refused setting waits for torch."""
    code = (
        "import sys; from qlora_dist.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'transformers', 'datasets', 'peft'} & sys.modules.keys()"
    )
    for arguments in (["train", "--help"], ["train", "no-such.yaml"], ["generate", "--help"], ["quantize", "--help"]):
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_help_names_every_key() -> None:
    """`train --help` lists each config key with its section."""
    from qlora_dist.config import TrainConfig, flatten

    text = run_command("train", "--help").stdout
    for key in flatten(TrainConfig()):
        assert f"--{key} " in text, key
