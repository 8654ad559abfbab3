"""Command `generate`: answers of the 4-bit base model with a trained adapter."""

# Tested by tests/unit/test_cli.py and tests/unit/test_generation.py.

from __future__ import annotations

import sys
from dataclasses import dataclass

from qlora_dist.commands.startup import loading_libraries, parse
from qlora_dist.errors import ConfigError


@dataclass(frozen=True)
class Options:
    """Answer a prompt, or chat, with the 4-bit base model and a trained adapter."""

    adapter: str
    """The adapter/ folder of a run, or any PEFT LoRA adapter."""
    prompt: str | None = None
    """Text to answer; without this option the text is read from standard input."""
    chat: bool = False
    """Converse at the terminal; an empty line ends it."""
    max_new_tokens: int = 256
    """Longest answer in tokens."""
    temperature: float = 0.0
    """0 always takes the likeliest token; higher values sample more freely."""


def main(argv: list[str]) -> None:
    """Answer a prompt, or chat."""
    options = parse(Options, argv, "qlora-dist generate")
    if options.max_new_tokens < 1:
        raise ConfigError(f"--max_new_tokens is {options.max_new_tokens}, but must be at least 1.")
    if not 0 <= options.temperature < float("inf"):
        raise ConfigError(
            f"--temperature is {options.temperature}, but must be a number from 0 up."
        )
    if options.chat and options.prompt is not None:
        raise ConfigError("--chat and --prompt exclude each other. Leave one out.")
    with loading_libraries(sys.stderr):
        from qlora_dist.generation import generate

    generate(**vars(options))
