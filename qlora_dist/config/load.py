"""Settings from a YAML file and the command line: ``defaults < file < command line``.

Values of the file and of the command line go through one typed reader, so that a mistake gets the
same message in either place.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import yaml

from qlora_dist.config.rules import validate
from qlora_dist.config.saved_adapter import ADAPTER_CONFIG, read_saved_adapter
from qlora_dist.config.schema import TrainConfig, known_keys, mappings, sections
from qlora_dist.errors import ConfigError


@dataclass(frozen=True)
class Setting:
    """One value as the user wrote it."""

    value: Any
    where: str = ""
    """FILE:LINE for error messages; empty for the command line."""


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a YAML file, apply ``--section.key VALUE`` overrides and check everything.

    Raises:
        ConfigError: the file is missing or not YAML, a key is unknown, or a value is of the wrong
            type, impossible, or contradicts another setting.
    """
    settings = dict(_read_yaml(Path(path)))
    for key, setting in _read_overrides(overrides):
        if key in mappings():  # given whole, it takes the place of the file's entries
            settings = {k: s for k, s in settings.items() if not k.startswith(f"{key}.")}
        if key not in mappings() or setting.value is not None:
            settings[key] = setting
    adapter = settings.get("adapter.path", Setting(None)).value
    if isinstance(adapter, str):
        # An adapter that training continues from brings its settings along. They rank above the
        # defaults only: a contradicting setting of the user is kept here and refused by `validate`.
        where = str(Path(adapter) / ADAPTER_CONFIG)
        for key, value in read_saved_adapter(adapter).settings.items():
            settings.setdefault(key, Setting(value, where))
    config = _build(settings)
    validate(config)
    return config


def dump_config(config: TrainConfig) -> str:
    """Return the configuration as YAML that :func:`load_config` reads back to an equal object."""
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
        # Nodes instead of values: nodes know their lines, and two equal keys are still two.
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"config file {path} is not valid YAML: {error}") from None
    if isinstance(root, yaml.MappingNode):
        yield from _walk_yaml(root, path, {})
    elif root is not None:
        raise ConfigError(
            f"config file {path} must be a mapping of sections, such as `model:` and `data:`."
        )


def _walk_yaml(
    node: yaml.MappingNode, path: Path, seen: dict[str, str], prefix: str = ""
) -> Iterator[tuple[str, Setting]]:
    """Yield (dotted key, setting) for each leaf.

    Sections are the keys that hold a dataclass; a mapping, such as `data.columns`, is read alike.

    Args:
        seen: FILE:LINE of each key so far; one dict for the whole file, since `optim.lr: 1` and
            `optim: {lr: 1}` set the same key.
    """
    for key_node, value_node in node.value:
        where = f"{path}:{key_node.start_mark.line + 1}"
        key = prefix + str(_construct(key_node, where))
        if key in seen:
            raise ConfigError(f"{where}: {key} is set twice, first at {seen[key]}. Remove one.")
        seen[key] = where
        if key not in sections() and key not in mappings():
            yield key, Setting(_construct(value_node, where), where)
        elif isinstance(value_node, yaml.MappingNode):
            yield from _walk_yaml(value_node, path, seen, prefix=key + ".")
        elif _construct(value_node, where) is not None:  # None: all keys are commented out
            raise ConfigError(
                f"{where}: {key} is a section: write its keys indented below it, such as `{key}.…`."
            )


def _construct(node: yaml.Node, where: str) -> Any:
    """Return a YAML node as plain Python data.

    Raises:
        ConfigError: the node has a tag, a merge key, a cycle or an impossible date.
    """
    try:
        return yaml.SafeLoader("").construct_object(node, deep=True)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"{where}: this value is not plain YAML ({str(error).splitlines()[0]})."
        ) from None


def _read_overrides(arguments: Sequence[str]) -> Iterator[tuple[str, Setting]]:
    """Yield settings from ``--section.key VALUE`` or ``--section.key=VALUE``; VALUE is YAML."""
    usage = "Settings are given as --section.key VALUE."
    pending = iter(arguments)
    for argument in pending:
        if not argument.startswith("--"):
            raise ConfigError(f"unexpected argument {argument!r}. {usage}")
        key, has_value, text = argument[2:].partition("=")
        try:
            text = text if has_value else next(pending)
            value = yaml.safe_load(text)
        except StopIteration:
            raise ConfigError(f"--{key} has no value. {usage}") from None
        except (yaml.YAMLError, ValueError):  # such as the folder 2024-13-45, an impossible date
            value = text
        key = key.replace("-", "_")
        if key in mappings() and isinstance(value, dict | None):
            yield key, Setting(None)  # instead of all that was given before
            root = yaml.compose(text, Loader=yaml.SafeLoader)
            if isinstance(root, yaml.MappingNode):
                entries = _walk_yaml(root, Path(f"--{key}"), {}, prefix=f"{key}.")
                yield from ((name, Setting(setting.value)) for name, setting in entries)
        else:
            yield key, Setting(value)


