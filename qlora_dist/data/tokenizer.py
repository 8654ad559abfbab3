"""The model's tokenizer: loaded, given a token to pad with, and held against the model's embedding."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from qlora_dist.config.schema import ModelConfig
from qlora_dist.errors import ModelError


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The model's tokenizer. One without a pad token gets one, for those who use the adapter on several texts at once.

    A pad token that is there stays, even if it is the end token: it is the choice of the model's authors, and
    `pad_token_id` does not depend on it.

    Raises:
        ModelError: the folder has none, or it reports no character offsets (a Python-only tokenizer).
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise ModelError(
            f"model folder {folder} has no tokenizer that can be loaded: {error}"
        ) from None
    if not tokenizer.is_fast:
        raise ModelError(
            f"model folder {folder}: its tokenizer reports no character offsets, which the loss mask needs. "
            "Convert it once: AutoTokenizer.from_pretrained(FOLDER, use_fast=True).save_pretrained(FOLDER)."
        )
    if tokenizer.pad_token_id is None and (candidates := _paddings(tokenizer)):
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(candidates[0])
    return tokenizer


def pad_token_id(tokenizer: PreTrainedTokenizerBase, num_embeddings: int | None = None) -> int:
    """Id that fills the ends of rows: not the end token's, and one that the embedding has, so that nothing is resized.

    Padding is masked by position, so which one it is changes no loss; but a trace, a plot or another program's mask
    that goes by ids should not take the end of an answer for padding.

    Args:
        num_embeddings: rows of the model's embedding, if they are known.
    """
    known = num_embeddings if num_embeddings is not None else len(tokenizer)
    ordinary = (0, 1)  # some tokens of the text: better than the end token
    return next(
        token_id
        for token_id in (*_paddings(tokenizer), *ordinary)
        if token_id != tokenizer.eos_token_id and token_id < known
    )


def _paddings(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Special tokens that padding may be made of, the best first: the one that is meant for it, one that is named so,
    the unknown token, one that is kept in reserve, the end of a text where a turn ends otherwise."""
    special = {
        token_id: str(token).lower()
        for token_id, token in sorted(tokenizer.added_tokens_decoder.items())
        if token.special
    }
    named = [
        [i for i, text in special.items() if word in text]
        for word in ("pad", "reserved", "unused", "endoftext")
    ]
    ordered = [
        tokenizer.pad_token_id,
        *named[0],
        tokenizer.unk_token_id,
        *named[1],
        *named[2],
        *named[3],
    ]
    return [
        int(token_id)
        for token_id in ordered
        if token_id is not None and token_id != tokenizer.eos_token_id
    ]


def check_tokenizer_fits(
    tokenizer: PreTrainedTokenizerBase, max_token_id: int, num_embeddings: int
) -> None:
    """See that the model has an embedding for each token that it will be given.

    A larger embedding is common (it is padded to a round number), and so are tokens without one that no text uses.

    Args:
        max_token_id: the largest one in the data.
        num_embeddings: rows of the model's embedding.

    Raises:
        ModelError: the data, or the start or end token, has no embedding.
    """
    used = {
        "in the data": max_token_id,
        "its start token": tokenizer.bos_token_id,
        "its end token": tokenizer.eos_token_id,
    }
    for what, token_id in used.items():
        if token_id is not None and token_id >= num_embeddings:
            raise ModelError(
                f"the tokenizer in the model's folder does not belong to the model: it has {len(tokenizer):,} tokens, "
                f"and number {token_id:,} ({tokenizer.convert_ids_to_tokens(token_id)!r}) is {what}, but the model's "
                f"embedding has {num_embeddings:,} rows (vocab_size in config.json). Put the model's own tokenizer "
                "files there; tokens that were added to them need a model that was resized and trained with them."
            )


def num_embeddings(folder: Path, config: ModelConfig) -> int:
    """Rows of the model's embedding, as its configuration says.

    Raises:
        ModelError: transformers cannot read the configuration.
    """
    try:
        model_config = AutoConfig.from_pretrained(
            folder, trust_remote_code=config.trust_remote_code
        )
    except (ValueError, ImportError, KeyError) as error:
        raise ModelError(f"model.path {folder} cannot be built by transformers: {error}") from None
    return int(model_config.get_text_config().vocab_size)
