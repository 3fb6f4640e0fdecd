import pytest

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
