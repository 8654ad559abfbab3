"""Tokens and labels of conversations: the loss is on the assistant's words, and on nothing else."""

import copy
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import ByteLevel, TemplateProcessing

from qlora_dist.config.schema import IGNORE_INDEX
from qlora_dist.errors import DataError
from tests.support.rows import encode, refusal, targets, with_template

END = "<|im_end|>"

ALTERNATING = """\
{%- for message in messages -%}
  {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
    {{- raise_exception('Conversation roles must alternate user/assistant') -}}
  {%- endif -%}
  {{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}
"""

# As reasoning models do: only the last turn keeps the thoughts before its answer.
FORGETFUL = """\
{%- for message in messages -%}
  {%- set text = message['content'] if loop.last else message['content'].split('|')[-1] -%}
  {{- '<|im_start|>' + message['role'] + '\n' + text + '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}
"""

# As in Mistral's templates: no generation prompt, and nothing after the end token.
BARE = """\
{%- for message in messages -%}
  {%- if message['role'] == 'user' -%}{{- '[INST] ' + message['content'] + ' [/INST]' -}}
  {%- else -%}{{- ' ' + message['content'] + '<|im_end|>' -}}{%- endif -%}
{%- endfor -%}
"""

# As in templates that know tools: descriptions first, calls by name and arguments, and the values
# that tools return in quotation marks.
TOOLS = """\
{%- if tools %}{{- '<|im_start|>system\n' + (tools | tojson) + '<|im_end|>\n' -}}{% endif -%}
{%- for message in messages -%}
  {{- '<|im_start|>' + message.role + '\n' -}}
  {%- if message.role == 'tool' -%}{{- message.content | tojson -}}
  {%- else -%}{{- message.content -}}{%- endif -%}
  {%- for call in message.tool_calls or [] -%}
    {{- '<call>' + call.function.name + ' ' + (call.function.arguments | tojson) -}}
  {%- endfor -%}
  {{- '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}
"""

# As base models' examples do: no end token at all, a line per turn.
LINES = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"


def chat(*contents: str, system: str | None = None) -> dict:
    """Return a row of user and assistant turns in alternation."""
    messages = [
        {"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)
    ]
    return {"messages": ([{"role": "system", "content": system}] if system else []) + messages}


# -- the mask


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (chat("who jumps?", "the quick brown fox"), "the quick brown fox" + END),
        (chat("a", "b", "c", "d e"), "b" + END + "d e" + END),
        (chat("a", "b", "c", "d e", system="be brief"), "b" + END + "d e" + END),
        (chat("the fox", "the fox"), "the fox" + END),  # the same words in the prompt are no target
        (chat("over\n", "  over\n\n the dog \n"), "  over\n\n the dog \n" + END),
        (chat("naïve 狐 🦊", "naïve 狐 🦊"), "naïve 狐 🦊" + END),  # characters of several tokens
        (chat("a", ""), END),
        (chat("a", "b", "and then?"), "b" + END),  # a last turn that nobody answered
    ],
)
def test_the_targets_are_the_assistants_turns(tokenizer, row: dict, expected: str) -> None:
    """Targets decode to each assistant turn with its end token, without header and line break."""
    [sample] = encode([row], tokenizer).samples
    assert targets(sample, tokenizer) == expected


@settings(deadline=None)
@given(
    st.lists(
        st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12),
        min_size=2,
        max_size=6,
    )
)
def test_the_targets_are_the_assistants_turns_whatever_they_say(
    tokenizer, contents: list[str]
) -> None:
    """With any text but NUL characters, targets decode to the assistant's words.

    The input decodes to the whole text.
    """
    row = chat(*contents)
    [sample] = encode([row], tokenizer, max_seq_len=10_000).samples
    assert targets(sample, tokenizer) == "".join(text + END for text in contents[1::2])
    assert tokenizer.decode(sample.input_ids) == tokenizer.apply_chat_template(
        row["messages"], tokenize=False
    )


