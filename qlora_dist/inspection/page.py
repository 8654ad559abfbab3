"""The page that `qlora-dist data` prints, for a terminal and for a log file."""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from io import TextIOWrapper
from itertools import accumulate, zip_longest

from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from qlora_dist.data.dataset import RunData
from qlora_dist.data.report import unused_roles
from qlora_dist.data.samples import Sample
from qlora_dist.inspection.facts import Batching, Facts, PartFacts, SourceFacts
from qlora_dist.inspection.masked_text import legend, masked_text, visible

_INDENT = 2


def print_facts(console: Console, facts: Facts) -> None:
    """Print sources, lengths and batches."""
    _print_sources(console, facts)
    _print_totals(console, "Training samples", facts.train)
    _print_lengths(console, facts.train)
    if facts.eval is not None:
        _print_totals(console, "Evaluation samples", facts.eval)
    _print_batches(console, facts)


def print_samples(
    console: Console, rows: Sequence[tuple[str, Sample]], tokenizer: PreTrainedTokenizerBase
) -> None:
    """Print rows with their mask, each below its source; the data are right of a vertical line."""
    if not rows:
        return
    in_color = console.color_system is not None and not console.no_color
    _print_heading(console, "What the model sees")
    _print(console, legend(in_color))
    for number, (path, sample) in enumerate(rows, start=1):
        packed = f" in {len(sample.starts)} samples" if len(sample.starts) > 1 else ""
        size = f"{len(sample.input_ids):,} tokens{packed}, {sample.num_targets:,} of them targets"
        console.print()
        _print(console, f"{number} of {len(rows)}: {size}, from {visible(path)}", "bold")
        text = masked_text(sample, tokenizer, in_color)
        if text.plain.endswith("\n"):
            text.right_crop()
        for line in text.wrap(console, console.width - 2 * _INDENT, overflow="fold"):
            # `soft_wrap`: the line is wrapped already, so rich must neither wrap nor crop it.
            console.print(Text.assemble("  ", ("│ ", "cyan"), line), soft_wrap=True)


def print_warnings(console: Console, facts: Facts) -> None:
    """Print likely mistakes, or that nothing was found."""
    _print_heading(console, "Worth a look")
    nothing = "Nothing: no sample twice, none both trained and evaluated on, no empty answer."
    found = warnings(facts)
    for sentence in found:
        _print(console, sentence, mark="! ")
    if not found:
        _print(console, nothing)


# -- Sections.


def _print_sources(console: Console, facts: Facts) -> None:
    num_trained = sum(source.key == "data.train" for source in facts.sources)
    for number, source in enumerate(facts.sources):
        if number in (0, num_trained):
            _print_heading(console, source.key)
        _print(console, visible(source.report.path), "bold")
        for line in source_lines(source, facts.run.max_seq_len, is_one_of_several=num_trained > 1):
            _print(console, line, indent=2 * _INDENT)


def source_lines(source: SourceFacts, max_seq_len: int, is_one_of_several: bool) -> list[str]:
    """Return the account of a source's rows, a sentence a line."""
    report, weight, share = source.report, source.weight, source.epoch_share
    lines = [
        f"{report.num_rows:,} rows of format {report.format} → {report.num_samples:,} samples",
        f"{report.num_tokens:,} tokens, {report.num_targets / report.num_tokens:.1%} of them "
        "targets",
    ]
    if weight is not None and share is not None and (is_one_of_several or weight != 1):
        lines.append(f"weight {weight:g}: {share:.1%} of an epoch's tokens")
    for count, fate, end in (
        (report.num_cut, f"cut to {max_seq_len:,} tokens", ""),
        (report.num_split, f"split into samples of {max_seq_len:,} tokens", ""),
        (report.num_too_long, f"dropped: longer than {max_seq_len:,} tokens", ""),
        (report.num_without_targets, f"dropped: no target within {max_seq_len:,} tokens", ""),
        (report.faulty.num_rows, "left out as faulty", ":"),  # the reasons follow
    ):
        if count:
            lines.append(f"{count:,} {fate} ({count / report.num_rows:.1%}){end}")
    for reason, count, where in report.faulty.most_frequent():
        lines.append(f"  {count:,} x {visible(reason)}, first: {visible(where)}")
    left_out = [report.left_out] if report.left_out else []
    return [*lines, *map(visible, [*report.names(), *report.remarks(), *left_out])]


def _print_totals(console: Console, title: str, part: PartFacts) -> None:
    _print_heading(console, title)
    size = f"{part.num_samples:,} samples, {part.num_tokens:,} tokens"
    _print(console, f"{size}, {part.num_targets:,} of them targets")
    rows = [
        [name, *(f"{value:,}" for value in (spread.p50, spread.p90, spread.p99, spread.max))]
        for name, spread in (
            ("tokens of a sample", part.lengths),
            ("targets of a sample", part.targets),
        )
    ]
    _print_table(console, [["", "median", "90%", "99%", "longest"], *rows])


