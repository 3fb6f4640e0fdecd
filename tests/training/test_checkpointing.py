import json
import logging
import os
import pathlib
import shutil
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models as tiny

from gold_jax.training.checkpointing import (
    METADATA,
    BadCheckpoint,
    Checkpoints,
    check_arrays,
    checkpoints_in,
    checksums,
    named_arrays,
    order_in_run,
    read_metadata,
    restore,
    run_of,
)


def state(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "params": {"a": jnp.asarray(rng.normal(size=(6, 4)), jnp.float32), "b": jnp.zeros((3,), jnp.bfloat16)},
        "optimizer": (jnp.int32(3), [jnp.asarray(rng.normal(size=8), jnp.float32)]),
    }


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def same(one, other):
    return all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))


@pytest.fixture
def checkpoints(tmp_path):
    said = []
    made = Checkpoints(tmp_path, limit=2, say=said.append)
    made.said = said
    yield made
    made.close()


def test_what_is_saved_comes_back_to_the_last_bit_with_its_metadata(checkpoints, tmp_path):
    checkpoints.save(5, state(), {"means": {"loss": [0.1, "float32", 1.0]}})
    assert checkpoints.finish() and checkpoints.last.name == "checkpoint-5"
    metadata = read_metadata(checkpoints.last)
    assert metadata["step"] == 5 and metadata["means"] == {"loss": [0.1, "float32", 1.0]}
    found = restore(checkpoints.last, metadata, abstract(state()))
    assert same(found, state()) and jax.tree.structure(found) == jax.tree.structure(state())


def test_a_folder_named_from_where_the_run_stands_is_written_and_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = Checkpoints("runs/one", say=pytest.fail)
    made.save(2, state(), {})
    made.close()
    assert str(made.last) == "runs/one/checkpoint-2" and (tmp_path / "runs/one/checkpoint-2/run.json").exists()
    found = restore("runs/one/checkpoint-2", read_metadata("runs/one/checkpoint-2"), abstract(state()))
    assert same(found, state())


def test_what_is_saved_may_be_donated_at_once(checkpoints):
    consume = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0)
    tree = state()
    checkpoints.save(1, tree, {})
    tree = consume(tree)
    checkpoints.finish()
    assert same(restore(checkpoints.last, read_metadata(checkpoints.last), abstract(tree)), state())


def test_saving_goes_on_in_the_background_and_looks_like_no_checkpoint_until_it_is_whole(checkpoints, tmp_path):
    hold = threading.Event()
    checkpoints.save(1, state(), {}, lambda folder: hold.wait(60))
    checkpoints.poll()
    assert not (tmp_path / "checkpoint-1").exists() and checkpoints_in(tmp_path) == []
    hold.set()
    assert checkpoints.finish() and (tmp_path / "checkpoint-1").is_dir()


def test_the_oldest_are_removed_when_a_newer_one_is_whole(checkpoints, tmp_path):
    for step in (1, 2, 3):
        checkpoints.save(step, state(), {})
    assert checkpoints.finish()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-3"]


