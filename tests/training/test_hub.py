import functools
import types

import huggingface_hub
import pytest
import yaml

from gold_jax.training.hub import (
    HubError,
    HubSilent,
    create_hub_repository,
    push_to_hub,
)
from gold_jax.training.model_card import shown_command, write_model_card


class FakeHub:
    """The part of `HfApi` that is used, with what it was asked to do."""

    asked: list
    fail: str | None = None

    def __init__(self, token=None):
        self.asked.append(("token", token))

    def create_repo(self, repo_id, **given):
        self.asked.append(("create", repo_id, given))
        if self.fail == "create":
            raise OSError("401 Unauthorized\nlong story")
        return types.SimpleNamespace(repo_id=repo_id if "/" in repo_id else f"me/{repo_id}")

    def upload_folder(self, **given):
        self.asked.append(("upload", given))
        if self.fail == "upload":
            raise OSError("connection lost")
        return "https://hub/commit"


@pytest.fixture
def hub(monkeypatch):
    class Hub(FakeHub):
        asked = []

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    return Hub


def test_a_push_makes_the_repository_and_uploads_the_model_and_nothing_else(hub, tmp_path):
    assert push_to_hub(tmp_path, "U/M", True, "hf_t", "message") == "https://hub/commit"
    token, create, (_, upload) = hub.asked
    assert token == ("token", "hf_t")
    assert create == ("create", "U/M", {"private": True, "exist_ok": True})
    assert (upload["folder_path"], upload["repo_id"], upload["commit_message"]) == (str(tmp_path), "U/M", "message")
    model = ["model.safetensors", "config.json", "tokenizer.json", "additional_chat_templates/a.jinja", "README.md"]
    others = (
        "checkpoint-5/model.safetensors checkpoint-5/state/array_metadatas/a saves/checkpoint-5/run.json runs/run/events "
        "metrics.jsonl metrics.1.jsonl completions.jsonl completions.2.jsonl profile/x/trace.json.gz current_run .lock "
        ".saving/x .saved/model.safetensors .rollout_weights/model.safetensors saves/current_run "
        "checkpoint-5/tokenizer.model saves/tokenizer.json notes.txt data.csv .env model_of_my_own.safetensors"
    ).split()
    kept = huggingface_hub.utils.filter_repo_objects(model + others, allow_patterns=upload["allow_patterns"])
    assert list(kept) == model


def test_without_a_name_the_folder_names_the_repository(hub, tmp_path):
    folder = tmp_path / "gold-model"
    push_to_hub(folder, None)
    assert hub.asked[1][1] == "gold-model"
    assert hub.asked[2][1]["repo_id"] == "me/gold-model"
    assert create_hub_repository(None, folder, None, None) == "me/gold-model"


def test_a_push_that_fails_says_where_the_model_lies_and_how_to_upload_it(hub, tmp_path):
    hub.fail = "upload"
    with pytest.raises(HubError) as error:
        push_to_hub(tmp_path, "U/M")
    assert all(part in str(error.value) for part in ("connection lost", str(tmp_path), f"hf upload U/M {tmp_path}"))


def test_a_repository_that_cannot_be_made_is_told_before_training(hub, tmp_path):
    hub.fail = "create"
    with pytest.raises(HubError, match="'U/M': OSError: 401 Unauthorized. Log in with `hf auth login`"):
        create_hub_repository("U/M", tmp_path, None, None)


@pytest.mark.parametrize("error", ["transport", "down", "timeout"])
def test_a_hub_that_does_not_answer_is_told_from_one_that_refuses(error, monkeypatch, tmp_path):
    def failing(self, *arguments, **options):
        if error == "down":
            raised = RuntimeError("bad gateway")
            raised.response = types.SimpleNamespace(status_code=502)
            raise raised
        raise TimeoutError("slow")

    if error == "transport":  # the very error of the client, from a port where nobody listens
        api = functools.partial(huggingface_hub.HfApi, endpoint="http://127.0.0.1:9")
        monkeypatch.setattr(huggingface_hub, "HfApi", api)
    else:
        monkeypatch.setattr("huggingface_hub.HfApi.create_repo", failing)
    with pytest.raises(HubSilent, match="does not answer.*training continues"):
        create_hub_repository("U/M", tmp_path, None, None)


