"""The ways to compare two models over one group of tokens: each a pure function, and one line in `COMPARISONS`.

A comparison is `fn(student, teacher, overlap, *, options) -> (loss [], parts {name: []})`. It sees ONE group: each side's
distribution (`GroupDistribution`) and what the two vocabularies have in common (`Overlap`); `distill_loss` maps it over
the groups of a chunk with `jax.vmap` and jits it. Its keyword-only arguments are its options: Python values, known when
it is traced. Divergences are in nats. docs/add-a-loss.md adds one.

A side's columns come *ordered*: first the `K` matched entries, in step on both sides, then that side's others. Letters:
`C` groups of a chunk, `V` and `W` columns of student and teacher, `K` matched columns.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp

from gold_jax.losses.divergence import generalized_jsd, sorted_l1, sorted_l1_top_k
from gold_jax.losses.options import Option, Parameter, complete, parameters
from gold_jax.values import FRACTION, NOT_NEGATIVE, POSITIVE, SORTS, Range


class GroupDistribution(NamedTuple):
    """One group as one model sees it; `V` stands for that model's columns, `K` for the matched ones.

    Attributes:
        scores: `[V]` logarithm of the merged distribution up to `log_scale`, the largest about 0.
        log_scale: `[]` log normaliser: `logp = scores + log_scale`.
        missing_mass: `[]` one less the sum of the merged distribution, as the merge knows it.
        token_column: `[]` column of the token of the group's text that it is over: under `boundary` the first, under
            `chain` the last.
        suffix_logp: `[]` log-probability of the group's tokens that the merge did not multiply in; 0 without any.
        is_single_token: `[]` bool, whether there is none such.
        prefix_column: `[V - K]` for each unmatched column the matched one whose surface is the longest prefix of its own;
            `K` where there is none, `K + 1` where it is masked. The same for every group.
        event_siblings: `[V]` how many other columns give to the same event as each; not 0 for masked ones. The same for
            every group.
    """

    scores: jax.Array
    log_scale: jax.Array
    missing_mass: jax.Array
    token_column: jax.Array
    suffix_logp: jax.Array
    is_single_token: jax.Array
    prefix_column: jax.Array
    event_siblings: jax.Array

    @classmethod
    def single_token(cls, logp: jax.Array, token_column: int = 0, matched: int | None = None) -> "GroupDistribution":
        """A group of one token: `logp [V]`, the column of its token, and how many columns are matched (None: all).

        No unmatched column has a matched prefix.
        """
        size = logp.shape[-1]
        matched = size if matched is None else matched
        prefix = jnp.full(size - matched, matched, jnp.int32)
        zero = jnp.zeros((), logp.dtype)
        return cls(
            logp, zero, zero, jnp.int32(token_column), zero, jnp.bool_(True), prefix, event_siblings(prefix, size)
        )

    @property
    def logp(self) -> jax.Array:
        """`[V]` logarithm of the merged distribution; it sums to less than one where the merge multiplied probabilities in."""
        return self.scores + self.log_scale[..., None]

    def split_logp(self, matched: int) -> tuple[jax.Array, jax.Array]:
        """`logp` of the matched columns and of the others. Cut before they are scaled, so that each fuses with its reader."""
        return self.scores[:matched] + self.log_scale, self.scores[matched:] + self.log_scale


# Which axes `jax.vmap` maps: what differs between groups, and not what the vocabulary decides.
PER_GROUP = GroupDistribution._make((0, 0, 0, 0, 0, 0, None, None))


class Overlap(NamedTuple):
    """What two vocabularies have in common; Python values, known when a loss is traced.

    Attributes:
        matched: `K`, the number of leading columns that mean the same on both sides.
        unprefixed: whether both sides have columns without a matched prefix, which can then be an event.
        masked: whether any column is masked, so that what is left has to be renormalised.
    """

    matched: int
    unprefixed: bool = True
    masked: bool = False


Loss = tuple[jax.Array, dict[str, jax.Array]]
BoundCompare = Callable[[GroupDistribution, GroupDistribution, Overlap], Loss]


@dataclasses.dataclass(frozen=True, eq=False)
class Comparison:
    """A line of `COMPARISONS`: a function, and what it reads and requires.

    Equal to itself alone: a function that is registered again is traced again, as what it calls may have changed.
    """

    function: Callable[..., Loss]
    reads_text: bool = False  # it reads `suffix_logp`, a group's text: then the batch brings all tokens of it
    projects: bool = False  # it reads `prefix_column`, so that entries can be masked
    on_policy: bool = False  # it is meaningful only on text that the student drew
    built_in: bool = True  # not one that `register_comparison` added
    source: bytes | None = None  # the content of the file that it was read from; None: it is not of `FILE.py:FUNCTION`

    @functools.cached_property
    def options(self) -> Mapping[str, Parameter]:
        """Its options by name: the function's keyword-only arguments."""
        return parameters(self.function)

    def bind(self, **options: Any) -> BoundCompare:
        """The function with its options; ValueError for one that it has not, or a value out of range."""
        name = getattr(self.function, "__name__", "the comparison")
        return functools.partial(self.function, **complete(name, self.options, options))


