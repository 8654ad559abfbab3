"""Files with other names of columns and roles train as files with the formats' names do."""

import json
from pathlib import Path

import pytest

from qlora_dist.config.schema import DataConfig, Source
from qlora_dist.data.dataset import RunData, load_data
from qlora_dist.data.report import Report
from qlora_dist.errors import DataError
from qlora_dist.inspection.facts import SourceFacts
from qlora_dist.inspection.page import source_lines
from tests.support.rows import encode, targets

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
TURNS = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]


def written(file: Path, *rows: dict) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(file)


# -- columns


@pytest.mark.parametrize(
    ("columns", "row", "usual"),
    [
        (
            {"prompt": "question", "completion": "answer"},
            {"question": "a", "answer": "b", "id": 3},
            {"prompt": "a", "completion": "b"},
        ),
        (
            {"completion": "answer"},
            {"prompt": "a", "answer": "b"},
            {"prompt": "a", "completion": "b"},
        ),
        ({"text": "body"}, {"body": "the fox"}, {"text": "the fox"}),
        ({"text": "the body"}, {"the body": "the fox", "text": "raw"}, {"text": "the fox"}),
        ({"text": "body"}, {"body": "the fox", "messages": CHAT}, {"text": "the fox"}),
        ({"messages": "dialog"}, {"dialog": CHAT}, {"messages": CHAT}),
        ({"messages": "dialog"}, {"dialog": json.dumps(CHAT)}, {"messages": CHAT}),
        (
            {"messages": "dialog", "role": "speaker", "content": "said"},
            {"dialog": [{"speaker": t["role"], "said": t["content"]} for t in CHAT]},
            {"messages": CHAT},
        ),
        (
            {"content": "text"},
            {"messages": [{"role": t["role"], "text": t["content"]} for t in CHAT]},
            {"messages": CHAT},
        ),
        ({"conversations": "dialog"}, {"dialog": TURNS}, {"conversations": TURNS}),
        (
            {"role": "from", "content": "value"},
            {"messages": [{"from": t["role"], "value": t["content"]} for t in CHAT]},
            {"messages": CHAT},
        ),
        (
            {"conversations": "dialog", "content": "text"},
            {"dialog": [{"from": t["from"], "text": t["value"], "value": 0.5} for t in TURNS]},
            {"conversations": TURNS},
        ),
        (
            {"system": "rules"},
            {"conversations": TURNS, "rules": "be kind", "system": "x"},
            {"conversations": TURNS, "system": "be kind"},
        ),
        (
            {"instruction": "task", "input": "context", "output": "solution", "system": "rules"},
            {"task": "add", "context": "1 2", "solution": "3", "rules": "be kind"},
            {"instruction": "add", "input": "1 2", "output": "3", "system": "be kind"},
        ),
        (
            {"history": "earlier"},
            {"instruction": "add", "output": "3", "earlier": [["a", "b"]]},
            {"instruction": "add", "output": "3", "history": [["a", "b"]]},
        ),
        (
            {"prompt": "completion", "completion": "prompt"},  # the question to an answer
            {"prompt": "a", "completion": "b"},
            {"prompt": "b", "completion": "a"},
        ),
        (
            {"prompt": "question", "completion": "answer"},  # and not the messages beside them
            {"messages": CHAT[::-1], "question": "a", "answer": "b"},
            {"prompt": "a", "completion": "b"},
        ),
        (
            {"prompt": "question", "completion": "answer"},
            {"question": CHAT[:1], "answer": CHAT[1:]},
            {"prompt": CHAT[:1], "completion": CHAT[1:]},
        ),
    ],
)
def test_other_columns_train_the_same(tokenizer, columns: dict, row: dict, usual: dict) -> None:
    """A row with the file's names gives the sample of the row with the format's names."""
    renamed, expected = encode([row], tokenizer, columns=columns), encode([usual], tokenizer)
    assert renamed.samples == expected.samples
    assert renamed.report.format == expected.report.format
    assert renamed.report.columns == columns
    assert renamed.report.unused_columns == {}