def test_labels_stand_where_their_tokens_stand(tokenizer) -> None:
    """A label is its input token or IGNORE_INDEX; the targets end before the last line break."""
    [sample] = encode([chat("quick fox", "lazy dog")], tokenizer).samples
    mask = [label != IGNORE_INDEX for label in sample.labels]
    assert all(
        label == token
        for token, label, on in zip(sample.input_ids, sample.labels, mask, strict=True)
        if on
    )
    first = mask.index(True)
    assert mask == [False] * first + [True] * (len(mask) - first - 1) + [False]
    assert sample.input_ids[-2] == tokenizer.eos_token_id
    assert sample.num_targets == sum(mask)


def test_train_on_all_takes_every_token(tokenizer) -> None:
    """With `train_on: all` labels are the input, prompt and template included."""
    row = chat("quick fox", "lazy dog")
    [sample] = encode([row], tokenizer, train_on="all").samples
    assert sample.labels == sample.input_ids
    assert sample.input_ids == encode([row], tokenizer).samples[0].input_ids
    assert sample.num_targets == len(sample.input_ids) - 1


def test_a_template_without_generation_prompt_or_separator(tokenizer) -> None:
    """The turn is all that the text gains: the space before it, and everything to the end token."""
    [sample] = encode([chat("a", "b", "c", "d")], with_template(tokenizer, BARE)).samples
    assert tokenizer.decode(sample.input_ids) == f"[INST] a [/INST] b{END}[INST] c [/INST] d{END}"
    assert targets(sample, tokenizer) == f" b{END} d{END}"


def test_no_special_token_is_added_to_what_the_template_writes(tokenizer) -> None:
    """Tokenizing adds no second start token to the one that the template writes."""
    bos_first = copy.deepcopy(tokenizer)
    bos_first._tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", tokenizer.bos_token_id)]
    )
    assert bos_first("a").input_ids[0] == tokenizer.bos_token_id  # the tokenizer would add it
    row = chat("quick fox", "lazy dog")
    assert encode([row], bos_first).samples == encode([row], tokenizer).samples


def test_without_an_end_token_the_line_break_ends_the_turn(tokenizer) -> None:
    """If only a line break closes a turn, it is a target, so that the model learns to stop."""
    [sample] = encode([chat("a", "b", "c", "d")], with_template(tokenizer, LINES)).samples
    assert targets(sample, tokenizer) == "assistant: b\nassistant: d\n"


# -- truncation


def test_long_rows_are_cut_at_the_end_and_counted(tokenizer) -> None:
    """Rows are cut to max_seq_len tokens, or dropped if no answer is left; both are counted."""
    short, long, all_prompt = chat("a", "b"), chat("a", "fox " * 50), chat("fox " * 50, "b")
    whole = encode([short, long, all_prompt], tokenizer)
    assert (len(whole.samples), whole.report.num_cut, whole.report.num_without_targets) == (3, 0, 0)
    cut = encode([short, long, all_prompt], tokenizer, max_seq_len=40)
    assert cut.samples[0] == whole.samples[0]
    assert cut.samples[1].input_ids == whole.samples[1].input_ids[:40]
    assert cut.samples[1].labels == whole.samples[1].labels[:40]
    assert (len(cut.samples), cut.report.num_cut, cut.report.num_without_targets) == (2, 1, 1)


def test_a_row_of_exactly_the_longest_length_is_not_cut(tokenizer) -> None:
    """`max_seq_len` is the longest length allowed."""
    length = len(encode([chat("a", "b")], tokenizer).samples[0].input_ids)
    assert encode([chat("a", "b")], tokenizer, max_seq_len=length).report.num_cut == 0
    assert encode([chat("a", "b")], tokenizer, max_seq_len=length - 1).report.num_cut == 1


def test_rows_that_all_lose_their_targets_are_refused(tokenizer) -> None:
    """There is nothing to train on when no answer lies within data.max_seq_len."""
    with pytest.raises(DataError, match=r"none of its 2 rows .* data\.max_seq_len \(5\)"):
        encode([chat("fox " * 50, "b")] * 2, tokenizer, max_seq_len=5)


# -- rows that cannot be used


