"""Losses and gradients against TRL 1.16.0 (tests/golden/make_trl_golden.py wrote its numbers)."""

import functools
import importlib.util
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gold_jax.losses.compare import Overlap
from gold_jax.losses.distill import Head, distill_loss, order_rows
from gold_jax.text.align import group_ends
from gold_jax.text.batch import Row, SideTokens, build_batches
from gold_jax.text.surface import surfaces_of
from gold_jax.text.vocabulary import VocabularyMap
from losses.arranged import bound, in_rows, overlap, width
from losses.reference import Options

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
_spec = importlib.util.spec_from_file_location("make_trl_golden", GOLDEN / "make_trl_golden.py")
recipe = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(recipe)
NUMBERS = json.loads((GOLDEN / "trl_losses.json").read_text())
TOLERANCE = 1e-5


def name(case):
    kind = "hybrid" if case["hybrid"] else "sorted"
    where = "groups" if case["extended"] else "positions"
    return f"{case['merge']}-{where}-{kind}-{case['weights']}-beta{case['beta']}"


def to_row(row, positional, prompt):
    ids = [np.array(row[f"{side}_ids"], np.int32) for side in ("student", "teacher")]
    if positional:
        groups = [np.arange(len(x)) for x in ids]
        count = min(map(len, ids))
    else:
        *groups, count = group_ends(np.array(row["student_ends"]), np.array(row["teacher_ends"]))
    prompt = np.full(recipe.PROMPT, prompt, np.int32)
    return Row(*(SideTokens(prompt, x, g) for x, g in zip(ids, groups)), groups=count, text="", stopped=False)


def padded(hidden, width):
    return jnp.asarray(np.pad(hidden, [(0, 0), (0, width - hidden.shape[1]), (0, 0)]), jnp.float32)


def relative(ours, theirs):
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    return np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)


def check(case, rows, sizes, vocabulary: VocabularyMap):
    groups = "all" if case["extended"] else "positional"
    made = [to_row(r, groups == "positional", i) for i, r in enumerate(rows)]
    (batch,) = build_batches(made, len(made), merge=case["merge"], groups="all", normalization="row_mean")
    batch = jax.tree.map(jnp.asarray, in_rows(batch))
    hs, ws, ht, wt = recipe.inputs(rows, *sizes)
    weights = case["weights"] or (None, None)
    options = Options(vocabulary.matched, case["beta"], *weights)
    compare = bound("hybrid" if case["hybrid"] else "sorted", options)
    order = jnp.asarray(vocabulary.student_order)
    row_of_token = jnp.argsort(order)
    teacher_row_of_token = jnp.asarray(np.argsort(vocabulary.teacher_order))
    teacher_head = jnp.asarray(wt[vocabulary.teacher_order], jnp.float32)
    teacher_hidden = padded(ht, width(batch.teacher))

    @functools.partial(jax.value_and_grad, argnums=(0, 1))
    def loss(hidden, head, batch, teacher_hidden, teacher_head):
        return distill_loss(
            hidden,
            Head(order_rows(head, order, row_of_token), row_of_token, temperature=0.9),
            batch.student,
            teacher_hidden,
            Head(teacher_head, teacher_row_of_token, temperature=1.2),
            batch.teacher,
            batch.weight,
            compare=compare,
            overlap=overlap(options),
            chunk=16,
        )[0]

    ours = padded(hs, width(batch.student)), jnp.asarray(ws, jnp.float32)
    value, (d_hidden, d_head) = jax.jit(loss)(*ours, batch, teacher_hidden, teacher_head)
    probe = np.random.default_rng(5).standard_normal((sizes[0], 2))
    d_hidden = np.asarray(d_hidden, np.float64)[:, : hs.shape[1]]
    assert relative(value, case["loss"]) < TOLERANCE
    # Where two sorted values of the two sides are equal to within float32's rounding, either sign is a subgradient of
    # their distance, and rounding chooses. Sorting whole real vocabularies (up to 152,000 ranks), that happens at a few
    # positions: TRL's own float32 gradients are 2e-5 from its float64 ones. Those positions are let off, no other is.
    ties = 3 if max(sizes) > 1000 and not case["hybrid"] else 0
    error = np.sort(np.linalg.norm(d_hidden - np.array(case["d_hidden"]), axis=-1).ravel())
    size = np.linalg.norm(case["d_hidden"])
    assert np.linalg.norm(error[: len(error) - ties]) < TOLERANCE * size
    assert np.linalg.norm(error) < (10 if ties else 1) * TOLERANCE * size
    assert relative(np.asarray(d_head, np.float64).T @ probe, case["d_head"]) < (50 if ties else 1) * TOLERANCE


