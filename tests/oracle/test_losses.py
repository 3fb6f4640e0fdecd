"""Every setting that reaches the loss, alone and in pairs, by what the package evaluates."""

import itertools
import json

import numpy as np
import pytest

from oracle import cases
from oracle import oracle as o

ALONE = [
    {},
    {"beta": 0.3, "uld_hybrid_matched_weight": 0.25, "uld_hybrid_unmatched_weight": 2.0},
    {"merge": "observed"},
    {"compare": "shared_rest"},
    {"normalization": "row_mean", "uld_crossentropy_weight": 0.5},
    {"uld_crossentropy_weight": 1.3, "uld_distillation_weight": 0.0},
    {"loss": "strict"},
    {"loss": "projected", "beta": 0.0},
    {"loss": "events", "beta": 0.0},
    {"loss": "alm", "alm_temperature": 3.0, "beta": 0.0},
    {"loss": "reverse_kl", "lmbda": 1.0},
    {"use_uld_loss": True, "use_extended_uld": False},
    {"use_uld_loss": True, "uld_token_merge_strategy": "observed"},
    {"max_length": 30, "max_completion_length": 8, "loss": "events", "uld_crossentropy_weight": 1.0},
    {"uld_skip_student_eos": True, "uld_top_k": 5},
    {"uld_student_temperature": 0.7, "uld_teacher_temperature": 1.6, "uld_crossentropy_weight": 0.5},
]
MORE_ALONE = [
    {"groups": "one_to_one"},
    {"use_uld_loss": True},
    {"loss": "uld"},
    {"uld_skip_student_eos": True},
    {"uld_top_k": 5},
    {"uld_teacher_temperature": 1.6},
    {"uld_student_temperature": 0.7, "uld_crossentropy_weight": 0.5},
    {"beta": 0.0},
    {"beta": 1.0},
    {"merge": "boundary"},
    {"groups": "positional"},
    {"compare": "sorted"},
    {"compare": "shared"},
    {"compare": "projected"},
    {"compare": "events"},
    {"compare": "alm"},
    {"uld_crossentropy_weight": 0.7},
    {"uld_distillation_weight": 0.4},
    {"temperature": 0.5},
    {"uld_skip_teacher_eos": True},
    {"loss_chunk": 7},
    {"loss": "gold"},
    {"loss": "uld_extended"},
    {"loss": "projected"},
    {"loss": "events"},
    {"loss": "events", "beta": 1.0},
    {"loss": "alm"},
    {"use_uld_loss": True, "uld_use_hybrid_loss": True},
    {"use_uld_loss": True, "use_extended_uld": False, "uld_use_hybrid_loss": True},
    {"use_uld_loss": True, "uld_token_merge_strategy": "bayesian"},
    {"max_length": 30, "max_completion_length": 8},
]


def slow(given: dict):
    """The same setting, marked slow."""
    return pytest.param(given, marks=pytest.mark.long)


def in_words(given: dict) -> str:
    """A name for a setting."""
    return " ".join(f"{name}={value}" for name, value in given.items()) or "the defaults"


@pytest.mark.parametrize("given", [*ALONE, *(slow(given) for given in MORE_ALONE)], ids=in_words)
def test_a_setting_of_the_loss_means_what_the_mathematics_say(given, tmp_path):
    cases.assert_evaluates(tmp_path, given)


GRID = [
    {"merge": merge, "groups": groups, "compare": compare, "lmbda": 1.0}
    for merge, groups, compare in itertools.product(
        ("chain", "observed", "boundary"),
        ("all", "one_to_one", "positional"),
        ("sorted", "hybrid", "shared", "shared_rest", "projected", "events", "alm", "reverse_kl"),
    )
    if not (merge == "observed" and compare in ("projected", "events", "alm", "reverse_kl"))
    and not (groups == "positional" and compare in ("events", "alm", "reverse_kl"))
]
MORE = [
    {"uld_student_temperature": 0.6, "uld_teacher_temperature": 1.4, "beta": 0.2},
    {"beta": 0.0, "normalization": "row_mean", "uld_skip_student_eos": True},
    {"beta": 1.0, "uld_crossentropy_weight": 0.5, "max_length": 30, "max_completion_length": 8},
]


@pytest.mark.long
@pytest.mark.parametrize("given", GRID, ids=in_words)
def test_every_point_of_the_grid_with_further_settings_means_what_the_mathematics_say(given, tmp_path):
    for more in MORE:
        cases.assert_evaluates(tmp_path, given | more)


