"""Targets under the chat templates of real models, by their published formats.

Expected texts are written by hand after the formats that the models' authors publish; the templates
are in tests/fixtures/templates. A target is the text that the model is to generate: the words of a
turn and the token that ends it. The choice of a template is tested here, too.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from qlora_dist.config.schema import IGNORE_INDEX
from qlora_dist.data.chat_template import ChatTemplate, end_of_turn_id, set_chat_template
from qlora_dist.data.samples import Sample
from qlora_dist.data.tokenization import plain_ids
from qlora_dist.errors import ConfigError, DataError
from tests.support.rows import encode
from tests.support.tokenizers import Kind, build_tokenizer

TEMPLATES = Path(__file__).parents[2] / "fixtures" / "templates"

CHATML = ("bytes", ("<|im_start|>", "<|im_end|>", "<|endoftext|>"), None, "<|im_end|>")
LLAMA3 = (
    "bytes",
    ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "<|begin_of_text|>",
    "<|eot_id|>",
)
GEMMA = ("pieces", ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"), "<bos>", "<eos>")
MISTRAL_3 = (
    "pieces",
    (
        "<s>",
        "</s>",
        "[INST]",
        "[/INST]",
        "[TOOL_CALLS]",
        "[AVAILABLE_TOOLS]",
        "[/AVAILABLE_TOOLS]",
        "[TOOL_RESULTS]",
        "[/TOOL_RESULTS]",
    ),
    "<s>",
    "</s>",
)
LLAMA2 = ("old pieces", ("<s>", "</s>"), "<s>", "</s>")
PHI3 = (
    "pieces",
    ("<s>", "<|endoftext|>", "<|assistant|>", "<|end|>", "<|system|>", "<|user|>"),
    "<s>",
    "<|endoftext|>",
)
PHI4 = ("bytes", ("<|im_start|>", "<|im_end|>", "<|im_sep|>", "<|endoftext|>"), None, "<|im_end|>")
# DeepSeek's special tokens have fullwidth bars, U+FF5C.
R1_BOS, R1_EOS = "<\uff5cbegin▁of▁sentence\uff5c>", "<\uff5cend▁of▁sentence\uff5c>"
R1_USER, R1_ASSISTANT = "<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>"
R1 = ("bytes", (R1_BOS, R1_EOS, R1_USER, R1_ASSISTANT), R1_BOS, R1_EOS)
FAMILIES: dict[str, tuple[Kind, tuple[str, ...], str | None, str]] = {
    "smollm2": CHATML,
    "qwen2.5": CHATML,
    "qwen3": CHATML,
    "llama3": LLAMA3,
    "llama3.1": LLAMA3,
    "gemma2": GEMMA,
    "gemma3": GEMMA,
    "mistral-v0.1": LLAMA2,
    "mistral-v0.3": MISTRAL_3,
    "llama2": LLAMA2,
    "zephyr": LLAMA2,
    "phi3.5": PHI3,
    "phi4": PHI4,
    "deepseek-r1-distill": R1,
}


def chat(*contents: str, system: str | None = None) -> dict:
    """Return a row of user and assistant turns in alternation."""
    messages = [
        {"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)
    ]
    return {"messages": ([{"role": "system", "content": system}] if system else []) + messages}


SINGLE = chat("2+2?", "4")
MULTI = chat("2+2?", "4", "3+3?", "6")
SYSTEM = chat("2+2?", "4", "3+3?", "6", system="be brief")
THOUGHTS = chat("2+2?", "<think>\nhm\n</think>\n\n4", "3+3?", "<think>\nso\n</think>\n\n6")
TOOLS = {
    "messages": [
        {"role": "user", "content": "rain?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {
                    "id": "call00001",
                    "type": "function",
                    "function": {"name": "weather", "arguments": '{"city": "Rome"}'},
                }
            ],
        },
        {"role": "tool", "content": "dry", "tool_call_id": "call00001"},
        {"role": "assistant", "content": "no rain"},
        {"role": "user", "content": "thanks"},
        {"role": "assistant", "content": "bye"},
    ],
    "tools": [
        {
            "type": "function",
            "function": {"name": "weather", "description": "d", "parameters": {"type": "object"}},
        }
    ],
}


@dataclass(frozen=True)
class Golden:
    """A conversation in a model's format."""

    family: str
    row: dict
    text: str
    """The rendered text; only its end, if it begins with "…"."""
    targets: tuple[str, ...]