@pytest.mark.parametrize("case", NUMBERS["synthetic"], ids=name)
def test_loss_and_gradients_equal_trl_on_small_vocabularies(case):
    student, teacher, rows = recipe.synthetic()
    pairs = [(student[s], i) for s, i in teacher.items() if s in student]
    orders = []
    for side, size in ((0, 40), (1, 50)):
        matched = [p[side] for p in pairs]
        orders.append(np.array(matched + [i for i in range(size) if i not in matched], np.int32))
    routes = [np.full(size - len(pairs), len(pairs), np.int32) for size in (40, 50)]
    check(case, rows, (40, 50), VocabularyMap(*orders, len(pairs), len(pairs), 40, 50, *routes))


@pytest.mark.parametrize("case", NUMBERS["gkd"], ids=lambda c: f"beta{c['beta']}-t{c['temperature']}")
def test_gkd_with_one_tokenizer_equals_trl(case):
    _, _, rows = recipe.synthetic()
    hs, ws, ht, wt = recipe.inputs(rows, 40, 40)
    made = [
        Row(
            *[SideTokens(np.full(recipe.PROMPT, i, np.int32), np.array(r["student_ids"], np.int32), np.arange(7))] * 2,
            7,
            "",
            False,
        )
        for i, r in enumerate(rows)
    ]
    (batch,) = build_batches(made, 2, merge="chain", groups="all")
    batch = jax.tree.map(jnp.asarray, in_rows(batch))
    row_of_token = jnp.arange(40)

    def loss(hidden):
        heads = [Head(jnp.asarray(w, jnp.float32), row_of_token, temperature=case["temperature"]) for w in (ws, wt)]
        return distill_loss(
            hidden, heads[0], batch.student, padded(ht[:, : hs.shape[1]], width(batch.student)), heads[1], batch.teacher,
            jnp.asarray(batch.weight), compare=bound("shared", Options(40, case["beta"])), overlap=Overlap(40), chunk=4,
        )[0]  # fmt: skip

    value, gradient = jax.jit(jax.value_and_grad(loss))(padded(hs, width(batch.student)))
    assert relative(value, case["loss"]) < TOLERANCE
    assert relative(gradient[:, : hs.shape[1]], case["d_hidden"]) < TOLERANCE


@pytest.mark.assets
@pytest.mark.slow
@pytest.mark.parametrize(
    "pair",
    [
        # The larger two either way: the same programs as of the smaller, over more entries.
        pytest.param(pair, marks=pytest.mark.long) if "qwen3" in pair else pair
        for pair in sorted({tuple(c["pair"]) for c in NUMBERS["real"]})
    ],
    ids="<-".join,
)
def test_loss_and_gradients_equal_trl_on_real_tokenizers(assets, pair):
    from transformers import AutoTokenizer

    paths = {"smollm2": "smollm2-135m-instruct"}
    tokenizers = [AutoTokenizer.from_pretrained(assets / paths.get(n, f"tokenizers/{n}")) for n in pair]
    surfaces = [surfaces_of(t) for t in tokenizers]
    sizes = [max(t.get_vocab().values()) + 1 for t in tokenizers]
    vocabulary = VocabularyMap.build(*surfaces, student_size=sizes[0], teacher_size=sizes[1], by="strings")
    rows = []
    for text in recipe.TEXTS:
        ids = [t(text, add_special_tokens=False)["input_ids"] for t in tokenizers]
        ends = [np.cumsum(s.lengths[x]).tolist() for s, x in zip(surfaces, ids)]
        rows.append(dict(student_ids=ids[0], teacher_ids=ids[1], student_ends=ends[0], teacher_ends=ends[1]))
    for case in NUMBERS["real"]:
        if tuple(case["pair"]) == pair:
            check(case, rows, sizes, vocabulary)


@pytest.mark.live
def test_the_committed_numbers_are_those_that_trl_gives_today():
    pytest.importorskip("torch")
    pytest.importorskip("trl")
    student, teacher, rows = recipe.synthetic()
    for case, committed in zip(recipe.cases(), NUMBERS["synthetic"], strict=True):
        found = recipe._trl(case, student, teacher, rows, (40, 50))
        np.testing.assert_allclose(found["loss"], committed["loss"], rtol=1e-9)
        np.testing.assert_allclose(found["d_hidden"], committed["d_hidden"], rtol=1e-6, atol=1e-10)
