"""Wording that messages share."""

from collections.abc import Sequence


def listed(items: Sequence[str], most: int, separator: str = ", ", joint: str = " and") -> str:
    """The first of many, for a message, and how many more there are.

    >>> listed(["a", "b", "c", "d"], 2)
    'a, b and 2 more'
    """
    more = len(items) - most
    return separator.join(items[:most]) + (f"{joint} {more} more" if more > 0 else "")
