import doctest
import os
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models as tiny

from gold_jax.losses import compare, divergence
from gold_jax.losses.divergence import generalized_jsd, sorted_l1, sorted_l1_top_k


def distributions(*shape, seed=0):
    x = np.random.default_rng(seed).standard_normal(shape) * 3
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def slow_jsd(p, q, beta):
    m = (1 - beta) * p + beta * q
    kl = lambda a, b: np.sum(a * np.log(a / b), -1)  # noqa: E731
    return {0: kl(q, p), 1: kl(p, q)}.get(beta, beta * kl(q, m) + (1 - beta) * kl(p, m))


@pytest.mark.parametrize("beta", [0, 0.1, 0.5, 0.9, 1])
def test_jsd_is_what_its_formula_says(beta):
    p, q = distributions(5, 17, seed=1), distributions(5, 17, seed=2)
    ours = generalized_jsd(jnp.log(jnp.float32(p)), jnp.log(jnp.float32(q)), beta)
    np.testing.assert_allclose(ours, slow_jsd(p, q, beta), rtol=3e-6)


@pytest.mark.parametrize("beta", [0, 0.3, 1])
def test_jsd_and_its_gradient_vanish_where_both_sides_agree(beta):
    logits = jnp.float32(np.random.default_rng(0).standard_normal((3, 9)))
    target = jax.nn.log_softmax(logits)
    value, grad = jax.value_and_grad(lambda x: generalized_jsd(jax.nn.log_softmax(x), target, beta).sum())(logits)
    assert abs(value) < 1e-6 and jnp.abs(grad).max() < 1e-6


def test_jsd_takes_probabilities_of_exactly_zero():
    p = jnp.log(jnp.array([0.0, 0.5, 0.5]))
    q = jnp.log(jnp.array([0.2, 0.3, 0.5]))
    for beta in (0.5, 1):
        value, grad = jax.value_and_grad(lambda x, b=beta: generalized_jsd(x, q, b))(p)
        chex.assert_tree_all_finite((value, grad))


SORTS = pytest.mark.parametrize("sort", ["auto", "xla", "host"])


@SORTS
@pytest.mark.parametrize("sizes", [(11, 11), (11, 30), (30, 11)])
def test_sorted_l1_is_the_distance_of_sorted_values(sizes, sort):
    p, q = distributions(4, sizes[0], seed=1), distributions(4, sizes[1], seed=2)
    n = max(sizes)
    a, b = (-np.sort(-np.pad(x, [(0, 0), (0, n - x.shape[1])])) for x in (p, q))
    np.testing.assert_allclose(sorted_l1(jnp.float32(p), jnp.float32(q), sort), np.abs(a - b).sum(-1), rtol=1e-6)


@SORTS
@pytest.mark.parametrize("sizes", [(11, 11), (11, 30), (30, 11)])
def test_sorted_l1_has_the_gradient_that_sorting_floats_has(sizes, sort):
    p, q = (jnp.float32(distributions(4, n, seed=n + i)) for i, n in enumerate(sizes))
    n = max(sizes)

    def plain(p, q):
        a, b = (jnp.sort(jnp.pad(x, [(0, 0), (n - x.shape[1], 0)])) for x in (p, q))
        return jnp.sum(jnp.abs(a - b) * jnp.arange(1.0, 5)[:, None])

    ours = jax.grad(lambda p, q: jnp.sum(sorted_l1(p, q, sort) * jnp.arange(1.0, 5)), (0, 1))(p, q)
    chex.assert_trees_all_close(ours, jax.grad(plain, (0, 1))(p, q), rtol=1e-6)


def test_host_and_xla_sort_alike_inside_a_compiled_loop():
    p, q = jnp.float32(distributions(3, 5, 40, seed=1)), jnp.float32(distributions(3, 5, 70, seed=2))

    def total(p, sort):
        return jax.lax.scan(lambda c, x: (c + sorted_l1(x[0], x[1], sort).sum(), None), 0.0, (p, q))[0]

    host, xla = (jax.jit(jax.value_and_grad(lambda p, s=sort: total(p, s)))(p) for sort in ("host", "xla"))
    chex.assert_trees_all_close(host, xla, rtol=1e-6)


@SORTS
@pytest.mark.parametrize(
    "bits", [0x7FC00000, 0xFFC00000]
)  # what processors make of 0/0 has its sign bit set: the latter
def test_what_is_no_number_stays_none_when_sorted(sort, bits):
    nan = np.uint32(bits).view(np.float32)
    p, q = jnp.asarray(np.array([[0.5, nan, 0.2, 0.3, 0.1]], np.float32)), jnp.array([[0.2, 0.8]])
    assert jnp.isnan(sorted_l1(p, q, sort)).all() and jnp.isnan(sorted_l1(q, p, sort)).all()


