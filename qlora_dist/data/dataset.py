"""Tokenized samples for training and evaluation, from the `data` section of a configuration."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from qlora_dist.config.schema import DataConfig, TrainConfig
from qlora_dist.data.cache import TokenizedSource, tokenized
from qlora_dist.data.chat_template import ChatTemplate, set_chat_template
from qlora_dist.data.messages import PromptLayout
from qlora_dist.data.packing import pack
from qlora_dist.data.report import Report, check_columns_are_used, unused_roles
from qlora_dist.data.samples import Rows
from qlora_dist.data.tokenizer import check_tokenizer_fits, load_tokenizer, num_embeddings
from qlora_dist.errors import DataError
from qlora_dist.metrics.console import Reporter


@dataclass(frozen=True)
class RunData:
    """Tokenized samples of a run, and the account of the rows that they were made of."""

    train: Rows
    """Rows of all training sources, one source after the other; packed, of several samples each."""
    eval: Rows
    sizes: tuple[int, ...]
    """Training rows of each source."""
    weights: tuple[float, ...]
    """Passes over each source in one epoch."""
    reports: tuple[Report, ...]
    """Reports of each training source, then of each evaluation source."""
    notes: list[str]
    """Sentences that sum up the data."""

    @property
    def layout(self) -> PromptLayout:
        """The prompt layout of the first source."""
        layout = self.reports[0].layout
        assert layout is not None
        return layout

    def fingerprint(self) -> str:
        """Return a digest of all that decides which samples a run sees when.

        These are the sizes and weights of the sources, and the tokenized samples in order.
        """
        identity = repr((self.sizes, self.weights, self.train.digest()))
        return hashlib.sha256(identity.encode()).hexdigest()


def load_data(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    show: Callable[[str], None] = lambda text: None,
) -> RunData:
    """Read, tokenize and split the data of a run; equal on every rank.

    Args:
        show: is called with a line about the progress, every now and then.

    Raises:
        DataError: see `tokenized`; or no source uses an entry of `data.columns`, or
            `data.eval_fraction` leaves nothing on one side.
    """
    limit = config.max_seq_len
    sources = [tokenized(s.path, "data.train", tokenizer, config, show) for s in config.sources]
    eval_sources = [tokenized(p, "data.eval", tokenizer, config, show) for p in config.eval_files]
    reports = tuple(source.report for source in [*sources, *eval_sources])
    check_columns_are_used(config.columns, reports)
    weights = tuple(source.weight for source in config.sources)
    notes = [report.sentence(limit) for report in reports]
    notes += unused_variables(reports, tokenizer, config)
    for number, weight in enumerate(weights):
        if len(weights) > 1 or weight != 1:
            notes[number] += f", weight {weight:g}"
    notes += [report.left_out for report in reports if report.left_out]
    notes += unused_roles(reports)
    train = [Rows.of(source.store) for source in sources]
    held_out = [Rows.of(source.store) for source in eval_sources]
    if config.eval_fraction > 0:
        num_rows = sum(map(len, train))
        parts = [_split(source, config.eval_fraction, seed) for source in sources]
        train, held_out = [part[0] for part in parts], [part[1] for part in parts]
        notes.append(f"held out {sum(map(len, held_out)):,} of {num_rows:,} rows for evaluation")
    if config.packing:
        train = [rows.grouped(pack(rows.lengths.tolist(), limit, seed)) for rows in train]
        num_samples, num_rows = sum(rows.num_samples for rows in train), sum(map(len, train))
        num_tokens = sum(int(rows.lengths.sum()) for rows in train)
        notes.append(
            f"packed {num_samples:,} samples into {num_rows:,} rows of at most {limit:,} tokens, "
            f"{num_tokens / (num_rows * limit):.1%} full"
        )
    sizes = tuple(map(len, train))
    train_rows, eval_rows = Rows.concatenated(train), Rows.concatenated(held_out)
    return RunData(train_rows, eval_rows, sizes, weights, reports, notes)


def unused_variables(
    reports: Sequence[Report], tokenizer: PreTrainedTokenizerBase, config: DataConfig
) -> list[str]:
    """Return a sentence about the variables of `data.template_kwargs` that have no effect."""
    variables = config.template_kwargs or {}
    unused = list(variables)
    if any(report.layout == "messages" for report in reports):
        unused = ChatTemplate(tokenizer, variables=variables).unused_variables
    if not unused:
        return []
    return [
        f"data.template_kwargs sets {', '.join(unused)}, which the chat template does not use: "
        f"remove {'it' if len(unused) == 1 else 'them'}, or choose another template with "
        "data.chat_template"
    ]


def _split(source: TokenizedSource, eval_fraction: float, seed: int) -> tuple[Rows, Rows]:
    """Return the rows to train on, and the rows held out; a source's split ignores the others."""
    rows = Rows.of(source.store)
    num_eval = max(1, round(len(rows) * eval_fraction))
    if num_eval >= len(rows):
        raise DataError(
            f"data.eval_fraction {eval_fraction:g} of {len(rows)} rows leaves no row of "
            f"{source.report.path} to train on. Lower it, or give data.eval."
        )
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    held_out, train = sorted(order[:num_eval]), sorted(order[num_eval:])
    return rows.grouped([[i] for i in train]), rows.grouped([[i] for i in held_out])


def load_tokenizer_and_data(
    config: TrainConfig,
    model_folder: Path,
    reporter: Reporter,
    main_first: Callable[[Callable[[], RunData]], RunData] = lambda make: make(),
) -> tuple[PreTrainedTokenizerBase, RunData]:
    """Return the tokenizer in `model_folder`, and the samples of the run as training sees them.

    Args:
        main_first: `Runtime.main_first`, if several processes load the data.

    Raises:
        ModelError: see `load_tokenizer` and `check_tokenizer_fits`.
        ConfigError: see `set_chat_template`.
        DataError: see `load_data`.
    """
    tokenizer = load_tokenizer(model_folder, config.model.trust_remote_code)
    set_chat_template(tokenizer, config.data.chat_template)
    with reporter.preparing() as show:
        data = main_first(lambda: load_data(config.data, tokenizer, config.seed, show))
    # The command `data` needs no model, only its tokenizer.
    if (model_folder / "config.json").is_file():
        largest = max(report.max_token_id for report in data.reports)
        check_tokenizer_fits(tokenizer, largest, num_embeddings(model_folder, config.model))
    return tokenizer, data
