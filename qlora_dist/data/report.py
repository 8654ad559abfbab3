"""Account of each row of a source: used, cut, split, dropped or faulty."""

# Tested by tests/unit/data/test_dataset.py and tests/unit/data/test_tokenization.py.

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

from qlora_dist.config.data_names import MESSAGE_KEYS, ColumnName, columns_of
from qlora_dist.config.schema import DataConfig
from qlora_dist.data.chat_template import ChatTemplate
from qlora_dist.data.formats import Format
from qlora_dist.data.messages import (
    NOTHING,
    THOUGHTS,
    Conversation,
    PromptLayout,
    RowFault,
    unopened_thoughts,
)
from qlora_dist.data.names import FileNames, listed
from qlora_dist.data.samples import Sample
from qlora_dist.errors import DataError

_OTHER_TEMPLATE = "choose a template that shows them with data.chat_template"
_LOST = {
    "text": ("text", f"remove it from the rows, or {_OTHER_TEMPLATE}"),
    "thoughts": ("thoughts (reasoning_content, or <think> in the text)", _OTHER_TEMPLATE),
    "tool_calls": ("tool calls", f"{_OTHER_TEMPLATE}, or write them as text"),
    "tools": ("the list of tools", f"remove the column, or {_OTHER_TEMPLATE}"),
}
"""Parts that a template leaves out, each with the remedy."""
_SUSPECT = {
    "closing tag": (
        "assistant's answers have </think> without <think> before it",
        "write the opening tag, or remove the closing one",
    ),
    "empty answer": (
        "assistant's answers are empty, which teaches to say nothing",
        "remove these rows, or give these turns a weight of 0",
    ),
    "special token": (
        "the text of system, user or tool has a special token, which the model takes for one of "
        "the template's own",
        "remove it from the text, unless it is meant",
    ),
    "learned token": (
        "the text of assistant's answers has a special token that the template writes around "
        "turns, so the model learns to write it there as well",
        "remove it from the text, unless it is meant",
    ),
}
"""Likely mistakes in the text of rows, each with the remedy."""


def _is_empty(message: Mapping[str, Any]) -> bool:
    """True if an answer has no words, thoughts or calls."""
    if message["content"] and not message["content"].isspace():
        return False
    return "tool_calls" not in message and not any(message.get(key) for key in THOUGHTS)


def _count(counts: dict[str, tuple[int, str]], key: str, where: str) -> None:
    """Count a row; the place of the first one stays."""
    number, first = counts.get(key, (0, where))
    counts[key] = number + 1, first


