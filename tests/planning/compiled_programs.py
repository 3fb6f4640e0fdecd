"""Compiles programs with collectives for eight devices and prints what is read from them, as JSON.

Usage: python compiled_programs.py cpu | v5e:2x4, gpu:8xh100, …: fake CPU devices (set XLA_FLAGS), or what need not exist.
"""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gold_jax.planning import hlo
from gold_jax.planning.collectives import read_collectives
from gold_jax.planning.compiled import describe
from gold_jax.planning.hardware import read_topology

LAYERS, WIDTH, ROWS = 5, 512, 1024


def eight_devices(where: str) -> np.ndarray:
    if where == "cpu":
        return np.array(jax.devices())
    topology = read_topology(where)
    found = describe(topology)
    assert len(found) == topology.devices
    return np.array(found)


def mesh_of(devices: np.ndarray, **axes: int) -> Mesh:
    return Mesh(devices.reshape(*axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


def array(mesh: Mesh, shape, *spec, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))


def chain(devices):
    """Layers that are gathered one at a time, again in the backward pass, and whose gradients are scattered."""
    mesh = mesh_of(devices, fsdp=8)

    def layer(x, weight):
        # TPUs would gather a float32 weight in the bfloat16 that they multiply it in.
        return jnp.tanh(jnp.matmul(x, jax.lax.all_gather(weight, "fsdp", tiled=True), precision="highest")), None

    def local(weights, x):
        return (jax.lax.scan(jax.checkpoint(layer), x, weights)[0] ** 2).sum()

    specs = P(None, "fsdp"), P("fsdp")
    step = jax.shard_map(jax.grad(local), mesh=mesh, in_specs=specs, out_specs=specs[0], check_vma=False)
    return jax.jit(step), (array(mesh, (LAYERS, WIDTH, WIDTH), *specs[0]), array(mesh, (ROWS, WIDTH), *specs[1])), mesh


def every_kind(devices):
    """One of each collective, a conditional, a loop in a loop, and a loop whose trips are data."""
    mesh = mesh_of(devices, data=2, fsdp=2, tensor=2)

    def local(x, n):
        x = jax.lax.all_to_all(x, "tensor", 1, 0, tiled=True)
        x = jax.lax.psum_scatter(x, "fsdp", scatter_dimension=0, tiled=True)
        y = jax.lax.ppermute(x, "data", [(0, 1), (1, 0)])
        gathered = jax.lax.all_gather(x, ("data", "fsdp"), tiled=True)

        def dear(y):
            return jax.lax.psum(jnp.sin(jax.lax.psum(y * 2, "tensor")), "data")  # GPUs would make one of two bare sums

        y = jax.lax.cond(n[0] > 3, lambda y: jax.lax.psum(y * 2, "tensor"), dear, y)
        y = jax.lax.fori_loop(0, n[0], lambda _, y: y + jax.lax.ppermute(y, "tensor", [(0, 1)]), y)

        def inner(_, y):
            return jnp.sin(y + jax.lax.psum(y, ("data", "tensor")))

        return jax.lax.fori_loop(0, 7, lambda _, y: jax.lax.fori_loop(0, 3, inner, y), y), gathered

    specs = P("data", "fsdp"), P()
    step = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=(P(("data", "fsdp")), P()), check_vma=False)
    return jax.jit(step), (array(mesh, (1024, 4096), *specs[0]), array(mesh, (1,), dtype=jnp.int32)), mesh


def partitioned(devices):
    """A product whose inner axis is cut: the compiler adds the parts up."""
    mesh = mesh_of(devices, data=2, fsdp=2, tensor=2)
    product = jax.jit(lambda x, w: x @ w, out_shardings=NamedSharding(mesh, P("data")))
    return product, (array(mesh, (256, 512), "data", "tensor"), array(mesh, (512, 128), "tensor")), mesh


def read(step, arguments, mesh: Mesh) -> dict:
    """Bytes by axes and operation, and the loops that do not say how often they run, which count as ten."""
    unknown, by_axes = [], {}
    executions = hlo.executed(
        hlo.read(step.lower(*arguments).compile().as_text()), lambda loop: unknown.append(loop) or 10
    )
    for (axes, op), sent in read_collectives(executions, dict(mesh.shape)).items():
        by_axes.setdefault(axes, {})[op] = sent
    return {"by_axes": by_axes, "unknown_loops": unknown}


def main() -> None:
    devices = eight_devices(sys.argv[1])
    programs = chain, every_kind, partitioned
    print(json.dumps({program.__name__: read(*program(devices)) for program in programs}))


if __name__ == "__main__":
    main()
