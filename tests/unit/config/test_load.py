"""Settings from YAML files and the command line: values read, and messages with FILE:LINE."""

import os
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_dist.config.load import dump_config, load_config
from qlora_dist.config.schema import (
    AdapterConfig,
    DataConfig,
    LoggingConfig,
    MemoryConfig,
    ModelConfig,
    OptimConfig,
    Source,
    TrainConfig,
    flatten,
)
from qlora_dist.errors import ConfigError
from tests.support.settings import MINIMAL, REQUIRED, refusal

_text = st.text(st.characters(exclude_categories=["C"]), min_size=1)
_entries = st.builds(Source, _text, st.floats(min_value=0, exclude_min=True, allow_infinity=False))


def test_settings_left_out_have_the_defaults_of_the_dataclasses(config_file: Path) -> None:
    """A file with only the required keys gives the dataclasses' defaults: nothing else has any."""
    assert load_config(config_file) == MINIMAL


def test_file_overrides_defaults_and_command_line_overrides_file(tmp_path: Path) -> None:
    """Each setting is taken from the command line, else from the file, else from the defaults."""
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({**REQUIRED, "optim": {"lr": 1e-3, "max_steps": 7}}))
    config = load_config(path, ["--optim.lr", "3e-3"])
    assert config.optim == OptimConfig(lr=3e-3, max_steps=7)


@pytest.mark.parametrize(
    ("arguments", "key", "expected"),
    [
        (["--optim.lr", "2e-4"], "optim.lr", 2e-4),
        (["--optim.lr=2e-4"], "optim.lr", 2e-4),
        (["--optim.max-grad-norm", "null"], "optim.max_grad_norm", None),
        (["--model.double_quant", "false"], "model.double_quant", False),
        (
            ["--adapter.target_modules", "[q_proj, v_proj]"],
            "adapter.target_modules",
            ("q_proj", "v_proj"),
        ),
        (["--adapter.target_modules", "q_proj"], "adapter.target_modules", ("q_proj",)),
        (["--memory.recompute", "3"], "memory.recompute", 3),
        (["--memory.recompute", "none"], "memory.recompute", "none"),
        (["--memory.recompute", "null"], "memory.recompute", "none"),  # people write null for none
        (["--model.quantization", "null"], "model.quantization", "none"),
        (["--seed", "1", "--seed", "2"], "seed", 2),
        (
            ["--data.train", "[a.jsonl, b.jsonl]"],
            "data.train",
            (Source("a.jsonl"), Source("b.jsonl")),
        ),
        (
            ["--data.train", "[a.jsonl, {path: b.jsonl, weight: 0.5}, {path: c.jsonl}]"],
            "data.train",
            (Source("a.jsonl"), Source("b.jsonl", 0.5), Source("c.jsonl")),
        ),
        (["--data.eval", "[a.jsonl, b.jsonl]"], "data.eval", ("a.jsonl", "b.jsonl")),
    ],
)
def test_command_line_values_are_yaml(
    config_file: Path, arguments: list[str], key: str, expected: object
) -> None:
    """An override is read like a YAML value in the file; the last of two overrides counts."""
    value = flatten(load_config(config_file, arguments))[key]
    assert value == expected
    assert type(value) is type(expected)


def test_an_empty_section_means_its_defaults(tmp_path: Path) -> None:
    """A section whose keys are all commented out is not an error."""
    path = tmp_path / "run.yaml"
    path.write_text(
        "output_dir: out\nmodel: {path: m}\ndata: {train: t.jsonl}\noptim:\n  # lr: 1.0e-3\n"
    )
    assert load_config(path) == MINIMAL


_configs = st.builds(
    TrainConfig,
    output_dir=_text,
    seed=st.integers(0, 2**31 - 1),
    model=st.builds(ModelConfig, path=_text),
    adapter=st.builds(
        AdapterConfig,
        target_modules=st.just("all-linear") | st.lists(_text, min_size=1).map(tuple),
        path=st.none(),
    ),
    data=st.builds(
        DataConfig,
        train=_text
        | st.lists(_entries, min_size=1, unique_by=lambda entry: os.path.abspath(entry.path)).map(
            tuple
        ),
        eval=st.none() | _text | st.lists(_text, min_size=1, unique_by=os.path.abspath).map(tuple),
    ),
    optim=st.builds(
        OptimConfig,
        lr=st.floats(min_value=0, exclude_min=True, allow_infinity=False),
        max_grad_norm=st.none() | st.floats(min_value=1e-300, allow_infinity=False),
    ),
    memory=st.builds(
        MemoryConfig,
        recompute=st.sampled_from(["auto", "full", "selective", "none"]) | st.integers(0, 100),
        budget_gib=st.none(),
    ),
    logging=st.builds(LoggingConfig, tensorboard=st.booleans()),
)


