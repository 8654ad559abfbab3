"""The training configuration: one frozen dataclass per section, the only owner of every default.

Neither torch nor any other heavy library is imported here: bad settings are refused in
milliseconds.

`qlora-dist train --help` prints the docstring of each field, with its line breaks. Where there are
several lines, each has at most 70 characters, which fit into a terminal of 80 columns.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from operator import attrgetter
from typing import Annotated, Any, Literal

from qlora_dist.config.data_names import ColumnName, RoleName

BackendName = Literal["single", "ddp", "fsdp", "zero2", "zero3"]
"""Distribution of the model and the work over processes."""
IGNORE_INDEX = -100
"""Label of a token that does not count in the loss; the default of PyTorch's cross-entropy."""


@dataclass(frozen=True)
class Range:
    """Rule for the finite numbers that a setting accepts; infinity and NaN are always refused."""

    rule: str
    """The rule in words, to follow "KEY is VALUE, but"."""
    holds: Callable[[float], bool]


AT_LEAST_ONE = Range("must be at least 1", lambda value: value >= 1)
POSITIVE = Range("must be greater than 0", lambda value: value > 0)
NOT_NEGATIVE = Range("must not be negative", lambda value: value >= 0)
FRACTION = Range("must be at least 0 and less than 1", lambda value: 0 <= value < 1)
# Accelerate's set_seed hands the seed to NumPy, which refuses numbers from 2**32 on.
SEED = Range(f"must be below {2**31}", lambda value: value < 2**31)


class ReadBy:
    """Backends that read a setting; under any other backend the setting must keep its default."""

    def __init__(self, *backends: BackendName) -> None:
        self.backends = backends


@dataclass(frozen=True)
class ModelConfig:
    path: str = ""
    """Folder with safetensors weights, or a hub name. Required."""
    quantization: Literal["nf4", "fp4", "none"] = "nf4"
    """4-bit data type of the frozen base; `none` keeps it in `dtype`."""
    double_quant: bool = True
    """Quantize the quantization constants too (0.37 bits per parameter less)."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Compute type; `auto` takes the type that the hardware multiplies
    quickly: bfloat16, on GPUs without it float16, on CPUs without it
    float32. The log and the run's config.yaml name the type taken.
    Adapters are always float32."""
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    """Attention implementation; `auto` takes flash_attention_2 on a GPU
    where its package is installed, blocks of queries on a CPU in
    bfloat16, else the model's own choice: sdpa for most models, eager for
    a model that soft-caps its attention scores (Gemma 2), which sdpa
    cannot do. The log says which."""
    trust_remote_code: bool = False
    """Allow Python code shipped with the model to run."""


@dataclass(frozen=True)
class AdapterConfig:
    rank: Annotated[int, AT_LEAST_ONE] = 16
    """LoRA rank r."""
    alpha: Annotated[float, POSITIVE] = 32.0
    """LoRA alpha: the update is scaled by alpha / rank."""
    dropout: Annotated[float, FRACTION] = 0.0
    """Dropout on the adapters' input, in [0, 1)."""
    target_modules: Literal["all-linear", "attention-only"] | tuple[str, ...] = "all-linear"
    """Layers that get an adapter: `all-linear` (experts too), `attention-only`,
    or a list of names such as [q_proj, v_proj, experts.down_proj]."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(rank) instead (rank-stabilized LoRA)."""
    use_dora: bool = False
    """Train the length of each row of the adapted weights as well (DoRA);
    each adapted layer then dequantizes its base once more."""
    init: Literal["default", "gaussian"] = "default"
    """Initial A: uniform in +-1 / sqrt(in_features), or Gaussian with
    standard deviation 1 / rank. B starts at zero."""
    path: str | None = None
    """Continue from this adapter, a folder in PEFT format. Keys of this
    section that are left out then take the adapter's values (except
    `dropout`); keys that are given must agree with it."""


