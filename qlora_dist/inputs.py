"""What a run reads besides weights: the tokenizer, and the data that it makes of the configured files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from qlora_dist.config import TrainConfig
from qlora_dist.console import Reporter
from qlora_dist.data.dataset import Dataset, load_dataset
from qlora_dist.data.template import set_chat_template
from qlora_dist.model.skeleton import num_embeddings
from qlora_dist.tokenizer import check_tokenizer_fits, load_tokenizer


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
        ModelError: see `load_tokenizer` and `check_tokenizer_fits`.
        ConfigError: see `set_chat_template`.
        DataError: see `load_dataset`.
    """
    tokenizer = load_tokenizer(model_folder, config.model.trust_remote_code)
    set_chat_template(tokenizer, config.data.chat_template)
    with reporter.preparing() as show:
        data = main_first(lambda: load_dataset(config.data, tokenizer, config.seed, show))
    if (model_folder / "config.json").is_file():  # a look at the data does not need one
        largest = max(report.max_token_id for report in data.reports)
        check_tokenizer_fits(tokenizer, largest, num_embeddings(model_folder, config.model))
    return tokenizer, data
