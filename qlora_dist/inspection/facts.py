"""What a person wants to know of a run's data before training: counts, lengths, padding, duplicates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from qlora_dist.config.schema import TrainConfig
from qlora_dist.data.dataset import RunData
from qlora_dist.data.order import BatchPlan, SampleOrder, run_end, sample_order
from qlora_dist.data.packing import pack
from qlora_dist.data.report import Report
from qlora_dist.data.samples import Rows
from qlora_dist.inspection.scan import Scan, scan

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class SourceFacts:
    """A source, and what became of its rows."""

    key: Literal["data.train", "data.eval"]
    weight: float | None
    """Passes over it in one epoch; None for evaluation."""
    epoch_share: float | None
    """Of the tokens of the first epoch; None for evaluation."""
    report: Report


@dataclass(frozen=True)
class Spread:
    """Percentiles by nearest rank, so each is a value that occurs."""

    p50: int
    p90: int
    p99: int
    max: int

    @classmethod
    def of(cls, values: NDArray[np.int64]) -> Spread:
        """Those of at least one value."""
        return cls(
            *(
                int(value)
                for value in np.percentile(values, [50, 90, 99, 100], method="inverted_cdf")
            )
        )


@dataclass(frozen=True)
class Bin:
    """How many samples have so many tokens."""

    first: int
    last: int
    num_samples: int


@dataclass(frozen=True)
class AnswerOpening:
    """A token with which samples begin to answer."""

    text: str
    num_samples: int


@dataclass(frozen=True)
class PartFacts:
    """The samples that a run trains on, or those that it is evaluated on."""

    num_samples: int
    num_tokens: int
    num_targets: int
    lengths: Spread
    """Tokens of a sample."""
    targets: Spread
    """Tokens of a sample that count in the loss."""
    num_at_limit: int
    """Samples of exactly `data.max_seq_len` tokens; most of them were cut."""
    histogram: tuple[Bin, ...]
    num_repeats: int
    """Samples that another one before them equals, token for token."""
    most_repeated: str | None
    """How the answer of the most frequent sample begins; None when all differ."""
    most_repeated_times: int
    num_answers: int
    num_empty_answers: int
    num_answers_of_one_token: int
    num_open: int
    """Samples whose last target is no special token, so that they do not teach to stop."""
    openings: tuple[AnswerOpening, ...]
    """The most frequent ones."""


@dataclass(frozen=True)
class Batching:
    """What one way to make rows and micro-batches of the training samples costs in the first epoch."""

    arrangement: Literal["shuffled", "group_by_length", "packing"]
    is_configured: bool
    num_rows: int
    num_steps: int
    """The last one may reach into the next epoch."""
    num_tokens: int
    """Without padding."""
    num_computed_tokens: int
    """With padding."""
    padding: float
    """Share of the computed tokens."""


@dataclass(frozen=True)
class RunFacts:
    """The run as configured, on one process."""

    num_steps: int
    epochs: float
    micro_batch_size: int
    grad_accum_steps: int
    num_rows_per_step: int
    max_seq_len: int
    num_targets_per_epoch: int


@dataclass(frozen=True)
class Leak:
    """Evaluation samples that training has seen."""

    num_samples: int
    """Token for token."""
    num_prompts: int
    """The prompt only, with another answer; 0 where most training samples share their prompt anyway."""


@dataclass(frozen=True)
class Facts:
    """Everything that is told of a run's data."""

    sources: tuple[SourceFacts, ...]
    train: PartFacts
    eval: PartFacts | None
    batchings: tuple[Batching, ...]
    run: RunFacts
    leak: Leak | None
    """None: nothing is evaluated."""

    @property
    def configured(self) -> Batching:
        """How the run makes its rows."""
        return next(batching for batching in self.batchings if batching.is_configured)

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


