"""Wording that messages share."""

import re
import reprlib
from collections.abc import Sequence
from typing import Any

_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 200


def shortened(text: str, most: int = 600) -> str:
    """A message without its middle where it quotes too much: what is wrong stands at its beginning, the remedy at its end.

    >>> shortened("a name that is too long: " + 9999 * "x" + "; rename it", 40)
    'a name that is too l…xxxxxxxxx; rename it'
    """
    return text if len(text) <= most else f"{text[: most // 2]}…{text[-(most // 2) :]}"


def without_passwords(text: str) -> str:
    """A text in which the user and password of addresses are hidden.

    >>> without_passwords("--vllm_server_base_url http://me:secret@host:8000")
    '--vllm_server_base_url http://HIDDEN@host:8000'
    """
    return re.sub(r"(?<=://)[^/@\s\"]+@", "HIDDEN@", text)


def plural(count: int, noun: str) -> str:
    """A count with its noun.

    >>> plural(1, "row"), plural(2000, "row")
    ('1 row', '2,000 rows')
    """
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def listed(items: Sequence[str], most: int, separator: str = ", ", joint: str = " and") -> str:
    """The first of many, for a message, and how many more there are.

    >>> listed(["a", "b", "c", "d"], 2)
    'a, b and 2 more'
    """
    more = len(items) - most
    return separator.join(items[:most]) + (f"{joint} {more} more" if more > 0 else "")


def quoted(value: Any, *, plain: bool = False) -> str:
    """A value for a message, at most some hundred characters of it; `plain`: a text without quotes."""
    shown = value if plain and isinstance(value, str) else _REPR.repr(value)
    return shown if len(shown) <= 200 else f"{shown[:200]}…"
