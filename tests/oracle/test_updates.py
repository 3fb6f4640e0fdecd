"""One to three updates of the command: loss, gradient norm and learning rate of each, by AdamW and schedules of the oracle's."""

import json

import numpy as np
import pytest

from oracle import cases
from oracle import oracle as o


def flags_of(given: dict) -> list[str]:
    """A dict as flags of the command."""
    words: list[str] = []
    for name, value in given.items():
        words.append(f"--{name}")
        if value is not True:
            words.append(json.dumps(value) if isinstance(value, dict) else str(value))
    return words


def updates(pair: o.Pair, rows, given: dict, steps: int) -> list[dict]:
    """What the command should log of updates on the data set's completions."""
    per_step = given["per_device_train_batch_size"] * given.get("gradient_accumulation_steps", 1)
    total = given.get("max_steps", steps)
    optimizer = o.AdamW(
        beta1=given.get("adam_beta1", 0.9),
        beta2=given.get("adam_beta2", 0.999),
        epsilon=given.get("adam_epsilon", 1e-8),
        decay=given.get("weight_decay", 0.0),
        limit=given.get("max_grad_norm", 1.0),
    )
    weights, lines = dict(pair.student.weights), []
    for step in range(steps):
        chosen = [rows[i] for i in o.row_order(len(rows), per_step, given.get("seed", 42), step)]
        batch = pair.batch(list(map(pair.row, chosen)))
        value, parts = o.loss_of(np, weights, batch)
        rate = o.learning_rate(
            step,
            total,
            peak=given["learning_rate"],
            kind=given.get("lr_scheduler_type", "linear"),
            options=given.get("lr_scheduler_kwargs"),
            warmup_ratio=given.get("warmup_ratio", 0.0),
            warmup_steps=given.get("warmup_steps", 0),
        )
        gradient = o.gradient_of(lambda xp, w, b=batch: o.loss_of(xp, w, b)[0], weights)
        weights, norm = optimizer.update(weights, gradient, rate)
        lines.append({"loss": value, "grad_norm": norm, "learning_rate": rate, **parts})
    return lines + [pair.evaluate(rows, weights)]


