"""The training configuration: one frozen dataclass per section, the only owner of every default.

``defaults < YAML file < command line``. YAML values and command-line values go through the same typed reader, so a
mistake gets the same message wherever it was made. Nothing here imports torch: bad settings are refused in
milliseconds.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from qlora_dist.errors import ConfigError
from qlora_dist.saved_adapter import ADAPTER_CONFIG, check_agreement, read_saved_adapter
from qlora_dist.typed import BadEntry, convert, describe, show

IGNORE_INDEX = -100
"""Label of a token that does not count in the loss; the default of PyTorch's cross-entropy."""


@dataclass(frozen=True)
class ModelConfig:
    path: str = ""
    """Folder with safetensors weights, or a hub name. Required."""
    quantization: Literal["nf4", "fp4", "none"] = "nf4"
    """4-bit data type of the frozen base; `none` keeps it in `dtype`."""
    double_quant: bool = True
    """Quantise the quantisation constants too (0.37 bits per parameter less)."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Compute type. Master adapters are always float32."""
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    """Attention implementation; `auto` takes flash_attention_2 on a GPU where its package is installed, blocks of
    queries on a CPU in bfloat16, else the model's own choice: sdpa for most, eager for one that soft-caps its attention
    scores (Gemma 2), which sdpa cannot do. The log says which."""
    trust_remote_code: bool = False
    """Allow Python code shipped with the model to run."""


@dataclass(frozen=True)
class AdapterConfig:
    rank: int = 16
    """LoRA rank r."""
    alpha: float = 32.0
    """LoRA alpha: the update is scaled by alpha / rank."""
    dropout: float = 0.0
    """Dropout on the adapters' input, in [0, 1)."""
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Linear layers that get an adapter: `all-linear`, or a list of module names such as [q_proj, v_proj]."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(rank) instead (rank-stabilised LoRA)."""
    use_dora: bool = False
    """Train the length of each row of the adapted weights as well (DoRA); layers dequantise their base once more."""
    init: Literal["default", "gaussian"] = "default"
    """Initial A: uniform in +-1 / sqrt(in_features), or Gaussian with standard deviation 1 / rank. B starts at zero."""
    path: str | None = None
    """Continue from this adapter, a folder in PEFT format. Keys of this section that are left out are then the
    adapter's (but for `dropout`), and those that are given must agree with it."""


@dataclass(frozen=True)
class Source:
    """One of several training files."""

    path: str
    """File, folder, pattern or hub name, as in `train`."""
    weight: float = 1.0
    """Passes over it in one epoch; with 0.5 the two halves of the file take turns."""


@dataclass(frozen=True)
class DataConfig:
    train: str | tuple[Source, ...] = ""
    """Training data: a JSONL, JSON, CSV, Parquet or Arrow file, a folder or pattern of them, or a hub name
    (owner/name, or owner/name:split). Required. Several are a list of paths, or of {path: FILE, weight: W} where an
    epoch is to pass W times over the file instead of once."""
    eval: str | tuple[str, ...] | None = None
    """Held-out file in the same form, or a list of paths; without it `eval_fraction` may split one off."""
    format: Literal["auto", "messages", "sharegpt", "prompt_completion", "alpaca", "text"] = "auto"
    """How rows are written, see docs/data.md; `auto` recognises it by the columns and says so in the log."""
    max_seq_len: int = 1024
    """Longest sequence in tokens."""
    too_long: Literal["truncate_end", "truncate_start", "split", "drop"] = "truncate_end"
    """What becomes of longer rows: they lose their end, or their start; `split` makes several of plain text (others
    lose their end); or they are dropped. The log counts them."""
    train_on: Literal["completions", "all"] = "completions"
    """Tokens that count in the loss: the assistant's (or the completion's) only, or all. Of `text` rows, always all."""
    max_bad_fraction: float = 0.05
    """Share of a source's rows that may be faulty, in [0, 1): up to it they are left out and counted, beyond it the
    run stops."""
    eval_fraction: float = 0.0
    """Share of each training file's rows held out for evaluation, in [0, 1)."""
    chat_template: str | None = None
    """A Jinja file, the name of one of the tokenizer's templates, or `chatml`, instead of the tokenizer's usual one."""
    cache_dir: str | None = None
    """Folder for tokenised data, which later runs find there; null: `qlora_dist` in the user's cache folder."""
    packing: bool = True
    """Put several samples into each row, up to `max_seq_len`, instead of padding; they do not see each other."""
    group_by_length: bool = False
    """Put rows of like length into the same micro-batches, to pad less; the order stays the same for any number of
    processes."""

    @property
    def sources(self) -> tuple[Source, ...]:
        """The training files and their weights."""
        return (Source(self.train),) if isinstance(self.train, str) else self.train

    @property
    def eval_files(self) -> tuple[str, ...]:
        """The evaluation files; none when evaluation data are split off, or nothing is evaluated."""
        if self.eval is None:
            return ()
        return (self.eval,) if isinstance(self.eval, str) else self.eval


