"""From the `data` section of a configuration to tokenized samples for training and for evaluation."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from qlora_dist.config.schema import DataConfig
from qlora_dist.data.cache import TokenizedSource, tokenized
from qlora_dist.data.formats import PromptLayout
from qlora_dist.data.packing import pack
from qlora_dist.data.report import Report
from qlora_dist.data.samples import Rows
from qlora_dist.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from qlora_dist.config.schema import TrainConfig
from qlora_dist.data.chat_template import set_chat_template
from qlora_dist.data.tokenizer import check_tokenizer_fits, load_tokenizer, num_embeddings
from qlora_dist.metrics.console import Reporter


@dataclass(frozen=True)
class RunData:
    """Tokenized samples of a run, and what became of the rows that they were made of."""

    train: Rows
    """Those of the first source, then those of the second, and so on; with packing, rows of several samples each."""
    eval: Rows
    sizes: tuple[int, ...]
    """Training rows of each source."""
    weights: tuple[float, ...]
    """Passes over each source in one epoch."""
    reports: tuple[Report, ...]
    """Of each training source, then of each evaluation source."""
    notes: list[str]
    """Sentences that say all this."""

    @property
    def layout(self) -> PromptLayout:
        """Of the first source."""
        layout = self.reports[0].layout
        assert layout is not None
        return layout

    def fingerprint(self) -> str:
        """Of what decides which samples a run sees when: sources, weights and the tokenized samples, in order."""
        return hashlib.sha256(
            repr((self.sizes, self.weights, self.train.digest())).encode()
        ).hexdigest()


def load_data(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    show: Callable[[str], None] = lambda text: None,
) -> RunData:
    """Read, tokenize and split the data of a run; every rank does this alike.

    Args:
        show: is called with a line about how far things are, every now and then.

    Raises:
        DataError: see `tokenized`, or `data.eval_fraction` leaves nothing on one side.
    """
    sources = [
        tokenized(source.path, "data.train", tokenizer, config, show) for source in config.sources
    ]
    eval_sources = [
        tokenized(path, "data.eval", tokenizer, config, show) for path in config.eval_files
    ]
    weights = tuple(source.weight for source in config.sources)
    notes = [
        source.report.sentence(config.max_seq_len)
        + (f", weight {weight:g}" if len(sources) > 1 or weight != 1 else "")
        for source, weight in zip(sources, weights, strict=True)
    ] + [source.report.sentence(config.max_seq_len) for source in eval_sources]
    train = [Rows.of(source.store) for source in sources]
    held_out = [Rows.of(source.store) for source in eval_sources]
    if config.eval_fraction > 0:
        num_rows = sum(map(len, train))
        parts = [_split(source, config.eval_fraction, seed) for source in sources]
        train, held_out = [part[0] for part in parts], [part[1] for part in parts]
        notes.append(f"held out {sum(map(len, held_out)):,} of {num_rows:,} rows for evaluation")
    if config.packing:
        train = [
            rows.grouped(pack(rows.lengths.tolist(), config.max_seq_len, seed)) for rows in train
        ]
        num_samples, num_rows = sum(rows.num_samples for rows in train), sum(map(len, train))
        num_tokens = sum(int(rows.lengths.sum()) for rows in train)
        notes.append(
            f"packed {num_samples:,} samples into {num_rows:,} rows of at most {config.max_seq_len:,} tokens, "
            f"{num_tokens / (num_rows * config.max_seq_len):.1%} full"
        )
    return RunData(
        train=Rows.concatenated(train),
        eval=Rows.concatenated(held_out),
        sizes=tuple(map(len, train)),
        weights=weights,
        reports=tuple(source.report for source in [*sources, *eval_sources]),
        notes=notes,
    )


def _split(source: TokenizedSource, eval_fraction: float, seed: int) -> tuple[Rows, Rows]:
    """Samples to train on, and those held out; depends on the file and the seed, not on other files beside it."""
    rows = Rows.of(source.store)
    num_eval = max(1, round(len(rows) * eval_fraction))
    if num_eval >= len(rows):
        raise DataError(
            f"data.eval_fraction {eval_fraction:g} of {len(rows)} rows leaves no row of {source.report.path} to train "
            "on. Lower it, or give data.eval."
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
    """The tokenizer in `model_folder`, and the samples of the run; whoever looks at them sees what training sees.

    Args:
        main_first: `Runtime.main_first`, where several processes load the same.

    Raises:
        ModelError: see `load_tokenizer` and `check_tokenizer_fits`.
        ConfigError: see `set_chat_template`.
        DataError: see `load_data`.
    """
    tokenizer = load_tokenizer(model_folder, config.model.trust_remote_code)
    set_chat_template(tokenizer, config.data.chat_template)
    with reporter.preparing() as show:
        data = main_first(lambda: load_data(config.data, tokenizer, config.seed, show))
    if (model_folder / "config.json").is_file():  # a look at the data does not need one
        largest = max(report.max_token_id for report in data.reports)
        check_tokenizer_fits(tokenizer, largest, num_embeddings(model_folder, config.model))
    return tokenizer, data
