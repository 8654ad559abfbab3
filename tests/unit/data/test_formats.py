"""Rows of the common formats as conversations or plain text; each fault of a row has a reason."""

import contextlib
import json

import pytest

from qlora_dist.config.schema import DataConfig
from qlora_dist.data.formats import COLUMNS, PlainText, read_row, recognize_format
from qlora_dist.data.messages import Conversation, RowFault
from qlora_dist.data.names import FileNames
from qlora_dist.data.sources import Row
from qlora_dist.errors import DataError

USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}


def recognized(columns: list[str], asked: str) -> str:
    """Return the format of rows with these columns."""
    return recognize_format([Row("rows.jsonl, row 1", dict.fromkeys(columns, "x"))], asked)[0]


def reason(row: dict, format: str) -> str:
    """Return the short reason for which a row cannot be used."""
    with pytest.raises(RowFault) as caught:
        read_row(row, format)
    return caught.value.reason


# -- recognizing


@pytest.mark.parametrize(
    ("columns", "asked", "expected"),
    [
        (["messages"], "auto", "messages"),
        (["id", "messages", "source"], "auto", "messages"),
        (["conversations", "text"], "auto", "sharegpt"),
        (["completion", "prompt", "id"], "auto", "prompt_completion"),
        (["instruction", "output"], "auto", "alpaca"),
        (
            ["instruction", "input", "output", "text"],
            "auto",
            "alpaca",
        ),  # as Stanford's own file has it
        (["text"], "auto", "text"),
        (["messages", "prompt", "completion"], "auto", "messages"),
        (["messages", "prompt", "completion"], "prompt_completion", "prompt_completion"),
        (["messages", "text"], "text", "text"),
    ],
)
def test_the_columns_say_the_format(columns: list[str], asked: str, expected: str) -> None:
    """Conversations win over other formats unless data.format decides; more columns are allowed."""
    assert recognized(columns, asked) == expected


@pytest.mark.parametrize(
    ("columns", "asked", "needed"),
    [
        (
            ["question"],
            "auto",
            ("`messages`", "`prompt` and `completion`", "`conversations`", "`text`"),
        ),
        (["prompt", "answer"], "auto", ("`messages`", "`prompt` and `completion`")),
        (["prompt", "completion"], "messages", ("`messages`",)),
        (["messages"], "alpaca", ("`instruction` and `output`",)),
    ],
)
def test_missing_columns_are_refused(
    columns: list[str], asked: str, needed: tuple[str, ...]
) -> None:
    """The message names the row, its columns, and the columns that data.format needs."""
    with pytest.raises(DataError) as caught:
        recognized(columns, asked)
    message = str(caught.value)
    assert message.startswith("rows.jsonl, row 1 has the columns ")
    assert f"data.format: {asked}" in message
    for text in (*(f"`{column}`" for column in columns), *needed):
        assert text in message


# -- reading


@pytest.mark.parametrize(
    ("speaker", "role"),
    [
        ("human", "user"),
        ("user", "user"),
        ("gpt", "assistant"),
        ("assistant", "assistant"),
        ("model", "assistant"),
        ("bing", "assistant"),
        ("chatgpt", "assistant"),
        ("system", "system"),
    ],
)
def test_speakers_of_sharegpt(speaker: str, role: str) -> None:
    """All common names of users, models and system prompts in files of that format are read."""
    turns = [
        {"from": "human", "value": "a"},
        {"from": "gpt", "value": "b"},
        {"from": speaker, "value": "c"},
    ]
    content = read_row({"conversations": turns}, "sharegpt")
    assert isinstance(content, Conversation)
    assert content.messages[-1] == {"role": role, "content": "c"}


@pytest.mark.parametrize("speaker", ["tool", "function_response", "observation"])
def test_tools_of_sharegpt(speaker: str) -> None:
    """A tool's return is a tool turn, and a function call an assistant turn."""
    turns = [
        {"from": "human", "value": "a"},
        {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
        {"from": speaker, "value": "b"},
    ]
    content = read_row({"conversations": turns}, "sharegpt")
    assert isinstance(content, Conversation)
    assert content.messages[1:] == [
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}],
        },
        {"role": "tool", "content": "b"},
    ]


