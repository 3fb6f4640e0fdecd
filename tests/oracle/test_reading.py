"""What a run reads: rows, templates, contexts, special tokens, weights."""

import numpy as np
import pytest

from oracle import cases
from oracle import oracle as o

CHATTY = [cases.ROWS[0], cases.ROWS[1], cases.ROWS[2]]


@pytest.mark.parametrize(
    "context", ["Say it in words.", pytest.param("Two\nlines", marks=pytest.mark.long)]
)  # fmt: skip
def test_a_teacher_s_context_comes_before_that_of_a_row(context, tmp_path):
    cases.assert_evaluates(tmp_path, {"teacher_context": context})


@pytest.mark.parametrize(
    "rows",
    [pytest.param([cases.ROWS[7]], marks=pytest.mark.long), [cases.ROWS[4], cases.ROWS[7]]],
    ids=["alone", "with a plain one"],
)
def test_a_text_after_a_context_is_no_text_from_its_beginning_to_the_teacher(rows, tmp_path):
    pair = cases.teacher(), cases.student()
    rows = [*rows, {"text": "The baker was near.", "teacher_context": "Once more:"}]
    options = {"student": cases.TEACHER, "teacher": cases.STUDENT}
    cases.assert_evaluates(tmp_path, {"loss": "events"}, rows=rows, pair=pair, **options)


@pytest.mark.long
@pytest.mark.parametrize("named", [{"dataset_text_field": "story"}, {"columns": "text=story"}])
def test_another_column_may_hold_the_text(tmp_path, named):
    rows = [{"story": "Then Felix walked home."}, {"story": "The farmer was tired.", "text": "nothing"}]
    found = cases.measured(tmp_path, rows, **named)
    pair = o.Pair(cases.student(), cases.teacher())
    assert cases.differences(found, pair.evaluate(cases.examples(rows, "story"))) == []


MARKED = [
    {"prompt": "<s><question> Write 88 in words.<answer>", "completion": " 88 is eighty-eight."},
    {"prompt": "Say <|end|>", "completion": " now </s> and <|user|> then."},
]


@pytest.mark.parametrize("read", [True, pytest.param(False, marks=pytest.mark.long)])
def test_special_tokens_in_plain_prompts_are_tokens_where_that_is_asked_for(read, tmp_path):
    pair = cases.student(markup=read), cases.teacher(markup=read)
    cases.assert_evaluates(tmp_path, {}, rows=MARKED, pair=pair, special_tokens_in_prompts=read)


BRIEF = "{% if brief %}<question> Be {{ brief }}.{% endif %}"


def brief(style):
    """A style that may begin with an order."""

    def written(messages, generate, variables, end):
        order = [("<question>",), f" Be {variables['brief']}."] if variables.get("brief") else []
        pieces = style(messages, generate, variables, end)
        return [pieces[0], *order, *pieces[1:]] if style is o.student_style else [*said(order), *pieces]

    def said(order):
        return [("<|user|>",), order[1][1:]] if order else []

    return written


@pytest.fixture(scope="module")
def brief_pair(tmp_path_factory):
    """A student and a teacher whose templates read the variable `brief`."""
    folder = tmp_path_factory.mktemp("brief")
    text = (cases.STUDENT / "chat_template.jinja").read_text()
    student = cases.copied(
        cases.STUDENT, folder / "student", template=text.replace("bos_token }}", "bos_token }}" + BRIEF)
    )
    text = (cases.TEACHER / "chat_template.jinja").read_text()
    order = BRIEF.replace("<question> ", "<|user|>")
    return student, cases.copied(cases.TEACHER, folder / "teacher", template=order + text)


@pytest.mark.parametrize(
    "given, student, teacher",
    [
        pytest.param({"template_kwargs": {"brief": "short"}}, "short", "short", marks=pytest.mark.long),
        ({"template_kwargs": {"brief": "short"}, "teacher_template_kwargs": {"brief": "long"}}, "short", "long"),
        ({"template_kwargs": {"brief": "short"}, "teacher_template_kwargs": {}}, "short", None),
        pytest.param({"teacher_template_kwargs": {"brief": "long"}}, None, "long", marks=pytest.mark.long),
    ],
    ids=["for both", "for each", "none for the teacher", "for the teacher alone"],
)
def test_template_variables_go_to_both_unless_the_teacher_has_its_own(given, student, teacher, brief_pair, tmp_path):
    rows = [*CHATTY[:2], {**cases.ROWS[0], "chat_template_kwargs": {"brief": "blunt"}}]
    sides = (
        o.Side(brief_pair[0], brief(o.student_style), ["</s>"], leads=True, variables={"brief": student}),
        o.Side(brief_pair[1], brief(o.teacher_style), ["<|end|>"], leads=False, variables={"brief": teacher}),
    )
    cases.assert_evaluates(tmp_path, given, rows=rows, pair=sides, student=brief_pair[0], teacher=brief_pair[1])


