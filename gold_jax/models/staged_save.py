"""A model in a folder replaced by another one: written beside it, then moved in. A move that was cut short is finished."""

import contextlib
import os
import pathlib
import re
import shutil

STAGING = ".saving"  # where a model is written; of no use until it is whole
# Whole ones: beside the model that was there before, whose other files go first; and while their files move in.
_WHOLE, _MOVING = ".saved", ".moving"
WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json")
_TOKENIZER = frozenset(
    (
        "tokenizer.json tokenizer.model tokenizer_config.json special_tokens_map.json added_tokens.json vocab.json merges.txt "
        "chat_template.jinja chat_template.json additional_chat_templates"
    ).split()
)


def move_in(folder: pathlib.Path) -> None:
    """Puts the whole model in `STAGING` in the place of the one in the folder; files that are no model's stay."""
    finish_move(folder)  # an earlier one
    os.replace(folder / STAGING, folder / _WHOLE)
    finish_move(folder)


def finish_move(folder: pathlib.Path) -> None:
    """Moves in what is left of a whole model, whether this process wrote it or one that was stopped. OSError: it cannot."""
    whole, moving = folder / _WHOLE, folder / _MOVING
    if whole.is_dir() and not moving.is_dir():
        new = {path.name for path in whole.iterdir()}
        old = new | {"generation_config.json"} | (_TOKENIZER if new & _TOKENIZER else set())
        for path in folder.iterdir():
            if path.name not in new and (path.name in old or WEIGHTS.fullmatch(path.name)):
                _remove(path)
        with contextlib.suppress(FileNotFoundError):  # another process may do the same
            os.replace(whole, moving)
    if moving.is_dir():
        for path in sorted(moving.iterdir()):
            target = folder / path.name
            if target.is_dir():
                _remove(target)
            with contextlib.suppress(FileNotFoundError):
                os.replace(path, target)
        with contextlib.suppress(FileNotFoundError):
            moving.rmdir()


def _remove(path: pathlib.Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