QWEN_SYSTEM = (
    "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant."
    "<|im_end|>\n"
)
SMOL_SYSTEM = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n"
)
LLAMA_DATES = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
CALL = '{"name": "weather", "arguments": {"city": "Rome"}}'


def chatml(*turns: str) -> str:
    """Write user, assistant, user, ... as ChatML."""
    return "".join(
        f"<|im_start|>{('user', 'assistant')[i % 2]}\n{text}<|im_end|>\n"
        for i, text in enumerate(turns)
    )


def llama3(*turns: tuple[str, str]) -> str:
    """Write (role, text) pairs as Llama 3 does."""
    return "<|begin_of_text|>" + "".join(
        f"<|start_header_id|>{role}<|end_header_id|>\n\n{text}<|eot_id|>" for role, text in turns
    )


def gemma(*turns: str) -> str:
    """Write user, model, user, ... as Gemma does."""
    return "<bos>" + "".join(
        f"<start_of_turn>{('user', 'model')[i % 2]}\n{text}<end_of_turn>\n"
        for i, text in enumerate(turns)
    )


GOLDEN = [
    Golden("smollm2", SINGLE, SMOL_SYSTEM + chatml("2+2?", "4"), ("4<|im_end|>",)),
    Golden(
        "smollm2",
        MULTI,
        SMOL_SYSTEM + chatml("2+2?", "4", "3+3?", "6"),
        ("4<|im_end|>", "6<|im_end|>"),
    ),
    Golden(
        "smollm2",
        SYSTEM,
        "<|im_start|>system\nbe brief<|im_end|>\n" + chatml("2+2?", "4", "3+3?", "6"),
        ("4<|im_end|>", "6<|im_end|>"),
    ),
    Golden("qwen2.5", SINGLE, QWEN_SYSTEM + chatml("2+2?", "4"), ("4<|im_end|>",)),
    Golden(
        "qwen2.5",
        SYSTEM,
        "<|im_start|>system\nbe brief<|im_end|>\n" + chatml("2+2?", "4", "3+3?", "6"),
        ("4<|im_end|>", "6<|im_end|>"),
    ),
    Golden(
        "qwen2.5",
        TOOLS,
        "…"
        + chatml(
            "rain?",
            f"<tool_call>\n{CALL}\n</tool_call>",
            "<tool_response>\ndry\n</tool_response>",
            "no rain",
            "thanks",
            "bye",
        ),
        (f"<tool_call>\n{CALL}\n</tool_call><|im_end|>", "no rain<|im_end|>", "bye<|im_end|>"),
    ),
    # Qwen3 shows the thoughts of the last answer only, empty ones where there are none.
    Golden(
        "qwen3",
        SINGLE,
        chatml("2+2?", "<think>\n\n</think>\n\n4"),
        ("<think>\n\n</think>\n\n4<|im_end|>",),
    ),
    Golden(
        "qwen3",
        SYSTEM,
        "<|im_start|>system\nbe brief<|im_end|>\n"
        + chatml("2+2?", "4", "3+3?", "<think>\n\n</think>\n\n6"),
        ("4<|im_end|>", "<think>\n\n</think>\n\n6<|im_end|>"),
    ),
    Golden(
        "qwen3",
        THOUGHTS,
        chatml("2+2?", "4", "3+3?", "<think>\nso\n</think>\n\n6"),
        ("4<|im_end|>", "<think>\nso\n</think>\n\n6<|im_end|>"),
    ),
    Golden(
        "qwen3",
        TOOLS,
        "…"
        + chatml(
            "rain?",
            f"<tool_call>\n{CALL}\n</tool_call>",
            "<tool_response>\ndry\n</tool_response>",
            "no rain",
            "thanks",
            "<think>\n\n</think>\n\nbye",
        ),
        (
            f"<tool_call>\n{CALL}\n</tool_call><|im_end|>",
            "no rain<|im_end|>",
            "<think>\n\n</think>\n\nbye<|im_end|>",
        ),
    ),
    Golden("llama3", SINGLE, llama3(("user", "2+2?"), ("assistant", "4")), ("4<|eot_id|>",)),
    Golden(
        "llama3",
        SYSTEM,
        llama3(
            ("system", "be brief"),
            ("user", "2+2?"),
            ("assistant", "4"),
            ("user", "3+3?"),
            ("assistant", "6"),
        ),
        ("4<|eot_id|>", "6<|eot_id|>"),
    ),
    Golden(
        "llama3.1",
        SINGLE,
        llama3(("system", LLAMA_DATES), ("user", "2+2?"), ("assistant", "4")),
        ("4<|eot_id|>",),
    ),
    Golden(
        "llama3.1",
        SYSTEM,
        llama3(
            ("system", LLAMA_DATES + "be brief"),
            ("user", "2+2?"),
            ("assistant", "4"),
            ("user", "3+3?"),
            ("assistant", "6"),
        ),
        ("4<|eot_id|>", "6<|eot_id|>"),
    ),
    Golden(
        "llama3.1",
        TOOLS,
        "…"
        + llama3(
            ("assistant", '{"name": "weather", "parameters": {"city": "Rome"}}'),
            ("ipython", '"dry"'),
            ("assistant", "no rain"),
            ("user", "thanks"),
            ("assistant", "bye"),
        ).removeprefix("<|begin_of_text|>"),
        (
            '{"name": "weather", "parameters": {"city": "Rome"}}<|eot_id|>',
            "no rain<|eot_id|>",
            "bye<|eot_id|>",
        ),
    ),
    Golden("gemma2", SINGLE, gemma("2+2?", "4"), ("4<end_of_turn>",)),
    Golden("gemma2", MULTI, gemma("2+2?", "4", "3+3?", "6"), ("4<end_of_turn>", "6<end_of_turn>")),
    Golden("gemma3", SINGLE, gemma("2+2?", "4"), ("4<end_of_turn>",)),
    Golden(
        "gemma3",
        SYSTEM,
        gemma("be brief\n\n2+2?", "4", "3+3?", "6"),
        ("4<end_of_turn>", "6<end_of_turn>"),
    ),
    # Without a generation prompt, the space that these models begin with is theirs to generate.
    Golden("mistral-v0.1", SINGLE, "<s> [INST] 2+2? [/INST] 4</s>", (" 4</s>",)),
    Golden(
        "mistral-v0.1",
        SYSTEM,
        "<s> [INST] be brief\n\n2+2? [/INST] 4</s> [INST] 3+3? [/INST] 6</s>",
        (" 4</s>", " 6</s>"),
    ),
    Golden(
        "mistral-v0.3",
        MULTI,
        "<s>[INST] 2+2?[/INST] 4</s>[INST] 3+3?[/INST] 6</s>",
        (" 4</s>", " 6</s>"),
    ),
    # The tools precede the user's last message, not the message before the first call.
    Golden(
        "mistral-v0.3",
        TOOLS,
        f'<s>[INST] rain?[/INST][TOOL_CALLS] [{CALL[:-1]}, "id": "call00001"}}]</s>'
        '[TOOL_RESULTS] {"content": dry, "call_id": "call00001"}[/TOOL_RESULTS] no rain</s>'
        '[AVAILABLE_TOOLS] [{"type": "function", "function": {"name": "weather", '
        '"description": "d", "parameters": {"type": "object"}}}][/AVAILABLE_TOOLS]'
        "[INST] thanks[/INST] bye</s>",
        (f'[TOOL_CALLS] [{CALL[:-1]}, "id": "call00001"}}]</s>', " no rain</s>", " bye</s>"),
    ),
    Golden("llama2", SINGLE, "<s>[INST] 2+2? [/INST] 4 </s>", (" 4 </s>",)),
    Golden(
        "llama2",
        SYSTEM,
        "<s>[INST] <<SYS>>\nbe brief\n<</SYS>>\n\n2+2? [/INST] 4 </s><s>[INST] 3+3? [/INST] 6 </s>",
        (" 4 </s>", " 6 </s>"),
    ),
    Golden("zephyr", SINGLE, "<|user|>\n2+2?</s>\n<|assistant|>\n4</s>\n", ("4</s>",)),
    Golden(
        "zephyr",
        SYSTEM,
        "<|system|>\nbe brief</s>\n<|user|>\n2+2?</s>\n<|assistant|>\n4</s>\n"
        "<|user|>\n3+3?</s>\n<|assistant|>\n6</s>\n",
        ("4</s>", "6</s>"),
    ),
    # Phi-3's special tokens swallow the line break after them. What ends the text ends no turn.
    Golden(
        "phi3.5",
        SINGLE,
        "<|user|>\n2+2?<|end|>\n<|assistant|>\n4<|end|>\n<|endoftext|>",
        ("4<|end|>",),
    ),
    Golden(
        "phi3.5",
        SYSTEM,
        "<|system|>\nbe brief<|end|>\n<|user|>\n2+2?<|end|>\n<|assistant|>\n4<|end|>\n"
        "<|user|>\n3+3?<|end|>\n<|assistant|>\n6<|end|>\n<|endoftext|>",
        ("4<|end|>", "6<|end|>"),
    ),
    Golden(
        "phi4",
        SYSTEM,
        "<|im_start|>system<|im_sep|>be brief<|im_end|><|im_start|>user<|im_sep|>2+2?<|im_end|>"
        "<|im_start|>assistant<|im_sep|>4<|im_end|><|im_start|>user<|im_sep|>3+3?<|im_end|>"
        "<|im_start|>assistant<|im_sep|>6<|im_end|>",
        ("4<|im_end|>", "6<|im_end|>"),
    ),
    # Thoughts are cut out of every turn: the rest is learned, without the tag that opens thoughts.
    Golden(
        "deepseek-r1-distill",
        THOUGHTS,
        f"{R1_BOS}{R1_USER}2+2?{R1_ASSISTANT}\n\n4{R1_EOS}{R1_USER}3+3?{R1_ASSISTANT}\n\n6{R1_EOS}",
        (f"\n\n4{R1_EOS}", f"\n\n6{R1_EOS}"),
    ),
]


