"""The token that rows are padded with, and tokenizers that do not belong to their model."""

from pathlib import Path

import pytest

from qlora_dist.data.tokenizer import check_tokenizer_fits, load_tokenizer, pad_token_id
from qlora_dist.errors import ModelError
from tests.support.tokenizers import build_tokenizer


@pytest.mark.parametrize(
    ("special", "named", "expected"),
    [
        (["<pad>", "<s>", "</s>"], {"eos": "</s>", "pad": "<pad>"}, "<pad>"),
        (["<s>", "</s>"], {"eos": "</s>", "unk": "<unk>"}, "<unk>"),  # Llama 2, Mistral
        (
            ["<s>", "</s>"],
            {"eos": "</s>", "unk": "<unk>", "pad": "</s>"},
            "<unk>",
        ),  # as many set it
        (
            ["<|endoftext|>", "<|im_end|>"],
            {"eos": "<|im_end|>", "pad": "<|endoftext|>"},
            "<|endoftext|>",
        ),  # Qwen
        (
            ["<|endoftext|>", "<|im_end|>"],
            {"eos": "<|im_end|>", "pad": "<|im_end|>"},
            "<|endoftext|>",
        ),  # SmolLM2
        (
            ["<|eot_id|>", "<|finetune_right_pad_id|>"],
            {"eos": "<|eot_id|>"},
            "<|finetune_right_pad_id|>",
        ),  # Llama 3.1
        (
            ["<|eot_id|>", "<|reserved_special_token_0|>"],
            {"eos": "<|eot_id|>"},
            "<|reserved_special_token_0|>",
        ),
        (["<|endoftext|>"], {"eos": "<|endoftext|>"}, None),  # GPT-2: some token of the text
    ],
)
def test_rows_are_padded_with_something_that_is_not_the_end_token(
    special: list[str], named: dict, expected
) -> None:
    """The pad token is not the end token, and in the embedding already, so nothing is resized."""
    tokenizer = build_tokenizer("bytes", special, None, named["eos"])
    tokenizer.pad_token, tokenizer.unk_token = named.get("pad"), named.get("unk")
    num_tokens = len(tokenizer)
    chosen = pad_token_id(tokenizer)
    assert chosen not in (tokenizer.eos_token_id, None)
    assert chosen == (0 if expected is None else tokenizer.convert_tokens_to_ids(expected))
    assert len(tokenizer) == num_tokens


def test_a_pad_token_that_was_only_added_to_the_tokenizer_is_not_used() -> None:
    """A pad token beyond the last row of the embedding, common on the hub, is not used."""
    tokenizer = build_tokenizer("bytes", ["<s>", "</s>"], "<s>", "</s>")
    num_embeddings = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert pad_token_id(tokenizer) == tokenizer.pad_token_id == num_embeddings
    assert pad_token_id(tokenizer, num_embeddings) < num_embeddings


@pytest.mark.parametrize(
    ("pad", "expected"),
    [(None, "<|finetune_right_pad_id|>"), ("<|eot_id|>", "<|eot_id|>"), ("<s>", "<s>")],
)
def test_the_saved_tokenizer_gets_a_pad_token_if_it_has_none(
    tmp_path: Path, pad: str | None, expected: str
) -> None:
    """The adapter's tokenizer has a pad token, for texts in batches; the authors' choice stays."""
    tokenizer = build_tokenizer(
        "bytes", ["<s>", "<|eot_id|>", "<|finetune_right_pad_id|>"], "<s>", "<|eot_id|>"
    )
    tokenizer.pad_token = pad
    tokenizer.save_pretrained(tmp_path / "base")
    loaded = load_tokenizer(tmp_path / "base")
    assert loaded.pad_token == expected
    loaded.save_pretrained(tmp_path / "adapter")
    assert load_tokenizer(tmp_path / "adapter").pad_token == expected
    assert loaded("no rain").input_ids == tokenizer("no rain").input_ids


def test_a_tokenizer_with_tokens_that_the_model_does_not_have_is_refused() -> None:
    """Tokens in use beyond the embedding are refused; unused tokens, and unused rows, are not."""
    tokenizer = build_tokenizer("bytes", ["<s>", "</s>"], "<s>", "</s>")
    num_tokens = len(tokenizer)
    check_tokenizer_fits(tokenizer, num_tokens - 1, num_tokens)
    check_tokenizer_fits(tokenizer, num_tokens - 1, num_tokens + 100)
    check_tokenizer_fits(tokenizer, num_tokens - 5, num_tokens - 4)
    with pytest.raises(
        ModelError,
        match=rf"has {num_tokens} tokens, and number {num_tokens - 1} .* is in the data, .* "
        rf"has {num_tokens - 1} rows",
    ):
        check_tokenizer_fits(tokenizer, num_tokens - 1, num_tokens - 1)
    tokenizer.add_special_tokens({"eos_token": "<end>"})
    with pytest.raises(ModelError, match=r"\('<end>'\) is its end token"):
        check_tokenizer_fits(tokenizer, 5, num_tokens)