@pytest.mark.parametrize(
    ("messages", "named"),
    [
        ([], "must be a list"),
        (None, "must be a list"),
        ("user: hi", "must be a list"),
        ([{"role": "user", "content": "hi"}], "no assistant turn (its roles: user)"),
        (
            [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}],
            "(its roles: system, user)",
        ),
        ([{"role": "bot", "content": "hi"}], "message 1 has the role 'bot'"),
        ([{"role": "user", "content": "hi"}, {"content": "ho"}], "message 2 has the role None"),
        (
            [{"role": "user", "content": "hi"}, {"role": "assistant", "content": None}],
            "message 2 is",
        ),
        ([{"role": "user", "content": 3}, {"role": "assistant", "content": "x"}], "message 1 is"),
        ([{"role": "user"}, {"role": "assistant", "content": "x"}], "message 1 is"),
        (["hi", {"role": "assistant", "content": "x"}], "message 1 is 'hi'"),
    ],
)
def test_a_malformed_conversation_is_refused_with_its_row(
    tokenizer, messages: object, named: str
) -> None:
    """The message names file, row and what is wrong; good rows before it do not hide it."""
    message = refusal([chat("a", "b"), chat("a", "b"), {"messages": messages}], tokenizer)
    assert message.startswith("rows.jsonl, row 3: ")
    assert named in message


def test_a_conversation_that_the_template_refuses_is_refused_with_its_words(tokenizer) -> None:
    """The words of the template's raise_exception reach the user, with the row and its roles."""
    picky = with_template(tokenizer, ALTERNATING)
    assert (
        targets(encode([chat("a", "b", "c", "d")], picky).samples[0], tokenizer) == f"b{END}d{END}"
    )
    message = refusal([chat("a", "b"), chat("a", "b", system="s")], picky)
    assert message.startswith("rows.jsonl, row 2: ")
    assert "(system, user, assistant)" in message
    assert "Conversation roles must alternate user/assistant" in message


def test_of_a_turn_that_the_template_rewrites_what_is_left_is_learned(tokenizer) -> None:
    """A turn's target is its text in the row: the last turn whole, earlier ones less thoughts."""
    forgetful = with_template(tokenizer, FORGETFUL)
    assert (
        targets(encode([chat("a", "thought|b")], forgetful).samples[0], tokenizer)
        == f"thought|b{END}"
    )
    [sample] = encode([chat("a", "thought|b", "c", "d|e")], forgetful).samples
    assert targets(sample, tokenizer) == f"b{END}d|e{END}"
    assert "thought" not in tokenizer.decode(sample.input_ids)


def test_a_turn_that_the_template_hides_is_refused(tokenizer) -> None:
    """A turn that later stands elsewhere, or twice, is refused: its tokens cannot be told apart."""
    twice = with_template(
        tokenizer,
        "{% for m in messages %}{% if not loop.last %}{{ m['content'] + '\n' }}{% endif %}"
        "{% endfor %}{% for m in messages %}<|im_start|>{{ m['role'] + '\n' + m['content'] }}"
        "<|im_end|>\n{% endfor %}",
    )
    message = refusal([chat("a", "b", "c", "d")], twice)
    assert message.startswith("rows.jsonl, row 1: ")
    assert "assistant turn 2 differently" in message


def test_chat_rows_need_a_chat_template(tokenizer) -> None:
    """Without a chat template, conversations are refused and plain text is not."""
    plain = with_template(tokenizer, None)
    assert "no chat template" in refusal([chat("a", "b")], plain)
    assert encode([{"prompt": "a", "completion": "b"}], plain, "prompt_completion").samples


# -- prompt and completion


def test_plain_text_ends_with_one_end_token(tokenizer) -> None:
    """Prompt, completion and end token are tokenized apart; the first is no target."""
    [sample] = encode(
        [{"prompt": "the quick", "completion": " brown fox"}], tokenizer, "prompt_completion"
    ).samples
    prompt, completion = tokenizer("the quick").input_ids, tokenizer(" brown fox").input_ids
    assert sample.input_ids == [*prompt, *completion, tokenizer.eos_token_id]
    assert sample.labels == [*[IGNORE_INDEX] * len(prompt), *completion, tokenizer.eos_token_id]


