"""The configuration: what is read, what is refused, and how the refusal is worded."""

import dataclasses
import json
import os
import subprocess
import sys
import typing
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_dist import config as config_module
from qlora_dist.config import (
    AdapterConfig,
    DataConfig,
    EvalConfig,
    LoggingConfig,
    MemoryConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    Source,
    TrainConfig,
    dump_config,
    flatten,
    load_config,
    validate,
)
from qlora_dist.errors import ConfigError

REQUIRED = {"output_dir": "out", "model": {"path": "m"}, "data": {"train": "t.jsonl"}}
MINIMAL = TrainConfig(output_dir="out", model=ModelConfig(path="m"), data=DataConfig(train="t.jsonl"))

# Every numeric setting, with values of the right type that must be refused. A test holds that the table is complete.
IMPOSSIBLE = {
    "seed": (-1,),
    "adapter.rank": (0, -1),
    "adapter.alpha": (0, -1.5, float("inf"), float("nan")),
    "adapter.dropout": (-0.1, 1, float("nan")),
    "data.max_seq_len": (0,),
    "data.eval_fraction": (-0.1, 1, float("nan")),
    "data.max_bad_fraction": (-0.1, 1, float("nan")),
    "optim.lr": (0, -1e-4, float("inf"), float("nan")),
    "optim.warmup_steps": (-1,),
    "optim.warmup_ratio": (-0.1, 1),
    "optim.weight_decay": (-0.1, float("inf")),
    "optim.max_grad_norm": (0, -1, float("nan")),
    "optim.max_steps": (0,),
    "optim.epochs": (0, -1, float("inf")),
    "optim.micro_batch_size": (0,),
    "optim.grad_accum_steps": (0,),
    "optim.lora_plus_ratio": (0, -1),
    "memory.recompute": (-1,),
    "memory.budget_gib": (0, -1, float("inf"), float("nan")),
    "eval.every": (0,),
    "eval.max_batches": (0,),
    "logging.every": (0,),
    "logging.profile_steps": (0, -1),
    "parallel.replicas": (0, -1),
    "parallel.check_every": (0, -1),
    "parallel.hang_timeout_seconds": (0, -1),
    "checkpoint.every": (0, -1),
    "checkpoint.keep": (0, -1),
    "optim.max_skipped_steps": (0, -1),
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A config file with the required keys only."""
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(REQUIRED))
    return path


def refusal(path: Path, *overrides: str) -> str:
    """The message with which a config is refused."""
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value)


def field_hint(key: str) -> object:
    """The declared type of a setting."""
    section, _, leaf = key.rpartition(".")
    owner = typing.get_type_hints(TrainConfig)[section] if section else TrainConfig
    return typing.get_type_hints(owner)[leaf]


# -- defaults, file, command line


def test_settings_left_out_have_the_defaults_of_the_dataclasses(file: Path) -> None:
    """A file with the required keys only is the dataclasses' own defaults: nothing else owns a default."""
    assert load_config(file) == MINIMAL


def test_file_overrides_defaults_and_command_line_overrides_file(tmp_path: Path) -> None:
    """defaults < file < command line, setting by setting."""
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
        (["--adapter.target_modules", "[q_proj, v_proj]"], "adapter.target_modules", ("q_proj", "v_proj")),
        (["--adapter.target_modules", "q_proj"], "adapter.target_modules", ("q_proj",)),
        (["--memory.recompute", "3"], "memory.recompute", 3),
        (["--memory.recompute", "none"], "memory.recompute", "none"),
        (["--memory.recompute", "null"], "memory.recompute", "none"),  # people write null for none
        (["--model.quantization", "null"], "model.quantization", "none"),
        (["--seed", "1", "--seed", "2"], "seed", 2),
        (["--data.train", "[a.jsonl, b.jsonl]"], "data.train", (Source("a.jsonl"), Source("b.jsonl"))),
        (
            ["--data.train", "[a.jsonl, {path: b.jsonl, weight: 0.5}, {path: c.jsonl}]"],
            "data.train",
            (Source("a.jsonl"), Source("b.jsonl", 0.5), Source("c.jsonl")),
        ),
        (["--data.eval", "[a.jsonl, b.jsonl]"], "data.eval", ("a.jsonl", "b.jsonl")),
    ],
)
def test_command_line_values_are_yaml(file: Path, arguments: list[str], key: str, expected: object) -> None:
    """An override is read as the same YAML value in the file would be; of two the last one counts."""
    value = flatten(load_config(file, arguments))[key]
    assert value == expected
    assert type(value) is type(expected)


