"""The embedded models and task are what they claim to be, and can be made again."""

import dataclasses
import json
import pathlib
import re

import pytest
from run_files import lines

from gold_jax.loading import load_model_and_tokenizer
from gold_jax.models.hf_checkpoint import load_model
from gold_jax.quickstart import ASSETS, resolve
from gold_jax.scoring import exact_match, sample_completions
from gold_jax.text.align import align
from gold_jax.text.data import load_examples
from gold_jax.text.detokenize import completion_from_ids
from gold_jax.text.vocabulary import VocabularyMap
from tools.quickstart.build import RECIPES, build_task, build_tokenizer, main
from tools.quickstart.language import NUMBERS, in_words, split_numbers, task_rows

CONFIG = pathlib.Path(__file__).parents[1] / "configs" / "quickstart.yaml"
ROLES = ("teacher", "student")


@pytest.fixture(scope="module")
def both():
    return {role: load_model_and_tokenizer(resolve(f"embedded:{role}"), dtype="float32", role=role) for role in ROLES}


@pytest.fixture(scope="module")
def held_out():
    return load_examples(resolve("embedded:task"), split="test")[:50]


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (0, "zero"),
        (10, "ten"),
        (19, "nineteen"),
        (40, "forty"),
        (100, "one hundred"),
        (613, "six hundred thirteen"),
        (4073, "four thousand seventy-three"),
        (9999, "nine thousand nine hundred ninety-nine"),
    ],
)
def test_numbers_are_spelled_as_in_english(number, words):
    assert in_words(number) == words


def test_every_number_has_words_of_its_own():
    assert len({in_words(number) for number in range(NUMBERS)}) == NUMBERS


def test_a_number_that_has_no_words_is_refused():
    with pytest.raises(ValueError, match="from 0 to 9999, not 10000"):
        in_words(10_000)


def test_the_test_questions_are_about_numbers_that_no_training_row_names():
    asked = {
        split: {re.findall(r"\d+", row["prompt"][0]["content"])[0] for row in _rows(split)}
        for split in ("train", "test")
    }
    assert len(asked["test"]) == len(_rows("test"))
    assert not asked["train"] & asked["test"]
    learned, held_out = split_numbers()
    assert asked["test"] == {str(number) for number in held_out}
    assert not set(learned) & set(held_out)  # both models' lessons draw from `learned` alone


def test_the_committed_rows_are_those_that_the_generator_writes(tmp_path):
    build_task(tmp_path)
    for split in ("train", "test"):
        name = f"{split}.jsonl"
        assert (tmp_path / name).read_text() == (resolve("embedded:task") / name).read_text()
        assert _rows(split) == task_rows(split)


@pytest.mark.parametrize("role", ROLES)
def test_training_a_tokenizer_again_gives_the_committed_one(role, tmp_path):
    made = build_tokenizer(role, tmp_path)
    committed = json.loads((resolve(f"embedded:{role}") / "tokenizer.json").read_text())
    assert json.loads((tmp_path / "tokenizer.json").read_text())["model"] == committed["model"]
    assert made.get_vocab() == {
        **committed["model"]["vocab"],
        **{t["content"]: t["id"] for t in committed["added_tokens"]},
    }
    template = "chat_template.jinja"
    assert (tmp_path / template).read_text() == (resolve(f"embedded:{role}") / template).read_text()


def test_the_two_models_are_of_different_families_and_match_their_recipes(both):
    for role, who in both.items():
        assert who.model.config.family == RECIPES[role].config["model_type"]
        assert who.model.config.width == RECIPES[role].config["hidden_size"]
    assert both["teacher"].model.config.family != both["student"].model.config.family


def test_the_tokenizers_cut_the_same_text_differently(both):
    student, teacher = (both[role].chat_tokenizer for role in ("student", "teacher"))
    question = "How do you say 1542?"
    cut = align(student.tokenizer, teacher.tokenizer, question)
    assert cut.count < len(cut.student.ids)
    answer = align(student.tokenizer, teacher.tokenizer, "1542 is one thousand five hundred forty-two.")
    assert not answer.one_to_one().all()
    vocabulary = VocabularyMap.build(
        student.surfaces,
        teacher.surfaces,
        student_size=both["student"].model.config.vocab_size,
        teacher_size=both["teacher"].model.config.vocab_size,
        stop=(student.stop_id, teacher.stop_id),
    )
    assert 0.5 < vocabulary.jaccard() < 0.9