def test_plain_text_with_train_on_all(tokenizer) -> None:
    """With `train_on: all` the prompt counts too."""
    row = {"prompt": "the quick", "completion": " brown fox"}
    [sample] = encode([row], tokenizer, "prompt_completion", train_on="all").samples
    assert sample.labels == sample.input_ids


def test_a_tokenizer_that_frames_every_text_frames_the_row_once(tokenizer) -> None:
    """A row has one start and one end token, though the tokenizer would frame each part."""
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    framing = copy.deepcopy(tokenizer)
    framing._tokenizer.post_processor = TemplateProcessing(
        single=f"<|im_start|> $A {END}", special_tokens=[("<|im_start|>", start), (END, end)]
    )
    assert framing("a").input_ids[-1] == end
    [sample] = encode(
        [{"prompt": "the quick", "completion": " fox"}], framing, "prompt_completion"
    ).samples
    assert (sample.input_ids.count(start), sample.input_ids.count(end)) == (1, 1)
    assert (sample.input_ids[0], sample.input_ids[-1]) == (start, end)
    assert targets(sample, tokenizer) == f" fox{END}"


@pytest.mark.parametrize("column", ["prompt", "completion"])
@pytest.mark.parametrize("value", [None, "", 3, ["text"]])
def test_plain_text_that_is_no_text_is_refused_with_its_row(
    tokenizer, column: str, value: object
) -> None:
    """The message names file, row, column and value."""
    good = {"prompt": "a", "completion": "b"}
    message = refusal([good, {**good, column: value}], tokenizer, "prompt_completion")
    assert message.startswith(f"rows.jsonl, row 2: `{column}` is {value!r}")


def test_whitespace_is_a_target_when_the_tokenizer_trims_offsets(tokenizer) -> None:
    """White-space tokens of a turn count, though some tokenizers give them no width."""
    trimming = copy.deepcopy(tokenizer)
    trimming._tokenizer.post_processor = ByteLevel(trim_offsets=True)
    answer = "def f():\n    return  x"
    [sample] = encode([chat("hi", answer)], trimming).samples
    assert (
        trimming.decode([label for label in sample.labels if label != IGNORE_INDEX]) == answer + END
    )


@pytest.mark.parametrize("system", [None, "be brief"])
def test_a_conversation_that_the_assistant_starts(tokenizer, system: str | None) -> None:
    """A first turn of the assistant is learned if the template shows it, else refused.

    A system turn before it makes no difference.
    """
    turns = [{"role": "assistant", "content": "hello"}, *chat("hi", "there")["messages"]]
    row = {"messages": chat(system=system)["messages"] + turns}
    [sample] = encode([row], tokenizer).samples
    assert targets(sample, tokenizer) == f"hello{END}there{END}"
    refusing = with_template(tokenizer, ALTERNATING)
    assert "starts with an assistant turn, which nothing asked for: put" in refusal([row], refusing)


# -- text


def test_text_is_all_target_and_framed_once(tokenizer) -> None:
    """Every token of plain text counts, whatever `train_on` says.

    Start and end token stand once, even if the text or the tokenizer brings them.
    """
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    framing = copy.deepcopy(tokenizer)
    framing._tokenizer.post_processor = TemplateProcessing(
        single=f"<|im_start|> $A {END}", special_tokens=[("<|im_start|>", start), (END, end)]
    )
    fox = tokenizer("quick fox").input_ids
    for words in ("quick fox", "<|im_start|>quick fox", f"quick fox{END}"):
        [sample] = encode([{"text": words}], framing, "text", train_on="completions").samples
        assert sample.input_ids == [start, *fox, end]
        assert sample.labels == sample.input_ids
    [unframed] = encode([{"text": "quick fox"}], tokenizer, "text").samples
    assert unframed.input_ids == [*fox, end]  # no start token where the tokenizer sets none


def test_text_needs_no_chat_template(tokenizer) -> None:
    """A base model can learn from plain text."""
    assert encode([{"text": "a"}], with_template(tokenizer, None), "auto").report.layout == "text"


# -- other formats of conversations