def gather_facts(
    data: RunData,
    config: TrainConfig,
    tokenizer: PreTrainedTokenizerBase,
    show: Callable[[str], None] = lambda text: None,
) -> Facts:
    """Look at all samples of a run.

    Args:
        show: is called with a line about how far things are, every now and then.
    """
    is_special = special_tokens(tokenizer)
    train, held_out = data.train.apart(), data.eval.apart()
    train_scan, eval_scan = scan(train, is_special, show), scan(held_out, is_special, show)
    limit = config.data.max_seq_len
    show("laying out an epoch")
    order = sample_order(data, config)
    stream = np.array(order.between(0, order.epoch_size), dtype=np.int64)
    return Facts(
        sources=_sources(data, stream),
        train=_part(train, train_scan, tokenizer, limit),
        eval=_part(held_out, eval_scan, tokenizer, limit) if len(held_out) else None,
        batchings=batchings(data, config),
        run=_run(order, config, int(_targets_of_rows(data.train, train_scan)[stream].sum())),
        leak=_leak(train_scan, eval_scan) if len(held_out) else None,
    )


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> NDArray[np.bool_]:
    """Which token ids stand for no text. (vocab_size,)"""
    ids = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special} | {
        *tokenizer.all_special_ids
    }
    mask = np.zeros(max(len(tokenizer), *ids, 0) + 1, dtype=np.bool_)
    mask[list(ids)] = True
    return mask


def _sources(data: RunData, stream: NDArray[np.int64]) -> tuple[SourceFacts, ...]:
    source_of_row = np.repeat(np.arange(len(data.sizes)), data.sizes)
    tokens = np.bincount(
        source_of_row[stream], weights=data.train.lengths[stream], minlength=len(data.sizes)
    )
    shares = (tokens / tokens.sum()).tolist()
    trained = [
        SourceFacts("data.train", weight, share, report)
        for weight, share, report in zip(data.weights, shares, data.reports, strict=False)
    ]
    return (
        *trained,
        *(SourceFacts("data.eval", None, None, report) for report in data.reports[len(trained) :]),
    )


def _part(samples: Rows, found: Scan, tokenizer: PreTrainedTokenizerBase, limit: int) -> PartFacts:
    lengths, answers = samples.lengths, found.answers
    unique, firsts, times = np.unique(found.hashes, return_index=True, return_counts=True)
    most = int(times.max())
    return PartFacts(
        num_samples=len(samples),
        num_tokens=int(lengths.sum()),
        num_targets=int(found.num_targets.sum()),
        lengths=Spread.of(lengths),
        targets=Spread.of(found.num_targets),
        num_at_limit=int((lengths == limit).sum()),
        histogram=histogram(lengths, limit),
        num_repeats=len(samples) - len(unique),
        most_repeated=_answer_text(samples, int(firsts[times == most].min()), tokenizer)
        if most > 1
        else None,
        most_repeated_times=most,
        num_answers=answers.num_answers,
        num_empty_answers=answers.num_empty,
        num_answers_of_one_token=answers.num_of_one_token,
        num_open=answers.num_open,
        openings=tuple(
            AnswerOpening(tokenizer.decode([token]), count)
            for token, count in answers.openings.most_common(_NUM_OPENINGS)
        ),
    )


_NUM_OPENINGS = 3
_ANSWER_TOKENS = 16
"""Of a repeated answer, so many are shown."""


def _answer_text(samples: Rows, index: int, tokenizer: PreTrainedTokenizerBase) -> str:
    targets = [label for label in samples[index].labels if label >= 0]
    return str(tokenizer.decode(targets[:_ANSWER_TOKENS])) + (
        "…" if len(targets) > _ANSWER_TOKENS else ""
    )


_MAX_BINS = 12


def histogram(lengths: NDArray[np.int64], limit: int) -> tuple[Bin, ...]:
    """Samples by length, from the shortest to the longest, in 4, 2 or 1 equal bins from one power of two to the next:
    the most that keep it short."""
    bins: list[Bin] = []
    for parts in (4, 2, 1):
        lasts = [*_bin_lasts(limit, parts), limit]
        counts = np.bincount(np.searchsorted(lasts, lengths), minlength=len(lasts)).tolist()
        bins = [
            Bin(before + 1, last, n)
            for (before, last), n in zip(pairwise([0, *lasts]), counts, strict=True)
        ]
        used = [number for number, bin in enumerate(bins) if bin.num_samples]
        bins = bins[used[0] : used[-1] + 1]
        if len(bins) <= _MAX_BINS:
            break
    return tuple(bins)


