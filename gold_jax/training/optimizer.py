"""The learning-rate schedules and the AdamW of transformers' Trainer, as optax transformations."""

import functools
import math
import operator
import re
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gold_jax.config import SFTConfig

# Names of parameters that transformers' Trainer keeps out of weight decay: norms and biases.
_NO_DECAY, _NORM = re.compile("bias|norm", re.IGNORECASE), re.compile("norm", re.IGNORECASE)
_DEFAULT_MIN_LR_RATE = 0.1


@dataclass(frozen=True)
class Schedule:
    """The float32 learning rate of an update from the number of those made before, as a value that can be compared."""

    peak: float
    kind: str
    total_steps: int
    warmup: int
    options: tuple[tuple[str, Any], ...]  # `lr_scheduler_kwargs`, sorted

    def __call__(self, count: jax.Array | int) -> jax.Array:
        """The learning rate after `count` updates."""
        step, options = jnp.asarray(count, jnp.float32), dict(self.options)
        return self.peak * jnp.where(
            step < self.warmup, self._in_warmup(step, options), self._after_warmup(step, options)
        )

    def _in_warmup(self, step: jax.Array, options: dict[str, Any]) -> jax.Array:
        done = step / max(1, self.warmup)
        if self.kind == "warmup_stable_decay":
            return _down(options.get("warmup_type", "linear"), 1.0 - done, options)
        if self.kind == "cosine_warmup_with_min_lr":  # begins above zero
            first = options.get("warmup_lr_rate")
            if first is None:
                return (step + 1.0) / max(1, self.warmup)
            return first + (1.0 - first) * step / max(1, self.warmup - 1)
        return done

    def _after_warmup(self, step: jax.Array, options: dict[str, Any]) -> jax.Array:
        decay_steps = max(1, self.total_steps - self.warmup)
        behind = step - self.warmup
        cycles = options.get("num_cycles", 0.5)
        if self.kind in ("constant", "constant_with_warmup"):
            return jnp.ones_like(step)
        if self.kind == "linear":
            return jnp.maximum(0.0, (self.total_steps - step) / decay_steps)
        if self.kind == "inverse_sqrt":
            scale = options.get("timescale", self.warmup or 10_000)
            return jax.lax.rsqrt((behind + scale) / scale)
        if self.kind == "polynomial":
            end = options.get("lr_end", 1e-7) / self.peak
            return (1.0 - end) * jnp.maximum(0.0, 1.0 - behind / decay_steps) ** options.get("power", 1.0) + end
        if self.kind == "cosine_with_restarts":  # the product is exact, so that a cycle ends where it should
            through = jnp.mod(options.get("num_cycles", 1) * behind, decay_steps) / decay_steps
            return jnp.where(behind < decay_steps, 0.5 * (1.0 + jnp.cos(jnp.pi * through)), 0.0)
        if self.kind == "warmup_stable_decay":
            last = options["num_decay_steps"]
            stable = options.get("num_stable_steps", self.total_steps - self.warmup - last)
            done = jnp.clip((behind - stable) / max(1, last), 0.0, 1.0)
            down = _down(options.get("decay_type", "cosine"), done, options, cycles)
            return jnp.where(behind < stable + last, down, options.get("min_lr_ratio", 0.0))
        floor = options.get("min_lr_rate", _DEFAULT_MIN_LR_RATE) if self.kind.endswith("min_lr") else 0.0
        if "min_lr" in options and self.peak:
            floor = options["min_lr"] / self.peak
        behind = behind + (self.kind == "cosine_warmup_with_min_lr")
        wave = 0.5 * (1.0 + jnp.cos(jnp.pi * cycles * 2.0 * behind / decay_steps))
        return jnp.maximum(0.0, wave * (1.0 - floor) + floor)


