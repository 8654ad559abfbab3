"""What a run reads besides weights: the tokenizer, and the data that it makes of the configured files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from qlora_dist.config import TrainConfig
from qlora_dist.console import Reporter
from qlora_dist.data.dataset import Dataset, load_dataset
from qlora_dist.data.template import set_chat_template
from qlora_dist.errors import ModelError


def load_inputs(
    config: TrainConfig,
    model_folder: Path,
    reporter: Reporter,
    main_first: Callable[[Callable[[], Dataset]], Dataset] = lambda make: make(),
) -> tuple[PreTrainedTokenizerBase, Dataset]:
    """The tokenizer in `model_folder`, and the samples of the run; whoever looks at them sees what training sees.

    Args:
        main_first: `Runtime.main_first`, where several processes load the same.

    Raises:
        ModelError: see `load_tokenizer`.
        ConfigError: see `set_chat_template`.
        DataError: see `load_dataset`.
    """
    tokenizer = load_tokenizer(model_folder, config.model.trust_remote_code)
    set_chat_template(tokenizer, config.data.chat_template)
    with reporter.preparing() as show:
        return tokenizer, main_first(lambda: load_dataset(config.data, tokenizer, config.seed, show))


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The model's tokenizer.

    Raises:
        ModelError: the folder has none, or it reports no character offsets (a Python-only tokenizer).
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise ModelError(f"model folder {folder} has no tokenizer that can be loaded: {error}") from None
    if not tokenizer.is_fast:
        raise ModelError(
            f"model folder {folder}: its tokenizer reports no character offsets, which the loss mask needs. "
            "Convert it once: AutoTokenizer.from_pretrained(FOLDER, use_fast=True).save_pretrained(FOLDER)."
        )
    return tokenizer