WITHOUT_BOS = ("zephyr", "phi3.5")
"""Formats that do not have the start token, though the tokenizer would set it."""


def tokenizer_of(family: str, template: str | None = None):
    """Return a small tokenizer of a model family, with its template or another."""
    kind, special, bos, eos = FAMILIES[family]
    tokenizer = build_tokenizer(
        kind, special, bos, eos, adds_bos=bos is not None, rstrip=family == "phi3.5"
    )
    tokenizer.chat_template = template or (TEMPLATES / f"{family}.jinja").read_text("utf-8")
    return tokenizer


def runs(sample: Sample, tokenizer) -> tuple[str, ...]:
    """Return the texts of consecutive targets."""
    texts, run = [], []
    for token, label in zip([*sample.input_ids, -1], [*sample.labels, IGNORE_INDEX], strict=True):
        if label != IGNORE_INDEX:
            assert label == token
            run.append(token)
        elif run:
            texts.append(tokenizer.decode(run))
            run = []
    return tuple(texts)


@pytest.mark.parametrize(
    "golden", GOLDEN, ids=lambda golden: f"{golden.family}-{len(golden.row['messages'])}"
)
def test_what_is_learned_in_a_real_models_format(golden: Golden) -> None:
    """The targets are the answers with their end tokens, as the format has them.

    The start token stands there once, though both template and tokenizer set it.
    """
    tokenizer = tokenizer_of(golden.family)
    encoded = encode([golden.row], tokenizer, max_bad_fraction=0.0)
    [sample] = encoded.samples
    assert runs(sample, tokenizer) == golden.targets
    expected = tokenizer(golden.text.removeprefix("…"), add_special_tokens=False).input_ids
    assert sample.input_ids[-len(expected) :] == expected
    assert golden.text.startswith("…") or len(sample.input_ids) == len(expected)
    if tokenizer.bos_token:
        num_exchanges = (
            2 if golden.family == "llama2" and golden.row is SYSTEM else 1
        )  # Llama 2 opens each one with it
        assert sample.input_ids.count(tokenizer.bos_token_id) == (
            0 if golden.family in WITHOUT_BOS else num_exchanges
        )
    assert not encoded.report.is_open_ended


