"""Plain data, as YAML gives it, as values of a declared type; and the words for what a type must be."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, Union, get_args, get_origin


class BadEntry(Exception):
    """A mistake inside an entry of a list, where more can be said than which type the list must have."""


def convert(value: Any, hint: Any) -> Any:
    """`value` as type `hint`; raises TypeError when it is not one. YAML 1.1 reads 2e-4 as text: accept it as float."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        for option in get_args(hint):
            try:
                return convert(value, option)
            except TypeError:
                continue
    elif origin is Literal:
        if value is None and "none" in get_args(hint):  # an unquoted `none` is text in YAML, but people write null
            return "none"
        if isinstance(value, str) and value in get_args(hint):
            return value
    elif origin is tuple:
        if isinstance(value, str):
            value = [value]
        if isinstance(value, (list, tuple)) and value:
            item_hint = get_args(hint)[0]
            if dataclasses.is_dataclass(item_hint):
                return tuple(_convert_entry(item, item_hint, number) for number, item in enumerate(value, start=1))
            return tuple(convert(item, item_hint) for item in value)
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
    """A mapping, or the value of its first key alone, as dataclass `cls`; raises BadEntry when it is not one."""
    fields = {item.name: item for item in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    entry = value if isinstance(value, Mapping) else {next(iter(fields)): value}
    values = {}
    for key, item in entry.items():
        if key not in fields:
            raise BadEntry(f"entry {number}: unknown key {key}. The keys of an entry are {' and '.join(fields)}.")
        try:
            values[key] = convert(item, hints[key])
        except TypeError:
            raise BadEntry(f"entry {number}: {key} is {show(item)}, but must be {describe(hints[key])}.") from None
    for name, item in fields.items():
        if name not in values and item.default is dataclasses.MISSING:
            raise BadEntry(f"entry {number}: {name} is missing. The keys of an entry are {' and '.join(fields)}.")
    return cls(**values)


def describe(hint: Any) -> str:
    """What a value of type `hint` must be, in words."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(describe(option) for option in get_args(hint))
    if origin is Literal:
        return ", ".join(get_args(hint)[:-1]) + (" or " if len(get_args(hint)) > 1 else "") + get_args(hint)[-1]
    if origin is tuple:
        item_hint = get_args(hint)[0]
        if dataclasses.is_dataclass(item_hint):
            keys = ", ".join(f"{item.name}: …" for item in dataclasses.fields(item_hint))
            return f"a list whose entries are names or {{{keys}}}"
        return "a list of names"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    return names[hint]


def show(value: Any) -> str:
    """A value as it is shown in a message, in the words of YAML."""
    if isinstance(value, bool):
        return str(value).lower()
    return "empty (null)" if value is None else repr(value)