def compare_groups(
    compare: BoundCompare, student: GroupDistribution, teacher: GroupDistribution, overlap: Overlap
) -> Loss:
    """A comparison of `C` groups at once: loss and parts `[C]`. All but what is the same for every group has `C` in front."""
    one = jax.vmap(lambda s, t: compare(s, t, overlap), in_axes=(PER_GROUP, PER_GROUP))
    return one(student, teacher)


def event_siblings(prefix_column: jax.Array, size: int) -> jax.Array:
    """How many other columns give to the event of each of `size` columns, `[V]`; one more for masked ones."""
    k = size - prefix_column.shape[0]
    event = jnp.concatenate([jnp.arange(k), prefix_column])
    members = jnp.zeros(k + 2, jnp.int32).at[event].add(1).at[k + 1].add(1)
    return members[event] - 1


# Options of comparisons, each with the flag that sets it and what a run says of it.
# fmt: off
Beta = Annotated[float, Option("Skew of the divergence.", FRACTION, "beta", "beta {:g}".format)]
TopK = Annotated[int, Option("Sort only so many.", NOT_NEGATIVE, "uld_top_k", lambda k: f"sorted top {k}" if k else "")]
Sort = Annotated[str, Option("Who sorts.", Range(f"that is one of {', '.join(SORTS)}", SORTS.__contains__), "uld_sort",
    lambda _: "")]
MatchedWeight = Annotated[float | None, Option("Weight of the matched entries.", NOT_NEGATIVE, "uld_hybrid_matched_weight",
    lambda w: "weights by overlap" if w is None else f"weights {w:g} matched")]
UnmatchedWeight = Annotated[float | None, Option("Weight of the others.", NOT_NEGATIVE, "uld_hybrid_unmatched_weight",
    lambda w: "" if w is None else f"{w:g} unmatched")]
Temperature = Annotated[float, Option("Probabilities are raised to one over it.", POSITIVE, "alm_temperature",
    "probabilities to the power 1/{:g}".format)]
# fmt: on

# TRL takes the logarithm of probabilities no smaller than this; merged groups of rare tokens do fall below it.
HYBRID_FLOOR = 1e-8
# Below it float32 has no full precision: an event that underflowed has a finite logarithm and no gradient.
TINY = 1.2e-38
# Log-probabilities closer to 0 than this count as this: float32 cannot tell what would be left beside them.
LOGP_CEILING = 6e-8