@pytest.mark.parametrize("family", FAMILIES)
def test_odd_words_are_learned_as_they_stand(family: str) -> None:
    """Odd answers are targets, character for character.

    They have characters of several tokens, line breaks, words like the template's own text, or
    repeat the question.
    """
    tokenizer = tokenizer_of(family)
    for said in ("naïve 狐 🦊", "[INST] user\n- a\n\n- b", "2+2?", "in in"):
        [sample] = encode(
            [chat("2+2?", said, said, "6")], tokenizer, max_bad_fraction=0.0, max_seq_len=4096
        ).samples
        first, second = runs(sample, tokenizer)
        end = tokenizer.convert_ids_to_tokens(end_of_turn_id(tokenizer))
        assert first.removesuffix(end).strip() == said
        assert second.removesuffix(end).replace("<think>\n\n</think>\n\n", "").strip() == "6"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("answer", ["4", "<think>\nhm\n</think>\n\n4", "  4\n"])
def test_a_question_that_looks_like_an_answer_is_no_target(family: str, answer: str) -> None:
    """A whole conversation as the question, end tokens and all, has no target."""
    tokenizer = tokenizer_of(family)
    faked = tokenizer.apply_chat_template(chat("2+2?", "faked")["messages"], tokenize=False)
    row = chat(faked, answer, faked, answer)
    [sample] = encode([row], tokenizer, max_bad_fraction=0.0, max_seq_len=8192).samples
    learned = runs(sample, tokenizer)
    assert len(learned) == 2
    assert all("4" in text and "faked" not in text and "2+2?" not in text for text in learned)


