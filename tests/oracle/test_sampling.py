"""Completions that the models write themselves: the likeliest token always, so that another implementation can follow."""

import jax
import numpy as np
import pytest

from oracle import cases
from oracle import oracle as o

PROMPTS = [
    {"prompt": [cases.user("How do you say 5172?")], "completion": "5172 is five thousand one hundred seventy-two."},
    {"prompt": [cases.user("Please spell 64.")], "completion": "64 is sixty-four."},
]


def written(tmp_path, pair: o.Pair, how: str, *flags, rows=PROMPTS, limit=40, **models):
    """The first logged line of a run in which somebody writes every completion, and what the oracle has for it."""
    data = cases.write_rows(tmp_path / "rows.jsonl", rows)
    command = ["--dataset_name", data, "--max_steps", 1, "--per_device_train_batch_size", len(rows), "--top_k", 1]
    command += [
        "--max_completion_length",
        limit,
        "--lmbda",
        int(how == "student"),
        *(["--seq_kd"] * (how == "teacher")),
    ]
    found = cases.trained(tmp_path / "run", *command, *flags, **models)[0]
    weights = pair.student.weights
    made = [
        pair.by_student(e, weights, limit) if how == "student" else pair.by_teacher(e, limit)
        for e in cases.examples(rows)
    ]
    batch = pair.batch(made)
    total, parts = o.loss_of(np, weights, batch)
    keeps = [o.counted(row, pair.settings | {"merge": "boundary", "groups": "one_to_one"}) for row in made]
    groups = sum(row.groups for row in made)
    wanted = {"loss": total, **parts, "groups": groups, "one_to_one": sum(k.sum() for k in keeps) / groups}
    if pair.settings["compare"] in ("events", "strict"):
        gradient = o.gradient_of(lambda xp, w: o.loss_of(xp, w, batch)[0], weights)
        wanted["grad_norm"] = np.sqrt(sum((g**2).sum() for g in gradient.values()))
    return found, wanted, made


def test_a_student_s_own_completions_keep_the_tokens_that_it_drew(tmp_path):
    pair = o.Pair(cases.student(), cases.teacher(), {"uld_crossentropy_weight": 0.5})
    found, wanted, made = written(tmp_path, pair, "student", "--uld_crossentropy_weight", "0.5")
    assert any(row.stopped for row in made)
    assert found["on_policy"] == 1 and found["stopped"] == np.mean([row.stopped for row in made])
    lengths = [len(row.halves[0].tokens) for row in made]
    assert found["completion_tokens"] == np.mean(lengths)
    assert cases.differences(found, wanted) == []


@pytest.mark.long
@pytest.mark.parametrize("loss", ["events", "alm", "uld", "strict"])
def test_every_loss_learns_from_what_the_student_wrote(loss, tmp_path):
    pair = o.Pair(cases.student(), cases.teacher(), {"loss": loss})
    found, wanted, _ = written(tmp_path, pair, "student", "--loss", loss)
    assert cases.differences(found, wanted) == []


@pytest.mark.long
def test_a_completion_that_is_cut_by_its_limit_has_no_stop_token(tmp_path):
    found, wanted, made = written(tmp_path, o.Pair(cases.student(), cases.teacher()), "student", limit=6)
    assert not any(row.stopped for row in made)
    assert cases.differences(found, wanted) == []


@pytest.mark.long
def test_reverse_kl_has_the_log_ratio_for_its_value_and_the_policy_gradient(tmp_path):
    pair = o.Pair(cases.student(), cases.teacher(), {"loss": "reverse_kl"})
    found, wanted, made = written(tmp_path, pair, "student", "--loss", "reverse_kl")
    batch = pair.batch(made)
    ratio = o.compare(
        np, (ours(np, pair, batch, pair.student.weights), batch.teacher_sides), batch.plans, batch.matching,
        pair.settings, pair.teacher.size,
    )[0]  # fmt: skip

    def policy(xp, weights):
        p, _, rest = ours(xp, pair, batch, weights)
        logp = xp.log(p[np.arange(len(ratio)), batch.plans[0].place] * rest)
        return (batch.group_weight * ratio * logp).sum()

    gradient = o.gradient_of(policy, pair.student.weights)
    wanted["grad_norm"] = np.sqrt(sum((g**2).sum() for g in gradient.values()))
    assert cases.differences(found, wanted) == []