def test_all_formats_of_a_conversation_are_the_same_to_the_model(tokenizer) -> None:
    """One exchange in five spellings has the same tokens and the same targets."""
    said = [("system", "be brief"), ("user", "quick fox"), ("assistant", "lazy dog")]
    messages = [{"role": role, "content": text} for role, text in said]
    spelled = {
        "messages": {"messages": messages},
        "sharegpt": {
            "conversations": [
                {"from": speaker, "value": text}
                for speaker, (_, text) in zip(["system", "human", "gpt"], said, strict=True)
            ]
        },
        "alpaca": {
            "instruction": "quick fox",
            "input": "",
            "output": "lazy dog",
            "system": "be brief",
        },
        "prompt_completion": {"prompt": messages[:2], "completion": messages[2:]},
    }
    for name, row in spelled.items():
        encoded = encode([row], tokenizer, "auto")
        assert (encoded.report.format, encoded.report.layout) == (name, "messages")
        assert encoded.samples == encode([spelled["messages"]], tokenizer).samples
        assert targets(encoded.samples[0], tokenizer) == "lazy dog" + END


def test_assistant_turns_of_a_prompt_are_no_targets(tokenizer) -> None:
    """Assistant turns within a prompt are given, not learned."""
    messages = chat("a", "b", "c", "d")["messages"]
    [sample] = encode(
        [{"prompt": messages[:3], "completion": messages[3:]}], tokenizer, "prompt_completion"
    ).samples
    assert targets(sample, tokenizer) == "d" + END
    assert sample.input_ids == encode([{"messages": messages}], tokenizer).samples[0].input_ids


def test_plain_prompts_among_conversations_are_faulty(tokenizer) -> None:
    """A file trains one form of prompt; rows of another form are faulty, whichever comes first."""
    plain = {"prompt": "a", "completion": "b"}
    messages = chat("a", "b")["messages"]
    listed = {"prompt": messages[:1], "completion": messages[1:]}
    assert "row 2: `prompt` and `completion` are messages" in refusal(
        [plain, listed], tokenizer, "auto"
    )
    assert "row 2: `prompt` and `completion` are plain text" in refusal(
        [listed, plain], tokenizer, "auto"
    )


# -- tools

WEATHER = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}},
}
CALL = {
    "id": "1",
    "type": "function",
    "function": {"name": "weather", "arguments": '{"city": "Rome", "day": null}'},
}
TOOL_MESSAGES = [
    {"role": "user", "content": "rain?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": 'say "no"', "tool_call_id": "1"},
    {"role": "assistant", "content": "no rain"},
]


def test_tool_calls_and_answers_are_targets_and_what_tools_say_is_not(tokenizer) -> None:
    """Calls and answers are targets, tools' words are not.

    Calls written as OpenAI does, with JSON text, reach the template as objects; `tools` is the
    list that it shows.
    """
    [sample] = encode(
        [{"messages": TOOL_MESSAGES, "tools": [WEATHER]}], with_template(tokenizer, TOOLS)
    ).samples
    assert (
        targets(sample, tokenizer)
        == f'<call>weather {{"city": "Rome", "day": null}}{END}no rain{END}'
    )
    text = tokenizer.decode(sample.input_ids)
    assert '"name": "weather", "parameters"' in text
    assert 'tool\n"say \\"no\\""' in text


def test_sharegpt_spells_the_same_calls(tokenizer) -> None:
    """`function_call`, `observation` and tools as JSON text give the tokens of `tool_calls`."""
    call = json.dumps({"name": "weather", "arguments": {"city": "Rome", "day": None}})
    said = [
        ("human", "rain?"),
        ("function_call", call),
        ("observation", 'say "no"'),
        ("gpt", "no rain"),
    ]
    turns = [{"from": speaker, "value": value} for speaker, value in said]
    knowing = with_template(tokenizer, TOOLS)
    shared = encode([{"conversations": turns, "tools": json.dumps([WEATHER])}], knowing, "sharegpt")
    assert (
        shared.samples == encode([{"messages": TOOL_MESSAGES, "tools": [WEATHER]}], knowing).samples
    )


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"messages": TOOL_MESSAGES}, "leaves out the tool call of message 2"),
        ({**chat("a", "b"), "tools": [WEATHER]}, "leaves out the tool 'weather'"),
    ],
)
def test_a_template_that_knows_no_tools_is_not_given_any(tokenizer, row: dict, what: str) -> None:
    """A template without tools is refused rows with tools.

    The model would learn to answer without having called, or from tools that it never sees.
    """
    assert what in refusal([row], tokenizer)


