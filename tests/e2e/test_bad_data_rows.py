"""Rows that cannot be used, through the command line: left out and counted, cut, or refused."""

import json
import resource
import shutil
from functools import partial
from pathlib import Path

import pytest

from tests.support.data_runs import (
    ANSWERED,
    ASKED,
    CHATS,
    CSV,
    PLAIN,
    SHAREGPT,
    chat,
    check_refused,
    check_trained,
    lines,
    table,
    train,
)

# -- rows that cannot be used

BAD_ROWS: dict[str, tuple[dict, str, str]] = {
    # what is wrong: (a row, the reason by which it is counted, words of the message about it)
    "no columns": ({}, "no `messages`", "no column `messages` (the row has no columns)"),
    "an empty list": ({"messages": []}, "empty row", "`messages` is []"),
    "nothing": ({"messages": None}, "empty row", "`messages` is None"),
    "a number for messages": ({"messages": 7}, "empty row", "`messages` is 7"),
    "a number for text": (chat(ASKED, ("assistant", 7)), "message without `content`", "message 2"),
    "a text for messages": ({"messages": "hello"}, "empty row", "`messages` is 'hello'"),
    "texts for messages": (
        {"messages": ["hello"]},
        "message without `content`",
        "message 1 is 'hello'",
    ),
    "no answer": (chat(ASKED), "no assistant turn", "Add the answer"),
    "a tool that nothing called": (
        chat(ASKED, ("tool", "4"), ANSWERED),
        "tool turn that nothing called",
        "message 2",
    ),
    "an unknown role": (chat(("bot", "hi"), ANSWERED), "unknown role", "the role 'bot'"),
    "a number for a role": (chat((3, "hi"), ANSWERED), "unknown role", "the role 3"),
    "a list for a role": (chat((["user"], "hi"), ANSWERED), "unknown role", "the role ['user']"),
    "another format": (SHAREGPT, "sharegpt row", "Split the file by format"),
    "another format of text": (PLAIN[0], "prompt_completion row", "Split the file by format"),
    "half an emoji": (chat(ASKED, ("assistant", "\ud83e")), "half a character", "emoji cut in two"),
    "a NUL character": (chat(ASKED, ("assistant", "a\0")), "NUL character", "Remove it"),
    "a call without a name": (
        {"messages": [*CHATS[0]["messages"], {"role": "assistant", "tool_calls": [{}]}]},
        "tool call without a name",
        "message 3 calls {}",
    ),
    "tools without a form": (
        {**CHATS[0], "tools": "[1]"},
        "`tools` is no list",
        "function descriptions",
    ),
    "tools that the template leaves out": (
        {**CHATS[0], "tools": [{"name": "weather"}]},
        "tools left out by the template",
        "'weather'",
    ),
    "a value nested deep": (
        {"messages": json.loads("[" * 900 + "]" * 900)},
        "message without `content`",
        "message 1",
    ),
    "columns without end": (
        {f"c{i}": i for i in range(100_000)},
        "no `messages`",
        "others, 100,000 in all",
    ),
}


@pytest.mark.parametrize("what", BAD_ROWS)
def test_a_faulty_row_is_counted_or_stops_the_run(tmp_path: Path, run: dict, what: str) -> None:
    """Two faulty rows of 42 pass a max_bad_fraction of 0.05, and stop a run with 0.04.

    Those that pass are shown with reason, number and first place; the message of a stop is
    about the first one.
    """
    row, reason, words = BAD_ROWS[what]
    file = tmp_path / "d.jsonl"
    text = "".join(json.dumps(row) + "\n" for row in [*CHATS[:4], row, *CHATS[4:], row])
    file.write_text(text, encoding="utf-8")
    done = train(run, train=str(file), max_bad_fraction=0.04)
    check_refused(
        done, run, f"error: {file}, row 5: ", words, "2 of 42 rows", "data.max_bad_fraction (0.04)"
    )
    shown = f", 2 faulty rows left out: {reason}: 2 (first: {file}, row 5)\n"
    check_trained(train(run, train=str(file)), run, "format messages, 40 rows, ", shown)


