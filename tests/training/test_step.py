import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from training.small import SPECS, V, W, batches, built, decoder, rows, vocabulary

from gold_jax import SFTConfig
from gold_jax.loss_spec import LossSpec
from gold_jax.models.functional import merge, split
from gold_jax.text.batch import build_batches, build_token_batches
from gold_jax.text.vocabulary import VocabularyMap
from gold_jax.training.objective import make_cross_entropy_loss, make_distillation_loss
from gold_jax.training.optimizer import make_optimizer, make_schedule
from gold_jax.training.step import Program, Step, init_state
from gold_jax.training.teacher import freeze_teacher, restore_teacher


@pytest.mark.parametrize(
    "micro_batches", [(8, 2), pytest.param((8, 4), marks=pytest.mark.long)], ids=lambda sizes: f"{sizes[-1]} at once"
)
@pytest.mark.parametrize(
    "spec",
    [pytest.param(s, marks=[pytest.mark.long] * (number % 3 > 0)) for number, s in enumerate(SPECS)],
    ids=lambda s: s.name,
)
def test_one_global_batch_gives_one_loss_and_gradient_however_it_is_split(spec, micro_batches):
    loss, params, constants = built(spec)
    gradient = jax.jit(jax.value_and_grad(lambda p, b: loss(p, constants, b)[0]))
    results = []
    for micro in micro_batches:
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
    for micro in (8, 2):
        loss, params, constants = built(spec)
        optimizer = optax.sgd(0.1)
        step = Step(loss, optimizer, constants)
        state, metrics = step(init_state(optimizer, params), batches(spec, micro))
        ends.append((state.params, metrics["loss"], metrics["grad_norm"]))
        assert step.compiled >= 1
    chex.assert_trees_all_close(*ends, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("micro", [1, 2])
def test_an_update_that_is_not_finite_leaves_all_as_it_was(micro):
    graph, params = split(decoder(V, 3))
    optimizer = optax.adam(1e-2)
    step = Step(make_cross_entropy_loss(graph, chunk=8), optimizer)
    state = init_state(optimizer, params)
    shown = [(np.array([1, 5, 9, 2, 7, 7], np.int32), np.ones(6, bool))] * 2
    fine = build_token_batches(shown, 2) * micro
    bad = jax.tree.map(lambda x: np.full_like(x, np.inf) if x.dtype == np.float32 else x, fine)
    state, metrics = step(state, fine)
    assert int(metrics["skipped"]) == 0
    before = jax.tree.map(np.array, (state.params, state.optimizer))
    state, metrics = step(state, bad)
    assert int(metrics["skipped"]) == 1 and not np.isfinite(metrics["loss"])
    chex.assert_trees_all_equal((state.params, state.optimizer), before)
    assert (int(state.step), *map(int, state.nonfinite)) == (2, 1, 1)
    state, metrics = step(state, fine)
    assert int(metrics["skipped"]) == 0
    assert (int(state.step), *map(int, state.nonfinite)) == (3, 1, 0)
    assert not np.array_equal(state.params["embedding"], before[0]["embedding"])


POINTS = [("chain", "shared"), ("boundary", "projected"), ("boundary", "events"), ("boundary", "alm")]
BETA = {"shared": 0.5, "projected": 0.0, "events": 0.5, "alm": 1.0}


@pytest.mark.parametrize(
    "merge, compare, beta",
    [
        pytest.param(*point, beta, marks=[] if beta == BETA[point[1]] else pytest.mark.long)
        for point in POINTS
        for beta in (0.0, 0.5, 1.0)
    ],
)
def test_a_student_that_is_its_teacher_has_no_loss_and_no_gradient(merge, compare, beta):
    spec = LossSpec(merge, "all", compare, {"beta": beta})
    graph, params = split(decoder(V, 1))
    same = VocabularyMap.identity(V)
    teacher_graph, _ = split(decoder(V, 1))
    constants = freeze_teacher(*split(decoder(V, 1)), same)
    assert constants.student_order is None  # nothing is reordered where nothing has to be
    loss = make_distillation_loss(graph, teacher_graph, spec, same, chunk=8)
    made = [dataclasses.replace(r, teacher=r.student) for r in rows(3)]
    (batch,) = jax.tree.map(jnp.asarray, build_batches(made, 3, merge=merge, groups="all", text=spec.of_text))
    value, grads = jax.jit(jax.value_and_grad(lambda p: loss(p, constants, batch)[0]))(params)
    assert abs(value) < 1e-6 and optax.global_norm(grads) < 1e-5


@pytest.mark.parametrize("tied", [True, False])
def test_the_teacher_computes_the_same_before_and_after_its_head_is_reordered(tied):
    tokens, mask = jnp.arange(6)[None], jnp.ones((1, 6), bool)
    teacher = decoder(W, 2, tied)
    before = teacher.logits(teacher(tokens, mask))
    order = vocabulary().teacher_order
    graph, params = split(teacher)
    constants = freeze_teacher(graph, params, vocabulary())
    looked_up = constants.teacher_row_of_token[tokens] if tied else tokens
    hidden = merge(graph, constants.teacher)(looked_up, mask)
    np.testing.assert_allclose(hidden @ constants.teacher_head.T, before[..., order], rtol=1e-5, atol=1e-5)
    again = merge(graph, restore_teacher(graph, constants, vocabulary()))
    np.testing.assert_array_equal(again.logits(again(tokens, mask)), before)
    # What was given, and what was made of it, are still what they were.
    np.testing.assert_array_equal(teacher.logits(teacher(tokens, mask)), before)
    np.testing.assert_array_equal(merge(graph, constants.teacher)(looked_up, mask), hidden)


def test_cross_entropy_trains_a_small_model_to_say_what_it_is_shown():
    graph, params = split(decoder(V, 3))
    optimizer = optax.adam(1e-2)
    step = Step(make_cross_entropy_loss(graph, chunk=8), optimizer)
    state = init_state(optimizer, params)
    shown = [(np.array([1, 5, 9, 2, 7, 7], np.int32), np.ones(6, bool))] * 2
    (batch,) = build_token_batches(shown, 2)
    losses = []
    for _ in range(60):
        state, metrics = step(state, [batch])
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.05 < 1 < losses[0]
    assert float(step.evaluate(state.params, batch)["token_accuracy"]) == pytest.approx(1)
    assert step.compiled == 2  # one program to train, one to evaluate


def test_a_program_is_compiled_once_for_each_shape_though_it_is_compiled_ahead():
    seconds = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, duration, **_: seconds.append(duration) if name.endswith("backend_compile_duration") else None
    )
    program = Program(lambda x, y: x + y)
    for size in (3, 4, 3):
        np.testing.assert_array_equal(program(np.ones(size, np.float32), np.float32(1)), np.full(size, 2.0))
    assert program.compiled == len(seconds) == 2


