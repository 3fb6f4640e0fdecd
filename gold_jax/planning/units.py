"""Numbers in words."""

import math

from gold_jax.planning.hardware import GIB

_BYTES = ((GIB, "GiB"), (2**20, "MiB"), (2**10, "KiB"))


def size(count: float) -> str:
    """Bytes in words, such as 3.2 GiB."""
    for unit, name in _BYTES:
        if abs(count) >= unit:
            return f"{count / unit:.2f} {name}"
    return f"{count:.0f} B"


def unit_of(largest: float) -> tuple[int, str]:
    """The unit for a table whose largest entry is so many bytes."""
    return next((unit for unit in _BYTES if largest >= unit[0] // 2), _BYTES[-1])


def amount(count: float) -> str:
    """A number of three digits with a prefix, such as 1.24 T; nothing for nothing."""
    for factor, prefix in ((1e15, " P"), (1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if count >= factor:
            return f"{_digits(count / factor)}{prefix}"
    return _digits(count) if count else ""


def seconds_unit(seconds: float) -> tuple[float, str]:
    """The unit for a time, in seconds, and its name."""
    return (1.0, "s") if seconds >= 1 else (1e-3, "ms") if seconds >= 1e-3 else (1e-6, "µs")


def duration(seconds: float) -> str:
    """A time in words, such as 3.21 s or 15.0 ms."""
    factor, unit = seconds_unit(seconds)
    return "for ever" if math.isinf(seconds) else f"{_digits(seconds / factor)} {unit}"


def _digits(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:,.0f}"