def test_a_text_that_begins_with_a_bracket_stays_text(tokenizer) -> None:
    """A prompt under a name of the user is text, although it looks like a list."""
    columns, roles = {"prompt": "q", "completion": "a"}, {"user": ("human",)}
    renamed = encode([{"q": "[1, 2", "a": "3"}], tokenizer, columns=columns, roles=roles)
    assert renamed.samples == encode([{"prompt": "[1, 2", "completion": "3"}], tokenizer).samples


def test_the_names_that_were_used_are_said(tokenizer) -> None:
    """The log's sentence has each name that was used, and each column that was hidden by one."""
    row = {"question": "a", "answer": "b", "prompt": "raw"}
    columns = {"prompt": "question", "completion": "answer"}
    report = encode([row], tokenizer, columns=columns).report
    sentence = report.sentence(64)
    assert "columns read: prompt from `question`, completion from `answer`" in sentence
    assert "`prompt` is not read: data.columns takes prompt from `question`" in sentence
    assert report.names()[0] in sentence
    swapped = encode(
        [{"prompt": "a", "completion": "b"}],
        tokenizer,
        columns={"prompt": "completion", "completion": "prompt"},
    )
    assert "not read" not in swapped.report.sentence(64)


def test_a_hidden_key_of_messages_is_said(tokenizer) -> None:
    """A `value` of ShareGPT that gives way to another key is named."""
    turns = [{"from": t["from"], "text": t["value"], "value": "score"} for t in TURNS]
    report = encode([{"conversations": turns}], tokenizer, columns={"content": "text"}).report
    assert "`value` is not read: data.columns takes content from `text`" in report.names()


@pytest.mark.parametrize(
    ("columns", "row", "said"),
    [
        (
            {"prompt": "quesiton", "completion": "answer"},
            {"question": "a", "answer": "b"},
            ("data.columns.prompt is 'quesiton', which is not there", "`question`, `answer`"),
        ),
        ({"text": "boddy"}, {"body": "a"}, ("data.columns.text is 'boddy'", "`body`")),
        ({"messages": "dialogue"}, {"dialog": CHAT}, ("data.columns.messages", "`dialog`")),
    ],
)
def test_a_column_that_is_missing_is_refused(tokenizer, columns: dict, row: dict, said) -> None:
    """The message has the entry, the file's columns and the remedy."""
    with pytest.raises(DataError) as caught:
        encode([row], tokenizer, columns=columns)
    for part in (
        *said,
        "rows.jsonl, row 1 has the columns",
        "Rename the columns, or name them in data.columns, such as {prompt: ",
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("columns", "row", "said"),
    [
        (
            {"prompt": "quesiton"},
            {"prompt": "a", "completion": "b", "question": "c"},
            ("did you mean `question`?", "`completion`"),
        ),
        ({"system": "rules"}, {"instruction": "a", "output": "b"}, ("`instruction`, `output`",)),
        (
            {"system": "rules"},
            {"messages": CHAT, "rules": "x"},
            ("format messages reads no `system`",),
        ),
        ({"role": "speaker"}, {"messages": CHAT}, ("keys of its messages are `role`, `content`",)),
    ],
)
def test_an_entry_that_nothing_uses_is_refused(
    tmp_path: Path, tokenizer, columns: dict, row: dict, said: tuple[str, ...]
) -> None:
    """An entry of `data.columns` that would be ignored is an error, with columns and remedy."""
    path = written(tmp_path / "t.jsonl", row)
    with pytest.raises(DataError) as caught:
        load_data(DataConfig(train=path, columns=columns), tokenizer, 0)
    [(name, column)] = columns.items()
    message = str(caught.value)
    assert message.startswith(f"data.columns.{name} is {column!r}, but nothing is read")
    assert message.endswith("Name a column of the file, or remove the entry.")
    assert path in message
    for part in said:
        assert part in message


