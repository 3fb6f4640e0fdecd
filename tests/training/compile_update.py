"""Compiles the update of a small model for a platform, and prints what its programs alias, copy and hold: a JSON object.

    python compile_update.py {cpu|tpu|cuda}

Neither a TPU nor a GPU has to be there, their compilers have to.
"""

import json
import math
import re
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies

from gold_jax import SFTConfig
from gold_jax.models.config import DecoderConfig
from gold_jax.models.decoder import Decoder
from gold_jax.models.functional import split
from gold_jax.models.rope import Rope
from gold_jax.planning.hardware import read_topology
from gold_jax.text.batch import build_token_batches
from gold_jax.training.objective import make_cross_entropy_loss
from gold_jax.training.optimizer import make_optimizer
from gold_jax.training.step import Step, state_shapes

CONFIG = DecoderConfig(
    family="llama", vocab_size=1536, width=256, mlp_width=640, layers=3, heads=2, kv_heads=1, head_dim=128, norm_eps=1e-5,
    activation="silu", ropes=(Rope(10000.0),) * 2, sliding=(False,) * 3, window=None, tied=True, query_scale=128**-0.5,
)  # fmt: skip
LARGE = 2**15  # elements of the smallest matrix of a stack of layers; norms are smaller


def device(platform):
    """A device of the platform: one that is there for CPUs, a described one for others."""
    if platform == "cpu":
        return jax.devices("cpu")[0]
    if platform == "tpu":
        return topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices[0]
    described = read_topology("gpu:1xh100-80gb").compile_options
    return topologies.get_topology_desc(platform="cuda", **described).devices[0]


def programs(platform, **options):
    """The lowered programs of an update by name, and the parameters, as shapes."""
    sharding = jax.sharding.SingleDeviceSharding(device(platform))

    def shape(x):
        return jax.ShapeDtypeStruct(np.shape(x), x.dtype, sharding=sharding)

    dtype = None if platform == "cpu" else "bfloat16"
    graph, params = split(Decoder.abstract(CONFIG, dtype=dtype, platform=platform, attention="plain"))
    params = jax.tree.map(shape, params)
    with tempfile.TemporaryDirectory() as folder:
        settings = SFTConfig(output_dir=folder, max_grad_norm=1.0, weight_decay=0.1)
        optimizer = make_optimizer(settings, 10, **options)
    shown = [(np.arange(1, 60, dtype=np.int32), np.ones(59, bool))] * 4
    (batch,) = jax.tree.map(shape, build_token_batches(shown, 4))
    step = Step(make_cross_entropy_loss(graph, chunk=64), optimizer)
    loss = jax.ShapeDtypeStruct((), jnp.float32, sharding=sharding)
    metrics = jax.tree.map(lambda _: loss, jax.eval_shape(step.objective.loss, params, (), batch))
    state, grads = state_shapes(optimizer, params), params
    given = dict(update=(state, grads, loss), fused=(state, (), batch), add=(params, grads, metrics, (), batch))
    return {name: step.programs[name].lower(*args) for name, args in given.items()}, params


def described(lowered, params):
    """What a program does with what is as large as a parameter."""
    compiled = lowered.compile()
    large = [x.shape for x in jax.tree.leaves(params) if math.prod(x.shape) >= LARGE]
    copy = re.compile(r" = \(?f32\[([\d,]+)\]\S* copy(?:-start)?\(%?([\w.\-]+)")
    copied = [(tuple(map(int, dims.split(","))), operand) for dims, operand in copy.findall(compiled.as_text())]
    size = sum(4 * math.prod(x.shape) for x in jax.tree.leaves(params))
    memory = compiled.memory_analysis()
    return {
        # Zeros that a gradient begins with may be copied: there are several of a shape.
        "copies": [operand for shape, operand in copied if shape in large and "broadcast" not in operand],
        "aliased": memory.alias_size_in_bytes / size,
        "temporaries": memory.temp_size_in_bytes / size,
    }


if __name__ == "__main__":
    lowered, params = programs(sys.argv[1])
    lowered["rounding update"] = programs(sys.argv[1], stochastic_rounding=True)[0]["update"]
    print(json.dumps({name: described(program, params) for name, program in lowered.items()}))
