"""What a configuration may not be: values that have the right type and still cannot work, and keys that contradict."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, get_args

from qlora_dist.config.saved_adapter import check_agreement, read_saved_adapter
from qlora_dist.config.schema import Source, TrainConfig, declared_type, flatten
from qlora_dist.errors import ConfigError


def validate(config: TrainConfig) -> None:
    """Refuse impossible values and contradicting keys.

    Raises:
        ConfigError: with the key as it is spelled in YAML, its value, the rule and the remedy.
    """
    for key, what in (("model.path", "a model folder or hub name"), ("data.train", "a data file"),
                      ("output_dir", "a folder for the run")):  # fmt: skip
        if not flatten(config)[key]:
            raise ConfigError(f"{key} is missing. Set it to {what}, in the file or with --{key}.")
    for key, value in flatten(config).items():
        _check_range(key, value)
    _check_files("data.train", config.data.sources)
    _check_files("data.eval", [Source(path) for path in config.data.eval_files])
    _check_contradictions(config)


_AT_LEAST_ONE = {
    "adapter.rank", "data.max_seq_len", "optim.max_steps", "optim.micro_batch_size", "optim.grad_accum_steps",
    "eval.every", "eval.max_batches", "logging.every", "parallel.replicas", "parallel.check_every",
    "parallel.hang_timeout_seconds", "checkpoint.every", "checkpoint.keep", "optim.max_skipped_steps",
    "logging.profile_steps",
}  # fmt: skip
_POSITIVE = {
    "adapter.alpha",
    "optim.lr",
    "optim.max_grad_norm",
    "optim.epochs",
    "optim.lora_plus_ratio",
    "memory.budget_gib",
}
_NOT_NEGATIVE = {"optim.warmup_steps", "optim.weight_decay", "seed", "memory.recompute"}
_FRACTION = {"adapter.dropout", "data.eval_fraction", "data.max_bad_fraction", "optim.warmup_ratio"}


def _check_range(key: str, value: Any) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return
    rule = None
    if value != value or value in (float("inf"), float("-inf")):
        rule = "must be a finite number"
    elif key in _AT_LEAST_ONE and value < 1:
        rule = "must be at least 1"
    elif key in _POSITIVE and value <= 0:
        rule = "must be greater than 0"
    elif key in _NOT_NEGATIVE and value < 0:
        rule = "must not be negative"
    elif key == "seed" and value >= 2**31:
        rule = "must be below 2147483648"
    elif key in _FRACTION and not 0 <= value < 1:
        rule = "must be at least 0 and less than 1"
    if rule is None:
        return
    nullable = type(None) in get_args(declared_type(key))
    raise ConfigError(f"{key} is {value}, but {rule}{' (or null, to leave it out)' if nullable else ''}.")


def _check_files(key: str, sources: Sequence[Source]) -> None:
    """Refuse an entry without a file, a weight that is no number of passes, and a file that comes twice."""
    entries: dict[str, int] = {}
    for number, source in enumerate(sources, start=1):
        if not source.path:
            raise ConfigError(f"{key}, entry {number}: path is empty. Give a data file, or remove the entry.")
        if not 0 < source.weight < float("inf"):
            raise ConfigError(
                f"{key}, entry {number}: weight is {source.weight:g}, but must be a finite number greater than 0. "
                "To leave a file out, remove its entry."
            )
        first = entries.setdefault(os.path.abspath(source.path), number)
        if first != number:
            hint = " A weight of 2 passes over a file twice per epoch." if key == "data.train" else ""
            raise ConfigError(f"{key}, entries {first} and {number} are the same file, {source.path}. Keep one.{hint}")


def check_backend_reads(config: TrainConfig, backend: str) -> None:
    """Refuse settings that the backend would ignore.

    Raises:
        ConfigError: naming the setting and the backends that read it.
    """
    for key, is_set, readers in (
        ("parallel.replicas", config.parallel.replicas > 1, ("fsdp",)),
        ("parallel.cpu_offload", config.parallel.cpu_offload, ("fsdp", "zero3")),
        ("memory.compile", config.memory.compile, ("single", "ddp", "fsdp", "zero2")),
    ):
        if is_set and backend not in readers:
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
    if optim.max_steps is not None and optim.warmup_steps is not None and optim.warmup_steps >= optim.max_steps:
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
        check_agreement(config.adapter.path, read_saved_adapter(config.adapter.path), flatten(config))
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
    if not config.has_eval and (config.eval.every is not None or config.eval.max_batches is not None):
        raise ConfigError(
            "eval.every or eval.max_batches is set, but there is nothing to evaluate on. "
            "Set data.eval to a file or a list of files, or data.eval_fraction to the share to hold out."
        )
