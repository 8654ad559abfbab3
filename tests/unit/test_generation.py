"""Prompts in the form of the training data."""

import copy

import pytest
from tokenizers.processors import TemplateProcessing

from qlora_dist.generation import prompt_ids
from tests.support.rows import encode


@pytest.mark.parametrize(
    ("row", "layout"),
    [
        (
            {
                "messages": [
                    {"role": "user", "content": "fox"},
                    {"role": "assistant", "content": "dog"},
                ]
            },
            "messages",
        ),
        ({"instruction": "fox", "output": "dog"}, "messages"),
        ({"prompt": "fox", "completion": "dog"}, "prompt_completion"),
        ({"text": "fox dog"}, "text"),
    ],
)
def test_a_prompt_is_what_training_rows_begin_with(tokenizer, row: dict, layout: str) -> None:
    """Prompts equal the beginnings of training rows token by token, also if the tokenizer puts a
    start and an end token around every text: the end token would tell the model that the text is
    over."""
    framing = copy.deepcopy(tokenizer)
    framing._tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A <|im_end|>",
        special_tokens=[
            ("<|im_start|>", tokenizer.bos_token_id),
            ("<|im_end|>", tokenizer.eos_token_id),
        ],
    )
    encoded = encode([row], framing)
    assert encoded.report.layout == layout
    ids = prompt_ids("fox", framing, encoded.report.layout)[0].tolist()
    assert ids == encoded.samples[0].input_ids[: len(ids)]
    assert framing.eos_token_id not in ids[-1:]
