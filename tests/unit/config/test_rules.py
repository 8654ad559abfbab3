"""Settings of the right type that cannot work, and the wording of their refusal."""

import dataclasses
import json
import typing
from pathlib import Path

import pytest
import yaml

from qlora_dist.config.load import dump_config, load_config
from qlora_dist.config.rules import validate
from qlora_dist.config.schema import (
    AdapterConfig,
    EvalConfig,
    OptimConfig,
    ParallelConfig,
    declared,
    flatten,
)
from qlora_dist.errors import ConfigError
from tests.support.settings import MINIMAL, refusal

# Every numeric setting, with values of the right type that must be refused. A test checks that the
# table is complete.
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


def test_every_number_has_a_rule() -> None:
    """The table of impossible values above covers each setting that can be a number."""
    numeric = {
        key
        for key in flatten(MINIMAL)
        if {int, float} & {declared(key)[0], *typing.get_args(declared(key)[0])}
    }
    assert numeric == set(IMPOSSIBLE)


@pytest.mark.parametrize(
    ("key", "value"), [(key, value) for key, values in IMPOSSIBLE.items() for value in values]
)
def test_an_impossible_number_is_refused(config_file: Path, key: str, value: float) -> None:
    """The message names key, value and rule, and offers null where null leaves the setting out."""
    text = yaml.safe_dump(value).splitlines()[0]
    with_eval = ["--data.eval", "e.jsonl"] if key.startswith("eval.") else []
    message = refusal(config_file, f"--{key}", text, *with_eval)
    assert message.startswith(f"{key} is ")
    assert " must " in message
    assert ("null" in message) == (type(None) in typing.get_args(declared(key)[0]))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("adapter.rank", 1),
        ("adapter.dropout", 0),
        ("adapter.dropout", 0.99),
        ("data.eval_fraction", 0),
        ("optim.warmup_steps", 0),
        ("optim.warmup_ratio", 0),
        ("optim.weight_decay", 0),
        ("optim.epochs", 0.01),
        ("optim.max_steps", 1),
        ("memory.recompute", 0),
        ("seed", 0),
        ("logging.every", 1),
    ],
)
def test_the_edge_of_a_rule_is_allowed(config_file: Path, key: str, value: float) -> None:
    """The smallest or largest value that makes sense is accepted."""
    assert flatten(load_config(config_file, [f"--{key}", str(value)]))[key] == value


@pytest.mark.parametrize(
    ("key", "value", "path"),
    [
        ("data.train", "[a.jsonl, b.jsonl, {path: ./a.jsonl, weight: 2}]", "./a.jsonl"),
        ("data.eval", "[a.jsonl, b.jsonl, a.jsonl]", "a.jsonl"),
    ],
)
def test_a_file_that_comes_twice_is_refused(
    config_file: Path, key: str, value: str, path: str
) -> None:
    """A file given twice is refused, as a slip, or with the weight that was meant."""
    message = refusal(config_file, f"--{key}", value)
    assert message.startswith(f"{key}, entries 1 and 3 are the same file, {path}. Keep one.")
    assert ("weight of 2" in message) == (key == "data.train")


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"optim.max_steps": 5, "optim.epochs": 1}, ("optim.max_steps", "optim.epochs")),
        (
            {"optim.warmup_steps": 5, "optim.warmup_ratio": 0.1},
            ("optim.warmup_steps", "optim.warmup_ratio"),
        ),
        (
            {"optim.warmup_steps": 0, "optim.warmup_ratio": 0},
            ("optim.warmup_steps", "optim.warmup_ratio"),
        ),
        (
            {"optim.warmup_steps": 6, "optim.max_steps": 5},
            ("optim.warmup_steps", "optim.max_steps"),
        ),
        ({"data.eval": "e.jsonl", "data.eval_fraction": 0.1}, ("data.eval", "data.eval_fraction")),
        (
            {"data.eval": ["e.jsonl", "f.jsonl"], "data.eval_fraction": 0.1},
            ("e.jsonl, f.jsonl", "data.eval_fraction"),
        ),
        (
            {"data.packing": True, "data.group_by_length": True},
            ("data.packing", "data.group_by_length"),
        ),
        ({"eval.every": 5}, ("eval.every", "data.eval", "data.eval_fraction")),
        ({"eval.max_batches": 5}, ("eval.max_batches", "data.eval", "data.eval_fraction")),
        (
            {"parallel.replicas": 2, "parallel.backend": "ddp"},
            ("parallel.replicas", "parallel.backend"),
        ),
        (
            {"parallel.replicas": 2, "parallel.backend": "single"},
            ("parallel.replicas", "parallel.backend"),
        ),
        (
            {"parallel.replicas": 2, "parallel.backend": "zero3"},
            ("parallel.replicas", "parallel.backend"),
        ),
        (
            {"parallel.cpu_offload": True, "parallel.backend": "ddp"},
            ("parallel.cpu_offload", "parallel.backend"),
        ),
        (
            {"memory.budget_gib": 3, "memory.recompute": "full"},
            ("memory.budget_gib", "memory.recompute"),
        ),
        (
            {"memory.budget_gib": 3, "memory.offload_activations": True},
            ("memory.budget_gib", "memory.offload_activations"),
        ),
        (
            {"parallel.cpu_offload": True, "parallel.backend": "zero2"},
            ("parallel.cpu_offload", "parallel.backend"),
        ),
        (
            {"memory.compile": True, "parallel.backend": "zero3"},
            ("memory.compile", "parallel.backend"),
        ),
        (
            {"memory.compile": True, "memory.recompute": "selective"},
            ("memory.compile", "memory.recompute"),
        ),
        (
            {"model.attention": "flash_attention_2", "model.dtype": "float32"},
            ("model.attention", "model.dtype: bfloat16"),
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    config_file: Path, settings: dict[str, object], named: tuple[str, ...]
) -> None:
    """Settings that are possible only one at a time are refused with the names of all."""
    message = refusal(
        config_file, *(word for key, value in settings.items() for word in (f"--{key}", str(value)))
    )
    for key in named:
        assert key in message