def test_top_k_bounds_the_exact_distance_and_meets_it_in_the_end():
    p, q = jnp.float32(distributions(6, 200, seed=1)), jnp.float32(distributions(6, 150, seed=2))
    exact = sorted_l1(p, q)
    for k in (1, 10, 100):
        head, bound = sorted_l1_top_k(p, q, k)
        assert (head <= exact + 1e-6).all() and (exact <= head + bound + 1e-6).all()
    np.testing.assert_allclose(sorted_l1_top_k(p, q, 500)[0], exact, rtol=1e-6)


def test_the_examples_in_the_docstrings_are_true():
    for module in (divergence, compare):
        found = doctest.testmod(module)
        assert found.attempted and not found.failed


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="a process cannot be told its cores here")
def test_on_a_single_core_nothing_waits_for_a_callback_that_cannot_run():
    script = """
import os
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
import jax, jax.numpy as jnp
from gold_jax.losses.divergence import sorted_l1
p, q = jax.nn.softmax(jax.random.normal(jax.random.key(0), (2, 64, 20_000)))
print(float(jax.jit(sorted_l1)(p, q).sum()))
try:
    sorted_l1(p, q, "host")
except ValueError as error:
    print(error)
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    assert float(ran.stdout.splitlines()[0]) > 0 and "two cores" in ran.stdout


def test_on_several_devices_nothing_waits_for_a_callback_that_another_device_holds_up():
    script = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import PartitionSpec as P
from gold_jax.losses.divergence import sorted_l1
assert jax.device_count() == 2
p, q = jax.nn.softmax(jax.random.normal(jax.random.key(0), (2, 8, 20_000)))
whole = jax.jit(lambda p, q: sorted_l1(p, q, "xla").sum())(p, q)

def local(p, q):
    def step(i, total):
        return total + jax.lax.psum(sorted_l1(p, q).sum(), "data") / 8
    return jax.lax.fori_loop(0, 8, step, 0.0)[None]

mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
parts = jax.shard_map(local, mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=False)
np.testing.assert_allclose(jax.jit(parts)(p, q)[0], whole, rtol=1e-5)
try:
    sorted_l1(p, q, "host")
except ValueError as error:
    print(error)
"""
    environment = os.environ | tiny.cpu_devices(2)
    command = [sys.executable, "-c", script]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    assert "a single device" in ran.stdout


SORTED_BY = [divergence._by_host, divergence._packed_with_columns, divergence._with_columns]  # CPUs, CPUs, accelerators


def test_on_cpus_equal_values_have_the_same_signs_whoever_sorts():
    p, q = (jnp.float32(np.random.default_rng(n).integers(0, 6, n) / 16) for n in (50, 40))
    host, xla = (f(p, q)[1] for f in SORTED_BY[:2])
    np.testing.assert_array_equal(host, xla)


def test_all_that_sorts_does_so_alike_where_no_two_values_are_equal():
    for student, teacher in ((40, 30), (30, 40)):
        p, q = (jax.nn.softmax(jax.random.normal(jax.random.key(n), (n,))) for n in (student, teacher))
        _, below, above = ((float(loss), signs) for loss, signs in (f(p, q) for f in SORTED_BY))
        chex.assert_trees_all_equal(below, above)
        columns = jax.random.permutation(jax.random.key(0), student)
        for back in (divergence._by_column_sorted, divergence._by_column_scattered):
            np.testing.assert_array_equal(back(columns, below[1])[columns], below[1])


@pytest.mark.parametrize("sorted_by", SORTED_BY, ids=lambda f: f.__name__)
def test_equal_values_share_the_signs_of_all_their_ranks(sorted_by):
    """Which of them gets which is open; that they move together gives their sum."""
    rng = np.random.default_rng(0)
    for sizes in [(1, 1), (1, 5), (5, 1), (9, 9), (12, 7), (7, 12)] * 4:
        p, q = (np.float32(rng.integers(0, 4, n) / 8) for n in sizes)
        p[p == 0] *= rng.choice([1, -1])  # zero has two bit patterns
        n = max(sizes)
        ours, theirs = np.sort(np.pad(p, (n - p.size, 0))), np.sort(np.pad(q, (n - q.size, 0)))
        loss, signs = sorted_by(jnp.asarray(p), jnp.asarray(q))
        assert float(loss) == np.abs(ours - theirs).sum()
        for value in set(p.tolist()):
            expected = np.sign(ours - theirs)[n - p.size :][ours[n - p.size :] == value].sum()
            assert np.asarray(signs)[p == value].sum() == expected