def test_a_command_is_shown_without_the_token():
    assert shown_command(["train", "--hub_token", "hf_a", "--hub-token=hf_b", "--x", "a b"]) == (
        "train --hub_token HIDDEN --hub-token=HIDDEN --x 'a b'"
    )
    assert shown_command(["--url=http://me:pw@h:1/x", "me@there"]) == "--url=http://HIDDEN@h:1/x me@there"
    assert shown_command(["train", "--run_name", "x\udcff"]) == "train --run_name 'x\\udcff'"  # a byte that is no UTF-8


def card(folder, **given):
    path = write_model_card(folder, method="GOLD distillation", **{"base_model": "org/base", **given})
    text = path.read_text()
    return yaml.safe_load(text.split("---")[1]), text


RESULTS = {
    "before training": {"eval_loss": 1.25, "eval_bits_per_byte": None},
    "after training": {"eval_loss": 0.5, "eval_bits_per_byte": 0.3},
    "teacher": {"eval_bits_per_byte": 0.1},
}


def test_the_model_card_names_what_the_model_was_made_of(tmp_path):
    head, text = card(
        tmp_path / "m",
        **dict(teacher="org/teacher", loss="gold: chain/all/hybrid", dataset="org/data", results=RESULTS),
        command=["python", "-m", "gold_jax.train", "--hub_token", "hf_secret"],
    )
    assert head["base_model"] == "org/base" and head["datasets"] == ["org/data"] and "gold_jax" in head["tags"]
    for part in (
        "# m",
        "`org/base`",
        "`org/teacher`",
        "`gold: chain/all/hybrid`",
        "| metric | before training | after training | teacher |",
        "| eval_loss | 1.2500 | 0.5000 |  |",
        "| eval_bits_per_byte |  | 0.3000 | 0.1000 |",
        "gold_jax.train",
    ):
        assert part in text
    assert "hf_secret" not in text


def test_the_model_card_has_columns_only_for_what_was_measured(tmp_path):
    assert "Measured" not in card(tmp_path / "a", results={"after training": {}, "teacher": {}})[1]
    text = card(tmp_path / "b", results={**RESULTS, "before training": {}})[1]
    assert "| metric | after training | teacher |" in text and "before training" not in text


def test_the_model_card_draws_the_losses_and_shows_ten_of_them(tmp_path):
    losses = [2.0, float("nan"), *[1.0] * 97, None, 1.0, 0.0]
    history = [{"step": n, "loss": loss} for n, loss in enumerate(losses, 1)] + [{"step": 102, "eval_loss": 3.0}]
    text = card(tmp_path, history=history)[1]
    # Two or three losses to a block: the first of 2 and 1, the last of 1, 1 and 0.
    assert f"From update 1 to 102, lowest 0.6667, highest 1.5: `█{38 * '▄'}▁`" in text
    table = text.split("| update | loss |\n| --- | --- |\n")[1].split("\n\n")[0].splitlines()
    steps = [1, 13, 24, 35, 46, 57, 68, 79, 90, 102]
    assert table == [f"| {n} | {losses[n - 1]:.4f} |" for n in steps]
    assert "## Loss" not in card(tmp_path / "none", history=history[-1:])[1]


def test_a_card_of_a_model_that_speaks_no_chat_asks_in_plain_text(tmp_path):
    text = card(tmp_path / "m", repo_id="me/model")[1]
    assert 'LLM("me/model").generate("What is JAX?"' in text and "patino2025" not in text


def test_folders_of_this_machine_stay_out_of_the_card_s_metadata(tmp_path):
    head, text = card(tmp_path, base_model=str(tmp_path), dataset="./data.jsonl")
    assert "base_model" not in head and "datasets" not in head


def test_a_card_is_renewed_but_a_foreign_readme_is_kept(tmp_path):
    card(tmp_path, base_model="org/first")
    assert card(tmp_path, base_model="org/second")[0]["base_model"] == "org/second"
    (tmp_path / "README.md").write_text("mine")
    write_model_card(tmp_path, method="GOLD distillation", base_model="org/third")
    assert (tmp_path / "README.md").read_text() == "mine"
