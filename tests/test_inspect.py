"""`gold_jax.inspect` and `inspect_pair`: what goes in, what comes out."""

import json
import shlex

import pytest
import tiny_models as tiny
import tokenizers
from text import toy_tokenizers as toys

from gold_jax import ChatTokenizer, align, cli, inspect, inspect_pair, load_model_and_tokenizer
from gold_jax.inspection.samples import SAMPLES

TEXT = "The other dog, over the fox; 24 + 48 = 72."


@pytest.fixture
def told(world, capsys, monkeypatch):
    """Runs the command on the two models, or on others; gives what it prints."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("COLUMNS", "100")

    def run(line: str = "", student="student", teacher="teacher") -> str:
        names = f"--student {world / student} --teacher {world / teacher} "
        cli.run("gold_jax.inspect", inspect.main, shlex.split(names + line))
        return capsys.readouterr().out

    return run


@pytest.fixture
def refused(told, capsys):
    """Runs the command, which must end in an error; gives the one paragraph that it says."""

    def run(*args, **flags) -> str:
        with pytest.raises(SystemExit) as end:
            told(*args, **flags)
        said = capsys.readouterr().err
        assert end.value.code == 2 and said.startswith("gold_jax.inspect: ") and said.count("\n") == 1
        return said

    return run


def test_the_report_of_two_models(told, world):
    shown = told(f"--text {shlex.quote(TEXT)} 'größer, schöner'")
    for part in (world / "student", "text 1", "text 2", "·other", "Jaccard", "probability on these texts (float32)"):
        assert str(part) in shown
    assert "in short" in shown and "note" not in shown


def test_json_is_one_object_with_the_numbers_of_the_function(told, world):
    found = json.loads(told(f"--text {shlex.quote(TEXT)} --json"))
    expected = inspect_pair(world / "student", world / "teacher", TEXT)
    assert found == json.loads(json.dumps(expected.to_dict()))
    groups = align(tiny.student_tokenizer(), tiny.teacher_tokenizer(), TEXT)
    assert found["total"]["groups"] == groups.count
    assert found["total"]["one_to_one"] == groups.one_to_one().sum()
    assert 0 < found["mass"]["teacher"]["surfaces"] < found["mass"]["teacher"]["projected"] < 1
    # The heads have five rows more than the tokenizers have ids, which find no prefix.
    assert found["vocabularies"]["student"]["lost"] > 5
    alone = json.loads(told(f"--text {shlex.quote(TEXT)} --json --no_models"))
    assert alone["vocabularies"]["student"]["lost"] == found["vocabularies"]["student"]["lost"] - 5


def test_texts_keep_their_blanks_and_commas_and_come_from_files_too(told, tmp_path):
    (tmp_path / "more.txt").write_bytes("größer\r\nx".encode())
    line = f"--no_models --text 'a, b' --text='  c' --json --text_file {tmp_path}/more.txt"
    found = json.loads(told(line))["texts"]
    assert [text["name"] for text in found] == ["text 1", "text 2", f"{tmp_path}/more.txt"]
    assert [text["bytes"] for text in found] == [4, 3, 11]


def test_samples_of_several_kinds_stand_in_for_texts(told):
    shown = told("--no_models")
    assert all(name in shown for name in SAMPLES) and "⟨" in shown and "↵" in shown


def test_the_page_is_written(told, tmp_path):
    shown = told(f"--no_models --text '<b>&' --html {tmp_path}/pair.html")
    text = (tmp_path / "pair.html").read_text(encoding="utf-8")
    assert text.startswith("<!DOCTYPE html>") and "<b>&" not in text and "&lt;" in text
    assert f"The page is in {tmp_path}/pair.html" in shown


def test_the_flags_of_train_name_the_pair_too(world, capsys):
    line = f"--model_name_or_path {world}/student_tokenizer --teacher_model_name_or_path {world}/teacher_tokenizer"
    cli.run("gold_jax.inspect", inspect.main, shlex.split(f"{line} --text a --json"))
    assert json.loads(capsys.readouterr().out)["student"] == f"{world}/student_tokenizer"


def test_tokenizers_alone_are_compared_where_one_side_has_no_weights(told):
    found = json.loads(told("--text a --json", teacher="teacher_tokenizer"))
    assert found["mass"] is None
    assert found["notes"] == ["The tokenizers alone were compared: no weights were found for the teacher."]
    assert json.loads(told("--text a --json --no_models"))["notes"] == []


def test_what_comes_with_the_package_is_known_by_name():
    found = inspect_pair("embedded:student", "embedded:teacher", "12 is twelve.", models=False)
    assert found.student == "embedded:student" and 0.5 < found.vocabularies.surfaces.jaccard < 0.9


def test_a_cut_text_is_noted(told):
    found = json.loads(told(f"--text {shlex.quote(TEXT)} a --json --max_length 8"))
    assert found["notes"] == ["The models read only the beginning of text 1, as far as max_length goes."]
    # No token stands before the texts here, and the second has only one.
    assert [text["student"]["positions"] for text in found["mass"]["by_text"]] == [7, 0]
    assert found["mass"]["by_text"][1]["student"]["surfaces"] is None


def test_everything_that_a_side_can_be(world):
    student = load_model_and_tokenizer(world / "student", dtype="float32")
    teacher = load_model_and_tokenizer(world / "teacher", dtype="float32")
    scored = inspect_pair(student, teacher, {"mine": TEXT})
    assert scored.mass is not None and scored.texts[0].name == "mine" and "mine" in scored._repr_html_()
    named = inspect_pair(str(world / "student"), world / "teacher", [TEXT])
    assert named.mass == scored.mass
    counts = {
        inspect_pair(one, other, TEXT, models=False).total
        for one, other in [
            (student, teacher.chat_tokenizer),
            (tiny.student_tokenizer(), tiny.teacher_tokenizer()),
            (ChatTokenizer(tiny.student_tokenizer()), str(world / "teacher_tokenizer")),
            (tiny.student_tokenizer().backend_tokenizer, tiny.teacher_tokenizer().backend_tokenizer),
        ]
    }
    assert counts == {scored.total}


def test_a_bare_tokenizer_without_a_stop_token_will_do():
    bare = tokenizers.Tokenizer.from_str(toys.byte_level().backend_tokenizer.to_str())
    found = inspect_pair(bare, toys.unigram(), TEXT)
    assert found.mass is None and found.total.bytes == len(TEXT) and found.student == "Tokenizer"


def test_one_tokenizer_for_both(world, capsys):
    found = inspect_pair(world / "student", world / "student", TEXT)
    assert found.total.share_of_groups == found.vocabularies.surfaces.jaccard == 1
    assert found.mass.student.surfaces == pytest.approx(1, abs=1e-5) and found.mass.student.routed == 0
    found.print()
    assert "GKD" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("--text ''", "text is empty"),
        ("--text a ''", "text 2 is empty"),
        ("--text", "--text needs a value"),
        ("--text_file nowhere.txt", "--text_file nowhere.txt cannot be read"),
        ("--html nowhere/pair.html", "--html is nowhere/pair.html; it must be a file in a folder"),
        ("--max_length 0", "--max_length is 0; it must be at least 1"),
        ("--tex a", "there is no flag --tex; the nearest is --text"),
        ("--models maybe", "--models is 'maybe'"),
    ],
)
def test_what_is_wrong_with_a_flag_is_said_in_one_paragraph(line, says, refused):
    assert says in refused(line)


def test_what_is_wrong_with_a_side_is_said_in_one_paragraph(refused, world, tmp_path, capsys):
    assert "no tokenizer can be read from" in refused(student="nowhere/at/all")
    assert "has no config.json" in refused("--models --text a", teacher="teacher_tokenizer")
    (tmp_path / "binary").write_bytes(b"ab\xff")
    assert "is not UTF-8: byte 2 is 0xff" in refused(f"--text_file {tmp_path}/binary")
    for line in ("", f"--student {world}/student"):
        with pytest.raises(SystemExit) as end:
            cli.run("gold_jax.inspect", inspect.main, shlex.split(line))
        assert end.value.code == 2 and "is missing: a folder or hub id" in capsys.readouterr().err


def test_a_model_that_cannot_be_read_leaves_the_tokenizers_to_compare(refused, told, world):
    broken = world / "broken"
    tiny.write_student(broken)
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"model_type": "mamba"}))
    said = refused("--text a", student="broken")
    assert "'mamba'" in said and "--no_models" in said
    assert "--no_models" not in refused("--text a --models", student="broken")
    assert "Jaccard" in told("--text a --no_models", student="broken")


def test_what_is_wrong_in_python_is_said_in_python(world):
    with pytest.raises(ValueError, match="the teacher is a .* without a model to read the texts with"):
        inspect_pair(world / "student", tiny.teacher_tokenizer(), "a", models=True)
    with pytest.raises(ValueError, match="a object"):
        inspect_pair(world / "student", object(), "a")
    with pytest.raises(ValueError, match="there is no text"):
        inspect_pair(tiny.student_tokenizer(), tiny.teacher_tokenizer(), [])


@pytest.mark.assets
@pytest.mark.parametrize(
    ("teacher", "surfaces", "strings"),
    [("llama3_2", 0.644, (0.643, 0.644)), pytest.param("gemma3", 0.302, (0.063,), marks=pytest.mark.long)],
)
def test_real_vocabularies_overlap_as_is_known_of_them(teacher, surfaces, strings, assets):
    found = inspect_pair(assets / "tokenizers" / "qwen3", assets / "tokenizers" / teacher).vocabularies
    assert round(found.surfaces.jaccard, 3) == surfaces
    assert round(found.strings.jaccard, 3) in strings


@pytest.mark.assets
@pytest.mark.slow
def test_a_real_pair_matches_most_of_its_probability(assets):
    found = inspect_pair(assets / "smollm2-135m-gpt2tok", assets / "smollm2-135m-instruct", SAMPLES["English"])
    assert found.mass.teacher.surfaces > 0.9 and found.mass.student.projected > 0.99
    # GPT-2's tokenizer has numerals of several digits, SmolLM2's has none.
    assert found.vocabularies.student.numerals > 1000 and found.vocabularies.teacher.numerals == 0
