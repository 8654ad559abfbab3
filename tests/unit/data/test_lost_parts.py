"""Parts of rows that a chat template does not show: found by marks, refused or counted."""

import json
from typing import Any

import pytest

from qlora_dist.data.messages import Conversation
from qlora_dist.data.placeholders import probe_of
from qlora_dist.data.report import Report
from qlora_dist.inspection.facts import SourceFacts
from qlora_dist.inspection.page import source_lines
from tests.support.rows import encode, refusal, targets, with_template
from tests.unit.data.test_chat_template import tokenizer_of

# A template that knows nothing but roles and contents.
PLAIN = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' + (m['content'] or '') + '<end>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
# A template that shows one call, and then not the words beside it.
ONE_CALL = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' }}{% if m.tool_calls %}"
    "{{ m.tool_calls[0].function | tojson }}{% else %}{{ m['content'] }}{% endif %}{{ '<end>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
NAMES_ONLY = ONE_CALL.replace("function | tojson", "function.name")


def called(*names: str, content: str = "", question: str = "well?") -> dict[str, Any]:
    """A row in which the assistant calls functions by name, with an argument each."""
    calls = [{"function": {"name": name, "arguments": {"at": f"the {name}"}}} for name in names]
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": content, "tool_calls": calls},
            {"role": "tool", "content": "done"},
            {"role": "assistant", "content": "so it is"},
        ]
    }


@pytest.mark.parametrize(
    ("template", "row", "what"),
    [
        (PLAIN, called("weather"), "the tool call of message 2"),
        (PLAIN, called("weather", question="use the weather tool"), "the tool call of message 2"),
        (PLAIN, called("so"), "the tool call of message 2"),
        (ONE_CALL, called("one", "two"), "a tool call, or its arguments, of message 2"),
        (NAMES_ONLY, called("one"), "a tool call, or its arguments, of message 2"),
        (ONE_CALL, called("one", content="let me see"), "text of message 2 (assistant)"),
        (ONE_CALL, {**called("one"), "tools": [{"name": "one"}]}, "leaves out the tool 'one'"),
    ],
)
def test_an_answer_without_a_part_is_refused(
    tokenizer, template: str, row: dict[str, Any], what: str
) -> None:
    """A name that stands elsewhere in the text does not hide the loss; the message names a way."""
    message = refusal([row], with_template(tokenizer, template))
    assert what in message
    assert "data.allow_lost: [" in message


@pytest.mark.parametrize(
    ("kind", "template", "row"),
    [
        ("tool_calls", PLAIN, called("weather")),
        ("text", ONE_CALL, called("one", content="let me see")),
        ("tools", ONE_CALL, {**called("one"), "tools": [{"name": "one"}]}),
    ],
)
def test_allowed_losses_are_counted(
    tokenizer, kind: str, template: str, row: dict[str, Any]
) -> None:
    """With `data.allow_lost` the rows train, and the account has their number and the first."""
    report = encode([row, row], with_template(tokenizer, template), allow_lost=(kind,)).report
    number, first = report.lost[kind]
    assert number == 2
    assert first.endswith("row 1")
    assert "the chat template leaves out" in report.sentence(64)
    lines = source_lines(SourceFacts("data.train", 1.0, 1.0, report), 64, False)
    assert lines[-1] in report.sentence(64), "the page and the log say it alike"


THOUGHT = [
    {"role": "user", "content": "two and two?"},
    {"role": "assistant", "content": "four", "reasoning_content": "sums"},
]


def test_thoughts_that_a_template_does_not_know(tokenizer) -> None:
    """A template without a word of thoughts is refused rows with them; one that cuts them is not.

    The second cuts on purpose, as those of reasoning models do; the account says so.
    """
    assert "the thoughts of message 2" in refusal(
        [{"messages": THOUGHT}], with_template(tokenizer, PLAIN)
    )
    cutting = with_template(tokenizer, PLAIN + "{# <think> is cut #}")
    assert encode([{"messages": THOUGHT}], cutting).report.lost["thoughts"][0] == 1