@dataclass(frozen=True)
class Source:
    """One of several training files."""

    path: str
    """File, folder, pattern or hub name, as in `train`."""
    weight: float = 1.0
    """Passes over the file in one epoch; with 0.5 the two halves of the file take turns."""


@dataclass(frozen=True)
class DataConfig:
    train: str | tuple[Source, ...] = ""
    """Training data: a JSONL, JSON, CSV, Parquet or Arrow file, a folder or
    pattern of such files, a saved DatasetDict (FOLDER:split), or a hub
    name (owner/name, owner/name:split or owner/name:config:split).
    Required. For several files give a list of paths, or of {path: FILE,
    weight: W} where an epoch passes W times over the file instead of
    once."""
    eval: str | tuple[str, ...] | None = None
    """Held-out file in the same form, or a list of paths; without it
    `eval_fraction` may split data off."""
    format: Literal["auto", "messages", "sharegpt", "prompt_completion", "alpaca", "text"] = "auto"
    """Format of the rows, see docs/data.md; `auto` recognizes it by the
    columns and names it in the log."""
    columns: dict[ColumnName, str] = field(default_factory=dict)
    """Columns that have another name in the files, as {name here: name in
    the file}, such as {prompt: question, completion: answer}; `role` and
    `content` are keys of each message."""
    roles: dict[RoleName, tuple[str, ...]] = field(default_factory=dict)
    """Names that the files give the roles of turns, one or a list for each
    role, such as {user: human, assistant: [bot, GPT-4]}. Upper and lower
    case differ."""
    max_seq_len: Annotated[int, AT_LEAST_ONE] = 1024
    """Longest sequence in tokens."""
    too_long: Literal["truncate_end", "truncate_start", "split", "drop"] = "truncate_end"
    """Treatment of longer rows: cut off their end, or their start; `split`
    plain text into several rows (other formats lose their end); or drop
    them. The log counts them."""
    train_on: Literal["completions", "all"] = "completions"
    """Tokens that count in the loss: the assistant's (or the completion's)
    only, or all. In `text` rows all tokens count."""
    allow_lost: tuple[Literal["text", "thoughts", "tool_calls", "tools"], ...] | None = None
    """Parts that the chat template may leave out without making the row faulty: `text` of
    a turn, `thoughts` of the last one, `tool_calls`, `tools`. The log counts them."""
    max_bad_fraction: Annotated[float, FRACTION] = 0.05
    """Share of a source's rows that may be faulty, in [0, 1): up to this
    share they are left out and counted, beyond it the run stops."""
    eval_fraction: Annotated[float, FRACTION] = 0.0
    """Share of each training file's rows held out for evaluation, in [0, 1)."""
    chat_template: str | None = None
    """A Jinja file, the name of one of the tokenizer's templates, or
    `chatml`, instead of the tokenizer's usual template."""
    template_date: str | None = None
    """Date, and time, that the chat template is told (2026-01-31 or 2026-01-31T12:00:00); null:
    those of the run's first start, which a run that goes on keeps."""
    template_kwargs: dict[str, Any] | None = None
    """Variables that the chat template is given, such as
    {enable_thinking: false}; saved with the adapter, and given by
    `generate` as well."""
    cache_dir: str | None = None
    """Folder for tokenized data, which later runs find there; null:
    `qlora_dist` in the user's cache folder."""
    packing: bool = True
    """Put several samples into each row, up to `max_seq_len`, instead of
    padding; they do not see each other."""
    group_by_length: bool = False
    """Put rows of similar length into the same micro-batches, to pad less;
    the order stays the same for any number of processes."""

    @property
    def sources(self) -> tuple[Source, ...]:
        """The training files and their weights, also when one path was given."""
        return (Source(self.train),) if isinstance(self.train, str) else self.train

    @property
    def eval_files(self) -> tuple[str, ...]:
        """The evaluation files; empty when evaluation data are split off or there are none."""
        if self.eval is None:
            return ()
        return (self.eval,) if isinstance(self.eval, str) else self.eval


