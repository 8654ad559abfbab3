"""Settings that a saved adapter was trained with, read from its JSON files alone, without torch."""

# Tested by tests/unit/config/test_rules.py.

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_dist.atomic import read_json
from qlora_dist.errors import ConfigError, QloraDistError

ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_RECORD = "qlora_dist.json"
"""File beside the adapter for what PEFT's files leave out, see
:class:`qlora_dist.run.adapter_folder.AdapterRecord`."""

BASE_KEEPING_INITS = (True, False, "gaussian")
"""Values of PEFT's `init_lora_weights` that leave the base weights as the checkpoint has them."""

_SETTINGS = {
    "adapter.rank": ("r", 8),
    "adapter.alpha": ("lora_alpha", 8),
    "adapter.target_modules": ("target_modules", None),
    "adapter.use_rslora": ("use_rslora", False),
    "adapter.use_dora": ("use_dora", False),
}
"""Settings of this program, each with its name in PEFT's file and PEFT's default."""

# Read here, or without effect on the function that the adapter computes ...
_HARMLESS = {"peft_type", "init_lora_weights", "base_model_name_or_path", "target_parameters"}
_HARMLESS |= {name for name, _ in _SETTINGS.values()}
_HARMLESS |= {"auto_mapping", "inference_mode", "lora_dropout", "megatron_core", "peft_version"}
_HARMLESS |= {"qalora_group_size", "revision", "task_type"}
# ... every other key of adapter_config.json must be off: PEFT adds options with each release.


@dataclass(frozen=True)
class SavedAdapter:
    """Parts of an adapter's description that continued training must agree with."""

    settings: dict[str, Any]
    """`adapter.rank` and so on, by their names in a run's configuration."""
    base: dict[str, Any]
    """`model.path` and, where known, `model.quantization` and `model.double_quant` of the base that
    the adapter was trained on."""


def read_saved_adapter(path: str) -> SavedAdapter:
    """Read the description of the adapter that `adapter.path` names.

    Raises:
        ConfigError: `path` is no folder with a LoRA adapter, or the adapter uses an option that
            this program does not train.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ConfigError(
            f"adapter.path {path} is not a folder. Give the adapter/ folder of a run, or null."
        )
    check_adapter_files(folder, f"adapter.path {path}", ConfigError)
    saved = read_json(folder / ADAPTER_CONFIG, ConfigError, "adapter.path: ")
    _check_kind(path, saved)
    settings = {key: saved.get(name, default) for key, (name, default) in _SETTINGS.items()}
    # Stacks of experts are named beside the layers here, and apart from them in PEFT.
    targets = (settings["adapter.target_modules"], saved.get("target_parameters"))
    settings["adapter.target_modules"] = [name for names in targets for name in names or ()]
    base_path = saved.get("base_model_name_or_path")
    base = {"model.path": base_path} if base_path else {}
    if (folder / ADAPTER_RECORD).is_file():
        recipe = read_json(folder / ADAPTER_RECORD, ConfigError, "adapter.path: ").get("base", {})
        recorded = [key for key in ("quantization", "double_quant") if key in recipe]
        base |= {f"model.{key}": recipe[key] for key in recorded}
    return SavedAdapter(settings, base)


def check_adapter_files(folder: Path, label: str, error: type[QloraDistError]) -> None:
    """Refuse a folder without PEFT's two files; suggest its subfolder `adapter` if they are there.

    Args:
        label: name of the folder in the message.
        error: raised when a file is missing.
    """
    for file in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (folder / file).is_file():
            nested = folder / "adapter"
            hint = f" Did you mean {nested}?" if (nested / ADAPTER_CONFIG).is_file() else ""
            raise error(f"{label} has no {file}, so it is not a PEFT adapter.{hint}")


def check_agreement(path: str, saved: SavedAdapter, settings: Mapping[str, Any]) -> None:
    """Refuse to continue an adapter with settings or a base that it was not trained with.

    Args:
        settings: all settings of the run by name.

    Raises:
        ConfigError: with the run's value and the adapter's.
    """
    for key, there in saved.settings.items():
        now = settings[key]
        if key == "adapter.target_modules":
            there = tuple(sorted(there or ()))
            # The layers behind `all-linear` are compared later, once the model is known.
            now = there if isinstance(now, str) else tuple(sorted(now))
        if now != there:
            raise ConfigError(
                f"{key} is {_show(now)}, but the adapter at adapter.path {path} has "
                f"{_show(there)}. Set {key}: {_show(there)}, or leave it out to take the adapter's."
            )
    for key, there in saved.base.items():
        now = settings[key]
        if key == "model.path":
            is_same = Path(now).resolve() == Path(there).resolve()
            remedy = f"If it is the same model in another place, say so in {ADAPTER_CONFIG} there"
        else:
            # `double_quant` has no effect on a base that is not quantized.
            types = {settings["model.quantization"], saved.base.get("model.quantization")}
            is_same = now == there or types == {"none"}
            remedy = f"Set {key}: {_show(there)}"
        if not is_same:
            raise ConfigError(
                f"{key} is {_show(now)}, but the adapter at adapter.path {path} was trained on "
                f"{_show(there)}: on another base it means something else. {remedy}, or start "
                "without adapter.path."
            )
    if settings["adapter.init"] != "default":
        raise ConfigError(
            f"adapter.init is {settings['adapter.init']}, but adapter.path {path} gives the "
            "initial values. Remove one of them."
        )


def _show(value: Any) -> str:
    """Return a value as it is written in YAML."""
    if isinstance(value, tuple):
        return f"[{', '.join(map(str, value))}]"
    if isinstance(value, float):
        return f"{value:g}"
    return json.dumps(value) if isinstance(value, bool) else str(value)


def _check_kind(path: str, saved: dict[str, Any]) -> None:
    """Refuse an adapter that is no plain LoRA on the unchanged weights of its base."""
    if saved.get("peft_type") != "LORA":
        raise ConfigError(
            f"adapter.path {path} holds an adapter of type {saved.get('peft_type')}. "
            "Only LoRA is supported."
        )
    init = saved.get("init_lora_weights", True)
    if init not in BASE_KEEPING_INITS:
        raise ConfigError(
            f"adapter.path {path} was initialized with {init!r}, which changes the base model, so "
            "it does not belong to the base of the checkpoint. Save it converted to plain LoRA "
            "first (PEFT: save_pretrained with path_initial_model_for_weight_conversion)."
        )
    if isinstance(saved.get("target_modules"), str):
        raise ConfigError(
            f"adapter.path {path} names its layers by the pattern {saved['target_modules']!r}. "
            f"Write the list of module names as target_modules into {ADAPTER_CONFIG} there."
        )
    for key, value in saved.items():
        if key not in _HARMLESS and value not in (None, False, "none", {}, []):
            raise ConfigError(
                f"adapter.path {path} was made with {key}: {json.dumps(value)}, which this program "
                "does not train. Use an adapter without it."
            )
