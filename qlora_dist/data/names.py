"""Names that a file gives its columns and roles, read under the names that the formats have."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from qlora_dist.config.data_names import COLUMNS, MESSAGE_KEYS, Format, columns_of
from qlora_dist.config.schema import DataConfig
from qlora_dist.data.messages import RowFault, list_of, prompt_and_completion
from qlora_dist.data.sources import Row

_OF_A_CHAT = ("messages", "conversations")
_OF_SHAREGPT = {"role": "from", "content": "value"}


class FileNames:
    """The names of one source, under `data.columns` and `data.roles`."""

    def __init__(self, config: DataConfig | None = None) -> None:
        columns, roles = (config.columns, config.roles) if config else ({}, {})
        self.asked: dict[str, str] = {str(name): column for name, column in columns.items()}
        """All of `data.columns`, by the formats' names."""
        self.unread: dict[str, str] = {}
        """Names of `data.columns` that this source does not use, each with the reason."""
        self.hidden: dict[str, str] = {}
        """Columns and keys of the source that are not read, each with the name whose place another
        one has taken."""
        self._columns: dict[str, str] = {}
        self._keys: dict[str, str] = {}
        self._roles = {alias: str(role) for role, aliases in roles.items() for alias in aliases}
        self._num_turns: Counter[str] = Counter()

    @property
    def are_asked_for(self) -> bool:
        """True if `data.columns` has entries."""
        return bool(self.asked)

    @property
    def used(self) -> dict[str, str]:
        """The entries of `data.columns` that this source uses."""
        return self._columns | self._keys

    @property
    def roles(self) -> dict[str, tuple[str, int]]:
        """Role of each name of `data.roles`, and its number of turns so far."""
        return {alias: (role, self._num_turns[alias]) for alias, role in self._roles.items()}

    def look_at(self, rows: Sequence[Row]) -> None:
        """Find out, by the first rows of a source, which of the names it has."""
        columns = dict.fromkeys(column for row in rows for column in row.values)
        asked = self.asked.items()
        inner = {name: key for name, key in asked if name in MESSAGE_KEYS}
        outer = {name: column for name, column in asked if name not in MESSAGE_KEYS}
        self._columns = {name: column for name, column in outer.items() if column in columns}
        turns = (turn for row in rows for turn in _turns(self.columns_of(row))) if inner else ()
        keys = dict.fromkeys(key for turn in turns for key in turn)
        self._keys = {name: key for name, key in inner.items() if key in keys}
        for name in outer.keys() - self._columns.keys():
            self.unread[name] = f"the columns are {_shown(columns, self.asked[name])}"
        for name in inner.keys() - self._keys.keys():
            self.unread[name] = f"the keys of its messages are {_shown(keys, self.asked[name])}"
        own = [(name, name, columns) for name in self._columns]
        own += [(key, name, keys) for name in self._keys for key in (name, _OF_SHAREGPT[name])]
        read = self.used.values()
        self.hidden = {key: name for key, name, there in own if key in there and key not in read}

    def settle(self, format: Format) -> None:
        """Leave out the names that the format of the source does not read."""
        for name in self.used.keys() - set(columns_of(format)):
            self.unread[name] = f"format {format} reads no `{name}`"
            self._columns.pop(name, None)
            self._keys.pop(name, None)
        self.hidden = {key: name for key, name in self.hidden.items() if name in self.used}

    def num_named(self, format: Format) -> int:
        """Return how many of the columns that a format needs are under names of the user."""
        return len(self._columns.keys() & set(COLUMNS[format]))

    def columns_of(self, row: Row) -> Mapping[str, Any]:
        """Return the values of a row by the formats' names of its columns."""
        return _renamed(row.values, self._columns)

    def read(self, row: Row) -> Mapping[str, Any]:
        """Return the values of a row by the formats' names, also within its messages.

        Raises:
            RowFault: messages are broken JSON text.
        """
        values = self.columns_of(row)
        if not self._keys and not self._roles:
            return values
        read = {name: list(map(self._read_turn, turns)) for name, turns in _messages(values)}
        return {**values, **read}

    def _read_turn(self, turn: Any) -> Any:
        if not isinstance(turn, Mapping):
            return turn
        if self._keys:
            # ShareGPT's own key would be read before the one that the user names.
            own = {_OF_SHAREGPT[name] for name in self._keys} - {*self._keys.values()}
            turn = {key: value for key, value in turn.items() if key not in own}
            turn = _renamed(turn, self._keys)
        for key in ("role", "from"):
            name = turn.get(key)
            name = str(name) if type(name) is int else name  # some files number their speakers
            if isinstance(name, str) and name in self._roles:
                self._num_turns[name] += 1
                turn = {**turn, key: self._roles[name]}
        return turn

    def explained(self, fault: RowFault) -> RowFault:
        """Return a fault that tells, of the names in its message, what the file calls them."""
        said = str(fault)
        named = [f"`{n}` from `{column}`" for n, column in self.used.items() if f"`{n}`" in said]
        missing = [
            f" data.columns.{name} is {self.asked[name]!r}, but {reason}."
            for name, reason in self.unread.items()
            if f"`{name}`" in said
        ]
        read = f" data.columns reads {' and '.join(named)}." if named else ""
        if fault.reason in ("unknown role", "unknown speaker"):
            read += " If the file has a name of its own for a role, give it in data.roles, such as "
            read += "{assistant: bot}."
        return RowFault(fault.reason, said + read + "".join(missing))


def _renamed(values: Mapping[str, Any], names: Mapping[str, str]) -> Mapping[str, Any]:
    """Return values by other names; a value keeps no other name, and a name no other value."""
    if not names:
        return values
    taken = {*names, *names.values()}
    kept = {name: value for name, value in values.items() if name not in taken}
    return kept | {name: values[theirs] for name, theirs in names.items() if theirs in values}


def _messages(values: Mapping[str, Any]) -> Iterator[tuple[str, list[Any]]]:
    """Yield the columns of a row that hold lists of messages."""
    found = {name: list_of(values.get(name), f"`{name}`") for name in _OF_A_CHAT}
    found["prompt"], found["completion"] = prompt_and_completion(values)
    for name, value in found.items():
        if isinstance(value, list):
            yield name, value


def _turns(values: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    try:
        turns = [turn for _, turns in _messages(values) for turn in turns]
    except RowFault:  # counted when the row is read
        return []
    return [turn for turn in turns if isinstance(turn, Mapping)]


def _shown(columns: Collection[str], asked: str) -> str:
    near = difflib.get_close_matches(asked, list(islice(columns, 1000)), n=1)
    return listed(columns) + (f"; did you mean `{near[0]:.40}`?" if near else "")


def listed(columns: Collection[str]) -> str:
    """Return the first ten columns for a message, and their number if there are more."""
    names = ", ".join(f"`{column:.40}`" for column in islice(columns, 10)) or "no columns"
    return names if len(columns) <= 10 else f"{names} and others, {len(columns):,} in all"
