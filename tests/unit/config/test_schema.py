"""The configuration as Python objects."""

import dataclasses
import subprocess
import sys

import pytest

from qlora_dist.config.schema import DataConfig, Source
from tests.support.settings import MINIMAL


def test_one_file_and_several_look_alike_to_their_readers() -> None:
    """`sources` and `eval_files` are tuples, however the configuration was written."""
    assert DataConfig(train="a").sources == (Source("a", 1.0),)
    assert DataConfig(train=(Source("a", 2.0), Source("b"))).sources == (
        Source("a", 2.0),
        Source("b"),
    )
    files = [DataConfig(train="a", eval=value).eval_files for value in (None, "e", ("e", "f"))]
    assert files == [(), ("e",), ("e", "f")]


def test_every_section_is_frozen() -> None:
    """A running program cannot change its own settings."""
    for name, value in [("config", MINIMAL), *vars(MINIMAL).items()]:
        if dataclasses.is_dataclass(value):
            first = dataclasses.fields(value)[0].name
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(value, first, None)
        else:
            assert name in ("output_dir", "seed")


def test_bad_settings_are_refused_without_loading_a_library() -> None:
    """Modules of configuration and command line import neither torch nor transformers nor peft."""
    heavy = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "datasets")
    code = (
        "import sys, qlora_dist.config.load, qlora_dist.cli; "
        f"print([m for m in {heavy} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
