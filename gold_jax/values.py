"""What a setting may be, and how it is read: what flags and the options of a comparison have in common."""

from __future__ import annotations

import json
import math
import numbers
import os
import typing
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

_TRUE = ("true", "yes", "t", "y", "1", "on")
_DEEPEST = 30  # levels of lists and dicts within a setting
_FALSE = ("false", "no", "f", "n", "0", "off")


class Range(NamedTuple):
    """The values that a setting may have, in words and as a test, which None, NaN and infinities never reach."""

    words: str
    test: Callable[[Any], bool]

    def holds(self, value: Any) -> bool:
        """Whether the value is one of them."""
        return (isinstance(value, str) or math.isfinite(value)) and self.test(value)


AT_LEAST_ONE = Range("at least 1", lambda v: v >= 1)
NOT_NEGATIVE = Range("at least 0", lambda v: v >= 0)
POSITIVE = Range("greater than 0", lambda v: v > 0)
FRACTION = Range("between 0 and 1", lambda v: 0 <= v <= 1)
SORTS = ("auto", "host", "xla")  # who sorts: see `losses.divergence.sorted_l1`


def plain_types(hint: Any) -> tuple[type, ...]:
    """The plain types of an annotation, such as `(float, NoneType)`; `list[str]` counts as `list`."""
    parts = (hint,) if typing.get_origin(hint) in (None, list, dict) else typing.get_args(hint)
    return tuple(typing.get_origin(part) or part for part in parts)


def _read_dict(value: Any) -> dict:
    value = json.loads(value) if isinstance(value, str) else value
    if not isinstance(value, Mapping) or _is_deep(value, _DEEPEST):
        raise TypeError
    return dict(value)


def _is_deep(value: Any, levels: int) -> bool:
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return levels < 0 or any(_is_deep(item, levels - 1) for item in inner)


def _read_bool(value: Any) -> bool:
    text = str(value).lower()
    if text not in _TRUE + _FALSE:
        raise ValueError
    return text in _TRUE


def _read_int(value: Any) -> int:
    number = _read_float(value)
    if number % 1:  # NaN of infinities
        raise ValueError
    return int(value) if isinstance(value, numbers.Integral) else int(number)


def _read_float(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real | str):
        raise TypeError
    return float(value)


# type -> (how a value becomes one or raises TypeError or ValueError, what it must be). The first that a setting takes reads it.
READERS: Mapping[type, tuple[Callable[[Any], Any], str]] = {
    dict: (_read_dict, "a JSON object, such as '{\"name\": 1}'"),
    bool: (_read_bool, "true or false"),
    int: (_read_int, "a whole number"),
    float: (_read_float, "a number"),
    str: (os.fspath, "text"),
}