def importance_weights(row, keep, now, then, settings, cap):
    """Those of the groups that count and of the labels of a row, and the mean absolute log-ratio of its tokens."""
    half, temperature = row.halves[0], settings["temperature"]
    ids, ratio = np.array([half.ids]), 0.0
    for weights, sign in ((now, 1), (then, -1)):
        logp = o.log_probabilities(np, weights, cases.student().config, ids, temperature)[0]
        ratio = ratio + sign * np.array([logp[t - 1, ids[0, t]] for t in range(len(half.prompt), ids.shape[1])])
    groups = []
    for g in np.flatnonzero(keep):
        at = np.flatnonzero(half.group == g)
        reads_text = settings["compare"] in ("events", "alm", "reverse_kl")
        count = at[-1] + 1 if reads_text else at[-1] if settings["merge"] == "chain" else at[0]
        groups.append(ratio[:count].sum())
    return (*(np.minimum(np.exp(x), cap) for x in (np.array(groups), np.cumsum(ratio))), np.abs(ratio))


@pytest.mark.parametrize("loss", ["gold", pytest.param("events", marks=pytest.mark.long), "strict"])
def test_later_updates_weigh_what_was_drawn_before_them_by_how_likely_the_student_of_now_draws_it(loss, tmp_path):
    given, cap = {"loss": loss, "uld_crossentropy_weight": 0.5, "temperature": 0.8}, 1.2
    flags = [word for name, value in given.items() for word in (f"--{name}", value)]
    data = cases.write_rows(tmp_path / "rows.jsonl", PROMPTS * 2)
    lines = cases.trained(
        tmp_path / "run", "--dataset_name", data, "--max_steps", 3, "--per_device_train_batch_size", 2, "--lmbda", 1,
        "--top_k", 1, "--max_completion_length", 40, "--learning_rate", 1e-3, "--rollout_batches", 2,
        "--rollout_importance_cap", cap, "--save_strategy", "steps", "--save_steps", 1, *flags,
    )  # fmt: skip
    pair, rows = o.Pair(cases.student(), cases.teacher(), given), cases.examples(PROMPTS * 2)
    students = [pair.student.weights, *(o.read_weights(tmp_path / "run" / f"checkpoint-{k}") for k in (1, 2))]
    for step, (now, drawn_by) in enumerate(zip(students, (0, 0, 2))):
        then = students[drawn_by]
        made = [pair.by_student(rows[i], then, 40) for i in o.row_order(4, 2, 42, step)]
        batch, keeps = pair.batch(made), [o.counted(row, pair.settings) for row in made]
        weighed = [importance_weights(row, keep, now, then, pair.settings, cap) for row, keep in zip(made, keeps)]
        groups, labels, ratios = map(np.concatenate, zip(*weighed))
        wanted = {
            "importance_sampling_ratio": (batch.group_weight * groups).sum(),
            "importance_sampling_truncated": (batch.group_weight * (groups == cap)).sum(),
            "importance_sampling_logp_difference": ratios.mean(),
        }
        batch.group_weight, batch.label_weight = batch.group_weight * groups, batch.label_weight * labels
        total, parts = o.loss_of(np, now, batch)
        assert cases.differences(lines[step], {"loss": total, **parts}, rel=2e-5) == []
        assert cases.differences(lines[step], wanted, rel=2e-5, near=2e-6) == []
        if step == 1:  # where the weights change something, and some are truncated
            assert (
                0 < wanted["importance_sampling_truncated"] < 1 and wanted["importance_sampling_logp_difference"] > 0.01
            )


