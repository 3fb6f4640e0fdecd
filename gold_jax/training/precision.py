"""What rounding to bfloat16 keeps from a model: a weight that moves by less than half a step of bfloat16 is rounded back.

Parameters are float32, and a run that computes in bfloat16 rounds them for every product. The weights of most published
checkpoints are bfloat16 numbers: at the beginning each is half a step, 2⁻⁹ to 2⁻⁸ of its size, from the next.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gold_jax.training.optimizer import Schedule, computed_in_float32

LEAST_SHARE = 0.1  # of the weights that is worth a line
_HALF_STEP = 2.0**-9  # the largest of weights below 1
_RATES = 10_000  # that are added up; of longer runs so many, evenly spaced, stand for all


def describe_unmoved(params: Any, schedule: Schedule, steps: int) -> str | None:
    """What to say of a run in bfloat16 whose learning rates, added up, are less than many weights need; else None.

    AdamW moves a weight by about the learning rate at most.
    """
    updates = np.linspace(0, steps - 1, min(steps, _RATES)).round()
    distance = steps * float(np.mean(np.asarray(schedule(updates), np.float64)))
    if distance >= _HALF_STEP:
        return None
    share = share_out_of_reach(params, distance)
    if share < LEAST_SHARE:
        return None
    return (
        f"{share:.0%} of the weights cannot change in what this run computes: its learning rates add up to {distance:.2g}, "
        "and bfloat16 rounds so little back to where it was; --bf16_stochastic_round, more updates, a larger "
        "--learning_rate or --bf16 false change that"
    )


def share_out_of_reach(params: Any, distance: float) -> float:
    """The share of the weights that no change up to `distance` rounds to another bfloat16; norms aside.

    Of a sharded model, of the part that one device of this process holds.
    """
    leaves, kept = jax.tree.leaves(params), jax.tree.leaves(computed_in_float32(params))
    weights = [x.addressable_shards[0].data for x, as_it_is in zip(leaves, kept) if not as_it_is]
    return float(_unmoved(weights, distance)) / sum(x.size for x in weights)


@jax.jit
def _unmoved(weights: list[jax.Array], distance: jax.Array) -> jax.Array:
    def count(x):
        x = x.astype(jnp.float32)
        rounded = jax.lax.reduce_precision(x, 8, 7)
        _, exponent = jnp.frexp(rounded)
        half = jnp.ldexp(jnp.float32(1), exponent - 9)  # `frexp` gives [0.5, 1), and bfloat16 eight digits of it
        return jnp.sum((x != 0) & (half - jnp.abs(x - rounded) > distance), dtype=jnp.float32)

    return sum(map(count, weights), jnp.float32(0))
