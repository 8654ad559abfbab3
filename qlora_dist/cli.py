"""The commands. Heavy libraries are imported inside the command that needs them, after its settings were checked."""

from __future__ import annotations

import difflib
import faulthandler
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TextIO, TypeVar

from qlora_dist import __version__
from qlora_dist.errors import EXIT_RESUME, ConfigError, Stopped
from qlora_dist.metrics import streams
from qlora_dist.run.failure import exit_code_after, tell_launcher
from qlora_dist.run.launcher import watch_launcher

if TYPE_CHECKING:
    from qlora_dist.config.schema import TrainConfig


USAGE = """\
usage: qlora-dist COMMAND [ARGUMENTS]

Fine-tunes LoRA adapters on a 4-bit base model that is sharded over all GPUs.

commands:
{commands}

`qlora-dist COMMAND --help` explains one. With several processes, put a launcher in front:
  accelerate launch --config_file launch/FILE.yaml -m qlora_dist train CONFIG.yaml
  torchrun --nproc-per-node N -m qlora_dist train CONFIG.yaml
"""


def _shown_as(name: str) -> Any:
    """What help calls an option; annotations are evaluated when tyro reads them, so nothing is imported before."""
    import tyro

    return tyro.conf.arg(metavar=name)


@dataclass(frozen=True)
class GenerateOptions:
    """Answer a prompt, or chat, with the 4-bit base model and a trained adapter."""

    adapter: str
    """The adapter/ folder of a run, or any PEFT LoRA adapter."""
    prompt: str | None = None
    """Text to answer; without it, it is read from standard input."""
    chat: bool = False
    """Converse at the terminal; an empty line ends it."""
    max_new_tokens: int = 256
    """Longest answer in tokens."""
    temperature: float = 0.0
    """0 always takes the likeliest token; higher samples more freely."""


@dataclass(frozen=True)
class QuantizeOptions:
    """Write a model in 4 bits, so that it loads without quantising, here and in transformers."""

    model: Annotated[str, _shown_as("MODEL")]
    """Folder or hub name of a 16-bit model with safetensors weights."""
    out: Annotated[str, _shown_as("OUT")]
    """Folder to write, new or empty."""
    quantization: Literal["nf4", "fp4"] = "nf4"
    """4-bit data type."""
    double_quant: Literal["true", "false"] = "true"
    """Quantise the quantisation constants too (0.37 bits per parameter less)."""
    block_size: Literal[64, 128] = 64
    """Weights that share one quantisation constant."""


@dataclass(frozen=True)
class DemoOptions:
    """Fine-tune a real 135M chat model on this machine and show what it learned, in a few minutes."""

    output_dir: str = "runs/demo"
    """Folder of the run."""
    model: str | None = None
    """Another chat model to use: a folder or hub name."""
    minutes: float = 4.0
    """Time to train, its evaluations included: as many steps are taken as fit, 8 at least and 40 at most."""
    max_steps: int | None = None
    """Take so many optimizer steps, however long they take."""


@dataclass(frozen=True)
class DataOptions:
    """Tell what the data of CONFIG.yaml are like, and show samples as the model sees them. Loads no weights.

    Takes the same `--section.key VALUE` as `qlora-dist train`, and reads and tokenises the data as it does; what is
    tokenised is kept for it.
    """

    show: int = 3
    """Training samples to show, with what counts in the loss marked; with packing, rows of several samples."""
    json: bool = False
    """Write the same facts as one JSON object, without samples."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command and exit: 0 done, 2 the input cannot be used (one message, no traceback), 75 stopped on request
    and ready to go on."""
    argv = list(sys.argv[1:] if arguments is None else arguments)
    _choose_allocator()
    try:
        if not argv or argv[0] in ("-h", "--help", "help"):
            sys.stdout.write(USAGE.format(commands=_command_list()))
        elif argv[0] in ("-V", "--version"):
            sys.stdout.write(f"qlora-dist {__version__}\n")
        elif argv[0] in COMMANDS:
            COMMANDS[argv[0]](argv[1:])
            _leave(0)
        else:
            near = difflib.get_close_matches(argv[0], COMMANDS, n=1)
            hint = f"Did you mean {near[0]}?" if near else f"The commands are {', '.join(COMMANDS)}."
            raise ConfigError(f"unknown command {argv[0]!r}. {hint}")
    except Stopped as stopped:
        tell_launcher(f"stopped ({stopped}) with a checkpoint: nothing failed, and the same command goes on from there")
        _leave(EXIT_RESUME)
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        streams.write(sys.stderr, "stopped\n")
        sys.exit(130)
    except Exception as error:  # noqa: BLE001 - reported, with its traceback unless it is a user's mistake
        _leave(exit_code_after(error))


def _choose_allocator() -> None:
    """Let blocks of GPU memory grow, so that gathered layers leave no gaps; before torch loads.

    What the user has set stays, under either name of the variable.
    """
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


def _leave(exit_code: int) -> None:
    """End this process; one of several ends at once, without tearing anything down.

    Other processes may still wait in a collective with this one. And a gloo process that goes through the
    interpreter's ordinary exit sometimes aborts ("terminate called without an active exception"), which would turn a
    finished run into a failed one.
    """
    streams.flush(sys.stdout)
    streams.flush(sys.stderr)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        os._exit(exit_code)
    sys.exit(exit_code)


