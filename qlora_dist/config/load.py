"""Settings from a YAML file and the command line: ``defaults < file < command line``.

YAML values and command-line values go through the same typed reader, so a mistake gets the same message wherever it was
made.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import yaml

from qlora_dist.config.rules import validate
from qlora_dist.config.saved_adapter import ADAPTER_CONFIG, read_saved_adapter
from qlora_dist.config.schema import TrainConfig, known_keys, sections
from qlora_dist.errors import ConfigError


@dataclass(frozen=True)
class Setting:
    """One value as the user wrote it, with the place to name in an error message."""

    value: Any
    where: str


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a YAML file, apply ``--section.key VALUE`` overrides and check everything.

    Raises:
        ConfigError: the file is missing or not YAML, a key is unknown, or a value is of the wrong type, impossible,
            or contradicts another one.
    """
    settings: dict[str, Setting] = {}
    for key, setting in _read_yaml(Path(path)):
        if key in settings:
            raise ConfigError(
                f"{setting.where}: {key} is set twice, first at {settings[key].where}. Remove one."
            )
        settings[key] = setting
    settings.update(_read_overrides(overrides))
    config = _build(TrainConfig, {**_of_saved_adapter(settings), **settings})
    validate(config)
    return config


def dump_config(config: TrainConfig) -> str:
    """The configuration as YAML text that :func:`load_config` reads back to an equal object."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True)


def _read_yaml(path: Path) -> Iterator[tuple[str, Setting]]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(
            f"config file {path} does not exist. Give the path of a YAML file, see configs/."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {path} cannot be read: {error}.") from None
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"config file {path} is not valid YAML: {error}") from None
    if root is None:
        return
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(
            f"config file {path} must be a mapping of sections, such as `model:` and `data:`."
        )
    yield from _walk_yaml(root, path, prefix="")


def _walk_yaml(node: yaml.MappingNode, path: Path, prefix: str) -> Iterator[tuple[str, Setting]]:
    """Yield (dotted key, setting) for each leaf; sections are the keys that hold a dataclass."""
    seen: dict[str, str] = {}
    for key_node, value_node in node.value:
        where = f"{path}:{key_node.start_mark.line + 1}"
        key = prefix + str(_construct(key_node, where))
        if key in seen:
            raise ConfigError(f"{where}: {key} is set twice, first at {seen[key]}. Remove one.")
        seen[key] = where
        if isinstance(value_node, yaml.MappingNode) and key in sections():
            yield from _walk_yaml(value_node, path, prefix=key + ".")
        elif key in sections():
            if _construct(value_node, where) is None:
                continue  # a section with nothing (or only comments) under it
            raise ConfigError(
                f"{where}: {key} is a section: write its keys indented below it, such as `{key}.…`."
            )
        else:
            yield key, Setting(_construct(value_node, where), where)


def _construct(node: yaml.Node, where: str) -> Any:
    """A YAML node as plain Python data; tags, merge keys and impossible dates are no settings."""
    try:
        return yaml.SafeLoader("").construct_object(node, deep=True)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"{where}: this value is not plain YAML ({str(error).splitlines()[0]})."
        ) from None


def _read_overrides(arguments: Sequence[str]) -> Iterator[tuple[str, Setting]]:
    """Yield settings from ``--section.key VALUE`` or ``--section.key=VALUE``; VALUE is read as YAML."""
    pending = list(arguments)
    while pending:
        argument = pending.pop(0)
        if not argument.startswith("--"):
            raise ConfigError(
                f"unexpected argument {argument!r}. Settings are given as --section.key VALUE."
            )
        key, has_value, text = argument[2:].partition("=")
        if not has_value:
            if not pending:
                raise ConfigError(
                    f"--{key} has no value. Settings are given as --section.key VALUE."
                )
            text = pending.pop(0)
        key = key.replace("-", "_")
        try:
            value = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError):
            value = text  # not YAML, so it is meant as it stands
        yield key, Setting(value, f"--{key}")


def _of_saved_adapter(settings: Mapping[str, Setting]) -> dict[str, Setting]:
    """The settings that come with the adapter that is continued from, if one is."""
    path = settings["adapter.path"].value if "adapter.path" in settings else None
    if not isinstance(path, str):
        return {}
    where = str(Path(path) / ADAPTER_CONFIG)
    return {key: Setting(value, where) for key, value in read_saved_adapter(path).settings.items()}


# --------------------------------------------------------------------------------------------------------------------
# Building: from settings to typed dataclasses.


def _build(cls: type[TrainConfig], settings: Mapping[str, Setting]) -> TrainConfig:
    known = known_keys()
    for key, setting in settings.items():
        if key not in known:
            raise ConfigError(_unknown_key(key, setting, known))
    values: dict[str, Any] = {}
    for name, section in sections().items():
        hints = typing.get_type_hints(section)
        keys = [
            item.name for item in dataclasses.fields(section) if f"{name}.{item.name}" in settings
        ]
        values[name] = section(
            **{key: _typed(f"{name}.{key}", settings[f"{name}.{key}"], hints[key]) for key in keys}
        )
    hints = typing.get_type_hints(cls)
    for key, setting in settings.items():
        if "." not in key:
            values[key] = _typed(key, setting, hints[key])
    return cls(**values)


def _unknown_key(key: str, setting: Setting, known: list[str]) -> str:
    where = "" if setting.where.startswith("--") else f"{setting.where}: "
    # A user who writes `learning_rate` or forgets the section still means one of the keys that exist.
    synonyms = {
        "learning_rate": "lr",
        "lora_r": "rank",
        "r": "rank",
        "batch_size": "micro_batch_size",
    }
    if key in sections():
        return f"{where}{key} is a section, not a key. `qlora-dist train --help` lists its keys."
    leaf = key.rpartition(".")[2]
    leaf = synonyms.get(leaf, leaf)
    candidates = [k for k in known if k.rpartition(".")[2] == leaf] or difflib.get_close_matches(
        key, known, n=1
    )
    if not candidates:
        leaves = {k.rpartition(".")[2]: k for k in known}
        candidates = [leaves[match] for match in difflib.get_close_matches(leaf, leaves, n=1)]
    hint = (
        f" Did you mean {candidates[0]}?"
        if candidates
        else " `qlora-dist train --help` lists all keys."
    )
    return f"{where}unknown key {key}.{hint}"


def _typed(key: str, setting: Setting, hint: Any) -> Any:
    prefix = "" if setting.where.startswith("--") else f"{setting.where}: "
    try:
        return _convert(setting.value, hint)
    except _BadEntry as error:
        raise ConfigError(f"{prefix}{key}, {error}") from None
    except TypeError:
        reason = _REFUSED.get(f"{key}: {setting.value}", "")
        raise ConfigError(
            f"{prefix}{key} is {_show(setting.value)}, but must be {_describe(hint)}.{reason}"
        ) from None


_CHANGES_BASE = (
    " {} puts part of each base matrix into the adapter and quantizes the rest anew, but the base here keeps the bytes "
    "of its checkpoint: that is what is checked on every rank, and what the saved adapter belongs to."
)
_REFUSED = {
    f"adapter.init: {name}": _CHANGES_BASE.format(title)
    for name, title in (("pissa", "PiSSA"), ("loftq", "LoftQ"), ("olora", "OLoRA"))
}
"""Values that other programs know, and why they cannot be had here."""


# --------------------------------------------------------------------------------------------------
# Values: plain data, as YAML gives it, as values of a declared type.


class _BadEntry(Exception):
    """A mistake inside an entry of a list, where more can be said than which type the list must have."""


def _convert(value: Any, hint: Any) -> Any:
    """`value` as type `hint`; raises TypeError when it is not one. YAML 1.1 reads 2e-4 as text: accept it as float."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        for option in get_args(hint):
            try:
                return _convert(value, option)
            except TypeError:
                continue
    elif origin is Literal:
        if value is None and "none" in get_args(
            hint
        ):  # an unquoted `none` is text in YAML, but people write null
            return "none"
        if isinstance(value, str) and value in get_args(hint):
            return value
    elif origin is tuple:
        if isinstance(value, str):
            value = [value]
        if isinstance(value, (list, tuple)) and value:
            item_hint = get_args(hint)[0]
            if dataclasses.is_dataclass(item_hint):
                return tuple(
                    _convert_entry(item, item_hint, number)
                    for number, item in enumerate(value, start=1)
                )
            return tuple(_convert(item, item_hint) for item in value)
    elif hint is type(None):
        if value is None:
            return None
    elif hint is bool:
        if isinstance(value, bool):
            return value
    elif hint is int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    elif hint is float:
        if isinstance(value, (int, float, str)) and not isinstance(value, bool):
            try:
                return float(value)
            except (ValueError, OverflowError):
                raise TypeError from None
    elif hint is str and isinstance(value, (str, int, float)) and not isinstance(value, bool):
        return str(value)
    raise TypeError