def _down(kind: str, done: jax.Array, options: dict[str, Any], cycles: float = 0.5) -> jax.Array:
    """From 1 to `min_lr_ratio` as `done` goes from 0 to 1, as warmup_stable_decay has it."""
    floor = options.get("min_lr_ratio", 0.0)
    shape = {"linear": 1.0 - done, "cosine": 0.5 * (1.0 + jnp.cos(jnp.pi * cycles * 2.0 * done))}
    shape["1-sqrt"] = 1.0 - jnp.sqrt(done)
    return jnp.maximum(0.0, shape[kind] * (1.0 - floor) + floor)


def make_schedule(config: SFTConfig, total_steps: int) -> Schedule:
    """The learning rates of a run, equal to those of `transformers.get_scheduler`.

    Warm-up rises linearly from 0, so the first update of a run with warm-up has learning rate 0 (but for the two schedules
    that say otherwise). With a schedule that has a minimum and neither `min_lr` nor `min_lr_rate`, the rate falls to a
    tenth of its peak.
    """
    kind = config.lr_scheduler_type
    warmup = 0 if kind == "constant" else config.warmup(total_steps)
    return Schedule(config.learning_rate, kind, total_steps, warmup, tuple(sorted(config.lr_scheduler_kwargs.items())))


def computed_in_float32(params: Any) -> Any:
    """Whether an array of a pytree stays float32 in a model that computes in bfloat16: norms do, by the names in its path."""
    return _by_name(_NORM, params)


def decay_mask(params: Any) -> Any:
    """Whether weight decay applies to each array of a pytree: to all but norms and biases, by the names in its path."""
    return jax.tree.map(operator.not_, _by_name(_NO_DECAY, params))


def _by_name(pattern: re.Pattern, params: Any) -> Any:
    """Whether the pattern is found in the path of each array of a pytree."""
    name = functools.partial(jax.tree_util.keystr, simple=True, separator=".")
    return jax.tree_util.tree_map_with_path(lambda path, _: bool(pattern.search(name(path))), params)


def make_optimizer(
    config: SFTConfig, total_steps: int | None, *, stochastic_rounding: bool = False
) -> optax.GradientTransformation:
    """Clipping by the global norm, then AdamW as PyTorch has it, with the learning rates of a run of `total_steps`.

    One update, with learning rate r, gradient g (already clipped), first and second moments m, v without their bias:
    `p <- p - r * (m / (sqrt(v) + epsilon) + weight_decay * p)`; the decay is left out for norms and biases, clipping where
    `max_grad_norm` is 0 or None. With `total_steps` None the learning rate is an argument of `update`, `learning_rate=`;
    with `stochastic_rounding` it is in `round_to_bfloat16`. The same settings give the same object, so that `Step` reuses
    its programs.
    """
    betas = config.adam_beta1, config.adam_beta2, config.adam_epsilon
    schedule = None if total_steps is None else make_schedule(config, total_steps)
    return _adamw(*betas, config.weight_decay, config.max_grad_norm, schedule, stochastic_rounding)


@functools.lru_cache(maxsize=8)
def _adamw(
    b1, b2, epsilon, weight_decay, max_grad_norm, schedule: Schedule | None, stochastic_rounding: bool
) -> optax.GradientTransformation:
    adamw = optax.chain(
        scale_by_adam(b1, b2, epsilon),
        optax.add_decayed_weights(weight_decay, mask=decay_mask),
        scale_by_given_rate() if schedule is None else optax.scale_by_learning_rate(schedule),
    )
    # A state of one shape, so that a resumed run may clip where it did not before.
    chained = optax.chain(clip_by_global_norm(max_grad_norm) if max_grad_norm else optax.identity(), adamw)
    return round_to_bfloat16(chained) if stochastic_rounding else chained


class RoundedState(NamedTuple):
    """The state of `round_to_bfloat16`."""

    inner: Any  # that of the transformation which makes the updates
    masters: Any  # the parameters before they are rounded, float32