def test_an_empty_section_means_its_defaults(tmp_path: Path) -> None:
    """A section whose keys are all commented out is not an error."""
    path = tmp_path / "run.yaml"
    path.write_text("output_dir: out\nmodel: {path: m}\ndata: {train: t.jsonl}\noptim:\n  # lr: 1.0e-3\n")
    assert load_config(path) == MINIMAL


_text = st.text(st.characters(exclude_categories=["C"]), min_size=1)
_entries = st.builds(Source, _text, st.floats(min_value=0, exclude_min=True, allow_infinity=False))


@settings(deadline=None)
@given(
    output_dir=_text,
    seed=st.integers(0, 2**31 - 1),
    path=_text,
    modules=st.one_of(st.just("all-linear"), st.lists(_text, min_size=1).map(tuple)),
    lr=st.floats(min_value=0, exclude_min=True, allow_infinity=False),
    max_grad_norm=st.none() | st.floats(min_value=1e-300, allow_infinity=False),
    recompute=st.sampled_from(["auto", "full", "selective", "none"]) | st.integers(0, 100),
    tensorboard=st.booleans(),
    sources=_text | st.lists(_entries, min_size=1, unique_by=lambda source: os.path.abspath(source.path)).map(tuple),
    eval_files=st.none() | _text | st.lists(_text, min_size=1, unique_by=os.path.abspath).map(tuple),
)
def test_a_dumped_config_reads_back_equal(
    tmp_path_factory, output_dir, seed, path, modules, lr, max_grad_norm, recompute, tensorboard, sources, eval_files
) -> None:
    """The config.yaml that a run leaves behind is valid input again, and means the same."""
    config = TrainConfig(
        output_dir=output_dir,
        seed=seed,
        model=ModelConfig(path=path),
        adapter=AdapterConfig(target_modules=modules),
        data=DataConfig(train=sources, eval=eval_files),
        optim=OptimConfig(lr=lr, max_grad_norm=max_grad_norm),
        memory=MemoryConfig(recompute=recompute),
        logging=LoggingConfig(tensorboard=tensorboard),
    )
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


# -- unknown keys


@pytest.mark.parametrize(
    ("key", "suggestion"),
    [
        ("optim.learning_rate", "optim.lr"),  # the name other programs use
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
def test_an_unknown_key_suggests_the_one_that_was_meant(file: Path, key: str, suggestion: str) -> None:
    """A key that does not exist is refused, with the nearest one that does."""
    message = refusal(file, f"--{key}", "1")
    assert f"unknown key {key.replace('-', '_')}." in message
    assert f"Did you mean {suggestion}?" in message


def test_an_unknown_key_like_no_other_points_to_the_list(file: Path) -> None:
    """No suggestion is better than a wild one."""
    message = refusal(file, "--xyzzy", "1")
    assert "unknown key xyzzy." in message
    assert "Did you mean" not in message
    assert "--help" in message


# -- where the mistake is


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("  learning_rate: 1.0", "unknown key optim.learning_rate"),
        ("  lr: fast", "optim.lr is 'fast', but must be a number"),
        ("  lr: [1, 2]", "optim.lr is [1, 2], but must be a number"),
    ],
)
def test_a_mistake_in_the_file_is_named_by_file_and_line(tmp_path: Path, line: str, message: str) -> None:
    """The message starts with FILE:LINE, as compilers write it."""
    path = tmp_path / "run.yaml"
    path.write_text(f"output_dir: out\nmodel:\n  path: m\ndata:\n  train: t\noptim:\n  max_steps: 1\n{line}\n")
    assert refusal(path).startswith(f"{path}:8: {message}")


def test_a_mistake_on_the_command_line_names_no_file(file: Path) -> None:
    """The file is not blamed for what an override said."""
    assert refusal(file, "--optim.lr", "fast") == "optim.lr is 'fast', but must be a number."