def _bin_lasts(limit: int, parts: int) -> list[int]:
    powers = (2**k for k in range(limit.bit_length()))
    lasts = {power + power * part // parts for power in powers for part in range(parts)}
    return sorted(
        last for last in lasts if last <= 0.9 * limit
    )  # so that the bin up to the limit is not a sliver


# --------------------------------------------------------------------------------------------------------------------
# Rows and micro-batches: as configured, and as they could be.


def batchings(data: RunData, config: TrainConfig) -> tuple[Batching, ...]:
    """The first epoch's padding and steps with rows in random order, grouped by length, and packed."""
    bounds = [0, *accumulate(data.sizes)]
    lengths = _cut(
        data.train.apart().lengths, [int(data.train.counts[a:b].sum()) for a, b in pairwise(bounds)]
    )
    if config.data.packing:
        packed = _cut(data.train.lengths, data.sizes)
    else:
        packed = [_packed(source, config.data.max_seq_len, config.seed) for source in lengths]
    return (
        _batching("shuffled", lengths, data.weights, config),
        _batching("group_by_length", lengths, data.weights, config),
        _batching("packing", packed, data.weights, config),
    )


def _cut(values: NDArray[np.int64], sizes: Sequence[int]) -> list[NDArray[np.int64]]:
    return np.split(values, list(accumulate(sizes))[:-1])


def _packed(lengths: NDArray[np.int64], max_seq_len: int, seed: int) -> NDArray[np.int64]:
    return np.array(
        [lengths[members].sum() for members in pack(lengths.tolist(), max_seq_len, seed)],
        dtype=np.int64,
    )


def _batching(
    arrangement: Literal["shuffled", "group_by_length", "packing"],
    sources: list[NDArray[np.int64]],
    weights: tuple[float, ...],
    config: TrainConfig,
) -> Batching:
    lengths = np.concatenate(sources)
    keys = tuple(lengths.tolist()) if arrangement == "group_by_length" else None
    order = SampleOrder(tuple(map(len, sources)), config.seed, weights, keys)
    stream = lengths[order.between(0, order.epoch_size)]
    num_tokens, num_computed = int(stream.sum()), num_padded(stream, config.optim.micro_batch_size)
    chosen = (
        "packing"
        if config.data.packing
        else "group_by_length"
        if config.data.group_by_length
        else "shuffled"
    )
    return Batching(
        arrangement=arrangement,
        is_configured=arrangement == chosen,
        num_rows=len(stream),
        num_steps=-(
            -len(stream) // (config.optim.micro_batch_size * config.optim.grad_accum_steps)
        ),
        num_tokens=num_tokens,
        num_computed_tokens=num_computed,
        padding=1 - num_tokens / num_computed,
    )


def num_padded(lengths: NDArray[np.int64], micro_batch_size: int) -> int:
    """Tokens of rows in this order once each micro-batch is padded to its longest row."""
    longest = np.maximum.reduceat(lengths, np.arange(0, len(lengths), micro_batch_size))
    return int(longest.sum() * micro_batch_size - longest[-1] * (-len(lengths) % micro_batch_size))


def _run(order: SampleOrder, config: TrainConfig, num_targets_per_epoch: int) -> RunFacts:
    optim = config.optim
    plan = BatchPlan(
        order, optim.micro_batch_size, optim.grad_accum_steps, 1, run_end(order, optim)
    )
    num_steps = plan.num_steps(0, 0, optim)
    num_rows = num_steps * plan.global_batch_size if plan.end is None else plan.end
    return RunFacts(
        num_steps=num_steps,
        epochs=plan.epoch_at(num_rows),
        micro_batch_size=optim.micro_batch_size,
        grad_accum_steps=optim.grad_accum_steps,
        num_rows_per_step=plan.global_batch_size,
        max_seq_len=config.data.max_seq_len,
        num_targets_per_epoch=num_targets_per_epoch,
    )


def _targets_of_rows(rows: Rows, found: Scan) -> NDArray[np.int64]:
    return np.add.reduceat(found.num_targets, np.cumsum(rows.counts) - rows.counts)


def _leak(train: Scan, held_out: Scan) -> Leak:
    is_seen = np.isin(held_out.hashes, train.hashes)
    prompts = train.prompt_hashes[train.prompt_hashes != 0]
    is_telling = 2 * len(np.unique(prompts)) > len(train.hashes)  # not all the same instruction
    has_seen_prompt = np.isin(held_out.prompt_hashes, prompts) & ~is_seen
    return Leak(int(is_seen.sum()), int(has_seen_prompt.sum()) if is_telling else 0)