def test_each_file_of_a_mixture_uses_its_entries(tmp_path: Path, tokenizer) -> None:
    """An entry may be for one of several files; the others say that they do not use it."""
    columns = {"prompt": "question", "completion": "answer", "text": "body"}
    files = [
        written(tmp_path / "a.jsonl", {"question": "a", "answer": "b"}),
        written(tmp_path / "b.jsonl", {"prompt": "a", "completion": "b"}),
        written(tmp_path / "c.jsonl", {"body": "the fox"}),
    ]
    sources = tuple(map(Source, files))
    data = load_data(DataConfig(train=sources, columns=columns, packing=False), tokenizer, 0)
    assert data.train[0] == data.train[1]
    assert [set(report.columns) for report in data.reports] == [
        {"prompt", "completion"},
        set(),
        {"text"},
    ]
    assert (
        "data.columns.prompt is not used here: the columns are `prompt`, `completion`"
        in (data.notes[1])
    )
    sources = sources[:2]
    with pytest.raises(DataError, match=r"data\.columns\.text is 'body'.*a\.jsonl.*b\.jsonl"):
        load_data(DataConfig(train=sources, columns=columns), tokenizer, 0)


def test_a_faulty_row_is_told_in_the_names_of_the_file(tokenizer) -> None:
    """A fault names the file's column beside the format's."""
    rows = [{"question": "a", "answer": "b"}, {"question": "a", "answer": 3}, {"question": "a"}]
    columns = {"prompt": "question", "completion": "answer"}
    report = encode(rows, tokenizer, columns=columns, max_bad_fraction=0.9).report
    assert report.faulty.num_rows == 2
    assert report.faulty.first_message.endswith(
        "must be text that is not empty. data.columns reads `completion` from `answer`."
    )


def test_a_missing_key_of_messages_is_told(tokenizer) -> None:
    """A fault for want of a key has the entry of `data.columns` that is misspelled."""
    turns = [{"role": t["role"], "utterance": t["content"]} for t in CHAT]
    with pytest.raises(DataError) as caught:
        encode([{"messages": turns}], tokenizer, columns={"content": "utterrance"})
    assert (
        "data.columns.content is 'utterrance', but the keys of its messages are `role`, "
        "`utterance`; did you mean `utterance`?"
    ) in str(caught.value)


WRONG = [None, 3, True, "", "x", "[", "[{", [], {}, [None], [3], [[]], [{}], [{"said": []}]]


@pytest.mark.parametrize("value", WRONG, ids=str)
@pytest.mark.parametrize("column", ["dialog", "prompt", "completion", "text"])
def test_any_value_is_read_or_faulty(tokenizer, column: str, value: object) -> None:
    """Any value in a column with another name is read, or makes its row faulty and nothing else."""
    row = {"dialog": CHAT, "prompt": "a", "completion": "b", "text": "c"}
    names = {
        "columns": {"messages": "dialog", "role": "who", "content": "said"},
        "roles": {"user": ("human",)},
        "max_bad_fraction": 0.9,
    }
    turns = [{"who": t["role"], "said": t["content"]} for t in CHAT]
    rows = [{**row, "dialog": turns}, {**row, "dialog": turns, column: value}]
    turn = {**turns[0], "who": value, "from": value}
    rows.append({**row, "dialog": [turn, turns[1]]})
    report = encode(rows, tokenizer, **names).report
    assert report.num_rows == 3
    assert report.num_samples + report.faulty.num_rows == 3
    assert report.faulty.num_rows == 1 + (column == "dialog")


def test_the_page_says_what_the_log_says(tmp_path: Path, tokenizer) -> None:
    """`qlora-dist data` shows the names that were used, with the turns, and the files left out."""
    turns = [{"role": "user", "text": "hi"}, {"role": "bot", "text": "hello"}]
    (tmp_path / "d").mkdir()
    for name in ("train.jsonl", "test.jsonl"):
        written(tmp_path / "d" / name, {"dialog": turns})
    config = DataConfig(
        train=str(tmp_path / "d"),
        columns={"messages": "dialog", "content": "text"},
        roles={"assistant": ("bot",)},
    )
    [report] = load_data(config, tokenizer, 0).reports
    lines = source_lines(SourceFacts("data.train", 1.0, 1.0, report), 64, False)
    assert lines[-3:-1] == [
        "columns read: messages from `dialog`, content from `text`",
        "roles read: assistant from 'bot' (1 turns)",
    ]
    assert "left out test.jsonl" in lines[-1]
    assert Report.from_json(json.loads(json.dumps(report.to_json()))) == report