@dataclass(frozen=True)
class OptimConfig:
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"] = "adamw"
    """AdamW with float32 or block-wise 8-bit state; `paged_` state can move
    to host memory (CUDA)."""
    lr: Annotated[float, POSITIVE] = 2e-4
    """Peak learning rate."""
    schedule: Literal["linear", "cosine", "constant"] = "cosine"
    """Learning rate after warm-up: down to zero at the last step, or constant."""
    warmup_steps: Annotated[int | None, NOT_NEGATIVE] = None
    """Optimizer steps of linear warm-up; excludes `warmup_ratio`."""
    warmup_ratio: Annotated[float | None, FRACTION] = None
    """Warm-up as a share of all steps, in [0, 1)."""
    weight_decay: Annotated[float, NOT_NEGATIVE] = 0.0
    """Decoupled weight decay of the adapters."""
    max_grad_norm: Annotated[float | None, POSITIVE] = 1.0
    """Clip the global gradient norm to this; null clips nothing."""
    max_steps: Annotated[int | None, AT_LEAST_ONE] = None
    """Optimizer steps of the run; excludes `epochs`."""
    epochs: Annotated[float | None, POSITIVE] = None
    """Passes over the training data (all files, as weighted); 1 when
    `max_steps` is not given either."""
    micro_batch_size: Annotated[int, AT_LEAST_ONE] = 1
    """Sequences per rank in one forward pass."""
    grad_accum_steps: Annotated[int, AT_LEAST_ONE] = 1
    """Micro-batches per rank in one optimizer step."""
    lora_plus_ratio: Annotated[float | None, POSITIVE] = None
    """LoRA+: learning rate of B matrices over that of A matrices; null means equal."""
    max_skipped_steps: Annotated[int, AT_LEAST_ONE] = 10
    """Stop after this many steps in a row whose gradient was not finite; they update nothing."""


@dataclass(frozen=True)
class ParallelConfig:
    backend: Literal["auto", "single", "ddp", "fsdp", "zero2", "zero3"] = "auto"
    """Distribution of the work over processes: `single` process, `ddp` (a
    copy each), `fsdp` (the base sharded), `zero2` and `zero3` (DeepSpeed:
    a copy each with optimizer state sharded, or everything sharded).
    `auto` follows the launcher: one process runs `single`, several run
    `fsdp`."""
    replicas: Annotated[int, AT_LEAST_ONE, ReadBy("fsdp")] = 1
    """Copies of the sharded base (`fsdp` only): the processes form that many
    groups of neighbors, and each group shards within itself. With one
    copy per machine, only adapter gradients cross between machines
    (HSDP)."""
    cpu_offload: Annotated[bool, ReadBy("fsdp", "zero3")] = False
    """Keep shards in host memory and copy each layer to the GPU when it runs (`fsdp`, `zero3`)."""
    deepspeed_config: str | None = None
    """DeepSpeed JSON file with tuning options for `zero2` and `zero3`; it
    may repeat settings of this configuration, not contradict them."""
    check_every: Annotated[int | None, AT_LEAST_ONE] = 100
    """Every N optimizer steps, check that all processes have equal adapters
    and are at the same position in the data."""
    hang_timeout_seconds: Annotated[int, AT_LEAST_ONE] = 1800
    """End a process that has made no progress for this long, and print the
    stack of each of its threads."""


@dataclass(frozen=True)
class MemoryConfig:
    recompute: Annotated[Literal["auto", "full", "selective", "none"] | int, NOT_NEGATIVE] = "auto"
    """Activations that backward computes again: all of every layer (`full`),
    only quick ones, such as those of norms and activation functions
    (`selective`), none (`none`), or all of the first N layers. `auto`
    recomputes as little as memory allows."""
    budget_gib: Annotated[float | None, POSITIVE] = None
    """Memory that a rank may use in total, in GiB, with `recompute: auto`;
    null: all that its device has free."""
    offload_activations: bool = False
    """Keep the activations that backward needs in host memory instead of GPU
    memory; `recompute: auto` then means `full`, which leaves the least to
    copy."""
    compile: Annotated[bool, ReadBy("single", "ddp", "fsdp", "zero2")] = False
    """Let torch.compile generate one kernel sequence for each kind of
    decoder layer; the first steps then take a minute longer."""