def test_rows_that_lose_nothing_are_silent(tokenizer) -> None:
    """No loss is counted, and the account has no word of it."""
    both = ONE_CALL.replace("{% else %}{{ m['content'] }}{% endif %}", "{% endif %}{{ m.content }}")
    report = encode([called("one", content="let me see")], with_template(tokenizer, both)).report
    assert report.lost == {}
    assert "leaves out" not in report.sentence(64)


def test_each_part_has_a_mark() -> None:
    """Texts, thoughts, names, arguments and tools; the parts know their message."""
    row = called("one", "two", content="see")
    thoughtful = [*row["messages"], {"role": "assistant", "content": "<think>so</think>yes"}]
    tools = [{"type": "function", "function": {"name": "one"}}, {"name": "two"}]
    probe, parts = probe_of(Conversation(thoughtful, tools))
    text = json.dumps([probe.messages, probe.tools])
    assert all(mark in text for mark in parts)
    assert sorted(set(parts.values())) == [
        ("text", 1),
        ("text", 2),
        ("text", 3),
        ("text", 4),
        ("text", 5),
        ("thoughts", 5),
        ("tool_calls", 2),
        ("tools", 0),
    ]


MUTED = [
    {"role": "user", "content": "first?"},
    {"role": "assistant", "content": "wrong"},
    {"role": "user", "content": "again?"},
    {"role": "assistant", "content": "right"},
]


@pytest.mark.parametrize(
    "mark",
    [
        {"weight": 0},
        {"train": False},
        {"weight": 0.0, "train": None},
        {"loss": False},
        {"loss": 0.0},
        {"training": False},
        {"trainable": False},
        {"loss_weight": 0},
        {"loss_mask": 0},
        {"masked": True},
        {"masked": 1, "loss": None},
    ],
)
@pytest.mark.parametrize("form", ["messages", "sharegpt"])
def test_a_turn_that_is_not_to_be_learned_is_context(tokenizer, mark: dict, form: str) -> None:
    """Its words are in the row and none of them counts; other marks change nothing."""
    turns = [{**turn} for turn in MUTED]
    turns[1] |= mark
    turns[3] |= {"weight": 1, "train": True, "loss": 1.0, "loss_mask": 1, "masked": False}
    row: dict[str, Any] = {"messages": turns}
    if form == "sharegpt":
        names = {"user": "human", "assistant": "gpt"}
        row = {
            "conversations": [
                {"from": names[turn.pop("role")], "value": turn.pop("content"), **turn}
                for turn in turns
            ]
        }
    sample = encode([row], with_template(tokenizer, PLAIN), form).samples[0]
    assert targets(sample, tokenizer) == "right<end>"
    assert "wrong" in tokenizer.decode(sample.input_ids)


@pytest.mark.parametrize(
    ("mark", "what"),
    [
        ({"weight": 0.5}, "has weight: 0.5, but a turn is learned (1, true) or not"),
        ({"train": "no"}, "has train: 'no'"),
        ({"loss": "last"}, "has loss: 'last'"),
        ({"mask": True}, "has mask: True, which may tell what of the turn is learned"),
        ({"mask": 0}, "has mask: 0, which may tell what of the turn is learned"),
        ({"train_detail": [{"begin_offset": 0}]}, "Write weight: 0 for a turn that is not to be"),
    ],
)
def test_other_marks_are_refused(tokenizer, mark: dict, what: str) -> None:
    """A weight that cannot be trained is not rounded in silence."""
    turns = [MUTED[0], {**MUTED[1], **mark}]
    assert what in refusal([{"messages": turns}], with_template(tokenizer, PLAIN))


def test_a_row_without_anything_to_learn_is_refused(tokenizer) -> None:
    """All turns muted, or every token asked for."""
    muted = [MUTED[0], {**MUTED[1], "weight": 0}]
    plain = with_template(tokenizer, PLAIN)
    assert "every assistant turn is marked" in refusal([{"messages": muted}], plain)
    row = {"messages": [*muted, *MUTED[2:]]}
    assert "data.train_on: all" in refusal([row], plain, train_on="all")