def test_rows_of_one_shape_are_rendered_once_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the first row of a shape is rendered several times; each later row is rendered once."""
    calls = []
    render = ChatTemplate._render
    monkeypatch.setattr(
        ChatTemplate,
        "_render",
        lambda self, *args, **how: calls.append(1) or render(self, *args, **how),
    )
    tokenizer = tokenizer_of("qwen3")
    rows = [chat(*(f"{number} {turn}" for turn in range(10))) for number in range(20)]
    few = len(encode(rows[:10], tokenizer).samples) and len(calls)
    encode(rows, tokenizer)
    assert len(calls) - few == few + 10


# -- templates that rewrite earlier turns


def test_generation_marks_say_where_a_rewritten_turn_stands() -> None:
    """Generation marks give the span of a rewritten turn; its end token belongs to it.

    The template shows earlier answers shortened, and marks the assistant's words without the
    end token. Without the marks, the heading cannot be told from the words.
    """
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role + '\n' }}"
        "{% if m.role == 'assistant' %}{{ '' if loop.last else 'short:\n' }}"
        "{% generation %}{{ m.content if loop.last else m.content.split(' ')[-1] }}"
        "{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    for text, first in (
        (template, "4<|im_end|>"),
        (
            template.replace("generation %}", "if true %}", 1).replace("endgeneration", "endif"),
            "short:\n4<|im_end|>",
        ),
    ):
        tokenizer = tokenizer_of("qwen2.5", text)
        [sample] = encode(
            [chat("2+2?", "it is 4", "3+3?", "it is 6")], tokenizer, max_bad_fraction=0.0
        ).samples
        assert runs(sample, tokenizer) == (first, "it is 6<|im_end|>")


# -- the start and end token


@pytest.mark.parametrize("family", ["llama3", "gemma2", "llama2"])
def test_start_and_end_token_stand_once_in_plain_text(family: str) -> None:
    """Plain text has one start and one end token, whether or not the text brings them itself."""
    tokenizer = tokenizer_of(family)
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    rows = [{"text": text} for text in ("no rain", f"{bos}no rain", f"no rain{eos}")]
    rows += [
        {"prompt": "rain?", "completion": "no"},
        {"prompt": f"{bos}rain?", "completion": f"no{eos}"},
    ]
    for row in rows:
        [sample] = encode([row], tokenizer).samples
        assert (sample.input_ids[0], sample.input_ids[-1]) == (
            tokenizer.bos_token_id,
            tokenizer.eos_token_id,
        )
        assert (
            sample.input_ids.count(tokenizer.bos_token_id)
            == sample.input_ids.count(tokenizer.eos_token_id)
            == 1
        )
        assert sample.labels[-1] == tokenizer.eos_token_id
        assert (
            plain_ids(row.get("text", row.get("prompt")), tokenizer).count(tokenizer.bos_token_id)
            == 1
        )


# -- choosing a template


def test_chatml_is_built_in() -> None:
    """`chatml` gives a base model a chat format with tools.

    The calls are targets, the tools are listed once.
    """
    tokenizer = tokenizer_of("qwen2.5", "no template of its own")
    set_chat_template(tokenizer, "chatml")
    [sample] = encode([SYSTEM], tokenizer, max_bad_fraction=0.0).samples
    assert runs(sample, tokenizer) == ("4<|im_end|>", "6<|im_end|>")
    expected = "<|im_start|>system\nbe brief<|im_end|>\n" + chatml("2+2?", "4", "3+3?", "6")
    assert tokenizer.decode(sample.input_ids) == expected
    for row in (
        TOOLS,
        {**TOOLS, "messages": [{"role": "system", "content": "be brief"}, *TOOLS["messages"]]},
    ):
        [sample] = encode([row], tokenizer, max_bad_fraction=0.0, max_seq_len=4096).samples
        called = f"<tool_call>\n{CALL}\n</tool_call><|im_end|>"
        assert runs(sample, tokenizer) == (called, "no rain<|im_end|>", "bye<|im_end|>")
        text = tokenizer.decode(sample.input_ids)
        assert text.count(json.dumps(TOOLS["tools"][0])) == text.count("<|im_start|>system") == 1
        assert "<|im_start|>tool\ndry<|im_end|>\n" in text
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "2+2?"}], tokenize=False, add_generation_prompt=True
    )
    assert prompt == "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"


def test_a_template_is_chosen_by_name_or_file_and_saved(tmp_path: Path) -> None:
    """A name of the tokenizer's own templates has precedence.

    The chosen template is the tokenizer's only one from then on.
    """
    line = "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"
    file = tmp_path / "line.jinja"
    file.write_text(line)
    tokenizer = tokenizer_of("qwen2.5")
    tokenizer.chat_template = {"default": "a", "chatml": "b", "rag": line}
    set_chat_template(tokenizer, None)
    assert tokenizer.chat_template == {"default": "a", "chatml": "b", "rag": line}
    for choice in ("rag", str(file)):
        tokenizer.chat_template = {"default": "a", "chatml": "b", "rag": line}
        set_chat_template(tokenizer, choice)
        assert tokenizer.chat_template == line
    tokenizer.save_pretrained(tmp_path / "saved")
    assert type(tokenizer).from_pretrained(tmp_path / "saved").chat_template == line
    tokenizer.chat_template = {"default": "a", "chatml": "b"}
    set_chat_template(tokenizer, "chatml")
    assert tokenizer.chat_template == "b"


def test_a_template_that_is_not_there_or_broken_is_refused(tmp_path: Path) -> None:
    """The message has the value, the fault, and the possible names."""
    tokenizer = tokenizer_of("qwen2.5")
    tokenizer.chat_template = {"default": "a", "rag": "b"}
    with pytest.raises(
        ConfigError,
        match=r"data\.chat_template is chatlm: .*\(No such file.*chatml, default, rag\.",
    ):
        set_chat_template(tokenizer, "chatlm")
    with pytest.raises(ConfigError, match=r"\(Is a directory\)"):
        set_chat_template(tokenizer, str(tmp_path))
    (tmp_path / "latin.jinja").write_bytes("é".encode("latin-1"))
    with pytest.raises(ConfigError, match="codec can't decode"):
        set_chat_template(tokenizer, str(tmp_path / "latin.jinja"))
    (tmp_path / "broken.jinja").write_text("\n{% for m in messages %}{{ m.content }")
    with pytest.raises(ConfigError, match=r"broken\.jinja, line 2: not valid Jinja \(.*\)\. Mend"):
        set_chat_template(tokenizer, str(tmp_path / "broken.jinja"))


def test_a_tokenizer_whose_templates_cannot_be_used_is_refused_for_chats_only() -> None:
    """Broken templates, or several without a default, are refused for chats but not for text."""
    tokenizer = tokenizer_of("qwen2.5")
    tokenizer.chat_template = {"rag": "a", "tools": "b"}
    with pytest.raises(
        DataError,
        match=r"rows\.jsonl holds chat messages, but .* none .* default: rag, tools\. Set",
    ):
        encode([SINGLE], tokenizer)
    assert encode([{"text": "no"}], tokenizer).samples
    tokenizer.chat_template = "{% if %}"
    with pytest.raises(DataError, match=r"line 1: not valid Jinja"):
        encode([SINGLE], tokenizer)


def test_a_format_that_does_not_end_turns_is_pointed_out() -> None:
    """The notes point out a format without an end token, or with one that is ordinary text.

    With it, the model would not learn to stop.
    """
    lines = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    for family, template, is_open in (("llama2", lines, True), ("qwen2.5", None, False)):
        report = encode([SINGLE], tokenizer_of(family, template)).report
        assert report.is_open_ended is is_open
        assert (
            "does not learn to stop: choose another one with data.chat_template"
            in report.sentence(64)
        ) is is_open
        assert (end_of_turn_id(tokenizer_of(family, template)) is None) is is_open
    foreign = tokenizer_of("llama2")
    set_chat_template(foreign, "chatml")
    assert encode([SINGLE], foreign).report.is_open_ended


# -- malicious templates


@pytest.mark.parametrize(
    ("template", "told"),
    [
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "'__class__' of 'str' object is unsafe"),
        ("{{ messages.__class__.__base__ }}", "'__class__' of 'list' object is unsafe"),
        ("{{ raise_exception.__globals__.x }}", "'__globals__' of 'function' object is unsafe"),
        (
            "{{ (lipsum | attr('__globals__'))['os'].system('true') }}",
            "'__globals__' of 'function' object is unsafe",
        ),
        ("{{ messages.append(1) }}", "append"),
        ("{% for x in range(10**9) %}{% endfor %}", "Range too big"),
        ("{{ 'a' * 10**18 }}", "MemoryError"),
    ],
)
def test_a_template_cannot_reach_python(template: str, told: str) -> None:
    """A template that the sandbox refuses ends the run, whatever share of faulty rows may pass."""
    with pytest.raises(DataError, match="what its sandbox forbids") as caught:
        encode([SINGLE] * 3, tokenizer_of("qwen2.5", template), max_bad_fraction=0.99)
    assert told in str(caught.value)


@pytest.mark.parametrize(
    "template",
    [
        "{% include '/etc/passwd' %}",
        "{{ 1 // 0 }}",
        "{{ open('/etc/passwd') }}",
        "{{ eos_token.x.y }}",
    ],
)
def test_a_template_that_fails_for_every_row_is_an_error(template: str) -> None:
    """A template that fails for every row is refused, whatever share of faulty rows may pass."""
    with pytest.raises(
        DataError,
        match=r"row 1: the model's chat template refuses .* In all, 3 of 3 rows are faulty",
    ):
        encode([SINGLE] * 3, tokenizer_of("qwen2.5", template), max_bad_fraction=0.99)
