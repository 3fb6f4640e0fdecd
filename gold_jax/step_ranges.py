"""Steps by number and range, as `--profile_steps` takes them."""

from __future__ import annotations

import re
from collections.abc import Iterable

from gold_jax.wording import shortened

_LONGEST = 100_000  # steps of a range


def read_steps(name: str, given: Iterable[str | int] | None, last: int | None = None) -> list[int]:
    """Steps in order, each once, of numbers and ranges, counted from 1; None, an empty list and `none` are no step.

    >>> read_steps("profile_steps", ["9", "3-5"])
    [3, 4, 5, 9]

    `name` is the flag's, for errors; `last` the run's last step, where it is known.

    Raises:
        ValueError: what is neither a number nor a range, a range that ends before it starts, or a step beyond the last.
    """
    parts = [str(part) for part in given or ()]
    steps: set[int] = set()
    for part in [] if parts == ["none"] else parts:
        match = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", part)
        first, end = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
        if not 1 <= first <= end < first + _LONGEST:
            must = f"it must be numbers and ranges of at most {_LONGEST:,} steps, counted from 1, such as 3-5,9."
            raise ValueError(f"--{name} has {shortened(repr(part), 200)}; {must}")
        if last is not None and end > last:
            raise ValueError(f"--{name} has {part!r}, but the run ends with step {last}; name steps up to {last}.")
        steps.update(range(first, end + 1))
    return sorted(steps)