def test_a_template_that_drops_turns_is_refused(tokenizer) -> None:
    """A template that silently ignores system turns is refused."""
    deaf = with_template(
        tokenizer,
        "{% for m in messages if m['role'] != 'system' %}{{ m['content'] + '\n' }}{% endfor %}",
    )
    assert targets(encode([chat("a", "b")], deaf).samples[0], tokenizer) == "b\n"
    assert "leaves out message 1 (system)" in refusal([chat("a", "b", system="be brief")], deaf)


# -- how many faults are let pass


def test_up_to_a_share_of_faulty_rows_is_left_out(tokenizer) -> None:
    """Exactly data.max_bad_fraction passes, one row more does not.

    Reasons are counted, with the first row of each.
    """
    good, empty, bot = (
        chat("a", "b"),
        {"messages": []},
        {"messages": [{"role": "bot", "content": "x"}]},
    )
    rows = [good, bot, *[good] * 4, empty, good, empty, good]
    encoded = encode(rows, tokenizer, max_bad_fraction=0.3)
    assert len(encoded.samples) == 7
    assert encoded.report.faulty.reasons == {
        "unknown role": (1, "rows.jsonl, row 2"),
        "empty row": (2, "rows.jsonl, row 7"),
    }
    told = "empty row: 2 (first: rows.jsonl, row 7), unknown role: 1 (rows.jsonl, row 2)"
    assert str(encoded.report.faulty) == told
    with pytest.raises(DataError) as caught:
        encode(rows, tokenizer, max_bad_fraction=0.29)
    message = str(caught.value)
    assert message.startswith("rows.jsonl, row 2: message 1 has the role 'bot'")
    assert "3 of 10 rows are faulty, more than data.max_bad_fraction (0.29)" in message
    assert told in message


def test_no_fault_passes_when_none_may(tokenizer) -> None:
    """`max_bad_fraction: 0` stops at any faulty row."""
    with pytest.raises(DataError, match="1 of 101 rows"):
        encode([*[chat("a", "b")] * 100, {"messages": []}], tokenizer, max_bad_fraction=0.0)


@pytest.mark.parametrize(
    ("content", "what"), [("a\0b", "NUL character"), ("a\ud83d", r"half a character ('\ud83d')")]
)
def test_text_that_is_no_text_is_faulty(tokenizer, content: str, what: str) -> None:
    """NUL characters and halves of surrogate pairs, both possible in JSON, are faulty."""
    assert what in refusal([chat("a", content)], tokenizer)
    assert what in refusal([{"prompt": content, "completion": "b"}], tokenizer, "prompt_completion")


def test_another_format_in_the_same_file_is_named_by_row(tokenizer) -> None:
    """The first rows decide the format; rows in another format are counted, the first one named."""
    rows = [
        chat("a", "b"),
        {"instruction": "a", "output": "b"},
        {"text": "a"},
        {"text": "b"},
        {"id": 3},
    ]
    message = refusal(rows, tokenizer, "auto")
    assert message.startswith(
        "rows.jsonl, row 2: this row is in the alpaca format, the file in the messages format"
    )
    assert (
        "text row: 2 (first: rows.jsonl, row 3), alpaca row: 1 (rows.jsonl, row 2), "
        "no `messages`: 1 (" in message
    )


def test_the_format_shows_although_the_first_row_is_faulty(tokenizer) -> None:
    """A row without columns, or with empty columns, does not decide the format."""
    for first in ({}, {"messages": None, "text": None}):
        encoded = encode(
            [first, {"messages": None, "text": "a"}], tokenizer, "auto", max_bad_fraction=0.5
        )
        assert (encoded.report.format, len(encoded.samples), encoded.report.faulty.num_rows) == (
            "text",
            1,
            1,
        )
