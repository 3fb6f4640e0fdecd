"""The student as transformers and vLLM open it, saved so that an interrupted save can be completed."""

import copy
import json
import os
import pathlib
import shutil
from collections.abc import Sequence
from typing import Any

import jax

from gold_jax.distributed.consensus import raised_in_all_processes
from gold_jax.models.hf_checkpoint import save_model
from gold_jax.models.staged_save import STAGING, commit


def save_final_model(
    model: Any,
    tokenizer: Any,
    folder: str | os.PathLike,
    *,
    dtype: str = "auto",
    stop_ids: Sequence[int] = (),
    chat_template: str | dict[str, str] | None = None,
) -> pathlib.Path:
    """Write weights (in `dtype`, as `save_model`), config and tokenizer into a folder that transformers and vLLM open; returns it.

    The configs name the stop tokens, the tokenizer brings the template, that were trained. Everything is written beside
    the folder's files first and then moved in, so that a run that is killed while saving leaves what was there before, or
    what the next save completes and `load_model` refuses until then (`models.staged_save`); other files stay. In a run of
    several processes all call it, the first one writes, and all raise where it cannot. Without a tokenizer that can be
    saved the model alone is written.
    """
    folder = pathlib.Path(folder)
    staging, writes = folder / STAGING, jax.process_index() == 0
    with raised_in_all_processes("the folder of the model"):
        if writes:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True, exist_ok=True)
    with raised_in_all_processes("the model that is saved"):
        try:
            save_model(model, staging, dtype=dtype, stop_ids=stop_ids)
            if writes:
                if hasattr(tokenizer, "save_pretrained"):
                    _save_tokenizer(tokenizer, staging, chat_template)
                elif hasattr(tokenizer, "save"):
                    tokenizer.save(str(staging / "tokenizer.json"))
                commit(folder)
        finally:
            if writes:
                shutil.rmtree(staging, ignore_errors=True)
    return folder


def _save_tokenizer(tokenizer: Any, folder: pathlib.Path, chat_template: str | dict[str, str] | None) -> None:
    """A transformers tokenizer, with this template (None: its own), as files that give the tokenizer that it is."""
    if chat_template:  # a checkpoint is saved in another thread, beside a run that reads with the tokenizer
        tokenizer = copy.copy(tokenizer)
        tokenizer.chat_template = chat_template
    try:
        tokenizer.save_pretrained(str(folder))
    except Exception as error:
        if type(error) is not Exception:
            raise
        raise OSError(f"{folder}: {error}") from error  # which is how the tokenizers library reports a full disk
    # transformers leaves this one out, and without it Llama's tokenizer puts no blank after a special token.
    path, legacy = folder / "tokenizer_config.json", getattr(tokenizer, "legacy", None)
    if legacy is not None and path.exists():
        settings = json.loads(path.read_text(encoding="utf-8")) | {"legacy": legacy}
        path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
