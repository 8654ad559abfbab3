"""Tokenized data on disk, addressed by its origin: files, tokenizer, settings and this code."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from qlora_dist.atomic import whole_folder
from qlora_dist.config.schema import DataConfig
from qlora_dist.data.chat_template import ChatTemplate
from qlora_dist.data.encode import encode_rows
from qlora_dist.data.report import Report
from qlora_dist.data.samples import SampleStore, SampleWriter
from qlora_dist.data.sources import left_out_of, load_rows, source_fingerprint, stamp
from qlora_dist.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_REPORT = "report.json"
_POLL_SECONDS = 1.0


@dataclass(frozen=True)
class TokenizedSource:
    """A source's samples, and the account of its rows."""

    store: SampleStore
    report: Report


def tokenized(
    path: str,
    key: str,
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
    show: Callable[[str], None] = lambda text: None,
) -> TokenizedSource:
    """Return the samples of a source, from the cache or tokenized now.

    Of several processes that ask for equal samples, one tokenizes and the rest wait for it.

    Args:
        key: the setting that names the source, for messages.
        show: is called with a line about the progress, every now and then.

    Raises:
        DataError: see `load_rows`, `encode_rows` and `Report.check`; or the cache folder cannot be
            written.
    """
    show(f"looking for {path} among tokenized data")
    # The stamp is taken before anything is read, so that a write during the reading shows.
    request = _Request(path, key, tokenizer, config, stamp(path, key))
    folder = cache_folder(config) / request.digest()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        source = _open(folder) or _build(folder, request, show)
    except OSError as error:
        raise DataError(
            f"tokenized data cannot be written to {folder.parent} ({error.strerror or error}). Set "
            "data.cache_dir to a folder with room for it: about five bytes per token."
        ) from None
    # Cached data may be from a run that let more faulty rows pass: the digest lacks that limit.
    source.report.check(config)
    source.report.left_out = left_out_of(path, key)  # the digest lacks files beside the source's
    return source


def cache_folder(config: DataConfig) -> Path:
    """Return `data.cache_dir`, or the cache folder that the XDG convention gives."""
    if config.cache_dir is not None:
        return Path(config.cache_dir)
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "qlora_dist"


@dataclass(frozen=True)
class _Request:
    """A source to tokenize, with everything that decides its samples."""

    path: str
    key: str
    tokenizer: PreTrainedTokenizerBase
    config: DataConfig
    stamp: object

    def digest(self) -> str:
        """Return a digest of everything that decides the samples."""
        import tokenizers
        import transformers

        # The code itself, since a version number would have to be raised by hand.
        code = [(Path(__file__).parent / f"{name}.py").read_text("utf-8") for name in _CODE]
        tokenizer, config = self.tokenizer, self.config
        made_from = {
            "path": self.path,  # the report's messages name it
            "data": source_fingerprint(self.path, self.key),
            "tokenizer": [
                tokenizer.backend_tokenizer.to_str(),
                tokenizer.chat_template,
                tokenizer.bos_token_id,
                tokenizer.eos_token_id,
            ],
            "settings": [
                config.format,
                config.columns,
                config.roles,
                config.max_seq_len,
                config.too_long,
                config.train_on,
                config.allow_lost,
                ChatTemplate(tokenizer, config.template_date).dated_text,
                config.template_kwargs,
            ],
            "code": [*code, transformers.__version__, tokenizers.__version__],
        }
        return hashlib.sha256(json.dumps(made_from).encode()).hexdigest()[:32]

    def fill(self, folder: Path, show: Callable[[str], None]) -> None:
        """Tokenize into an empty folder.

        Raises:
            DataError: see `tokenized`; or the files changed while they were read.
        """
        path, key, config = self.path, self.key, self.config

        def tell(num_rows: int) -> None:
            show(f"tokenizing {path}: {num_rows:,} rows")

        writer = SampleWriter(folder)
        rows = load_rows(path, key)
        report = encode_rows(rows, self.tokenizer, config, path, writer.add, tell)
        values = {"digest": writer.close(), "report": report.to_json()}
        report.check(config)
        if stamp(path, key) != self.stamp:
            raise DataError(
                f"{key} {path} changed while it was read. Start again when nothing writes to it."
            )
        (folder / _REPORT).write_text(json.dumps(values), "utf-8")


# The modules that decide the contents of the cache: `encode` and all that it imports from here.
_CODE = (
    "files",
    "hub",
    "sources",
    "formats",
    "messages",
    "message_forms",
    "names",
    "chat_template",
    "special_tokens",
    "template_date",
    "placeholders",
    "assistant_spans",
    "tokenization",
    "long_text",
    "encode",
    "report",
    "samples",
)


def _open(folder: Path) -> TokenizedSource | None:
    """Return the contents of a cache folder; None if there is none, or it is damaged."""
    try:
        values = json.loads((folder / _REPORT).read_text("utf-8"))
        store = SampleStore(folder, values["digest"])
        return TokenizedSource(store, Report.from_json(values["report"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _build(folder: Path, request: _Request, show: Callable[[str], None]) -> TokenizedSource:
    with _locked(folder, request.path, show) as lock:
        if (source := _open(folder)) is not None:  # another process has built it meanwhile
            return source

        def tell(text: str) -> None:
            lock.truncate(0)  # opened to append, so the next write starts at 0
            lock.write(text)
            lock.flush()
            show(text)

        with whole_folder(folder) as partial:
            request.fill(partial, tell)
    source = _open(folder)
    assert source is not None
    return source


@contextmanager
def _locked(folder: Path, path: str, show: Callable[[str], None]) -> Iterator[TextIO]:
    """Hold the lock of a cache folder; its file tells waiting processes the holder's progress."""
    with folder.with_name(f".{folder.name}.lock").open("a+", encoding="utf-8") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                lock.seek(0)
                show(f"another process is {lock.read() or f'tokenizing {path}'}")
                time.sleep(_POLL_SECONDS)
            except OSError:  # a file system without locks: at worst the work is done twice
                break
        yield lock
