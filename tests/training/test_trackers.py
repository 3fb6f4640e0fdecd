import sys
import types

import pytest

from gold_jax.config import SFTConfig
from gold_jax.training.trackers import grouped, make_trackers


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
