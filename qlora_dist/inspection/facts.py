"""Facts about a run's data before training: counts, lengths, padding, duplicates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from qlora_dist.config.schema import TrainConfig
from qlora_dist.data.dataset import RunData, unused_variables
from qlora_dist.data.order import BatchPlan, SampleOrder, run_end, sample_order
from qlora_dist.data.packing import pack
from qlora_dist.data.report import Report
from qlora_dist.data.samples import Rows
from qlora_dist.inspection.scan import Scan, scan

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class SourceFacts:
    """A source, and the account of its rows."""

    key: Literal["data.train", "data.eval"]
    weight: float | None
    """Passes over it in one epoch; None for evaluation."""
    epoch_share: float | None
    """Share of the tokens of the first epoch; None for evaluation."""
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
        """Return the percentiles of at least one value."""
        return cls(*map(int, np.percentile(values, [50, 90, 99, 100], method="inverted_cdf")))


@dataclass(frozen=True)
class Bin:
    """Number of samples of `first` to `last` tokens."""

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
    """The samples that a run trains on, or the samples that it is evaluated on."""

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
    """Samples that equal an earlier sample, token for token."""
    most_repeated: str | None
    """The first words of the most frequent sample's answer; None if all samples differ."""
    most_repeated_times: int
    num_answers: int
    num_empty_answers: int
    num_answers_of_one_token: int
    num_open: int
    """Samples whose last target is no special token, so that they do not teach to stop."""
    openings: tuple[AnswerOpening, ...]
    """The most frequent openings."""


@dataclass(frozen=True)
class Batching:
    """Cost, in the first epoch, of a way to make rows and micro-batches of the training samples."""

    arrangement: Literal["shuffled", "group_by_length", "packing"]
    is_configured: bool
    num_rows: int
    num_steps: int
    """Steps of the epoch; the last step may reach into the next epoch."""
    num_tokens: int
    """Tokens without padding."""
    num_computed_tokens: int
    """Tokens with padding."""
    padding: float
    """Share of padding in the computed tokens."""


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
    """Samples seen token for token."""
    num_prompts: int
    """Samples of which only the prompt was seen.

    0 if most training samples share their prompt anyway.
    """


@dataclass(frozen=True)
class Facts:
    """All facts about a run's data."""

    sources: tuple[SourceFacts, ...]
    train: PartFacts
    eval: PartFacts | None
    batchings: tuple[Batching, ...]
    run: RunFacts
    leak: Leak | None
    """None: nothing is evaluated."""
    remarks: tuple[str, ...] = ()
    """Sentences about settings without effect."""

    @property
    def configured(self) -> Batching:
        """The batching that the run uses."""
        return next(batching for batching in self.batchings if batching.is_configured)

    def to_json(self) -> dict[str, Any]:
        """Return the facts as plain data."""
        return asdict(self)


def gather_facts(
    data: RunData,
    config: TrainConfig,
    tokenizer: PreTrainedTokenizerBase,
    show: Callable[[str], None] = lambda text: None,
) -> Facts:
    """Look at all samples of a run.

    Args:
        show: is called with a line about the progress, every now and then.
    """
    is_special = special_tokens(tokenizer)
    train, held_out = data.train.apart(), data.eval.apart()
    train_scan, eval_scan = scan(train, is_special, show), scan(held_out, is_special, show)
    limit = config.data.max_seq_len
    show("laying out an epoch")
    order = sample_order(data, config)
    stream = np.array(order.between(0, order.epoch_size), dtype=np.int64)
    counts = data.train.counts
    targets = np.add.reduceat(train_scan.num_targets, np.cumsum(counts) - counts)  # (num_rows,)
    return Facts(
        sources=_sources(data, stream),
        train=_part(train, train_scan, tokenizer, limit),
        eval=_part(held_out, eval_scan, tokenizer, limit) if len(held_out) else None,
        batchings=batchings(data, config),
        run=_run(order, config, int(targets[stream].sum())),
        leak=_leak(train_scan, eval_scan) if len(held_out) else None,
        remarks=tuple(unused_variables(data.reports, tokenizer, config.data)),
    )


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> NDArray[np.bool_]:
    """Return a mask of the token ids that stand for no text. (vocab_size,)"""
    added = tokenizer.added_tokens_decoder.items()
    ids = {*tokenizer.all_special_ids, *(id for id, token in added if token.special)}
    # Added tokens may have ids past the length, if the vocabulary has gaps.
    mask = np.zeros(max(len(tokenizer), *ids, 0) + 1, dtype=np.bool_)
    mask[list(ids)] = True
    return mask


def _sources(data: RunData, stream: NDArray[np.int64]) -> tuple[SourceFacts, ...]:
    num = len(data.sizes)
    source_of_row = np.repeat(np.arange(num), data.sizes)
    tokens = np.bincount(source_of_row[stream], data.train.lengths[stream], minlength=num)
    shares = (tokens / tokens.sum()).tolist()
    trained = zip(data.weights, shares, data.reports, strict=False)
    return (
        *(SourceFacts("data.train", *facts) for facts in trained),
        *(SourceFacts("data.eval", None, None, report) for report in data.reports[num:]),
    )


_NUM_OPENINGS = 3