def test_unknown_keys_are_named_once(tokenizer) -> None:
    """A key with a value that nothing reads is in the account, unless the template knows it."""
    turns = [MUTED[0], {**MUTED[1], "score": 3, "empty": None}]
    report = encode([{"messages": turns}] * 3, with_template(tokenizer, PLAIN)).report
    assert list(report.unread) == ["score"]
    assert report.unread["score"][0] == 3
    assert "nothing reads the key `score` of messages (3 rows, first: " in report.sentence(64)
    knowing = with_template(tokenizer, PLAIN.replace("+ '<end>'", "+ (m.score or '')|string"))
    assert encode([{"messages": turns}], knowing).report.unread == {}


@pytest.mark.parametrize(
    ("family", "role", "key", "value"),
    [
        ("qwen3", "assistant", "think", "so"),
        ("qwen3", "assistant", "end", "so"),
        ("qwen2.5", "system", "tools", [{"name": "f"}]),
        ("qwen2.5", "user", "name", "Ann"),
        ("llama3.1", "assistant", "ipython", True),
        ("mistral-v0.3", "user", "id", 5),
        ("phi4", "assistant", "analysis", "so"),
    ],
)
def test_a_word_of_the_template_reads_no_key(family: str, role: str, key: str, value: Any) -> None:
    """A key is not read because its name is somewhere in the template; it must change the text."""
    turns = [{"role": "user", "content": "well?"}, {"role": "assistant", "content": "yes"}]
    if role == "system":
        turns.insert(0, {"role": "system", "content": "be brief"})
    other = [{**turn, key: value} if turn["role"] == role else turn for turn in turns]
    tokenizer = tokenizer_of(family)
    settings = {"max_seq_len": 4096}
    plain, with_key = (encode([{"messages": t}], tokenizer, **settings) for t in (turns, other))
    assert plain.samples == with_key.samples
    assert plain.report.unread == {}
    assert with_key.report.unread == {key: (1, "rows.jsonl, row 1")}


@pytest.mark.parametrize("value", [None, "", [], {}])
def test_keys_that_say_nothing_are_not_named(tokenizer, value: Any) -> None:
    """Empty values, as in dumps of answers of a server, are no loss."""
    turns = [MUTED[0], {**MUTED[1], "annotations": value, "name": value}]
    assert encode([{"messages": turns}], with_template(tokenizer, PLAIN)).report.unread == {}


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        ("so it is</think>yes", 1),
        ("so</think>yes<think>no", 1),
        ("<think>so it is</think>yes", 0),
        ("<think>never ends", 0),
        ("yes", 0),
    ],
)
def test_thoughts_that_end_without_a_beginning_are_pointed_out(
    tokenizer, answer: str, number: int
) -> None:
    """Rows whose answer has only the closing tag are counted, with the first and the remedy."""
    rows = [{"messages": MUTED}, *[{"messages": [MUTED[0], {**MUTED[1], "content": answer}]}] * 2]
    report = encode(rows, with_template(tokenizer, PLAIN + "{# <think> #}")).report
    told = [line for line in report.sentence(64).splitlines() if "</think>" in line]
    assert len(told) == number
    assert not told or "(2 rows, first: rows.jsonl, row 2, message 2): write the" in told[0]


def test_a_question_may_speak_of_tags(tokenizer) -> None:
    """A closing tag in the user's words is no fault of the answer."""
    turns = [{"role": "user", "content": "what is </think>?"}, MUTED[1]]
    assert encode([{"messages": turns}], with_template(tokenizer, PLAIN)).report.suspect == {}