@dataclass(frozen=True)
class CheckpointConfig:
    every: Annotated[int | None, AT_LEAST_ONE] = 100
    """Write a checkpoint every N optimizer steps, and also when the run is
    stopped and at its end; null: only when the run is stopped and at its
    end."""
    keep: Annotated[int, AT_LEAST_ONE] = 2
    """Number of newest checkpoints to keep; the one with the best evaluation loss stays as well."""
    resume: str = "auto"
    """`auto` continues from this run's newest complete checkpoint, `never`
    starts over, a PATH continues from the checkpoint there."""


@dataclass(frozen=True)
class EvalConfig:
    every: Annotated[int | None, AT_LEAST_ONE] = None
    """Evaluate every N optimizer steps, and also at the start and at the end."""
    max_batches: Annotated[int | None, AT_LEAST_ONE] = None
    """At most this many micro-batches per rank in one evaluation."""


@dataclass(frozen=True)
class LoggingConfig:
    every: Annotated[int, AT_LEAST_ONE] = 1
    """Log every N optimizer steps."""
    tensorboard: bool = True
    """Write TensorBoard event files."""
    profile_steps: Annotated[int | None, AT_LEAST_ONE] = None
    """Trace this many optimizer steps after the first two, on rank 0, into
    `output_dir/profile`; null: none."""


@dataclass(frozen=True)
class TrainConfig:
    """All settings of a run, by section in the order in which the program uses them."""

    output_dir: str = ""
    """Folder of the run. Required."""
    seed: Annotated[int, NOT_NEGATIVE, SEED] = 0
    """Seed of data order, adapter initialization and dropout."""
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
    """Memory traded against speed."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Checkpoints that a run writes and goes on from."""
    eval: EvalConfig = field(default_factory=EvalConfig)
    """Evaluation during training."""
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    """Records of the run."""

    @property
    def has_eval(self) -> bool:
        """True if a file or a share of the training data is held out for evaluation."""
        return bool(self.data.eval_files) or self.data.eval_fraction > 0


def flatten(config: TrainConfig) -> dict[str, Any]:
    """Return all settings as one mapping from ``section.key`` to value."""
    return {key: attrgetter(key)(config) for key in known_keys()}


def sections() -> dict[str, Any]:
    """Return the dataclass of each section by the section's name."""
    hints = typing.get_type_hints(TrainConfig)
    return {name: hint for name, hint in hints.items() if dataclasses.is_dataclass(hint)}


def known_keys() -> list[str]:
    """Return the names of all settings as ``section.key``; those of no section come first."""
    of_section = sections()
    keys = [item.name for item in dataclasses.fields(TrainConfig) if item.name not in of_section]
    for name, section in of_section.items():
        keys += [f"{name}.{item.name}" for item in dataclasses.fields(section)]
    return keys


@cache
def mappings() -> frozenset[str]:
    """Return the settings that map names to values; their entries are keys as well."""
    return frozenset(key for key in known_keys() if typing.get_origin(declared(key)[0]) is dict)


@cache  # resolving the annotations of a section takes longer than all checks of its values
def declared(key: str) -> tuple[Any, tuple[Any, ...]]:
    """Return the type that a setting is declared with, and the `Range` and `ReadBy` beside it."""
    section, _, leaf = key.rpartition(".")
    owner = sections()[section] if section else TrainConfig
    hint = typing.get_type_hints(owner, include_extras=True)[leaf]
    if typing.get_origin(hint) is Annotated:
        return typing.get_args(hint)[0], typing.get_args(hint)[1:]
    return hint, ()
