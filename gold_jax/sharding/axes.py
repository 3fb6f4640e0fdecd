"""The names of the mesh's axes and of the layouts; without JAX, because flags are read before it starts."""

from __future__ import annotations

AXES = ("data", "fsdp", "tensor")
LAYOUTS = ("fsdp", "full", "replicated")


def read_mesh(text: str | None) -> dict[str, int]:
    """The axes that are named and their sizes; `auto` and None name none.

    >>> read_mesh("fsdp=4,tensor=2")
    {'fsdp': 4, 'tensor': 2}

    Raises:
        ValueError: another form, an axis that does not exist or is named twice, or a size below 1.
    """
    found: dict[str, int] = {}
    for part in "" if text in (None, "auto") else text.replace(" ", "").split(","):
        name, _, size = part.partition("=")
        if name not in AXES or not size.isdecimal() or int(size) < 1 or name in found:
            raise ValueError(
                f"--mesh is {text!r}; it must be auto, or sizes of {', '.join(AXES)}, each once and at least 1, such as "
                "fsdp=4,tensor=2."
            )
        found[name] = int(size)
    return found
