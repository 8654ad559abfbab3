"""What a configuration may not be: values that have the right type and still cannot work, and keys that contradict."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any, get_args

from qlora_dist.config.saved_adapter import check_agreement, read_saved_adapter
from qlora_dist.config.schema import Range, ReadBy, Source, TrainConfig, declared, flatten
from qlora_dist.errors import ConfigError


def validate(config: TrainConfig) -> None:
    """Refuse impossible values and contradicting keys.

    Raises:
        ConfigError: with the key as it is spelled in YAML, its value, the rule and the remedy.
    """
    for key, what in (
        ("model.path", "a model folder or hub name"),
        ("data.train", "a data file"),
        ("output_dir", "a folder for the run"),
    ):
        if not flatten(config)[key]:
            raise ConfigError(f"{key} is missing. Set it to {what}, in the file or with --{key}.")
    for key, value in flatten(config).items():
        _check_range(key, value)
    _check_files("data.train", config.data.sources)
    _check_files("data.eval", [Source(path) for path in config.data.eval_files])
    _check_contradictions(config)


def _check_range(key: str, value: Any) -> None:
    """Hold a number against the range at its field."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return
    hint, extras = declared(key)
    broken = [extra.broken_rule(value) for extra in extras if isinstance(extra, Range)]
    rule = next(filter(None, broken), None) if math.isfinite(value) else "must be a finite number"
    if rule is not None:
        nullable = " (or null, to leave it out)" if type(None) in get_args(hint) else ""
        raise ConfigError(f"{key} is {value}, but {rule}{nullable}.")


def _check_files(key: str, sources: Sequence[Source]) -> None:
    """Refuse an entry without a file, a weight that is no number of passes, and a file that comes twice."""
    entries: dict[str, int] = {}
    for number, source in enumerate(sources, start=1):
        if not source.path:
            raise ConfigError(
                f"{key}, entry {number}: path is empty. Give a data file, or remove the entry."
            )
        if not 0 < source.weight < float("inf"):
            raise ConfigError(
                f"{key}, entry {number}: weight is {source.weight:g}, but must be a finite number greater than 0. "
                "To leave a file out, remove its entry."
            )
        first = entries.setdefault(os.path.abspath(source.path), number)
        if first != number:
            hint = (
                " A weight of 2 passes over a file twice per epoch." if key == "data.train" else ""
            )
            raise ConfigError(
                f"{key}, entries {first} and {number} are the same file, {source.path}. Keep one.{hint}"
            )


def check_backend_reads(config: TrainConfig, backend: str) -> None:
    """Refuse settings that the backend would ignore.

    Raises:
        ConfigError: naming the setting and the backends that read it.
    """
    defaults = flatten(TrainConfig())
    for key, value in flatten(config).items():
        for readers in (extra.backends for extra in declared(key)[1] if isinstance(extra, ReadBy)):
            if value != defaults[key] and backend not in readers:
                raise ConfigError(
                    f"{key} is set, but parallel.backend is {backend}, which does not read it. "
                    f"Remove {key}, or set parallel.backend: {' or '.join(readers)}."
                )


def _check_contradictions(config: TrainConfig) -> None:
    optim, data = config.optim, config.data
    if optim.max_steps is not None and optim.epochs is not None:
        raise ConfigError(
            f"optim.max_steps ({optim.max_steps}) and optim.epochs ({optim.epochs:g}) both say how long to train. "
            "Keep one and set the other to null."
        )
    if optim.warmup_steps is not None and optim.warmup_ratio is not None:
        raise ConfigError(
            f"optim.warmup_steps ({optim.warmup_steps}) and optim.warmup_ratio ({optim.warmup_ratio:g}) both set the "
            "warm-up. Keep one and set the other to null."
        )
    if (
        optim.max_steps is not None
        and optim.warmup_steps is not None
        and optim.warmup_steps >= optim.max_steps
    ):
        raise ConfigError(
            f"optim.warmup_steps ({optim.warmup_steps}) is not shorter than optim.max_steps ({optim.max_steps}): the "
            "learning rate would never reach optim.lr. Shorten the warm-up."
        )
    if data.packing and data.group_by_length:
        raise ConfigError(
            "data.packing and data.group_by_length are both true, but packed rows are all of nearly the same length. "
            "Set one of them to false."
        )
    if data.eval_files and data.eval_fraction > 0:
        raise ConfigError(
            f"data.eval ({', '.join(data.eval_files)}) and data.eval_fraction ({data.eval_fraction:g}) both choose the "
            "evaluation data. Keep one; data.eval_fraction: 0 splits nothing off."
        )
    if config.adapter.path is not None:
        check_agreement(
            config.adapter.path, read_saved_adapter(config.adapter.path), flatten(config)
        )
    if config.parallel.backend != "auto":
        check_backend_reads(config, config.parallel.backend)
    memory = config.memory
    if memory.compile and memory.recompute == "selective":
        raise ConfigError(
            "memory.recompute is selective and memory.compile is true, but the compiler decides by itself what is "
            "quick enough to compute again. Set memory.recompute: none, which keeps as little then, or memory.compile: "
            "false."
        )
    if config.model.attention == "flash_attention_2" and config.model.dtype == "float32":
        raise ConfigError(
            "model.attention is flash_attention_2 and model.dtype is float32, but its kernels know 16-bit types only. "
            "Set model.dtype: bfloat16, or model.attention: sdpa."
        )
    if memory.budget_gib is not None and (memory.recompute != "auto" or memory.offload_activations):
        why = (
            "memory.offload_activations is true"
            if memory.recompute == "auto"
            else f"memory.recompute is {memory.recompute}"
        )
        raise ConfigError(
            f"memory.budget_gib is {memory.budget_gib:g}, but {why}, so nothing is chosen by it. Remove "
            "memory.budget_gib, or set memory.recompute: auto and memory.offload_activations: false."
        )
    if not config.has_eval and (
        config.eval.every is not None or config.eval.max_batches is not None
    ):
        raise ConfigError(
            "eval.every or eval.max_batches is set, but there is nothing to evaluate on. "
            "Set data.eval to a file or a list of files, or data.eval_fraction to the share to hold out."
        )