def test_evaluation_settings_are_allowed_with_something_to_evaluate_on(config_file: Path) -> None:
    """Either a file or a held-out share makes `eval.every` meaningful."""
    for source in (["--data.eval", "e.jsonl"], ["--data.eval_fraction", "0.1"]):
        config = load_config(config_file, ["--eval.every", "5", *source])
        assert config.has_eval
        assert config.eval == EvalConfig(every=5)
    assert not MINIMAL.has_eval


@pytest.mark.parametrize("backend", ["auto", "fsdp"])
def test_settings_of_sharding_are_allowed_where_the_base_is_sharded(
    config_file: Path, backend: str
) -> None:
    """`fsdp`, and `auto`, which may become `fsdp`, accept copies and offloading of shards."""
    arguments = [
        "--parallel.replicas",
        "2",
        "--parallel.cpu_offload",
        "true",
        "--parallel.backend",
        backend,
    ]
    assert load_config(config_file, arguments).parallel == ParallelConfig(
        backend=backend, replicas=2, cpu_offload=True
    )


def write_adapter(folder: Path, base: Path, recipe: dict | None = None, **changes: object) -> Path:
    """Write the description of an adapter: rank 8, alpha 16, on two kinds of layers of `base`."""
    folder.mkdir(exist_ok=True)
    (folder / "adapter_model.safetensors").touch()
    config = {
        "peft_type": "LORA",
        "r": 8,
        "lora_alpha": 16,
        "lora_dropout": 0.1,
        "target_modules": ["v_proj", "q_proj"],
        "use_rslora": True,
        "use_dora": True,
        "base_model_name_or_path": str(base),
        "bias": "none",
        "rank_pattern": {},
    }
    (folder / "adapter_config.json").write_text(json.dumps({**config, **changes}))
    if recipe is not None:
        (folder / "qlora_dist.json").write_text(json.dumps({"base": recipe}))
    return folder