@pytest.mark.parametrize(
    ("text", "line", "key"),
    [
        ("seed: 1\nseed: 2\n", 2, "seed"),
        ("optim:\n  lr: 1\n  lr: 2\n", 3, "optim.lr"),
        ("optim:\n  lr: 1\noptim:\n  max_steps: 2\n", 3, "optim"),
    ],
)
def test_a_key_set_twice_is_refused(tmp_path: Path, text: str, line: int, key: str) -> None:
    """YAML readers silently take the last of two equal keys; here both lines are named."""
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


@pytest.mark.parametrize("text", ["- a\n- b\n", "just text\n", "a: [\n", "a: b: c\n", "a: 1\n---\nb: 2\n", "\x00"])
def test_a_file_that_is_no_yaml_mapping_is_refused(tmp_path: Path, text: str) -> None:
    """Broken YAML, and YAML that is something else, are user errors that name the file."""
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
def test_a_malformed_override_is_refused(file: Path, arguments: list[str], message: str) -> None:
    """A word that belongs to no setting is not skipped."""
    assert message in refusal(file, *arguments)


# -- types


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
        ("data.eval", "{a: 1}", "text or a list of names or null"),
        ("data.eval", "[]", "text or a list of names or null"),
        ("data.eval", "[{path: e.jsonl, weight: 2}]", "text or a list of names or null"),
        ("data.train", "[]", "text or a list whose entries are names or {path: …, weight: …}"),
        ("data.train", "{path: a, weight: 2}", "text or a list whose entries are names or {path: …, weight: …}"),
        ("data.train", "null", "text or a list whose entries are names or {path: …, weight: …}"),
        ("model.dtype", "float16", "bfloat16 or float32"),
        ("model.quantization", "int8", "nf4, fp4 or none"),
        ("optim.schedule", "1", "linear, cosine or constant"),
        ("adapter.target_modules", "[]", "all-linear or a list of names"),
        ("adapter.target_modules", "[[a]]", "all-linear or a list of names"),
        ("memory.recompute", "some", "auto, full, selective or none or a whole number"),
        ("memory.recompute", "true", "auto, full, selective or none or a whole number"),
        ("memory.recompute", "1.5", "auto, full, selective or none or a whole number"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused(file: Path, key: str, value: str, rule: str) -> None:
    """The message says what the value is and what it must be; true and false are never numbers."""
    message = refusal(file, f"--{key}", value)
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
            (f"{{path: b, weight: {weight}}}", f"weight is {shown}, but must be a finite number greater than 0. "
             "To leave a file out, remove its entry.")
            for weight, shown in (("0", "0"), ("-0.5", "-0.5"), (".inf", "inf"), (".nan", "nan"))
        ),
    ],
)  # fmt: skip
def test_a_mistake_in_one_of_several_files_names_the_entry(file: Path, entry: str, message: str) -> None:
    """Entries count from 1; the message says what is wrong with that one, not with the list."""
    assert refusal(file, "--data.train", f"[a, {entry}]") == f"data.train, entry 2: {message}"


def test_a_mistake_in_an_entry_is_named_by_file_and_line(tmp_path: Path) -> None:
    """The line is that of the list's key."""
    path = tmp_path / "run.yaml"
    path.write_text("output_dir: out\nmodel: {path: m}\ndata:\n  train:\n  - a.jsonl\n  - {file: b.jsonl}\n")
    assert refusal(path).startswith(f"{path}:4: data.train, entry 2: unknown key file.")


@pytest.mark.parametrize(
    ("key", "value", "path"),
    [
        ("data.train", "[a.jsonl, b.jsonl, {path: ./a.jsonl, weight: 2}]", "./a.jsonl"),
        ("data.eval", "[a.jsonl, b.jsonl, a.jsonl]", "a.jsonl"),
    ],
)
def test_a_file_that_comes_twice_is_refused(file: Path, key: str, value: str, path: str) -> None:
    """Twice the same file is a slip, or meant as a weight."""
    message = refusal(file, f"--{key}", value)
    assert message.startswith(f"{key}, entries 1 and 3 are the same file, {path}. Keep one.")
    assert ("weight of 2" in message) == (key == "data.train")


def test_one_file_and_several_look_alike_to_their_readers() -> None:
    """`sources` and `eval_files` are lists, whichever way the configuration was written."""
    assert DataConfig(train="a").sources == (Source("a", 1.0),)
    assert DataConfig(train=(Source("a", 2.0), Source("b"))).sources == (Source("a", 2.0), Source("b"))
    files = [DataConfig(train="a", eval=value).eval_files for value in (None, "e", ("e", "f"))]
    assert files == [(), ("e",), ("e", "f")]