SETTINGS = {
    "gold, clipped, with decay and a warm-up": {
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 1,
        "learning_rate": 2e-4,
        "weight_decay": 0.3,
        "max_grad_norm": 0.05,
        "lr_scheduler_type": "cosine_with_min_lr",
        "warmup_steps": 1,
        "uld_crossentropy_weight": 0.5,
        "seed": 5,
    },
}
MORE = {
    "events": {
        "loss": "events",
        "per_device_train_batch_size": 3,
        "learning_rate": 1e-4,
        "adam_beta1": 0.5,
        "adam_beta2": 0.9,
        "adam_epsilon": 1e-4,
        "max_grad_norm": 0,
        "lr_scheduler_type": "constant",
        "normalization": "row_mean",
    },
    "alm": {"loss": "alm", "alm_temperature": 5.0, "lr_scheduler_type": "linear"},
    "strict": {"loss": "strict", "lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"num_cycles": 0.8}},
    "projected": {"loss": "projected", "beta": 0.0, "lr_scheduler_type": "constant_with_warmup", "warmup_ratio": 0.5},
    "uld": {"loss": "uld", "lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-5}},
    "uld_extended": {"loss": "uld_extended", "uld_top_k": 8, "gradient_accumulation_steps": 3},
    "a floor by rate": {
        "beta": 1.0,
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr_rate": 0.3},
        "warmup_steps": 0.3,
    },
    "observed": {"merge": "observed", "uld_student_temperature": 0.8},
    "rest": {"compare": "shared_rest", "uld_skip_student_eos": True, "gradient_accumulation_steps": 2},
    "cut": {"max_length": 30, "max_completion_length": 8, "uld_crossentropy_weight": 1.0},
    "not recomputed": {"gradient_checkpointing": "false", "loss_chunk": 5, "pad_to_multiple_of": 16},
    "alone": {"uld_distillation_weight": 0.0, "uld_crossentropy_weight": 1.0},
}


@pytest.mark.parametrize(
    "name", [*SETTINGS, *(pytest.param(name, marks=pytest.mark.long) for name in MORE)], ids=lambda name: name
)
def test_three_updates_are_adamw_s_on_the_gradient_of_the_loss(name, tmp_path):
    given = SETTINGS.get(name) or {"per_device_train_batch_size": 2, "learning_rate": 1e-4} | MORE[name]
    # Rows of one form, so that a file can hold them.
    rows = [{"messages": [cases.user(q), cases.assistant(a)]} for q, a in QUESTIONS]
    data = cases.write_rows(tmp_path / "rows.jsonl", rows)
    found = cases.trained(
        tmp_path / "run", "--dataset_name", data, "--eval_dataset_name", data, "--max_steps", 3, "--lmbda", 0,
        *flags_of(given),
    )  # fmt: skip
    pair = o.Pair(cases.student(), cases.teacher(), given)
    kept = [e for e in cases.examples(rows) if fits(pair, e, given)]
    wanted = updates(pair, kept, given, 3)
    wanted[-1] = pair.evaluate(cases.examples(rows), None) | wanted[-1] if len(kept) == len(rows) else {}
    said = [cases.differences(line, right) for line, right in zip(found, wanted)]
    assert said == [[]] * 4


def fits(pair, example, given) -> bool:
    """Whether a prompt leaves room for a completion, so that the row is learned from."""
    room = given.get("max_length", 1024) - given.get("max_completion_length", 128)
    return len(pair.student.prompt_ids(example.prompt)) <= min(room, given.get("max_prompt_length", room))


QUESTIONS = [
    ("How do you say 5172?", "5172 is five thousand one hundred seventy-two."),
    ("Please spell 19.", "19 is nineteen."),
    ("Write 88 in words.", "88 is eighty-eight, fourteen and sixteen."),
    ("Why?", "The old miller asked why the children laughed\nabout thirteen sailors."),
    ("Tell me about David.", "David is a careful baker near the quiet harbour. größer 😀"),
]


@pytest.mark.long
def test_an_epoch_ends_with_the_rows_that_are_left_and_the_next_is_shuffled_anew(tmp_path):
    given = {"per_device_train_batch_size": 2, "learning_rate": 1e-4, "seed": 11}
    rows = [{"messages": [cases.user(q), cases.assistant(a)]} for q, a in QUESTIONS]
    data = cases.write_rows(tmp_path / "rows.jsonl", rows)
    found = cases.trained(
        tmp_path / "run", "--dataset_name", data, "--num_train_epochs", 1.5, "--lmbda", 0, *flags_of(given)
    )
    assert len(found) == 5  # 3 updates an epoch, 4.5 of them
    pair = o.Pair(cases.student(), cases.teacher(), given)
    wanted = updates(pair, cases.examples(rows), given | {"max_steps": 5}, 5)
    assert [cases.differences(line, right) for line, right in zip(found, wanted)] == [[]] * 5


@pytest.mark.long
def test_rows_with_a_long_prompt_are_left_out_of_training_alone(tmp_path):
    given = {"per_device_train_batch_size": 5, "learning_rate": 0.0, "max_prompt_length": 9}
    rows = [{"messages": [cases.user(q), cases.assistant(a)]} for q, a in QUESTIONS]
    data = cases.write_rows(tmp_path / "rows.jsonl", rows)
    found = cases.trained(
        tmp_path / "run", "--dataset_name", data, "--max_steps", 1, "--lmbda", 0, "--eval_dataset_name", data,
        "--max_eval_samples", 3, *flags_of(given),
    )  # fmt: skip
    pair, read = o.Pair(cases.student(), cases.teacher(), given), cases.examples(rows)
    kept = [e for e in read if fits(pair, e, given)]
    assert 0 < len(kept) < len(rows)
    value, parts = o.loss_of(np, pair.student.weights, pair.batch(list(map(pair.row, kept))))
    assert cases.differences(found[0], {"loss": value, **parts}) == []
    assert cases.differences(found[1], pair.evaluate(read[:3])) == []


@pytest.mark.parametrize("total", [1, 3, 40])
@pytest.mark.parametrize("kind", ["linear", "cosine", "cosine_with_min_lr", "constant", "constant_with_warmup"])
@pytest.mark.parametrize("warmup", [{}, {"warmup_steps": 2}, {"warmup_ratio": 0.1}, {"warmup_steps": 0.25}])
def test_every_schedule_has_the_learning_rate_of_transformers(kind, warmup, total):
    from gold_jax import SFTConfig
    from gold_jax.training.optimizer import make_schedule

    for options in [{}, {"num_cycles": 1.3}, {"min_lr": 3e-5}, {"min_lr_rate": 0.4}]:
        legal = {"cosine": {"num_cycles"}, "cosine_with_min_lr": {"num_cycles", "min_lr", "min_lr_rate"}}.get(
            kind, set()
        )
        if not set(options) <= legal:
            continue
        args = SFTConfig(learning_rate=1e-4, lr_scheduler_type=kind, lr_scheduler_kwargs=dict(options), **warmup)
        schedule = make_schedule(args, total)
        for step in range(total):
            wanted = o.learning_rate(step, total, peak=1e-4, kind=kind, options=options, **warmup)
            assert float(schedule(step)) == pytest.approx(wanted, rel=2e-6, abs=1e-11)


def test_the_first_updates_are_corrected_for_their_bias_as_exactly_as_later_ones():
    import jax.numpy as jnp
    import optax

    from gold_jax import SFTConfig
    from gold_jax.training.optimizer import make_optimizer

    # Beside a zero every digit of the step is kept. 1 - 0.999 in float32 is off by 1.3e-5, which PyTorch's is not.
    rng = np.random.default_rng(0)
    args = SFTConfig(learning_rate=1e-3, lr_scheduler_type="constant", max_grad_norm=None)
    optimizer, ours = make_optimizer(args, 5), o.AdamW(limit=None)
    params, weights = {"w": jnp.zeros(100)}, {"w": np.zeros(100)}
    state = optimizer.init(params)
    for step in range(5):
        gradient = rng.normal(size=100).astype(np.float32)
        updates, state = optimizer.update({"w": jnp.asarray(gradient)}, state, params)
        wanted, _ = ours.update(weights, {"w": gradient.astype(np.float64)}, 1e-3)
        np.testing.assert_allclose(
            updates["w"], wanted["w"] - weights["w"], rtol=1e-6, atol=3e-10, err_msg=f"update {step + 1}"
        )
        params, weights = optax.apply_updates(params, updates), wanted