def test_sharegpt_with_role_and_content() -> None:
    """Some data sets write messages into the column `conversations`."""
    content = read_row({"conversations": [USER, ANSWER]}, "sharegpt")
    assert content == read_row({"messages": [USER, ANSWER]}, "messages")


def test_a_turn_of_sharegpt_may_have_the_keys_of_both_forms() -> None:
    """Keys that are null, as tables write them, and equal values are read; others are refused."""
    asked = {"from": "human", "value": "h"}
    said = [ANSWER | {"from": None, "value": None}, {"from": "gpt", "role": "assistant"}]
    said[1] |= {"value": ANSWER["content"], "content": ANSWER["content"]}
    for turn in said:
        content = read_row({"conversations": [asked, turn]}, "sharegpt")
        assert isinstance(content, Conversation)
        assert content.messages[1] == ANSWER
    for more, pair in (
        ({"role": "system"}, "`from` and `role`"),
        ({"content": "x"}, "`value` and `content`"),
    ):
        turns = [asked | more, {"from": "gpt", "value": "i"}]
        assert reason({"conversations": turns}, "sharegpt") == f"turn with {pair}"


def test_the_input_of_alpaca_follows_its_instruction() -> None:
    """Input and system prompt may be left out, empty or null."""
    row = {"instruction": "Add.", "output": "3"}
    expected = [{"role": "user", "content": "Add."}, {"role": "assistant", "content": "3"}]
    for more in ({}, {"input": ""}, {"input": None, "system": None}, {"system": ""}):
        assert read_row({**row, **more}, "alpaca") == Conversation(expected)
    with_input = read_row({**row, "input": "1 2", "system": "Be brief."}, "alpaca")
    assert with_input == Conversation(
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Add.\n\n1 2"},
            expected[1],
        ]
    )


def test_plain_text_keeps_its_white_space() -> None:
    """Plain text is taken as it stands."""
    assert read_row({"text": " a\n"}, "text") == PlainText(" a\n")
    assert read_row({"prompt": "a ", "completion": " b"}, "prompt_completion") == PlainText(
        " b", prompt="a "
    )


def test_prompts_as_json_text_are_messages() -> None:
    """CSV holds lists of messages as text; with Python's quotes they are refused, not learned."""
    row = {"prompt": [USER], "completion": [ANSWER]}
    written = {column: json.dumps(value) for column, value in row.items()}
    assert read_row(written, "prompt_completion") == read_row(row, "prompt_completion")
    names = FileNames(DataConfig(train="a", roles={"assistant": ("bot",)}))
    bot = {**written, "completion": json.dumps([{**ANSWER, "role": "bot"}])}
    assert names.read(Row("a, row 1", bot))["completion"] == [ANSWER]
    pythons = {column: str(value) for column, value in row.items()}
    assert reason(pythons, "prompt_completion") == "broken list"
    text = {**written, "completion": "[1, 2]"}
    assert read_row(text, "prompt_completion") == PlainText("[1, 2]", prompt=written["prompt"])


def test_content_in_parts_is_joined() -> None:
    """OpenAI's parts of type text are one text; other parts are no text."""
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    content = read_row({"messages": [{"role": "user", "content": parts}, ANSWER]}, "messages")
    assert content == Conversation([USER, ANSWER])
    image = [*parts, {"type": "image_url", "image_url": {"url": "x"}}]
    assert (
        reason({"messages": [{"role": "user", "content": image}, ANSWER]}, "messages")
        == "part of `content` that is no text"
    )


TEXT = {"type": "text", "text": "h"}


