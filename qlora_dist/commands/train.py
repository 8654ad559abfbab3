"""Command `train`: a training run as a YAML file says."""

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
    # A signal such as SIGBUS (a weight file that shrinks while it is mapped) says where it struck.
    faulthandler.enable()
    with loading_libraries(sys.stdout):
        from qlora_dist.train import train

    train(config)


def _show_help() -> None:
    """Every key with its type, default and meaning, from the dataclasses; tyro draws it."""
    import tyro
    from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

    registry = ConstructorRegistry()

    @registry.primitive_rule
    def sources(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
        """A list of dataclasses is one value in YAML; tyro would make subcommands of it. It is shown, never parsed."""
        if info.type != str | tuple[Source, ...]:
            return None
        return PrimitiveConstructorSpec(
            nargs=1,
            metavar="STR|[STR|{path: STR, weight: FLOAT}, ...]",
            instance_from_str=lambda words: words[0],
            is_instance=lambda value: isinstance(value, (str, tuple)),
            str_from_instance=lambda value: [str(value)],
        )

    with registry:
        tyro.cli(
            TrainConfig,
            args=["--help"],
            prog="qlora-dist train CONFIG.yaml",
            description="Train as CONFIG.yaml says. Every key of the file can also be given here as --section.key "
            "VALUE (VALUE in YAML: true, null, 2e-4, [a, b]); defaults < file < command line.",
            config=(tyro.conf.FlagConversionOff,),
            use_underscores=True,
        )