@dataclass(frozen=True)
class OptimConfig:
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"] = "adamw"
    """AdamW with float32 or block-wise 8-bit state; `paged_` state can be evicted to host memory (CUDA)."""
    lr: float = 2e-4
    """Peak learning rate."""
    schedule: Literal["linear", "cosine", "constant"] = "cosine"
    """Learning rate after warm-up: down to zero at the last step, or constant."""
    warmup_steps: int | None = None
    """Optimizer steps of linear warm-up; excludes `warmup_ratio`."""
    warmup_ratio: float | None = None
    """Warm-up as a share of all steps, in [0, 1)."""
    weight_decay: float = 0.0
    """Decoupled weight decay of the adapters."""
    max_grad_norm: float | None = 1.0
    """Clip the global gradient norm to this; null clips nothing."""
    max_steps: int | None = None
    """Optimizer steps of the run; excludes `epochs`."""
    epochs: float | None = None
    """Passes over the training data (all its files, as weighted); 1 when `max_steps` is not given either."""
    micro_batch_size: int = 1
    """Sequences per rank in one forward pass."""
    grad_accum_steps: int = 1
    """Micro-batches per rank in one optimizer step."""
    lora_plus_ratio: float | None = None
    """LoRA+: learning rate of B matrices over that of A matrices; null means equal."""
    max_skipped_steps: int = 10
    """Stop after this many steps in a row whose gradient was not finite; such a step updates nothing."""


@dataclass(frozen=True)
class ParallelConfig:
    backend: Literal["auto", "single", "ddp", "fsdp", "zero2", "zero3"] = "auto"
    """How processes share the work: `single` process, `ddp` (a copy each), `fsdp` (the base sharded), `zero2` and
    `zero3` (DeepSpeed: a copy each with optimizer state sharded, or everything sharded). `auto` follows the launcher:
    one process runs `single`, several run `fsdp`."""
    replicas: int = 1
    """Copies of the sharded base (`fsdp` only): the processes form that many groups of neighbours, each of which
    shards within itself. With one per machine, only adapter gradients cross between machines (HSDP)."""
    cpu_offload: bool = False
    """Keep shards in host memory and copy each layer to the GPU when it runs (`fsdp` and `zero3`)."""
    deepspeed_config: str | None = None
    """DeepSpeed JSON file with tuning options for `zero2` and `zero3`; it may repeat this file's settings, not
    contradict them."""
    check_every: int | None = 100
    """Every N optimizer steps, compare what all processes must have in common: adapters and position in the data."""
    hang_timeout_seconds: int = 1800
    """End a process that has made no progress for so long, with the stack of each of its threads."""


@dataclass(frozen=True)
class MemoryConfig:
    recompute: Literal["auto", "full", "selective", "none"] | int = "auto"
    """What backward computes again: all of every layer (`full`), only what is quick, such as norms and activation
    functions (`selective`), nothing (`none`), or all of the first N layers. `auto` does as little as memory allows."""
    budget_gib: float | None = None
    """What a rank may use for everything, in GiB, with `recompute: auto`; null: what its device has free."""
    offload_activations: bool = False
    """Keep in host memory what a GPU keeps for backward; `recompute: auto` then means `full`, which leaves the least to
    copy."""
    compile: bool = False
    """Let torch.compile make one code of each kind of decoder layer; the first steps then take a minute longer."""


