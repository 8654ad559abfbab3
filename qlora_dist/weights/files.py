"""Files of a model: from a folder or hub name to a local folder with safetensors weights."""

# Tested by tests/unit/weights/test_loading.py and tests/e2e/test_bad_input.py.
# Heavy libraries are imported inside functions: commands check their paths before torch is loaded.

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from qlora_dist.atomic import read_json
from qlora_dist.errors import ModelError

_HUB_NAME = re.compile(r"^[\w.-]+/[\w.-]+$")
_SAMPLES, _SAMPLE_BYTES = 16, 2**16
_WEIGHTS = "*.safetensors"
_BESIDE_WEIGHTS = ["*.json", "*.jinja", "*.model", "*.txt"]


def looks_like_hub_name(path: str) -> bool:
    """True if `path` could be `owner/name` on a model hub rather than a local folder."""
    return not Path(path).exists() and _HUB_NAME.match(path) is not None


def resolve_model_folder(path: str, *, needs_weights: bool = True) -> Path:
    """Return the local folder of a model, downloaded or from the hub's cache for a hub name.

    Args:
        needs_weights: false downloads no weights, and accepts a folder without them.

    Raises:
        ModelError: the folder does not exist or holds no safetensors model, or the hub name cannot
            be fetched.
    """
    if looks_like_hub_name(path):
        folder = _download(path, [*_BESIDE_WEIGHTS, *([_WEIGHTS] if needs_weights else [])])
    else:
        folder = Path(path)
        if not folder.exists():
            raise ModelError(
                f"model.path {path} does not exist. Give a folder with config.json and "
                "*.safetensors, or a hub name such as owner/model."
            )
        if not folder.is_dir():
            raise ModelError(
                f"model.path {path} is a file. Give the folder that holds config.json and "
                "*.safetensors."
            )
    if needs_weights:
        check_model_folder(folder)
    return folder


def check_model_folder(folder: Path) -> None:
    """Refuse a folder that holds no transformers model in safetensors format.

    Raises:
        ModelError: naming the file that is missing.
    """
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"model folder {folder} has no config.json, so it is not a transformers model."
        )
    read_json(folder / "config.json", ModelError)
    if not any(folder.glob("*.safetensors")):
        unread = (".bin", ".pt", ".pth", ".gguf")
        found = ""
        if other := min((p.name for p in folder.iterdir() if p.suffix in unread), default=""):
            found = f" It has {other}, which is not read: pickle files can run code."
        raise ModelError(
            f"model folder {folder} has no *.safetensors files.{found} Convert the model once with "
            "transformers: AutoModelForCausalLM.from_pretrained(SOURCE).save_pretrained(FOLDER)."
        )


def check_new_folder(folder: Path) -> None:
    """Refuse to write a model over files that are there.

    Raises:
        ModelError: `folder` exists and is not an empty folder.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        what = "not empty" if folder.is_dir() else "a file"
        raise ModelError(f"OUT {folder} is {what}. Give a new or empty folder for the model.")


def weight_files(folder: Path) -> dict[str, Path]:
    """Map each tensor name of a model folder to the file that holds it.

    The files are those that transformers reads: `model.safetensors`, else the files of the index,
    with tensors that it does not list, else all safetensors files.

    Raises:
        ModelError: a file is missing or broken, or two files hold one tensor.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if index.is_file() and not single.is_file():
        names = read_json(index, ModelError).get("weight_map")
        names = names if isinstance(names, dict) else {}
        if not names or not all(isinstance(name, str) for name in names.values()):
            raise ModelError(
                f"{index} has no weight_map from tensor to file names. Copy the model again."
            )
        for file in (folder / name for name in sorted(set(names.values()))):
            if not file.is_file():
                raise ModelError(
                    f"{file} is missing, though {index.name} names it. Copy the model again."
                )
        return _with_unlisted({tensor: folder / name for tensor, name in names.items()}, index)
    files: dict[str, Path] = {}
    for file in [single] if single.is_file() else sorted(folder.glob("*.safetensors")):
        names = _tensor_names(file)
        if twice := sorted(files.keys() & names):
            raise ModelError(
                f"{files[twice[0]]} and {file} both hold the tensor {twice[0]} "
                f"({len(twice)} tensors in all), and no {index.name} says which of them counts. "
                "Remove the file that does not belong to the model."
            )
        files.update(dict.fromkeys(names, file))
    return files


def _with_unlisted(listed: dict[str, Path], index: Path) -> dict[str, Path]:
    """Add the tensors that the files of an index hold without being listed; transformers reads
    them, too.

    Raises:
        ModelError: a tensor is in a file, although the index names another file for it.
    """
    files = dict(listed)
    for file in sorted(set(listed.values())):
        for tensor in sorted(_tensor_names(file)):
            if (other := files.setdefault(tensor, file)) != file:
                says = "the index names" if tensor in listed else "it is also in"
                raise ModelError(
                    f"{file} holds the tensor {tensor}, but {says} {other.name}. {index.name} and "
                    "the files belong to different versions of the model: copy all of them again."
                )
    return files


def unread_files(folder: Path) -> str | None:
    """Name the safetensors files of a model folder that are not read; None if there are none."""
    read = set(weight_files(folder).values())
    if not (unread := sorted(set(folder.glob("*.safetensors")) - read)):
        return None
    names = ", ".join(file.name for file in unread[:4]) + (" and others" if unread[4:] else "")
    return (
        f"model folder {folder}: {names} {'is' if len(unread) == 1 else 'are'} not read: the "
        f"weights are those of {min(file.name for file in read)}"
        f"{' and the other files of the index' if len(read) > 1 else ''}"
    )


def _tensor_names(file: Path) -> set[str]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(file), framework="pt") as reader:
            return set(reader.keys())
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"{file} is not a readable safetensors file ({error}). Copy the model again."
        ) from None


def _download(name: str, wanted: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(
            f"model.path {name} is not a local folder and could not be fetched from the hub: "
            f"{reason} Check the name and the network, or give a local folder."
        ) from None


def model_fingerprint(folder: Path) -> str:
    """Hash a model folder: its config, and name, size, header and samples of every weight file."""
    # Not every byte, which would take as long as loading: two fine-tunings of one model differ in
    # the samples.
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted(set(weight_files(folder).values())):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for number in range(_SAMPLES):
                file.seek(size * number // _SAMPLES)  # the first one is the header
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()
