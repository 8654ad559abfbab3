"""A look at the data of a run before it trains: the command `data`."""

from __future__ import annotations

import json
import random
import sys
from io import TextIOWrapper
from itertools import accumulate, zip_longest

from rich.console import Console

from qlora_dist.config.schema import TrainConfig
from qlora_dist.data.dataset import RunData, load_tokenizer_and_data
from qlora_dist.data.samples import Sample
from qlora_dist.errors import LaunchError
from qlora_dist.inspection.facts import gather_facts
from qlora_dist.inspection.page import print_facts, print_samples, print_warnings
from qlora_dist.metrics.console import Reporter
from qlora_dist.runtime.processes import launched_world_size
from qlora_dist.weights.files import resolve_model_folder


def inspect_data(config: TrainConfig, num_shown: int, as_json: bool) -> None:
    """Read and tokenize the data as training would, and print facts about it; loads no weights.

    Args:
        num_shown: training rows to show with their mask.
        as_json: write one JSON object instead of a page.

    Raises:
        QloraDistError: the tokenizer or the data cannot be used.
    """
    if launched_world_size() > 1:
        raise LaunchError("data runs as one process. Start it without a launcher.")
    reporter = Reporter(is_main=True, file=sys.stderr)  # the page goes to standard output alone
    folder = resolve_model_folder(config.model.path, needs_weights=False)
    tokenizer, data = load_tokenizer_and_data(config, folder, reporter)
    with reporter.preparing() as show:
        facts = gather_facts(data, config, tokenizer, show)
    if as_json:
        sys.stdout.write(json.dumps(facts.to_json(), indent=2) + "\n")
        return
    console = page_console()
    print_facts(console, facts)
    print_samples(console, choose_rows(data, num_shown, config.seed), tokenizer)
    print_warnings(console, facts)


_MAX_WIDTH = 120  # longer lines are hard to read


def page_console() -> Console:
    """Return a console on standard output, with lines of at most 120 characters."""
    if isinstance(sys.stdout, TextIOWrapper):
        # Data hold characters that not every terminal can show.
        sys.stdout.reconfigure(errors="replace")
    console = Console(file=sys.stdout, highlight=False, emoji=False, markup=False)
    console.width = min(console.width, _MAX_WIDTH)
    return console


def choose_rows(data: RunData, num_rows: int, seed: int) -> list[tuple[str, Sample]]:
    """Return training rows to show, each with its source; sources take turns.

    The rows are a function of the data and the seed.
    """
    piles = []
    firsts = accumulate(data.sizes, initial=0)
    for report, first, size in zip(data.reports, firsts, data.sizes, strict=False):
        chosen = random.Random(seed).sample(range(first, first + size), min(size, num_rows))
        piles.append([(report.path, index) for index in chosen])
    in_turn = [item for turn in zip_longest(*piles) for item in turn if item is not None]
    return [(path, data.train[index]) for path, index in in_turn[:num_rows]]