@pytest.mark.parametrize(("text", "expected"), [("2e-4", 2e-4), ("1E5", 1e5), ("3", 3.0), ("'0.5'", 0.5)])
def test_numbers_that_yaml_reads_as_text_are_numbers(tmp_path: Path, text: str, expected: float) -> None:
    """YAML 1.1 takes 2e-4 for text since it has no dot; a learning rate written so is accepted as a float."""
    path = tmp_path / "run.yaml"
    path.write_text(f"output_dir: out\nmodel: {{path: m}}\ndata: {{train: t.jsonl}}\noptim:\n  lr: {text}\n")
    lr = load_config(path).optim.lr
    assert lr == expected
    assert type(lr) is float


def test_numeric_names_are_text(file: Path) -> None:
    """`--output_dir 7` is the folder `7`."""
    assert load_config(file, ["--output_dir", "7"]).output_dir == "7"


# -- rules


def test_every_number_has_a_rule() -> None:
    """The table of impossible values above covers each setting that can be a number."""
    numeric = {key for key in flatten(MINIMAL) if {int, float} & {field_hint(key), *typing.get_args(field_hint(key))}}
    assert numeric == set(IMPOSSIBLE)


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in IMPOSSIBLE.items() for value in values])
def test_an_impossible_number_is_refused(file: Path, key: str, value: float) -> None:
    """The message names key, value and rule, and offers null where null means to leave it out."""
    text = yaml.safe_dump(value).splitlines()[0]
    with_eval = ["--data.eval", "e.jsonl"] if key.startswith("eval.") else []
    message = refusal(file, f"--{key}", text, *with_eval)
    assert message.startswith(f"{key} is ")
    assert " must " in message
    assert ("null" in message) == (type(None) in typing.get_args(field_hint(key)))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("adapter.rank", 1), ("adapter.dropout", 0), ("adapter.dropout", 0.99), ("data.eval_fraction", 0),
        ("optim.warmup_steps", 0), ("optim.warmup_ratio", 0), ("optim.weight_decay", 0), ("optim.epochs", 0.01),
        ("optim.max_steps", 1), ("memory.recompute", 0), ("seed", 0), ("logging.every", 1),
    ],
)  # fmt: skip
def test_the_edge_of_a_rule_is_allowed(file: Path, key: str, value: float) -> None:
    """The smallest or largest value that makes sense is accepted."""
    assert flatten(load_config(file, [f"--{key}", str(value)]))[key] == value


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"optim.max_steps": 5, "optim.epochs": 1}, ("optim.max_steps", "optim.epochs")),
        ({"optim.warmup_steps": 5, "optim.warmup_ratio": 0.1}, ("optim.warmup_steps", "optim.warmup_ratio")),
        ({"optim.warmup_steps": 0, "optim.warmup_ratio": 0}, ("optim.warmup_steps", "optim.warmup_ratio")),
        ({"optim.warmup_steps": 6, "optim.max_steps": 5}, ("optim.warmup_steps", "optim.max_steps")),
        ({"data.eval": "e.jsonl", "data.eval_fraction": 0.1}, ("data.eval", "data.eval_fraction")),
        ({"data.eval": ["e.jsonl", "f.jsonl"], "data.eval_fraction": 0.1}, ("e.jsonl, f.jsonl", "data.eval_fraction")),
        ({"data.packing": True, "data.group_by_length": True}, ("data.packing", "data.group_by_length")),
        ({"eval.every": 5}, ("eval.every", "data.eval", "data.eval_fraction")),
        ({"eval.max_batches": 5}, ("eval.max_batches", "data.eval", "data.eval_fraction")),
        ({"parallel.replicas": 2, "parallel.backend": "ddp"}, ("parallel.replicas", "parallel.backend")),
        ({"parallel.replicas": 2, "parallel.backend": "single"}, ("parallel.replicas", "parallel.backend")),
        ({"parallel.replicas": 2, "parallel.backend": "zero3"}, ("parallel.replicas", "parallel.backend")),
        ({"parallel.cpu_offload": True, "parallel.backend": "ddp"}, ("parallel.cpu_offload", "parallel.backend")),
        ({"memory.budget_gib": 3, "memory.recompute": "full"}, ("memory.budget_gib", "memory.recompute")),
        (
            {"memory.budget_gib": 3, "memory.offload_activations": True},
            ("memory.budget_gib", "memory.offload_activations"),
        ),
        ({"parallel.cpu_offload": True, "parallel.backend": "zero2"}, ("parallel.cpu_offload", "parallel.backend")),
        ({"memory.compile": True, "parallel.backend": "zero3"}, ("memory.compile", "parallel.backend")),
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    file: Path, settings: dict[str, object], named: tuple[str, ...]
) -> None:
    """Each setting alone is possible, together they are not, and the message names all of them."""
    message = refusal(file, *(word for key, value in settings.items() for word in (f"--{key}", str(value))))
    for key in named:
        assert key in message


