"""Messages in the form that a chat template takes: tool calls, roles, and tokens that end turns."""

import json
from typing import Any

import pytest

from qlora_dist.data.chat_template import ChatTemplate, end_of_turn_id
from qlora_dist.data.messages import Conversation
from tests.support.rows import encode, refusal, targets, with_template
from tests.unit.data.test_chat_template import FAMILIES, TOOLS, chat, runs, tokenizer_of

END = "<|im_end|>"


def template(shown: str) -> str:
    """Write a template that shows each message as an expression says."""
    return (
        "{% for m in messages %}{{ '<' + m.role + '>' }}" + shown + "{{ '<|im_end|>' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
    )


# -- tool calls


def calls(arguments: str) -> str:
    """Write the part of a template that shows calls, with their arguments as given."""
    shown = "{{ call.function.name }}" + arguments
    return "{% for call in m.tool_calls or [] %}" + shown + "{% endfor %}"


AS_OBJECT = template("{{ m.content }}" + calls("{{ call.function.arguments | tojson }}"))
AS_TEXT = template("{{ m.content }}" + calls("{{ ' ' + call.function.arguments }}"))
EITHER = template(
    "{{ m.content }}"
    + calls("{% set a = call.function.arguments %}{{ a if a is string else a | tojson }}")
)
# As DeepSeek's: calls where `content` is null, else the content.
NULL_CONTENT = template(
    "{% if m.content is none %}"
    + calls("{{ call.function.arguments | tojson }}")
    + "{% else %}{{ m.content }}{% endif %}"
)
ARGUMENTS = {"place": 'the "old" harbor', "days": 2}
FORMS = [
    (AS_OBJECT, ""),
    (EITHER, ""),
    (AS_TEXT, "the arguments of tool calls as JSON text"),
    (NULL_CONTENT, "an empty `content` beside tool calls as null"),
    (
        NULL_CONTENT.replace("arguments | tojson", "name + ' ' + call.function.arguments"),
        "the arguments of tool calls as JSON text and an empty `content` beside tool calls as null",
    ),
]


def calling(arguments: Any, content: str | None) -> dict[str, Any]:
    """Return a row with a call."""
    call = {"function": {"name": "weather", "arguments": arguments}}
    return {
        "messages": [
            {"role": "user", "content": "rain?"},
            {"role": "assistant", "content": content, "tool_calls": [call]},
        ]
    }


@pytest.mark.parametrize(("form", "told"), FORMS)
@pytest.mark.parametrize("arguments", [ARGUMENTS, json.dumps(ARGUMENTS)])
@pytest.mark.parametrize("content", ["", None])
def test_calls_are_written_as_the_template_takes_them(
    tokenizer, form: str, told: str, arguments: Any, content: str | None
) -> None:
    """Arguments as text or object, and `content` empty or null, give the same targets.

    The account names the form once if it is not the usual one.
    """
    encoded = encode([calling(arguments, content)] * 2, with_template(tokenizer, form))
    for sample in encoded.samples:
        said = targets(sample, tokenizer)
        assert json.loads(said[said.index("{") : said.rindex("}") + 1]) == ARGUMENTS
        assert said.startswith("weather")
        assert said.endswith(END)
    lines = encoded.report.sentence(64).splitlines()
    named = [line for line in lines if "the chat template takes" in line]
    assert len(named) == bool(told)
    assert not told or f"takes {told}: the rows' calls are written so for it" in named[0]


