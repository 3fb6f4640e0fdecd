"""The mesh, and how the arrays of a model and of its batches are sharded on it; docs/distributed.md has the table.

An axis of an array that the mesh axis does not divide is not sharded.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gold_jax.sharding.axes import AXES, LAYOUTS

ROW_AXES = ("data", "fsdp")
_WIDTH = {"fsdp": ("fsdp",), "full": ("data", "fsdp"), "replicated": ()}
_TENSOR = ("heads", "kv_heads", "mlp")


def make_mesh(sizes: dict[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of these sizes over the devices given; None: all there are."""
    types = (AxisType.Auto,) * len(AXES)
    return jax.make_mesh(tuple(sizes[axis] for axis in AXES), AXES, devices=devices, axis_types=types)


@dataclasses.dataclass(frozen=True)
class Placement:
    """A mesh and how a model is sharded on it; hashable, so that it can be a static argument of a jitted function."""

    mesh: Mesh  # with the axes of `axes.AXES`
    layout: str = "fsdp"  # one of `axes.LAYOUTS`

    def __post_init__(self):
        if self.layout not in LAYOUTS:
            raise ValueError(f"the layout is {self.layout!r}; it must be one of {', '.join(LAYOUTS)}.")

    @property
    def row_shards(self) -> int:
        """How many shards the rows of a batch have."""
        return math.prod(self.mesh.shape[axis] for axis in ROW_AXES)

    @property
    def tensor_size(self) -> int:
        """How many devices work on the same rows."""
        return self.mesh.shape["tensor"]

    def sharding(self, *spec: Any) -> NamedSharding:
        """`NamedSharding` on this mesh, one entry an array axis."""
        return NamedSharding(self.mesh, P(*spec))

    @property
    def replicated(self) -> NamedSharding:
        """The sharding of what every device holds a full copy of."""
        return self.sharding()

    def param_sharding(self, shape: tuple[int, ...], logical: tuple[str | None, ...]) -> NamedSharding:
        """How a parameter is stored, given its shape and logical axes (`models.parameters.ParamInfo.spec`)."""
        width = _WIDTH[self.layout] + (("tensor",) if "vocab" in logical else ())
        return self._shard(shape, logical, {"embed": width, **dict.fromkeys(_TENSOR, ("tensor",))})

    def compute_sharding(self, shape: tuple[int, ...], logical: tuple[str | None, ...]) -> NamedSharding:
        """How a layer's parameter is sharded while it is multiplied with: over `tensor_size` alone."""
        return self._shard(shape, logical, dict.fromkeys(_TENSOR, ("tensor",)))

    def decode_sharding(self, shape: tuple[int, ...], logical: tuple[str | None, ...]) -> NamedSharding:
        """As `compute_sharding`, the vocabulary sharded over `tensor_size` as well."""
        return self._shard(shape, logical, dict.fromkeys((*_TENSOR, "vocab"), ("tensor",)))

    def row_axes(self, count: int) -> tuple[str, ...] | None:
        """The mesh axes over which so many rows are sharded; None where they cannot be sharded evenly."""
        return None if count % self.row_shards else ROW_AXES

    def shard_rows(self, x: jax.Array) -> jax.Array:
        """`x` with its first axis sharded as rows are."""
        return jax.lax.with_sharding_constraint(x, self.sharding(self.row_axes(x.shape[0])))

    def head_axis(self, count: int) -> str | None:
        """The mesh axis over which so many heads are sharded; None where they cannot be sharded evenly."""
        return None if self.tensor_size == 1 or count % self.tensor_size else "tensor"

    def kv_repeats(self, heads: int, kv_heads: int) -> int:
        """How often each key-value head is repeated, so that every `tensor_size` device has those of its own query heads."""
        return 1 if self.head_axis(heads) is None else math.lcm(kv_heads, self.tensor_size) // kv_heads

    def put(self, tree: Any, *spec: Any) -> Any:
        """Host arrays, the same in every process, as arrays on the mesh; leaves that are None stay."""
        sharding, tree = self.sharding(*spec), jax.tree.map(np.asarray, tree)
        return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, sharding, x.__getitem__), tree)

    def row_owners(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of each shard of rows the first process that has devices of it; and the shards of which this process has some."""
        parts = self.mesh.devices.reshape(self.row_shards, -1)  # `tensor` is the last axis
        holders = [sorted({device.process_index for device in part}) for part in parts]
        local_shards = tuple(i for i, found in enumerate(holders) if jax.process_index() in found)
        return tuple(found[0] for found in holders), local_shards

    def put_rows(self, batch: Any) -> Any:
        """Host arrays that hold the rows, or packed sequences, of this process's shards, as arrays on the mesh."""
        sharding, (_, local_shards) = self.sharding(ROW_AXES), self.row_owners()

        def put(x):
            parts = dict(zip(local_shards, np.split(x, len(local_shards))))
            unit = len(x) // len(local_shards)
            shape = unit * self.row_shards, *x.shape[1:]
            return jax.make_array_from_callback(shape, sharding, lambda index: parts[(index[0].start or 0) // unit])

        return jax.tree.map(put, batch)

    def _shard(self, shape, logical, rules: dict[str, tuple[str, ...]]) -> NamedSharding:
        spec = []
        for size, name in zip(shape, logical):
            axes = tuple(axis for axis in rules.get(name, ()) if self.mesh.shape[axis] > 1)
            divides = size % math.prod(self.mesh.shape[axis] for axis in axes) == 0
            spec.append((axes if len(axes) > 1 else axes[0]) if axes and divides else None)
        while spec and spec[-1] is None:  # as JAX writes the shardings of results
            spec.pop()
        return self.sharding(*spec)


def sharded_axes(sharding: NamedSharding, axis: int) -> tuple[str, ...]:
    """The mesh axes over which one axis of an array is sharded."""
    found = dict(enumerate(sharding.spec)).get(axis) or ()
    return (found,) if isinstance(found, str) else tuple(found)
