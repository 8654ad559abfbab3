"""The page that `qlora-dist data` prints: for a terminal, and as well for a log file."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from qlora_dist.data.samples import Sample
from qlora_dist.inspection.facts import Batching, Facts, PartFacts, SourceFacts
from qlora_dist.inspection.masked_text import legend, masked_text, visible

_INDENT = 2


def print_facts(console: Console, facts: Facts) -> None:
    """Sources, lengths, batches."""
    _print_sources(console, facts)
    _print_heading(console, "Training samples")
    _print_totals(console, facts.train)
    _print_lengths(console, facts.train)
    if facts.eval is not None:
        _print_heading(console, "Evaluation samples")
        _print_totals(console, facts.eval)
    _print_batches(console, facts)


def print_samples(
    console: Console, rows: Sequence[tuple[str, Sample]], tokenizer: PreTrainedTokenizerBase
) -> None:
    """Rows, each with the source that it is from, and their mask; what is data stands right of a line."""
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
            console.print(Text.assemble("  ", ("│ ", "cyan"), line), soft_wrap=True)


def print_warnings(console: Console, facts: Facts) -> None:
    """What may be a mistake, or that nothing was found."""
    _print_heading(console, "Worth a look")
    found = warnings(facts)
    for sentence in found:
        _print(console, sentence, mark="! ")
    if not found:
        _print(
            console,
            "Nothing: no sample twice, none both trained and evaluated on, no empty answer.",
        )


# --------------------------------------------------------------------------------------------------------------------
# Sections.


def _print_sources(console: Console, facts: Facts) -> None:
    num_trained = sum(source.key == "data.train" for source in facts.sources)
    for number, source in enumerate(facts.sources):
        if number in (0, num_trained):
            _print_heading(console, source.key)
        _print(console, visible(source.report.path), "bold")
        for line in source_lines(source, facts.run.max_seq_len, is_one_of_several=num_trained > 1):
            _print(console, line, indent=2 * _INDENT)


_FAULTY = "left out as faulty"


def source_lines(source: SourceFacts, max_seq_len: int, is_one_of_several: bool) -> list[str]:
    """What became of a source's rows, a sentence each."""
    report = source.report
    lines = [
        f"{report.num_rows:,} rows of format {report.format} → {report.num_samples:,} samples",
        f"{report.num_tokens:,} tokens, {report.num_targets / report.num_tokens:.1%} of them targets",
    ]
    if (
        source.weight is not None
        and source.epoch_share is not None
        and (is_one_of_several or source.weight != 1)
    ):
        lines.append(f"weight {source.weight:g}: {source.epoch_share:.1%} of an epoch's tokens")
    lines += [
        f"{count:,} {what} ({count / report.num_rows:.1%})" + (":" if what == _FAULTY else "")
        for count, what in (
            (report.num_cut, f"cut to {max_seq_len:,} tokens"),
            (report.num_split, f"split into samples of {max_seq_len:,} tokens"),
            (report.num_too_long, f"dropped: longer than {max_seq_len:,} tokens"),
            (report.num_without_targets, f"dropped: no target within {max_seq_len:,} tokens"),
            (report.faulty.num_rows, _FAULTY),
        )
        if count
    ]
    ordered = sorted(report.faulty.reasons.items(), key=lambda item: -item[1][0])
    return lines + [
        f"  {n:,} x {visible(reason)}, first: {visible(where)}" for reason, (n, where) in ordered
    ]


def _print_totals(console: Console, part: PartFacts) -> None:
    _print(
        console,
        f"{part.num_samples:,} samples, {part.num_tokens:,} tokens, {part.num_targets:,} of them targets",
    )
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
    _print(
        console,
        f"{part.num_answers:,} answers, {part.num_answers_of_one_token:,} of them a single token. "
        f"Most often they begin with {openings}.",
    )


_MAX_BAR = 40
_EIGHTHS = " ▏▎▍▌▋▊▉"