def train_command(argv: list[str]) -> None:
    """train a model as a YAML file says"""
    from qlora_dist.config.load import load_config

    if not argv or argv[0] in ("-h", "--help"):
        _show_train_help()
        return
    watch_launcher()
    config = load_config(argv[0], argv[1:])
    from qlora_dist.weights.files import looks_like_hub_name, resolve_model_folder

    _check_sources(config)
    if not looks_like_hub_name(config.model.path):
        resolve_model_folder(config.model.path)
    _quiet()
    # A signal such as SIGBUS (a weight file that shrinks while it is mapped) says where it struck.
    faulthandler.enable()
    with _loading_libraries(sys.stdout):
        from qlora_dist.train import train

    train(config)


def data_command(argv: list[str]) -> None:
    """tell what a run's data are like, and show samples"""
    from qlora_dist.config.load import load_config

    path, rest = (argv[0], argv[1:]) if argv and argv[0] not in ("-h", "--help") else ("", ["--help"])
    options, overrides = _parse_known(DataOptions, rest, "qlora-dist data CONFIG.yaml")
    if options.show < 0:
        raise ConfigError(f"--show is {options.show}, but must be at least 0.")
    config = load_config(path, overrides)
    _check_sources(config)
    _quiet()
    with _loading_libraries(sys.stderr):
        from qlora_dist.inspection.survey import survey

    survey(config, num_shown=options.show, as_json=options.json)


def _check_sources(config: TrainConfig) -> None:
    """Refuse data files that are not there, before anything slow is done."""
    from qlora_dist.data.sources import check_source

    for source in config.data.sources:
        check_source(source.path, "data.train")
    for path in config.data.eval_files:
        check_source(path, "data.eval")


def generate_command(argv: list[str]) -> None:
    """answer a prompt, or chat, with a trained adapter"""
    options = _parse(GenerateOptions, argv, "qlora-dist generate")
    if options.max_new_tokens < 1:
        raise ConfigError(f"--max_new_tokens is {options.max_new_tokens}, but must be at least 1.")
    if not 0 <= options.temperature < float("inf"):
        raise ConfigError(f"--temperature is {options.temperature}, but must be a number from 0 up.")
    if options.chat and options.prompt is not None:
        raise ConfigError("--chat and --prompt exclude each other. Leave one out.")
    _quiet()
    with _loading_libraries(sys.stderr):
        from qlora_dist.generation import generate

    generate(**vars(options))


def quantize_command(argv: list[str]) -> None:
    """write a model in 4 bits, to load it without quantising"""
    options = _parse(QuantizeOptions, argv, "qlora-dist quantize", positional=True)
    from qlora_dist.weights.files import check_new_folder, looks_like_hub_name, resolve_model_folder

    check_new_folder(Path(options.out))
    if not looks_like_hub_name(options.model):
        resolve_model_folder(options.model)
    _quiet()
    with _loading_libraries(sys.stdout):
        from qlora_dist.model.nf4 import QuantFormat
        from qlora_dist.weights.quantize import quantize

    fmt = QuantFormat(options.quantization, options.double_quant == "true", options.block_size)
    quantize(options.model, options.out, fmt)


def demo_command(argv: list[str]) -> None:
    """the whole story on a small real model, on this machine"""
    options = _parse(DemoOptions, argv, "qlora-dist demo")
    if options.max_steps is not None and options.max_steps < 1:
        raise ConfigError(f"--max_steps is {options.max_steps}, but must be at least 1.")
    if not 0 < options.minutes < float("inf"):
        raise ConfigError(f"--minutes is {options.minutes:g}, but must be a number greater than 0.")
    _quiet()
    from qlora_dist.commands.demo_run import demo

    demo(**vars(options))


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "train": train_command,
    "data": data_command,
    "generate": generate_command,
    "quantize": quantize_command,
    "demo": demo_command,
}


def _command_list() -> str:
    return "\n".join(f"  {name:<10} {command.__doc__}" for name, command in COMMANDS.items())


def _show_train_help() -> None:
    """Every key with its type, default and meaning, from the dataclasses; tyro draws it."""
    import tyro
    from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

    from qlora_dist.config.schema import Source, TrainConfig

    registry = ConstructorRegistry()

    @registry.primitive_rule
    def sources(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
        """A list of dataclasses is one value in YAML; tyro would make subcommands of it. It is shown, never parsed."""
        if info.type != str | tuple[Source, ...]:
            return None
        return PrimitiveConstructorSpec(
            nargs=1, metavar="STR|[STR|{path: STR, weight: FLOAT}, ...]", instance_from_str=lambda words: words[0],
            is_instance=lambda value: isinstance(value, (str, tuple)), str_from_instance=lambda value: [str(value)],
        )  # fmt: skip

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


_Options = TypeVar("_Options")


def _parse(options: type[_Options], argv: list[str], prog: str, positional: bool = False) -> _Options:
    """Read a command's options; with `positional`, those without a default are given by their place."""
    import tyro

    config = (tyro.conf.FlagCreatePairsOff, *((tyro.conf.PositionalRequiredArgs,) if positional else ()))
    return tyro.cli(options, args=argv, prog=prog, config=config, use_underscores=True)


def _parse_known(options: type[_Options], argv: list[str], prog: str) -> tuple[_Options, list[str]]:
    """Read a command's options among others; returns the others as well, in their order."""
    import tyro

    config = (tyro.conf.FlagCreatePairsOff,)
    return tyro.cli(options, args=argv, prog=prog, config=config, use_underscores=True, return_unknown_args=True)


def _loading_libraries(file: TextIO) -> AbstractContextManager[object]:
    """A context for a command's imports, which take up to half a minute on a busy machine."""
    from qlora_dist.metrics.console import Reporter

    return Reporter(os.environ.get("RANK", "0") == "0", file=file).working("loading libraries")


def _quiet() -> None:
    from qlora_dist.commands.noise import quiet_third_parties

    quiet_third_parties()