def uld(
    student: GroupDistribution, teacher: GroupDistribution, overlap: Overlap, *, top_k: TopK = 0, sort: Sort = "auto"
) -> Loss:
    """Universal logit distillation: `Σ_i |sort(p)_i - sort(q)_i|`, the shorter side padded with zeros; between 0 and 2.

    Nothing is matched: the largest probability of the student faces the teacher's largest, whatever they spell. `sort`
    is that of `sorted_l1`; with `top_k` only so many of the largest values are compared (0: all), and the part
    `tail_bound` is the most that the rest could add.

    Source: Boizard et al., "Towards Cross-Tokenizer Distillation: the Universal Logit Distillation Loss for LLMs",
    equation 4 (arXiv 2402.12030).

    >>> p, q = (GroupDistribution.single_token(jnp.log(jnp.array(x))) for x in ([0.1, 0.9], [0.5, 0.2, 0.3]))
    >>> round(float(uld(p, q, Overlap(0))[0]), 4)  # |.9 - .5| + |.1 - .3| + |0 - .2|
    0.8
    """
    return _sorted_part(jnp.exp(student.logp), jnp.exp(teacher.logp), top_k, sort)


def hybrid(
    student: GroupDistribution,
    teacher: GroupDistribution,
    overlap: Overlap,
    *,
    beta: Beta = 0.5,
    matched_weight: MatchedWeight = None,
    unmatched_weight: UnmatchedWeight = None,
    top_k: TopK = 0,
    sort: Sort = "auto",
) -> Loss:
    """GOLD: `w_matched · D_β(matched columns as they stand) + w_unmatched · Σ_i |sort(p unmatched)_i - sort(q unmatched)_i|`.

    The matched columns are not renormalised and their probabilities are held above 1e-8, as TRL does; where a side
    has no unmatched entry, the second term is zero. Weights of None are `K / W` and its complement; `top_k` and `sort`
    are those of `uld`. The parts `matched` and `unmatched` are those before the weights.

    Source: Patiño et al., "Unlocking On-Policy Distillation for Any Model Family" (2025), and TRL's
    `trl.experimental.gold` (general online logit distillation), which this follows to float32's precision.

    >>> p = GroupDistribution.single_token(jnp.log(jnp.array([0.5, 0.2, 0.3])), matched=1)
    >>> q = GroupDistribution.single_token(jnp.log(jnp.array([0.5, 0.4, 0.1])), matched=1)
    >>> round(float(hybrid(p, q, Overlap(1), matched_weight=1.0, unmatched_weight=1.0)[0]), 4)  # 0 + |.3 - .4| + |.2 - .1|
    0.2
    """
    k, floor = overlap.matched, jnp.log(HYBRID_FLOOR)

    def floored(logp_K):
        return jnp.where(logp_K >= floor, logp_K, floor)

    (student_K, student_rest), (teacher_K, teacher_rest) = student.split_logp(k), teacher.split_logp(k)
    matched = generalized_jsd(floored(student_K), floored(teacher_K), beta)
    if student_rest.size and teacher_rest.size:
        unmatched, parts = _sorted_part(jnp.exp(student_rest), jnp.exp(teacher_rest), top_k, sort)
    else:
        unmatched, parts = jnp.zeros_like(matched), {}
    if matched_weight is None:
        matched_weight = k / teacher.scores.size
        unmatched_weight = 1.0 - matched_weight
    elif unmatched_weight is None:
        raise ValueError(f"matched_weight is {matched_weight!r}; it must come with an unmatched_weight.")
    loss = matched_weight * matched + unmatched_weight * unmatched
    return loss, {"matched": matched, "unmatched": unmatched} | parts


def _sorted_part(student_V, teacher_W, top_k, sort):
    if not top_k:
        return sorted_l1(student_V, teacher_W, sort), {}
    loss, bound = sorted_l1_top_k(student_V, teacher_W, top_k)
    return loss, {"tail_bound": bound}


