"""Rows as the trainer sees them, without a file."""

import copy
from dataclasses import dataclass
from pathlib import Path

import pytest

from qlora_dist.config.schema import IGNORE_INDEX, DataConfig
from qlora_dist.data.encode import encode_rows
from qlora_dist.data.report import Report
from qlora_dist.data.samples import Rows, Sample, SampleStore, SampleWriter
from qlora_dist.data.sources import Row
from qlora_dist.errors import DataError


@dataclass(frozen=True)
class Encoded:
    """Samples of rows, and a report on the rows."""

    samples: list[Sample]
    report: Report


def encode(rows: list[dict], tokenizer, format: str = "auto", **config) -> Encoded:
    """Tokenize rows as those of a file `rows.jsonl`; refuse them as a run would."""
    settings = DataConfig(train="rows.jsonl", format=format, **config)
    numbered = [Row(f"rows.jsonl, row {number}", row) for number, row in enumerate(rows, start=1)]
    samples: list[Sample] = []
    report = encode_rows(numbered, tokenizer, settings, "rows.jsonl", samples.append)
    report.check(settings)
    return Encoded(samples, report)


def stored(samples: list[Sample], folder: Path) -> Rows:
    """Samples written to disk and read back, one per row."""
    folder.mkdir(parents=True)
    writer = SampleWriter(folder)
    for sample in samples:
        writer.add(sample)
    return Rows.of(SampleStore(folder, writer.close()))


def targets(sample: Sample, tokenizer) -> str:
    """Return the text that counts in the loss."""
    return tokenizer.decode([label for label in sample.labels if label != IGNORE_INDEX])


def with_template(tokenizer, template: str | None):
    """Return the tokenizer with another chat template."""
    other = copy.deepcopy(tokenizer)
    other.chat_template = template
    return other


def refusal(rows: list[dict], tokenizer, layout: str = "messages", **config) -> str:
    """Return the message with which rows are refused."""
    with pytest.raises(DataError) as caught:
        encode(rows, tokenizer, layout, **config)
    return str(caught.value)