def saved_in_turn(tmp_path, *steps):
    """Folders of an earlier run's checkpoints, the first saved first."""
    for age, step in enumerate(reversed(steps)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        os.utime(folder, (1e9 - age, 1e9 - age))


def test_the_oldest_are_removed_and_nothing_else(tmp_path):
    saved_in_turn(tmp_path, 2, 10, 100)
    (tmp_path / "checkpoint-best").mkdir()
    for limit, left in (None, ["10", "100", "101", "2", "best"]), (2, ["101", "102", "best"]):
        made = Checkpoints(tmp_path, limit=limit, say=pytest.fail)
        made.save(101 if limit is None else 102, state(), {})
        made.close()
        assert sorted(path.name for path in tmp_path.iterdir()) == [f"checkpoint-{name}" for name in left]


def test_an_earlier_runs_checkpoint_with_a_higher_step_does_not_push_out_this_runs(tmp_path):
    saved_in_turn(tmp_path, 500, 400)
    for step, left in (100, {100, 400}), (200, {100, 200}), (300, {200, 300}):
        made = Checkpoints(tmp_path, limit=2, say=pytest.fail)  # the run is resumed each time
        made.save(step, state(), {})
        made.close()
        assert {path.name for path in tmp_path.iterdir()} == {f"checkpoint-{name}" for name in left}
        assert checkpoints_in(tmp_path)[0].name == f"checkpoint-{step}"


def test_what_was_just_saved_stays_whatever_the_clock_says(tmp_path):
    saved_in_turn(tmp_path, 50)
    made = Checkpoints(tmp_path, limit=1, say=pytest.fail)
    for step in (1, 2):  # as on a host whose clock is behind that of the others
        for path in tmp_path.iterdir():
            os.utime(path, (4e9, 4e9))
        made.save(step, state(), {})
        assert made.finish() and {path.name for path in tmp_path.iterdir()} == {f"checkpoint-{step}"}
    made.close()


def test_a_checkpoint_of_the_same_step_is_replaced(checkpoints):
    for seed in (0, 1):
        checkpoints.save(1, state(seed), {"seed": seed})
    assert checkpoints.finish() and read_metadata(checkpoints.last)["seed"] == 1
    assert same(restore(checkpoints.last, read_metadata(checkpoints.last), abstract(state())), state(1))


@pytest.mark.parametrize("end", ["fails", "cannot begin", "is abandoned", "is killed"])
def test_a_checkpoint_stays_until_another_of_its_step_is_whole(end, tmp_path, monkeypatch):
    def full(folder):
        if end == "fails":
            raise OSError(28, "No space left on device")
        begun.set()
        resume.wait(60)

    said, begun, resume = [], threading.Event(), threading.Event()
    run = Checkpoints(tmp_path, say=said.append)
    run.save(1, state(0), {"seed": 0})
    run.finish()
    if end == "cannot begin":
        monkeypatch.setattr(run._manager, "save", lambda *arguments, **options: full_disk())
    run.save(1, state(1), {"seed": 1}, full)
    if end == "is abandoned":
        begun.wait(60)
        run.abandon()
    if end in ("fails", "cannot begin"):
        assert not run.finish() and "could not be written" in said[0] and "checkpoint-1." in said[0]
        assert run.last.name == "checkpoint-1"
    else:
        begun.wait(60)
        if end == "is killed":  # as another process finds it
            assert checkpoints_in(tmp_path) == []
            shutil.copytree(tmp_path, tmp_path.with_name("copy"))
        resume.set()
    run.close()
    for thread in threading.enumerate():
        if thread.name in ("async_save", "save_finalize"):
            threading.Thread.join(thread)
    folder = tmp_path.with_name("copy") if end == "is killed" else tmp_path
    after = Checkpoints(folder)
    after.remove_unfinished()
    after.close()
    (kept,) = checkpoints_in(folder)
    assert read_metadata(kept)["seed"] == 0
    assert same(restore(kept, read_metadata(kept), abstract(state())), state(0))
    assert [path.name for path in folder.iterdir()] == ["checkpoint-1"]


def full_disk():
    raise OSError(28, "No space left on device")


def test_where_no_checkpoint_could_be_written_none_is_named(checkpoints, monkeypatch):
    monkeypatch.setattr(checkpoints._manager, "save", lambda *arguments, **options: full_disk())
    checkpoints.save(3, state(), {})
    assert not checkpoints.finish() and checkpoints.last is None
    assert checkpoints.said == [
        f"checkpoint-3 could not be written to {checkpoints.folder} (no space left on the disk); there is no whole one yet."
    ]


def test_old_checkpoints_that_cannot_be_removed_are_told_and_the_new_one_is_there(checkpoints, monkeypatch):
    for step in (1, 2):
        checkpoints.save(step, state(), {})
    checkpoints.finish()

    def refused(*arguments):
        raise OSError("read-only")

    monkeypatch.setattr(checkpoints._manager._checkpoint_deleter, "delete_steps", refused)
    checkpoints.save(3, state(), {})
    assert not checkpoints.finish() and checkpoints.last.name == "checkpoint-3"
    (line,) = checkpoints.said
    assert line.startswith("old checkpoints could not be removed from") and "read-only" in line
    monkeypatch.undo()
    checkpoints.save(4, state(), {})
    assert checkpoints.finish()
    assert [path.name for path in checkpoints_in(checkpoints.folder)] == ["checkpoint-4", "checkpoint-3"]


def test_a_save_that_fails_is_told_and_leaves_the_one_before_and_nothing_else(checkpoints, tmp_path):
    def full(folder):
        raise OSError(28, "No space left on device")

    checkpoints.save(1, state(), {})
    checkpoints.save(2, state(), {}, full)
    assert not checkpoints.finish()
    (line,) = checkpoints.said
    assert (
        "checkpoint-2 could not be written" in line and "no space left on the disk" in line and "checkpoint-1." in line
    )
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    checkpoints.save(3, state(), {})
    assert checkpoints.finish() and checkpoints.last.name == "checkpoint-3"


def test_a_failure_is_seen_without_waiting(checkpoints):
    failed = threading.Event()

    def full(folder):
        failed.set()
        raise OSError(28, "No space left on device")

    checkpoints.save(1, state(), {}, full)
    failed.wait(60)
    for thread in threading.enumerate():
        if thread.name in ("async_save", "save_finalize"):
            threading.Thread.join(thread)  # without raising what it failed with
    checkpoints.poll()
    assert len(checkpoints.said) == 1 and "there is no whole one yet" in checkpoints.said[0]


@pytest.mark.parametrize("change", ["one bit", "two elements swapped", "an element of another array"])
def test_any_change_of_an_array_changes_its_checksum(change):
    arrays = named_arrays(state())
    before = np.asarray(checksums(arrays))
    a = np.array(arrays["params.a"])
    if change == "one bit":
        a.view(np.uint32)[2, 3] ^= 1
    elif change == "two elements swapped":
        a[0, 0], a[5, 3] = a[5, 3], a[0, 0]
    else:
        a[0, 0] = 0
    after = np.asarray(checksums({**arrays, "params.a": jnp.asarray(a)}))
    assert (before != after).sum() == 1


def test_an_array_that_reads_back_as_another_is_told_by_name(checkpoints):
    checkpoints.save(1, state(), {})
    checkpoints.finish()
    metadata = read_metadata(checkpoints.last)
    metadata["arrays"]["params.a"][2] ^= 1
    with pytest.raises(BadCheckpoint, match="params.a in it differ from what was saved"):
        restore(checkpoints.last, metadata, abstract(state()))


def test_metadata_of_a_later_format_are_not_guessed_at(checkpoints):
    checkpoints.save(1, state(), {})
    checkpoints.finish()
    path = checkpoints.last / METADATA
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 99}))
    with pytest.raises(BadCheckpoint, match="format 99"):
        read_metadata(checkpoints.last)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("step", 4), ("step", 5.0), ("step", "5"), ("step", True), ("step", 10**400), ("step", None), ("step", [5]),
        ("format", []), ("arrays", []), ("arrays", {"params.a": 1}), ("arrays", {"params.a": [[6, 4], "nonsense", 1]}),
        ("arrays", {"params.a": [["6", 4], "float32", 1]}), ("arrays", {"params.a": [[6, 4], "float32", 1.5]}),
        ("run", []), ("run_id", 3), ("resumed", "x"), ("resumed", -1), ("skips", {"total": 1}), ("unmeasured", 1),
        ("skips", {"total": 1, "in_a_row": "0"}), ("means", {"loss": [1, 2]}), ("means", {"loss": ["1", "float32", 1]}),
        ("means", {"loss": [1, "nonsense", 1]}), ("best", {}), ("unwritten", [{"step": 1}]),
        ("shapes", [1]), ("shapes", [["64"] * 4]), ("shapes", [[64.5, 64]]), ("shapes", [[64]]), ("shapes", [[0, 64]]),
    ],
)  # fmt: skip
def test_metadata_of_other_kinds_are_damaged(name, value, checkpoints):
    checkpoints.save(5, state(), {"skips": {"total": 1, "in_a_row": 0}, "means": {"loss": [1.5, "float32", 1.0]}})
    checkpoints.finish()
    path = checkpoints.last / METADATA
    good = json.loads(path.read_text())
    path.write_text(json.dumps(good | {name: value}))
    with pytest.raises(BadCheckpoint, match="damaged|has the format"):
        read_metadata(checkpoints.last)
    assert order_in_run(checkpoints.last)[1] == 5 and run_of(checkpoints.last) in ("", None)