@settings(deadline=None)
@given(config=_configs)
def test_a_dumped_config_reads_back_equal(
    tmp_path_factory: pytest.TempPathFactory, config: TrainConfig
) -> None:
    """The config.yaml that a run leaves behind is valid input, and gives an equal configuration."""
    file = tmp_path_factory.getbasetemp() / "dumped.yaml"
    file.write_text(dump_config(config), encoding="utf-8")
    assert load_config(file) == config


def test_a_dumped_config_names_every_setting() -> None:
    """A run's config.yaml does not depend on the defaults of the version that reads it later."""
    dumped = yaml.safe_load(dump_config(MINIMAL))
    keys = {
        f"{name}.{leaf}" if isinstance(value, dict) else name
        for name, value in dumped.items()
        for leaf in (value if isinstance(value, dict) else [name])
    }
    assert keys == set(flatten(MINIMAL))
    assert "optim.lr" in keys


@pytest.mark.parametrize(
    ("key", "suggestion"),
    [
        ("optim.learning_rate", "optim.lr"),  # its name in other programs
        ("learning_rate", "optim.lr"),
        ("adapter.lora_r", "adapter.rank"),
        ("adapter.r", "adapter.rank"),
        ("batch_size", "optim.micro_batch_size"),
        ("optim.max_step", "optim.max_steps"),  # a slip
        ("optim.learning-rate", "optim.lr"),
        ("data.max_seq_length", "data.max_seq_len"),
        ("lr", "optim.lr"),  # the section was forgotten
        ("max_seq_len", "data.max_seq_len"),
        ("optim.rank", "adapter.rank"),  # the wrong section
        ("output", "output_dir"),
    ],
)
def test_an_unknown_key_suggests_the_one_that_was_meant(
    config_file: Path, key: str, suggestion: str
) -> None:
    """A key that does not exist is refused with the nearest existing key."""
    message = refusal(config_file, f"--{key}", "1")
    assert f"unknown key {key.replace('-', '_')}." in message
    assert f"Did you mean {suggestion}?" in message


def test_an_unknown_key_like_no_other_points_to_the_list(config_file: Path) -> None:
    """A key without a near one gets the way to the list of keys instead of a wild suggestion."""
    message = refusal(config_file, "--xyzzy", "1")
    assert "unknown key xyzzy." in message
    assert "Did you mean" not in message
    assert "--help" in message


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("  learning_rate: 1.0", "unknown key optim.learning_rate"),
        ("  lr: fast", "optim.lr is 'fast', but must be a number"),
        ("  lr: [1, 2]", "optim.lr is [1, 2], but must be a number"),
    ],
)
def test_a_mistake_in_the_file_is_named_by_file_and_line(
    tmp_path: Path, line: str, message: str
) -> None:
    """The message starts with FILE:LINE, as compilers write it."""
    path = tmp_path / "run.yaml"
    path.write_text(
        f"output_dir: out\nmodel:\n  path: m\ndata:\n  train: t\noptim:\n  max_steps: 1\n{line}\n"
    )
    assert refusal(path).startswith(f"{path}:8: {message}")


def test_a_mistake_on_the_command_line_names_no_file(config_file: Path) -> None:
    """The message about an override names no file."""
    assert refusal(config_file, "--optim.lr", "fast") == "optim.lr is 'fast', but must be a number."


@pytest.mark.parametrize(
    ("text", "line", "key"),
    [
        ("seed: 1\nseed: 2\n", 2, "seed"),
        ("optim:\n  lr: 1\n  lr: 2\n", 3, "optim.lr"),
        ("optim:\n  lr: 1\noptim:\n  max_steps: 2\n", 3, "optim"),
    ],
)
def test_a_key_set_twice_is_refused(tmp_path: Path, text: str, line: int, key: str) -> None:
    """Both lines of a repeated key are named; YAML readers would silently take the last."""
    path = tmp_path / "run.yaml"
    path.write_text(text)
    assert refusal(path).startswith(f"{path}:{line}: {key} is set twice, first at {path}:")


@pytest.mark.parametrize("value", ["1.0e-3", "[1]", "adamw"])
def test_a_section_needs_keys_not_a_value(tmp_path: Path, value: str) -> None:
    """`optim: 1.0e-3` is refused as a misplaced value, not as an unknown key."""
    path = tmp_path / "run.yaml"
    path.write_text(f"output_dir: out\noptim: {value}\n")
    message = refusal(path)
    assert message.startswith(f"{path}:2: optim is a section")