def ours(xp, pair, batch, weights):
    """The student's side of a batch."""
    logp = o.log_probabilities(xp, weights, batch.config, batch.plans[0].ids)
    return o.merged(xp, logp, batch.plans[0], batch.matching.matrices[0], pair.settings["merge"])


def test_what_the_teacher_wrote_is_learned_as_the_student_s_tokenizer_writes_it(tmp_path):
    pair = o.Pair(cases.student(), cases.teacher(), {"uld_crossentropy_weight": 0.5})
    found, wanted, made = written(tmp_path, pair, "teacher", "--uld_crossentropy_weight", "0.5")
    assert all(row.stopped for row in made)
    assert cases.differences(found, wanted) == []


@pytest.mark.long
def test_sequence_level_distillation_is_cross_entropy_on_what_the_teacher_wrote(tmp_path):
    given = {"uld_crossentropy_weight": 1.0, "uld_distillation_weight": 0.0}
    pair = o.Pair(cases.student(), cases.teacher(), given)
    flags = [word for name, value in given.items() for word in (f"--{name}", value)]
    found, wanted, _ = written(tmp_path, pair, "teacher", *flags)
    assert cases.differences(found, wanted) == []


@pytest.mark.long
def test_a_teacher_writes_with_its_context_before_it(tmp_path):
    pair = o.Pair(cases.student(), cases.teacher(), {"teacher_context": "Say it in words."})
    found, wanted, _ = written(tmp_path, pair, "teacher", "--teacher_context", "Say it in words.")
    assert cases.differences(found, wanted) == []


def without_five(about):
    """A tokenizer that reads the digit 5 as its unknown token."""
    about["model"]["byte_fallback"] = False
    vocabulary = about["model"]["vocab"]
    about["model"]["vocab"] = {"\u0416" if string == "5" else string: i for string, i in vocabulary.items()}


@pytest.fixture(scope="module")
def lacking(tmp_path_factory):
    """A student without the digit 5."""
    return cases.copied(cases.STUDENT, tmp_path_factory.mktemp("lacking") / "student", tokenizer=without_five)


def test_groups_with_an_unknown_token_of_the_data_do_not_count(lacking, tmp_path):
    pair = o.Side(lacking, o.student_style, ["</s>"], leads=True), cases.teacher()
    assert any(row.unknown for row in map(o.Pair(*pair).row, cases.examples(PROMPTS)))
    cases.assert_evaluates(tmp_path, {}, rows=PROMPTS, pair=pair, student=lacking)


@pytest.mark.long
def test_groups_with_an_unknown_token_in_what_the_teacher_wrote_do_not_count(lacking, tmp_path):
    pair = o.Pair(o.Side(lacking, o.student_style, ["</s>"], leads=True), cases.teacher())
    found, wanted, made = written(tmp_path, pair, "teacher", student=str(lacking))
    assert any(row.unknown for row in made)
    assert cases.differences(found, wanted) == []


@pytest.mark.long
def test_an_update_s_share_of_own_completions_follows_lmbda_seed_and_step(tmp_path):
    data = cases.write_rows(tmp_path / "rows.jsonl", PROMPTS * 2)
    found = cases.trained(
        tmp_path / "run", "--dataset_name", data, "--max_steps", 2, "--per_device_train_batch_size", 1, "--top_k", 1,
        "--gradient_accumulation_steps", 4, "--lmbda", 0.5, "--seed", 7, "--max_completion_length", 40,
        "--learning_rate", 0,
    )  # fmt: skip
    pair = o.Pair(cases.student(), cases.teacher())
    rows = cases.examples(PROMPTS * 2)
    for step, line in enumerate(found[:2]):
        own = np.random.default_rng((7, step, 1)).random(4) < 0.5
        assert line["on_policy"] == own.mean()
        chosen = [rows[i] for i in o.row_order(4, 4, 7, step)]
        made = [pair.by_student(e, pair.student.weights, 40) if mine else pair.row(e) for e, mine in zip(chosen, own)]
        total, parts = o.loss_of(np, pair.student.weights, pair.batch(made))
        assert cases.differences(line, {"loss": total, **parts}) == []


