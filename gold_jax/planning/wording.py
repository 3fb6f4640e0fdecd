"""What a plan's programs, parts and numbers are called."""

import math

from gold_jax.planning.hardware import GIB

#: What happens while each program runs.
MOMENTS = {
    "teacher": "the teacher's forward pass runs",
    "student": "the student's forward and backward pass runs",
    "student, further micro-batches": "the student's pass over further micro-batches runs",
    "optimizer": "the optimizer updates",
    "prefill": "prompts are prefilled",
    "decoding": "tokens are decoded",
}
#: The same over a column, in two lines.
COLUMNS = {
    "teacher": "teacher\nforward",
    "student": "student\nfwd+bwd",
    "student, further micro-batches": "and\nfurther",
    "optimizer": "opti-\nmizer",
    "prefill": "prefill",
    "decoding": "decode",
}
#: Parts of memory, in their order.
PARTS = {
    "student": "student, float32",
    "optimizer": "its optimizer",
    "teacher": "teacher",
    "programs": "programs",
    "gradients": "gradients so far",
    "batch": "batch",
    "teacher's hidden states": "teacher's hidden states",
    "activations": "activations",
    "loss": "loss",
    "new gradients": "new gradients",
    "decoding weights": "weights for decoding",
    "cache": "cache",
    "smaller cache": "cache it grows from",
    "temporaries": "temporaries",
}
#: Parts of what a program needs, which its compiler does not tell apart.
SHARES = ("loss", "new gradients")
#: Resources of a roofline.
RESOURCES = {"compute": "compute", "memory": "memory", "interconnect": "links"}


def size(count: float) -> str:
    """Bytes in words, such as 3.2 GiB."""
    for unit, name in ((GIB, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if abs(count) >= unit:
            return f"{count / unit:.2f} {name}"
    return f"{count:.0f} B"


def unit_of(largest: float) -> tuple[int, str]:
    """The unit for a table whose largest entry is so many bytes."""
    return (GIB, "GiB") if largest >= GIB // 2 else (2**20, "MiB") if largest >= 2**19 else (2**10, "KiB")


def amount(count: float) -> str:
    """A number of three digits with a prefix, such as 1.24 T; nothing for nothing."""
    if not count:
        return ""
    for factor, prefix in ((1e15, " P"), (1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if count >= factor:
            return f"{_digits(count / factor)}{prefix}"
    return _digits(count)


def seconds_unit(seconds: float) -> tuple[float, str]:
    """The unit for a time, in seconds, and its name."""
    return (1.0, "s") if seconds >= 1 else (1e-3, "ms") if seconds >= 1e-3 else (1e-6, "µs")


def duration(seconds: float) -> str:
    """A time in words, such as 3.21 s or 15.0 ms."""
    factor, unit = seconds_unit(seconds)
    return "for ever" if math.isinf(seconds) else f"{_digits(seconds / factor)} {unit}"


def _digits(value: float) -> str:
    """Three digits."""
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:,.0f}"


__all__ = [
    "COLUMNS",
    "MOMENTS",
    "PARTS",
    "RESOURCES",
    "SHARES",
    "amount",
    "duration",
    "seconds_unit",
    "size",
    "unit_of",
]
