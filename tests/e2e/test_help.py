"""Help is there at once: it imports nothing heavy."""

import resource
import statistics
import subprocess
import sys

import pytest

from tests.support.command import run_command


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["data", "--help"]])
def test_help_takes_less_than_half_a_second(arguments: list[str]) -> None:
    """Median of five runs, the interpreter's start included; processor time, which a busy machine does not change."""
    seconds = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert run_command(*arguments).returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
    assert statistics.median(seconds) < 0.5


def test_help_and_config_errors_import_no_torch() -> None:
    """Neither the help nor a refused setting waits for torch."""
    code = (
        "import sys; from qlora_dist.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'transformers', 'datasets', 'peft'} & sys.modules.keys()"
    )
    for arguments in (
        ["train", "--help"],
        ["train", "no-such.yaml"],
        ["data", "--help"],
        ["generate", "--help"],
        ["quantize", "--help"],
    ):
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_help_names_every_key() -> None:
    """`train --help` lists each config key with its section."""
    from qlora_dist.config import TrainConfig, flatten

    text = run_command("train", "--help").stdout
    for key in flatten(TrainConfig()):
        assert f"--{key} " in text, key