def _build(settings: Mapping[str, Setting]) -> TrainConfig:
    known = known_keys()
    for key, setting in settings.items():
        if key not in known and key.rpartition(".")[0] not in mappings():
            raise ConfigError(_unknown_key(key, setting, known))

    def typed_fields(owner: type, prefix: str) -> dict[str, Any]:
        hints = typing.get_type_hints(owner)
        fields = {
            name: _typed(prefix + name, settings[prefix + name], hint)
            for name, hint in hints.items()
            if prefix + name in settings
        }
        for key in mappings():
            section, _, name = key.rpartition(".")
            if prefix == f"{section}.":
                fields[name] = _typed_entries(key, settings, hints[name])
        return fields

    values = {name: owner(**typed_fields(owner, f"{name}.")) for name, owner in sections().items()}
    return TrainConfig(**values, **typed_fields(TrainConfig, ""))


def _typed_entries(key: str, settings: Mapping[str, Setting], hint: Any) -> dict[str, Any]:
    """Return the entries of a mapping that were given singly, such as `data.columns.prompt`."""
    entries = {}
    for full, setting in settings.items():
        if full.rpartition(".")[0] == key:
            name = full.rpartition(".")[2]
            _check_name(key, name, get_args(hint)[0], f"{setting.where}: " * bool(setting.where))
            entries[name] = _typed(full, setting, get_args(hint)[1])
    return entries


def _check_name(key: str, name: str, hint: Any, prefix: str) -> None:
    """Refuse a name of an entry that a mapping with names of type `hint` does not have."""
    known = get_args(hint)
    if known and name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        meant = f"Did you mean {key}.{near[0]}? " if near else ""
        raise ConfigError(
            f"{prefix}unknown key {key}.{name}. {meant}Its keys are {', '.join(known)}."
        )


def _unknown_key(key: str, setting: Setting, known: list[str]) -> str:
    """Return the message about a key that does not exist, with the likeliest existing key."""
    where = f"{setting.where}: " if setting.where else ""
    listing = "`qlora-dist train --help` lists"
    if key in sections():
        return f"{where}{key} is a section, not a key. {listing} its keys."
    # Names from other programs, and keys without their section, still mean one of the keys here.
    alias = {"learning_rate": "lr", "lora_r": "rank", "r": "rank", "batch_size": "micro_batch_size"}
    leaf = key.rpartition(".")[2]
    leaf = alias.get(leaf, leaf)
    near = difflib.get_close_matches
    candidates = [k for k in known if k.rpartition(".")[2] == leaf] or near(key, known, n=1)
    if not candidates:
        leaves = {k.rpartition(".")[2]: k for k in known}
        candidates = [leaves[match] for match in near(leaf, leaves, n=1)]
    hint = f"Did you mean {candidates[0]}?" if candidates else f"{listing} all keys."
    return f"{where}unknown key {key}. {hint}"


def _typed(key: str, setting: Setting, hint: Any) -> Any:
    """Convert a setting to the type of its field, or refuse it by key, value and type."""
    prefix = f"{setting.where}: " if setting.where else ""
    try:
        return _convert(setting.value, hint)
    except _BadEntry as error:
        raise ConfigError(f"{prefix}{key}, {error}") from None
    except TypeError:
        name = _BASE_CHANGING_INITS.get(str(setting.value)) if key == "adapter.init" else None
        reason = _WHY_REFUSED.format(name) if name else ""
        raise ConfigError(
            f"{prefix}{key} is {_show(setting.value)}, but must be {_describe(hint)}.{reason}"
        ) from None


_BASE_CHANGING_INITS = {"pissa": "PiSSA", "loftq": "LoftQ", "olora": "OLoRA"}
"""Values of `adapter.init` in PEFT that are refused here, by the name of their method."""
_WHY_REFUSED = (
    " {} puts part of each base matrix into the adapter and quantizes the rest anew, but the base "
    "here keeps the bytes of its checkpoint: that is what is checked on every rank, and what the "
    "saved adapter belongs to."
)


