"""Account of each row of a source: used, cut, split, dropped or faulty."""

# Tested by tests/unit/data/test_dataset.py and tests/unit/data/test_tokenization.py.

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from qlora_dist.config.data_names import ColumnName
from qlora_dist.config.schema import DataConfig
from qlora_dist.data.formats import Format
from qlora_dist.data.messages import PromptLayout, RowFault
from qlora_dist.data.names import FileNames
from qlora_dist.data.samples import Sample
from qlora_dist.errors import DataError

_LOST = {
    "text": "text",
    "thoughts": "thoughts (reasoning_content, or <think> in the text)",
    "tool_calls": "tool calls",
    "tools": "the list of tools",
}


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
        count, first = self.reasons.get(fault.reason, (0, where))
        self.reasons[fault.reason] = count + 1, first

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

    def count_lost(self, kind: str, where: str) -> None:
        """Count a row of which the template leaves out a part."""
        number, first = self.lost.get(kind, (0, where))
        self.lost[kind] = number + 1, first

    def count_unread(self, key: str, where: str) -> None:
        """Count a row with a key of messages that nothing reads."""
        number, first = self.unread.get(key, (0, where))
        self.unread[key] = number + 1, first

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
        text += "".join(f"; {remark}" for remark in [*self.names(), *self.remarks()])
        if self.is_open_ended:
            text += (
                "; the chat template ends the assistant's turns without a special token, so the "
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
        return [
            *(
                f"the chat template leaves out {_LOST[kind]} of {count:,} rows (first: {where})"
                for kind, (count, where) in self.lost.items()
            ),
            *(
                f"nothing reads the key `{key}` of messages ({count:,} rows, first: {where})"
                for key, (count, where) in self.unread.items()
            ),
        ]

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
            for name in ("lost", "unread", "named_roles")
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
                f"({config.max_bad_fraction:g}) lets pass: {self.faulty}."
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