@pytest.mark.parametrize(
    "text", ["- a\n- b\n", "just text\n", "a: [\n", "a: b: c\n", "a: 1\n---\nb: 2\n", "\x00"]
)
def test_a_file_that_is_no_yaml_mapping_is_refused(tmp_path: Path, text: str) -> None:
    """Broken YAML, and YAML that is no mapping, are user errors that name the file."""
    path = tmp_path / "run.yaml"
    path.write_text(text)
    assert str(path) in refusal(path)


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    """A missing file, a folder and a binary file are user errors that name the path."""
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "missing.yaml", tmp_path, binary):
        assert str(path) in refusal(path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["optim.lr", "1"], "unexpected argument 'optim.lr'"),
        (["--optim.lr"], "--optim.lr has no value"),
        (["--seed", "1", "2"], "unexpected argument '2'"),
    ],
)
def test_a_malformed_override_is_refused(
    config_file: Path, arguments: list[str], message: str
) -> None:
    """A word that belongs to no setting is refused, not skipped."""
    assert message in refusal(config_file, *arguments)


@pytest.mark.parametrize(
    ("key", "value", "rule"),
    [
        ("optim.lr", "fast", "a number"),
        ("optim.lr", "null", "a number"),
        ("optim.lr", "true", "a number"),
        ("optim.lr", "[1.0]", "a number"),
        ("adapter.rank", "8.0", "a whole number"),
        ("adapter.rank", "true", "a whole number"),
        ("adapter.rank", "eight", "a whole number"),
        ("adapter.rank", "null", "a whole number"),
        ("optim.max_steps", "1e3", "a whole number or null"),
        ("optim.max_steps", "false", "a whole number or null"),
        ("model.double_quant", "1", "true or false"),
        ("model.double_quant", "maybe", "true or false"),
        ("model.path", "true", "text"),
        ("model.path", "[a]", "text"),
        ("data.eval", "{a: 1}", "text, a list of names or null"),
        ("data.eval", "[]", "text, a list of names or null"),
        ("data.eval", "[{path: e.jsonl, weight: 2}]", "text, a list of names or null"),
        ("data.train", "[]", "text or a list whose entries are names or {path: …, weight: …}"),
        (
            "data.train",
            "{path: a, weight: 2}",
            "text or a list whose entries are names or {path: …, weight: …}",
        ),
        ("data.train", "null", "text or a list whose entries are names or {path: …, weight: …}"),
        ("model.dtype", "half", "auto, bfloat16, float16 or float32"),
        ("model.quantization", "int8", "nf4, fp4 or none"),
        ("optim.schedule", "1", "linear, cosine or constant"),
        ("adapter.target_modules", "[]", "all-linear, attention-only or a list of names"),
        ("adapter.target_modules", "[[a]]", "all-linear, attention-only or a list of names"),
        ("memory.recompute", "some", "auto, full, selective, none or a whole number"),
        ("memory.recompute", "true", "auto, full, selective, none or a whole number"),
        ("memory.recompute", "1.5", "auto, full, selective, none or a whole number"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused(
    config_file: Path, key: str, value: str, rule: str
) -> None:
    """The message has the value and the type that it must have; true and false are no numbers."""
    message = refusal(config_file, f"--{key}", value)
    assert message.startswith(f"{key} is ")
    assert message.endswith(f"but must be {rule}.")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("{path: b, wieght: 2}", "unknown key wieght. The keys of an entry are path and weight."),
        ("{path: b, 3: 2}", "unknown key 3. The keys of an entry are path and weight."),
        ("{weight: 2}", "path is missing. The keys of an entry are path and weight."),
        ("{}", "path is missing. The keys of an entry are path and weight."),
        ("{path: [b]}", "path is ['b'], but must be text."),
        ("[b]", "path is ['b'], but must be text."),
        ("null", "path is empty (null), but must be text."),
        ("''", "path is empty. Give a data file, or remove the entry."),
        ("{path: b, weight: heavy}", "weight is 'heavy', but must be a number."),
        ("{path: b, weight: true}", "weight is true, but must be a number."),
        *(
            (
                f"{{path: b, weight: {weight}}}",
                f"weight is {shown}, but must be a finite number greater than 0. "
                "To leave a file out, remove its entry.",
            )
            for weight, shown in (("0", "0"), ("-0.5", "-0.5"), (".inf", "inf"), (".nan", "nan"))
        ),
    ],
)
def test_a_mistake_in_one_of_several_files_names_the_entry(
    config_file: Path, entry: str, message: str
) -> None:
    """The message is about the entry, counted from 1, not about the list."""
    refused = refusal(config_file, "--data.train", f"[a, {entry}]")
    assert refused == f"data.train, entry 2: {message}"


def test_a_mistake_in_an_entry_is_named_by_file_and_line(tmp_path: Path) -> None:
    """The message names the line of the list's key."""
    path = tmp_path / "run.yaml"
    path.write_text(
        "output_dir: out\nmodel: {path: m}\ndata:\n  train:\n  - a.jsonl\n  - {file: b.jsonl}\n"
    )
    assert refusal(path).startswith(f"{path}:4: data.train, entry 2: unknown key file.")


@pytest.mark.parametrize(
    ("text", "expected"), [("2e-4", 2e-4), ("1E5", 1e5), ("3", 3.0), ("'0.5'", 0.5)]
)
def test_numbers_that_yaml_reads_as_text_are_numbers(
    tmp_path: Path, text: str, expected: float
) -> None:
    """A learning rate of 2e-4 is a float, though YAML 1.1 takes it for text: it has no dot."""
    path = tmp_path / "run.yaml"
    path.write_text(
        f"output_dir: out\nmodel: {{path: m}}\ndata: {{train: t.jsonl}}\noptim:\n  lr: {text}\n"
    )
    lr = load_config(path).optim.lr
    assert lr == expected
    assert type(lr) is float


def test_numeric_names_are_text(config_file: Path) -> None:
    """`--output_dir 7` means the folder `7`."""
    assert load_config(config_file, ["--output_dir", "7"]).output_dir == "7"


@pytest.mark.parametrize(
    ("init", "name"), [("pissa", "PiSSA"), ("loftq", "LoftQ"), ("olora", "OLoRA")]
)
def test_initializations_that_change_the_base_are_refused_by_name(
    config_file: Path, init: str, name: str
) -> None:
    """The message has the reason, and the initializations that exist instead."""
    message = refusal(config_file, "--adapter.init", init)
    assert message.startswith(f"adapter.init is {init!r}, but must be default or gaussian. {name} ")
    assert "keeps the bytes of its checkpoint" in message


@pytest.mark.parametrize(
    "line",
    [
        "optim: {lr: !foo 3}",
        "seed: 2024-13-45",
        "adapter: {target_modules: &a [*a]}",
        "optim:\n  <<: {lr: 3}",
        "optim: {lr: 1" + "0" * 400 + "}",
        "optim.lr: 3.0\noptim: {lr: 4.0}",
        "seed: 2147483648",
        "optim: {max_steps: 10, warmup_steps: 10}",
    ],
    ids=lambda line: line[:30],
)
def test_odd_yaml_is_refused_without_a_traceback(tmp_path: Path, line: str) -> None:
    """Tags, cycles, merge keys, impossible dates, numbers out of range and a key spelled in two
    ways are user errors."""
    file = tmp_path / "config.yaml"
    file.write_text(f"output_dir: o\nmodel: {{path: m}}\ndata: {{train: t}}\n{line}\n")
    with pytest.raises(ConfigError):
        load_config(file)


def test_an_override_that_is_no_yaml_is_text(tmp_path: Path) -> None:
    """An override such as an impossible date, which YAML refuses, is taken as text."""
    file = tmp_path / "config.yaml"
    file.write_text("model: {path: m}\ndata: {train: t}\n")
    assert load_config(file, ["--output_dir", "2024-13-45"]).output_dir == "2024-13-45"


def test_variables_of_the_template_are_plain_data(tmp_path: Path) -> None:
    """A mapping of any depth is kept as JSON has it, and written to be read back equal."""
    file = tmp_path / "run.yaml"
    variables = {"enable_thinking": False, "date_string": "2026-01-31", "a": [1, {"b": None}]}
    written = "{enable_thinking: false, date_string: 2026-01-31, a: [1, {b: ~}]}"
    file.write_text(f"{yaml.safe_dump(REQUIRED)}\ndata.template_kwargs: {written}\n")
    config = load_config(file)
    assert config.data.template_kwargs == variables
    file.write_text(dump_config(config))
    assert load_config(file) == config
    for value in ("[a]", "quiet", "{a: !!binary aGk=}", "{a: .inf}"):
        with pytest.raises(ConfigError, match=r"must be a mapping of names to plain values or nu"):
            load_config(file, ["--data.template_kwargs", value])
