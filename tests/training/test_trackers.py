import collections
import importlib.util
import json
import os
import struct
import subprocess
import sys
import types

import pytest
from run_files import metrics

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
    with pytest.raises(ValueError, match=r"pip install 'gold_jax\[trackio\]'.*--report_to none"):
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


def _tensorboard(folder) -> dict[int, dict]:
    """What event files hold, by step: records of a length, its checksum, as many bytes and their checksum."""
    from tensorboardX.proto.event_pb2 import Event

    found = collections.defaultdict(dict)
    (path,) = (folder / "out/runs/R").iterdir()
    data = path.read_bytes()
    while data:
        (size,) = struct.unpack("<Q", data[:8])
        event, data = Event.FromString(data[12 : 12 + size]), data[16 + size :]
        found[event.step] |= {value.tag: value.simple_value for value in event.summary.value}
    return found


def _wandb(folder) -> dict[int, dict]:
    """What an offline run holds, by step: a log as LevelDB's, of records in blocks of 32 KiB, behind seven bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    (path,), found, at, parts = (
        (folder / "wandb/wandb").glob("offline-run-*/*.wandb"),
        collections.defaultdict(dict),
        7,
        b"",
    )
    data = path.read_bytes()
    while at < len(data):
        if 2**15 - at % 2**15 < 7:  # no room for a head
            at += 2**15 - at % 2**15
        size, kind = struct.unpack("<4xHB", data[at : at + 7])
        parts, at = parts + data[at + 7 : at + 7 + size], at + 7 + size
        if kind not in (1, 4):  # more of this record follows
            continue
        record, parts = Record.FromString(parts), b""
        if record.WhichOneof("record_type") == "run":
            assert (record.run.project, record.run.display_name) == ("P", "R")
        if record.WhichOneof("record_type") == "history":
            values = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
            found[values["_step"]] |= values
    return found


def _trackio(folder) -> dict[int, dict]:
    """What its database holds, by step; it reads in its own process where the database lies."""
    code = "import json, trackio.sqlite_storage as s; print(json.dumps(s.SQLiteStorage.get_logs('P', 'R')))"
    environment = os.environ | {"TRACKIO_DIR": str(folder / "trackio")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True, timeout=120)
    found = collections.defaultdict(dict)
    for row in json.loads(done.stdout.splitlines()[-1]):
        found[row["step"]] |= row
    return found


_READERS = {"tensorboard": ("tensorboardX", _tensorboard), "wandb": ("wandb", _wandb), "trackio": ("trackio", _trackio)}


@pytest.fixture(scope="module")
def tracked(world, tmp_path_factory):
    """The folder of one run that reported to all trackers that are installed, without a network."""
    folder = tmp_path_factory.mktemp("tracked")
    names = [name for name, (module, _) in _READERS.items() if importlib.util.find_spec(module)]
    line = (
        f"--model_name_or_path {world}/student --teacher_model_name_or_path {world}/teacher --dataset_name {world}/data"
    )
    line += " --max_steps 2 --logging_steps 1 --lmbda 0 --per_device_train_batch_size 2 --save_strategy no --project P"
    line += f" --eval_dataset_name {world}/data --output_dir {folder}/out --run_name R"
    # What they ask by themselves has no one to answer: neither a Space, nor a key, nor an account.
    places = {"WANDB_MODE": "offline", "WANDB_DIR": str(folder / "wandb"), "TRACKIO_DIR": str(folder / "trackio")}
    (folder / "wandb").mkdir()
    command = [sys.executable, "-m", "gold_jax.train", *line.split(), "--report_to", ",".join(names) or "none"]
    subprocess.run(command, env=os.environ | places | {"HF_HUB_OFFLINE": "1"}, check=True, timeout=300)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", _READERS)
def test_a_tracker_holds_what_metrics_jsonl_holds(tracked, name):
    module, read = _READERS[name]
    pytest.importorskip(module)  # pip install 'gold_jax[test-trackers]'
    found, rows = read(tracked), metrics(tracked / "out")
    assert [row["step"] for row in rows] == [1, 2, 2] and "eval_loss" in rows[2]
    for row in rows:
        wanted = grouped({k: v for k, v in row.items() if k not in ("step", "time")})
        assert {k: found[row["step"]][k] for k in wanted} == pytest.approx(wanted, rel=1e-6)