def _convert_entry(value: Any, cls: Any, number: int) -> Any:
    """A mapping, or the value of its first key alone, as dataclass `cls`; raises _BadEntry when it is not one."""
    fields = {item.name: item for item in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    entry = value if isinstance(value, Mapping) else {next(iter(fields)): value}
    values = {}
    for key, item in entry.items():
        if key not in fields:
            raise _BadEntry(
                f"entry {number}: unknown key {key}. The keys of an entry are {' and '.join(fields)}."
            )
        try:
            values[key] = _convert(item, hints[key])
        except TypeError:
            raise _BadEntry(
                f"entry {number}: {key} is {_show(item)}, but must be {_describe(hints[key])}."
            ) from None
    for name, item in fields.items():
        if name not in values and item.default is dataclasses.MISSING:
            raise _BadEntry(
                f"entry {number}: {name} is missing. The keys of an entry are {' and '.join(fields)}."
            )
    return cls(**values)


def _describe(hint: Any) -> str:
    """What a value of type `hint` must be, in words."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(option) for option in get_args(hint))
    if origin is Literal:
        return (
            ", ".join(get_args(hint)[:-1])
            + (" or " if len(get_args(hint)) > 1 else "")
            + get_args(hint)[-1]
        )
    if origin is tuple:
        item_hint = get_args(hint)[0]
        if dataclasses.is_dataclass(item_hint):
            keys = ", ".join(f"{item.name}: …" for item in dataclasses.fields(item_hint))
            return f"a list whose entries are names or {{{keys}}}"
        return "a list of names"
    names = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "text",
        type(None): "null",
    }
    return names[hint]


def _show(value: Any) -> str:
    """A value as it is shown in a message, in the words of YAML."""
    if isinstance(value, bool):
        return str(value).lower()
    return "empty (null)" if value is None else repr(value)