def test_the_templates_and_stop_tokens_differ(both):
    student, teacher = (both[role].chat_tokenizer for role in ("student", "teacher"))
    prompt = task_rows("test")[0]["prompt"]
    assert student.render(prompt) != teacher.render(prompt)
    assert student.template.lead and not teacher.template.lead
    stops = [
        chat_tokenizer.tokenizer.convert_ids_to_tokens(chat_tokenizer.stop_id) for chat_tokenizer in (student, teacher)
    ]
    assert stops == ["</s>", "<|end|>"]


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize(
    "text", ["347 is three hundred forty-seven.", "naïve – 漢字 🙂\n\ttwice", "1  2", "</s><|end|>"]
)
def test_the_tokenizers_give_any_text_back(both, role, text):
    chat_tokenizer = both[role].chat_tokenizer
    ids = chat_tokenizer.encode_completion(text).ids
    drawn = completion_from_ids(chat_tokenizer, [*ids.tolist(), chat_tokenizer.stop_id])
    assert (drawn.text, drawn.stopped, drawn.invalid_utf8) == (text, True, False)


def test_the_teacher_has_learned_the_task_and_the_student_has_not(both, held_out):
    score = {
        role: exact_match(who.model, who.chat_tokenizer, held_out, max_new_tokens=32) for role, who in both.items()
    }
    assert score["teacher"] >= 0.9
    assert score["student"] <= 0.1


def test_the_student_answers_in_the_right_form(both, held_out):
    student = both["student"]
    drawn = sample_completions(
        student.model, student.chat_tokenizer, [e.prompt for e in held_out], max_new_tokens=32, key=_key()
    )
    assert sum(d.stopped for d in drawn) >= 45
    assert sum(bool(re.fullmatch(r"\d+ is [a-z -]+\.", d.text)) for d in drawn) >= 40


@pytest.mark.slow
def test_a_model_is_built_as_a_folder_that_can_be_loaded(monkeypatch, tmp_path):
    recipe = dataclasses.replace(RECIPES["student"], steps=2)
    monkeypatch.setitem(RECIPES, "student", recipe)
    main(["--only", "student", "--output", str(tmp_path)])
    built = load_model_and_tokenizer(tmp_path / "student", dtype="float32")
    assert built.model.config == load_model(resolve("embedded:student")).config
    assert sorted(p.name for p in (tmp_path / "student").iterdir()) == sorted(
        p.name for p in resolve("embedded:student").iterdir()
    )


def test_the_models_are_small():
    assert all((resolve(f"embedded:{role}") / "model.safetensors").stat().st_size <= 1_500_000 for role in ROLES)
    assert sum(path.stat().st_size for path in ASSETS.rglob("*") if path.is_file()) <= 2_500_000


def test_the_packaged_configuration_is_the_one_in_configs():
    assert resolve("embedded:quickstart").read_text() == CONFIG.read_text()


@pytest.mark.parametrize("name", ["embedded:tutor", "teacher", "embedded:"])
def test_an_unknown_embedded_name_is_refused_with_the_known_ones(name):
    with pytest.raises(
        ValueError, match=f"'{name}'.*embedded:teacher, embedded:student, embedded:task, embedded:quickstart"
    ):
        resolve(name)


def test_a_package_without_its_data_says_how_to_make_it(monkeypatch, tmp_path):
    monkeypatch.setattr("gold_jax.quickstart.ASSETS", tmp_path)
    with pytest.raises(FileNotFoundError, match="embedded:task should lie in .*tools.quickstart.build"):
        resolve("embedded:task")


def test_transformers_reads_the_configurations():
    from transformers import AutoConfig

    for role in ROLES:
        config = AutoConfig.from_pretrained(resolve(f"embedded:{role}"))
        assert config.vocab_size == load_model(resolve(f"embedded:{role}")).config.vocab_size


def _rows(split: str) -> list[dict]:
    return lines(resolve("embedded:task") / f"{split}.jsonl")


def _key():
    import jax

    return jax.random.key(0)