def shared(student: GroupDistribution, teacher: GroupDistribution, overlap: Overlap, *, beta: Beta = 0.5) -> Loss:
    """`D_β(p / Σ_K p, q / Σ_K q)` over the `K` matched entries, each side renormalised over them.

    With one tokenizer, where every entry is matched, this is generalised knowledge distillation (GKD).

    Source: Agarwal et al., "On-Policy Distillation of Language Models", equation 1 (arXiv 2306.13649).

    >>> p = GroupDistribution.single_token(jnp.log(jnp.array([0.2, 0.2, 0.6])), matched=2)
    >>> q = GroupDistribution.single_token(jnp.log(jnp.array([0.1, 0.3, 0.6])), matched=2)
    >>> round(float(shared(p, q, Overlap(2), beta=0.0)[0]), 4)  # 0.25 log(1/2) + 0.75 log(3/2)
    0.1308
    """
    k = overlap.matched
    return generalized_jsd(*(jax.nn.log_softmax(side.scores[:k]) for side in (student, teacher)), beta), {}


def shared_rest(student: GroupDistribution, teacher: GroupDistribution, overlap: Overlap, *, beta: Beta = 0.5) -> Loss:
    """`D_β` over the `K` matched entries and one bucket `1 - Σ_K p` with all the rest, so that either side sums to one.

    Where a side has no unmatched entry, a bucket would have nothing to hold there: then it is `shared`.

    >>> p = GroupDistribution.single_token(jnp.log(jnp.array([0.5, 0.2, 0.3])), matched=1)
    >>> q = GroupDistribution.single_token(jnp.log(jnp.array([0.25, 0.75])), matched=1)
    >>> round(float(shared_rest(p, q, Overlap(1), beta=0.0)[0]), 4)  # 0.25 log(1/2) + 0.75 log(3/2)
    0.1308
    """
    k = overlap.matched
    if k in (student.scores.size, teacher.scores.size):
        return shared(student, teacher, overlap, beta=beta)

    def with_bucket(side):
        matched, others = side.split_logp(k)
        return jnp.append(matched, _log(jnp.sum(jnp.exp(others)) + side.missing_mass))

    return generalized_jsd(with_bucket(student), with_bucket(teacher), beta), {}


def projected(student: GroupDistribution, teacher: GroupDistribution, overlap: Overlap, *, beta: Beta = 0.5) -> Loss:
    """`D_β(P, Q)` over prefixes: every column gives its probability to the longest matched prefix of its surface.

    `P(k) = p(k) + Σ p(v)` over the unmatched `v` whose longest matched prefix is `k`. What has no such prefix (special
    tokens, padding rows, what a merge left out) is one event more. The parts `student_unmatched` and `teacher_unmatched`
    are what either side gives to entries that the other has not, which is how much the projection moves.

    >>> p = GroupDistribution.single_token(jnp.log(jnp.array([0.5, 0.2, 0.3])), matched=2)
    >>> p = p._replace(prefix_column=jnp.array([1]))  # the student's third entry begins with what the second spells
    >>> q = GroupDistribution.single_token(jnp.log(jnp.array([0.25, 0.75])))
    >>> round(float(projected(p, q, Overlap(2, unprefixed=False), beta=0.0)[0]), 4)  # P = (0.5, 0.5)
    0.1308
    """
    events = (_log(prefix_events(side, overlap)) for side in (student, teacher))
    return generalized_jsd(*events, beta), _unmatched_mass(student, teacher, overlap)


