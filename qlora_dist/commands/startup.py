"""Start of a command: its options, and its heavy imports once its settings are known to be good."""

# Tested by tests/unit/test_cli.py and tests/e2e/test_help.py.

from __future__ import annotations

import logging
import os
import warnings
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

if TYPE_CHECKING:
    from qlora_dist.config.schema import TrainConfig

_Options = TypeVar("_Options")


def parse(
    options: type[_Options], argv: list[str], prog: str, positional: bool = False
) -> _Options:
    """Read a command's options.

    Args:
        positional: options without a default are given by their position instead of their name.
    """
    import tyro

    config = [tyro.conf.FlagCreatePairsOff] + [tyro.conf.PositionalRequiredArgs] * positional
    return tyro.cli(options, args=argv, prog=prog, config=config, use_underscores=True)


def parse_known(options: type[_Options], argv: list[str], prog: str) -> tuple[_Options, list[str]]:
    """Read a command's options; returns them and all other arguments, in their order."""
    import tyro

    config = (tyro.conf.FlagCreatePairsOff,)
    return tyro.cli(
        options, args=argv, prog=prog, config=config, use_underscores=True, return_unknown_args=True
    )


def option_named(name: str) -> Any:
    """Return the annotation that makes help call an option `name`."""
    # Annotations are text until tyro evaluates them: only then is tyro imported.
    import tyro

    return tyro.conf.arg(metavar=name)


def check_sources(config: TrainConfig) -> None:
    """Refuse data files that are missing or on both sides, before libraries load, for seconds."""
    from qlora_dist.data import sources

    sources.check_sources([s.path for s in config.data.sources], config.data.eval_files)


def loading_libraries(file: TextIO) -> AbstractContextManager[object]:
    """Return a context that shows progress during a command's imports.

    They take up to half a minute on a busy machine.
    """
    from qlora_dist.metrics.console import Reporter

    quiet_third_parties()
    return Reporter(os.environ.get("RANK", "0") == "0", file=file).working("loading libraries")


def quiet_third_parties() -> None:
    """Silence banners, progress bars and deprecation warnings of libraries not yet imported."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # At "error" datasets logs, at length, the errors that it then raises.
    os.environ.setdefault("DATASETS_VERBOSITY", "critical")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    # Devices of NVIDIA, AMD, Intel and WSL. Without any, DeepSpeed would warn that it found no GPU.
    if not any(os.path.exists(f"/dev/{name}") for name in ("nvidiactl", "kfd", "dri", "dxg")):
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    warnings.filterwarnings("ignore")
    for name in ("bitsandbytes", "accelerate", "peft", "torch.distributed", "datasets", "root"):
        logging.getLogger(name).setLevel(logging.ERROR)
