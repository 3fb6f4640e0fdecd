"""The mesh's axes: `data` (replicas of the model), `fsdp` (shards, other rows), `tensor` (shards, the same rows)."""

import math
import re
from collections.abc import Mapping

from gold_jax.wording import shortened

AXES = ("data", "fsdp", "tensor")
LAYOUTS = ("fsdp", "full", "replicated")


def read_mesh(text: str | None) -> dict[str, int]:
    """The axes that are named and their sizes; `auto` and None name none. A ValueError says what is legal.

    >>> read_mesh("fsdp=4,tensor=2")
    {'fsdp': 4, 'tensor': 2}
    """
    found: dict[str, int] = {}
    for part in "" if text in (None, "auto") else text.replace(" ", "").split(","):
        name, _, size = part.partition("=")
        if name not in AXES or not re.fullmatch("[0-9]{1,9}", size) or int(size) < 1 or name in found:
            legal = f"auto, or sizes of {', '.join(AXES)}, each once and at least 1, such as fsdp=4,tensor=2"
            raise ValueError(f"--mesh is {shortened(repr(text), 200)}; it must be {legal}.")
        found[name] = int(size)
    return found


def mesh_sizes(text: str | None, devices: int) -> dict[str, int]:
    """The size of every axis, 1 where it is not named, but `fsdp` takes what is left; a ValueError says what would do.

    >>> mesh_sizes("tensor=2", 8)
    {'data': 1, 'fsdp': 4, 'tensor': 2}
    """
    named = read_mesh(text)
    product = math.prod(named.values())
    if "fsdp" not in named and devices % product == 0:
        named["fsdp"] = devices // product
    elif product != devices:
        shown = ",".join(f"{name}={size}" for name, size in named.items())
        takes = f"{'' if 'fsdp' in named else 'a multiple of '}{product} devices, and there are {devices}"
        instead = f"the sizes must multiply to {devices}, or leave fsdp out for what is left."
        raise ValueError(f"--mesh is {shown}, which takes {takes}; {instead}")
    return {axis: named.get(axis, 1) for axis in AXES}


def mesh_flag(sizes: Mapping[str, int]) -> str:
    """A mesh as `--mesh` takes it, such as `fsdp=4,tensor=2`; `auto` for one device."""
    return ",".join(f"{axis}={size}" for axis, size in sizes.items() if size > 1) or "auto"
