"""Every method's loss and gradient with the batch over eight devices against one: prints the relative differences."""

import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

sys.path[:0] = [str(pathlib.Path(__file__).parents[1]), str(pathlib.Path(__file__).parents[2])]

from training.small import SPECS, batches, built  # noqa: E402


def main():
    jax.config.update("jax_disable_most_optimizations", True)  # most of the time goes into compiling
    mesh = Mesh(np.array(jax.devices()), ("data",), axis_types=(AxisType.Auto,))
    assert mesh.size == 8
    rows, everywhere = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data",), ()))
    found = {}
    for spec in SPECS:
        loss, params, constants = built(spec)
        gradient = jax.jit(jax.value_and_grad(lambda p, c, b, loss=loss: loss(p, c, b)[0]))
        (batch,) = batches(spec, 8)
        value, grads = gradient(params, constants, batch)
        (shared,) = batches(spec, 8, lines=8)  # a line for each device
        others = jax.device_put((params, constants), everywhere), jax.device_put(shared, rows)
        again, more = gradient(*others[0], others[1])
        difference = optax.global_norm(jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), more, grads))
        found[spec.name] = {
            "loss": float(jnp.abs(again - value) / jnp.abs(value)),
            "gradient": float(difference / optax.global_norm(grads)),
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
