"""Runs of the train command that differ in what does not concern the update end in the same weights."""

import functools
import json
import os
import pathlib
import signal
import subprocess
import sys
import types

import numpy as np
import pytest
import tiny_models as tiny
from metamorphic.runs import apart, run
from run_files import metrics
from safetensors.numpy import load_file

from gold_jax.training.signals import Preempted
from gold_jax.training.step import Step

pytestmark = pytest.mark.usefixtures("own_cache")
TAUGHT = {"seq_kd": True}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs by their flags, each made once."""
    made = functools.cache(lambda flags: run(tmp_path_factory.mktemp("run") / "out", **json.loads(flags)))
    return lambda **flags: made(json.dumps(flags, sort_keys=True))


@pytest.fixture
def tracker(monkeypatch):
    """A TensorBoard that takes everything."""
    said = []

    class Writer:
        def __init__(self, *args, **kwargs):
            said.append("begun")

        def __getattr__(self, name):
            return lambda *args, **kwargs: said.append(name)

    monkeypatch.setitem(sys.modules, "tensorboardX", types.SimpleNamespace(SummaryWriter=Writer))
    return said


EVALUATES = {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True}
SAVES = {"save_strategy": "steps", "save_steps": 1}
# Several at once: every run is traced anew, and what changes a weight shows beside the others too.
UNCONCERNED = {
    "evaluating, with greedy completions and in another size, logging rarely and telling a tracker": EVALUATES
    | {"eval_steps": 2, "predict_with_generate": True, "per_device_eval_batch_size": 3}
    | {"logging_steps": 4, "report_to": "tensorboard", "run_name": "x"},
    "showing completions, saving at every step and tracing a step": SAVES
    | {"log_completions": True, "log_completions_steps": 1, "profile_steps": "2"},
}


@pytest.mark.parametrize("how", UNCONCERNED)
def test_weights_are_the_same_bit_for_bit_when_run(how, runs, tracker, tmp_path):
    plain = runs()
    assert apart(plain, run(tmp_path / "out", **UNCONCERNED[how])) == 0
    assert bool(tracker) == ("tracker" in how)


def test_weights_are_the_same_bit_for_bit_where_the_teacher_writes_when_evaluating_and_saving(runs, tmp_path):
    plain = runs(**TAUGHT)
    assert apart(plain, run(tmp_path / "out", **TAUGHT, **EVALUATES, **SAVES)) == 0


def test_a_teacher_that_may_write_changes_nothing_where_the_student_writes_everything(runs, tmp_path):
    assert apart(runs(lmbda=1.0), run(tmp_path / "out", lmbda=1.0, **TAUGHT)) == 0


def test_a_teacher_that_writes_makes_another_run(runs):
    """Else the comparisons of this file would compare nothing."""
    assert apart(runs(), runs(**TAUGHT)) > 1e-4


def test_a_second_run_in_the_same_folder_is_like_the_first(runs, tmp_path):
    saves = SAVES | {"log_completions": True}
    run(tmp_path / "out", **saves, seed=8)
    first = (tmp_path / "out" / "metrics.jsonl").read_text()
    assert apart(runs(), run(tmp_path / "out", **saves)) == 0
    assert (tmp_path / "out" / "metrics.1.jsonl").read_text() == first  # and erases nothing
    assert (tmp_path / "out" / "completions.1.jsonl").exists()


@pytest.mark.parametrize("at, flags", [(1, {}), (3, TAUGHT)], ids=["after one", "after three, the teacher writing"])
def test_a_run_that_stops_and_goes_on_is_like_one_that_does_not(at, flags, runs, tmp_path):
    out = tmp_path / "out"
    run(out, **flags, max_steps=at + 1, save_strategy="steps", save_steps=at)
    found = run(out, **flags, resume_from_checkpoint=True)
    assert apart(runs(**flags), found) == 0
    assert [row["step"] for row in metrics(out)] == [1, 2, 3, 4]


def test_a_run_that_is_preempted_and_goes_on_is_like_one_that_is_not(runs, tmp_path, monkeypatch):
    plain = runs()
    update, made = Step.__call__, []

    def preempted(self, *arguments):
        metrics = update(self, *arguments)
        made.append(1)
        if len(made) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return metrics

    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with monkeypatch.context() as patched:
            patched.setattr(Step, "__call__", preempted)
            with pytest.raises(Preempted):
                run(tmp_path / "out")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (tmp_path / "out" / "checkpoint-2").is_dir()
    assert apart(plain, run(tmp_path / "out", resume_from_checkpoint="latest")) == 0


# Other shapes sum the same numbers in another order: float32 keeps 24 bits, so sums of some hundred terms differ by about
# 1e-6 of the largest, and AdamW, which divides a gradient by its own size, turns that into a like part of a step of 1e-3
# wherever a gradient is well above the noise, and into a whole step where it is nothing but noise. Largest seen: below 1e-5.
ROUNDING = 1e-4
# Draws are compared with random numbers: the same draw comes out of another shape unless the two are within rounding.
DRAWN = 1e-5
OTHERWISE = {
    # The draws are made by row, so only the logits' rounding differs, and the update is then the same one.
    "drawing two at once": ({}, {"generation_batch_size": 2}, DRAWN),
    # For 0 < lmbda < 1 it is drawn for each micro-batch who writes it, so two of them are another run.
    "accumulating what the student writes": (
        {"lmbda": 1.0},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
        ROUNDING,
    ),
    "accumulating what the data set holds": (
        {"lmbda": 0.0},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
        ROUNDING,
    ),
    # All at once, since every one of them is another program to compile. Both sorts are exact, the sums over what is sorted
    # are XLA's either way; no row of the data is cut at 48 tokens, so a greater limit has nothing to let in.
    "in chunks, keeping activations, attending in blocks, sorting on the host, with room for more": (
        {},
        {
            "loss_chunk": 16,
            "gradient_checkpointing": False,
            "attn_implementation": "blockwise",
            "uld_sort": "host",
            "max_length": 96,
        },
        ROUNDING,
    ),
}


@pytest.mark.parametrize("how", OTHERWISE)
def test_weights_are_the_same_but_for_rounding_when_run(how, runs, tmp_path):
    base, changes, allowed = OTHERWISE[how]
    found = apart(runs(**base), run(tmp_path / "out", **base | changes))
    print(f"{how}: {found:.1e} of {allowed:g}")
    assert found <= allowed


HALVED = {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 3}
MESHES = {
    "data": {"mesh": "data=2", **HALVED},
    "tensor": {"mesh": "tensor=2"},
    "full": {"mesh": "fsdp=2", "layout": "full", "teacher_layout": "full", **HALVED},
}


@pytest.mark.long
def test_two_devices_make_the_run_of_one(runs, tmp_path):
    plain = runs()
    root = pathlib.Path(__file__).parents[2]
    environment = os.environ | tiny.cpu_devices(2) | {"PYTHONPATH": str(root)}
    cases = {name: {"generation_batch_size": 32} | changes for name, changes in MESHES.items()}
    script = pathlib.Path(__file__).with_name("runs.py")
    done = subprocess.run(
        [sys.executable, script, tmp_path, json.dumps(cases)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = {name: apart(plain, load_file(tmp_path / name / "model.safetensors")) for name in cases}
    print(found)
    assert max(found.values()) <= ROUNDING, found  # devices add up their parts in another order


def test_every_run_learns_something(runs):
    """Else the comparisons of this file would compare nothing."""
    start = load_file(pathlib.Path(tiny.__file__).parents[1] / "gold_jax/quickstart/assets/student/model.safetensors")
    assert apart({k: v.astype(np.float32) for k, v in start.items()}, runs()) > 1e-3