@pytest.mark.parametrize(
    ("role", "text", "is_told"),
    [
        ("user", "end it with <|im_end|> now", True),
        ("system", "<|im_start|>", True),
        ("tool", "a <|im_|> and <|im_end|>", True),
        ("assistant", "as in <|im_end|>", True),
        ("assistant", "as in <|endoftext|>", False),
        ("user", "a < b, <|im_ended> and |im_end|>", False),
    ],
)
def test_special_tokens_in_text_are_pointed_out(
    tokenizer, role: str, text: str, is_told: bool
) -> None:
    """A special token in what is said is counted, with its first place.

    Of the assistant's, those count that start or end turns or texts: others may be for it to write.
    """
    turns = {
        "user": [{"role": "user", "content": text}, MUTED[1]],
        "system": [{"role": "system", "content": text}, *MUTED[:2]],
        "tool": [*MUTED[:2], {"role": "tool", "content": text}, MUTED[3]],
        "assistant": [MUTED[0], {"role": "assistant", "content": text}],
    }[role]
    number = next(n for n, turn in enumerate(turns, start=1) if turn["role"] == role)
    rows = [{"messages": MUTED}, {"messages": turns}, {"messages": turns}]
    report = encode(rows, with_template(tokenizer, PLAIN)).report
    told = [line for line in report.sentence(64).splitlines() if "has a special token" in line]
    assert len(told) == is_told
    token = "<|im_start|>" if role == "system" else "<|im_end|>"
    place = f"(2 rows, first: rows.jsonl, row 2, message {number}: {token})"
    assert not told or f"{place}: remove it from the text, unless it is meant" in told[0]
    lines = source_lines(SourceFacts("data.train", 1.0, 1.0, report), 64, False)
    assert not told or told[0].strip() in lines, "the page says it alike"


@pytest.mark.parametrize(
    ("family", "answer", "token"),
    [
        ("llama2", {"content": "yes </s>"}, "</s>"),
        ("mistral-v0.3", {"content": "yes</s>"}, "</s>"),
        ("qwen2.5", {"content": "yes<|im_end|>\n<|im_start|>user\nno"}, "<|im_end|>"),
        ("llama3.1", {"content": "yes<|eot_id|>"}, "<|eot_id|>"),
        ("gemma2", {"content": "<bos>yes"}, "<bos>"),
        ("qwen3", {"content": "yes", "reasoning_content": "so<|im_end|>"}, "<|im_end|>"),
        (
            "qwen2.5",
            {"content": "", "tool_calls": [{"name": "f", "arguments": {"a": "<|im_end|>"}}]},
            "<|im_end|>",
        ),
    ],
)
def test_answers_that_end_twice_are_pointed_out(family: str, answer: dict, token: str) -> None:
    """Answers that were saved with the template's own tokens are learned with both, and said."""
    turns = [{"role": "user", "content": "well?"}, {"role": "assistant", **answer}]
    report = encode([{"messages": turns}], tokenizer_of(family), max_seq_len=4096).report
    assert report.suspect == {"learned token": (1, f"rows.jsonl, row 1, message 2: {token}")}


@pytest.mark.parametrize(
    ("answer", "is_told"),
    [
        ({"content": ""}, True),
        ({"content": " \n"}, True),
        ({"content": []}, True),
        ({"content": "", "weight": 0}, False),
        ({"content": "0"}, False),
        ({"content": "", "reasoning_content": "so it is"}, False),
        ({"content": None, "tool_calls": [{"name": "f"}]}, False),
    ],
)
def test_empty_answers_are_pointed_out(answer: dict, is_told: bool) -> None:
    """Turns to learn without words, thoughts and calls are counted, with the first of them."""
    turns = [*MUTED[:2], MUTED[2], {"role": "assistant", **answer}]
    rows = [{"messages": MUTED}, {"messages": turns}]
    report = encode(rows, tokenizer_of("qwen3"), max_seq_len=4096).report
    place = (1, "rows.jsonl, row 2, message 4")
    assert report.suspect == ({"empty answer": place} if is_told else {})


@pytest.mark.parametrize(
    ("row", "unread"),
    [
        ({"messages": MUTED, "system": "be brief", "id": 7}, ["id", "system"]),
        ({"prompt": "a", "completion": "b", "system": "be brief"}, ["system"]),
        ({"instruction": "a", "output": "b", "context": "c", "input": ""}, ["context"]),
        ({"messages": MUTED, "content": "x", "weight": 0.0, "tools": []}, ["content", "weight"]),
        ({"text": "a", "label": None, "notes": "", "tags": [], "meta": {}}, []),
        ({"conversations": MUTED, "system": "be brief"}, []),
    ],
)
def test_columns_that_no_format_reads_are_named(tokenizer, row: dict, unread: list[str]) -> None:
    """One line of the account names the columns with a value that are not read, and a remedy."""
    plain = with_template(tokenizer, PLAIN)
    report = encode([{**row, "more": None}, row], plain).report
    assert sorted(report.unread_columns) == unread
    told = [line for line in report.sentence(64).splitlines() if "does not read" in line]
    assert len(told) == bool(unread)
    assert all(f"`{column}`" in told[0] for column in unread)
    assert all(report.unread_columns[column][0] == 2 for column in unread)


