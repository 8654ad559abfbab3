"""The command line: its commands, and the end of the process with the right exit code.

The module of a command is imported when the command runs: `--help` loads no library in vain.
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Sequence

from qlora_dist import __version__
from qlora_dist.errors import EXIT_RESUME, ConfigError, Stopped
from qlora_dist.metrics import streams
from qlora_dist.run.failure import exit_code_after, tell_launcher

COMMANDS = {
    "train": "train a model as a YAML file says",
    "data": "tell what a run's data are like, and show samples",
    "generate": "answer a prompt, or chat, with a trained adapter",
    "quantize": "write a model in 4 bits, to load it without quantizing",
    "demo": "the whole story on a small real model, on this machine",
}
"""Modules of `commands/`, each with a function `main(arguments)`, and their lines in the usage."""

USAGE = """\
usage: qlora-dist COMMAND [ARGUMENTS]

Fine-tunes LoRA adapters on a 4-bit base model that is sharded over all GPUs.

commands:
{commands}

`qlora-dist COMMAND --help` explains one. With several processes, put a launcher in front:
  accelerate launch --config_file launch/FILE.yaml -m qlora_dist train CONFIG.yaml
  torchrun --nproc-per-node N -m qlora_dist train CONFIG.yaml
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command and exit.

    Exit codes: 0 done; 1 a crash, with its traceback; 2 the input cannot be used, with one message
    and no traceback; 75 stopped on request and ready to go on; 130 interrupted.
    """
    argv = list(sys.argv[1:] if arguments is None else arguments)
    # Let blocks of GPU memory grow, so that gathered layers leave no gaps. torch reads the variable
    # when it loads. A value that the user has set stays, under either name.
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    try:
        if not argv or argv[0] in ("-h", "--help", "help"):
            lines = [f"  {name:<10} {text}" for name, text in COMMANDS.items()]
            sys.stdout.write(USAGE.format(commands="\n".join(lines)))
        elif argv[0] in ("-V", "--version"):
            sys.stdout.write(f"qlora-dist {__version__}\n")
        elif argv[0] in COMMANDS:
            importlib.import_module(f"qlora_dist.commands.{argv[0]}").main(argv[1:])
            _leave(0)
        else:
            hint = f"The commands are {', '.join(COMMANDS)}."
            for name in difflib.get_close_matches(argv[0], COMMANDS, n=1):
                hint = f"Did you mean {name}?"
            raise ConfigError(f"unknown command {argv[0]!r}. {hint}")
    except Stopped as stopped:
        tell_launcher(
            f"stopped ({stopped}) with a checkpoint: nothing failed, and the same command goes on "
            "from there"
        )
        _leave(EXIT_RESUME)
    except BrokenPipeError:  # the reader, such as `head`, has ended
        # The interpreter flushes stdout at exit, which would fail once more and print that.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        streams.write(sys.stderr, "stopped\n")
        sys.exit(130)
    except Exception as error:  # noqa: BLE001 - reported, with a traceback unless it is a mistake
        _leave(exit_code_after(error))


def _leave(exit_code: int) -> None:
    """End this process; as one of several, at once and without any cleanup of the interpreter."""
    streams.flush(sys.stdout)
    streams.flush(sys.stderr)
    # Other processes may still wait in a collective with this one. And a gloo process on the
    # interpreter's ordinary way out sometimes aborts ("terminate called without an active
    # exception"), which turns a finished run into a failed one.
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        os._exit(exit_code)
    sys.exit(exit_code)
