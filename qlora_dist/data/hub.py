"""Data sets that `datasets` loads: those of the hub, and folders that are copies of one."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_dist.data.files import COMPRESSIONS, kind_of, lists_configs
from qlora_dist.errors import DataError

# A configuration may have any character but these; a split only those of a word.
_NAME = r"(?P<name>\w[\w.-]*/[\w.-]+)"
_PARTS = r"(:(?P<config>[^<>:/\\|?*]*))?(:(?P<split>[\w.-]*))?"
_HUB_NAME = re.compile(_NAME + _PARTS)
_COPY_NAME = re.compile(r"(?P<name>.+?)" + _PARTS)


@dataclass(frozen=True)
class DataSetName:
    """A table of a data set."""

    name: str
    """`owner/name`, or a folder."""
    config: str
    """Empty: the only or the default one."""
    split: str


def parse_name(path: str) -> DataSetName | None:
    """Return the parts of `owner/name[:split]` or `owner/name[:config[:split]]`.

    None if `path` is there, or may be a mistyped file. The split is `train` if it is left out. The
    name may also be a folder whose `README.md` lists configurations, if a split follows it.
    """
    if os.path.exists(path):
        return None
    match = _HUB_NAME.fullmatch(path)
    if match is not None and _may_be_of_the_hub(match["name"]):
        return _parts(match)
    match = _COPY_NAME.fullmatch(path)
    if match is not None and match["config"] is not None and lists_configs(Path(match["name"])):
        return _parts(match)
    return None


def _parts(match: re.Match[str]) -> DataSetName:
    name, config, split = match["name"], match["config"] or "", match["split"]
    if split is None:  # `owner/name:split`
        config, split = "", config
    return DataSetName(name, config, split or "train")


def _may_be_of_the_hub(name: str) -> bool:
    place = Path(name)
    is_file = kind_of(place) is not None or place.suffix.lower() in COMPRESSIONS
    # In a folder that exists, the name is more likely a mistyped file.
    return not is_file and not place.exists() and not place.parent.exists()


def is_data_set(path: str) -> bool:
    """True if `path` names a data set of the hub, or a table in a copy of one."""
    return parse_name(path) is not None


def load_table(path: str, key: str) -> Any:
    """Return the `datasets.Dataset` that `path` names.

    Raises:
        DataError: it cannot be loaded; with its configurations or splits if they can be known.
    """
    from datasets import load_dataset

    asked = parse_name(path)
    assert asked is not None
    config = [asked.config] if asked.config else []
    try:
        # `datasets` 4 and later run no script of a data set, and no argument here asks for it.
        return load_dataset(asked.name, *config, split=asked.split)
    except Exception as error:  # noqa: BLE001 - network, hub and parser each have their own
        lines = str(error).strip().splitlines() or [type(error).__name__]
        here = os.path.isdir(asked.name)
        # A missing configuration or split is a ValueError; without a network there is no list.
        remedy = _choices(asked) if isinstance(error, ValueError) else ""
        remedy = remedy or (
            "Check the name (owner/name, owner/name:split or owner/name:config:split), or give a "
            "file."
        )
        reason = lines[0].rstrip(".")
        raise DataError(
            f"{key} {path} is no file or folder here, and as a data set"
            f"{' in that folder' if here else ' of the hub'} it cannot be loaded: {reason}. "
            f"{remedy}"
        ) from None


def _choices(asked: DataSetName) -> str:
    """Return a sentence with the configurations or splits to choose from; empty if unknown."""
    from datasets import get_dataset_config_names, get_dataset_split_names

    name = asked.name
    with suppress(Exception):
        configs = get_dataset_config_names(name)
        if asked.config not in configs and (asked.config or len(configs) > 1):
            # `owner/name:X` means the split X, but may have been written for a configuration.
            config, split = configs[0], asked.split
            if asked.split in configs:
                config, split = asked.split, "train"
            return (
                f"Its configurations are {', '.join(configs)}: name one and a split, such as "
                f"{name}:{config}:{split}."
            )
        splits = get_dataset_split_names(name, asked.config or None)
        before = f"{name}:{asked.config}" if asked.config else name
        return f"Its splits are {', '.join(splits)}: name one, such as {before}:{splits[0]}."
    return ""
