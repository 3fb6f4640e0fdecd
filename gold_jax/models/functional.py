"""A model as a value: what describes it (hashable) and its parameters, a nested dict of arrays.

`nnx.merge` and `nnx.split` share Variables, so that what is written into a merged module shows in the state it came
from. These two share nothing but arrays, which are immutable.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.nnx.statelib import FlatState
from flax.traverse_util import flatten_dict

Params = Mapping[str, Any]


def split(model: nnx.Module | tuple[nnx.GraphDef, Any]) -> tuple[nnx.GraphDef, Params]:
    """The graph definition and the parameters of a module, or of its `(graphdef, state)`, an `nnx.State` or nested dicts."""

    def arrays(state):
        if isinstance(state, nnx.Variable):
            (state,) = jax.tree.leaves(state)
        if isinstance(state, Mapping):  # an nnx.State is one
            return {name: arrays(value) for name, value in state.items()}
        return state

    graph, state = nnx.split(model) if isinstance(model, nnx.Module) else model
    return graph, arrays(state)


def merge(graph: nnx.GraphDef, params: Params) -> Any:
    """A module with Variables of its own that hold the arrays of `params`. Make it where it is used, and do not keep it."""
    # Flat: what nnx flattens by itself keeps the arrays in a cycle, and so on the device until Python collects it.
    return nnx.merge(graph, FlatState(flatten_dict(params).items(), sort=True))


def count(params: Params) -> int:
    """How many numbers all parameters hold together."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def commit(params: Params) -> Params:
    """Parameters committed to the devices that they are on, without a copy; other leaves stay as they are.

    Arrays of numpy are put on the default device once, where each program would copy them again.

    JAX compiles a program once for committed and once for uncommitted arguments, and one committed argument commits all
    results: arrays that are committed from the beginning have one program each.
    """

    def committed(x: Any) -> Any:
        x = jnp.asarray(x) if isinstance(x, np.ndarray) else x
        uncommitted = isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer) and not x.committed
        return jax.device_put(x, x.sharding) if uncommitted else x

    return jax.tree.map(committed, params)
