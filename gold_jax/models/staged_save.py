"""A model in a folder replaced by another one: written beside it, committed by one rename, then moved in file by file."""

import json
import os
import pathlib
import re
import shutil

STAGING = ".saving"  # where a model is written; of no use until it is committed
_COMMITTED, _NAMES = ".saved", ".names"  # the whole model, and in it a list of its files
WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json")
TOKENIZER = frozenset(
    (
        "tokenizer.json tokenizer.model tokenizer_config.json special_tokens_map.json added_tokens.json vocab.json merges.txt "
        "chat_template.jinja chat_template.json additional_chat_templates"
    ).split()
)


def commit(folder: pathlib.Path) -> None:
    """Puts the whole model in `STAGING` in the place of the one in the folder; files that are no model's stay."""
    staging = folder / STAGING
    (staging / _NAMES).write_text(json.dumps(sorted(path.name for path in staging.iterdir())))
    complete_commit(folder)  # an earlier one
    os.replace(staging, folder / _COMMITTED)
    complete_commit(folder)


def complete_commit(folder: pathlib.Path) -> None:
    """Moves in what is left of a committed model, whether this process wrote it or one that was killed."""
    committed = folder / _COMMITTED
    if not is_interrupted(folder):
        return
    names = set(json.loads((committed / _NAMES).read_text()))
    old = {"generation_config.json"} | (TOKENIZER if names & TOKENIZER else set())
    for path in folder.iterdir():
        if path.name not in names and (path.name in old or WEIGHTS.fullmatch(path.name)):
            _remove(path)
    for path in committed.iterdir():
        if path.name != _NAMES:
            if (target := folder / path.name).is_dir():
                _remove(target)
            os.replace(path, target)
    shutil.rmtree(committed)


def is_interrupted(folder: pathlib.Path) -> bool:
    """Whether a save into the folder was killed while its files were moved in, so that it may hold files of two models."""
    committed = folder / _COMMITTED
    return not committed.is_symlink() and (committed / _NAMES).is_file()


def check_complete(folder: pathlib.Path) -> None:
    """ValueError where the folder may hold files of two models."""
    if is_interrupted(folder):
        raise ValueError(
            f"a save into {folder} was interrupted, so that it may hold files of two models. Resume the run, which saves "
            f"again, or move the files of {folder / _COMMITTED} into it."
        )


def _remove(path: pathlib.Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
