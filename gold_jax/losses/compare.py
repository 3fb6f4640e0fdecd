"""The ways to compare two vocabularies: each a pure function of a chunk of groups, and one line in `COMPARES`.

A side's columns come *ordered*: first the `matched` entries, in step on both sides, then that side's others.
Letters: `C` groups of a chunk, `V` and `W` columns of student and teacher, `K` matched columns.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gold_jax.losses.divergence import generalized_jsd, sorted_l1, sorted_l1_top_k


class GroupDistribution(NamedTuple):
    """A chunk of groups as one model sees them.

    Attributes:
        logp: `[C, V]` logarithm of the merged distribution. Where the merge multiplied probabilities in, it sums to
            less than one.
        missing_mass: `[C]` one less the sum of the merged distribution, as the merge knows it.
        token_column: `[C]` column of the token of the group's text that the distribution is over: under `boundary` its
            first, under `chain` its last.
        suffix_logp: `[C]` log-probability of the group's tokens that the merge did not multiply in; 0 without any.
        is_single_token: `[C]` bool, whether there is none such.
        prefix_column: `[V - K]` for each unmatched column the matched one whose surface is the longest prefix of its
            own; `K` where there is none, `K + 1` where it is masked.
        event_siblings: `[V]` how many other columns give to the same event as each; not 0 for masked columns.
    """

    logp: jax.Array
    missing_mass: jax.Array
    token_column: jax.Array
    suffix_logp: jax.Array
    is_single_token: jax.Array
    prefix_column: jax.Array
    event_siblings: jax.Array


@dataclasses.dataclass(frozen=True)
class CompareOptions:
    """What a comparison may need to know beside the two distributions; all of it static.

    Attributes:
        matched: number of leading columns that mean the same on both sides.
        beta: skew of the divergence, as in `generalized_jsd`.
        matched_weight, unmatched_weight: of `hybrid`; None for both means `matched / teacher vocabulary` and its
            complement.
        top_k: how many values of sorted tails are compared; 0: all.
        sort: who sorts whole tails, as in `sorted_l1`.
        rest: whether both sides have columns that are routed nowhere, so that these can be an event of their own.
        masked: whether any column is masked, so that what is left has to be renormalised.
        temperature: of `alm`: probabilities are raised to one over it.
    """

    matched: int
    beta: float = 0.5
    matched_weight: float | None = None
    unmatched_weight: float | None = None
    top_k: int = 0
    sort: str = "auto"
    rest: bool = True
    masked: bool = False
    temperature: float = 100.0


Loss = tuple[jax.Array, dict[str, jax.Array]]
Compare = Callable[[GroupDistribution, GroupDistribution, CompareOptions], Loss]

# TRL takes the logarithm of probabilities no smaller than this; merged groups of rare tokens do fall below it.
HYBRID_FLOOR = 1e-8
# Below it float32 has no full precision: an event that underflowed has a finite logarithm and no gradient.
TINY = 1.2e-38
# Log-probabilities closer to 0 than this count as this: float32 cannot tell what would be left beside them.
LOGP_CEILING = 6e-8


def compare_sorted(student: GroupDistribution, teacher: GroupDistribution, options: CompareOptions) -> Loss:
    """ULD: both distributions sorted and padded, L1. To `[C]` and its parts."""
    return _sorted_part(jnp.exp(student.logp), jnp.exp(teacher.logp), options)


def compare_hybrid(student: GroupDistribution, teacher: GroupDistribution, options: CompareOptions) -> Loss:
    """GOLD: `w_matched · D_β(matched columns as they stand) + w_unmatched · L1(sorted unmatched)`. To `[C]` and parts.

    The matched columns are not renormalised and their probabilities are held above 1e-8, as TRL does; where a side
    has no unmatched entry, the second term is zero.
    """
    k = options.matched
    floor = jnp.log(HYBRID_FLOOR)

    def floored(logp):
        return jnp.where(logp >= floor, logp, floor)

    matched = generalized_jsd(floored(student.logp[:, :k]), floored(teacher.logp[:, :k]), options.beta)
    if k < student.logp.shape[-1] and k < teacher.logp.shape[-1]:
        unmatched, parts = _sorted_part(jnp.exp(student.logp[:, k:]), jnp.exp(teacher.logp[:, k:]), options)
    else:
        unmatched, parts = jnp.zeros_like(matched), {}
    if options.matched_weight is None:
        matched_weight = k / teacher.logp.shape[-1]
        unmatched_weight = 1.0 - matched_weight
    else:
        matched_weight, unmatched_weight = options.matched_weight, options.unmatched_weight
    loss = matched_weight * matched + unmatched_weight * unmatched
    return loss, {"matched": matched, "unmatched": unmatched} | parts


def _sorted_part(student, teacher, options):
    if not options.top_k:
        return sorted_l1(student, teacher, options.sort), {}
    loss, bound = sorted_l1_top_k(student, teacher, options.top_k)
    return loss, {"tail_bound": bound}


def compare_shared(student: GroupDistribution, teacher: GroupDistribution, options: CompareOptions) -> Loss:
    """`D_β` over the matched entries, each side renormalised. To `[C]`.

    With one tokenizer, where every entry is matched, this is GKD.
    """
    k = options.matched
    return generalized_jsd(
        jax.nn.log_softmax(student.logp[:, :k], -1), jax.nn.log_softmax(teacher.logp[:, :k], -1), options.beta
    ), {}


def compare_shared_rest(student: GroupDistribution, teacher: GroupDistribution, options: CompareOptions) -> Loss:
    """`D_β` over the matched entries and one bucket with all the rest, so that either side sums to one. To `[C]`.

    Where a side has no unmatched entry, a bucket would have nothing to hold there: then it is `compare_shared`.
    """
    k = options.matched
    if k in (student.logp.shape[-1], teacher.logp.shape[-1]):
        return compare_shared(student, teacher, options)

    def with_bucket(side):
        rest = jnp.sum(jnp.exp(side.logp[:, k:]), -1) + side.missing_mass
        return jnp.concatenate([side.logp[:, :k], _log(rest)[:, None]], -1)

    return generalized_jsd(with_bucket(student), with_bucket(teacher), options.beta), {}


def compare_projected(student: GroupDistribution, teacher: GroupDistribution, options: CompareOptions) -> Loss:
    """`D_β` over prefixes: every column gives its probability to the longest matched prefix of its surface. To `[C]`.

    What has no such prefix (special tokens, padding rows, what a merge left out) is one event more.
    """
    events = [prefix_events(side, options) for side in (student, teacher)]
    return generalized_jsd(*map(_log, events), options.beta), _unmatched_mass(student, teacher, options)


def compare_events(student: GroupDistribution, teacher: GroupDistribution, options: CompareOptions) -> Loss:
    """As `compare_projected`, and the text that stands there is an event of its own, taken out of its prefix. To `[C]`.

    A student for whom no entry but the text's own gives to that prefix cannot tell the two apart: then it is not asked
    to, and the text stays in its prefix event. A teacher of that kind says that nothing but the text begins so here; at
    `β = 1` an answer to that would cost without bound, so that there the text stays as well.
    """
    together = _is_only_entry_of_event(student)
    if options.beta == 1:
        together |= _is_only_entry_of_event(teacher)
    apart = ~together
    events = [text_events(side, apart, options) for side in (student, teacher)]
    return generalized_jsd(*map(_log, events), options.beta), _unmatched_mass(student, teacher, options)


def prefix_events(side: GroupDistribution, options: CompareOptions) -> jax.Array:
    """The probabilities that `projected` compares, `[C, K + 1]` (`[C, K]` without the rest); they sum to one."""
    return _renormalized(_project(jnp.exp(side.logp), side, options), options)


def text_events(side: GroupDistribution, apart: jax.Array, options: CompareOptions) -> jax.Array:
    """The probabilities that `events` compares: the text's, where `apart [C]` says so, then `prefix_events`.

    Nothing is subtracted that could cancel: what remains of the prefix is summed up by itself.
    """
    rows = jnp.arange(side.token_column.shape[0])
    p = jnp.exp(side.logp)
    text = jnp.where(apart, p[rows, side.token_column] * jnp.exp(side.suffix_logp), 0.0)
    left = jnp.where(
        apart, -jnp.expm1(side.suffix_logp), 1.0
    )  # of the token's probability, what goes on in another way
    p = p.at[rows, side.token_column].multiply(left, unique_indices=True)
    return _renormalized(jnp.concatenate([text[:, None], _project(p, side, options)], -1), options)


def _is_only_entry_of_event(side: GroupDistribution) -> jax.Array:
    """Bool `[C]`: the text is one entry, and no other of this side gives to the same event."""
    return side.is_single_token & (side.event_siblings[side.token_column] == 0)


def _project(p: jax.Array, side: GroupDistribution, options: CompareOptions) -> jax.Array:
    """`[C, V]` to `[C, K + 2]`: prefixes, what has none, what is masked."""
    k = options.matched
    events = jnp.pad(p[:, :k], [(0, 0), (0, 2)])
    events = events.at[:, side.prefix_column].add(p[:, k:], indices_are_sorted=True)
    return events.at[:, k].add(side.missing_mass)


def _renormalized(events: jax.Array, options: CompareOptions) -> jax.Array:
    """Without the masked and, where not both sides have it, without what has no prefix; summing to one again."""
    events = events[:, :-1] if options.rest else events[:, :-2]
    if options.masked or not options.rest:
        events = events / jnp.maximum(jnp.sum(events, -1, keepdims=True), TINY)
    return events


def _unmatched_mass(
    student: GroupDistribution, teacher: GroupDistribution, options: CompareOptions
) -> dict[str, jax.Array]:
    """What either side gives to entries that the other has not, `[C]` each: how much the projection moves."""
    sides = {"student": student, "teacher": teacher}
    return {
        f"{name}_unmatched": jnp.sum(jnp.exp(jax.lax.stop_gradient(side.logp[:, options.matched :])), -1)
        for name, side in sides.items()
    }


def compare_alm(student: GroupDistribution, teacher: GroupDistribution, options: CompareOptions) -> Loss:
    """Approximate likelihood matching: `D_β` between two Bernoulli distributions, "this text" and "another". To `[C]`.

    The probability of either side is that of the group's text, raised to one over the temperature.

    Source: Minixhofer et al., "Universal Cross-Tokenizer Distillation via Approximate Likelihood Matching"
    (arXiv 2503.20083); there the divergence is `β = 0` and the temperature 100.
    """

    def bernoulli(side):
        x = jnp.minimum(_text_logp(side) / options.temperature, -LOGP_CEILING)
        return jnp.stack([x, jnp.log(-jnp.expm1(x))], -1)

    return generalized_jsd(bernoulli(student), bernoulli(teacher), options.beta), {}


def compare_reverse_kl(student: GroupDistribution, teacher: GroupDistribution, options: CompareOptions) -> Loss:
    """`KL(student‖teacher)` estimated on text that the student drew. To `[C]`.

    The value is the group's log-ratio; the gradient is the policy gradient with that ratio as the reward, each group
    answering for itself (no discounted return of later ones). Unbiased only for text drawn at temperature 1 from the
    whole distribution.

    Source: Gu et al., "MiniLLM: Knowledge Distillation of Large Language Models", equation 2 (arXiv 2306.08543).
    """
    logp = _text_logp(student)
    ratio = jax.lax.stop_gradient(logp - _text_logp(teacher))
    return ratio + ratio * (logp - jax.lax.stop_gradient(logp)), {}


def _text_logp(side: GroupDistribution) -> jax.Array:
    """Log-probability `[C]` of the group's text."""
    return jnp.take_along_axis(side.logp, side.token_column[:, None], -1)[:, 0] + side.suffix_logp


def _log(p: jax.Array) -> jax.Array:
    return jnp.log(jnp.maximum(p, TINY))


COMPARES: dict[str, Compare] = {
    "sorted": compare_sorted,
    "hybrid": compare_hybrid,
    "shared": compare_shared,
    "shared_rest": compare_shared_rest,
    "projected": compare_projected,
    "events": compare_events,
    "alm": compare_alm,
    "reverse_kl": compare_reverse_kl,
}