class _BadEntry(Exception):
    """A mistake inside an entry of a list; its message is about the entry, not about the list."""


def _convert(value: Any, hint: Any) -> Any:
    """Return `value`, plain data as YAML gives it, as type `hint`.

    Raises:
        TypeError: `value` is not of that type.
        _BadEntry: an entry of a list is not of its type.
    """
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        for option in get_args(hint):
            with suppress(TypeError):
                return _convert(value, option)
    elif origin is Literal:
        if value is None and "none" in get_args(hint):
            return "none"  # YAML reads an unquoted `none` as text, but people write null for it
        if isinstance(value, str) and value in get_args(hint):
            return value
    elif origin is tuple:
        items = [value] if isinstance(value, str) else value
        if isinstance(items, (list, tuple)) and items:
            item_hint = get_args(hint)[0]
            if dataclasses.is_dataclass(item_hint):
                return tuple(_convert_entry(item, item_hint, n) for n, item in enumerate(items, 1))
            return tuple(_convert(item, item_hint) for item in items)
    elif origin is dict:
        if isinstance(value, Mapping):
            return {_convert(name, str): _plain(item) for name, item in value.items()}
    elif hint in (type(None), bool, int):
        if type(value) is hint:  # not isinstance: a bool is an int as well
            return value
    elif hint is float and type(value) in (int, float, str):
        with suppress(ValueError, OverflowError):
            return float(value)  # text included: YAML 1.1 reads 2e-4, without a dot, as text
    elif hint is str and type(value) in (str, int, float):
        return str(value)
    elif hint is str and isinstance(value, date):  # YAML reads 2026-01-31 as a date
        return value.isoformat()
    raise TypeError


def _plain(value: Any) -> Any:
    """Return data of YAML as JSON has it: dates as text.

    Raises:
        TypeError: JSON has no such value: bytes, a set, infinity.
    """
    if isinstance(value, Mapping):
        return {_convert(name, str): _plain(item) for name, item in value.items()}
    if isinstance(value, list):
        return list(map(_plain, value))
    if isinstance(value, date):
        return value.isoformat()
    is_plain = value is None or isinstance(value, (str, bool, int, float))
    if not is_plain or (isinstance(value, float) and not math.isfinite(value)):
        raise TypeError
    return value


def _convert_entry(value: Any, cls: Any, number: int) -> Any:
    """Return a mapping as dataclass `cls`; any other value is that of the first field alone.

    Raises:
        _BadEntry: a key is unknown or missing, or a value has the wrong type.
    """
    hints = typing.get_type_hints(cls)
    remedy = f"The keys of an entry are {' and '.join(hints)}."
    entry = value if isinstance(value, Mapping) else {next(iter(hints)): value}
    values = {}
    for key, item in entry.items():
        if key not in hints:
            raise _BadEntry(f"entry {number}: unknown key {key}. {remedy}")
        try:
            values[key] = _convert(item, hints[key])
        except TypeError:
            raise _BadEntry(
                f"entry {number}: {key} is {_show(item)}, but must be {_describe(hints[key])}."
            ) from None
    for field in dataclasses.fields(cls):
        if field.name not in values and field.default is dataclasses.MISSING:
            raise _BadEntry(f"entry {number}: {field.name} is missing. {remedy}")
    return cls(**values)


def _describe(hint: Any) -> str:
    """Return in words which values have type `hint`."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType, Literal):
        words: list[str] = []
        for option in [hint] if origin is Literal else get_args(hint):
            is_literal = get_origin(option) is Literal
            words += get_args(option) if is_literal else [_describe(option)]
        *others, last = words
        return f"{', '.join(others)} or {last}" if others else last
    if origin is tuple:
        item_hint = get_args(hint)[0]
        if not dataclasses.is_dataclass(item_hint):
            return "a list of names"
        keys = ", ".join(f"{item.name}: …" for item in dataclasses.fields(item_hint))
        return f"a list whose entries are names or {{{keys}}}"
    if origin is dict:
        values = get_args(hint)[1]
        return f"a mapping of names to {'plain values' if values is Any else _describe(values)}"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    return names.get(hint, "null")


def _show(value: Any) -> str:
    """Return a value as an error message shows it, in the words of YAML."""
    if isinstance(value, bool):
        return str(value).lower()
    return "empty (null)" if value is None else repr(value)