def bars(part: PartFacts, width: int) -> list[str]:
    """The histogram of lengths as lines of at most `width` characters; what is at the limit has one of its own."""
    limit = part.histogram[-1].last
    rows = [(f"{bin.first:,}-{bin.last:,}", bin.num_samples) for bin in part.histogram]
    labels = max(len(label) for label, _ in rows)
    numbers = max(len(f"{count:,}") for _, count in rows)
    longest = max(1, min(_MAX_BAR, width - labels - numbers - 10))
    most = max(count for _, count in rows)
    lines = []
    for label, count in rows:
        eighths = max(round(8 * longest * count / most), 1 if count else 0)
        bar = ("█" * (eighths // 8) + _EIGHTHS[eighths % 8]).strip()
        lines.append(
            f"{label:>{labels}} │{bar:<{longest}} {count:>{numbers},} {count / part.num_samples:>6.1%}".rstrip()
        )
    if part.num_at_limit:
        lines.append(f"at the limit of {limit:,} tokens: {part.num_at_limit:,}")
    return lines


def _print_batches(console: Console, facts: Facts) -> None:
    run, configured = facts.run, facts.configured
    _print_heading(console, "Batches")
    _print(
        console,
        f"micro_batch_size {run.micro_batch_size:,} x grad_accum_steps {run.grad_accum_steps:,} x 1 process = "
        f"{run.num_rows_per_step:,} rows a step",
    )
    cells = [_batching_cells(batching) for batching in facts.batchings]
    _print_table(
        console, [["", "padding", "rows an epoch", "steps an epoch", "tokens a step"], *cells]
    )
    console.print()
    if configured.arrangement == "packing":
        fill = configured.num_tokens / (configured.num_rows * run.max_seq_len)
        _print(console, f"Packed rows are {fill:.1%} full.")
    _print(
        console,
        f"An epoch has {configured.num_tokens:,} tokens, {run.num_targets_per_epoch:,} of them targets. "
        f"The run takes {run.num_steps:,} steps, {run.epochs:.3g} epochs.",
    )


_CHOSEN = "▸ "
_ARRANGEMENTS = {
    "shuffled": "one sample a row",
    "group_by_length": "group_by_length",
    "packing": "packing",
}


def _batching_cells(batching: Batching) -> list[str]:
    return [
        (_CHOSEN if batching.is_configured else "  ") + _ARRANGEMENTS[batching.arrangement],
        f"{batching.padding:.1%}",
        f"{batching.num_rows:,}",
        f"{batching.num_steps:,}",
        f"{batching.num_tokens / batching.num_steps:,.0f}",
    ]


# --------------------------------------------------------------------------------------------------------------------
# What may be a mistake.

_MANY_CUT = 0.05
_MUCH_PADDING = 0.2


def warnings(facts: Facts) -> list[str]:
    """Sentences about what is often a mistake in the data, with what to do."""
    found = [
        _about_repeats(facts.train),
        _about_leak(facts),
        _about_answers("training", facts.train),
    ]
    if facts.eval is not None:
        found.append(_about_answers("evaluation", facts.eval))
    found += [_about_cuts(source, facts.run.max_seq_len) for source in facts.sources]
    found += [_about_padding(facts), _about_short_epoch(facts)]
    return [sentence for sentence in found if sentence]


def _about_repeats(part: PartFacts) -> str:
    if part.most_repeated is None:
        return ""
    return (
        f"{part.num_repeats:,} training samples ({part.num_repeats / part.num_samples:.1%}) are copies of others, "
        f"token for token. One comes {part.most_repeated_times:,} times; its answer: "
        f"{visible(repr(part.most_repeated))}. Remove the copies, unless they are meant."
    )


def _about_leak(facts: Facts) -> str:
    if facts.leak is None or facts.eval is None:
        return ""
    sentences = [
        f"{count:,} of {facts.eval.num_samples:,} evaluation samples {what}."
        for count, what in (
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
            f"{part.num_empty_answers:,} of {part.num_answers:,} answers in {name} samples are empty, which teaches "
            "to say nothing. Remove these rows."
        )
    if 2 * part.num_open > part.num_samples:
        sentences.append(
            f"{part.num_open:,} of {part.num_samples:,} {name} samples end without an end token, which teaches to go "
            "on and on. Check the chat template, or raise data.max_seq_len."
        )
    return " ".join(sentences)


def _about_cuts(source: SourceFacts, max_seq_len: int) -> str:
    report = source.report
    num_lost = report.num_cut + report.num_too_long + report.num_without_targets
    if num_lost < _MANY_CUT * report.num_rows:
        return ""
    return (
        f"{num_lost:,} of {report.num_rows:,} rows of {visible(report.path)} lose tokens or are dropped at "
        f"data.max_seq_len ({max_seq_len:,}). Raise it, unless that is meant."
    )


def _about_padding(facts: Facts) -> str:
    configured, best = facts.configured, min(facts.batchings, key=lambda batching: batching.padding)
    if configured.padding - best.padding < _MUCH_PADDING:
        return ""
    hint = "; lower optim.micro_batch_size with it" if best.arrangement == "packing" else ""
    instead = (
        "" if configured.arrangement == "shuffled" else f" instead of data.{configured.arrangement}"
    )
    return (
        f"{configured.padding:.0%} of what is computed is padding. data.{best.arrangement}: true{instead} makes that "
        f"{best.padding:.0%}{hint}."
    )


def _about_short_epoch(facts: Facts) -> str:
    rows = facts.run.num_rows_per_step
    if facts.configured.num_rows >= rows:
        return ""
    return (
        f"an epoch has {facts.configured.num_rows:,} rows, fewer than the {rows:,} of one step. "
        "Lower optim.grad_accum_steps."
    )


# --------------------------------------------------------------------------------------------------------------------
# Drawing.


def _print_heading(console: Console, title: str) -> None:
    console.print()
    console.print(Text(title.upper(), "bold cyan"))


def _print(
    console: Console, text: str | Text, style: str = "", indent: int = _INDENT, mark: str = ""
) -> None:
    """Print below a heading, in lines that all begin where the first one does."""
    whole = Text(text, style) if isinstance(text, str) else text
    for line in whole.wrap(console, console.width - indent - len(mark) - _INDENT):
        line.rstrip()
        console.print(Text.assemble(" " * indent, (mark, "bold yellow"), line), soft_wrap=True)
        mark = " " * len(mark)


def _print_table(console: Console, rows: list[list[str]]) -> None:
    """Print rows of cells; the first row is a heading, and the row that is marked stands out."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for number, cells in enumerate(rows):
        padded = [cells[0].ljust(widths[0])] + [
            cell.rjust(n) for cell, n in zip(cells[1:], widths[1:], strict=True)
        ]
        style = "dim" if number == 0 else "bold" if cells[0].startswith(_CHOSEN) else ""
        _print(console, "  ".join(padded), style)