def test_evaluation_settings_are_allowed_with_something_to_evaluate_on(file: Path) -> None:
    """Either a file or a held-out share makes `eval.every` meaningful."""
    for source in (["--data.eval", "e.jsonl"], ["--data.eval_fraction", "0.1"]):
        config = load_config(file, ["--eval.every", "5", *source])
        assert config.has_eval
        assert config.eval == EvalConfig(every=5)
    assert not MINIMAL.has_eval


@pytest.mark.parametrize("backend", ["auto", "fsdp"])
def test_settings_of_sharding_are_allowed_where_the_base_is_sharded(file: Path, backend: str) -> None:
    """Copies and offloading belong to `fsdp`, which `auto` may become."""
    arguments = ["--parallel.replicas", "2", "--parallel.cpu_offload", "true", "--parallel.backend", backend]
    assert load_config(file, arguments).parallel == ParallelConfig(backend=backend, replicas=2, cpu_offload=True)


def write_adapter(folder: Path, base: Path, recipe: dict | None = None, **changes: object) -> Path:
    """An adapter folder as far as its description goes: rank 8, alpha 16, on two kinds of layers of `base`."""
    folder.mkdir(exist_ok=True)
    (folder / "adapter_model.safetensors").touch()
    config = {
        "peft_type": "LORA", "r": 8, "lora_alpha": 16, "lora_dropout": 0.1, "target_modules": ["v_proj", "q_proj"],
        "use_rslora": True, "use_dora": True, "base_model_name_or_path": str(base), "bias": "none", "rank_pattern": {},
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps({**config, **changes}))
    if recipe is not None:
        (folder / "qlora_dist.json").write_text(json.dumps({"base": recipe}))
    return folder


def test_an_adapter_that_is_continued_brings_its_settings(file: Path, tmp_path: Path) -> None:
    """Keys that are left out are the adapter's, except dropout; keys that agree with it may be given; and the dumped
    configuration, which has them all, is valid input again."""
    adapter = write_adapter(tmp_path / "adapter", base=Path("m").absolute(), recipe={"quantization": "nf4"})
    config = load_config(file, ["--adapter.path", str(adapter)])
    assert config.adapter == AdapterConfig(
        rank=8, alpha=16.0, target_modules=("v_proj", "q_proj"), use_rslora=True, use_dora=True, path=str(adapter)
    )
    (tmp_path / "again.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "again.yaml") == config
    agreeing = ["--adapter.rank", "8", "--adapter.target_modules", "[q_proj, v_proj]", "--adapter.dropout", "0.5"]
    assert load_config(file, ["--adapter.path", str(adapter), *agreeing]).adapter.dropout == 0.5


@pytest.mark.parametrize(
    ("key", "value", "there"),
    [
        ("adapter.rank", "16", "rank: 8"), ("adapter.alpha", "8", "alpha: 16"),
        ("adapter.use_rslora", "false", "use_rslora: true"), ("adapter.use_dora", "false", "use_dora: true"),
        ("adapter.target_modules", "[q_proj]", "target_modules: [q_proj, v_proj]"),
        ("model.path", "other", "trained on"), ("model.quantization", "none", "quantization: nf4"),
        ("model.double_quant", "false", "double_quant: true"), ("adapter.init", "gaussian", "gives the initial values"),
    ],
)  # fmt: skip
def test_a_setting_that_contradicts_the_adapter_is_refused(
    file: Path, tmp_path: Path, key: str, value: str, there: str
) -> None:
    """With both values and what to set; in a configuration made in Python as well."""
    recipe = {"quantization": "nf4", "double_quant": True}
    adapter = write_adapter(tmp_path / "adapter", base=Path("m").absolute(), recipe=recipe)
    message = refusal(file, "--adapter.path", str(adapter), f"--{key}", value)
    assert message.startswith(f"{key} is {value}, but")
    assert str(adapter) in message
    assert there in message
    with pytest.raises(ConfigError, match=r"adapter\.rank is 16, but .* has 8"):
        validate(dataclasses.replace(MINIMAL, adapter=AdapterConfig(path=str(adapter))))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "type IA3"),
        ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4', which changes the base"),
        ({"target_modules": ".*_proj"}, "pattern '.*_proj'"),
        ({"rank_pattern": {"q_proj": 4}}, 'rank_pattern: {"q_proj": 4}'),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "bias"),
        ({"r": "eight"}, "adapter.rank is 'eight'"),
    ],
)
def test_an_adapter_of_another_kind_is_refused(file: Path, tmp_path: Path, changes: dict, message: str) -> None:
    """What this program does not train is not dropped silently."""
    adapter = write_adapter(tmp_path / "adapter", base=Path("m").absolute(), **changes)
    assert message in refusal(file, "--adapter.path", str(adapter))


