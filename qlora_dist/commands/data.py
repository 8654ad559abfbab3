"""Command `data`: facts about a run's data, and samples as the model sees them."""

# Tested by tests/e2e/test_data_command.py.

from __future__ import annotations

import sys
from dataclasses import dataclass

from qlora_dist.commands.startup import check_sources, loading_libraries, parse_known
from qlora_dist.config.load import load_config
from qlora_dist.errors import ConfigError


@dataclass(frozen=True)
class Options:
    """Tell what the data of CONFIG.yaml are like, and show samples as the model sees them.

    Loads no weights. Takes the same `--section.key VALUE` as `qlora-dist train`, and reads and
    tokenizes the data in the same way; training then finds the tokenized data in the cache.
    """

    show: int = 3
    """Training samples (with packing, whole rows) to show, with the tokens of the loss marked."""
    json: bool = False
    """Write the facts as one JSON object, without samples."""


def main(argv: list[str]) -> None:
    """Print facts about the data of CONFIG.yaml."""
    if not argv or argv[0] in ("-h", "--help"):
        argv = ["", "--help"]
    options, overrides = parse_known(Options, argv[1:], "qlora-dist data CONFIG.yaml")
    if options.show < 0:
        raise ConfigError(f"--show is {options.show}, but must be at least 0.")
    config = load_config(argv[0], overrides)
    check_sources(config)
    with loading_libraries(sys.stderr):
        from qlora_dist.inspection.inspect_data import inspect_data

    inspect_data(config, num_shown=options.show, as_json=options.json)
