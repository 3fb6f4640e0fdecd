"""What was found when a data set was checked, kept for the next start of a run on the very same data."""

import array
import contextlib
import hashlib
import importlib.metadata
import json
import os
import pathlib
import uuid
import zipfile
from collections.abc import Callable, Mapping
from typing import Any

import datasets
import numpy as np

from gold_jax.text.chat import ChatTokenizer
from gold_jax.text.checks import CheckedRows
from gold_jax.text.data import Examples
from gold_jax.text.json_rows import JsonRows

_MOST = 100  # results that are kept
_LIBRARIES = "datasets", "jinja2", "numpy", "tokenizers", "transformers"


def data_key(examples: Any) -> list[str] | None:
    """What tells a data set, as it is read, from every other; None where that takes as long as reading it, or is not known."""
    rows = getattr(examples, "rows", None)
    if not isinstance(examples, Examples) or isinstance(rows, list):
        return None
    read_as = [examples.source, examples.text_column, repr(examples.features), repr(examples.renamed)]
    if isinstance(rows, JsonRows):
        digest = rows.digest()
        return digest and [*read_as, digest]
    if not isinstance(rows, datasets.Dataset) or rows.format["type"] is not None:  # what a function of the user's makes
        return None
    files = [pathlib.Path(file["filename"]) for file in rows.cache_files]
    sizes = [f"{file} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files]
    return [*read_as, rows._fingerprint, str(len(rows)), *sizes]


def tokenizer_key(chat_tokenizer: ChatTokenizer, digest: str) -> list[str]:
    """What tells how a model reads from every other way; `digest` is of its tokenizer."""
    template, tokenizer = chat_tokenizer.template, chat_tokenizer.tokenizer
    read_as = chat_tokenizer.special_tokens_in_prompts, chat_tokenizer.embedding_rows, chat_tokenizer.stop_ids
    named = chat_tokenizer.name, type(tokenizer).__name__, tokenizer.special_tokens_map
    return [digest, repr(template.portable), repr(read_as), repr(named)]


def code_key() -> list[str]:
    """What tells the code that checks rows from every other version of it."""
    files = sorted(pathlib.Path(__file__).parents[1].glob("**/*.py"))
    code = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    return [code, *(f"{name} {importlib.metadata.version(name)}" for name in _LIBRARIES)]


def remembered(
    folder: pathlib.Path, key: Mapping[str, Any], check: Callable[[], CheckedRows]
) -> tuple[CheckedRows, bool]:
    """What `check` found for exactly this key, and whether that was before; new results are kept in `folder`.

    A file that cannot be read or written is passed over.
    """
    text = json.dumps(key, sort_keys=True)
    path = folder / f"{hashlib.sha256(text.encode()).hexdigest()}.npz"
    try:
        with np.load(path, allow_pickle=False) as file:
            found = json.loads(file["found"].tobytes())
            kept = array.array("q", file["kept"].astype(np.int64).tobytes())
        if found["key"] == text and len(kept) == found["count"]:
            os.utime(path)
            return CheckedRows(kept, found["notices"], found["digest"]), True
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        pass
    checked = check()
    found = dict(key=text, count=len(checked.kept), notices=checked.notices, digest=checked.digest)
    beside = path.with_name(f".{uuid.uuid4().hex}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(beside, "wb") as file:
            data = np.frombuffer(json.dumps(found).encode(), np.uint8)
            np.savez_compressed(file, kept=np.frombuffer(checked.kept, np.int64), found=data)
        os.replace(beside, path)
        for old in sorted(folder.glob("*.npz"), key=lambda file: file.stat().st_mtime)[:-_MOST]:
            old.unlink()
    except OSError:
        with contextlib.suppress(OSError):
            beside.unlink()
    return checked, False