def test_a_folder_without_an_adapter_is_refused(file: Path, tmp_path: Path) -> None:
    """Missing, empty, one level too high (then the right one is suggested), or with a broken file."""
    assert "is not a folder" in refusal(file, "--adapter.path", str(tmp_path / "none"))
    assert "has no adapter_config.json" in refusal(file, "--adapter.path", str(tmp_path))
    write_adapter(tmp_path / "adapter", base=Path("m"))
    assert f"Did you mean {tmp_path / 'adapter'}?" in refusal(file, "--adapter.path", str(tmp_path))
    (tmp_path / "adapter" / "adapter_config.json").write_text("{")
    assert "not readable JSON" in refusal(file, "--adapter.path", str(tmp_path / "adapter"))


@pytest.mark.parametrize(("init", "name"), [("pissa", "PiSSA"), ("loftq", "LoftQ"), ("olora", "OLoRA")])
def test_initialisations_that_change_the_base_are_refused_by_name(file: Path, init: str, name: str) -> None:
    """The message says why, and what there is instead."""
    message = refusal(file, "--adapter.init", init)
    assert message.startswith(f"adapter.init is {init!r}, but must be default or gaussian. {name} ")
    assert "keeps the bytes of its checkpoint" in message


@pytest.mark.parametrize("key", ["model.path", "data.train", "output_dir"])
def test_a_missing_required_setting_is_named(file: Path, key: str) -> None:
    """Without model, data or output folder there is no run; the message says where to set it."""
    message = refusal(file, f"--{key}", "''")
    assert message.startswith(f"{key} is missing.")
    assert f"--{key}" in message


def test_a_config_made_in_python_is_checked_alike() -> None:
    """`validate` refuses what `load_config` refuses."""
    validate(MINIMAL)
    with pytest.raises(ConfigError, match=r"optim\.lr is -1"):
        validate(dataclasses.replace(MINIMAL, optim=OptimConfig(lr=-1.0)))


# -- the module itself


def test_every_section_is_frozen() -> None:
    """A running program cannot change its own settings."""
    for name, value in [("config", MINIMAL), *vars(MINIMAL).items()]:
        if dataclasses.is_dataclass(value):
            first = dataclasses.fields(value)[0].name
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(value, first, None)
        else:
            assert name in ("output_dir", "seed")


def test_bad_settings_are_refused_without_loading_a_library() -> None:
    """Importing the config module and the command line pulls in neither torch nor transformers nor peft."""
    heavy = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "datasets")
    code = f"import sys, {config_module.__name__}, qlora_dist.cli; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


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
    """Tags, cycles, merge keys, impossible dates, numbers beyond range, one key spelled in two ways."""
    file = tmp_path / "config.yaml"
    file.write_text(f"output_dir: o\nmodel: {{path: m}}\ndata: {{train: t}}\n{line}\n")
    with pytest.raises(ConfigError):
        load_config(file)


def test_an_override_that_is_no_yaml_is_text(tmp_path: Path) -> None:
    """A folder may be called like an impossible date."""
    file = tmp_path / "config.yaml"
    file.write_text("model: {path: m}\ndata: {train: t}\n")
    assert load_config(file, ["--output_dir", "2024-13-45"]).output_dir == "2024-13-45"
