import yaml

from gold_jax.training.model_card import shown_command, write_model_card


def test_a_command_is_shown_without_the_token():
    assert shown_command(["train", "--hub_token", "hf_a", "--hub-token=hf_b", "--x", "a b"]) == (
        "train --hub_token HIDDEN --hub-token=HIDDEN --x 'a b'"
    )


def card(folder, **given):
    path = write_model_card(folder, method="GOLD distillation", **{"base_model": "org/base", **given})
    text = path.read_text()
    return yaml.safe_load(text.split("---")[1]), text


def test_the_model_card_names_what_the_model_was_made_of(tmp_path):
    head, text = card(
        tmp_path / "m",
        **dict(teacher="org/teacher", loss="gold: chain/all/hybrid", dataset="org/data", results={"eval_loss": 0.5}),
        command=["python", "-m", "gold_jax.train", "--hub_token", "hf_secret"],
    )
    assert head["base_model"] == "org/base" and head["datasets"] == ["org/data"] and "gold_jax" in head["tags"]
    for part in (
        "# m",
        "`org/base`",
        "`org/teacher`",
        "`gold: chain/all/hybrid`",
        "| eval_loss | 0.5 |",
        "gold_jax.train",
    ):
        assert part in text
    assert "hf_secret" not in text


def test_folders_of_this_machine_stay_out_of_the_card_s_metadata(tmp_path):
    head, text = card(tmp_path, base_model=str(tmp_path), dataset="./data.jsonl")
    assert "base_model" not in head and "datasets" not in head


def test_a_card_is_renewed_but_a_foreign_readme_is_kept(tmp_path):
    card(tmp_path, base_model="org/first")
    assert card(tmp_path, base_model="org/second")[0]["base_model"] == "org/second"
    (tmp_path / "README.md").write_text("mine")
    write_model_card(tmp_path, method="GOLD distillation", base_model="org/third")
    assert (tmp_path / "README.md").read_text() == "mine"
