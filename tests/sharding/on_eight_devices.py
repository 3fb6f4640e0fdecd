"""Three steps of every method on meshes of eight devices against one device: prints the largest relative differences.

With XLA_FLAGS=--xla_force_host_platform_device_count=8 JAX_PLATFORMS=cpu in the environment; meshes as arguments: MESH for
every method, MESH/N for each N-th method alone.
"""

import argparse
import dataclasses
import json
import pathlib
import sys

import jax
import numpy as np
import optax

from gold_jax.models.functional import split

sys.path[:0] = [str(pathlib.Path(__file__).parents[1]), str(pathlib.Path(__file__).parents[2])]

from training.small import SPECS, V, batches, built, decoder, drawn, rows  # noqa: E402

from gold_jax.losses.importance import ImportanceSampling  # noqa: E402
from gold_jax.sharding.axes import mesh_sizes  # noqa: E402
from gold_jax.sharding.placement import Placement, make_mesh  # noqa: E402
from gold_jax.text.batch import build_token_batches  # noqa: E402
from gold_jax.text.process_shard import ProcessShard  # noqa: E402
from gold_jax.training import objective  # noqa: E402
from gold_jax.training.objective import make_cross_entropy_loss  # noqa: E402
from gold_jax.training.step import Step, init_state, state_shardings  # noqa: E402

# On these the devices of `tensor` split the vocabulary of the loss; elsewhere they gather the heads.
SPLIT = ("data=2,fsdp=2,tensor=2",)
MESHES = "data=8", "fsdp=8", "fsdp=4,tensor=2", "data=2,fsdp=2,tensor=2"
STEPS = 3
RATE = 0.5
MIXED = SPECS[-1]
WEIGHTED = dataclasses.replace(MIXED, name="weighted")  # by what rows were drawn with


def token_batches(lines):
    """Micro-batches of cross-entropy."""
    made = [(np.concatenate([r.student.prompt, r.student.completion]), ...) for r in rows(8)]
    made = [(ids, np.arange(len(ids)) > 0) for ids, _ in made]
    return build_token_batches(made, 8, process_shard=ProcessShard.single_process(lines))


def steps(method, placement=None, teacher=None, remat=True):
    """Losses and gradients of three steps of plain descent."""
    lines = 1 if placement is None else placement.row_shards
    if method == "sft":
        graph, params = split(placed(decoder(V, 1, tied=False), placement, remat))
        loss, constants, made = make_cross_entropy_loss(graph, chunk=4), (), token_batches
    else:
        place = lambda model, where: placed(model, where, remat)  # noqa: E731
        weighted = method is WEIGHTED
        options = dict(importance=ImportanceSampling(0.8, 1.5)) if weighted else {}
        options |= dict(tied=len(method.name) % 2 == 0, place=place, placements=(placement, teacher))
        loss, params, constants = built(method, **options)

        def made(lines):
            return batches(method, 8, lines=lines, drawn=drawn(8) if weighted else None)

    optimizer = optax.sgd(RATE)
    shardings = None if placement is None else state_shardings(optimizer, params)
    step = Step(loss, optimizer, constants, shardings=shardings)
    state = init_state(optimizer, params, shardings)
    found = []
    for _ in range(STEPS):  # on the same rows: most of the time goes into compiling, once for every shape
        before = jax.tree.map(np.array, state.params)
        (batch,) = made(lines)
        if placement is not None:
            batch = placement.put(batch, ("data", "fsdp"))
        state, metrics = step(state, [batch])
        after = jax.tree.map(np.array, state.params)
        if placement is not None:
            assert jax.tree.map(lambda x: x.sharding, state.params) == shardings.params
        found.append((float(metrics["loss"]), jax.tree.map(lambda a, b: (a - b) / RATE, before, after)))
    assert step.compiled <= 3  # the update twice: for parameters as they were made, and as an update gives them
    if method == "sft" and placement is not None:  # whether a device holds a whole head while it computes the loss
        program = step.programs["fused"].lower(state, constants, batch).compile().as_text()
        assert (f"f32[{V},16]" in program) != objective.splits_vocabulary()
    return found


def placed(model, placement, remat):
    model = model.replace(remat=remat)
    return model if placement is None else model.shard(placement)


def main():
    jax.config.update("jax_disable_most_optimizations", True)  # most of the time goes into compiling
    jax.config.update("jax_default_matmul_precision", "highest")
    assert jax.device_count() == 8
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("meshes", nargs="*", default=MESHES)
    args = parser.parse_args()
    plain, found = {}, {}
    for given in args.meshes:
        text, _, every = given.partition("/")
        mesh = make_mesh(mesh_sizes(text, 8))
        objective.splits_vocabulary = lambda *_, split=text in SPLIT: split
        first, *others = SPECS
        for number, method in list(enumerate(["sft", first, WEIGHTED, *others]))[:: int(every or 1)]:
            name = method if method == "sft" else method.name
            if name not in plain:
                plain[name] = steps(method)
            # Layouts and recomputation come round with the methods.
            layouts = [("fsdp", "fsdp"), ("fsdp", "full"), ("replicated", "fsdp")][number % 3]
            others = steps(method, *(Placement(mesh, layout) for layout in layouts), remat=number % 2 == 0)
            loss = gradient = 0.0
            for (value, grads), (again, more) in zip(plain[name], others):
                difference = optax.global_norm(jax.tree.map(np.subtract, more, grads))
                loss = max(loss, abs(again - value) / abs(value))
                gradient = max(gradient, float(difference / optax.global_norm(grads)))
            found[f"{text} {name}"] = {"loss": loss, "gradient": gradient}
            print(text, name, *layouts, f"{loss:.1e} {gradient:.1e}", file=sys.stderr, flush=True)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