@pytest.mark.parametrize(
    "part",
    [
        {"image_url": {"url": "x"}},
        {"image": "x.png", "text": "h"},
        {"type": "text", "txt": "h"},
        {"type": "text", "input_text": "h"},
        {**TEXT, "content": "i"},
        {**TEXT, "weight": 0},
        {"type": "text", "text": ["h"]},
        {"type": ["text"], "text": "h"},
        {"type": "thinking", "thinking": "h"},
    ],
)
def test_no_word_of_a_part_is_lost(part: dict) -> None:
    """A part that is not one text is a fault, also without a type or among empty keys."""
    for more in ({}, {"image": None, "value": ""}):
        turns = [{"role": "user", "content": [TEXT, {**more, **part}]}, ANSWER]
        assert reason({"messages": turns}, "messages") == "part of `content` that is no text"


@pytest.mark.parametrize(
    ("part", "text"),
    [
        ({"type": None, "text": "i"}, "i"),
        ({"text": "", "value": "i", "content": None}, "i"),
        ({**TEXT, "cache_control": {"type": "ephemeral"}, "annotations": []}, "h"),
        ({"type": "text", "text": "", "image_url": None}, ""),
    ],
)
def test_a_part_may_have_keys_that_say_nothing(part: dict, text: str) -> None:
    """A type that is null, as tables write it, and empty keys change no text."""
    turns = [{"role": "user", "content": [TEXT, part]}, ANSWER]
    content = read_row({"messages": turns}, "messages")
    assert isinstance(content, Conversation)
    assert content.messages[0]["content"] == "h" + text


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
@pytest.mark.parametrize("thoughts", [["so"], [{"type": "text", "text": "so"}], {"text": "so"}, 5])
def test_thoughts_that_are_no_text_are_faulty(key: str, thoughts: object) -> None:
    """Thoughts that no template would show are not dropped; empty ones say nothing."""
    turns = [USER, {**ANSWER, key: thoughts}]
    assert reason({"messages": turns}, "messages") == f"`{key}` is no text"
    for empty in ([], {}, None):
        content = read_row({"messages": [USER, {**ANSWER, key: empty}]}, "messages")
        assert content == read_row({"messages": [USER, ANSWER]}, "messages")


# -- faults

CALL = {"function": {"name": "f", "arguments": "{}"}}


