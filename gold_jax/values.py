"""What a setting may be, and how it is read: what flags and the options of a comparison have in common."""

from __future__ import annotations

import contextlib
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
        return (isinstance(value, str | int) or math.isfinite(value)) and self.test(value)


AT_LEAST_ONE = Range("at least 1", lambda v: v >= 1)
NOT_NEGATIVE = Range("at least 0", lambda v: v >= 0)
POSITIVE = Range("greater than 0", lambda v: v > 0)
FRACTION = Range("between 0 and 1", lambda v: 0 <= v <= 1)
SORTS = ("auto", "host", "xla")  # who sorts: see `losses.divergence.sorted_l1`
QUANTIZATIONS = ("none", "int8", "int8_kv_cache")  # of what decoding reads: nothing, weights, weights and the cache


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
    if isinstance(value, bool) or not isinstance(value, numbers.Real | str):
        raise TypeError
    if isinstance(value, str):
        with contextlib.suppress(ValueError):  # all digits of it: a float has 16
            value = int(value)
    if not isinstance(value, numbers.Integral):
        value = float(value)
        if not value.is_integer() or abs(value) > 2**53:  # beyond, a float is not the number that was written
            raise ValueError
    if not -(2**63) <= value < 2**63:
        raise OverflowError
    return int(value)


def _read_float(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real | str):
        raise TypeError
    return float(value)


# type -> (how a value becomes one, what it must be). The first that a setting takes reads it. What is none raises TypeError or
# ValueError, a number that 64 bits do not hold OverflowError, JSON nested too deeply RecursionError.
READERS: Mapping[type, tuple[Callable[[Any], Any], str]] = {
    dict: (_read_dict, "a JSON object, such as '{\"name\": 1}'"),
    bool: (_read_bool, "true or false"),
    int: (_read_int, "a whole number"),
    float: (_read_float, "a number"),
    str: (os.fspath, "text"),
}
