import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from gold_jax.loss_spec import LossSpec
from gold_jax.models.config import DecoderConfig
from gold_jax.models.decoder import Decoder
from gold_jax.models.rope import Rope
from gold_jax.text.batch import Half, Row, build_batches, build_token_batches
from gold_jax.text.vocabulary import VocabularyMap
from gold_jax.training.step import (
    Step,
    TrainState,
    freeze_teacher,
    make_cross_entropy_loss,
    make_distillation_loss,
    restore_teacher,
)

V, W, K = 37, 41, 25
SPECS = [
    LossSpec("chain", "all", "hybrid", beta=0.0, matched_weight=1.0, unmatched_weight=1.0),
    LossSpec("chain", "all", "sorted"),
    LossSpec("boundary", "one_to_one", "shared", beta=0.5),
    LossSpec("observed", "all", "hybrid", beta=1.0, crossentropy_weight=0.5),
]


def decoder(vocabulary, seed, tied=True):
    config = DecoderConfig(
        family="llama", vocab_size=vocabulary, width=16, mlp_width=24, layers=2, heads=2, kv_heads=1, head_dim=8,
        norm_eps=1e-5, activation="silu", ropes=(Rope(10000.0), Rope(10000.0)), sliding=(False, False), window=None, tied=tied,
        query_scale=8**-0.5,
    )  # fmt: skip
    model = Decoder.from_config(config, seed)
    model.embedding[...] = model.embedding[...] * 20  # distributions that differ, as trained models' do
    return model


def vocabulary(seed=0):
    rng = np.random.default_rng(seed)
    orders = [rng.permutation(n).astype(np.int32) for n in (V, W)]
    routes = [np.sort(rng.integers(0, K + 1, n - K)).astype(np.int32) for n in (V, W)]
    return VocabularyMap(*orders, K, K, V, W, *routes)


def rows(count, seed=0):
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        groups = int(rng.integers(1, 6))
        sides = []
        for size in (V, W):
            group = np.repeat(np.arange(groups), rng.integers(1, 3, groups))
            prompt = rng.integers(0, size, int(rng.integers(1, 7))).astype(np.int32)
            sides.append(Half(prompt, rng.integers(0, size, len(group)).astype(np.int32), group))
        made.append(Row(*sides, groups=groups, text="", stopped=False))
    return made


def built(spec, tied=True):
    student, teacher = decoder(V, 1), decoder(W, 2, tied)
    graph, params = nnx.split(student)
    teacher_graph, constants = freeze_teacher(teacher, vocabulary())
    return make_distillation_loss(graph, teacher_graph, spec, K, chunk=4), params, constants


def batches(spec, micro, normalization="groups"):
    made = build_batches(rows(4), micro, merge=spec.merge, groups=spec.groups, normalization=normalization)
    return jax.tree.map(jnp.asarray, made)


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.describe())
def test_one_global_batch_gives_one_loss_and_gradient_however_it_is_split(spec):
    loss, params, constants = built(spec)
    gradient = jax.jit(jax.value_and_grad(lambda p, b: loss(p, constants, b)[0]))
    results = []
    for micro in (4, 2, 1):
        parts = [gradient(params, b) for b in batches(spec, micro)]
        results.append(jax.tree.map(lambda *x: sum(x), *parts))
    for value, grads in results[1:]:
        np.testing.assert_allclose(value, results[0][0], rtol=1e-5)
        scale = optax.global_norm(results[0][1])
        difference = optax.global_norm(jax.tree.map(jnp.subtract, grads, results[0][1]))
        assert difference < 1e-5 * scale


def test_accumulated_micro_batches_update_as_the_whole_batch_does():
    spec = SPECS[0]
    ends = []
    for micro in (4, 1):
        loss, params, constants = built(spec)
        optimizer = optax.sgd(0.1)
        step = Step(loss, optimizer)
        state = TrainState(params, optimizer.init(params))
        metrics = step.train(state, constants, batches(spec, micro))
        ends.append((state.params, metrics["loss"], metrics["grad_norm"]))
        assert step.compiled >= 1
    chex.assert_trees_all_close(*ends, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_a_student_that_is_its_teacher_has_no_loss_and_no_gradient(beta):
    spec = LossSpec("chain", "all", "shared", beta=beta)
    graph, params = nnx.split(decoder(V, 1))
    same = VocabularyMap.identity(V)
    teacher_graph, constants = freeze_teacher(decoder(V, 1), same)
    assert constants.student_order is None  # nothing is reordered where nothing has to be
    loss = make_distillation_loss(graph, teacher_graph, spec, V, chunk=8)
    made = [dataclasses.replace(r, teacher=r.student) for r in rows(3)]
    (batch,) = jax.tree.map(jnp.asarray, build_batches(made, 3, merge="chain", groups="all"))
    value, grads = jax.jit(jax.value_and_grad(lambda p: loss(p, constants, batch)[0]))(params)
    assert abs(value) < 1e-6 and optax.global_norm(grads) < 1e-5


@pytest.mark.parametrize("tied", [True, False])
def test_the_teacher_computes_the_same_before_and_after_its_head_is_reordered(tied):
    tokens, mask = jnp.arange(6)[None], jnp.ones((1, 6), bool)
    teacher = decoder(W, 2, tied)
    before = teacher.logits(teacher(tokens, mask))
    order = vocabulary().teacher_order
    graph, constants = freeze_teacher(teacher, vocabulary())
    hidden = nnx.merge(graph, constants.teacher)(tokens, mask)
    np.testing.assert_allclose(hidden @ constants.teacher_head.T, before[..., order], rtol=1e-5, atol=1e-5)
    again = restore_teacher(graph, constants, vocabulary())
    np.testing.assert_allclose(again.logits(again(tokens, mask)), before, rtol=1e-5, atol=1e-5)


def test_cross_entropy_trains_a_small_model_to_say_what_it_is_shown():
    graph, params = nnx.split(decoder(V, 3))
    optimizer = optax.adam(1e-2)
    step = Step(make_cross_entropy_loss(graph, chunk=8), optimizer)
    state = TrainState(params, optimizer.init(params))
    shown = [(np.array([1, 5, 9, 2, 7, 7], np.int32), np.ones(6, bool))] * 2
    (batch,) = build_token_batches(shown, 2)
    losses = [float(step.train(state, (), [batch])["loss"]) for _ in range(60)]
    assert losses[-1] < 0.05 < 1 < losses[0]
    assert float(step.evaluate(state.params, (), batch)["token_accuracy"]) == pytest.approx(1)
    assert step.compiled == 2  # one program to train, one to evaluate
