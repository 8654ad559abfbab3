"""From the `data` section of a configuration to tokenised samples for training and for evaluation."""

from __future__ import annotations

import hashlib
from array import array
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from qlora_dist.config import DataConfig
from qlora_dist.data.chat import EncodedRows, Sample, encode_rows
from qlora_dist.data.sources import Layout, detect_layout, load_rows
from qlora_dist.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Dataset:
    """Tokenised samples of a run, and sentences that say what became of the rows."""

    train: list[Sample]
    eval: list[Sample]
    layout: Layout
    notes: list[str]

    def fingerprint(self) -> str:
        """Of the tokenised training samples, in order: tokenizer, template and cuts included."""
        digest = hashlib.sha256()
        for sample in self.train:
            digest.update(array("q", [len(sample.input_ids), *sample.input_ids, *sample.labels]).tobytes())
        return digest.hexdigest()


def load_dataset(config: DataConfig, tokenizer: PreTrainedTokenizerBase, seed: int) -> Dataset:
    """Read, tokenise and split the data of a run; every rank does this alike.

    Raises:
        DataError: see `load_rows` and `encode_rows`, or `data.eval_fraction` leaves nothing on one side.
    """
    train, layout = _load_file(config.train, "data.train", config, tokenizer)
    notes = [_note(config.train, train, config)]
    if config.eval is not None:
        held_out, _ = _load_file(config.eval, "data.eval", config, tokenizer)
        return Dataset(train.samples, held_out.samples, layout, [*notes, _note(config.eval, held_out, config)])
    if config.eval_fraction == 0:
        return Dataset(train.samples, [], layout, notes)
    num_eval = max(1, round(len(train.samples) * config.eval_fraction))
    if num_eval >= len(train.samples):
        raise DataError(
            f"data.eval_fraction {config.eval_fraction:g} of {len(train.samples)} rows leaves no row to train on. "
            "Lower it, or give data.eval."
        )
    order = torch.randperm(len(train.samples), generator=torch.Generator().manual_seed(seed)).tolist()
    held = set(order[:num_eval])
    notes.append(f"held out {num_eval} of {len(train.samples)} rows for evaluation")
    return Dataset(
        [sample for i, sample in enumerate(train.samples) if i not in held],
        [sample for i, sample in enumerate(train.samples) if i in held],
        layout,
        notes,
    )


def _load_file(
    path: str, key: str, config: DataConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[EncodedRows, Layout]:
    rows = load_rows(path, key)
    layout = detect_layout(rows.column_names, config.format, path)
    return encode_rows(rows, layout, tokenizer, config, path), layout


def _note(path: str, encoded: EncodedRows, config: DataConfig) -> str:
    tokens = sum(len(sample.input_ids) for sample in encoded.samples)
    targets = sum(sample.num_targets for sample in encoded.samples)
    text = f"{path}: {len(encoded.samples):,} rows, {tokens:,} tokens, {targets / tokens:.0%} of them targets"
    if encoded.num_truncated:
        text += f", {encoded.num_truncated:,} rows cut to {config.max_seq_len}"
    if encoded.num_without_targets:
        text += f", {encoded.num_without_targets:,} rows dropped (no target left)"
    return text
