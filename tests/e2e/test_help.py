"""Help is quick: it imports nothing heavy."""

import resource
import subprocess
import sys

import pytest

from tests.support.command import ROOT, run_command

LIGHT = {
    "qlora_dist",
    "tyro",
    "docstring_parser",
    "typeguard",
    "typing_extensions",
    "yaml",
    "cython_runtime",
}
"""Top-level modules that help may import: tyro, PyYAML and their imports."""

IMPORT_TYRO = ["-c", "import tyro"]


def processor_seconds(arguments: list[str]) -> float:
    """Return the processor time of one Python process, from its start to its end."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, *arguments], stdout=subprocess.DEVNULL, cwd=ROOT, check=False
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


@pytest.mark.parametrize(
    ("arguments", "limit"), [(["--help"], 1), (["data", "--help"], 3), (["train", "--help"], 6)]
)
def test_help_is_there_at_once(arguments: list[str], limit: float) -> None:
    """Help takes at most `limit` times as long as an interpreter that starts and imports tyro.

    That is 0.1 s on a quick machine, where the commands take 0.5, 1.6 and 3.4 times as long.
    Processor time, and the least of seven runs of each in turn, leave out most of the load of
    other programs.
    """
    seconds = [
        (processor_seconds(["-m", "qlora_dist", *arguments]), processor_seconds(IMPORT_TYRO))
        for _ in range(7)
    ]
    of_help, of_tyro = (min(column) for column in zip(*seconds, strict=True))
    assert of_help <= limit * of_tyro, f"{of_help:.2f} s beside {of_tyro:.2f} s"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["train", "--help"],
        ["train", "no-such.yaml"],
        ["data", "--help"],
        ["generate", "--help"],
        ["quantize", "--help"],
        ["demo", "--help"],
    ],
    ids=" ".join,
)
def test_help_and_config_errors_import_nothing_heavy(arguments: list[str]) -> None:
    """Help and refused settings import only modules that draw help and read YAML.

    In particular, neither torch nor numpy.
    """
    code = (
        "import sys; before = set(sys.modules); from qlora_dist.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "names = {name.partition('.')[0] for name in sys.modules.keys() - before}\n"
        "names -= sys.stdlib_module_names\n"
        "print('imported', *(name for name in names if not name.startswith('_')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    imported = done.stdout.splitlines()[-1].split()
    assert imported[0] == "imported"
    assert "qlora_dist" in imported
    assert not set(imported[1:]) - LIGHT


def test_help_names_every_key() -> None:
    """`train --help` lists each config key with its section."""
    from qlora_dist.config.schema import TrainConfig, flatten

    text = run_command("train", "--help").stdout
    for key in flatten(TrainConfig()):
        assert f"--{key} " in text, key
