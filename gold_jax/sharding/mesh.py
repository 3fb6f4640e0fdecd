"""The mesh, with axes `data` (replicas of the model), `fsdp` (shards, other rows) and `tensor` (shards, the same rows)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh

from gold_jax.sharding.axes import AXES, read_mesh


def mesh_sizes(text: str | None, devices: int) -> dict[str, int]:
    """The size of every axis, for so many devices: 1 where it is not named, but `fsdp` takes the devices that are left.

    >>> mesh_sizes("tensor=2", 8)
    {'data': 1, 'fsdp': 4, 'tensor': 2}

    Raises:
        ValueError: as `read_mesh`, or the sizes do not come to the number of devices.
    """
    named = read_mesh(text)
    product = math.prod(named.values())
    if "fsdp" not in named and devices % product == 0:
        named["fsdp"] = devices // product
    elif product != devices:
        shown = ",".join(f"{name}={size}" for name, size in named.items())
        wanted = f"{'' if 'fsdp' in named else 'a multiple of '}{product}"
        raise ValueError(
            f"--mesh is {shown}, which takes {wanted} devices, and there are {devices}; the sizes must multiply to {devices}, "
            "or leave fsdp out for what is left."
        )
    return {axis: named.get(axis, 1) for axis in AXES}


def make_mesh(sizes: dict[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of these sizes over the devices given; None: all there are."""
    types = (AxisType.Auto,) * len(AXES)
    return jax.make_mesh(tuple(sizes[axis] for axis in AXES), AXES, devices=devices, axis_types=types)


def describe_mesh(mesh: Mesh) -> str:
    """The axes that are larger than one, such as `fsdp=4,tensor=2`."""
    return ",".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1)
