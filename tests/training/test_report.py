import functools
import sys
import types

import huggingface_hub
import pytest
import yaml

from gold_jax.config import SFTConfig
from gold_jax.training.report import (
    HubError,
    HubSilent,
    create_hub_repository,
    grouped,
    make_trackers,
    push_to_hub,
    shown_command,
    write_model_card,
)


class Calls:
    """An object whose every method records its call; `fail` names one that raises."""

    def __init__(self, log, fail=None):
        self._log, self._fail = log, fail

    def __getattr__(self, name):
        def call(*args, **kwargs):
            self._log.append((name, args, kwargs))
            if name == self._fail:
                raise OSError("no network")
            return self

        return call


def install(monkeypatch, name, fail=None):
    log = []
    calls, module = Calls(log, fail), types.ModuleType(name)
    for function in ("init", "log", "finish", "SummaryWriter"):
        setattr(module, function, getattr(calls, function))
    module.__spec__ = types.SimpleNamespace(name=name)
    monkeypatch.setitem(sys.modules, name, module)
    return log


def remove(monkeypatch, *names):
    for name in names:
        monkeypatch.setitem(sys.modules, name, None)


def test_trackio_gets_the_project_the_settings_and_grouped_metrics(monkeypatch):
    log = install(monkeypatch, "trackio")
    config = SFTConfig(project="P", run_name="R", trackio_space_id="U/S", hub_token="hf_secret")
    (tracker,) = make_trackers(["trackio"], config)
    tracker.log({"loss": 1.0, "eval_loss": 2.0, "none": None}, 3)
    tracker.close()
    (init, _, given), logged, closed = log
    assert init == "init"
    assert {name: given[name] for name in ("project", "name", "space_id")} == {
        "project": "P",
        "name": "R",
        "space_id": "U/S",
    }
    assert given["config"]["learning_rate"] == 2e-5 and "hf_secret" not in str(given)
    assert "private" not in given
    assert logged == ("log", ({"train/loss": 1.0, "eval/loss": 2.0},), {"step": 3})
    assert closed[0] == "finish"


def test_wandb_gets_the_project_unless_the_environment_names_one(monkeypatch):
    log = install(monkeypatch, "wandb")
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    (tracker,) = make_trackers(["wandb"], SFTConfig(project="P"))
    tracker.log({"loss": 1.0}, 3)
    assert log[0][2]["project"] == "P"
    assert log[1] == ("log", ({"train/loss": 1.0},), {"step": 3})
    monkeypatch.setenv("WANDB_PROJECT", "Q")
    make_trackers(["wandb"], SFTConfig(project="P"))
    assert log[2][2]["project"] == "Q"


def test_tensorboard_writes_numbers_below_the_output_folder(monkeypatch, tmp_path):
    log = install(monkeypatch, "tensorboardX")
    (tracker,) = make_trackers(["tensorboard"], SFTConfig(output_dir=str(tmp_path), run_name="R"))
    tracker.log({"loss": 1.0, "text": "x"}, 3)
    tracker.close()
    assert log[0] == ("SummaryWriter", (), {"logdir": str(tmp_path / "runs" / "R")})
    assert [call[:2] for call in log[1:]] == [("add_scalar", ("train/loss", 1.0, 3)), ("flush", ()), ("close", ())]


def test_a_tracker_that_is_not_installed_is_an_error_that_says_how_to_install_it(monkeypatch):
    remove(monkeypatch, "trackio")
    with pytest.raises(ValueError, match=r'pip install "gold_jax\[trackio\]".*--report_to none'):
        make_trackers(["trackio"], SFTConfig())


def test_a_tracker_that_does_not_start_stops_the_run_before_it_begins(monkeypatch):
    install(monkeypatch, "wandb", fail="init")
    with pytest.raises(ValueError, match="--report_to wandb could not start: OSError: no network"):
        make_trackers(["wandb"], SFTConfig())


def test_all_means_those_that_are_installed_and_none_means_none(monkeypatch, tmp_path):
    install(monkeypatch, "trackio")
    remove(monkeypatch, "wandb", "tensorboardX")
    found = make_trackers(["all"], SFTConfig(output_dir=str(tmp_path)))
    assert [type(tracker).__name__ for tracker in found] == ["Trackio"]
    assert make_trackers([], SFTConfig()) == []


def test_metrics_are_named_as_transformers_names_them():
    assert grouped({"loss": 1, "eval_loss": 2}) == {"train/loss": 1, "eval/loss": 2}


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


def test_a_push_makes_the_repository_and_uploads_the_folder_without_earlier_saves(hub, tmp_path):
    assert push_to_hub(tmp_path, "U/M", True, "hf_t", "message") == "https://hub/commit"
    token, create, (_, upload) = hub.asked
    assert token == ("token", "hf_t")
    assert create == ("create", "U/M", {"private": True, "exist_ok": True})
    assert (upload["folder_path"], upload["repo_id"], upload["commit_message"]) == (str(tmp_path), "U/M", "message")
    kept = huggingface_hub.utils.filter_repo_objects(
        ["model.safetensors", "checkpoint-5/model.safetensors", "runs/run/events", ".saving/x", "metrics.jsonl"],
        ignore_patterns=upload["ignore_patterns"],
    )
    assert list(kept) == ["model.safetensors", "metrics.jsonl"]


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
    with pytest.raises(HubSilent, match="does not answer.*training goes on"):
        create_hub_repository("U/M", tmp_path, None, None)
