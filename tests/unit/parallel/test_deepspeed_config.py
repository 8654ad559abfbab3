"""DeepSpeed's configuration: settings of the run, tuning options of the user, no contradictions."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from qlora_dist.config.schema import ModelConfig, OptimConfig, ParallelConfig, TrainConfig
from qlora_dist.errors import ConfigError, LaunchError
from qlora_dist.parallel.choice import choose_backend
from qlora_dist.parallel.deepspeed_config import run_settings, zero_settings

CONFIG = TrainConfig(
    model=ModelConfig(dtype="bfloat16"),
    optim=OptimConfig(micro_batch_size=2, grad_accum_steps=3, lr=1e-4, schedule="linear"),
)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "ds.json"


def settings(file: Path, content: object, config: TrainConfig = CONFIG, stage: int = 3) -> dict:
    """DeepSpeed's configuration on four processes, with `content` as the user's file."""
    file.write_text(json.dumps(content))
    return zero_settings(config, stage=stage, world_size=4, json_file=str(file))


# What a file sets: key, value, and the run's side of the contradiction. All written out, as a user
# would read them.
CONTRADICTIONS = [
    (
        {"train_batch_size": 8},
        "train_batch_size to 8",
        "optim.micro_batch_size 2 x optim.grad_accum_steps 3 x 4 processes is 24",
    ),
    (
        {"train_micro_batch_size_per_gpu": 1},
        "train_micro_batch_size_per_gpu to 1",
        "optim.micro_batch_size is 2",
    ),
    (
        {"gradient_accumulation_steps": 1},
        "gradient_accumulation_steps to 1",
        "optim.grad_accum_steps is 3",
    ),
    ({"gradient_clipping": 0.5}, "gradient_clipping to 0.5", "optim.max_grad_norm is 1"),
    ({"optimizer": {"type": "Lamb"}}, 'optimizer.type to "Lamb"', "optim.optimizer is adamw"),
    ({"optimizer": {"params": {"lr": 0.1}}}, "optimizer.params.lr to 0.1", "optim.lr is 0.0001"),
    (
        {"scheduler": {"type": "WarmupCosineLR"}},
        'scheduler.type to "WarmupCosineLR"',
        "optim.schedule is linear",
    ),
    ({"zero_optimization": {"stage": 2}}, "zero_optimization.stage to 2", "the backend is zero3"),
    ({"fp16": {"enabled": True}}, "fp16.enabled to true", "model.dtype is bfloat16"),
    ({"bf16": {"enabled": False}}, "bf16.enabled to false", "model.dtype is bfloat16"),
    (
        {"zero_optimization": {"offload_param": {"device": "cpu"}}},
        'zero_optimization.offload_param.device to "cpu"',
        "parallel.cpu_offload is false",
    ),
]


@pytest.mark.parametrize(
    ("content", "theirs", "ours"), CONTRADICTIONS, ids=lambda value: str(value)[:40]
)
def test_a_contradiction_is_refused_with_both_values(
    file: Path, content: dict, theirs: str, ours: str
) -> None:
    """The message names the file, its key and value, the run's own key and value, and what to
    do."""
    with pytest.raises(ConfigError) as caught:
        settings(file, content)
    key = theirs.partition(" to ")[0]
    assert str(caught.value) == (
        f"deepspeed config {file} sets {theirs}, but {ours}. "
        f'Remove {key} there or set it to "auto": the run\'s own file decides.'
    )


def test_bf16_is_refused_for_a_float32_run(file: Path) -> None:
    """A float32 run refuses a file with bf16: the run's own file decides the compute type."""
    with pytest.raises(
        ConfigError, match=r"sets bf16.enabled to true, but model.dtype is float32\. Remove"
    ):
        settings(file, {"bf16": {"enabled": True}}, TrainConfig(model=ModelConfig(dtype="float32")))