def test_an_adapter_that_is_continued_brings_its_settings(
    config_file: Path, tmp_path: Path
) -> None:
    """Keys that are left out take the adapter's values, except dropout; keys that agree with it may
    be given. The dumped configuration, which has them all, is valid input."""
    adapter = write_adapter(
        tmp_path / "adapter", base=Path("m").absolute(), recipe={"quantization": "nf4"}
    )
    config = load_config(config_file, ["--adapter.path", str(adapter)])
    assert config.adapter == AdapterConfig(
        rank=8,
        alpha=16.0,
        target_modules=("v_proj", "q_proj"),
        use_rslora=True,
        use_dora=True,
        path=str(adapter),
    )
    (tmp_path / "again.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "again.yaml") == config
    agreeing = [
        "--adapter.rank",
        "8",
        "--adapter.target_modules",
        "[q_proj, v_proj]",
        "--adapter.dropout",
        "0.5",
    ]
    assert (
        load_config(config_file, ["--adapter.path", str(adapter), *agreeing]).adapter.dropout == 0.5
    )


@pytest.mark.parametrize(
    ("key", "value", "there"),
    [
        ("adapter.rank", "16", "rank: 8"),
        ("adapter.alpha", "8", "alpha: 16"),
        ("adapter.use_rslora", "false", "use_rslora: true"),
        ("adapter.use_dora", "false", "use_dora: true"),
        ("adapter.target_modules", "[q_proj]", "target_modules: [q_proj, v_proj]"),
        ("model.path", "other", "trained on"),
        ("model.quantization", "none", "quantization: nf4"),
        ("model.double_quant", "false", "double_quant: true"),
        ("adapter.init", "gaussian", "gives the initial values"),
    ],
)
def test_a_setting_that_contradicts_the_adapter_is_refused(
    config_file: Path, tmp_path: Path, key: str, value: str, there: str
) -> None:
    """The message has both values and the remedy, also for a configuration made in Python."""
    recipe = {"quantization": "nf4", "double_quant": True}
    adapter = write_adapter(tmp_path / "adapter", base=Path("m").absolute(), recipe=recipe)
    message = refusal(config_file, "--adapter.path", str(adapter), f"--{key}", value)
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
def test_an_adapter_of_another_kind_is_refused(
    config_file: Path, tmp_path: Path, changes: dict, message: str
) -> None:
    """An adapter with options that this program does not train is refused, not cut down."""
    adapter = write_adapter(tmp_path / "adapter", base=Path("m").absolute(), **changes)
    assert message in refusal(config_file, "--adapter.path", str(adapter))


def test_a_folder_without_an_adapter_is_refused(config_file: Path, tmp_path: Path) -> None:
    """A folder that is missing, empty, one level too high or with a broken file is refused; one
    level too high, with a suggestion."""
    assert "is not a folder" in refusal(config_file, "--adapter.path", str(tmp_path / "none"))
    assert "has no adapter_config.json" in refusal(config_file, "--adapter.path", str(tmp_path))
    write_adapter(tmp_path / "adapter", base=Path("m"))
    assert f"Did you mean {tmp_path / 'adapter'}?" in refusal(
        config_file, "--adapter.path", str(tmp_path)
    )
    (tmp_path / "adapter" / "adapter_config.json").write_text("{")
    assert "not readable JSON" in refusal(config_file, "--adapter.path", str(tmp_path / "adapter"))


@pytest.mark.parametrize("key", ["model.path", "data.train", "output_dir"])
def test_a_missing_required_setting_is_named(config_file: Path, key: str) -> None:
    """A run without model, data or output folder is refused with the way to set it."""
    message = refusal(config_file, f"--{key}", "''")
    assert message.startswith(f"{key} is missing.")
    assert f"--{key}" in message


def test_a_config_made_in_python_is_checked_alike() -> None:
    """`validate` refuses what `load_config` refuses."""
    validate(MINIMAL)
    with pytest.raises(ConfigError, match=r"optim\.lr is -1"):
        validate(dataclasses.replace(MINIMAL, optim=OptimConfig(lr=-1.0)))


@pytest.mark.parametrize(
    ("variables", "why"),
    [
        ("{messages: []}", "messages, but cannot: the rows give it. Remove messages."),
        ("{tools: []}", "tools, but cannot: the rows give it, in a column"),
        ("{add_generation_prompt: true}", "add_generation_prompt, but cannot: training and"),
        ("{tokenize: false}", "tokenize, but cannot: training tokenizes by itself"),
        ("{strftime_now: x}", "data.template_date sets the date"),
        ("{return_tensors: pt}", "an option of the tokenizer, not of the template"),
        ("{eos_token: x}", "eos_token, but cannot: the tokenizer gives it"),
        ("{enable-thinking: false}", "a variable's name has letters, digits and _ only"),
    ],
)
def test_reserved_names_are_no_variables_of_the_template(
    config_file: Path, variables: str, why: str
) -> None:
    """A variable that something else sets is refused, with the place where it comes from."""
    with pytest.raises(ConfigError) as caught:
        load_config(config_file, ["--data.template_kwargs", variables])
    assert str(caught.value).startswith("data.template_kwargs sets ")
    assert why in str(caught.value)