# -- roles


@pytest.mark.parametrize(
    ("roles", "speakers"),
    [
        ({"assistant": ("bot",), "user": ("customer",)}, ("customer", "bot")),
        ({"assistant": ("bot", "GPT-4"), "user": ("human2", "Kundin")}, ("Kundin", "GPT-4")),
        ({"assistant": ("User",)}, ("user", "User")),  # upper and lower case differ
        ({"assistant": ("1",), "user": ("0",)}, (0, 1)),
        ({"assistant": ("user",), "user": ("assistant",)}, ("assistant", "user")),
    ],
)
@pytest.mark.parametrize("layout", ["messages", "conversations", "prompt_completion", "json"])
def test_other_roles_train_the_same(tokenizer, roles: dict, speakers: tuple, layout: str) -> None:
    """A turn under a name of the file is learned as one under the role that it stands for."""
    asks, answers = speakers
    turns = [{"role": asks, "content": "hi"}, {"role": answers, "content": "hello"}]
    row = {
        "messages": {"messages": turns},
        "json": {"messages": json.dumps(turns)},
        "conversations": {
            "conversations": [{"from": t["role"], "value": t["content"]} for t in turns]
        },
        "prompt_completion": {"prompt": turns[:1], "completion": turns[1:]},
    }[layout]
    found = encode([row], tokenizer, roles=roles)
    assert found.samples == encode([{"messages": CHAT}], tokenizer).samples
    assert targets(found.samples[0], tokenizer) == "hello<|im_end|>"
    counts = {name: count for name, (_, count) in found.report.named_roles.items()}
    assert {name for name, count in counts.items() if count} == {*map(str, speakers)} & {*counts}


def test_a_call_may_have_another_name(tokenizer) -> None:
    """`function_call` and `tool` are roles to map to as well."""
    turns = [
        {"from": "human", "value": "hi"},
        {"from": "acts", "value": '{"name": "f", "arguments": {}}'},
        {"from": "sees", "value": "3"},
        {"from": "gpt", "value": "hello"},
    ]
    usual = [dict(turn) for turn in turns]
    usual[1]["from"], usual[2]["from"] = "function_call", "observation"
    roles = {"function_call": ("acts",), "observation": ("sees",)}
    allow = {"allow_lost": ("tool_calls",)}
    found = encode([{"conversations": turns}], tokenizer, roles=roles, **allow)
    assert found.samples == encode([{"conversations": usual}], tokenizer, **allow).samples


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [CHAT[0], {"role": "Bot", "content": "x"}]},
        {"conversations": [TURNS[0], {"from": "Bot", "value": "x"}]},
    ],
)
def test_an_unknown_role_has_a_remedy(tokenizer, row: dict) -> None:
    """The message tells to map the name, which is compared with upper and lower case."""
    with pytest.raises(DataError, match=r"'Bot'.*in data\.roles, such as \{assistant: bot\}\."):
        encode([row], tokenizer, roles={"assistant": ("bot",)})


def loaded(path: str, tokenizer, **roles: tuple[str, ...]) -> RunData:
    return load_data(DataConfig(train=path, roles=roles), tokenizer, 0)


def test_roles_are_said_with_their_turns(tmp_path: Path, tokenizer) -> None:
    """The log counts the turns under each name, and says which name no turn has."""
    turns = [{"role": "user", "content": "hi"}, {"role": "bot", "content": "hello"}]
    path = written(tmp_path / "t.jsonl", *[{"messages": turns * 2}] * 3)
    for _ in range(2):  # made, and found in the cache
        notes = loaded(path, tokenizer, assistant=("bot", "GPT4")).notes
        assert "roles read: assistant from 'bot' (6 turns)" in notes[0]
        assert any("no turn is from 'GPT4'" in note for note in notes)
    assert not any("no turn" in note for note in loaded(path, tokenizer, assistant=("bot",)).notes)