@dataclass(frozen=True)
class CheckpointConfig:
    every: int | None = 100
    """Write a checkpoint every N optimizer steps, besides when the run is stopped and at its end; null: only then."""
    keep: int = 2
    """Newest checkpoints to keep; the one with the best evaluation loss stays as well."""
    resume: str = "auto"
    """`auto` goes on from this run's newest complete checkpoint, `never` starts over, a PATH goes on from that one."""


@dataclass(frozen=True)
class EvalConfig:
    every: int | None = None
    """Evaluate every N optimizer steps besides at the start and at the end."""
    max_batches: int | None = None
    """At most this many micro-batches per rank in one evaluation."""


@dataclass(frozen=True)
class LoggingConfig:
    every: int = 1
    """Log every N optimizer steps."""
    tensorboard: bool = True
    """Write TensorBoard event files."""
    profile_steps: int | None = None
    """Trace this many optimizer steps after the first two, on rank 0, into `output_dir/profile`; null: none."""


@dataclass(frozen=True)
class TrainConfig:
    """Everything a run depends on. Section by section in the order in which the program uses it."""

    output_dir: str = ""
    """Folder of the run. Required."""
    seed: int = 0
    """Seed of data order, adapter initialisation and dropout."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The frozen base model."""
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    """The LoRA adapters, the only part that is trained."""
    data: DataConfig = field(default_factory=DataConfig)
    """Training and evaluation data."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer, schedule and batch."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """Distribution over processes."""
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    """Memory against speed."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """What is kept of a run while it lasts."""
    eval: EvalConfig = field(default_factory=EvalConfig)
    """Evaluation during training."""
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    """What is recorded."""

    @property
    def has_eval(self) -> bool:
        """Whether some data is held out."""
        return bool(self.data.eval_files) or self.data.eval_fraction > 0


# --------------------------------------------------------------------------------------------------------------------
# Reading: YAML text and command-line pairs become one tree of (value, where it was written) leaves.


@dataclass(frozen=True)
class Setting:
    """One value as the user wrote it, with the place to name in an error message."""

    value: Any
    where: str


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a YAML file, apply ``--section.key VALUE`` overrides and check everything.

    Raises:
        ConfigError: the file is missing or not YAML, a key is unknown, or a value is of the wrong type, impossible,
            or contradicts another one.
    """
    settings: dict[str, Setting] = {}
    for key, setting in _read_yaml(Path(path)):
        if key in settings:
            raise ConfigError(f"{setting.where}: {key} is set twice, first at {settings[key].where}. Remove one.")
        settings[key] = setting
    settings.update(_read_overrides(overrides))
    config = _build(TrainConfig, {**_of_saved_adapter(settings), **settings})
    validate(config)
    return config


