"""Divergences between two distributions, as pure functions of log-probabilities or probabilities.

Letters: `C` positions of a chunk, `K` entries compared one to one, `V` and `W` entries of student and teacher.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from gold_jax import cpu


def generalized_jsd(student_logp: jax.Array, teacher_logp: jax.Array, beta: float) -> jax.Array:
    """Generalised Jensen–Shannon divergence `[...]` in nats of log-probabilities `[..., K]`, `beta` a Python float in `[0, 1]`.

    With `m = (1-β)·student + β·teacher` this is `β·KL(teacher‖m) + (1-β)·KL(student‖m)`; `β=0` is
    `KL(teacher‖student)` and `β=1` is `KL(student‖teacher)`. Neither side has to sum to one: the sums are taken over
    the columns as they stand. A column to which a side gives exactly zero adds nothing to that side's term.

    Source: Agarwal et al., "On-Policy Distillation of Language Models", equation 1 (arXiv 2306.13649).

    >>> p, q = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.25, 0.75]))
    >>> round(float(generalized_jsd(p, q, 0.0)), 4)  # 0.25 log(1/2) + 0.75 log(3/2)
    0.1308
    >>> abs(float(generalized_jsd(p, p, 0.3))) < 1e-6
    True
    """
    if beta == 0:
        return jnp.sum(_kl_terms(teacher_logp, student_logp), -1)
    if beta == 1:
        return jnp.sum(_kl_terms(student_logp, teacher_logp), -1)
    mixture = jnp.logaddexp(student_logp + jnp.log1p(-beta), teacher_logp + jnp.log(beta))
    terms = beta * _kl_terms(teacher_logp, mixture) + (1 - beta) * _kl_terms(student_logp, mixture)
    return jnp.sum(terms, -1)


def _kl_terms(p: jax.Array, q: jax.Array) -> jax.Array:
    """`p · log(p/q)` from logarithms; zero, gradient included, where `p` is zero."""
    positive = p > -jnp.inf
    p = jnp.where(positive, p, 0.0)
    return jnp.where(positive, jnp.exp(p) * (p - q), 0.0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def sorted_l1(student: jax.Array, teacher: jax.Array, sort: str = "auto") -> jax.Array:
    """`Σ_i |sort(p)_i - sort(q)_i|`, the L1 distance of sorted probabilities, the shorter side padded with zeros.

    Of float32 `[..., V]` and `[..., W]`, none negative: `[...]`, between 0 and the two sums together. The gradient of a
    value is the sign of its distance to what stands opposite; where values of one side are equal, any order of theirs
    gives a subgradient. `sort` says who sorts: "xla", "host" (numpy through a callback, on CPUs alone), or "auto": the
    host for programs that run on CPUs where `gold_jax.cpu` is enabled and vocabularies are large (unless there is one
    core alone, or several devices), and XLA elsewhere.

    Source: Boizard et al., "Towards Cross-Tokenizer Distillation: the Universal Logit Distillation Loss for LLMs",
    equation 4 (arXiv 2402.12030).

    >>> round(float(sorted_l1(jnp.array([0.1, 0.9]), jnp.array([0.5, 0.2, 0.3]))), 4)  # .9-.5, .3-.1, .2-0
    0.8
    """
    return _l1_and_signs(student, teacher, sort)[0]


def _l1_and_signs(student, teacher, sort):
    """The distance `[...]`, and its gradient for the first side, int8 `[..., V]`."""

    def one(student_V, teacher_W):
        if sort == "host":
            return _by_host(student_V, teacher_W)
        large = max(student_V.size, teacher_W.size) >= cpu.FEWEST_SORTED_ON_HOST
        on_cpus = _by_host if sort == "auto" and large and cpu.sorts_on_host() else _packed_with_columns
        return jax.lax.platform_dependent(student_V, teacher_W, cpu=on_cpus, default=_with_columns)

    over_all = jnp.vectorize(one, signature="(v),(w)->(),(v)")
    return over_all(student.astype(jnp.float32), teacher.astype(jnp.float32))


def _by_host(student_V, teacher_W):
    """numpy sorts, whole chunks at a time: under `vmap` the callback is called once with all rows."""
    if not cpu.can_call_host():
        raise ValueError(
            "sorting on the host takes two cores or more and a single device, and this process has fewer cores or more "
            "devices; sort with xla."
        )
    shapes = jax.ShapeDtypeStruct((), jnp.float32), jax.ShapeDtypeStruct(student_V.shape, jnp.int8)
    return jax.pure_callback(cpu.sorted_l1_and_signs, shapes, student_V, teacher_W, vmap_method="broadcast_all")


def _sorted_bits(x: jax.Array, *more: jax.Array) -> tuple[jax.Array, ...]:
    """Bit patterns of `x`, ascending, and `more` along with them.

    Probabilities are non-negative, so their bit patterns sort as integers, which XLA does faster than floats.
    """
    return jax.lax.sort((jax.lax.bitcast_convert_type(x, jnp.int32), *more), num_keys=1, is_stable=False)


def _difference(ours: jax.Array, theirs: jax.Array) -> jax.Array:
    """Of ascending bit patterns, the shorter side with zeros in front, so that the largest values stand opposite each other."""
    size = max(ours.size, theirs.size)
    padded = (jnp.pad(x, (size - x.size, 0)) for x in (ours, theirs))
    ours, theirs = (jax.lax.bitcast_convert_type(x, jnp.float32) for x in padded)
    return ours - theirs


def _packed_with_columns(student_V, teacher_W):
    """As `_with_columns`, for CPUs: XLA sorts one integer of 64 bits, the column in the lower half, faster than a pair."""
    bits_V, columns_V = jax.lax.bitcast_convert_type(student_V, jnp.int32), jax.lax.iota(jnp.int32, student_V.size)
    with jax.enable_x64(True):
        packed = jax.lax.sort(bits_V.astype(jnp.int64) << np.int64(32) | columns_V.astype(jnp.int64), is_stable=False)
        ours, columns = (packed >> np.int64(32)).astype(jnp.int32), packed.astype(jnp.int32)
    difference = _difference(ours, _sorted_bits(teacher_W)[0])
    signs = jnp.sign(difference[-student_V.size :]).astype(jnp.int8)
    return jnp.sum(jnp.abs(difference)), _by_column_scattered(columns, signs)


def _with_columns(student_V, teacher_W):
    """XLA sorts the student's values along with their columns, so that signs by rank go back to where they belong."""
    ours, columns = _sorted_bits(student_V, jax.lax.iota(jnp.int32, student_V.size))
    difference = _difference(ours, _sorted_bits(teacher_W)[0])
    signs = jnp.sign(difference[-student_V.size :]).astype(jnp.int8)
    # TPUs scatter one element after the other, and sort many at once.
    by_column = jax.lax.platform_dependent(columns, signs, tpu=_by_column_sorted, default=_by_column_scattered)
    return jnp.sum(jnp.abs(difference)), by_column