@pytest.mark.parametrize(
    ("format", "row", "expected"),
    [
        ("messages", {}, "no `messages`"),
        ("messages", {"text": "a"}, "text row"),
        ("messages", {"messages": []}, "empty row"),
        ("messages", {"messages": None}, "empty row"),
        ("messages", {"messages": [USER]}, "no assistant turn"),
        (
            "messages",
            {"messages": [USER, {"role": "tool", "content": "x"}, ANSWER]},
            "tool turn that nothing called",
        ),
        (
            "messages",
            {"messages": [{"role": "tool", "content": "x"}, ANSWER]},
            "tool turn that nothing called",
        ),
        ("messages", {"messages": [USER, {"role": "assistant"}]}, "message without `content`"),
        ("messages", {"messages": [USER, {"role": ["assistant"], "content": "x"}]}, "unknown role"),
        (
            "messages",
            {"messages": [USER, {**ANSWER, "tool_calls": [{"id": 1}]}]},
            "tool call without a name",
        ),
        (
            "messages",
            {"messages": [USER, {**ANSWER, "tool_calls": ["f"]}]},
            "tool call without a name",
        ),
        (
            "messages",
            {
                "messages": [
                    USER,
                    {**ANSWER, "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]},
                ]
            },
            "broken tool call",
        ),
        ("messages", {"messages": [USER, ANSWER], "tools": "[{"}, "broken tool call"),
        ("messages", {"messages": [USER, ANSWER], "tools": [1]}, "`tools` is no list"),
        ("sharegpt", {"conversations": "a"}, "empty row"),
        ("sharegpt", {"conversations": ["a"]}, "turn without `from` and `value`"),
        ("sharegpt", {"conversations": [{"from": "narrator", "value": "a"}]}, "unknown speaker"),
        ("sharegpt", {"conversations": [{"value": "a"}]}, "unknown speaker"),
        ("sharegpt", {"conversations": [{"from": "human"}]}, "message without `content`"),
        (
            "sharegpt",
            {"conversations": [{"from": "function_call", "value": "f(x)"}]},
            "broken tool call",
        ),
        ("alpaca", {"instruction": "a", "output": ""}, "`output` is empty"),
        ("alpaca", {"instruction": " \n", "output": "a"}, "`instruction` is empty"),
        ("alpaca", {"instruction": "a", "output": "b", "input": 3}, "`input` is no text"),
        ("prompt_completion", {"prompt": "a", "completion": 3}, "`completion` is no text"),
        ("prompt_completion", {"prompt": [USER], "completion": "a"}, "`prompt` is no text"),
        ("prompt_completion", {"prompt": [], "completion": []}, "empty row"),
        (
            "prompt_completion",
            {"prompt": [USER, ANSWER], "completion": [USER]},
            "no assistant turn",
        ),
        ("text", {"text": None}, "`text` is empty"),
        ("text", {"text": ["a"]}, "`text` is no text"),
        ("text", {"title": "a"}, "no `text`"),
    ],
)
def test_each_fault_has_its_reason(format: str, row: dict, expected: str) -> None:
    """Every fault has the reason by which rows are counted; no other exception comes out."""
    assert reason(row, format) == expected


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        ({"name": "f", "parameters": {"x": 1}}, "tool call with `parameters`"),
        ({"function": {"name": "f", "args": {"x": 1}}}, "tool call with `args`"),
        ({"type": "tool_use", "id": "1", "name": "f", "input": {"x": 1}}, "tool call with `input`"),
        ({"name": "f", "arguments": {}, "result": "5"}, "tool call with `result`"),
        ({"name": "f", "arguments": ["x"]}, "broken tool call"),
        ({"name": "f", "arguments": [("x", 1)]}, "broken tool call"),
        ({"name": "f", "arguments": 5}, "broken tool call"),
    ],
)
def test_no_part_of_a_call_is_lost(call: dict, expected: str) -> None:
    """Arguments under another name, and those that are no object, are faults; so is a result."""
    turns = [USER, {"role": "assistant", "content": None, "tool_calls": [call]}]
    assert reason({"messages": turns}, "messages") == expected
    assert reason({"messages": [USER, {**turns[1], "tool_calls": call}]}, "messages") == expected
    if "function" not in call:
        said = [{"from": "human", "value": "a"}, {"from": "function_call", "value": call}]
        assert reason({"conversations": said}, "sharegpt") == expected


def test_a_call_may_have_keys_without_a_word() -> None:
    """Ids, numbers and keys that tables fill in are no fault of a call."""
    call = {"id": "1", "index": 0, "type": "function", "function": {"name": "f", "arguments": "{}"}}
    filled = {**call, "parameters": None, "input": {}, "function": {**call["function"], "args": ""}}
    for calls in ([call], [filled]):
        turns = [USER, {"role": "assistant", "content": "", "tool_calls": calls}]
        content = read_row({"messages": turns}, "messages")
        assert isinstance(content, Conversation)
        assert content.messages[1]["tool_calls"][0]["function"] == {"name": "f", "arguments": {}}


WRONG = [None, 3, 1.5, True, "", "x", [], {}, [None], [3], [[]], [{}], {"a": 1}, [{"role": {}}]]


@pytest.mark.parametrize("value", WRONG)
@pytest.mark.parametrize("format", list(COLUMNS))
def test_any_value_is_read_or_faulty(format: str, value: object) -> None:
    """Any value in any column that a format knows is read, or raises RowFault and nothing else."""
    good = {
        "messages": [USER, ANSWER],
        "conversations": [USER, ANSWER],
        "prompt": "a",
        "completion": "b",
        "instruction": "a",
        "output": "b",
        "text": "a",
    }
    rows = [{**good, column: value} for column in (*good, "input", "system", "tools")]
    for name in ("role", "content", "tool_calls", "from", "value"):
        turns = [USER, {"role": "assistant", "content": "b", name: value}]
        rows += [{**good, "messages": turns}, {**good, "conversations": turns}]
    for row in rows:
        with contextlib.suppress(RowFault):
            read_row(row, format)
