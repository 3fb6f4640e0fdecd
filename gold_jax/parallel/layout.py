"""Where the parts of a model lie on a mesh.

A row of a batch belongs to one shard of `data` × `fsdp`, all `tensor` devices of which work on it. What is cut how:

| | stored | while it is computed with | in decoding |
| --- | --- | --- | --- |
| matrices of layers | width over `fsdp`, heads and inner width over `tensor` | heads and inner width over `tensor` | the same |
| embedding and head | width over `fsdp` and `tensor` | looked up where they lie; whole for a loss | vocabulary over `tensor` |
| cache, batches, activations | | rows over `data` and `fsdp`, heads over `tensor` | the same |

The layout `full` cuts the width over `data` too (for a large teacher beside a small student), `replicated` over none of
the two. An axis of an array that a mesh axis does not divide is not cut.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gold_jax.sharding.axes import LAYOUTS

ROW_AXES = ("data", "fsdp")
_WIDTH = {"fsdp": ("fsdp",), "full": ("data", "fsdp"), "replicated": ()}
_TENSOR = ("heads", "kv_heads", "mlp")


@dataclasses.dataclass(frozen=True)
class Placement:
    """A mesh and how a model lies on it; hashable, so that a jitted function may be compiled for it.

    Attributes:
        mesh: with the axes of `axes.AXES`.
        layout: one of `axes.LAYOUTS`.
    """

    mesh: Mesh
    layout: str = "fsdp"

    def __post_init__(self):
        if self.layout not in LAYOUTS:
            raise ValueError(f"the layout is {self.layout!r}; it must be one of {', '.join(LAYOUTS)}.")

    @property
    def row_shards(self) -> int:
        """How many parts the rows of a batch are shared out to."""
        return math.prod(self.mesh.shape[axis] for axis in ROW_AXES)

    @property
    def tensor_size(self) -> int:
        """How many devices work on the same rows."""
        return self.mesh.shape["tensor"]

    def sharding(self, *spec: Any) -> NamedSharding:
        """A sharding by mesh axes."""
        return NamedSharding(self.mesh, P(*spec))

    @property
    def replicated(self) -> NamedSharding:
        """The sharding of what every device holds whole."""
        return self.sharding()

    def param_sharding(self, shape: tuple[int, ...], logical: tuple[str | None, ...]) -> NamedSharding:
        """How a parameter is kept, given its shape and logical axes (`models.decoder.ParamInfo.spec`)."""
        width = _WIDTH[self.layout] + (("tensor",) if "vocab" in logical else ())
        return self._cut(shape, logical, {"embed": width, **dict.fromkeys(_TENSOR, ("tensor",))})

    def compute_sharding(self, shape: tuple[int, ...], logical: tuple[str | None, ...]) -> NamedSharding:
        """How a layer's parameter lies while it is multiplied with: cut over `tensor_size` alone."""
        return self._cut(shape, logical, dict.fromkeys(_TENSOR, ("tensor",)))

    def decode_sharding(self, shape: tuple[int, ...], logical: tuple[str | None, ...]) -> NamedSharding:
        """As `compute_sharding`, the vocabulary cut over `tensor_size` as well."""
        return self._cut(shape, logical, dict.fromkeys((*_TENSOR, "vocab"), ("tensor",)))

    def row_axes(self, count: int) -> tuple[str, ...] | None:
        """The mesh axes over which so many rows are shared out; None where they cannot be shared evenly."""
        return None if count % self.row_shards else ROW_AXES

    def shard_rows(self, x: jax.Array) -> jax.Array:
        """`x` with its first axis shared out."""
        return jax.lax.with_sharding_constraint(x, self.sharding(self.row_axes(x.shape[0])))

    def head_axis(self, count: int) -> str | None:
        """The mesh axis over which so many heads are shared out; None where they cannot be shared evenly."""
        return None if self.tensor_size == 1 or count % self.tensor_size else "tensor"

    def kv_repeats(self, heads: int, kv_heads: int) -> int:
        """How often each key-value head must be there, so that every `tensor_size` device has those of its own heads."""
        if self.head_axis(heads) is None:
            return 1
        return math.lcm(kv_heads, self.tensor_size) // kv_heads

    def put(self, tree: Any, *spec: Any) -> Any:
        """Host arrays, the same in every process, as arrays on the mesh; leaves that are None stay."""
        sharding = self.sharding(*spec)

        def to_device(x):
            x = np.asarray(x)
            return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

        return jax.tree.map(to_device, tree)

    def row_owners(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of each shard of rows the first process that has devices of it; and the shards of which this process has some."""
        parts = self.mesh.devices.reshape(self.row_shards, -1)  # `tensor_size` is the last axis
        holders = [sorted({device.process_index for device in part}) for part in parts]
        local = tuple(i for i, found in enumerate(holders) if jax.process_index() in found)
        return tuple(found[0] for found in holders), local

    def put_rows(self, batch: Any) -> Any:
        """Host arrays that hold the rows, or lines, of this process's shards, as arrays on the mesh."""
        sharding, (_, local) = self.sharding(ROW_AXES), self.row_owners()
        index_of_shard = {shard: k for k, shard in enumerate(local)}

        def to_device(x):
            unit = len(x) // len(local)

            def part(index):
                start = index_of_shard[(index[0].start or 0) // unit] * unit
                return x[start : start + unit]

            return jax.make_array_from_callback((unit * self.row_shards, *x.shape[1:]), sharding, part)

        return jax.tree.map(to_device, batch)

    def _cut(self, shape, logical, rules: dict[str, tuple[str, ...]]) -> NamedSharding:
        def axes(size, name):
            mesh_axes = tuple(axis for axis in rules.get(name, ()) if self.mesh.shape[axis] > 1)
            if not mesh_axes or size % math.prod(self.mesh.shape[axis] for axis in mesh_axes):
                return None
            return mesh_axes if len(mesh_axes) > 1 else mesh_axes[0]

        spec = list(map(axes, shape, logical))
        while spec and spec[-1] is None:  # as JAX writes the shardings of results
            spec.pop()
        return self.sharding(*spec)


def sharded_axes(sharding: NamedSharding, axis: int) -> tuple[str, ...]:
    """The mesh axes over which one axis of an array is cut."""
    spec = sharding.spec
    found = spec[axis] if axis < len(spec) else None
    return () if found is None else (found,) if isinstance(found, str) else tuple(found)
