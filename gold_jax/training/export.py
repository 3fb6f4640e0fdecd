"""The student as transformers and vLLM open it, saved so that a folder always holds a whole one."""

import copy
import json
import os
import pathlib
import shutil
from collections.abc import Sequence
from typing import Any

import jax

from gold_jax.models.hf_checkpoint import save_model


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
    the folder first and then moved into it, so that a run that is stopped while saving leaves what was there before;
    other files stay. In a run of several processes all call it, and the first one writes. Without a tokenizer that can
    be saved the model alone is written.
    """
    folder = pathlib.Path(folder)
    staging = folder / ".saving"
    if jax.process_index():
        save_model(model, staging, dtype=dtype, stop_ids=stop_ids)
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    try:
        save_model(model, staging, dtype=dtype, stop_ids=stop_ids)
        if hasattr(tokenizer, "save_pretrained"):
            _save_tokenizer(tokenizer, staging, chat_template)
        elif hasattr(tokenizer, "save"):
            tokenizer.save(str(staging / "tokenizer.json"))
        # Weight files whose number differs from the new model's: a stale shard would be read as part of it.
        for pattern in ("model*.safetensors", "model*.safetensors.index.json", "additional_chat_templates/*"):
            for path in folder.glob(pattern):
                path.unlink()
        for path in sorted(staging.iterdir()):
            target = folder / path.name
            if target.is_dir():
                shutil.rmtree(target)
            os.replace(path, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return folder


def _save_tokenizer(tokenizer: Any, folder: pathlib.Path, chat_template: str | dict[str, str] | None) -> None:
    """A transformers tokenizer, with this template (None: its own), as files that give the tokenizer that it is."""
    if chat_template:  # a checkpoint is saved in another thread, beside a run that reads with the tokenizer
        tokenizer = copy.copy(tokenizer)
        tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(str(folder))
    # transformers leaves this one out, and without it Llama's tokenizer puts no blank after a special token.
    path, legacy = folder / "tokenizer_config.json", getattr(tokenizer, "legacy", None)
    if legacy is not None and path.exists():
        settings = json.loads(path.read_text(encoding="utf-8")) | {"legacy": legacy}
        path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