def events(student: GroupDistribution, teacher: GroupDistribution, overlap: Overlap, *, beta: Beta = 0.5) -> Loss:
    """As `projected`, and the text that stands there is an event of its own, taken out of its prefix.

    With `x` the group's text, `P(text) = p(x_1) · p(x_2 … | x_1)`, which its prefix event no longer holds. A student
    for whom no entry but the text's own gives to that prefix cannot separate the two: then the text stays in its prefix
    event. A teacher of that kind says that nothing but the text begins so here; at `β = 1` an answer to that would cost
    without bound, so that there the text stays as well. The parts are those of `projected`.

    >>> p = GroupDistribution.single_token(jnp.log(jnp.array([0.2, 0.5, 0.3])), token_column=2, matched=2)
    >>> q = GroupDistribution.single_token(jnp.log(jnp.array([0.2, 0.5, 0.3])), token_column=1, matched=2)
    >>> p, q = (x._replace(prefix_column=jnp.array([1]), event_siblings=jnp.array([0, 1, 1])) for x in (p, q))
    >>> abs(round(float(projected(p, q, Overlap(2, unprefixed=False))[0]), 4))  # both begin alike …
    0.0
    >>> round(float(events(p, q, Overlap(2, unprefixed=False), beta=0.0)[0]), 4)  # … 0.5 log(.5/.3) + 0.3 log(.3/.5)
    0.1022
    """
    together = _is_only_entry_of_event(student)
    if beta == 1:
        together |= _is_only_entry_of_event(teacher)
    found = (_log(text_events(side, ~together, overlap)) for side in (student, teacher))
    return generalized_jsd(*found, beta), _unmatched_mass(student, teacher, overlap)


def prefix_events(side: GroupDistribution, overlap: Overlap) -> jax.Array:
    """The probabilities that `projected` compares, `[K + 2]`; they sum to one.

    Of prefixes, of what has none (zero where not both sides have such columns), and a zero for what is masked.
    """
    return _renormalized(_project(jnp.exp(side.scores), side, overlap), overlap)


def text_events(side: GroupDistribution, apart: jax.Array, overlap: Overlap) -> jax.Array:
    """The probabilities that `events` compares, `[K + 2]`: `prefix_events`, the last the text's where `apart []` says so.

    Nothing is subtracted that could cancel: what remains of the prefix is summed up by itself.
    """
    p_V = jnp.exp(side.scores)  # up to their scale
    token = _at_text(side, p_V)
    left = jnp.where(apart, -jnp.expm1(side.suffix_logp), 1.0)  # of the token's, what its event keeps
    is_token = jax.lax.iota(jnp.int32, p_V.size) == side.token_column
    # A factor in `p_V` would have a gradient that is summed over all columns; one of events is summed with theirs.
    events = _project(jnp.where(is_token, 0.0, p_V), side, overlap, token * left)
    is_last = jax.lax.iota(jnp.int32, events.size) == events.size - 1
    text = token * jnp.exp(side.log_scale + side.suffix_logp)
    return _renormalized(jnp.where(is_last & apart, text, events), overlap)


def _is_only_entry_of_event(side: GroupDistribution) -> jax.Array:
    """Bool `[]`: the text is one entry, and no other of this side gives to the same event."""
    return side.is_single_token & (side.event_siblings[side.token_column] == 0)


def _project(p_V: jax.Array, side: GroupDistribution, overlap: Overlap, token: jax.Array | None = None) -> jax.Array:
    """Probabilities `[V]` up to their scale to those of events, `[K + 2]`, scaled: prefixes, what has none, what is masked.

    What is not compared is zero; `token []` is added to what `p_V` gives to the event of the text's token. Scaled at the
    end: so the scale's gradient is a sum over events, made with their own.
    """
    k, column = overlap.matched, side.token_column
    events = jnp.pad(p_V[:k], (0, 2)).at[side.prefix_column].add(p_V[k:], indices_are_sorted=True, mode="clip")
    number = jax.lax.iota(jnp.int32, k + 2)
    if token is not None:
        its_event = jnp.concatenate([jnp.arange(k), side.prefix_column])[column]
        events = events + jnp.where(number == its_event, token, 0.0)
    events = events * jnp.exp(side.log_scale) + jnp.where(number == k, side.missing_mass, 0.0)
    return jnp.where(number < k + overlap.unprefixed, events, 0.0)


def _renormalized(events: jax.Array, overlap: Overlap) -> jax.Array:
    """Summing to one again, where something was left out."""
    if overlap.masked or not overlap.unprefixed:
        events = events / jnp.maximum(jnp.sum(events), TINY)
    return events


