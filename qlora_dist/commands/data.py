"""Command `data`: facts about a run's data, and samples as the model sees them."""

# Tested by tests/e2e/test_data_command.py.

from __future__ import annotations

import json
import sys
from dataclasses import dataclass

from qlora_dist.commands.startup import check_sources, loading_libraries, parse_known
from qlora_dist.config.load import load_config
from qlora_dist.errors import ConfigError, LaunchError


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
    """Read and tokenize the data as training would, and print facts about it; loads no weights."""
    if not argv or argv[0] in ("-h", "--help"):
        argv = ["", "--help"]
    options, overrides = parse_known(Options, argv[1:], "qlora-dist data CONFIG.yaml")
    if options.show < 0:
        raise ConfigError(f"--show is {options.show}, but must be at least 0.")
    config = load_config(argv[0], overrides)
    check_sources(config)
    with loading_libraries(sys.stderr):
        from qlora_dist.data.dataset import load_tokenizer_and_data
        from qlora_dist.inspection import page
        from qlora_dist.inspection.facts import gather_facts
        from qlora_dist.metrics.console import Reporter
        from qlora_dist.runtime.processes import launched_world_size
        from qlora_dist.weights.files import resolve_model_folder

    if launched_world_size() > 1:
        raise LaunchError("data runs as one process. Start it without a launcher.")
    reporter = Reporter(is_main=True, file=sys.stderr)  # the page goes to standard output alone
    folder = resolve_model_folder(config.model.path, needs_weights=False)
    tokenizer, data = load_tokenizer_and_data(config, folder, reporter)
    with reporter.preparing() as show:
        facts = gather_facts(data, config, tokenizer, show)
    if options.json:
        sys.stdout.write(json.dumps(facts.to_json(), indent=2) + "\n")
        return
    console = page.page_console()
    page.print_facts(console, facts)
    page.print_samples(console, page.choose_rows(data, options.show, config.seed), tokenizer)
    page.print_warnings(console, facts)
