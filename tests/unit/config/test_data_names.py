"""`data.columns` and `data.roles`: read from file and command line, and impossible ones refused."""

from pathlib import Path
from typing import get_args

import pytest
import yaml

from qlora_dist.config.data_names import COLUMNS, ColumnName, columns_of
from qlora_dist.config.load import dump_config, load_config
from tests.support.settings import REQUIRED, refusal


@pytest.fixture
def named(tmp_path: Path) -> Path:
    """Return a file with both mappings."""
    data = {
        "train": "t.jsonl",
        "columns": {"prompt": "question", "completion": "answer"},
        "roles": {"assistant": ["bot", "GPT-4"], "user": "human2"},
    }
    (file := tmp_path / "named.yaml").write_text(yaml.safe_dump({**REQUIRED, "data": data}))
    return file


ROLES = {"assistant": ("bot", "GPT-4"), "user": ("human2",)}


@pytest.mark.parametrize(
    ("arguments", "columns", "roles"),
    [
        ([], {"prompt": "question", "completion": "answer"}, ROLES),
        (["--data.columns.prompt", "ask"], {"prompt": "ask", "completion": "answer"}, ROLES),
        (
            ["--data.columns.system=rules", "--data.columns", "{text: body}"],
            {"text": "body"},
            ROLES,
        ),
        (
            ["--data.columns", "{text: body}", "--data.columns.tools", "3"],
            {"text": "body", "tools": "3"},
            ROLES,
        ),
        (["--data.columns", "null"], {}, ROLES),
        (["--data.columns", "{}", "--data.roles", "{tool: [a, b]}"], {}, {"tool": ("a", "b")}),
        (
            ["--data.roles.developer", "root", "--data.roles.user", "[a, 1]"],
            {"prompt": "question", "completion": "answer"},
            {**ROLES, "developer": ("root",), "user": ("a", "1")},
        ),
    ],
)
def test_entries_and_whole_mappings(
    named: Path, arguments: list[str], columns: dict, roles: dict
) -> None:
    """An entry on the command line adds to the file's or replaces one; a mapping replaces all.

    The configuration that a run leaves behind is read back equal.
    """
    config = load_config(named, arguments)
    assert (config.data.columns, config.data.roles) == (columns, roles)
    (dumped := named.with_name("dumped.yaml")).write_text(dump_config(config))
    assert load_config(dumped) == config


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["--data.columns.promt", "x"],
            "unknown key data.columns.promt. Did you mean data.columns.prompt? Its keys are ",
        ),
        (
            ["--data.columns", "{xyzzy: a}"],
            "unknown key data.columns.xyzzy. Its keys are messages,",
        ),
        (["--data.columns.a.b", "x"], "unknown key data.columns.a.b."),
        (
            ["--data.roles.asistant", "x"],
            "unknown key data.roles.asistant. Did you mean data.roles.assistant? Its keys are "
            "system, user, assistant, tool, developer, function, ipython, observation, "
            "tool_response, tool_results, function_call.",
        ),
        (["--data.columns", "prompt"], "must be a mapping of names to text."),
        (["--data.roles", "[user]"], "must be a mapping of names to a list of names."),
        (["--data.columns.prompt", "[a]"], "data.columns.prompt is ['a'], but must be text."),
        (
            ["--data.columns.prompt", "null"],
            "data.columns.prompt is empty (null), but must be text.",
        ),
        (
            ["--data.columns.prompt", "''"],
            "data.columns.prompt is empty. Set it to the file's name",
        ),
        (["--data.roles.user", "[]"], "data.roles.user is [], but must be a list of names."),
        (["--data.roles.user", "['']"], "data.roles.user has an empty name. Set it to"),
        (["--data.columns", "{text: a, text: b}"], "data.columns.text is set twice"),
        (
            ["--data.columns.system", "answer"],
            "data.columns.completion and data.columns.system are both 'answer', but a column has "
            "one meaning. Remove one.",
        ),
        (
            ["--data.roles.tool", "[x, bot]"],
            "data.roles.assistant and data.roles.tool both have 'bot', but a name means one role. "
            "Remove it from one.",
        ),
        (
            ["--data.format", "messages"],
            "but data.format: messages reads no completion. Remove it (read are messages, tools, "
            "role, content), or change data.format.",
        ),
    ],
)
def test_impossible_names_are_refused(named: Path, arguments: list[str], said: str) -> None:
    """The message has the entry, the rule and the remedy."""
    assert said in refusal(named, *arguments)


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ("    promt: a\n", ":7: unknown key data.columns.promt. Did you mean"),
        ("    prompt: a\n    text: [b]\n", ":8: data.columns.text is ['b'], but must be text."),
        ("    prompt: a\n    prompt: b\n", ":8: data.columns.prompt is set twice, first at"),
    ],
)
def test_a_mistake_in_an_entry_is_named_by_its_line(tmp_path: Path, lines: str, said: str) -> None:
    """The message starts with FILE:LINE of the entry, not of the mapping."""
    file = tmp_path / "run.yaml"
    head = "output_dir: out\nmodel:\n  path: m\ndata:\n  train: t\n  columns:\n"
    file.write_text(head + lines)
    assert refusal(file).startswith(f"{file}{said}")


def test_a_mapping_needs_entries_not_a_value(tmp_path: Path) -> None:
    """A value in place of entries is refused; a mapping whose entries are commented out is none."""
    file = tmp_path / "run.yaml"
    head = "output_dir: out\nmodel: {path: m}\ndata:\n  train: t\n  columns:"
    file.write_text(f"{head} prompt\n")
    assert refusal(file).startswith(f"{file}:5: data.columns is a section: write its keys indented")
    file.write_text(f"{head}\n    # prompt: question\n")
    assert load_config(file).data.columns == {}


def test_every_name_is_read_by_a_format() -> None:
    """Each name of `data.columns` is a column of some format, and each such column has a name."""
    assert set(get_args(ColumnName)) == {name for format in COLUMNS for name in columns_of(format)}