@pytest.mark.parametrize("text", ["", "[]", '{"step": 1e400}', '{"a": ' * 100_000, b"\xff", None])
def test_metadata_that_are_no_object_are_damaged(text, checkpoints):
    checkpoints.save(5, state(), {})
    checkpoints.finish()
    path = checkpoints.last / METADATA
    path.unlink()
    if text is None:
        os.mkfifo(path)
    else:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(BadCheckpoint, match="run.json is damaged"):
        read_metadata(checkpoints.last)
    assert order_in_run(checkpoints.last) == (0, 5) and run_of(checkpoints.last) is None


@pytest.mark.parametrize(
    "record", ["{", "", "{}", '{"commit_timestamp_nsecs": 1e400}', '{"commit_timestamp_nsecs": "x"}', "[]"]
)
def test_a_checkpoint_whose_date_cannot_be_read_counts_as_the_oldest(record, checkpoints, tmp_path):
    for step in (1, 2):
        checkpoints.save(step, state(), {})
        checkpoints.finish()
    written = tmp_path / "checkpoint-2" / "_CHECKPOINT_METADATA"
    written.write_text(record)
    later = time.time() + 3600
    os.utime(tmp_path / "checkpoint-2", (later, later))  # copied, or looked into: not when it was saved
    (tmp_path / f"checkpoint-{'9' * 5000}"[:200]).mkdir()
    assert [path.name for path in checkpoints_in(tmp_path)] == ["checkpoint-1", "checkpoint-2"]
    other = Checkpoints(tmp_path, limit=2, say=checkpoints.said.append)
    other.save(3, state(), {})
    assert other.finish()
    other.close()
    assert (tmp_path / "checkpoint-3").is_dir() and (tmp_path / "checkpoint-1").is_dir()


