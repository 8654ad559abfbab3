"""Command `train`: a training run with the settings of a YAML file."""

# Tested by tests/e2e/test_bad_input.py and tests/e2e/test_help.py.

from __future__ import annotations

import faulthandler
import sys
from typing import Any

from qlora_dist.commands.startup import check_sources, loading_libraries
from qlora_dist.config.load import load_config
from qlora_dist.config.schema import Source, TrainConfig
from qlora_dist.run.launcher import watch_launcher


def main(argv: list[str]) -> None:
    """Train as CONFIG.yaml says."""
    if not argv or argv[0] in ("-h", "--help"):
        _show_help()
        return
    watch_launcher()
    config = load_config(argv[0], argv[1:])
    from qlora_dist.weights.files import looks_like_hub_name, resolve_model_folder

    check_sources(config)
    if not looks_like_hub_name(config.model.path):
        resolve_model_folder(config.model.path)
    # Print the stack at a fatal signal, such as SIGBUS when a mapped weight file shrinks.
    faulthandler.enable()
    with loading_libraries(sys.stdout):
        from qlora_dist.train import train

    train(config)


def _show_help() -> None:
    """Print every key with its type, default and meaning, from the dataclasses."""
    import tyro
    from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

    registry = ConstructorRegistry()

    # For lists of dataclasses and optional mappings tyro would make subcommands.
    in_yaml = (
        (str | tuple[Source, ...], "STR|[STR|{path: STR, weight: FLOAT}, ...]"),
        (dict[str, Any] | None, "{NAME: VALUE, ...}|None"),
    )

    @registry.primitive_rule
    def one_value(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
        """Show settings that are written as lists or mappings as one value."""
        metavar = next((metavar for hint, metavar in in_yaml if info.type == hint), None)
        if metavar is None:
            return None
        return PrimitiveConstructorSpec(
            nargs=1,  # this and the conversions below are never used: only help is asked for
            metavar=metavar,
            instance_from_str=lambda words: words[0],
            is_instance=lambda value: True,
            str_from_instance=lambda value: [str(value)],
        )

    with registry:
        tyro.cli(
            TrainConfig,
            args=["--help"],
            prog="qlora-dist train CONFIG.yaml",
            description="Train as CONFIG.yaml says. Every key of the file can also be given here "
            "as --section.key VALUE (VALUE in YAML: true, null, 2e-4, [a, b]); defaults < file < "
            "command line.",
            config=(tyro.conf.FlagConversionOff,),
            use_underscores=True,
        )