def test_steps_of_the_same_settings_share_their_programs_and_others_do_not():
    graph, params = split(decoder(V, 3))
    shown = [(np.array([1, 5, 9, 2, 7, 7], np.int32), np.ones(6, bool))] * 2
    (batch,) = build_token_batches(shown, 2)
    settings = SFTConfig(output_dir="unused", learning_rate=1e-2, lr_scheduler_type="constant", warmup_ratio=0.0)

    def once(**changes):
        args = settings.replace(**changes)
        optimizer, schedule = make_optimizer(args, None), make_schedule(args, 10)
        step = Step(make_cross_entropy_loss(graph, chunk=args.loss_chunk or 8), optimizer, schedule=schedule)
        state = init_state(optimizer, jax.tree.map(jnp.array, params))
        return step, jax.tree.map(np.array, step(state, [batch])[0].params)

    (one, first), (two, second), (three, third) = once(), once(), once(learning_rate=2e-2)
    assert one.programs is two.programs is three.programs and two.compiled == three.compiled == 0
    four, _ = once(adam_beta1=0.8)
    assert four.programs is not one.programs and four.compiled == 1
    chex.assert_trees_all_equal(first, second)
    moved, twice = (jax.tree.map(lambda x, y: y - x, jax.tree.map(np.array, params), end) for end in (first, third))
    chex.assert_trees_all_close(jax.tree.map(lambda x: 2 * x, moved), twice, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("micro", [1, 2])
def test_a_learning_rate_that_is_given_is_that_of_an_optimizer_that_has_its_own(micro):
    graph, params = split(decoder(V, 3))
    shown = [(np.array([1, 5, 9, 2, 7, 7], np.int32), np.ones(6, bool))] * 2
    (batch,) = build_token_batches(shown, 2)
    args = SFTConfig(output_dir="unused", learning_rate=1.3e-2, lr_scheduler_type="cosine", warmup_steps=3)
    given = {"schedule": make_schedule(args, 8)}
    ends = []
    for optimizer, options in ((make_optimizer(args, 8), {}), (make_optimizer(args, None), given)):
        step = Step(make_cross_entropy_loss(graph, chunk=8), optimizer, **options)
        state = init_state(optimizer, jax.tree.map(jnp.array, params))
        for left_out in (False, True, False, False, False, False):  # what is left out takes no rate
            state, _ = step.skip(state) if left_out else step(state, [batch] * micro)
        ends.append(jax.tree.map(np.array, state))
    assert ends[0].nonfinite.total == 1
    chex.assert_trees_all_equal(*ends)
