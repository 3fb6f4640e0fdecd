"""The ways to compare two vocabularies: each a pure function of the two sides' logarithms, and one line in `COMPARES`.

A side's columns come *ordered*: first the `matched` entries, in step on both sides, then that side's others. A row is
a group's merged distribution in logarithms; a merge that multiplied probabilities in leaves it summing to less than one.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from gold_jax.losses.divergence import generalized_jsd, sorted_l1, sorted_l1_top_k


@dataclasses.dataclass(frozen=True)
class CompareOptions:
    """What a comparison may need beside the two distributions.

    `matched` is the number of leading columns that mean the same on both sides. The weights belong to `hybrid`; None
    for both means `matched / teacher vocabulary` and its complement. `top_k` cuts sorted tails (0: exact).
    """

    matched: int
    beta: float = 0.5
    matched_weight: float | None = None
    unmatched_weight: float | None = None
    top_k: int = 0


# TRL takes the logarithm of probabilities no smaller than this; merged groups of rare tokens do fall below it.
HYBRID_FLOOR = 1e-8


def compare_sorted(student_logp: jax.Array, teacher_logp: jax.Array, options: CompareOptions):
    """ULD: both distributions sorted and padded, L1. `[C, V]`, `[C, W]` to `[C]` and its parts."""
    loss, parts = _sorted_part(jnp.exp(student_logp), jnp.exp(teacher_logp), options.top_k)
    return loss, parts


def compare_hybrid(student_logp: jax.Array, teacher_logp: jax.Array, options: CompareOptions):
    """GOLD: `w_matched · D_β(matched columns as they stand) + w_unmatched · L1(sorted unmatched)`.

    `[C, V]`, `[C, W]` to `[C]` and its parts. The matched columns are not renormalised and their probabilities are
    held above 1e-8, as TRL does; where a side has no unmatched entry, the second term is zero.
    """
    k = options.matched
    floor = jnp.log(HYBRID_FLOOR)

    def held(logp):
        return jnp.where(logp >= floor, logp, floor)

    matched = generalized_jsd(held(student_logp[:, :k]), held(teacher_logp[:, :k]), options.beta)
    if k < student_logp.shape[-1] and k < teacher_logp.shape[-1]:
        unmatched, parts = _sorted_part(jnp.exp(student_logp[:, k:]), jnp.exp(teacher_logp[:, k:]), options.top_k)
    else:
        unmatched, parts = jnp.zeros_like(matched), {}
    if options.matched_weight is None:
        matched_weight = k / teacher_logp.shape[-1]
        unmatched_weight = 1.0 - matched_weight
    else:
        matched_weight, unmatched_weight = options.matched_weight, options.unmatched_weight
    loss = matched_weight * matched + unmatched_weight * unmatched
    return loss, {"matched": matched, "unmatched": unmatched} | parts


def compare_shared(student_logp: jax.Array, teacher_logp: jax.Array, options: CompareOptions):
    """`D_β` over the matched entries, each side renormalised. `[C, V]`, `[C, W]` to `[C]`.

    With one tokenizer, where every entry is matched, this is GKD.
    """
    k = options.matched
    return generalized_jsd(
        jax.nn.log_softmax(student_logp[:, :k], -1), jax.nn.log_softmax(teacher_logp[:, :k], -1), options.beta
    ), {}


def _sorted_part(student, teacher, top_k):
    if not top_k:
        return sorted_l1(student, teacher), {}
    loss, bound = sorted_l1_top_k(student, teacher, top_k)
    return loss, {"tail_bound": bound}


Compare = Callable[[jax.Array, jax.Array, CompareOptions], tuple[jax.Array, dict[str, jax.Array]]]

COMPARES: dict[str, Compare] = {
    "sorted": compare_sorted,
    "hybrid": compare_hybrid,
    "shared": compare_shared,
}
