"""Saving a trained model so that a folder always holds a whole one."""

from __future__ import annotations

import itertools
import json
import os
import pathlib
import re
import shutil
from collections.abc import Sequence
from typing import Any

import jax
from etils import epath

from gold_jax.models.hf_checkpoint import save_model

_CURRENT = "current_run"


def save_final_model(model: Any, tokenizer: Any, folder: str | os.PathLike, *, dtype: str = "auto") -> pathlib.Path:
    """Write weights, config and tokenizer into a folder that transformers and vLLM open.

    Everything is written beside the folder first and then moved into it, so that a run that is stopped while saving
    leaves the files that were there before. Other files of the folder (logs, a model card) stay. In a run of several
    processes all call it, and the first one writes.

    Args:
        model: a `gold_jax.models.decoder.Decoder`.
        tokenizer: of transformers or `tokenizers`; None, or one that cannot be saved: the model alone is written.
        folder: the destination, made if it is not there.
        dtype: type of the weights on disk, as in `save_model`.

    Returns:
        The folder.
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


def earlier_names(folder: str | os.PathLike, names: Sequence[str]) -> list[str]:
    """Names for files of an earlier run that a new one would write over: `metrics.1.jsonl`, all with the first free number."""
    folder = pathlib.Path(folder)
    for number in itertools.count(1):
        found = [f"{pathlib.Path(name).stem}.{number}{pathlib.Path(name).suffix}" for name in names]
        if not any((folder / name).exists() for name in found):
            return found


def checkpoint_folder(output_dir: str | os.PathLike, step: int) -> epath.Path:
    """Where the checkpoint after `step` updates is, locally or in a bucket."""
    return epath.Path(output_dir) / f"checkpoint-{step}"


def checkpoints_in(folder: str | os.PathLike) -> list[epath.Path]:
    """The `checkpoint-STEP` folders of a folder, whole or not, those saved last first.

    A higher step alone says nothing: it may be an earlier run's.
    """
    folder = epath.Path(folder)
    if not folder.is_dir():
        return []
    found = [(path, re.fullmatch(r"checkpoint-(\d+)", path.name)) for path in folder.iterdir()]
    dated = [(_saved_at(path), int(match.group(1)), path) for path, match in found if match and path.is_dir()]
    return [path for _, _, path in sorted(dated, reverse=True)]


def _saved_at(checkpoint: epath.Path) -> int:
    """When a checkpoint was saved, in whole seconds: by its own notes, else by its folder's time."""
    try:
        return int(json.loads((checkpoint / "run.json").read_text())["saved"])
    except (OSError, ValueError, KeyError, TypeError):
        return int(checkpoint.stat().mtime)


def current_run(folder: str | os.PathLike) -> str | None:
    """The id of the run that was started last with its checkpoints in a folder; None where nobody wrote it down."""
    path = epath.Path(folder) / _CURRENT
    return path.read_text().strip() if path.exists() else None


def set_current_run(folder: str | os.PathLike, run_id: str) -> None:
    """Writes down which run has its checkpoints in a folder from now on."""
    (epath.Path(folder) / _CURRENT).write_text(run_id + "\n")


def run_of(checkpoint: epath.Path) -> str | None:
    """The id of the run that saved a checkpoint, empty for those of earlier versions; None where its notes cannot be read."""
    try:
        return json.loads((checkpoint / "run.json").read_text()).get("run_id", "")
    except (OSError, ValueError, AttributeError):
        return None


def prune_checkpoints(output_dir: str | os.PathLike, limit: int | None) -> list[epath.Path]:
    """Remove the `checkpoint-STEP` folders saved first until `limit` are left (None: all stay); returns them."""
    if limit is None:
        return []
    removed = checkpoints_in(output_dir)[limit:]
    for path in removed:
        path.rmtree()
    return removed