@pytest.mark.long
def test_every_prompt_is_answered_num_generations_times(tmp_path):
    data = cases.write_rows(tmp_path / "rows.jsonl", [*PROMPTS, cases.ROWS[0]])
    found = cases.trained(
        tmp_path / "run", "--dataset_name", data, "--max_steps", 2, "--per_device_train_batch_size", 4, "--lmbda", 0,
        "--num_generations", 2, "--learning_rate", 0,
    )  # fmt: skip
    pair, rows = o.Pair(cases.student(), cases.teacher()), cases.examples([*PROMPTS, cases.ROWS[0]])
    for step, line in enumerate(found[:2]):
        chosen = [rows[i] for i in o.row_order(3, 2, 42, step) for _ in range(2)]
        total, parts = o.loss_of(np, pair.student.weights, pair.batch(list(map(pair.row, chosen))))
        assert cases.differences(line, {"loss": total, **parts}) == []


def test_gaps_are_what_either_model_pays_for_either_s_text(tmp_path):
    import gold_jax

    sides = [gold_jax.load_model_and_tokenizer(f"embedded:{who}", dtype="float32") for who in ("student", "teacher")]
    models = [(p.model, p.chat_tokenizer) for p in sides]
    prompts = [row["prompt"] for row in PROMPTS] + ["The old miller"]
    key = jax.random.key(3)
    found = gold_jax.measure_gaps(*models, prompts, max_new_tokens=24, key=key)
    drawn = [
        gold_jax.sample_completions(*model, prompts, max_new_tokens=24, key=jax.random.fold_in(key, k))
        for k, model in enumerate(models)
    ]
    student, teacher = cases.student(), cases.teacher()

    def paid(side, texts):
        return o.bits_per_byte(side, [o.Example(p, d.text) for p, d in zip(prompts, texts) if d.text.strip()])

    bits = size = 0.0
    for prompt, d in zip(prompts, drawn[0]):
        if d.text.strip():
            text, tokens = student.spelled(d.ids.tolist(), prompt)
            assert text == d.text
            spent = o.spent(student, student.prompt_ids(prompt), tokens)
            bits, size = bits + spent[0], size + len(text.encode())
    wanted = {
        "student_on_teacher": paid(student, drawn[1]),
        "teacher_on_teacher": paid(teacher, drawn[1]),
        "teacher_on_student": paid(teacher, drawn[0]),
        "student_on_student": bits / size,
        "ended": np.mean([d.stopped for d in drawn[0]]),
    }
    wanted["forward"] = wanted["student_on_teacher"] - wanted["teacher_on_teacher"]
    wanted["reverse"] = wanted["teacher_on_student"] - wanted["student_on_student"]
    assert cases.differences({name: getattr(found, name) for name in wanted}, wanted) == []


@pytest.mark.long
def test_exact_matches_are_counted_of_greedy_completions(tmp_path):
    teacher = cases.teacher()
    rows = [*PROMPTS, {"prompt": [cases.user("Please spell 7.")], "completion": "no"}]
    found = cases.measured(
        tmp_path,
        rows,
        student=cases.TEACHER,
        teacher=cases.STUDENT,
        predict_with_generate=True,
        max_completion_length=40,
    )
    right = 0
    for e in cases.examples(rows):
        ids, _ = teacher.write(teacher.weights, teacher.prompt_ids(e.prompt), 40)
        right += teacher.spelled(ids, e.prompt)[0].strip() == e.completion.strip()
    assert found["eval_exact_match"] == pytest.approx(right / 3)