def test_no_clipping_is_written_as_zero_there(file: Path) -> None:
    """`gradient_clipping: 0` agrees with `optim.max_grad_norm: null`, and 1 does not."""
    config = TrainConfig(optim=OptimConfig(max_grad_norm=None))
    assert settings(file, {"gradient_clipping": 0.0}, config)["gradient_clipping"] == 0
    with pytest.raises(
        ConfigError, match=r"sets gradient_clipping to 1\.0, but optim\.max_grad_norm is null\."
    ):
        settings(file, {"gradient_clipping": 1.0}, config)


@pytest.mark.parametrize(
    ("content", "shown"),
    [
        (
            {"zero_optimization": {"zero_quantized_weights": True}},
            "zero_optimization.zero_quantized_weights to true",
        ),
        (
            {"scheduler": {"params": {"warmup_num_steps": 10}}},
            "scheduler.params.warmup_num_steps to 10",
        ),
        ({"torch_autocast": {"enabled": True}}, "torch_autocast.enabled to true"),
    ],
)
def test_what_is_not_for_tuning_is_refused(file: Path, content: dict, shown: str) -> None:
    """A key that would be ignored, or would change the numbers, is an error that lists the tuning
    options."""
    with pytest.raises(ConfigError) as caught:
        settings(file, content)
    message = str(caught.value)
    assert message.startswith(
        f"deepspeed config {file} sets {shown}, which is not an option for tuning. Remove it, "
    )
    assert "zero_optimization.overlap_comm" in message


def test_options_of_the_other_stage_are_refused(file: Path) -> None:
    """Under ZeRO-2 the options of stage 3, which would have no effect, are refused."""
    with pytest.raises(
        ConfigError,
        match=r"stage3_max_live_parameters, which has no effect: the backend is zero2\.",
    ):
        settings(file, {"zero_optimization": {"stage3_max_live_parameters": 10}}, stage=2)


def test_a_file_full_of_auto_is_accepted_and_tuning_options_arrive(file: Path) -> None:
    """The usual file of other trainers, its values left "auto", is accepted; tuning options are
    passed on."""
    found = settings(
        file,
        {
            "fp16": {"enabled": "auto", "loss_scale": 0, "hysteresis": 2},
            "bf16": {"enabled": "auto"},
            "optimizer": {
                "type": "AdamW",
                "params": {"lr": "auto", "betas": "auto", "weight_decay": "auto"},
            },
            "scheduler": {
                "type": "WarmupDecayLR",
                "params": {"warmup_min_lr": "auto", "total_num_steps": "auto"},
            },
            "zero_optimization": {
                "stage": 3,
                "overlap_comm": False,
                "reduce_bucket_size": "auto",
                "stage3_prefetch_bucket_size": 123,
                "offload_optimizer": {"device": "none", "pin_memory": True},
            },
            "train_batch_size": "auto",
            "train_micro_batch_size_per_gpu": 2,
            "wall_clock_breakdown": False,
        },
    )
    assert found == {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 3,
        "gradient_clipping": 1.0,
        "wall_clock_breakdown": False,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": 3,
            "overlap_comm": False,
            "stage3_prefetch_bucket_size": 123,
        },
    }


def test_a_file_that_is_none_is_refused(file: Path) -> None:
    """A file that is missing, unreadable, or not an object is refused."""
    with pytest.raises(
        ConfigError, match=r"deepspeed config .*ds\.json does not exist\. Give the path"
    ):
        zero_settings(CONFIG, 3, 4, str(file))
    file.write_text("{")
    with pytest.raises(ConfigError, match=r"ds\.json is not readable JSON: "):
        zero_settings(CONFIG, 3, 4, str(file))
    with pytest.raises(ConfigError, match=r"ds\.json must hold a JSON object\."):
        settings(file, [])


def test_a_file_for_another_backend_is_refused() -> None:
    """A file for a backend that would ignore it is refused."""
    with pytest.raises(LaunchError) as caught:
        choose_backend(TrainConfig(parallel=ParallelConfig("fsdp", deepspeed_config="ds.json")))
    assert str(caught.value) == (
        "parallel.deepspeed_config is ds.json, but the backend is fsdp, which does not read it. "
        "Remove it, or set parallel.backend: zero2 or zero3."
    )