def test_names_of_a_tree_are_the_positions_of_its_leaves_in_order():
    assert list(named_arrays(state())) == ["optimizer.0", "optimizer.1.0", "params.a", "params.b"]


def test_counters_that_versions_differ_in_open_and_another_optimizer_does_not(checkpoints):
    checkpoints.save(1, {**state(), "counters": {"old": jnp.int32(7), "kept": jnp.int32(5)}}, {})
    checkpoints.finish()
    metadata = read_metadata(checkpoints.last)
    now = {**state(1), "counters": {"new": jnp.int32(3), "kept": jnp.int32(0)}}
    check_arrays("here", metadata, now)
    found = restore(checkpoints.last, metadata, abstract(now))
    assert same(found, {**state(), "counters": {"new": jnp.int32(0), "kept": jnp.int32(5)}})
    for other in (
        {**now, "optimizer": (now["optimizer"], jnp.int32(0))},
        {**now, "counters": {"kept": jnp.float32(0)}},
    ):
        with pytest.raises(ValueError, match="here is of another student or optimizer: .*(missing|here float32)"):
            check_arrays("here", metadata, other)


RESHARD = """
import sys, jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from gold_jax.training.checkpointing import Checkpoints, read_metadata, restore
devices = np.array(jax.devices())
eight = NamedSharding(jax.sharding.Mesh(devices.reshape(8), ("fsdp",)), P("fsdp"))
four = NamedSharding(jax.sharding.Mesh(devices.reshape(2, 4), ("data", "fsdp")), P(None, "fsdp"))
one = jax.sharding.SingleDeviceSharding(devices[3])
value = np.arange(16 * 8, dtype=np.float32).reshape(16, 8) / 7
checkpoints = Checkpoints(sys.argv[1])
checkpoints.save(1, {"x": jax.device_put(value, eight)}, {})
assert checkpoints.finish()
for target in (eight, four, one):
    metadata = read_metadata(checkpoints.last)
    found = restore(checkpoints.last, metadata, {"x": jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=target)})["x"]
    assert found.sharding == target and np.array_equal(found, value), target
"""


def test_a_checkpoint_is_read_onto_another_mesh(tmp_path):
    flags = tiny.cpu_devices(8)
    root = str(pathlib.Path(__file__).parents[2])
    environment = os.environ | flags | {"PYTHONPATH": root}
    command = [sys.executable, "-c", RESHARD, str(tmp_path)]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr[-2000:]


def test_what_orbaxs_tasks_report_of_an_error_is_not_logged_beside_the_one_line(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    task = "future: <Task finished coro=<write() defined at orbax/checkpoint/serialization.py:1>>"
    records = [logging.LogRecord("asyncio", logging.ERROR, "events.py", 1, text, (), None) for text in (task, "other")]
    assert [bool(logging.getLogger("asyncio").filter(record)) for record in records] == [False, True]
    checkpoints.close()
    assert logging.getLogger("asyncio").filter(records[0])