def merged_away(about, *names):
    """Gives the last entries of a BPE vocabulary other names, and drops the merges that made them."""
    vocabulary, merges = about["model"]["vocab"], about["model"]["merges"]
    old = sorted(vocabulary, key=vocabulary.get)[-len(names) :]
    renamed = dict(zip(old, names))
    about["model"]["vocab"] = {renamed.get(string, string): i for string, i in vocabulary.items()}

    def parts(merge):
        return merge.split(" ") if isinstance(merge, str) else merge

    about["model"]["merges"] = [m for m in merges if "".join(parts(m)) not in renamed]
    assert not any(part in renamed for m in about["model"]["merges"] for part in parts(m))


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A teacher with numerals and runs of blanks that the student lacks, and a student with such of its own."""
    folder = tmp_path_factory.mktemp("wide")
    teacher = cases.copied(cases.TEACHER, folder / "teacher", tokenizer=lambda a: merged_away(a, "12", "ĠĠĠ", "Ġ51"))
    student = cases.copied(cases.STUDENT, folder / "student", tokenizer=lambda a: merged_away(a, "51", "▁▁", "77"))
    return student, teacher


@pytest.mark.parametrize(
    "given",
    [
        slow({"loss": "projected", "projection_mask": ["whitespace"]}),
        slow({"loss": "projected", "projection_mask": ["numerals"]}),
        slow({"loss": "events", "projection_mask": ["whitespace", "numerals"]}),
        {"loss": "events", "merge": "chain", "projection_mask": ["whitespace", "numerals"], "beta": 0.0},
        slow({"loss": "projected"}),
    ],
    ids=in_words,
)
def test_masked_entries_are_left_out_of_a_projection(given, wide, tmp_path):
    # Leaving them out changes these losses by 6e-5 to 1.5e-3 of themselves.
    pair = (
        o.Side(wide[0], o.student_style, ["</s>"], leads=True),
        o.Side(wide[1], o.teacher_style, ["<|end|>"], leads=False),
    )
    found = cases.assert_evaluates(tmp_path, given, pair=pair, student=wide[0], teacher=wide[1])
    assert found["eval_teacher_unmatched"] > 0


@pytest.fixture(scope="module")
def sibling(tmp_path_factory):
    """A teacher with the student's tokenizer and other weights."""
    rng = np.random.default_rng(0)

    def noisy(name, x):
        return x if "norm" in name else x + rng.normal(0, 0.01, x.shape)

    return cases.copied(cases.STUDENT, tmp_path_factory.mktemp("sibling") / "model", weights=noisy)


@pytest.mark.parametrize(
    "given",
    [
        slow({}),
        {"temperature": 0.5, "beta": 0.0},
        slow({"loss": "gkd", "temperature": 1.7, "beta": 1.0, "uld_student_temperature": 3.0}),
        slow({"loss": "gold"}),
        slow({"loss": "uld_extended"}),
        slow({"loss": "events"}),
        slow({"loss": "alm", "uld_crossentropy_weight": 1.0}),
        slow({"loss": "gkd", "max_length": 30, "max_completion_length": 8}),
    ],
    ids=in_words,
)
def test_one_tokenizer_is_compared_token_by_token(given, sibling, tmp_path):
    pair = cases.student(), o.Side(sibling, o.student_style, ["</s>"], leads=True)
    cases.assert_evaluates(tmp_path, given, pair=pair, teacher=sibling)


@pytest.mark.parametrize("given", [{}, slow({"loss": "alm"}), slow({"loss": "gold", "beta": 0.0})], ids=in_words)
def test_one_vocabulary_with_two_stop_tokens_is_matched_by_role(given, sibling, tmp_path):
    text = (sibling / "chat_template.jinja").read_text().replace("eos_token", "'<question>'")
    other = cases.copied(sibling, tmp_path / "other", template=text, config={"eos_token_id": 3})
    about = json.loads((other / "tokenizer_config.json").read_text()) | {"eos_token": "<question>"}
    (other / "tokenizer_config.json").write_text(json.dumps(about))
    pair = cases.student(), o.Side(other, o.student_style, ["<question>"], leads=True)
    cases.assert_evaluates(tmp_path, given, pair=pair, teacher=other)


@pytest.mark.parametrize("loss", ["events", slow("gold"), slow("uld")])
def test_student_and_teacher_may_change_places(loss, tmp_path):
    # The teacher puts blanks before texts here, and writes them before answers.
    pair = cases.teacher(), cases.student()
    cases.assert_evaluates(tmp_path, {"loss": loss}, pair=pair, student=cases.TEACHER, teacher=cases.STUDENT)


@pytest.mark.long
@pytest.mark.parametrize("given", [{"uld_sort": "xla"}, {"uld_sort": "host", "loss": "uld"}], ids=in_words)
def test_who_sorts_changes_no_value(given, tmp_path):
    cases.assert_evaluates(tmp_path, given)


@pytest.mark.long
def test_rows_of_an_evaluation_are_normalised_together_however_many_are_read_at_once(tmp_path):
    cases.assert_evaluates(tmp_path, {"uld_crossentropy_weight": 0.5}, per_device_eval_batch_size=3)
    cases.assert_evaluates(tmp_path, {"normalization": "row_mean"}, per_device_eval_batch_size=3)


@pytest.mark.long
@pytest.mark.parametrize("attention", ["plain", "blockwise"])
def test_how_attention_is_computed_changes_no_value(attention, tmp_path):
    options = {"attn_implementation": attention}
    cases.assert_evaluates(tmp_path, {}, model_init_kwargs=options, teacher_model_init_kwargs=options)


@pytest.mark.long
def test_computing_in_bfloat16_stays_near(tmp_path):
    wanted = o.Pair(cases.student(), cases.teacher()).evaluate(cases.examples())
    found = cases.measured(tmp_path, cases.ROWS, bf16=True)
    assert not cases.differences(found, wanted, rel=0.03, near=1e-3)
