"""Saving a trained model so that a folder always holds a whole one."""

from __future__ import annotations

import json
import os
import pathlib
import re
import shutil
from typing import Any

from etils import epath

from gold_jax.models.weights import save_model


def save_final_model(model: Any, tokenizer: Any, folder: str | os.PathLike, *, dtype: str = "auto") -> pathlib.Path:
    """Write weights, config and tokenizer into a folder that transformers and vLLM open.

    Everything is written beside the folder first and then moved into it, so that a run that is stopped while saving
    leaves the files that were there before. Other files of the folder (logs, a model card) stay.

    Args:
        model: a `gold_jax.models.decoder.Decoder`.
        tokenizer: of transformers or `tokenizers`; None, or one that cannot be saved: the model alone is written.
        folder: the destination, made if it is not there.
        dtype: type of the weights on disk, as in `save_model`.

    Returns:
        The folder.
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    staging = folder / ".saving"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    try:
        save_model(model, staging, dtype=dtype)
        if hasattr(tokenizer, "save_pretrained"):
            tokenizer.save_pretrained(str(staging))
        elif hasattr(tokenizer, "save"):
            tokenizer.save(str(staging / "tokenizer.json"))
        _drop_old_weights(folder)
        for path in sorted(staging.iterdir()):
            target = folder / path.name
            if target.is_dir():
                shutil.rmtree(target)
            os.replace(path, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return folder


def _drop_old_weights(folder: pathlib.Path) -> None:
    """Remove weight files whose number may differ from the new model's: a stale shard would be read as part of it."""
    for pattern in ("model*.safetensors", "model*.safetensors.index.json"):
        for path in folder.glob(pattern):
            path.unlink()


def checkpoint_folder(output_dir: str | os.PathLike, step: int) -> epath.Path:
    """Where the checkpoint after `step` updates is, locally or in a bucket."""
    return epath.Path(output_dir) / f"checkpoint-{step}"


def saved_at(checkpoint: str | os.PathLike) -> float:
    """When a checkpoint was saved, in seconds: by its own notes, else by its folder's time."""
    path = epath.Path(checkpoint)
    try:
        return float(json.loads((path / "run.json").read_text())["saved"])
    except (OSError, ValueError, KeyError, TypeError):
        return float(path.stat().mtime)


def prune_checkpoints(output_dir: str | os.PathLike, limit: int | None) -> list[epath.Path]:
    """Remove the oldest `checkpoint-STEP` folders until `limit` are left (None: all stay); returns what was removed.

    The oldest are those saved first: an earlier run's folder with a higher step must not push out this run's.
    """
    if limit is None:
        return []
    found = []
    for path in epath.Path(output_dir).iterdir():
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name)) and path.is_dir():
            found.append((saved_at(path), int(match.group(1)), path))
    removed = [path for _, _, path in sorted(found)[: max(0, len(found) - limit)]]
    for path in removed:
        path.rmtree()
    return removed
