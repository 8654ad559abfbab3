"""The file `inventory.json` of a run: what its model and its data are, beside its `config.yaml`."""

# Tested by tests/e2e/test_page_of_truth.py.

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from qlora_dist.atomic import write_text
from qlora_dist.data.dataset import RunData
from qlora_dist.data.samples import Rows
from qlora_dist.errors import CheckpointError
from qlora_dist.model.inventory import Inventory

INVENTORY = "inventory.json"


def write_inventory(
    folder: Path, inventory: Inventory, data: RunData, bytes_by_rank: Sequence[int]
) -> None:
    """Write what a run is made of; for rank 0.

    Args:
        folder: the run's, which exists.
        bytes_by_rank: bytes of the parameters that each rank holds.

    Raises:
        CheckpointError: the file cannot be written.
    """
    content = {
        "model": inventory.to_json(),
        "parameter_bytes_by_rank": list(bytes_by_rank),
        "data": {
            "train": _tokens(data.train),
            "eval": _tokens(data.eval),
            "sources": [report.to_json() for report in data.reports],
        },
    }
    try:
        write_text(folder / INVENTORY, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    except OSError as error:
        raise CheckpointError(
            f"output_dir {folder} cannot be written: {error}. Give a folder you may write to."
        ) from None


def _tokens(rows: Rows) -> dict[str, int]:
    """Count a part's rows, samples, tokens, and the tokens in the loss."""
    return {
        "num_rows": len(rows),
        "num_samples": rows.num_samples,
        "num_tokens": int(rows.lengths.sum()),
        "num_target_tokens": rows.num_targets,
    }
