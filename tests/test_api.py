"""The public surface takes what a user has: names, folders, tokenizers, models, dicts, int seeds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models as tiny

import gold_jax
from gold_jax import scoring
from gold_jax.models.functional import split

TEXT = "5168 is forty-two."
STUDENT, TEACHER = "embedded:student", "embedded:teacher"


@pytest.fixture(scope="module")
def student():
    return gold_jax.load_model_and_tokenizer(STUDENT)


def test_every_name_of_the_surface_is_there_and_documented():
    for name in gold_jax.__all__:
        thing = getattr(gold_jax, name)
        assert isinstance(thing, str) or thing.__doc__


def test_texts_are_aligned_for_names_folders_tokenizers_and_models(student, world):
    wanted = gold_jax.align(STUDENT, TEACHER, TEXT)
    assert len(wanted) == wanted.count == len(list(wanted))
    assert b"".join(text for text, _, _ in wanted) == TEXT.encode()
    for side in (student, student.chat_tokenizer, student.chat_tokenizer.tokenizer):
        found = gold_jax.align(side, TEACHER, TEXT)
        np.testing.assert_array_equal(found.student_group, wanted.student_group)
    folder = gold_jax.align(world / "student", str(world / "teacher"), TEXT)
    assert b"".join(text for text, _, _ in folder) == TEXT.encode()


def test_an_alignment_prints_both_sides_group_under_group():
    ours, theirs = str(gold_jax.align(STUDENT, TEACHER, TEXT)).splitlines()
    assert ours.startswith("student  ") and theirs.startswith("teacher  ")
    assert [i for i, c in enumerate(ours) if c == "│"] == [i for i, c in enumerate(theirs) if c == "│"]
    assert "t·w·o" in ours and "two" in theirs


def test_vocabularies_are_matched_as_training_matches_them(student, world):
    found = gold_jax.match_vocabularies(student, TEACHER)
    assert repr(found).startswith(f"VocabularyMap(matched={found.matched}, ") and len(repr(found)) < 100
    trainer = gold_jax.GOLDTrainer(
        STUDENT,
        TEACHER,
        gold_jax.GOLDConfig(output_dir=str(world / "out"), max_steps=1),
        [{"prompt": "How do you say 5?", "completion": "5 is five."}],
        console=tiny.quiet_console(),
    )
    assert found.matched == trainer.loop.run.match.vocabulary.matched
    np.testing.assert_array_equal(found.student_order, trainer.loop.run.match.vocabulary.student_order)


def test_a_model_is_called_with_token_ids_alone():
    model = gold_jax.load_model(STUDENT)
    tokens = [[1, 2, 3]]
    np.testing.assert_array_equal(model(tokens), model(jnp.array(tokens), jnp.ones((1, 3), bool)))


def test_completions_are_drawn_from_names_and_int_seeds(student):
    prompt = [{"role": "user", "content": "How do you say 5168?"}]
    options = {"prompts": [prompt], "max_new_tokens": 8}
    (wanted,) = gold_jax.sample_completions(*student[:2], key=jax.random.key(3), **options)
    for model in (STUDENT, student):
        (drawn,) = gold_jax.sample_completions(model, key=3, **options)
        assert drawn.text == wanted.text
    (drawn,) = gold_jax.sample_completions(split(student.model), student.chat_tokenizer.tokenizer, key=3, **options)
    assert drawn.text == wanted.text


def test_dicts_are_scored_as_examples_are(student):
    rows = [{"prompt": "How do you say 5?", "completion": "5 is five."}]
    from gold_jax.text.data import load_examples

    wanted = gold_jax.score_completions(*student[:2], list(load_examples(rows)))
    assert gold_jax.score_completions(STUDENT, rows=rows).bits_per_byte == wanted.bits_per_byte
    assert gold_jax.exact_match(STUDENT, rows=rows, max_new_tokens=4) in (0.0, 1.0)


@pytest.mark.parametrize(
    "completions, others, wrong",
    [(["a"], None, "1 completions for 2 prompts"), (["a", "b"], [], "0 teacher_prompts for 2 prompts")],
)
def test_groups_are_scored_for_one_completion_of_each_prompt(completions, others, wrong):
    with pytest.raises(ValueError, match=wrong):
        scoring.score_groups(STUDENT, STUDENT, ["x", "y"], completions, teacher_prompts=others)


def test_groups_are_scored_as_both_models_logits_say(student, world):
    """Every token's log-probability from the whole logits of one sequence, and groups from the ends of both sides' tokens."""
    loaded = [gold_jax.load_model_and_tokenizer(str(world / name)) for name in ("student", "teacher")]
    prompts = ["Sag ein Wort.", [{"role": "user", "content": "Greet me."}], "", "x"]
    others = ["", [{"role": "user", "content": "Greet me, please."}], "A", "x"]
    texts = ["größer 😀, there", "The answer is 72.", "The fox", ""]
    found = scoring.score_groups(*loaded, prompts, texts, teacher_prompts=others, batch_size=3)
    assert ["".join(group.text for group in row) for row in found] == texts
    assert [(row[0].student is None, row[0].teacher is None) for row in found[:3]] == [
        (False, True),
        (False, False),
        (True, False),
    ]
    for text, row, *befores in zip(texts, found, prompts, others):
        data, sides = text.encode(), []
        for (model, chat, _), before in zip(loaded, befores):
            prompt, answer = chat.encode_prompt(before), chat.encode_completion(text, after=before)
            ids, start, ends = [*prompt, *answer.ids], len(prompt), {0: 0.0}
            hidden = model(jnp.array([ids]), jnp.ones((1, len(ids)), bool))[0] if ids else None
            for k, token in enumerate(answer.ids):
                before_it = np.asarray(hidden[start + k - 1] @ model.head_weight().T, np.float64) if start + k else None
                cost = np.nan if before_it is None else before_it[token] - np.logaddexp.reduce(before_it)
                ends[int(answer.spans[k, 1])] = cost + ends.get(int(answer.spans[k, 1]), 0.0)
            sides.append(ends)
        shared = sorted(
            end for end in sides[0].keys() & sides[1].keys() if not data[end : end + 1] or data[end] >> 6 != 2
        )
        assert [len(group.text.encode()) for group in row] == np.diff(shared).tolist()
        for group, begin, end in zip(row, shared, shared[1:]):
            for value, ends in zip(group[1:], sides):
                wanted = sum(cost for at, cost in ends.items() if begin < at <= end)
                assert (value is None and np.isnan(wanted)) or value == pytest.approx(wanted, abs=1e-4)


def test_gaps_are_measured_between_names():
    prompts = [[{"role": "user", "content": "How do you say 5168?"}]]
    gaps = gold_jax.measure_gaps(STUDENT, TEACHER, prompts, max_new_tokens=16, key=0)
    assert np.isfinite([gaps.forward, gaps.reverse]).all()


@pytest.mark.parametrize("call", [gold_jax.score_completions, gold_jax.sample_completions])
def test_a_model_in_memory_without_a_tokenizer_is_refused(student, call):
    with pytest.raises(ValueError, match="a model in memory needs its tokenizer"):
        call(student.model)


def test_what_is_no_tokenizer_is_refused():
    with pytest.raises(TypeError, match="a dict is not a tokenizer with a chat template"):
        gold_jax.match_vocabularies({}, TEACHER)
