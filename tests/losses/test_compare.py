"""Every comparison, through merges and chunks, against the slow reference, and the facts that hold for each."""

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gold_jax.config import GOLDConfig, RunFacts, named_without_effect
from gold_jax.loss_spec import LossSpec, options_help
from gold_jax.losses.compare import (
    COMPARISONS,
    PER_GROUP,
    Beta,
    Comparison,
    GroupDistribution,
    Overlap,
    prefix_events,
    text_events,
)
from gold_jax.losses.distill import Head, distill_loss
from gold_jax.losses.options import Option
from gold_jax.text.batch import Row, SideTokens, build_batches
from gold_jax.values import AT_LEAST_ONE
from losses import reference
from losses.arranged import bound, compared, in_rows, overlap
from losses.reference import Options

PROJECTING = [name for name, line in COMPARISONS.items() if line.projects]
V, W, K, D, E = 19, 23, 11, 4, 6
# Two rows of groups of one to three tokens on either side.
GROUPS = [([0, 1, 1, 2, 3, 3], [0, 0, 1, 2, 2, 2, 3]), ([0, 1, 2, 2, 2, 3], [0, 1, 1, 2, 3])]


def f32(x):
    return jnp.asarray(x, jnp.float32)


def setting(seed=0, masked=False):
    """Rows, hidden states and heads of both sides, orders, and routes (to every kind of event)."""
    rng = np.random.default_rng(seed)
    rows = []
    for i, (s, t) in enumerate(GROUPS):
        halves = (
            SideTokens(np.full(2, i, np.int32), rng.integers(0, n, len(g)).astype(np.int32), np.array(g))
            for g, n in ((s, V), (t, W))
        )
        rows.append(Row(*halves, groups=max(s) + 1, text="", stopped=False))
    arrays = [rng.standard_normal(s) for s in ((2, 32, D), (V, D), (2, 32, E), (W, E))]
    orders = [rng.permutation(n) for n in (V, W)]
    routes = [np.sort(np.r_[rng.integers(0, 6, n - K - 2), K, K + masked]).astype(np.int32) for n in (V, W)]
    return rows, *arrays, *orders, *routes


def slow(rows, hs, ws, ht, wt, orders, routes, merge, groups, compare, options, at=None):
    """The mean over groups. `at`: the student's `hs, ws` at which rewards are frozen, to take their slope."""
    losses = []
    for i, row in enumerate(rows):
        for g in reference.groups_of(row, groups):

            def student(hs, ws, i=i, row=row, g=g):
                return reference.merged(row.student, g, hs[i], ws, orders[0], routes[0], merge)

            t = reference.merged(row.teacher, g, ht[i], wt, orders[1], routes[1], merge)
            frozen = None
            if at is not None and compare == "reverse_kl":
                frozen = reference.compare(compare, student(*at), t, options)
            losses.append(reference.compare(compare, student(hs, ws), t, options, frozen))
    return np.mean(losses)


POINTS = [
    (merge, compare)
    for merge in ("chain", "observed", "boundary")
    for compare, line in COMPARISONS.items()
    if not (merge == "observed" and (line.reads_text or line.projects))
]