def test_columns_that_the_user_names_are_read(tokenizer) -> None:
    """A column under a name of the user is not named as one that is not read."""
    row = {"q": "a", "a": "b", "c": "d"}
    report = encode([row], tokenizer, columns={"prompt": "q", "completion": "a"}).report
    assert list(report.unread_columns) == ["c"]


@pytest.mark.parametrize(
    "row", [{"messages": []}, {"messages": ["a"]}, {"messages": MUTED, "tools": [1]}]
)
def test_a_refused_source_ends_with_a_remedy(tokenizer, row: dict) -> None:
    """Whatever the fault of the first row is, the message ends with what to do."""
    message = refusal([row], with_template(tokenizer, PLAIN))
    assert message.endswith(
        "Mend or remove these rows, or raise data.max_bad_fraction to train without them."
    )


def test_an_account_from_the_cache_is_the_same(tokenizer) -> None:
    """Counts of all kinds survive as JSON."""
    turns = [
        {"role": "developer", "content": "<|im_end|>"},
        {"role": "user", "content": "well?", "mood": "odd"},
        {"role": "assistant", "content": "</think>", "reasoning_content": "so"},
    ]
    knowing = with_template(tokenizer, PLAIN.replace("<end>", "{# think #}<end>"))
    odd = knowing.chat_template.replace("in messages", "in messages if m.role != 'developer'")
    row = {"messages": turns, "id": 1}
    report = encode([row], with_template(knowing, odd)).report
    report.call_form = "calls as text"
    assert all([report.lost, report.unread, report.roles, report.suspect, report.unread_columns])
    assert Report.from_json(json.loads(json.dumps(report.to_json()))) == report


def test_every_remark_ends_with_a_remedy() -> None:
    """Each line of the account says after its last colon what to do."""
    where = (2, "a.jsonl, row 1")
    kinds = dict.fromkeys(("text", "thoughts", "tool_calls", "tools"), where)
    suspect = dict.fromkeys(
        ("closing tag", "empty answer", "special token", "learned token"), where
    )
    report = Report("a.jsonl", "messages", lost=kinds, unread={"mood": where}, suspect=suspect)
    report.unread_columns = {"id": where}
    report.roles, report.call_form = {"developer as system": where}, "text"
    remedies = (
        "if they hold words",
        "choose",
        "remove",
        "rename",
        "write",
        "the rows' calls are written so",
    )
    assert len(report.remarks()) == 12
    for remark in report.remarks():
        assert remark.rpartition(": ")[2].startswith(remedies), remark


GLM = (
    "{{ '<s>' }}{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def test_the_next_roles_token_ends_an_answer(tokenizer) -> None:
    """The next message's token is learned if a template ends turns with it.

    After the last answer comes the tokenizer's end token.
    """
    glm = with_template(tokenizer, GLM)
    glm.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>"]})
    encoded = encode([{"messages": MUTED}], glm)
    assert targets(encoded.samples[0], glm) == f"wrong<|user|>right{glm.eos_token}"
    assert not encoded.report.is_open_ended


def test_a_date_belongs_to_the_run(tokenizer) -> None:
    """A template is told `data.template_date`, in any literal format; without it, the present."""
    dated = with_template(
        tokenizer, "{{ strftime_now('%d %b %Y') ~ strftime_now( \"%H\" ) }}" + PLAIN
    )
    rows = [{"messages": MUTED}]
    told = encode(rows, dated, template_date="2024-02-29T07:05:00").samples[0]
    assert dated.decode(told.input_ids).startswith("29 Feb 202407<user>")
    now = encode(rows, dated).samples[0]
    assert not dated.decode(now.input_ids).startswith("29 Feb 2024")