def _part(samples: Rows, found: Scan, tokenizer: PreTrainedTokenizerBase, limit: int) -> PartFacts:
    lengths, answers = samples.lengths, found.answers
    unique, firsts, times = np.unique(found.hashes, return_index=True, return_counts=True)
    most = int(times.max())
    most_repeated = None
    if most > 1:
        index = int(firsts[times == most].min())  # the first in the data, if several tie
        most_repeated = _answer_text(samples, index, tokenizer)
    return PartFacts(
        num_samples=len(samples),
        num_tokens=int(lengths.sum()),
        num_targets=int(found.num_targets.sum()),
        lengths=Spread.of(lengths),
        targets=Spread.of(found.num_targets),
        num_at_limit=int((lengths == limit).sum()),
        histogram=histogram(lengths, limit),
        num_repeats=len(samples) - len(unique),
        most_repeated=most_repeated,
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


_ANSWER_TOKENS = 16  # shown of a repeated answer


def _answer_text(samples: Rows, index: int, tokenizer: PreTrainedTokenizerBase) -> str:
    targets = [label for label in samples[index].labels if label >= 0]
    text = str(tokenizer.decode(targets[:_ANSWER_TOKENS]))
    return text + "…" if len(targets) > _ANSWER_TOKENS else text


_MAX_BINS = 12


def histogram(lengths: NDArray[np.int64], limit: int) -> tuple[Bin, ...]:
    """Count samples by length, in bins from the shortest sample to the longest.

    From one power of two to the next there are 4, 2 or 1 equal bins: the most with which the total
    is at most 12, if there are such.
    """
    bins: list[Bin] = []
    for parts in (4, 2, 1):
        lasts = [*_bin_lasts(limit, parts), limit]
        counts = np.bincount(np.searchsorted(lasts, lengths), minlength=len(lasts)).tolist()
        borders = pairwise([0, *lasts])
        bins = [Bin(a + 1, b, n) for (a, b), n in zip(borders, counts, strict=True)]
        used = [number for number, bin in enumerate(bins) if bin.num_samples]
        bins = bins[used[0] : used[-1] + 1]
        if len(bins) <= _MAX_BINS:
            break
    return tuple(bins)


def _bin_lasts(limit: int, parts: int) -> list[int]:
    powers = (2**k for k in range(limit.bit_length()))
    lasts = {power + power * part // parts for power in powers for part in range(parts)}
    # Without those near the limit, so that the last bin is not a sliver.
    return sorted(last for last in lasts if last <= 0.9 * limit)


# -- Rows and micro-batches: as configured, and as they could be.


def batchings(data: RunData, config: TrainConfig) -> tuple[Batching, ...]:
    """Return the first epoch's costs with rows in random order, grouped by length, and packed."""
    bounds = [0, *accumulate(data.sizes)]
    num_samples = [int(data.train.counts[a:b].sum()) for a, b in pairwise(bounds)]
    lengths = _cut(data.train.apart().lengths, num_samples)
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
    rows = pack(lengths.tolist(), max_seq_len, seed)
    return np.array([lengths[members].sum() for members in rows], dtype=np.int64)


def _batching(
    arrangement: Literal["shuffled", "group_by_length", "packing"],
    sources: list[NDArray[np.int64]],
    weights: tuple[float, ...],
    config: TrainConfig,
) -> Batching:
    optim, settings = config.optim, config.data
    lengths = np.concatenate(sources)
    keys = tuple(lengths.tolist()) if arrangement == "group_by_length" else None
    order = SampleOrder(tuple(map(len, sources)), config.seed, weights, keys)
    stream = lengths[order.between(0, order.epoch_size)]  # (rows of the epoch,)
    num_tokens, num_computed = int(stream.sum()), num_padded(stream, optim.micro_batch_size)
    grouped = "group_by_length" if settings.group_by_length else "shuffled"
    return Batching(
        arrangement=arrangement,
        is_configured=arrangement == ("packing" if settings.packing else grouped),
        num_rows=len(stream),
        num_steps=-(-len(stream) // (optim.micro_batch_size * optim.grad_accum_steps)),
        num_tokens=num_tokens,
        num_computed_tokens=num_computed,
        padding=1 - num_tokens / num_computed,
    )


def num_padded(lengths: NDArray[np.int64], micro_batch_size: int) -> int:
    """Return the tokens of rows in that order, each micro-batch padded to its longest row."""
    longest = np.maximum.reduceat(lengths, np.arange(0, len(lengths), micro_batch_size))
    # The last micro-batch may have fewer rows.
    return int(longest.sum() * micro_batch_size - longest[-1] * (-len(lengths) % micro_batch_size))


def _run(order: SampleOrder, config: TrainConfig, num_targets_per_epoch: int) -> RunFacts:
    optim = config.optim
    micro, accum = optim.micro_batch_size, optim.grad_accum_steps
    plan = BatchPlan(order, micro, accum, 1, run_end(order, optim))
    num_steps = plan.num_steps(0, 0, optim)
    num_rows = num_steps * plan.global_batch_size if plan.end is None else plan.end
    return RunFacts(
        num_steps=num_steps,
        epochs=plan.epoch_at(num_rows),
        micro_batch_size=micro,
        grad_accum_steps=accum,
        num_rows_per_step=plan.global_batch_size,
        max_seq_len=config.data.max_seq_len,
        num_targets_per_epoch=num_targets_per_epoch,
    )


def _leak(train: Scan, held_out: Scan) -> Leak:
    is_seen = np.isin(held_out.hashes, train.hashes)
    prompts = train.prompt_hashes[train.prompt_hashes != 0]  # 0: no prompt
    is_telling = 2 * len(np.unique(prompts)) > len(train.hashes)  # not all the same instruction
    has_seen_prompt = np.isin(held_out.prompt_hashes, prompts) & ~is_seen
    return Leak(int(is_seen.sum()), int(has_seen_prompt.sum()) if is_telling else 0)
