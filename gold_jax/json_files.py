"""JSON objects from files that others wrote: what is no plain object is one ValueError that names the file."""

import collections
import json
import math
import os
import pathlib
from typing import Any

from gold_jax.wording import quoted

MOST_BYTES = 100 * 10**6  # more than any vocabulary or index takes


def read_json_object(path: str | os.PathLike) -> dict[str, Any]:
    """The object that a local file holds; ValueError as `parse_json_object`, OSError where it cannot be read."""
    size = regular_file(path).stat().st_size
    if size > MOST_BYTES:
        raise ValueError(f"{path} has {size:,} bytes, and a JSON file of this kind has at most {MOST_BYTES:,}.")
    return parse_json_object(pathlib.Path(path).read_bytes(), path)


def regular_file(path: str | os.PathLike) -> pathlib.Path:
    """The path of a file, or of a link to one; ValueError for what else there is: to open a pipe might wait for ever."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError(f"{path} is {'a folder' if os.path.isdir(path) else 'no regular file'}; it must be a file.")
    return pathlib.Path(path)


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An `object_pairs_hook` of `json` that refuses a key that is there twice, of which `json` by itself keeps the last."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice, _ = collections.Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {quoted(twice)} is there twice")
    return found


def parse_json_object(text: str | bytes, path: Any) -> dict[str, Any]:
    """The object that a JSON text of the file `path` is.

    ValueError: it is none, is nested too deeply, has a key twice, or a number that is too large for a float.
    """

    def number(digits: str) -> float:
        if math.isinf(value := float(digits)):
            raise ValueError(f"{quoted(digits, plain=True)} is too large for a number")
        return value

    try:
        text = text.decode("utf-8") if isinstance(text, bytes) else text
        found = json.loads(text, object_pairs_hook=unique_keys, parse_float=number)
    except RecursionError:
        raise ValueError(f"{path} is not valid JSON (it is nested too deeply).") from None
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({quoted(str(error), plain=True)}).") from None
    if not isinstance(found, dict):
        raise ValueError(f'{path} holds {quoted(found)}; it must hold a JSON object, such as {{"name": 1}}.')
    return found