def _print_lengths(console: Console, part: PartFacts) -> None:
    console.print()
    for line in bars(part, console.width - 2 * _INDENT):
        _print(console, line)
    console.print()
    openings = ", ".join(
        f"{visible(repr(opening.text))} ({opening.num_samples / part.num_samples:.0%})"
        for opening in part.openings
    )
    answers = f"{part.num_answers:,} answers, {part.num_answers_of_one_token:,} of them"
    _print(console, f"{answers} a single token. Most often they begin with {openings}.")


_MAX_BAR = 40
_EIGHTHS = " ▏▎▍▌▋▊▉"


def bars(part: PartFacts, width: int) -> list[str]:
    """Return the histogram of lengths as lines of at most `width` characters.

    A last line counts the samples at the limit, if there are any.
    """
    limit = part.histogram[-1].last
    rows = [(f"{bin.first:,}-{bin.last:,}", bin.num_samples) for bin in part.histogram]
    labels = max(len(label) for label, _ in rows)
    most = max(count for _, count in rows)
    numbers = len(f"{most:,}")
    # Ten characters for the rule, the percentage and the spaces.
    longest = max(1, min(_MAX_BAR, width - labels - numbers - 10))
    lines = []
    for label, count in rows:
        # At least an eighth of a character, so that no sample is invisible.
        eighths = max(round(8 * longest * count / most), 1 if count else 0)
        bar = ("█" * (eighths // 8) + _EIGHTHS[eighths % 8]).strip()
        share = f"{count / part.num_samples:>6.1%}"
        lines.append(f"{label:>{labels}} │{bar:<{longest}} {count:>{numbers},} {share}")
    if part.num_at_limit:
        lines.append(f"at the limit of {limit:,} tokens: {part.num_at_limit:,}")
    return lines


def _print_batches(console: Console, facts: Facts) -> None:
    run, configured = facts.run, facts.configured
    _print_heading(console, "Batches")
    sizes = f"micro_batch_size {run.micro_batch_size:,} x grad_accum_steps {run.grad_accum_steps:,}"
    _print(console, f"{sizes} x 1 process = {run.num_rows_per_step:,} rows a step")
    head = ["", "padding", "rows an epoch", "steps an epoch", "tokens a step"]
    _print_table(console, [head, *map(_batching_cells, facts.batchings)])
    console.print()
    if configured.arrangement == "packing":
        fill = configured.num_tokens / (configured.num_rows * run.max_seq_len)
        _print(console, f"Packed rows are {fill:.1%} full.")
    epoch = f"{configured.num_tokens:,} tokens, {run.num_targets_per_epoch:,} of them targets"
    length = f"{run.num_steps:,} steps, {run.epochs:.3g} epochs"
    _print(console, f"An epoch has {epoch}. The run takes {length}.")


_CHOSEN = "▸ "


def _batching_cells(batching: Batching) -> list[str]:
    name = batching.arrangement
    return [
        (_CHOSEN if batching.is_configured else "  ")
        + ("one sample a row" if name == "shuffled" else name),
        f"{batching.padding:.1%}",
        f"{batching.num_rows:,}",
        f"{batching.num_steps:,}",
        f"{batching.num_tokens / batching.num_steps:,.0f}",
    ]


# -- Likely mistakes.

_MANY_CUT = 0.05  # share of a source's rows
_MUCH_PADDING = 0.2  # share of computed tokens that the best arrangement would save


def warnings(facts: Facts) -> list[str]:
    """Return sentences about likely mistakes in the data, each with a remedy."""
    found = [
        _about_repeats(facts.train),
        _about_leak(facts),
        _about_answers("training", facts.train),
        _about_answers("evaluation", facts.eval) if facts.eval is not None else "",
        *(f"{visible(fault)}." for fault in unused_roles([s.report for s in facts.sources])),
        *(_about_cuts(source, facts.run.max_seq_len) for source in facts.sources),
        _about_padding(facts),
        _about_short_epoch(facts),
        *(f"{visible(remark)}." for remark in facts.remarks),
    ]
    return [sentence for sentence in found if sentence]


def _about_repeats(part: PartFacts) -> str:
    if part.most_repeated is None:
        return ""
    return (
        f"{part.num_repeats:,} training samples ({part.num_repeats / part.num_samples:.1%}) are "
        f"copies of others, token for token. One comes {part.most_repeated_times:,} times; its "
        f"answer: {visible(repr(part.most_repeated))}. Remove the copies, unless they are meant."
    )


def _about_leak(facts: Facts) -> str:
    if facts.leak is None or facts.eval is None:
        return ""
    sentences = [
        f"{count:,} of {facts.eval.num_samples:,} evaluation samples {fault}."
        for count, fault in (
            (facts.leak.num_samples, "are training samples as well, token for token"),
            (facts.leak.num_prompts, "have the prompt of a training sample, with another answer"),
        )
        if count
    ]
    remedy = "The evaluation loss will be too good; remove them from one side."
    return " ".join([*sentences, remedy]) if sentences else ""


def _about_answers(name: str, part: PartFacts) -> str:
    sentences = []
    if part.num_empty_answers:
        sentences.append(
            f"{part.num_empty_answers:,} of {part.num_answers:,} answers in {name} samples are "
            "empty, which teaches to say nothing. Remove these rows."
        )
    if 2 * part.num_open > part.num_samples:
        sentences.append(
            f"{part.num_open:,} of {part.num_samples:,} {name} samples end without an end token, "
            "which teaches to go on and on. Check the chat template, or raise data.max_seq_len."
        )
    return " ".join(sentences)


def _about_cuts(source: SourceFacts, max_seq_len: int) -> str:
    report = source.report
    num_lost = report.num_cut + report.num_too_long + report.num_without_targets
    if num_lost < _MANY_CUT * report.num_rows:
        return ""
    return (
        f"{num_lost:,} of {report.num_rows:,} rows of {visible(report.path)} lose tokens or are "
        f"dropped at data.max_seq_len ({max_seq_len:,}). Raise it, unless that is meant."
    )


def _about_padding(facts: Facts) -> str:
    configured, best = facts.configured, min(facts.batchings, key=lambda batching: batching.padding)
    if configured.padding - best.padding < _MUCH_PADDING:
        return ""
    # A packed row holds the tokens of several samples, so it takes the memory of several rows.
    hint = "; lower optim.micro_batch_size with it" if best.arrangement == "packing" else ""
    is_plain = configured.arrangement == "shuffled"
    instead = "" if is_plain else f" instead of data.{configured.arrangement}"
    return (
        f"{configured.padding:.0%} of what is computed is padding. data.{best.arrangement}: "
        f"true{instead} makes that {best.padding:.0%}{hint}."
    )


def _about_short_epoch(facts: Facts) -> str:
    rows = facts.run.num_rows_per_step
    if facts.configured.num_rows >= rows:
        return ""
    return (
        f"an epoch has {facts.configured.num_rows:,} rows, fewer than the {rows:,} of one step. "
        "Lower optim.grad_accum_steps."
    )


# -- Drawing.


def _print_heading(console: Console, title: str) -> None:
    console.print()
    console.print(Text(title.upper(), "bold cyan"))


def _print(
    console: Console, text: str | Text, style: str = "", indent: int = _INDENT, mark: str = ""
) -> None:
    """Print below a heading, in lines that all begin at the same column."""
    whole = Text(text, style) if isinstance(text, str) else text
    for line in whole.wrap(console, console.width - indent - len(mark) - _INDENT):
        line.rstrip()
        console.print(Text.assemble(" " * indent, (mark, "bold yellow"), line), soft_wrap=True)
        mark = " " * len(mark)


def _print_table(console: Console, rows: list[list[str]]) -> None:
    """Print rows of cells; the first row is a heading, and the row of _CHOSEN stands out."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for number, (name, *cells) in enumerate(rows):
        aligned = [cell.rjust(n) for cell, n in zip(cells, widths[1:], strict=True)]
        style = "dim" if number == 0 else "bold" if name.startswith(_CHOSEN) else ""
        _print(console, "  ".join([name.ljust(widths[0]), *aligned]), style)


_MAX_WIDTH = 120  # longer lines are hard to read


def page_console() -> Console:
    """Return a console on standard output, with lines of at most 120 characters."""
    if isinstance(sys.stdout, TextIOWrapper):
        # Data hold characters that not every terminal can show.
        sys.stdout.reconfigure(errors="replace")
    console = Console(file=sys.stdout, highlight=False, emoji=False, markup=False)
    console.width = min(console.width, _MAX_WIDTH)
    return console


def choose_rows(data: RunData, num_rows: int, seed: int) -> list[tuple[str, Sample]]:
    """Return training rows to show, each with its source; sources take turns.

    The rows are a function of the data and the seed.
    """
    piles = []
    firsts = accumulate(data.sizes, initial=0)
    for report, first, size in zip(data.reports, firsts, data.sizes, strict=False):
        chosen = random.Random(seed).sample(range(first, first + size), min(size, num_rows))
        piles.append([(report.path, index) for index in chosen])
    in_turn = [item for turn in zip_longest(*piles) for item in turn if item is not None]
    return [(path, data.train[index]) for path, index in in_turn[:num_rows]]