@pytest.fixture
def launched_with_deepspeed(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    if find_spec("deepspeed") is None:
        pytest.skip("deepspeed is an optional dependency")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    return monkeypatch


@pytest.mark.parametrize("stage", ["2", "3"])
def test_auto_follows_a_launcher_that_uses_deepspeed(
    launched_with_deepspeed, file: Path, stage: str
) -> None:
    """The stage comes from the launcher's option or from its file, whose other options then count
    too."""
    launched_with_deepspeed.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", stage)
    assert choose_backend(CONFIG) == f"zero{stage}"
    other = "5" if stage == "3" else "4"
    launched_with_deepspeed.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", other)
    launched_with_deepspeed.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(file))
    file.write_text(json.dumps({"zero_optimization": {"stage": int(stage), "overlap_comm": False}}))
    assert choose_backend(CONFIG) == f"zero{stage}"
    found = run_settings(CONFIG, int(stage), 1)
    assert found is not None
    assert found["zero_optimization"] == {"stage": int(stage), "overlap_comm": False}


@pytest.mark.parametrize("asked", ["single", "ddp", "fsdp", "zero2"])
def test_a_launcher_that_contradicts_the_config_is_refused(launched_with_deepspeed, asked) -> None:
    """The message names the launcher's and the config's choice."""
    launched_with_deepspeed.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    with pytest.raises(LaunchError) as caught:
        choose_backend(TrainConfig(parallel=ParallelConfig(asked)))
    assert str(caught.value) == (
        f"parallel.backend is {asked}, but the launcher was told to use DeepSpeed with ZeRO "
        "stage 3. "
        "Remove --use_deepspeed from the launcher, or set parallel.backend: auto."
    )


def test_other_stages_are_refused(launched_with_deepspeed) -> None:
    """ZeRO stages 0 and 1 are refused: they shard nothing that `ddp` would not fit."""
    launched_with_deepspeed.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "1")
    with pytest.raises(
        LaunchError, match=r"DeepSpeed with ZeRO stage 1\. Stages 2 and 3 are supported: "
    ):
        choose_backend(CONFIG)


def test_two_files_are_one_too_many(launched_with_deepspeed, file: Path) -> None:
    """Two different files, the launcher's and the run's own, are refused."""
    launched_with_deepspeed.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", "theirs.json")
    with pytest.raises(
        LaunchError,
        match=r"parallel\.deepspeed_config is mine\.json, but the launcher was given theirs",
    ):
        run_settings(
            TrainConfig(parallel=ParallelConfig("zero3", deepspeed_config="mine.json")), 3, 1
        )


def test_without_deepspeed_the_message_says_how_to_install_it(tmp_path: Path) -> None:
    """The command ends with code 2 and one line, before anything is written or loaded."""
    from tests.support.command import write_config

    (tmp_path / "model").mkdir()
    for name, text in (("config.json", "{}"), ("model.safetensors", "")):
        (tmp_path / "model" / name).write_text(text)
    (tmp_path / "chat.jsonl").write_text('{"messages": []}\n')
    config = write_config(
        tmp_path / "run.yaml",
        output_dir=str(tmp_path / "out"),
        model={"path": str(tmp_path / "model")},
        data={"train": str(tmp_path / "chat.jsonl")},
        parallel={"backend": "zero3"},
    )
    blocked = (
        "import sys; sys.modules['deepspeed'] = None; from qlora_dist.cli import main; "
        "main(['train', sys.argv[1]])"
    )
    done = subprocess.run(
        [sys.executable, "-c", blocked, str(config)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stderr == (
        "error: the backend is zero3, which needs DeepSpeed, and that is not installed. "
        "Run: pip install 'qlora-dist[deepspeed]', or set parallel.backend: fsdp.\n"
    )
    assert done.returncode == 2
    assert not (tmp_path / "out").exists()