def test_several_reasons_are_counted_apart(tmp_path: Path, run: dict) -> None:
    """Reasons are counted apart, the most frequent first."""
    file = tmp_path / "d.jsonl"
    bad = [BAD_ROWS[what][0] for what in ("no answer", "nothing", "an empty list")]
    file.write_bytes(lines(*CHATS * 2, *bad))
    shown = (
        f"3 faulty rows left out: empty row: 2 (first: {file}, row 82), "
        f"no assistant turn: 1 ({file}, row 81)"
    )
    check_trained(train(run, train=str(file)), run, shown)


def test_only_faulty_rows(tmp_path: Path, run: dict) -> None:
    """A file of faulty rows only is refused, whatever share of faulty rows may pass."""
    file = tmp_path / "d.jsonl"
    file.write_bytes(lines(*[chat(ASKED)] * 3))
    check_refused(
        train(run, train=str(file), max_bad_fraction=0.999),
        run,
        f"{file}, row 1: no assistant turn",
        "3 of 3",
    )


@pytest.mark.parametrize(
    ("fraction", "num_bad", "num_rows"), [(0.05, 1, 20), (0.29, 29, 100), (0.07, 7, 100), (0, 0, 5)]
)
def test_exactly_as_many_as_may_be(
    tmp_path: Path, run: dict, fraction: float, num_bad: int, num_rows: int
) -> None:
    """`max_bad_fraction` is the decimal number as written: of 100 rows, 0.29 lets 29 pass.

    With 30, the run is refused.
    """
    file = tmp_path / "d.jsonl"
    file.write_bytes(lines(*[CHATS[0]] * (num_rows - num_bad), *[chat(ASKED)] * num_bad))
    check_trained(
        train(run, train=str(file), max_bad_fraction=fraction), run, f"{num_rows - num_bad} rows"
    )
    shutil.rmtree(run["output_dir"])
    shutil.rmtree(run["data"]["cache_dir"])
    file.write_bytes(lines(*[CHATS[0]] * (num_rows - num_bad - 1), *[chat(ASKED)] * (num_bad + 1)))
    check_refused(
        train(run, train=str(file), max_bad_fraction=fraction),
        run,
        f"{num_bad + 1} of {num_rows} rows",
    )


def test_numbers_instead_of_text(tmp_path: Path, run: dict) -> None:
    """JSON numbers are no text; CSV cells always are."""
    (tmp_path / "d.jsonl").write_bytes(lines({"prompt": 1, "completion": 2}))
    (tmp_path / "d.csv").write_text("prompt,completion\n1,2\n")
    done = train(run, train=str(tmp_path / "d.jsonl"))
    check_refused(done, run, "d.jsonl, row 1: `completion` is 2, but must be text")
    check_trained(train(run, train=str(tmp_path / "d.csv")), run, "prompt_completion, 1 rows")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("d.jsonl", b"\xef\xbb\xbf" + lines(*PLAIN).replace(b"\n", b"\r\n")),
        ("d.csv", b"\xef\xbb\xbf" + CSV.replace(b"\n", b"\r\n")),
        ("d.json", b"\xef\xbb\xbf" + json.dumps(PLAIN, indent=1).encode().replace(b"\n", b"\r\n")),
        ("d.jsonl", lines(*PLAIN).rstrip()),  # no line feed at the end
        ("d.parquet", table("parquet", [{f"c{i}": i for i in range(2000)} | PLAIN[0]] * 40)),
    ],
    ids=[
        "JSONL of Windows",
        "CSV of Windows",
        "JSON of Windows",
        "no last line feed",
        "two thousand columns",
    ],
)
def test_what_is_unusual_but_right(tmp_path: Path, run: dict, name: str, content: bytes) -> None:
    """Byte order marks, CRLF, as of editors on Windows, and columns without a use do not matter."""
    (tmp_path / name).write_bytes(content)
    check_trained(train(run, train=str(tmp_path / name)), run, "prompt_completion, 40 rows")


def test_rows_without_a_target_left(tmp_path: Path, run: dict) -> None:
    """Rows filled by their question are counted, and refused if all rows are."""
    file = tmp_path / "d.jsonl"
    long = chat(("user", "why? " * 100), ANSWERED)
    file.write_bytes(lines(*CHATS, long, long))
    check_trained(train(run, train=str(file)), run, "40 rows, ", "2 rows dropped (no target left)")
    shutil.rmtree(run["output_dir"])
    shutil.rmtree(run["data"]["cache_dir"])
    file.write_bytes(lines(long, long))
    words = (
        "none of its 2 rows has a target token within data.max_seq_len (64)",
        "Raise data.max_seq_len",
    )
    check_refused(train(run, train=str(file)), run, *words)


