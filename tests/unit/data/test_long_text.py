"""Texts that are tokenized in blocks have the tokens that they would have at once."""

from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_dist.data import long_text
from qlora_dist.data.assistant_spans import TurnFinder
from qlora_dist.data.chat_template import ChatTemplate
from qlora_dist.data.formats import PlainText
from qlora_dist.data.long_text import is_long, long_ids, long_ids_and_spans
from qlora_dist.data.messages import Conversation
from qlora_dist.data.tokenization import tokenize

SENTENCES = [
    "the quick brown fox jumps over the lazy dog",
    "naïve façade, 12345 times!",
    "狐は犬を飛び越える 🦊🦊",
    "x = [1, 2]\n\n\tif y:",
]


def sentencepiece():
    """Return a tokenizer that merges across spaces, as Llama 2's: a space is a letter."""
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers

    raw = Tokenizer(models.BPE(byte_fallback=False, unk_token="<unk>"))
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    raw.decoder = decoders.Metaspace()
    raw.train_from_iterator(
        SENTENCES * 8,
        trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "<s>"], show_progress=False),
    )
    return raw


def unigram():
    """Return a tokenizer that chooses the likeliest cut of a word, as those of T5 and Gemma."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    raw = Tokenizer(models.Unigram())
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    raw.train_from_iterator(
        SENTENCES * 8,
        trainers.UnigramTrainer(
            vocab_size=200, special_tokens=["<unk>", "<s>"], unk_token="<unk>", show_progress=False
        ),
    )
    return raw


def wordpiece():
    """Return a tokenizer that drops spaces, and words of more than 100 letters, as BERT's."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    raw = Tokenizer(models.WordPiece(unk_token="<unk>"))
    raw.normalizer = normalizers.BertNormalizer()
    raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    raw.train_from_iterator(
        SENTENCES * 8,
        trainers.WordPieceTrainer(
            vocab_size=200, special_tokens=["<unk>", "<s>"], show_progress=False
        ),
    )
    return raw


@pytest.fixture(scope="module", params=["byte level", "sentencepiece", "unigram", "wordpiece"])
def any_tokenizer(request: pytest.FixtureRequest, tokenizer):
    """A tokenizer of each family."""
    from transformers import PreTrainedTokenizerFast

    make = {"sentencepiece": sentencepiece, "unigram": unigram, "wordpiece": wordpiece}.get(
        request.param
    )
    return (
        tokenizer
        if make is None
        else PreTrainedTokenizerFast(tokenizer_object=make(), bos_token="<s>", unk_token="<unk>")
    )


texts = st.builds(
    lambda parts, between: between.join(parts),
    st.lists(
        st.sampled_from([*SENTENCES, "a" * 700, " " * 300, "7" * 150, "<|im_end|>"])
        | st.text(max_size=30),
        min_size=20,
        max_size=60,
    ),
    st.sampled_from([" ", "", "\n"]),
)


@settings(deadline=None, max_examples=25)
@given(texts, st.none() | st.integers(1, 2000))
def test_blocks_make_the_tokens_of_the_whole(
    any_tokenizer, text: str, num_tokens: int | None
) -> None:
    """Blocks of 512 characters give the tokens and places of the whole, or of a part."""
    whole = any_tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    with mock.patch.multiple(long_text, _BLOCK=512, _SMALL_BLOCK=512, _OVERLAP=256):
        ids, spans = long_ids_and_spans(text, any_tokenizer, num_tokens)
        assert long_ids(text, any_tokenizer, num_tokens) == ids
    count = len(whole["input_ids"]) if num_tokens is None else num_tokens
    assert len(ids) == len(spans) >= min(count, len(whole["input_ids"]))
    assert ids[:count] == whole["input_ids"][:count]
    assert spans[:count] == whole["offset_mapping"][:count]


@pytest.mark.parametrize("train_on", ["completions", "all"])
@pytest.mark.parametrize(
    "content",
    [
        PlainText("fox " * 4000),
        PlainText("dog " * 4000, prompt="fox " * 10),
        PlainText("dog", prompt="fox " * 4000),
        Conversation(
            [{"role": "user", "content": "fox"}, {"role": "assistant", "content": "dog, " * 4000}]
            * 2
        ),
    ],
    ids=["text", "completion", "prompt", "conversation"],
)
@pytest.mark.parametrize("num_tokens", [None, 3, 40, 2000, 10**6])
def test_long_samples_are_those_of_the_whole(
    tokenizer, content, train_on, num_tokens: int | None
) -> None:
    """Tokens and labels, start and end token included, do not depend on the part that is long."""
    turns = TurnFinder(ChatTemplate(tokenizer))
    [expected] = tokenize([content], turns, train_on)
    with mock.patch.multiple(long_text, _BLOCK=512, _SMALL_BLOCK=512, _OVERLAP=256):
        [sample] = tokenize([content], turns, train_on, num_tokens)
    count = len(expected.input_ids) if num_tokens is None else num_tokens
    assert len(sample.input_ids) >= min(count, len(expected.input_ids))
    assert (sample.input_ids[:count], sample.labels[:count]) == (
        expected.input_ids[:count],
        expected.labels[:count],
    )


def test_no_more_is_tokenized_than_is_needed(any_tokenizer) -> None:
    """For 1,000 tokens of ten megabytes, at most a quarter of a megabyte is tokenized."""
    text = "the quick brown fox " * 500_000
    assert is_long(text, 1000)
    with mock.patch.object(long_text, "_encoded", wraps=long_text._encoded) as encoded:
        long_ids(text, any_tokenizer, 1000)
        assert sum(len(call.args[0]) for call in encoded.call_args_list) < 2**18
        encoded.reset_mock()
        long_ids(text[: 2**20], any_tokenizer)
        assert sum(len(call.args[0]) for call in encoded.call_args_list) < 1.1 * 2**20, (
            "its blocks fit together"
        )
