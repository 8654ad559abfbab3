"""Rows as a person sees them: targets stand out, and nothing in the data can do harm."""

import re
from io import StringIO

import pytest
from rich.console import Console
from rich.text import Text
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from qlora_dist.config.schema import IGNORE_INDEX
from qlora_dist.data.samples import Sample, join
from qlora_dist.inspection.masked_text import TARGET, legend, masked_text, visible
from tests.support.rows import encode


def chat(*texts: str) -> dict:
    """Return a conversation; the user begins."""
    return {
        "messages": [
            {"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)
        ]
    }


def colored(text: Text) -> list[str]:
    """Return the parts of a text that have the style of targets."""
    return [text.plain[span.start : span.end] for span in text.spans if span.style == TARGET]


TEXTS = ["the fox", "über", "x  y\n\n z", "日本 🙂!", "[bold]a[/bold] :smile:", "\ttab"]


@pytest.mark.parametrize("question", TEXTS)
@pytest.mark.parametrize("answer", TEXTS)
def test_targets_have_the_color_and_nothing_else_has(tokenizer, question: str, answer: str) -> None:
    """Each answer with its end token has the targets' color, and no other character has."""
    [sample] = encode([chat(question, answer, "go on", "ok")], tokenizer).samples
    text = masked_text(sample, tokenizer, in_color=True)
    assert colored(text) == [visible(answer) + "<|im_end|>", "ok<|im_end|>"]
    assert text.plain == visible(tokenizer.decode(sample.input_ids))
    assert "⟦" not in text.plain


def test_marks_where_there_is_no_color(tokenizer) -> None:
    """Without color, the borders are characters that stay in a log file."""
    [sample] = encode([chat("a", "b\nc")], tokenizer).samples
    text = masked_text(sample, tokenizer, in_color=False)
    assert (
        text.plain
        == "<|im_start|>user↵\na<|im_end|>↵\n<|im_start|>assistant↵\n⟦b↵\nc<|im_end|>⟧↵\n"
    )
    assert colored(text) == []
    assert "⟦" in legend(in_color=False).plain
    assert "⟦" not in legend(in_color=True).plain


def test_of_plain_text_all_but_the_first_token_counts(tokenizer) -> None:
    """All tokens of plain text but the first are marked, as in the count of targets."""
    [sample] = encode([{"text": "12"}], tokenizer).samples
    assert sample.num_targets == 2
    assert masked_text(sample, tokenizer, in_color=False).plain == "1⟦2<|im_end|>⟧"


def test_packed_samples_have_borders(tokenizer) -> None:
    """Each sample of a packed row is announced, even if targets meet."""
    samples = encode([{"text": "12"}, {"text": "345"}], tokenizer).samples
    assert masked_text(join(samples), tokenizer, in_color=False).plain == (
        "⟨sample 1 of 2 in this row: 3 tokens⟩\n1⟦2<|im_end|>⟧\n"
        "⟨sample 2 of 2 in this row: 4 tokens⟩\n3⟦45<|im_end|>⟧"
    )


def test_long_runs_lose_their_middle(tokenizer) -> None:
    """Both ends of prompt and answer are shown, with the number of tokens left out between them."""
    ids = tokenizer("".join(str(i % 10) for i in range(300)), add_special_tokens=False).input_ids
    assert len(ids) == 300
    sample = Sample(ids, [IGNORE_INDEX] * 100 + ids[100:])
    plain = masked_text(sample, tokenizer, in_color=False).plain
    digits = "0123456789" * 30
    assert plain == (
        f"{digits[:48]}⟨… 28 tokens …⟩{digits[76:100]}"
        f"⟦{digits[100:148]}⟨… 128 tokens …⟩{digits[276:]}⟧"
    )


def test_many_turns_lose_those_in_the_middle(tokenizer) -> None:
    """The first and the last of hundreds of turns are shown; the rest is counted."""
    [sample] = encode([chat(*map(str, range(100)))], tokenizer, max_seq_len=4096).samples
    plain = masked_text(sample, tokenizer, in_color=False).plain
    assert "⟦1<|im_end|>⟧" in plain
    assert "⟦99<|im_end|>⟧" in plain
    assert "⟦51<|im_end|>⟧" not in plain
    [(num_parts, num_tokens)] = re.findall(r"⟨… (\d+) parts, (\d+) tokens …⟩", plain)
    assert int(num_parts) == 101 - 24  # 50 prompts, 50 answers, and the line break at the end
    assert 0 < int(num_tokens) < len(sample.input_ids)


def test_spaces_survive_a_tokenizer_that_drops_the_first(tokenizer) -> None:
    """The space that SentencePiece's decoder takes off the first token is shown."""
    words = ["▁the", "▁fox", "▁ran", "<unk>"]
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    raw.decoder = decoders.Metaspace()
    pieces = PreTrainedTokenizerFast(tokenizer_object=raw)
    assert pieces.decode([1, 2]) == "fox ran"
    text = masked_text(Sample([0, 1, 2], [IGNORE_INDEX, 1, 2]), pieces, in_color=False)
    assert text.plain == "the⟦ fox ran⟧"


def test_the_data_cannot_imitate_the_marks() -> None:
    """Characters with a meaning on the page are shown by their number."""
    assert visible("⟦a⟧ ⟨ ↵") == "⟨U+27E6⟩a⟨U+27E7⟩ ⟨U+27E8⟩ ⟨U+21B5⟩"


HOSTILE = "\x1b[31mred\x1b]0;title\x07 \x9b2J \x00\x08\r\n\x7f\u202eright-to-left\u2028\u200b\ufeff"


def test_escape_sequences_do_not_reach_the_terminal(tokenizer) -> None:
    """Line breaks are the only control characters of the data that are left.

    On a terminal, the only sequences are the page's own colors.
    """
    [sample] = encode(
        [chat(HOSTILE.replace("\x00", ""), HOSTILE.replace("\x00", ""))], tokenizer
    ).samples
    for in_color in (True, False):
        out = StringIO()
        console = Console(
            file=out,
            force_terminal=True,
            width=80,
            color_system="standard",
            markup=False,
            emoji=False,
        )
        console.print(masked_text(sample, tokenizer, in_color))
        left = re.sub(r"\x1b\[[0-9;]*m", "", out.getvalue())
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e\u2028\u200b\ufeff]", left)
        assert "\x1b[31m" not in out.getvalue()
        assert "⟨U+001B⟩[31mred" in left
        assert "⟨U+000D⟩↵" in left
    assert "⟨U+0000⟩" in visible(HOSTILE)


def test_joined_emojis_stay_whole() -> None:
    """The joiner within an emoji is invisible, but part of the text."""
    assert visible("👩\u200d🚀") == "👩\u200d🚀"