# -- templates that do not fit

MESSAGES = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
)
TEMPLATES: dict[str, tuple[str, str]] = {
    # what the template does: (the template, words of the message)
    "drops system turns": (
        MESSAGES.replace("messages %}", "messages if m['role'] != 'system' %}"),
        "leaves out message 1 (system)",
    ),
    "keeps the last turn only": (
        MESSAGES.replace("messages %}", "messages[-1:] %}"),
        "leaves out message 1 (system)",
    ),
    "refuses": ("{{ raise_exception('Only users may speak') }}", "Only users may speak"),
    "divides by zero": (MESSAGES + "{{ 1 // 0 }}", "refuses this conversation"),
    "calls what is not there": (
        MESSAGES + "{{ messages[99].strip() }}",
        "refuses this conversation",
    ),
    "recurses without end": (
        "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
        "refuses this conversation",
    ),
}


@pytest.mark.parametrize("what", TEMPLATES)
def test_a_template_that_does_not_fit(tmp_path: Path, run: dict, what: str) -> None:
    """A template that refuses the rows gives one message, on the first of them, and no adapter."""
    template, words = TEMPLATES[what]
    model = shutil.copytree(run["model"]["path"], tmp_path / "model")
    (model / "chat_template.jinja").write_text(template)
    run["model"]["path"] = str(model)
    file = tmp_path / "d.jsonl"
    file.write_bytes(lines(*[chat(("system", "Be brief."), ASKED, ANSWERED)] * 3))
    check_refused(
        train(run, train=str(file)), run, f"{file}, row 1: the ", "chat template", words, "3 of 3"
    )


def test_a_template_that_is_no_jinja(tmp_path: Path, run: dict) -> None:
    """A template with a syntax error is refused with its line before any row is read."""
    model = shutil.copytree(run["model"]["path"], tmp_path / "model")
    (model / "chat_template.jinja").write_text("{% for m in messages %}")
    run["model"]["path"] = str(model)
    file = tmp_path / "d.jsonl"
    file.write_bytes(lines(*[chat(ASKED, ANSWERED)] * 3))
    check_refused(
        train(run, train=str(file)),
        run,
        "chat template (default), line 1: not valid Jinja",
        "endfor",
    )


# -- rows of megabytes


def limit(num_bytes: int, seconds: int) -> None:
    """Let this process have `num_bytes` more address space, and `seconds` of processor time."""
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, resource.RLIM_INFINITY))
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(
        resource.RLIMIT_AS, (pages * resource.getpagesize() + num_bytes, resource.RLIM_INFINITY)
    )


@pytest.mark.parametrize("layout", ["chat", "text"])
@pytest.mark.parametrize("too_long", ["truncate_end", "drop"])
def test_a_row_of_fifty_megabytes(tmp_path: Path, run: dict, layout: str, too_long: str) -> None:
    """A row of 50 MB is cut or dropped, and counted, within 10 s of processor time and 1 GB.

    Tokenized whole, it would take nine.
    """
    text = "the quick brown fox " * 2_500_000
    row = chat(ASKED, ("assistant", text)) if layout == "chat" else {"text": text}
    file = tmp_path / "d.jsonl"
    file.write_bytes(lines(row, chat(ASKED, ANSWERED) if layout == "chat" else {"text": "fox"}))
    done = train(run, partial(limit, 2**30, 10), train=str(file), too_long=too_long)
    shown = "2 rows, " if too_long == "truncate_end" else "1 rows, "
    check_trained(
        done,
        run,
        shown,
        "1 rows cut to 64" if shown == "2 rows, " else "1 rows dropped (longer than 64)",
    )


def test_a_tokenizer_of_another_model(tmp_path: Path, run: dict) -> None:
    """Tokens without an embedding are found before training; the message has both sizes."""
    from transformers import AutoTokenizer

    model = shutil.copytree(run["model"]["path"], tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens([f"word{i}" for i in range(1000)])
    tokenizer.save_pretrained(model)
    run["model"]["path"] = str(model)
    file = tmp_path / "d.jsonl"
    file.write_bytes(lines(*[chat(ASKED, ("assistant", "word999"))] * 3))
    done = train(run, train=str(file))
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "tokenizer" in done.stderr
    assert not Path(run["output_dir"]).exists()
