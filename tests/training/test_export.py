import contextlib
import types

import pytest

from gold_jax.loading import load_tokenizer
from gold_jax.models import staged_save
from gold_jax.models.hf_checkpoint import model_folder
from gold_jax.training import export
from gold_jax.training.export import save_final_model


class Tokenizer:
    def save_pretrained(self, folder):
        open(f"{folder}/tokenizer.json", "w").write("new")


@pytest.fixture
def saved(monkeypatch):
    """Stands in for `save_model`: writes two files, or fails half-way."""
    state = {"fail": False}

    def save_model(model, folder, *, dtype, stop_ids):
        (folder / "model.safetensors").write_text(f"{model} {dtype}")
        if state["fail"]:
            raise OSError("disk full")
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(export, "save_model", save_model)
    return state


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_weights_config_and_tokenizer_come_into_the_folder_and_other_files_stay(saved, tmp_path):
    (tmp_path / "metrics.jsonl").write_text("log")
    save_final_model("model", Tokenizer(), tmp_path, dtype="bfloat16")
    assert names(tmp_path) == ["config.json", "metrics.jsonl", "model.safetensors", "tokenizer.json"]
    assert (tmp_path / "model.safetensors").read_text() == "model bfloat16"


def test_shards_of_an_earlier_model_do_not_stay_beside_the_new_one(saved, tmp_path):
    for name in (
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ):
        (tmp_path / name).write_text("old")
    save_final_model("model", None, tmp_path)
    assert names(tmp_path) == ["config.json", "model.safetensors"]


def test_a_save_that_fails_leaves_the_model_that_was_there(saved, tmp_path):
    save_final_model("first", Tokenizer(), tmp_path)
    saved["fail"] = True
    with pytest.raises(OSError, match="disk full"):
        save_final_model("second", Tokenizer(), tmp_path)
    assert (tmp_path / "model.safetensors").read_text() == "first auto"
    assert names(tmp_path) == ["config.json", "model.safetensors", "tokenizer.json"]


class Killed(BaseException):
    """Ends a process wherever it is: nothing that comes after it is done."""


def content(folder):
    return {path.name: path.read_text() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("call", range(12))
def test_a_save_that_is_killed_leaves_the_old_model_or_what_the_next_save_completes(call, saved, tmp_path, monkeypatch):
    folder = tmp_path / "model"
    save_final_model("first", Tokenizer(), folder)
    for name in ("model-00001-of-00002.safetensors", "model.safetensors.index.json", "chat_template.jinja", "mine.txt"):
        (folder / name).write_text("old")
    before, calls = content(folder), []

    def killed(function):
        def called(*arguments, **options):
            if len(calls) == call:
                raise Killed
            calls.append(function)
            return function(*arguments, **options)

        return called

    with monkeypatch.context() as patched:
        patched.setattr(staged_save.os, "replace", killed(staged_save.os.replace))
        patched.setattr(staged_save, "_remove", killed(staged_save._remove))
        patched.setattr(
            export, "shutil", types.SimpleNamespace(rmtree=lambda *_, **__: None)
        )  # a killed process cleans nothing
        with contextlib.suppress(Killed):
            save_final_model("second", Tokenizer(), folder)
    new = {"model.safetensors": "second auto", "config.json": "{}", "tokenizer.json": "new", "mine.txt": "old"}
    if staged_save.is_interrupted(folder):
        seen = content(folder)
        for read in (model_folder, load_tokenizer):
            with pytest.raises(ValueError, match=r"a save into .* was interrupted"):
                read(folder)
        assert content(folder) == seen  # readers change nothing
        staged_save.complete_commit(folder)
        assert content(folder) == new
    else:
        assert content(folder) == (before if len(calls) < 2 else new) and model_folder(folder) == folder
    save_final_model("third", Tokenizer(), folder)
    assert content(folder) == new | {"model.safetensors": "third auto"} and not staged_save.is_interrupted(folder)


@pytest.mark.parametrize("name", [".saved", ".moving", ".saving"])
def test_a_folder_of_that_name_that_no_save_made_is_left_alone(name, tmp_path):
    (tmp_path / name).mkdir()
    (tmp_path / name / "tokenizer.model").write_text("mine")
    staged_save.complete_commit(tmp_path)
    staged_save.check_complete(tmp_path)
    assert (tmp_path / name / "tokenizer.model").read_text() == "mine"


def test_a_full_disk_under_a_tokenizer_is_an_error_of_the_system(saved, tmp_path):
    class Full(Tokenizer):
        def save_pretrained(self, folder):
            raise Exception("No space left on device (os error 28)")

    with pytest.raises(OSError, match="No space left"):
        save_final_model("model", Full(), tmp_path)


def test_files_that_are_no_part_of_a_model_stay(saved, tmp_path):
    kept = {"model_of_my_own.safetensors": "x", "notes.json": "{}", "README.md": "mine", "checkpoint-3": None}
    for name, text in kept.items():
        (tmp_path / name).mkdir() if text is None else (tmp_path / name).write_text(text)
    (tmp_path / "chat_template.jinja").write_text("of a tokenizer that comes with no other")
    save_final_model("model", None, tmp_path)
    assert names(tmp_path) == sorted([*kept, "chat_template.jinja", "config.json", "model.safetensors"])


def test_a_folder_that_cannot_be_made_is_an_error_of_its_own_kind(saved, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        save_final_model("model", None, tmp_path / "file" / "model")