def test_the_form_is_tried_once(tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of a known shape are rendered once each, whatever the form of their calls."""
    rendered = []
    render = ChatTemplate._render
    monkeypatch.setattr(
        ChatTemplate,
        "_render",
        lambda self, *args, **how: rendered.append(1) or render(self, *args, **how),
    )
    odd = with_template(tokenizer, FORMS[-1][0])
    encode([calling(ARGUMENTS, None)], odd)
    few = len(rendered)
    encode([calling(ARGUMENTS, None)] * 50, odd)
    assert len(rendered) == few + few + 49


def test_rows_without_calls_have_no_word_of_their_form(tokenizer) -> None:
    """The account of a chat without calls names no form of calls."""
    report = encode([chat("a", "b")], with_template(tokenizer, AS_TEXT)).report
    assert report.call_form == ""


def test_a_real_template_takes_calls_as_text_beside_null() -> None:
    """DeepSeek's distilled models show a call: they want its arguments as text, no content."""
    tokenizer = tokenizer_of("deepseek-r1-distill")
    encoded = encode([{**TOOLS, "tools": None}], tokenizer, max_seq_len=4096)
    first, *others = runs(encoded.samples[0], tokenizer)
    assert '\u2581sep\uff5c>weather\n```json\n{"city": "Rome"}\n```' in first
    assert [text.partition("<")[0] for text in others] == ["no rain", "bye"]
    assert "JSON text and an empty `content`" in encoded.report.call_form


# -- roles

GENERIC = template("{{ m.content }}")
KNOWING = template("{% if m.role in ['critic', 'ipython'] %}!{% endif %}{{ m.content }}")
STRICT = (
    "{% for m in messages %}{% if m.role == 'user' or m.role == 'system' %}{{ '<q>' + m.content }}"
    "{% elif m['role'] == 'assistant' %}{{ '<a>' + m.content + '<|im_end|>' }}"
    "{% elif m.role == 'observation' %}{{ '<o>' + m.content }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<a>' }}{% endif %}"
)


def row_with(role: str) -> dict[str, Any]:
    """Return a row with a message of a role after an answer."""
    turns = [*chat("a", "b")["messages"], {"role": role, "content": "seen"}]
    return {"messages": [*turns, {"role": "assistant", "content": "d"}]}


@pytest.mark.parametrize(
    ("shown", "role", "name"),
    [
        (GENERIC, "tool", "tool"),
        (GENERIC, "ipython", "tool"),
        (GENERIC, "function", "tool"),
        (GENERIC, "developer", "developer"),
        (KNOWING, "ipython", "ipython"),
        (KNOWING, "critic", "critic"),
        (KNOWING, "observation", "ipython"),
        (STRICT, "observation", "observation"),
        (STRICT, "tool", "observation"),
        (STRICT, "developer", "system"),
    ],
)
def test_a_role_is_the_templates_own_or_a_similar_one(
    tokenizer, shown: str, role: str, name: str
) -> None:
    """A role that the template knows stays; another is replaced, counted and told once."""
    other = with_template(tokenizer, shown)
    encoded = encode([row_with(role)] * 3, other)
    text = other.decode(encoded.samples[0].input_ids)
    plain = with_template(tokenizer, shown).apply_chat_template(
        row_with(name)["messages"], tokenize=False
    )
    assert text == plain
    lines = [line for line in encoded.report.sentence(64).splitlines() if "the role" in line]
    if role == name:
        assert lines == []
    else:
        assert encoded.report.roles == {f"{role} as {name}": (3, "rows.jsonl, row 1")}
        assert len(lines) == 1
        assert f"does not know the role {role}, so it reads {role} as {name} (3 rows" in lines[0]
        assert "rename the role, or choose a template that knows it" in lines[0]


@pytest.mark.parametrize(("shown", "role"), [(GENERIC, "asistant"), (GENERIC, "critic")])
def test_a_role_that_nothing_knows_is_refused(tokenizer, shown: str, role: str) -> None:
    """A template that writes any role does not make a misspelled one right."""
    message = refusal([row_with(role)], with_template(tokenizer, shown))
    assert f"message 3 has the role '{role}', which the chat template does not know." in message
    assert "or a template that knows it (data.chat_template)" in message


def test_a_tools_answer_that_no_role_shows_is_refused() -> None:
    """Under a template without any role for tools, their answers are no other turn's words."""
    message = refusal([row_with("tool")], tokenizer_of("phi3.5"))
    assert "leaves out message 3 (tool)" in message


@pytest.mark.parametrize(
    ("family", "role", "name"),
    [
        ("llama3.1", "ipython", "ipython"),
        ("llama3.1", "observation", "tool"),
        ("qwen2.5", "ipython", "tool"),
        ("qwen3", "tool_response", "tool"),
        ("mistral-v0.3", "tool_results", "tool_results"),
        ("mistral-v0.3", "function", "tool"),
        ("gemma3", "developer", "system"),
        ("qwen3", "developer", "system"),
    ],
)
def test_roles_of_real_templates(family: str, role: str, name: str) -> None:
    """Names of the same role give way to the template's own."""
    assert ChatTemplate(tokenizer_of(family)).role_for(role) == name


@pytest.mark.parametrize("family", FAMILIES)
def test_every_template_has_its_usual_roles(family: str) -> None:
    """User, assistant and system stay under all templates, known or not."""
    fitted = ChatTemplate(tokenizer_of(family))
    content = chat("a", "b", system="c")["messages"]
    conversation = Conversation(content)
    assert fitted.fitted(conversation) is conversation


# -- templates whose answers end with the next role's token

GLM_TOKENS = ["[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"]
# As GLM-4: any role between bars.
GLM_4 = (
    "[gMASK]<sop>{% for item in messages %}{% if item['content'] %}"
    "<|{{ item['role'] }}|>{{ item['metadata'] }}\n{{ item['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
# As GLM-4.5: thoughts, calls, and a token for what tools return.
GLM_45 = """\
[gMASK]<sop>
{%- for m in messages %}
{%- if m.role == 'user' -%}<|user|>
{{ m.content }}
{%- elif m.role == 'assistant' -%}<|assistant|>
{{- '\\n<think>' + (m.reasoning_content or '').strip() + '</think>' -}}
{%- if m.content.strip() -%}{{ '\\n' + m.content.strip() }}{%- endif -%}
{% for tc in m.tool_calls or [] %}
{{- '\\n<tool_call>' + tc.function.name -}}
{% for k, v in tc.function.arguments.items() %}
<arg_key>{{ k }}</arg_key>
<arg_value>{{ v | tojson if v is not string else v }}</arg_value>
{% endfor %}
</tool_call>{% endfor %}
{%- elif m.role == 'tool' -%}
{{- '<|observation|>\\n<tool_response>\\n' + m.content + '\\n</tool_response>' -}}
{%- elif m.role == 'system' -%}<|system|>
{{ m.content }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|assistant|>{{- '\\n<think></think>' if no_think -}}{%- endif -%}
"""


def glm(tokenizer, text: str):
    """Return a tokenizer with GLM's tokens and a template."""
    other = with_template(tokenizer, text)
    other.add_special_tokens({"additional_special_tokens": GLM_TOKENS})
    return other


@pytest.mark.parametrize("text", [GLM_4, GLM_45], ids=["GLM-4", "GLM-4.5"])
def test_each_answer_learns_the_token_that_ends_it(tokenizer, text: str) -> None:
    """The next role's token is a target, and the end token after the last answer.

    No user's word is one, and the end of turns that `generate` looks for is a question's token.
    """
    other = glm(tokenizer, text)
    for system in (None, "be brief"):
        encoded = encode([chat("a b", "c d", "e f", "g h", system=system)], other)
        first, second = runs(encoded.samples[0], other)
        assert first.endswith("c d<|user|>")
        assert second.endswith(f"g h{other.eos_token}")
        assert not encoded.report.is_open_ended
    assert end_of_turn_id(other) == other.convert_tokens_to_ids("<|user|>")


def test_a_call_learns_the_token_of_the_tools_answer(tokenizer) -> None:
    """A call ends with the token that opens what the tool returns."""
    other = glm(tokenizer, GLM_45)
    encoded = encode([{**TOOLS, "tools": None}], other, max_seq_len=4096)
    call, answer, last = runs(encoded.samples[0], other)
    assert call.endswith("<arg_value>Rome</arg_value>\n</tool_call><|observation|>")
    assert answer.endswith("no rain<|user|>")
    assert last.endswith(f"bye{other.eos_token}")


@pytest.mark.parametrize("role", ["tool", "observation"])
def test_a_token_of_the_vocabulary_makes_a_role_known(tokenizer, role: str) -> None:
    """Under GLM-4's template, which writes any role, tools answer as `observation`."""
    other = glm(tokenizer, GLM_4)
    [sample] = encode([row_with(role)], other).samples
    assert "<|observation|>\nseen<|assistant|>" in other.decode(sample.input_ids)
    assert runs(sample, other)[0].endswith("b<|observation|>")
