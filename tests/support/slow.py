"""`python -m tests.support.slow MOMENT ARGUMENTS`: the program with one slow or hanging part."""

import os
import sys
import time
from unittest import mock

from qlora_dist.cli import main

SECONDS = 0.6


def slow(function, word: str):
    """Wrap a function: announce each call on standard error, then sleep before it."""

    def slower(*arguments, **keywords):
        sys.stderr.write(f"<{word}>\n")
        sys.stderr.flush()
        time.sleep(SECONDS)
        return function(*arguments, **keywords)

    return slower


def slow_loading(load):
    """Wrap `load_base_weights` so that it rests in two decoder layers."""

    def slower(model, folder, device, on_progress):
        rests = {1: slow(on_progress, "loading"), 2: slow(on_progress, "loading")}

        def resting(num_bytes: int, num_layers: int) -> None:
            rests.pop(num_layers, on_progress)(num_bytes, num_layers)

        return load(model, folder, device, resting)

    return slower


def hanging(function, word: str, rank: str, call: int):
    """Wrap a function so that its call of the given number never returns on one rank."""
    num_calls = 0

    def hangs(*arguments, **keywords):
        nonlocal num_calls
        num_calls += 1
        if num_calls == call and os.environ["RANK"] == rank:
            sys.stderr.write(f"<{word}>\n")
            sys.stderr.flush()
            time.sleep(1000)
        return function(*arguments, **keywords)

    return hangs


MOMENTS = {
    "loading": ("qlora_dist.build", "load_base_weights", slow_loading),
    "stepping": ("qlora_dist.train", "micro_step", lambda function: slow(function, "stepping")),
    "evaluating": (
        "qlora_dist.evaluate",
        "target_loss_sum",
        lambda function: slow(function, "evaluating"),
    ),
    "hanging": (
        "qlora_dist.train",
        "micro_step",
        lambda function: hanging(function, "hanging", "1", 5),
    ),
    "tokenizing": (
        "qlora_dist.data.dataset",
        "load_data",
        lambda function: hanging(function, "tokenizing", "0", 1),
    ),
}
"""Module, function and wrapper of each moment."""


def run_slowly(moment: str, arguments: list[str]) -> None:
    """Run `main(arguments)`, slow at the given moment."""
    owner, name, wrap = MOMENTS[moment]
    module = __import__(owner, fromlist=[name])
    with mock.patch.object(module, name, wrap(getattr(module, name))):
        main(arguments)


if __name__ == "__main__":
    run_slowly(sys.argv[1], sys.argv[2:])
