"""Values that chat templates are told: variables of the configuration, and the date of a run."""

from datetime import datetime

import pytest
from transformers.utils import chat_template_utils

from qlora_dist.config.schema import DataConfig
from qlora_dist.data.dataset import unused_variables
from qlora_dist.generation import prompt_ids
from tests.support.rows import encode, targets, with_template
from tests.unit.data.test_chat_template import FAMILIES, SYSTEM, chat, tokenizer_of

ANSWER = (
    "{% for m in messages %}{{ '<' + m.role + '>' + m.content + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
# As Llama 3.2 has it: a variable that a caller may set, else the present date.
LLAMA_32 = """\
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{{- "Today Date: " + date_string + "\\n\\n" }}"""
GRANITE = """\
{%- set system_message = "Today's Date: " + strftime_now('%B %d, %Y') + "." -%}
{{- system_message }}"""
# As gpt-oss has it, within a macro.
GPT_OSS = """\
{%- macro build_system_message() -%}
    {{- "Current date: " + strftime_now("%Y-%m-%d") + "\\n\\n" }}
{%- endmacro -%}
{{- build_system_message() }}"""
SMOLLM_3 = """\
{%- set today = strftime_now("%d %B %Y") -%}
{{- 'Today Date: ' ~ today ~ '\\n' -}}"""
FORMAT_IN_VARIABLE = """\
{%- set form = "%A, %-d %B %Y, %H:%M, 100%%d" %}
{{- strftime_now(form) }}"""
OTHER_NAME = "{%- set clock = strftime_now %}\n{{- clock(format='%y') }}"
WITHIN_MACRO = """\
  {%- macro today(form) %}{{ strftime_now(form) }}{% endmacro %}
{{- today('%d') }}"""
DATED = {
    LLAMA_32: "Today Date: 29 Feb 2024\n\n",
    GRANITE: "Today's Date: February 29, 2024.",
    GPT_OSS: "Current date: 2024-02-29\n\n",
    SMOLLM_3: "Today Date: 29 February 2024\n",
    FORMAT_IN_VARIABLE: "Thursday, 29 February 2024, 07:05, 100%d",
    OTHER_NAME: "24",
    WITHIN_MACRO: "29",
}
"""Beginnings of templates that write a date, and what they write on one day."""


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch):
    """Return a function that sets the year in which templates believe to be."""

    def set_year(year: int) -> None:
        class Clock(datetime):
            @classmethod
            def now(cls, tz=None):
                return cls(year, 1, 2, 3, 4)

        monkeypatch.setattr(chat_template_utils, "datetime", Clock)

    return set_year


@pytest.mark.parametrize("opening", DATED)
def test_a_run_has_one_date_in_any_form(tokenizer, clock, opening: str) -> None:
    """Every form in which templates ask for the date gets the run's, whatever the clock says."""
    dated = with_template(tokenizer, opening + ANSWER)
    texts = []
    for year in (2030, 2031):
        clock(year)
        [sample] = encode([chat("a", "b")], dated, template_date="2024-02-29T07:05:00").samples
        texts.append(dated.decode(sample.input_ids))
        assert targets(sample, dated) == "b<|im_end|>"
    assert texts == [f"{DATED[opening]}<user>a<|im_end|><assistant>b<|im_end|>"] * 2


@pytest.mark.parametrize("family", FAMILIES)
def test_no_real_template_follows_the_clock(clock, family: str) -> None:
    """A row of a run is the same in any year under each of the fourteen templates."""
    rows = [chat("2+2?", "4"), SYSTEM]
    samples = []
    for year in (2030, 2031):
        clock(year)
        encoded = encode(
            rows, tokenizer_of(family), template_date="2024-02-29", max_bad_fraction=0.9
        )
        samples.append(encoded.samples)
    assert samples[0] == samples[1]


def test_a_variable_reaches_the_template(tokenizer) -> None:
    """Variables of any plain type decide the text, that of training and that of a prompt alike."""
    asking = with_template(
        tokenizer,
        "{% if deep is defined %}{{ deep.list[1] }}{% endif %}"
        + ANSWER
        + "{% if enable_thinking is false and add_generation_prompt %}{{ '<quiet>' }}{% endif %}",
    )
    variables = {"enable_thinking": False, "deep": {"list": ["no", "yes"]}}
    [sample] = encode([chat("a", "b")], asking, template_kwargs=variables).samples
    assert asking.decode(sample.input_ids).startswith("yes<user>a")
    prompt = asking.decode(prompt_ids("a", asking, "messages", variables)[0])
    assert prompt == "yes<user>a<|im_end|><assistant><quiet>"
    assert "yes" not in asking.decode(prompt_ids("a", asking, "messages")[0])


def test_a_variable_of_a_real_template() -> None:
    """Qwen3's prompt ends thoughts at once without thinking; the answer's words are the target."""
    qwen = tokenizer_of("qwen3")
    variables = {"enable_thinking": False}
    [sample] = encode([chat("2+2?", "4")], qwen, template_kwargs=variables).samples
    assert targets(sample, qwen) == "4<|im_end|>"
    prompt = prompt_ids("2+2?", qwen, "messages", variables)[0].tolist()
    assert sample.input_ids[: len(prompt)] == prompt
    llama = tokenizer_of("llama3.1")
    [sample] = encode(
        [chat("2+2?", "4")], llama, template_kwargs={"date_string": "1 May 2031"}
    ).samples
    assert "Today Date: 1 May 2031\n" in llama.decode(sample.input_ids)


def test_a_variable_without_effect_is_named_once() -> None:
    """Variables that the template does not use are in one sentence with a remedy; others in none.

    A word of the template's text is no use of a variable.
    """
    qwen, llama = tokenizer_of("qwen3"), tokenizer_of("llama3.1")
    reports = [encode([chat("a", "b")], qwen).report] * 2

    def told(tokenizer, variables, reports=reports) -> list[str]:
        config = DataConfig(train="rows.jsonl", template_kwargs=variables)
        return unused_variables(reports, tokenizer, config)

    [sentence] = told(qwen, {"enable_thinking": True, "signature": 1, "loop_index": 2})
    assert "sets signature, loop_index, which the chat template does not use: remove" in sentence
    assert told(qwen, {"enable_thinking": True}) == told(qwen, None) == []
    assert told(llama, {"date_string": "1 May 2031", "custom_tools": []}) == []
    assert "sets functions, " in told(qwen, {"functions": "a word of its text"})[0]
    assert told(tokenizer_of("phi4"), {"a": 1}), "a template with generation marks is read, too"
    text = encode([{"text": "no chat"}], qwen).report
    assert "sets enable_thinking, " in told(qwen, {"enable_thinking": True}, [text])[0]
