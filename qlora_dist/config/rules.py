"""Checks of a configuration: values of the right type that cannot work, and contradicting keys."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from datetime import datetime
from typing import Any, get_args

from qlora_dist.config.data_names import check_columns, check_roles
from qlora_dist.config.saved_adapter import check_agreement, read_saved_adapter
from qlora_dist.config.schema import Range, ReadBy, Source, TrainConfig, declared, flatten
from qlora_dist.errors import ConfigError


def validate(config: TrainConfig) -> None:
    """Refuse impossible values and contradicting keys.

    Raises:
        ConfigError: with the key as it is spelled in YAML, its value, the rule and the remedy.
    """
    settings = flatten(config)
    for key, what in (
        ("model.path", "a model folder or hub name"),
        ("data.train", "a data file"),
        ("output_dir", "a folder for the run"),
    ):
        if not settings[key]:
            raise ConfigError(f"{key} is missing. Set it to {what}, in the file or with --{key}.")
    for key, value in settings.items():
        _check_range(key, value)
    _check_files("data.train", config.data.sources)
    _check_files("data.eval", [Source(path) for path in config.data.eval_files])
    check_columns(config.data.columns, config.data.format)
    check_roles(config.data.roles)
    _check_date(config.data.template_date)
    _check_template_kwargs(config.data.template_kwargs or {})
    _check_optim(config)
    _check_contradictions(config, settings)


def _check_range(key: str, value: Any) -> None:
    """Refuse a number that is not finite, or breaks a rule declared at its field."""
    if type(value) not in (int, float):  # not isinstance: a bool is an int as well
        return
    hint, extras = declared(key)
    broken = [extra.rule for extra in extras if isinstance(extra, Range) and not extra.holds(value)]
    if isinstance(value, float) and not math.isfinite(value):
        broken = ["must be a finite number"]  # NaN fails every rule, infinity hardly any
    if broken:
        nullable = " (or null, to leave it out)" if type(None) in get_args(hint) else ""
        raise ConfigError(f"{key} is {value}, but {broken[0]}{nullable}.")


def _check_date(date: str | None) -> None:
    try:
        datetime.fromisoformat(date or "2000-01-01")
    except ValueError:
        raise ConfigError(
            f"data.template_date is {date}, but must be a date such as 2026-01-31, or a date and "
            "time such as 2026-01-31T12:00:00."
        ) from None


_TEMPLATE_RESERVED = {
    "messages": "the rows give it",
    "conversations": "the rows give it",
    "tools": "the rows give it, in a column of that name",
    "documents": "no format of rows has them",
    "add_generation_prompt": "training and `generate` set it where it is due",
    "continue_final_message": "every turn of a row is complete",
    "tokenize": "training tokenizes by itself",
    "chat_template": "data.chat_template chooses the template",
    "strftime_now": "data.template_date sets the date",
    "raise_exception": "templates refuse rows by it",
}
"""Names that the chat template gets elsewhere, and where from."""
_OF_TOKENIZER = (
    "padding",
    "truncation",
    "max_length",
    "tokenizer_kwargs",
    "return_dict",
    "return_tensors",
    "return_assistant_tokens_mask",
)


def _check_template_kwargs(variables: dict[str, Any]) -> None:
    """Refuse variables of the chat template that are no names, or that something else sets."""
    for name in variables:
        owner = _TEMPLATE_RESERVED.get(name)
        if name in _OF_TOKENIZER:
            owner = "it is an option of the tokenizer, not of the template"
        elif name.endswith(("_token", "_special_tokens")):
            owner = "the tokenizer gives it"
        elif not name.isidentifier():
            owner = "a variable's name has letters, digits and _ only"
        if owner:
            raise ConfigError(
                f"data.template_kwargs sets {name}, but cannot: {owner}. Remove {name}."
            )


def _check_files(key: str, sources: Sequence[Source]) -> None:
    """Refuse an entry without a file, an impossible weight, and a file that is listed twice."""
    entries: dict[str, int] = {}
    for number, source in enumerate(sources, start=1):
        if not source.path:
            raise ConfigError(
                f"{key}, entry {number}: path is empty. Give a data file, or remove the entry."
            )
        if not 0 < source.weight < math.inf:  # NaN fails as well
            raise ConfigError(
                f"{key}, entry {number}: weight is {source.weight:g}, but must be a finite number "
                "greater than 0. To leave a file out, remove its entry."
            )
        first = entries.setdefault(os.path.abspath(source.path), number)
        if first != number:
            # Evaluation files have no weights.
            hint = " A weight of 2 passes over a file twice per epoch." * (key == "data.train")
            raise ConfigError(
                f"{key}, entries {first} and {number} are the same file, {source.path}. "
                f"Keep one.{hint}"
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


def _check_optim(config: TrainConfig) -> None:
    optim, steps, warmup = config.optim, config.optim.max_steps, config.optim.warmup_steps
    if steps is not None and optim.epochs is not None:
        raise ConfigError(
            f"optim.max_steps ({steps}) and optim.epochs ({optim.epochs:g}) both say how long to "
            "train. Keep one and set the other to null."
        )
    if warmup is not None and optim.warmup_ratio is not None:
        raise ConfigError(
            f"optim.warmup_steps ({warmup}) and optim.warmup_ratio ({optim.warmup_ratio:g}) both "
            "set the warm-up. Keep one and set the other to null."
        )
    # With epochs the number of steps is known only once the data are read.
    if steps is not None and warmup is not None and warmup >= steps:
        raise ConfigError(
            f"optim.warmup_steps ({warmup}) is not shorter than optim.max_steps ({steps}): the "
            "learning rate would never reach optim.lr. Shorten the warm-up."
        )


def _check_contradictions(config: TrainConfig, settings: dict[str, Any]) -> None:
    data, memory, adapter = config.data, config.memory, config.adapter.path
    if data.packing and data.group_by_length:
        raise ConfigError(
            "data.packing and data.group_by_length are both true, but packed rows are all of "
            "nearly the same length. Set one of them to false."
        )
    if data.eval_files and data.eval_fraction > 0:
        raise ConfigError(
            f"data.eval ({', '.join(data.eval_files)}) and data.eval_fraction "
            f"({data.eval_fraction:g}) both choose the evaluation data. Keep one; "
            "data.eval_fraction: 0 splits nothing off."
        )
    if adapter is not None:
        check_agreement(adapter, read_saved_adapter(adapter), settings)
    if config.parallel.backend != "auto":  # `auto` is checked once the launcher is known
        check_backend_reads(config, config.parallel.backend)
    if memory.compile and memory.recompute == "selective":
        raise ConfigError(
            "memory.recompute is selective and memory.compile is true, but the compiler decides "
            "by itself what is quick enough to compute again. Set memory.recompute: none, which "
            "keeps as little then, or memory.compile: false."
        )
    if config.model.attention == "flash_attention_2" and config.model.dtype == "float32":
        raise ConfigError(
            "model.attention is flash_attention_2 and model.dtype is float32, but its kernels "
            "know 16-bit types only. Set model.dtype: bfloat16, or model.attention: sdpa."
        )
    if memory.budget_gib is not None and (memory.recompute != "auto" or memory.offload_activations):
        why = f"memory.recompute is {memory.recompute}"
        if memory.recompute == "auto":
            why = "memory.offload_activations is true"
        raise ConfigError(
            f"memory.budget_gib is {memory.budget_gib:g}, but {why}, so nothing is chosen by it. "
            "Remove memory.budget_gib, or set memory.recompute: auto and "
            "memory.offload_activations: false."
        )
    if not config.has_eval and config.eval != TrainConfig().eval:
        raise ConfigError(
            "eval.every or eval.max_batches is set, but there is nothing to evaluate on. "
            "Set data.eval to a file or a list of files, or data.eval_fraction to the share to "
            "hold out."
        )