@pytest.mark.parametrize("merge, compare", POINTS, ids="-".join)
@pytest.mark.parametrize(
    "groups, beta, weights, masked",
    [("all", 0, (1, 1), False), ("one_to_one", 1, (None, None), True), ("all", 0.3, (0.7, 0.2), True)],
)
def test_a_grid_point_is_what_its_formula_says_value_and_gradient(merge, compare, groups, beta, weights, masked):
    rows, hs, ws, ht, wt, order_s, order_t, route_s, route_t = setting(masked=masked)
    options = Options(K, beta, *weights, masked=masked, temperature=3.0)
    built = build_batches(rows, 2, merge=merge, groups=groups, text=COMPARISONS[compare].reads_text)
    batch = jax.tree.map(jnp.asarray, in_rows(*built))

    def ours(hidden, head):
        student = Head(head[order_s], jnp.argsort(jnp.asarray(order_s)), prefix_of_unmatched=jnp.asarray(route_s))
        teacher = Head(f32(wt)[order_t], jnp.argsort(jnp.asarray(order_t)), prefix_of_unmatched=jnp.asarray(route_t))
        return distill_loss(
            hidden, student, batch.student, f32(ht), teacher, batch.teacher, batch.weight,
            compare=bound(compare, options), overlap=overlap(options), merge=merge, chunk=3,
        )[0]  # fmt: skip

    value, (d_hidden, d_head) = jax.jit(jax.value_and_grad(ours, (0, 1)))(f32(hs), f32(ws))
    args = (ht, wt, (order_s, order_t), (route_s, route_t), merge, groups, compare, options)
    np.testing.assert_allclose(value, slow(rows, hs, ws, *args), rtol=3e-6)
    # Directional derivatives by central differences in float64.
    rng = np.random.default_rng(1)
    for _ in range(3):
        dh, dw, eps = rng.standard_normal(hs.shape), rng.standard_normal(ws.shape), 1e-5
        ahead, behind = (slow(rows, hs + e * dh, ws + e * dw, *args, at=(hs, ws)) for e in (eps, -eps))
        got = np.sum(np.asarray(d_hidden, np.float64) * dh) + np.sum(np.asarray(d_head, np.float64) * dw)
        np.testing.assert_allclose(got, (ahead - behind) / (2 * eps), rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("merge, compare", [("chain", "hybrid"), ("boundary", "events"), ("chain", "sorted")])
def test_a_loss_of_logits_is_that_of_hidden_states_and_heads(merge, compare):
    rows, hs, ws, ht, wt, order_s, order_t, route_s, route_t = setting()
    built = build_batches(rows, 2, merge=merge, groups="all", text=COMPARISONS[compare].reads_text)
    batch = jax.tree.map(jnp.asarray, in_rows(*built))
    hs, ws, ht, wt = (jnp.asarray(x, jnp.float32) for x in (hs, ws, ht, wt))
    orders = [jnp.asarray(o) for o in (order_s, order_t)]
    heads = [
        Head(None, jnp.argsort(o), 5.0, 0.7, jnp.asarray(r), column_order=o) for o, r in zip(orders, (route_s, route_t))
    ]

    options = Options(K, 0.5, 1.0, 0.5)

    def loss(student, teacher, student_head, teacher_head):
        return distill_loss(
            student, student_head, batch.student, teacher, teacher_head, batch.teacher, batch.weight,
            compare=bound(compare, options), overlap=overlap(options), merge=merge, chunk=3,
        )[0]  # fmt: skip

    def of_hidden(hidden):
        heads_ordered = [h._replace(weight=w[o], column_order=None) for h, w, o in zip(heads, (ws, wt), orders)]
        return loss(hidden, ht, *heads_ordered)

    value, d_hidden = jax.value_and_grad(of_hidden)(hs)
    again, d_logits = jax.value_and_grad(lambda logits: loss(logits, ht @ wt.T, *heads))(hs @ ws.T)
    np.testing.assert_allclose(again, value, rtol=2e-6)
    np.testing.assert_allclose(d_logits @ ws, d_hidden, rtol=1e-4, atol=2e-6)


def sides(rng, groups=40, masked=False, scaled=False):
    """Random groups of both models as `GroupDistribution` (numpy) and as the reference's sides."""
    found = []
    for size in (V, W):
        logp = reference.log_softmax(2 * rng.standard_normal((groups, size)))
        inner = np.where(rng.random(groups) < 0.5, 0.0, np.log(rng.random(groups)))
        text_column = rng.integers(0, size, groups)
        route = np.sort(np.r_[rng.integers(0, 6, size - K - 2), K, K + masked]).astype(np.int32)
        event = np.r_[np.arange(K), route]
        siblings = np.array([(event == e).sum() - (e <= K) for e in event])
        scale, zero, whole = rng.standard_normal(groups), np.zeros(groups), np.ones(groups, bool)
        scores, maps = logp - scale[:, None], (route, siblings)
        if scaled:
            side = GroupDistribution(scores, scale + inner, -np.expm1(inner), text_column, zero, whole, *maps)
        else:
            side = GroupDistribution(scores, scale, zero, text_column, inner, inner == 0, *maps)
        text = np.exp(side.logp[np.arange(groups), text_column] + side.suffix_logp)
        slow = [
            reference.Side(np.exp(side.logp[i]), text_column[i], text[i], side.is_single_token[i], route)
            for i in range(groups)
        ]
        found.append((side, slow))
    return found


@pytest.mark.parametrize(
    "compare", [c for c in COMPARISONS if c not in ("sorted", "hybrid")]
)  # those are float32 alone
@pytest.mark.parametrize("beta", [0, 0.4, 1])
@pytest.mark.parametrize("masked, rest, scaled", [(False, True, False), (True, True, True), (True, False, False)])
def test_in_double_precision_values_and_gradients_are_exact(compare, beta, masked, rest, scaled):
    (s, slow_s), (t, slow_t) = sides(np.random.default_rng(3), masked=masked, scaled=scaled)
    options = Options(K, beta, unprefixed=rest, masked=masked, temperature=5.0)
    with jax.enable_x64(True):
        s, t = jax.tree.map(jnp.asarray, (s, t))

        def loss(scores, rest):
            return compared(compare, s._replace(scores=scores, suffix_logp=rest), t, options)[0]

        values = loss(s.scores, s.suffix_logp)
        gradient = jax.grad(lambda *x: loss(*x).sum(), (0, 1))(s.scores, s.suffix_logp)
        values, gradient = jax.tree.map(np.asarray, (values, gradient))
    expected = [reference.compare(compare, a, b, options) for a, b in zip(slow_s, slow_t)]
    np.testing.assert_allclose(values, expected, rtol=1e-9, atol=1e-12)
    rng, eps = np.random.default_rng(4), 1e-5
    for i, (a, b) in enumerate(zip(slow_s, slow_t)):
        frozen = expected[i] if compare == "reverse_kl" else None
        # A direction that keeps the distribution's sum, as every step of a model does.
        d = rng.standard_normal(V)
        d -= (a.p * d).sum() / a.p.sum()
        d_rest = 0.0 if a.is_single_token else rng.standard_normal()
        slopes = []
        for e in (eps, -eps):
            text = a.text * np.exp(e * (d[a.token_column] + d_rest))
            p = a.p * np.exp(e * d)
            p *= a.p.sum() / p.sum()
            slopes.append(reference.compare(compare, dataclasses.replace(a, p=p, text=text), b, options, frozen))
        got = (gradient[0][i] * d).sum() + gradient[1][i] * d_rest
        np.testing.assert_allclose(got, (slopes[0] - slopes[1]) / (2 * eps), rtol=1e-6, atol=1e-8)


def single(side):
    """In single precision."""
    kinds = {"f": jnp.float32, "i": jnp.int32, "b": bool}
    return jax.tree.map(lambda x: jnp.asarray(x, kinds[x.dtype.kind]), side)


def one_side(logits, seed=0):
    """One tokenizer: everything is matched, nothing is routed."""
    groups = logits.shape[0]
    rng = np.random.default_rng(seed)
    inner = jnp.asarray(np.where(np.arange(groups) % 2, 0.0, -rng.random(groups)), jnp.float32)
    text_column = jnp.asarray(rng.integers(0, logits.shape[1], groups))
    logp = jax.nn.log_softmax(logits)
    alone, zero = jnp.zeros(logits.shape[1], int), jnp.zeros(groups)
    return GroupDistribution(logp, zero, zero, text_column, inner, inner == 0, jnp.zeros(0, int), alone)


@pytest.mark.parametrize("beta", [0, 0.5, 1])
@pytest.mark.parametrize("compare", COMPARISONS)
def test_a_comparison_with_itself_is_zero_when_everything_is_matched(compare, beta):
    logits = jnp.asarray(np.random.default_rng(0).standard_normal((4, V)), jnp.float32)
    target, options = one_side(logits), Options(V, beta, unprefixed=False)

    def loss(logits):
        # The same operations on both sides: an L1 distance has no gradient at zero, but either sign next to it.
        return compared(compare, one_side(logits), target, options)[0].sum()

    value, grad = jax.value_and_grad(loss)(logits)
    assert abs(value) < 1e-6 and jnp.abs(grad).max() < 1e-6


@pytest.mark.parametrize("masked, rest, scaled", [(False, True, False), (True, True, True), (True, False, False)])
def test_both_sides_of_projected_and_events_sum_to_one_whatever_the_groups(masked, rest, scaled):
    options = Options(K, unprefixed=rest, masked=masked)
    for seed in range(20):
        for side, _ in sides(np.random.default_rng(seed), masked=masked, scaled=scaled):
            side = single(side)
            for apart in (True, False):
                p = jax.vmap(lambda s, a=apart: text_events(s, a, overlap(options)), (PER_GROUP,))(side)
                np.testing.assert_allclose(p.sum(-1), 1, atol=1e-6)
            p = jax.vmap(lambda s: prefix_events(s, overlap(options)), (PER_GROUP,))(side)
            np.testing.assert_allclose(p.sum(-1), 1, atol=1e-6)


@pytest.mark.parametrize("compare", PROJECTING)
@pytest.mark.parametrize("beta", [0, 0.5, 1])
def test_probabilities_that_underflow_leave_loss_and_gradient_finite(compare, beta):
    (s, _), (t, _) = sides(np.random.default_rng(0))
    extreme = jnp.asarray(np.random.default_rng(1).standard_normal((40, V)) * 200, jnp.float32)
    s, t = single(s), single(t)

    def loss(logits, rest):
        ours = s._replace(scores=jax.nn.log_softmax(logits), log_scale=jnp.zeros(40), suffix_logp=rest)
        return compared(compare, ours, t, Options(K, beta))[0].sum()

    value, grads = jax.value_and_grad(loss, (0, 1))(extreme, s.suffix_logp * 1e3)
    assert jnp.isfinite(value) and all(jnp.isfinite(g).all() for g in grads)


def test_top_k_tails_leave_out_no_more_than_the_bound_they_report():
    rng = np.random.default_rng(0)
    logits = [jnp.asarray(rng.standard_normal((3, n)) * 2, jnp.float32) for n in (200, 300)]
    p, q = map(one_side, logits)
    for name in ("sorted", "hybrid"):
        exact, _ = compared(name, p, q, Options(50, 0.5, 1.0, 1.0))
        cut, parts = compared(name, p, q, Options(50, 0.5, 1.0, 1.0, top_k=20))
        assert (jnp.abs(exact - cut) <= parts["tail_bound"] + 1e-6).all()


@pytest.mark.parametrize("name", COMPARISONS)
def test_every_comparison_is_chosen_by_its_name_and_shows_that_it_is_right_by_an_example(name):
    settings = GOLDConfig(compare=name, lmbda=1)
    assert settings.loss_spec(False).compare == name
    assert ">>>" in COMPARISONS[name].function.__doc__
    if name not in ("sorted", "hybrid", "shared"):  # whose presets have other names
        assert GOLDConfig(loss=name, lmbda=1).loss_spec(False).compare == name


def power_distance(
    student: GroupDistribution,
    teacher: GroupDistribution,
    overlap: Overlap,
    *,
    power: Annotated[float, Option("Exponent of the differences.", AT_LEAST_ONE)] = 2.0,
    beta: Beta = 0.5,
):
    """`Σ |p - q|^power` over the matched entries, the teacher's times one less `beta`."""
    p, q = (jnp.exp(side.logp[: overlap.matched]) for side in (student, teacher))
    distance = jnp.sum(jnp.abs(p - (1 - beta) * q) ** power)
    return distance, {"largest": jnp.max(jnp.abs(p - q))}


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setitem(COMPARISONS, "power_distance", Comparison(power_distance))


@pytest.mark.parametrize("chunk", [1, 3])
def test_a_new_comparison_sees_one_group_and_works_through_the_loss(registered, chunk):
    rows, hs, ws, ht, wt, order_s, order_t, _, _ = setting()
    (built,) = build_batches(rows, 2, merge="boundary", groups="all")
    batch = jax.tree.map(jnp.asarray, in_rows(built))
    compare = GOLDConfig(loss="power_distance", beta=0.25, loss_kwargs={"power": 3}).loss_spec(False).bound()

    def loss(hidden):
        heads = [Head(f32(w)[o], jnp.argsort(jnp.asarray(o))) for w, o in ((ws, order_s), (wt, order_t))]
        return distill_loss(
            hidden, heads[0], batch.student, f32(ht), heads[1], batch.teacher, batch.weight,
            compare=compare, overlap=Overlap(K), merge="boundary", chunk=chunk,
        )  # fmt: skip

    def slow(hs):
        found = []
        for i, row in enumerate(rows):
            for g in reference.groups_of(row, "all"):
                p = reference.merged(row.student, g, hs[i], ws, order_s, None, "boundary").p[:K]
                q = reference.merged(row.teacher, g, ht[i], wt, order_t, None, "boundary").p[:K]
                found.append((np.sum(np.abs(p - 0.75 * q) ** 3), np.abs(p - q).max()))
        return np.mean(found, 0)

    (value, parts), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(f32(hs))
    np.testing.assert_allclose([value, parts["largest"]], slow(hs), rtol=1e-5)
    direction, eps = np.random.default_rng(1).standard_normal(hs.shape), 1e-5
    slope = (slow(hs + eps * direction)[0] - slow(hs - eps * direction)[0]) / (2 * eps)
    np.testing.assert_allclose(np.sum(np.asarray(gradient, np.float64) * direction), slope, rtol=1e-3, atol=1e-6)


def test_an_option_comes_from_the_function_s_own_signature(registered):
    spec = GOLDConfig(loss="power_distance", beta=0.25, loss_kwargs='{"power": 3}').loss_spec(False)
    assert spec.options == {"power": 3.0, "beta": 0.25}
    assert spec.describe() == "power_distance: boundary/all/power_distance, power 3.0, beta 0.25"
    assert "power_distance: power (Exponent of the differences, at least 1; 2.0)" in options_help()


@pytest.mark.parametrize(
    "given, words",
    [
        ({"power": 0.5}, "--loss_kwargs: power is 0.5; it must be a number at least 1"),
        ({"power": "much"}, "--loss_kwargs: power is 'much'; it must be a number at least 1"),
        ({"powers": 2}, r"--loss_kwargs: 'powers' is not an option of power_distance, which has power .*, --beta"),
        ({"beta": 0.5}, "--loss_kwargs has 'beta', which has a flag of its own: --beta"),
    ],
)
def test_options_that_a_comparison_has_not_or_that_are_out_of_range_are_refused(registered, given, words):
    with pytest.raises(ValueError, match=words):
        GOLDConfig(loss="power_distance", loss_kwargs=given)


@pytest.mark.parametrize(
    "compare, options, words",
    [
        ("hybrid", {"beta": 1.5}, "beta is 1.5; it must be a number between 0 and 1"),
        ("hybrid", {"matched_weight": -1.0, "unmatched_weight": 1.0}, "matched_weight is -1.0; .* at least 0"),
        ("hybrid", {"matched_weight": 1.0, "unmatched_weight": float("inf")}, "unmatched_weight is inf; .* at least 0"),
        ("sorted", {"top_k": -1}, "top_k is -1; it must be a whole number at least 0"),
        ("sorted", {"sort": "numpy"}, "sort is 'numpy'; it must be text that is one of auto, host, xla"),
        ("alm", {"temperature": 0.0}, "temperature is 0.0; it must be a number greater than 0"),
        ("alm", {"temperature": "hot"}, "temperature is 'hot'; it must be a number greater than 0"),
        ("alm", {"beta": None}, "beta is None; it must be a number between 0 and 1"),
    ],
)
def test_a_loss_made_in_python_holds_its_options_to_their_ranges(compare, options, words):
    for make in (COMPARISONS[compare].bind, lambda **options: LossSpec(compare=compare, options=options)):
        with pytest.raises(ValueError, match=words):
            make(**options)


@pytest.mark.parametrize("name", COMPARISONS)
def test_an_option_with_a_flag_may_be_what_the_flag_may_be(name):
    for parameter in filter(lambda p: p.option.flag, COMPARISONS[name].options.values()):
        flag = GOLDConfig.__dataclass_fields__[parameter.option.flag].metadata
        if flag["choices"]:
            assert [x for x in (*flag["choices"], "other") if parameter.option.range.holds(x)] == list(flag["choices"])
        else:
            assert parameter.option.range == flag["range"]


def test_a_weight_of_the_matched_entries_alone_is_refused():
    group = GroupDistribution.single_token(jnp.log(jnp.array([0.5, 0.5])))
    with pytest.raises(ValueError, match="matched_weight is 1.0; it must come with an unmatched_weight"):
        COMPARISONS["hybrid"].bind(matched_weight=1.0)(group, group, Overlap(2))


def test_an_option_needs_a_type_and_a_default():
    def untyped(student, teacher, overlap, *, knob=1.0): ...

    def required(student, teacher, overlap, *, knob: float): ...

    for function in (untyped, required):
        with pytest.raises(TypeError, match="'knob' needs a type and a default"):
            Comparison(function).options  # noqa: B018


def test_flags_of_other_comparisons_options_are_told_to_have_no_effect(registered):
    settings = GOLDConfig(loss="power_distance", uld_top_k=5, beta=0.1)
    (line,) = named_without_effect(settings, RunFacts(settings, settings.loss_spec(False), evaluates=False))
    assert line.startswith("--uld_top_k: no effect with loss power_distance (boundary/all/power_distance)")