def round_to_bfloat16(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Updates after which the parameters are numbers of bfloat16: those of `inner`, rounded stochastically.

    `inner` updates float32 masters in the state, and sees them as its parameters. Norms, which are computed with in
    float32, are their masters; every other parameter is its master, rounded by `stochastic_round`, to within float32's
    precision of the sum that applies the update. So an update much smaller than half a step of bfloat16, which rounding
    to the nearest would lose, moves a few of many weights, and the right amount on average.
    """
    inner = optax.with_extra_args_support(inner)

    def init(params):
        return RoundedState(inner.init(params), jax.tree.map(jnp.copy, params))

    def update(updates, state, params=None, **given):
        updates, inner_state = inner.update(updates, state.inner, state.masters, **given)
        masters = optax.apply_updates(state.masters, updates)
        rounded = jax.tree.map(
            lambda x, kept: x if kept else stochastic_round(x), masters, computed_in_float32(masters)
        )
        return jax.tree.map(jnp.subtract, rounded, params), RoundedState(inner_state, masters)

    return optax.GradientTransformationExtraArgs(init, update)


def stochastic_round(x: jax.Array) -> jax.Array:
    """Float32 `x` as numbers of bfloat16, in float32: the neighbour away from zero with the probability of x's distance
    from the other, in steps of bfloat16.

    The random number is a hash of `x` itself, not drawn with a key: equal numbers are rounded alike, on any device and
    whenever it is done, and numbers of bfloat16 stay what they are.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    mixed = bits
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):  # MurmurHash3's finalizer
        mixed = (mixed ^ (mixed >> shift)) * jnp.uint32(factor)
    return jax.lax.bitcast_convert_type((bits + (mixed & 0xFFFF)) & jnp.uint32(0xFFFF0000), jnp.float32)


def scale_by_given_rate() -> optax.GradientTransformationExtraArgs:
    """`optax.scale_by_learning_rate` with the rate as an argument of `update`, and the state of a schedule."""

    def update(updates, state, params=None, *, learning_rate: jax.Array, **others):
        scaled = jax.tree.map(lambda g: jnp.asarray(-learning_rate, g.dtype) * g, updates)
        return scaled, optax.ScaleByScheduleState(optax.safe_increment(state.count))

    return optax.GradientTransformationExtraArgs(optax.scale_by_schedule(jnp.zeros_like).init, update)


def scale_by_adam(b1: float, b2: float, epsilon: float) -> optax.GradientTransformation:
    """`optax.scale_by_adam`, its moments' bias corrected without cancellation.

    optax takes `1 - b2**count` in float32, which for `b2 = 0.999` is wrong by 1e-5 in the first updates; PyTorch takes
    it in float64. The state is optax's.
    """

    def correction(b: float, count: jax.Array) -> jax.Array | float:
        return -jnp.expm1(count * math.log(b)) if b else 1.0  # 1 - b**count

    def update(updates, state, params=None):
        count = optax.safe_increment(state.count)
        mu = jax.tree.map(lambda g, m: (1 - b1) * g + b1 * m, updates, state.mu)
        nu = jax.tree.map(lambda g, v: (1 - b2) * jnp.square(g) + b2 * v, updates, state.nu)
        first, second = correction(b1, count), correction(b2, count)
        scaled = jax.tree.map(lambda m, v: m / first / (jnp.sqrt(v / second) + epsilon), mu, nu)
        return scaled, optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformation(optax.scale_by_adam(b1, b2, epsilon).init, update)


def clip_by_global_norm(limit: float) -> optax.GradientTransformation:
    """Scales gradients so that their global norm is at most `limit`.

    What `optax.clip_by_global_norm` computes, but as one factor: XLA would write optax's quotients to memory, as much
    again as the gradients take.
    """

    def update(updates, state, params=None):
        norm = optax.global_norm(updates)
        factor = jnp.where(norm < limit, 1.0, limit / norm)
        return jax.tree.map(lambda g: (g * factor).astype(g.dtype), updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
