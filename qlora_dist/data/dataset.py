"""From the `data` section of a configuration to tokenised samples for training and for evaluation."""

from __future__ import annotations

import hashlib
from array import array
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

import torch

from qlora_dist.config import DataConfig
from qlora_dist.data.chat import EncodedRows, Sample, encode_rows
from qlora_dist.data.formats import Layout
from qlora_dist.data.packing import pack_samples
from qlora_dist.data.sources import load_rows
from qlora_dist.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Dataset:
    """Tokenised samples of a run, and sentences that say what became of the rows."""

    train: list[Sample]
    """Those of the first source, then those of the second, and so on; with packing, rows of several samples each."""
    eval: list[Sample]
    sizes: tuple[int, ...]
    """Training samples of each source."""
    weights: tuple[float, ...]
    """Passes over each source in one epoch."""
    layout: Layout
    """Of the first source."""
    notes: list[str]

    def fingerprint(self) -> str:
        """Of what decides which samples a run sees when: sources, weights and the tokenised samples, in order."""
        digest = hashlib.sha256(repr((self.sizes, self.weights)).encode())
        for sample in self.train:
            numbers = [len(sample.input_ids), *sample.starts, *sample.input_ids, *sample.labels]
            digest.update(array("q", numbers).tobytes())
        return digest.hexdigest()


def load_dataset(config: DataConfig, tokenizer: PreTrainedTokenizerBase, seed: int) -> Dataset:
    """Read, tokenise and split the data of a run; every rank does this alike.

    Raises:
        DataError: see `load_rows` and `encode_rows`, or `data.eval_fraction` leaves nothing on one side.
    """
    files = [_load_file(source.path, "data.train", config, tokenizer) for source in config.sources]
    eval_files = [_load_file(path, "data.eval", config, tokenizer) for path in config.eval_files]
    notes = [
        file.note(config.max_seq_len) + (f", weight {source.weight:g}" if len(files) > 1 or source.weight != 1 else "")
        for file, source in zip(files, config.sources, strict=True)
    ] + [file.note(config.max_seq_len) for file in eval_files]
    train = [file.encoded.samples for file in files]
    held_out = [file.encoded.samples for file in eval_files]
    if config.eval_fraction > 0:
        num_rows = sum(map(len, train))
        train, held_out = map(list, zip(*(_split(file, config.eval_fraction, seed) for file in files), strict=True))
        notes.append(f"held out {sum(map(len, held_out)):,} of {num_rows:,} rows for evaluation")
    if config.packing:
        num_samples, num_tokens = sum(map(len, train)), _num_tokens(train)
        train = [pack_samples(samples, config.max_seq_len, seed) for samples in train]
        num_rows = sum(map(len, train))
        notes.append(
            f"packed {num_samples:,} samples into {num_rows:,} rows of at most {config.max_seq_len:,} tokens, "
            f"{num_tokens / (num_rows * config.max_seq_len):.1%} full"
        )
    return Dataset(
        train=list(chain.from_iterable(train)),
        eval=list(chain.from_iterable(held_out)),
        sizes=tuple(map(len, train)),
        weights=tuple(source.weight for source in config.sources),
        layout=files[0].encoded.layout,
        notes=notes,
    )


def _num_tokens(sources: list[list[Sample]]) -> int:
    return sum(len(sample.input_ids) for samples in sources for sample in samples)


@dataclass(frozen=True)
class _File:
    path: str
    encoded: EncodedRows

    def note(self, max_seq_len: int) -> str:
        encoded = self.encoded
        tokens = sum(len(sample.input_ids) for sample in encoded.samples)
        targets = sum(sample.num_targets for sample in encoded.samples)
        text = (
            f"{self.path}: format {encoded.format}, {len(encoded.samples):,} rows, {tokens:,} tokens, "
            f"{targets / tokens:.0%} of them targets"
        )
        if encoded.num_truncated:
            text += f", {encoded.num_truncated:,} rows cut to {max_seq_len}"
        if encoded.num_without_targets:
            text += f", {encoded.num_without_targets:,} rows dropped (no target left)"
        if encoded.faulty.num_rows:
            text += f", {encoded.faulty.num_rows:,} faulty rows left out: {encoded.faulty}"
        return text


def _load_file(path: str, key: str, config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> _File:
    return _File(path, encode_rows(load_rows(path, key), tokenizer, config, path))


def _split(file: _File, eval_fraction: float, seed: int) -> tuple[list[Sample], list[Sample]]:
    """Samples to train on, and those held out; depends on the file and the seed, not on other files beside it."""
    samples = file.encoded.samples
    num_eval = max(1, round(len(samples) * eval_fraction))
    if num_eval >= len(samples):
        raise DataError(
            f"data.eval_fraction {eval_fraction:g} of {len(samples)} rows leaves no row of {file.path} to train on. "
            "Lower it, or give data.eval."
        )
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed)).tolist()
    held = set(order[:num_eval])
    train = [sample for i, sample in enumerate(samples) if i not in held]
    return train, [sample for i, sample in enumerate(samples) if i in held]
