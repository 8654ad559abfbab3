"""Names by which rows are read: the columns of each format, and the roles of turns."""

# Tested by tests/unit/config/test_data_names.py and tests/unit/data/test_names.py.

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Literal

from qlora_dist.errors import ConfigError

Format = Literal["messages", "sharegpt", "prompt_completion", "alpaca", "text"]
"""Ways to write rows, told apart by their columns."""

ColumnName = Literal[
    "messages",
    "conversations",
    "prompt",
    "completion",
    "instruction",
    "input",
    "output",
    "history",
    "system",
    "tools",
    "text",
    "role",
    "content",
]
"""Columns that some format reads; the last two are keys of each message."""

MESSAGE_KEYS = ("role", "content")

RoleName = Literal[
    "system",
    "user",
    "assistant",
    "tool",
    "developer",
    "function",
    "ipython",
    "observation",
    "tool_response",
    "tool_results",
    "function_call",
]
"""Roles that a format reads, or a chat template may know."""

COLUMNS: dict[Format, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "prompt_completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "text": ("text",),
}
"""Columns by which a format is recognized; the first match wins.

What is surely a conversation comes before what may be only its parts or its text.
"""

OPTIONAL_COLUMNS: dict[Format, tuple[str, ...]] = {
    "messages": ("tools", *MESSAGE_KEYS),
    "sharegpt": ("system", "tools", *MESSAGE_KEYS),
    "prompt_completion": ("tools", *MESSAGE_KEYS),
    "alpaca": ("input", "history", "system", "tools"),
    "text": (),
}
"""Further columns, or keys of messages, that a format reads where they are there."""


def columns_of(format: Format) -> tuple[str, ...]:
    """Return all columns and keys of messages that a format reads."""
    return COLUMNS[format] + OPTIONAL_COLUMNS[format]


def check_columns(columns: Mapping[ColumnName, str], format: Literal["auto"] | Format) -> None:
    """Refuse a `data.columns` that no file can satisfy.

    Raises:
        ConfigError: a name is empty, two names mean one column, or `data.format` reads no such
            column.
    """
    names_of: dict[str, str] = {}
    for name, column in columns.items():
        if not column:
            raise ConfigError(
                f"data.columns.{name} is empty. Set it to the file's name of that column, or "
                "remove it."
            )
        # Each column has one meaning: learned twice, it would be question and answer at once.
        if (first := names_of.setdefault(column, name)) != name:
            raise ConfigError(
                f"data.columns.{first} and data.columns.{name} are both {column!r}, but a column "
                "has one meaning. Remove one."
            )
        if format != "auto" and name not in columns_of(format):
            raise ConfigError(
                f"data.columns.{name} is {column!r}, but data.format: {format} reads no {name}. "
                f"Remove it (read are {', '.join(columns_of(format))}), or change data.format."
            )


def check_roles(roles: Mapping[RoleName, tuple[str, ...]]) -> None:
    """Refuse a `data.roles` that gives one name of a file two meanings.

    Raises:
        ConfigError: with the name and both roles.
    """
    meanings: dict[str, list[str]] = defaultdict(list)
    for role, aliases in roles.items():
        for alias in dict.fromkeys(aliases):
            if not alias:
                raise ConfigError(
                    f"data.roles.{role} has an empty name. Set it to the file's name of that role."
                )
            meanings[alias].append(role)
    for alias, meant in meanings.items():
        if len(meant) > 1:
            raise ConfigError(
                f"data.roles.{meant[0]} and data.roles.{meant[1]} both have {alias!r}, but a name "
                "means one role. Remove it from one."
            )
