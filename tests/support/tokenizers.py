"""Small tokenizers of the kinds that model families have, with their special tokens."""

import string
from collections.abc import Sequence
from typing import Literal

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

Kind = Literal["bytes", "pieces", "old pieces"]


def build_tokenizer(
    kind: Kind,
    special: Sequence[str],
    bos: str | None,
    eos: str | None,
    *,
    adds_bos: bool = False,
    rstrip: bool = False,
) -> PreTrainedTokenizerFast:
    """Build a tokenizer of single characters and a few words.

    Args:
        kind: `bytes` as in Qwen and Llama 3; `pieces` with "▁" for spaces and bytes for unknown
            characters, as in Gemma and Mistral; `old pieces` with another "▁" before each stretch
            of text, as in Llama 2.
        special: the special tokens, first in the vocabulary.
        adds_bos: put the start token before every text.
        rstrip: special tokens swallow the white space that follows them, as in Phi-3.
    """
    letters = (
        sorted(pre_tokenizers.ByteLevel.alphabet())
        if kind == "bytes"
        else [*string.printable.strip(), "▁"]
    )
    space = "Ġ" if kind == "bytes" else "▁"
    merges = [(space, "4"), (space, "6"), ("n", "o"), (space, "no"), ("]", space), ("i", "n")]
    byte_tokens = [] if kind == "bytes" else [f"<0x{number:02X}>" for number in range(256)]
    words = ["<unk>", *special, *byte_tokens, *letters, *("".join(pair) for pair in merges)]
    vocabulary = {word: number for number, word in enumerate(dict.fromkeys(words))}
    raw = Tokenizer(
        models.BPE(
            vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=bool(byte_tokens)
        )
    )
    if kind == "bytes":
        raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        raw.decoder = decoders.ByteLevel()
    else:
        if kind == "pieces":
            raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        else:
            raw.normalizer = normalizers.Sequence(
                [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
            )
        raw.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        )
    raw.add_special_tokens(
        [AddedToken(word, rstrip=rstrip, normalized=False, special=True) for word in special]
    )
    if adds_bos:
        raw.post_processor = TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, vocabulary[bos])]
        )
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token=bos, eos_token=eos)