def plain_style(messages, generate, variables, end):
    """A template that writes no blank before an answer."""
    pieces = [("<s>",)]
    for message in messages:
        name = "<answer>" if message["role"] == "assistant" else "<question>"
        pieces += [(name,), message["content"], *([(end,)] if name == "<answer>" else [])]
    return pieces + ([("<answer>",)] if generate else [])


def test_another_chat_template_is_the_student_s_alone(tmp_path):
    path = tmp_path / "other.jinja"
    path.write_text((cases.STUDENT / "chat_template.jinja").read_text().replace("> {{", ">{{"))
    pair = o.Side(cases.STUDENT, plain_style, ["</s>"], leads=False), cases.teacher()
    cases.assert_evaluates(tmp_path, {}, pair=pair, chat_template_path=str(path))


@pytest.mark.parametrize("loss", ["gold", pytest.param("events", marks=pytest.mark.long)])
def test_another_end_token_ends_the_student_s_turns_and_counts_as_one_with_the_old(loss, tmp_path):
    pair = o.Side(cases.STUDENT, o.student_style, ["<question>", "</s>"], leads=True), cases.teacher()
    given = {"loss": loss, "beta": 0.0, "uld_crossentropy_weight": 1.0}
    cases.assert_evaluates(tmp_path, given, pair=pair, eos_token="<question>")


@pytest.fixture(scope="module")
def exact(tmp_path_factory):
    """Copies of the models whose weights are no bfloat16 numbers."""
    folder, rng = tmp_path_factory.mktemp("exact"), np.random.default_rng(1)

    def moved(name, x):
        return x * (1 + rng.uniform(-1, 1, x.shape) / 300)

    return [
        cases.copied(source, folder / name, weights=moved)
        for name, source in (("student", cases.STUDENT), ("teacher", cases.TEACHER))
    ]


@pytest.mark.parametrize("rounded", [(False, False), (True, False), (False, True)], ids=["none", "student", "teacher"])
def test_weights_are_rounded_when_they_are_read_where_dtype_says_so(rounded, exact, tmp_path):
    sides = (
        o.Side(exact[0], o.student_style, ["</s>"], leads=True, bfloat16=rounded[0]),
        o.Side(exact[1], o.teacher_style, ["<|end|>"], leads=False, bfloat16=rounded[1]),
    )
    options = [{"dtype": "bfloat16"} if r else {} for r in rounded]
    cases.assert_evaluates(
        tmp_path, {}, pair=sides, student=exact[0], teacher=exact[1],
        model_init_kwargs=options[0], teacher_model_init_kwargs=options[1],
    )  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["bfloat16", "auto"])
def test_training_keeps_float32_weights_however_they_were_read(dtype, exact, tmp_path):
    data = cases.write_rows(tmp_path / "rows.jsonl", CHATTY[:1])
    found = cases.trained(
        tmp_path / "run", "--dataset_name", data, "--eval_dataset_name", data, "--max_steps", 1, "--lmbda", 0,
        "--learning_rate", 1e-5, "--lr_scheduler_type", "constant", "--dtype", dtype,
        student=str(exact[0]), teacher=str(exact[1]),
    )  # fmt: skip
    pair = o.Pair(
        o.Side(exact[0], o.student_style, ["</s>"], leads=True, bfloat16=dtype == "bfloat16"),
        o.Side(exact[1], o.teacher_style, ["<|end|>"], leads=False),
    )
    rows = cases.examples(CHATTY[:1])
    batch = pair.batch(list(map(pair.row, rows)))
    value, parts = o.loss_of(np, pair.student.weights, batch)
    gradient = o.gradient_of(lambda xp, w: o.loss_of(xp, w, batch)[0], pair.student.weights)
    weights, norm = o.AdamW().update(pair.student.weights, gradient, 1e-5)
    assert cases.differences(found[0], {"loss": value, "grad_norm": norm, **parts}) == []
    assert cases.differences(found[1], pair.evaluate(rows, weights)) == []


@pytest.mark.long
def test_a_tokenizer_of_the_teacher_s_may_lie_elsewhere(tmp_path):
    other = cases.copied(cases.TEACHER, tmp_path / "teacher")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (other / name).unlink()
    found = cases.measured(tmp_path / "out", CHATTY, teacher=other, teacher_tokenizer_name_or_path=str(cases.TEACHER))
    assert cases.differences(found, o.Pair(cases.student(), cases.teacher()).evaluate(cases.examples(CHATTY))) == []
