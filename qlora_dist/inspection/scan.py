"""A single pass over tokenized samples, with a few bytes of results per sample."""

# Tested by tests/unit/inspection/test_facts.py.

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from qlora_dist.data.samples import Rows

_HASH_BYTES = 8  # of ten million different samples, two collide with a probability of 3e-6
_SHOW_EVERY = 10_000

_Mask = NDArray[np.bool_]


@dataclass
class Answers:
    """Counts of answers: runs of targets, which in a chat are the assistant's turns.

    Special tokens, such as the token that ends a turn, are no text of an answer.
    """

    num_answers: int = 0
    num_empty: int = 0
    """Answers of special tokens only."""
    num_of_one_token: int = 0
    """Answers with exactly one other token."""
    num_open: int = 0
    """Samples whose last target is no special token, so that they do not teach to stop."""
    openings: Counter[int] = field(default_factory=Counter)
    """Number of samples that begin to answer with each token id."""

    def count(self, tokens: NDArray[np.generic], is_target: _Mask, is_special: _Mask) -> None:
        """Add a sample. Each array: (num_tokens,), except `is_special` by token id."""
        borders = np.flatnonzero(np.diff(is_target, prepend=False, append=False))
        firsts, ends = borders[::2], borders[1::2]  # (num_answers,) each
        ordinary = ~is_special[tokens]
        num_ordinary = np.add.reduceat(ordinary & is_target, firsts)  # (num_answers,)
        self.num_answers += len(firsts)
        self.num_empty += int((num_ordinary == 0).sum())
        self.num_of_one_token += int((num_ordinary == 1).sum())
        self.num_open += bool(ordinary[ends[-1] - 1])
        self.openings[int(tokens[firsts[0]])] += 1


@dataclass(frozen=True)
class Scan:
    """Results of a pass over samples."""

    hashes: NDArray[np.uint64]
    """Hash of the tokens of each sample: equal samples have equal hashes. (num_samples,)"""
    prompt_hashes: NDArray[np.uint64]
    """Hash of the tokens before the first target, 0 if these are less than two. (num_samples,)"""
    num_targets: NDArray[np.int64]
    """Targets of each sample. (num_samples,)"""
    answers: Answers


def scan(rows: Rows, is_special: _Mask, show: Callable[[str], None] = lambda text: None) -> Scan:
    """Look at every sample once; a single sample is in memory at a time.

    Args:
        is_special: mask of the special tokens by token id. (vocab_size,)
        show: is called with a line about the progress, every now and then.
    """
    num = rows.num_samples
    hashes, prompts = np.zeros((2, num), np.uint64)
    num_targets, answers = np.zeros(num, np.int64), Answers()
    for number, (tokens, targets) in enumerate(rows.arrays()):
        is_target = np.array(targets, dtype=np.bool_)
        is_target[0] = False  # nothing comes before it that it could be predicted from
        first = int(is_target.argmax())
        hashes[number] = _hash(tokens)
        prompts[number] = _hash(tokens[:first]) if first > 1 else 0  # a lone start token is none
        num_targets[number] = is_target.sum()
        answers.count(tokens, is_target, is_special)
        if number % _SHOW_EVERY == 0:
            show(f"looking at samples: {number:,} of {num:,}")
    return Scan(hashes, prompts, num_targets, answers)


def _hash(tokens: NDArray[np.generic]) -> int:
    digest = hashlib.blake2b(tokens.tobytes(), digest_size=_HASH_BYTES).digest()
    return int.from_bytes(digest, "little")