def dump_config(config: TrainConfig) -> str:
    """The configuration as YAML text that :func:`load_config` reads back to an equal object."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True)


def flatten(config: TrainConfig) -> dict[str, Any]:
    """All settings as one mapping from ``section.key`` to value."""
    return {
        key: getattr(owner, key.rpartition(".")[2])
        for key, owner in (
            (key, config if "." not in key else getattr(config, key.partition(".")[0])) for key in _known_keys()
        )
    }


def _read_yaml(path: Path) -> Iterator[tuple[str, Setting]]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"config file {path} does not exist. Give the path of a YAML file, see configs/.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {path} cannot be read: {error}.") from None
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"config file {path} is not valid YAML: {error}") from None
    if root is None:
        return
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"config file {path} must be a mapping of sections, such as `model:` and `data:`.")
    yield from _walk_yaml(root, path, prefix="")


def _walk_yaml(node: yaml.MappingNode, path: Path, prefix: str) -> Iterator[tuple[str, Setting]]:
    """Yield (dotted key, setting) for each leaf; sections are the keys that hold a dataclass."""
    seen: dict[str, str] = {}
    for key_node, value_node in node.value:
        where = f"{path}:{key_node.start_mark.line + 1}"
        key = prefix + str(_construct(key_node, where))
        if key in seen:
            raise ConfigError(f"{where}: {key} is set twice, first at {seen[key]}. Remove one.")
        seen[key] = where
        if isinstance(value_node, yaml.MappingNode) and key in _sections():
            yield from _walk_yaml(value_node, path, prefix=key + ".")
        elif key in _sections():
            if _construct(value_node, where) is None:
                continue  # a section with nothing (or only comments) under it
            raise ConfigError(f"{where}: {key} is a section: write its keys indented below it, such as `{key}.…`.")
        else:
            yield key, Setting(_construct(value_node, where), where)


def _construct(node: yaml.Node, where: str) -> Any:
    """A YAML node as plain Python data; tags, merge keys and impossible dates are no settings."""
    try:
        return yaml.SafeLoader("").construct_object(node, deep=True)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: this value is not plain YAML ({str(error).splitlines()[0]}).") from None


def _read_overrides(arguments: Sequence[str]) -> Iterator[tuple[str, Setting]]:
    """Yield settings from ``--section.key VALUE`` or ``--section.key=VALUE``; VALUE is read as YAML."""
    pending = list(arguments)
    while pending:
        argument = pending.pop(0)
        if not argument.startswith("--"):
            raise ConfigError(f"unexpected argument {argument!r}. Settings are given as --section.key VALUE.")
        key, has_value, text = argument[2:].partition("=")
        if not has_value:
            if not pending:
                raise ConfigError(f"--{key} has no value. Settings are given as --section.key VALUE.")
            text = pending.pop(0)
        key = key.replace("-", "_")
        try:
            value = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError):
            value = text  # not YAML, so it is meant as it stands
        yield key, Setting(value, f"--{key}")


def _of_saved_adapter(settings: Mapping[str, Setting]) -> dict[str, Setting]:
    """The settings that come with the adapter that is continued from, if one is."""
    path = settings["adapter.path"].value if "adapter.path" in settings else None
    if not isinstance(path, str):
        return {}
    where = str(Path(path) / ADAPTER_CONFIG)
    return {key: Setting(value, where) for key, value in read_saved_adapter(path).settings.items()}


# --------------------------------------------------------------------------------------------------------------------
# Building: from settings to typed dataclasses.


def _sections() -> dict[str, type]:
    hints = typing.get_type_hints(TrainConfig)
    return {name: hint for name, hint in hints.items() if dataclasses.is_dataclass(hint) and isinstance(hint, type)}


def _known_keys() -> list[str]:
    sections = _sections()
    keys = [item.name for item in dataclasses.fields(TrainConfig) if item.name not in sections]
    for name, section in sections.items():
        keys += [f"{name}.{item.name}" for item in dataclasses.fields(section)]
    return keys


def _build(cls: type[TrainConfig], settings: Mapping[str, Setting]) -> TrainConfig:
    known = _known_keys()
    for key, setting in settings.items():
        if key not in known:
            raise ConfigError(_unknown_key(key, setting, known))
    values: dict[str, Any] = {}
    for name, section in _sections().items():
        hints = typing.get_type_hints(section)
        keys = [item.name for item in dataclasses.fields(section) if f"{name}.{item.name}" in settings]
        values[name] = section(**{key: _typed(f"{name}.{key}", settings[f"{name}.{key}"], hints[key]) for key in keys})
    hints = typing.get_type_hints(cls)
    for key, setting in settings.items():
        if "." not in key:
            values[key] = _typed(key, setting, hints[key])
    return cls(**values)


def _unknown_key(key: str, setting: Setting, known: list[str]) -> str:
    where = "" if setting.where.startswith("--") else f"{setting.where}: "
    # A user who writes `learning_rate` or forgets the section still means one of the keys that exist.
    synonyms = {"learning_rate": "lr", "lora_r": "rank", "r": "rank", "batch_size": "micro_batch_size"}
    if key in _sections():
        return f"{where}{key} is a section, not a key. `qlora-dist train --help` lists its keys."
    leaf = key.rpartition(".")[2]
    leaf = synonyms.get(leaf, leaf)
    candidates = [k for k in known if k.rpartition(".")[2] == leaf] or difflib.get_close_matches(key, known, n=1)
    if not candidates:
        leaves = {k.rpartition(".")[2]: k for k in known}
        candidates = [leaves[match] for match in difflib.get_close_matches(leaf, leaves, n=1)]
    hint = f" Did you mean {candidates[0]}?" if candidates else " `qlora-dist train --help` lists all keys."
    return f"{where}unknown key {key}.{hint}"


def _typed(key: str, setting: Setting, hint: Any) -> Any:
    prefix = "" if setting.where.startswith("--") else f"{setting.where}: "
    try:
        return convert(setting.value, hint)
    except BadEntry as error:
        raise ConfigError(f"{prefix}{key}, {error}") from None
    except TypeError:
        reason = _REFUSED.get(f"{key}: {setting.value}", "")
        raise ConfigError(f"{prefix}{key} is {show(setting.value)}, but must be {describe(hint)}.{reason}") from None


_CHANGES_BASE = (
    " {} puts part of each base matrix into the adapter and quantises the rest anew, but the base here keeps the bytes "
    "of its checkpoint: that is what is checked on every rank, and what the saved adapter belongs to."
)
_REFUSED = {
    f"adapter.init: {name}": _CHANGES_BASE.format(title)
    for name, title in (("pissa", "PiSSA"), ("loftq", "LoftQ"), ("olora", "OLoRA"))
}
"""Values that other programs know, and why they cannot be had here."""


# --------------------------------------------------------------------------------------------------------------------
# Checking: values that have the right type and still cannot work.


def validate(config: TrainConfig) -> None:
    """Refuse impossible values and contradicting keys.

    Raises:
        ConfigError: with the key as it is spelled in YAML, its value, the rule and the remedy.
    """
    for key, what in (("model.path", "a model folder or hub name"), ("data.train", "a data file"),
                      ("output_dir", "a folder for the run")):  # fmt: skip
        if not flatten(config)[key]:
            raise ConfigError(f"{key} is missing. Set it to {what}, in the file or with --{key}.")
    for key, value in flatten(config).items():
        _check_range(key, value)
    _check_files("data.train", config.data.sources)
    _check_files("data.eval", [Source(path) for path in config.data.eval_files])
    _check_contradictions(config)


_AT_LEAST_ONE = {
    "adapter.rank", "data.max_seq_len", "optim.max_steps", "optim.micro_batch_size", "optim.grad_accum_steps",
    "eval.every", "eval.max_batches", "logging.every", "parallel.replicas", "parallel.check_every",
    "parallel.hang_timeout_seconds", "checkpoint.every", "checkpoint.keep", "optim.max_skipped_steps",
    "logging.profile_steps",
}  # fmt: skip
_POSITIVE = {
    "adapter.alpha",
    "optim.lr",
    "optim.max_grad_norm",
    "optim.epochs",
    "optim.lora_plus_ratio",
    "memory.budget_gib",
}
_NOT_NEGATIVE = {"optim.warmup_steps", "optim.weight_decay", "seed", "memory.recompute"}
_FRACTION = {"adapter.dropout", "data.eval_fraction", "data.max_bad_fraction", "optim.warmup_ratio"}


def _check_range(key: str, value: Any) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return
    rule = None
    if value != value or value in (float("inf"), float("-inf")):
        rule = "must be a finite number"
    elif key in _AT_LEAST_ONE and value < 1:
        rule = "must be at least 1"
    elif key in _POSITIVE and value <= 0:
        rule = "must be greater than 0"
    elif key in _NOT_NEGATIVE and value < 0:
        rule = "must not be negative"
    elif key == "seed" and value >= 2**31:
        rule = "must be below 2147483648"
    elif key in _FRACTION and not 0 <= value < 1:
        rule = "must be at least 0 and less than 1"
    if rule is None:
        return
    nullable = type(None) in get_args(_hint(key))
    raise ConfigError(f"{key} is {value}, but {rule}{' (or null, to leave it out)' if nullable else ''}.")


def _check_files(key: str, sources: Sequence[Source]) -> None:
    """Refuse an entry without a file, a weight that is no number of passes, and a file that comes twice."""
    entries: dict[str, int] = {}
    for number, source in enumerate(sources, start=1):
        if not source.path:
            raise ConfigError(f"{key}, entry {number}: path is empty. Give a data file, or remove the entry.")
        if not 0 < source.weight < float("inf"):
            raise ConfigError(
                f"{key}, entry {number}: weight is {source.weight:g}, but must be a finite number greater than 0. "
                "To leave a file out, remove its entry."
            )
        first = entries.setdefault(os.path.abspath(source.path), number)
        if first != number:
            hint = " A weight of 2 passes over a file twice per epoch." if key == "data.train" else ""
            raise ConfigError(f"{key}, entries {first} and {number} are the same file, {source.path}. Keep one.{hint}")


def _hint(key: str) -> Any:
    section, _, leaf = key.rpartition(".")
    return typing.get_type_hints(_sections()[section] if section else TrainConfig)[leaf]


def check_backend_reads(config: TrainConfig, backend: str) -> None:
    """Refuse settings that the backend would ignore.

    Raises:
        ConfigError: naming the setting and the backends that read it.
    """
    for key, is_set, readers in (
        ("parallel.replicas", config.parallel.replicas > 1, ("fsdp",)),
        ("parallel.cpu_offload", config.parallel.cpu_offload, ("fsdp", "zero3")),
        ("memory.compile", config.memory.compile, ("single", "ddp", "fsdp", "zero2")),
    ):
        if is_set and backend not in readers:
            raise ConfigError(
                f"{key} is set, but parallel.backend is {backend}, which does not read it. "
                f"Remove {key}, or set parallel.backend: {' or '.join(readers)}."
            )


def _check_contradictions(config: TrainConfig) -> None:
    optim, data = config.optim, config.data
    if optim.max_steps is not None and optim.epochs is not None:
        raise ConfigError(
            f"optim.max_steps ({optim.max_steps}) and optim.epochs ({optim.epochs:g}) both say how long to train. "
            "Keep one and set the other to null."
        )
    if optim.warmup_steps is not None and optim.warmup_ratio is not None:
        raise ConfigError(
            f"optim.warmup_steps ({optim.warmup_steps}) and optim.warmup_ratio ({optim.warmup_ratio:g}) both set the "
            "warm-up. Keep one and set the other to null."
        )
    if optim.max_steps is not None and optim.warmup_steps is not None and optim.warmup_steps >= optim.max_steps:
        raise ConfigError(
            f"optim.warmup_steps ({optim.warmup_steps}) is not shorter than optim.max_steps ({optim.max_steps}): the "
            "learning rate would never reach optim.lr. Shorten the warm-up."
        )
    if data.packing and data.group_by_length:
        raise ConfigError(
            "data.packing and data.group_by_length are both true, but packed rows are all of nearly the same length. "
            "Set one of them to false."
        )
    if data.eval_files and data.eval_fraction > 0:
        raise ConfigError(
            f"data.eval ({', '.join(data.eval_files)}) and data.eval_fraction ({data.eval_fraction:g}) both choose the "
            "evaluation data. Keep one; data.eval_fraction: 0 splits nothing off."
        )
    if config.adapter.path is not None:
        check_agreement(config.adapter.path, read_saved_adapter(config.adapter.path), flatten(config))
    if config.parallel.backend != "auto":
        check_backend_reads(config, config.parallel.backend)
    memory = config.memory
    if memory.budget_gib is not None and (memory.recompute != "auto" or memory.offload_activations):
        why = (
            "memory.offload_activations is true"
            if memory.recompute == "auto"
            else f"memory.recompute is {memory.recompute}"
        )
        raise ConfigError(
            f"memory.budget_gib is {memory.budget_gib:g}, but {why}, so nothing is chosen by it. Remove "
            "memory.budget_gib, or set memory.recompute: auto and memory.offload_activations: false."
        )
    if not config.has_eval and (config.eval.every is not None or config.eval.max_batches is not None):
        raise ConfigError(
            "eval.every or eval.max_batches is set, but there is nothing to evaluate on. "
            "Set data.eval to a file or a list of files, or data.eval_fraction to the share to hold out."
        )