def _by_column_sorted(columns, signs):
    packed = 4 * columns + signs.astype(jnp.int32) + 1  # one array to sort and not two
    return (jax.lax.sort(packed, is_stable=False) & 3).astype(jnp.int8) - 1


def _by_column_scattered(columns, values):
    return jnp.zeros_like(values).at[columns].set(values, mode="promise_in_bounds", unique_indices=True)


def _sorted_l1_forward(student, teacher, sort):
    loss, signs = _l1_and_signs(student, teacher, sort)
    return loss, (signs, student, teacher)


def _sorted_l1_backward(sort, residuals, cotangent):
    signs, student, teacher = residuals
    back = _l1_and_signs(teacher, student, sort)[1]  # dead code for XLA unless this gradient is used
    scaled = (x * cotangent[..., None] for x in (signs, back))
    return tuple(gradient.astype(x.dtype) for gradient, x in zip(scaled, (student, teacher)))


sorted_l1.defvjp(_sorted_l1_forward, _sorted_l1_backward)


def sorted_l1_top_k(student: jax.Array, teacher: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """`sorted_l1` over the `k` largest values of either side (all of it, if it has fewer), and a bound on the tails.

    Of probabilities `[..., V]` and `[..., W]`: the distance `[...]` over the heads, and the bound `[...]`. The exact
    distance lies between the first and the sum of both, because the tails differ by at most their two masses.
    """
    size = max(min(k, student.shape[-1]), min(k, teacher.shape[-1]))

    def head_and_tail(x, largest):
        top = largest(x, min(k, x.shape[-1]))
        padded = jnp.pad(top, [(0, 0)] * (x.ndim - 1) + [(0, size - top.shape[-1])])
        return padded, jnp.maximum(jnp.sum(x, -1) - jnp.sum(top, -1), 0.0)

    # No gradient goes to a teacher, so that its columns need not be known.
    (s, s_tail), (t, t_tail) = head_and_tail(student, _top_values), head_and_tail(teacher, _sorted_top_values)
    return jnp.sum(jnp.abs(s - t), -1), jax.lax.stop_gradient(s_tail + t_tail)


def _top_values(x: jax.Array, k: int) -> jax.Array:
    """The `k` largest of `[..., V]`, descending."""
    return jax.lax.top_k(x, k)[0]


def _sorted_top_values(x: jax.Array, k: int) -> jax.Array:
    """`_top_values` without columns unless a gradient needs them: TPUs sort all of `x` for it, and `top_k` sorts both."""
    return jax.lax.platform_dependent(
        x, tpu=lambda x: jnp.flip(jax.lax.sort(x, is_stable=False)[..., -k:], -1), default=lambda x: _top_values(x, k)
    )