def _unmatched_mass(student: GroupDistribution, teacher: GroupDistribution, overlap: Overlap) -> dict[str, jax.Array]:
    """What either side gives to entries that the other has not, `[]` each."""
    sides = {"student_unmatched": student, "teacher_unmatched": teacher}
    masses = (jnp.exp(jax.lax.stop_gradient(side.split_logp(overlap.matched)[1])) for side in sides.values())
    return {name: jnp.sum(mass) for name, mass in zip(sides, masses)}


def alm(
    student: GroupDistribution,
    teacher: GroupDistribution,
    overlap: Overlap,
    *,
    beta: Beta = 0.5,
    temperature: Temperature = 100.0,
) -> Loss:
    """Approximate likelihood matching: `D_β` of two Bernoulli distributions, `(P(text)^(1/τ), 1 - P(text)^(1/τ))`.

    In the paper `beta` is 0 and the temperature `τ` is 100.

    Source: Minixhofer et al., "Universal Cross-Tokenizer Distillation via Approximate Likelihood Matching"
    (arXiv 2503.20083).

    >>> p, q = (GroupDistribution.single_token(jnp.log(jnp.array(x))) for x in ([0.25, 0.75], [0.0625, 0.5, 0.4375]))
    >>> round(float(alm(p, q, Overlap(0), beta=0.0, temperature=2.0)[0]), 4)  # of (0.25, 0.75) to (0.5, 0.5)
    0.1308
    """

    def bernoulli(side):
        x = jnp.minimum(_text_logp(side) / temperature, -LOGP_CEILING)
        return jnp.stack([x, jnp.log(-jnp.expm1(x))])

    return generalized_jsd(bernoulli(student), bernoulli(teacher), beta), {}


def reverse_kl(student: GroupDistribution, teacher: GroupDistribution, overlap: Overlap) -> Loss:
    """`KL(student‖teacher)` estimated on text that the student drew: `log P(text) - log Q(text)`.

    The value is the group's log-ratio; the gradient is the policy gradient with that ratio as the reward, each group
    answering for itself (no discounted return of later ones). Unbiased only for text drawn at temperature 1 from the
    whole distribution.

    Source: Gu et al., "MiniLLM: Knowledge Distillation of Large Language Models", equation 2 (arXiv 2306.08543).

    >>> p, q = (GroupDistribution.single_token(jnp.log(jnp.array(x))) for x in ([0.5, 0.5], [0.25, 0.75]))
    >>> round(float(reverse_kl(p, q, Overlap(0))[0]), 4)  # log(0.5 / 0.25)
    0.6931
    """
    logp = _text_logp(student)
    ratio = jax.lax.stop_gradient(logp - _text_logp(teacher))
    return ratio + ratio * (logp - jax.lax.stop_gradient(logp)), {}


def _text_logp(side: GroupDistribution) -> jax.Array:
    """Log-probability `[]` of the group's text."""
    return _at_text(side, side.scores) + side.log_scale + side.suffix_logp


def _at_text(side: GroupDistribution, x_V: jax.Array) -> jax.Array:
    """`x_V [V]` at the column of the group's token, `[]`. Accelerators select it: the gradient of that fuses, a lookup's not."""

    def selected(x_V, column):
        return jnp.sum(jnp.where(jax.lax.iota(jnp.int32, x_V.size) == column, x_V, 0.0))

    return jax.lax.platform_dependent(x_V, side.token_column, cpu=lambda x_V, column: x_V[column], default=selected)


def _log(p: jax.Array) -> jax.Array:
    return jnp.log(jnp.maximum(p, TINY))


COMPARISONS: dict[str, Comparison] = {
    "sorted": Comparison(uld),
    "hybrid": Comparison(hybrid),
    "shared": Comparison(shared),
    "shared_rest": Comparison(shared_rest),
    "projected": Comparison(projected, projects=True),
    "events": Comparison(events, projects=True, reads_text=True),
    "alm": Comparison(alm, reads_text=True),
    "reverse_kl": Comparison(reverse_kl, reads_text=True, on_policy=True),
}
