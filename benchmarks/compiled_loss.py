"""What compilers make of the loss and its gradient, without a device: a TPU's cycles, or a GPU's bytes, of its loops.

    python benchmarks/compiled_loss.py {tpu|cuda} {gold|top_k|projected|events} [--chunk 512]

A student of Llama-3.2-1B's shape and a teacher of Qwen3-4B's, 4 rows of 512 tokens of answer, bfloat16. Of every loop, in
the order in which they nest, it prints what one turn takes: millions of cycles that the compiler for a v5e states for
fused kernels (scatters, gathers and sorts have none), and GB that the kernels read and write. `tpu` needs the extra `tpu`,
`cuda` the extra `plan-cuda` (an H100).
"""

import argparse
import os
import re

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

import accelerator
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies

from gold_jax.losses.compare import COMPARISONS, Overlap
from gold_jax.losses.distill import Head, distill_loss
from gold_jax.planning import hlo
from gold_jax.planning.hardware import read_topology
from gold_jax.planning.work import read_work

GOLD = {"beta": 0.0, "matched_weight": 1.0, "unmatched_weight": 1.0}
WAYS = {
    "gold": ("chain", "hybrid", GOLD),
    "top_k": ("chain", "hybrid", GOLD | {"top_k": 1024}),
    "projected": ("boundary", "projected", {"beta": 0.0}),
    "events": ("boundary", "events", {"beta": 0.0}),
}
TOPOLOGIES = {"tpu": "v5e-1", "cuda": "gpu:1xh100-80gb"}


class Shapes:
    """The part of `accelerator.Bench` that its models ask for."""

    small = False


def compiled(platform: str, way: str, chunk: int):
    """The compiled loss and gradient of student's states and head."""
    student, teacher = accelerator.decoder_configs(Shapes)
    merge, compare, options = WAYS[way]
    batch = accelerator.random_batch((student, teacher), 4, 512, 512, merge, compare == "events")
    options_of = read_topology(TOPOLOGIES[platform]).compile_options
    device = topologies.get_topology_desc(platform=platform, **options_of).devices[0]
    sharding = jax.sharding.SingleDeviceSharding(device)

    def shape(x, dtype=None):
        return jax.ShapeDtypeStruct(np.shape(x), dtype or x.dtype, sharding=sharding)

    bound, matched = COMPARISONS[compare].bind(**options), int(0.7 * student.vocab_size)
    sides = (student, batch.student), (teacher, batch.teacher)
    states = [
        (
            jax.ShapeDtypeStruct((side.packed.tokens.size, config.width), jnp.bfloat16, sharding=sharding),
            jax.ShapeDtypeStruct((config.vocab_size, config.width), jnp.bfloat16, sharding=sharding),
        )
        for config, side in sides
    ]
    columns = [
        (np.arange(c.vocab_size, dtype=np.int32), np.full(c.vocab_size - matched, matched, np.int32)) for c, _ in sides
    ]
    batch = batch._replace(**{name: getattr(batch, name)._replace(packed=None) for name in ("student", "teacher")})
    batch, columns = jax.tree.map(shape, (batch._replace(labels=None), columns))

    def loss(own, theirs, batch, columns):
        heads = [
            Head(head, rows, prefix_of_unmatched=prefix) for (_, head), (rows, prefix) in zip((own, theirs), columns)
        ]
        given = own[0], heads[0], batch.student, theirs[0], heads[1], batch.teacher, batch.weight
        return distill_loss(*given, compare=bound, overlap=Overlap(matched), merge=merge, chunk=chunk)[0]

    return jax.jit(jax.value_and_grad(loss)).lower(*states, batch, columns).compile()


def show(program: hlo.Program, name: str, depth: int = 0) -> None:
    """Prints the loops of a computation, and those in them."""
    for x in program[name].instructions.values():
        if x.opcode != "while":
            continue
        body = program[x.attribute("body")]
        cycles = sum(
            int(n) for y in body.instructions.values() for n in re.findall(r'"estimated_cycles":"?(\d+)', y.attributes)
        )
        _, moved = read_work(program, [(body, y, 1, False) for y in body.instructions.values()])
        scope = re.search(r'op_name="([^"]*)"', x.attributes)
        print(f"{'  ' * depth}{cycles / 1e6:8.2f} M cycles {moved / 1e9:6.2f} GB  {scope[1] if scope else x.name}")
        show(program, x.attribute("body"), depth + 1)


def main() -> None:
    """Compiles one loss and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("platform", choices=TOPOLOGIES)
    parser.add_argument("loss", choices=WAYS)
    parser.add_argument("--chunk", type=int, default=512)
    args = parser.parse_args()
    found = compiled(args.platform, args.loss, args.chunk)
    print(f"temporaries {found.memory_analysis().temp_size_in_bytes / 2**30:.2f} GiB")
    show(hlo.read(found.as_text()), "")


if __name__ == "__main__":
    main()