@dataclass
class FaultyRows:
    """Rows that were left out because they cannot be used, counted by reason."""

    num_rows: int = 0
    first_message: str = ""
    reasons: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Number of rows for each reason, and the place of the first of them."""

    def add(self, fault: RowFault, where: str) -> None:
        self.num_rows += 1
        self.first_message = self.first_message or f"{where}: {fault}"
        _count(self.reasons, fault.reason, where)

    def most_frequent(self) -> list[tuple[str, int, str]]:
        """Return (reason, number of rows, place of the first), the most frequent first."""
        ordered = sorted(self.reasons.items(), key=lambda item: -item[1][0])
        return [(reason, count, where) for reason, (count, where) in ordered]

    def __str__(self) -> str:
        """Return the reasons: `no text: 3 (first: a.csv, row 7), empty row: 1 (a.csv, row 9)`."""
        return ", ".join(
            f"{reason}: {count:,} ({'first: ' if count > 1 else ''}{where})"
            for reason, count, where in self.most_frequent()
        )


@dataclass
class Report:
    """Account of the rows of a source."""

    path: str
    format: Format
    layout: PromptLayout | None = None
    """Layout of the first usable row, and so of all; None: no row is usable."""
    num_rows: int = 0
    num_samples: int = 0
    num_tokens: int = 0
    num_targets: int = 0
    num_cut: int = 0
    """Samples that lost tokens, since they were longer than `data.max_seq_len`."""
    num_split: int = 0
    """Rows of text that were made several samples for that reason."""
    num_too_long: int = 0
    """Rows that were dropped for that reason."""
    num_without_targets: int = 0
    """Rows that were dropped because none of their tokens within the limit counts in the loss."""
    max_sample_len: int = 0
    """Tokens of the longest sample."""
    max_token_id: int = -1
    """The largest token id of all samples."""
    is_open_ended: bool = False
    """The chat template ends the assistant's turns without a special token."""
    faulty: FaultyRows = field(default_factory=FaultyRows)
    lost: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Kinds of parts that the chat template leaves out: number of rows, place of the first."""
    unread: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Keys of messages that nothing reads: number of rows, and the place of the first."""
    unread_columns: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Columns with a value that the format does not read: number of rows, place of the first."""
    columns: dict[str, str] = field(default_factory=dict)
    """The entries of `data.columns` that the source uses: name here to name in the file."""
    unused_columns: dict[str, str] = field(default_factory=dict)
    """Names of `data.columns` that the source does not use, each with the reason."""
    hidden_columns: dict[str, str] = field(default_factory=dict)
    """Columns that are not read, each with the name whose place another one has taken."""
    named_roles: dict[str, tuple[str, int]] = field(default_factory=dict)
    """Names of `data.roles`, each with the role that it stands for and its number of turns."""
    left_out: str = ""
    """A sentence about files of the folder or pattern that are no part of the source."""
    roles: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Roles unknown to the template, as "developer as system": number of rows, place of the first.
    """
    suspect: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Likely mistakes in the text: number of rows, and the place of the first."""
    call_form: str = ""
    """Form in which the template takes tool calls, if the rows have some and it is unusual."""

    def count_lost(self, kind: str, where: str) -> None:
        """Count a row of which the template leaves out a part."""
        _count(self.lost, kind, where)

    def count_content(self, content: Conversation, template: ChatTemplate, where: str) -> None:
        """Count what is odd about a conversation, before it is rendered."""
        for key, index in content.unread.items():
            if not template.reads(key, content.messages[index]):
                _count(self.unread, key, where)
        for role, name in sorted(content.renamed):
            _count(self.roles, f"{role} as {name}", where)
        if number := unopened_thoughts(content):
            _count(self.suspect, "closing tag", f"{where}, message {number}")
        for index, message in enumerate(content.messages):
            if content.is_target(index) and _is_empty(message):
                _count(self.suspect, "empty answer", f"{where}, message {index + 1}")
                break
        for is_answer, (number, token) in template.special_tokens_in(content).items():
            kind = "learned token" if is_answer else "special token"
            _count(self.suspect, kind, f"{where}, message {number}: {token}")
        if not self.call_form and any("tool_calls" in message for message in content.messages):
            self.call_form = str(template.call_form)

    def count_columns(self, values: Mapping[str, Any], where: str) -> None:
        """Count the columns of a row, by the formats' names, that its format does not read."""
        for column in values.keys() - self._read_columns:
            if values[column] not in NOTHING:
                _count(self.unread_columns, column, where)

    @cached_property
    def _read_columns(self) -> frozenset[str]:
        return frozenset(columns_of(self.format)) - {*MESSAGE_KEYS}

    def add_names(self, names: FileNames) -> None:
        """Record which names of `data.columns` and `data.roles` the source has."""
        self.columns, self.unused_columns = names.used, names.unread
        self.hidden_columns, self.named_roles = names.hidden, names.roles

    def count(self, sample: Sample) -> None:
        """Add a sample that is used."""
        self.num_samples += 1
        self.num_tokens += len(sample.input_ids)
        self.num_targets += sample.num_targets
        self.max_sample_len = max(self.max_sample_len, len(sample.input_ids))
        self.max_token_id = max(self.max_token_id, *sample.input_ids)

    def sentence(self, max_seq_len: int) -> str:
        """Return the whole account as a sentence for a log."""
        text = (
            f"{self.path}: format {self.format}, {self.num_samples:,} rows, {self.num_tokens:,} "
            f"tokens, {self.num_targets / self.num_tokens:.0%} of them targets"
        )
        for count, fate in (
            (self.num_cut, f"rows cut to {max_seq_len}"),
            (self.num_split, f"rows split at {max_seq_len}"),
            (self.num_too_long, f"rows dropped (longer than {max_seq_len})"),
            (self.num_without_targets, "rows dropped (no target left)"),
            (self.faulty.num_rows, f"faulty rows left out: {self.faulty}"),
        ):
            text += f", {count:,} {fate}" if count else ""
        told = [*self.names(), *self.remarks()]
        text += "".join(f"\n  {remark}" for remark in told)
        if self.is_open_ended:
            text += (
                "\n  the chat template ends the assistant's turns without a special token, so the "
                "model does not learn to stop: choose another one with data.chat_template"
            )
        return text

    def names(self) -> list[str]:
        """Say which names of the source are read under which names, and which are not."""
        columns = [f"{name} from `{column}`" for name, column in self.columns.items()]
        roles = [
            f"{role} from {name!r} ({count:,} turns)"
            for name, (role, count) in self.named_roles.items()
            if count
        ]
        pairs = (("columns", columns), ("roles", roles))
        told = [f"{what} read: {', '.join(read)}" for what, read in pairs if read]
        told += [
            f"`{column}` is not read: data.columns takes {name} from `{self.columns[name]}`"
            for column, name in self.hidden_columns.items()
        ]
        told += [
            f"data.columns.{name} is not used here: {reason}"
            for name, reason in self.unused_columns.items()
        ]
        return told

    def remarks(self) -> list[str]:
        """Say what of the rows is not learned although they are used, each with count and place."""
        told = [
            f"the chat template leaves out {_LOST[kind][0]} of {count:,} rows (first: {where}): "
            f"{_LOST[kind][1]}"
            for kind, (count, where) in self.lost.items()
        ]
        told += [
            f"nothing reads the key `{key}` of messages ({count:,} rows, first: {where}): remove "
            "it, or choose a template that reads it"
            for key, (count, where) in self.unread.items()
        ]
        told += [
            f"the chat template does not know the role {names.partition(' ')[0]}, so it reads "
            f"{names} ({count:,} rows, first: {where}): rename the role, or choose a template that "
            "knows it"
            for names, (count, where) in self.roles.items()
        ]
        told += [
            f"{_SUSPECT[kind][0]} ({count:,} rows, first: {where}): {_SUSPECT[kind][1]}"
            for kind, (count, where) in self.suspect.items()
        ]
        if self.unread_columns:
            places = [where for _, where in self.unread_columns.values()]
            told.append(
                f"format {self.format} does not read {listed(sorted(self.unread_columns))} (first: "
                f"{places[0]}): if they hold words to learn, write them into the columns that it "
                "reads"
            )
        if self.call_form:
            told.append(
                f"the chat template takes {self.call_form}: the rows' calls are written so for it, "
                "and can stay as they are"
            )
        return told

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain data."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Report:
        """Return the report that `to_json` gave as plain data."""
        faulty = FaultyRows(**values["faulty"])
        # JSON makes lists of tuples.
        faulty.reasons = {reason: (n, where) for reason, (n, where) in faulty.reasons.items()}
        counted = {
            name: {key: (n, where) for key, (n, where) in values[name].items()}
            for name in ("lost", "unread", "unread_columns", "roles", "suspect", "named_roles")
        }
        return cls(**{**values, **counted, "faulty": faulty})

    def check(self, config: DataConfig) -> None:
        """Refuse a source of which too little can be used.

        Raises:
            DataError: more than `data.max_bad_fraction` of the rows are faulty (with the number of
                the first), or no row is left.
        """
        # Not a product: 0.29 * 100 is less than 29.
        if self.num_rows and self.faulty.num_rows / self.num_rows > config.max_bad_fraction:
            raise DataError(
                f"{self.faulty.first_message} In all, {self.faulty.num_rows:,} of "
                f"{self.num_rows:,} rows are faulty, more than data.max_bad_fraction "
                f"({config.max_bad_fraction:g}) lets pass: {self.faulty}. Mend or remove these "
                "rows, or raise data.max_bad_fraction to train without them."
            )
        if not self.num_samples:
            dropped = f", {self.num_too_long} are longer" if self.num_too_long else ""
            raise DataError(
                f"{self.path}: none of its {self.num_rows - self.faulty.num_rows} rows has a "
                f"target token within data.max_seq_len ({config.max_seq_len}){dropped}. Raise "
                "data.max_seq_len, or check that the rows hold answers."
            )


def check_columns_are_used(columns: Mapping[ColumnName, str], reports: Sequence[Report]) -> None:
    """Refuse an entry of `data.columns` that no source uses.

    Raises:
        DataError: with the columns of the sources.
    """
    for name, column in columns.items():
        told = (f"{report.path}: {report.unused_columns.get(name)}" for report in reports)
        reasons = list(dict.fromkeys(told))
        if all(name in report.unused_columns for report in reports):
            raise DataError(
                f"data.columns.{name} is {column!r}, but nothing is read under that name "
                f"({'; '.join(reasons[:2])}{'; …' * (len(reasons) > 2)}). Name a column of the "
                "file, or remove the entry."
            )


def unused_roles(reports: Sequence[Report]) -> list[str]:
    """Return sentences about the names of `data.roles` that no turn of any source has."""
    names = {name: role for report in reports for name, (role, _) in report.named_roles.items()}
    return [
        f"data.roles.{role} has {name!r}, but no turn is from {name!r}: check the spelling (upper "
        "and lower case differ), or remove the name"
        for name, role in names.items()
        if not any(report.named_roles[name][1] for report in reports)
    ]
