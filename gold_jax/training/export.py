"""The student as transformers and vLLM open it, saved so that a folder always holds a whole one."""

import os
import pathlib
import shutil
from typing import Any

import jax

from gold_jax.models.hf_checkpoint import save_model


def save_final_model(model: Any, tokenizer: Any, folder: str | os.PathLike, *, dtype: str = "auto") -> pathlib.Path:
    """Write weights (in `dtype`, as `save_model`), config and tokenizer into a folder that transformers and vLLM open; returns it.

    Everything is written beside the folder first and then moved into it, so that a run that is stopped while saving
    leaves the files that were there before. Other files of the folder (logs, a model card) stay. In a run of several
    processes all call it, and the first one writes. Without a tokenizer that can be saved the model alone is written.
    """
    folder = pathlib.Path(folder)
    staging = folder / ".saving"
    if jax.process_index():
        save_model(model, staging, dtype=dtype)
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    try:
        save_model(model, staging, dtype=dtype)
        if hasattr(tokenizer, "save_pretrained"):
            tokenizer.save_pretrained(str(staging))
        elif hasattr(tokenizer, "save"):
            tokenizer.save(str(staging / "tokenizer.json"))
        # Weight files whose number differs from the new model's: a stale shard would be read as part of it.
        for pattern in ("model*.safetensors", "model*.safetensors.index.json"):
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
