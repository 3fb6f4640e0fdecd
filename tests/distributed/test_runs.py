"""Whole runs of several processes and on several meshes: the same numbers, and what happens when a process ends."""

import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tiny_models as tiny
from run_files import metrics
from safetensors.numpy import load_file

from distributed.run_several import finish, free_address

pytestmark = pytest.mark.slow
ROOT = pathlib.Path(__file__).parents[2]
QUICK = {
    "config": "embedded:quickstart",
    "mesh": "fsdp=4,tensor=2",
    "per_device_train_batch_size": 2,
    "max_steps": 6,
    "logging_steps": 1,
    "save_strategy": "steps",
    "save_steps": 2,
    "eval_on_start": False,
    "eval_strategy": "no",
    "log_completions": False,
    "warmup_steps": 0,
    "seed": 2,
    "rollout_batches": 3,  # the run of one process is compared with others within what is drawn together
}


def begin(
    output, number=1, index=0, address=None, command=("-m", "gold_jax.train"), devices=8, variables=(), **changes
) -> subprocess.Popen:
    """One process of a run of `number` with so many devices in all; `variables` are added to its environment."""
    flags = [f"--{name}={value}" for name, value in ({**QUICK, "output_dir": output} | changes).items()]
    several = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(number), "JAX_PROCESS_ID": str(index)}
    environment = os.environ | (several if number > 1 else {}) | {
        **tiny.cpu_devices(devices // number),
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        **dict(variables),
    }  # fmt: skip
    command = [sys.executable, *command, *flags]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def begin_two(output, **changes) -> list[subprocess.Popen]:
    address = free_address()
    return [begin(output, 2, index, address, **changes) for index in range(2)]


def ends(*runs, timeout=400) -> list[tuple[int, str]]:
    """Exit code and all that was said, of each."""
    found = [finish(run, timeout) for run in runs]
    return [(code, out + err) for code, out, err in found]


def assert_same(one, other, tolerance=1e-5):
    """The same losses and the same student, as far as sums in another order go."""
    assert [row["step"] for row in metrics(one)] == [row["step"] for row in metrics(other)] == list(range(1, 7))
    for a, b in zip(metrics(one), metrics(other)):
        names = {"loss", "grad_norm", "groups", "on_policy", "completion_tokens", "stopped"}
        assert names & set(a) == names & set(b)
        for name in names & set(a):
            assert a[name] == pytest.approx(b[name], rel=tolerance), (a["step"], name)
    students = [load_file(pathlib.Path(folder) / "model.safetensors") for folder in (one, other)]
    for name, values in students[0].items():
        np.testing.assert_allclose(values, students[1][name], rtol=1e-4, atol=2e-5, err_msg=name)


def wait_for(condition, run, timeout=300):
    until = time.monotonic() + timeout
    while not condition():
        assert run.poll() is None and time.monotonic() < until, run.communicate()
        time.sleep(0.05)


def reached(output, step):
    path = pathlib.Path(output) / "metrics.jsonl"
    return lambda: path.exists() and f'"step": {step},' in path.read_text()


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """A run of one process with eight devices that nothing stopped."""
    output = tmp_path_factory.mktemp("one")
    ((code, said),) = ends(begin(output))
    assert code == 0, said[-3000:]
    assert "mesh: fsdp=4,tensor=2 (8 devices)" in said
    assert {row["on_policy"] for row in metrics(output)} == {0, 1}  # both kinds of batches
    return output


@pytest.fixture(scope="module")
def two(one, tmp_path_factory):
    """The same run of two processes, and what each said; the second takes its time over the batch of one update."""
    output = tmp_path_factory.mktemp("two")
    # Where the student writes the batch, the first process waits at the device and cannot say so.
    late = next(row["step"] for row in metrics(one)[1:] if row["on_policy"] == 0) - 1
    command = [str(ROOT / "tests" / "distributed" / "late_train.py")]
    runs = begin_two(output, command=command, variables={"LATE_UPDATE": str(late)}, process_timeout=8)
    (code, said), (other, quiet) = ends(*runs)
    assert code == other == 0, said[-3000:] + quiet[-3000:]
    return output, said, quiet, late


def test_two_processes_with_four_devices_are_one_with_eight(one, two):
    output, said, quiet, _ = two
    assert "(8 devices of 2 processes)" in said and "updates done" not in quiet
    assert_same(one, output)


def test_a_process_that_keeps_the_others_waiting_is_named_and_the_run_goes_on(two):
    _, said, _, late = two
    assert re.search(
        r"\(process 1\) keeps the others waiting: it has been making the batch for \d+ seconds, "
        rf"at update {late}\b",
        said,
    )


@pytest.mark.parametrize("killed", [pytest.param(0, marks=pytest.mark.long), 1])
def test_when_a_process_is_killed_the_other_ends_and_says_which(tmp_path, killed):
    runs = begin_two(tmp_path, process_timeout=10, max_steps=2000, lmbda=0)
    wait_for(reached(tmp_path, 3), runs[0])
    runs[killed].kill()
    start = time.monotonic()
    code, said = ends(runs[1 - killed], timeout=90)[0]
    ends(runs[killed])
    # JAX aborts a process that waits at the device, and at once where process 0, its leader, is gone.
    assert code in (75, -signal.SIGABRT), said[-3000:]
    named = r"\(process 1\) .*Start the run again with --resume_from_checkpoint latest"
    assert re.search(named if killed else "leader", said), said[-3000:]
    assert time.monotonic() - start < 60


def test_a_preempted_run_saves_and_goes_on_with_another_number_of_processes(one, tmp_path):
    runs = begin_two(tmp_path)
    wait_for(reached(tmp_path, 2), runs[0])
    runs[1].send_signal(signal.SIGTERM)  # the platform's notice may come to any of them
    for code, said in ends(*runs):
        assert code == 75, said[-3000:]
    saved = sorted(path.name for path in tmp_path.glob("checkpoint-*"))
    assert saved and (tmp_path / saved[-1] / "run.json").exists()
    ((code, said),) = ends(begin(tmp_path, resume_from_checkpoint="latest"))
    assert code == 0 and "Resumed from" in said, said[-3000:]
    assert_same(one, tmp_path)


@pytest.mark.parametrize(
    "mesh, rows", [pytest.param("fsdp=8", 1, marks=pytest.mark.long), ("data=2,fsdp=2,tensor=2", 2)]
)
def test_a_run_goes_on_on_another_mesh(one, tmp_path, mesh, rows):
    changes = {"mesh": mesh, "per_device_train_batch_size": rows}
    checkpoint = one / "checkpoint-4"
    ((code, said),) = ends(begin(tmp_path, resume_from_checkpoint=checkpoint, **changes))
    assert code == 0 and f"Resumed from {checkpoint}: 4 of 6" in said, said[-3000:]
    for row in metrics(tmp_path):
        match = metrics(one)[row["step"] - 1]
        assert row["loss"] == pytest.approx(match["loss"], rel=1e-5)
    assert [row["step"] for row in metrics(tmp_path)] == [5, 6]


def test_what_one_process_cannot_load_ends_all_with_its_error(tmp_path):
    address = free_address()
    runs = [begin(tmp_path, 2, 0, address), begin(tmp_path, 2, 1, address, model_name_or_path=tmp_path / "nowhere")]
    (code, said), (other, error) = ends(*runs, timeout=120)
    assert (code, other) == (1, 2), said[-2000:] + error[-2000:]
    assert "nowhere" in error and re.search(r"\(process 1\) ended with an error.*nowhere", said), said[-2000:]


def test_processes_with_other_settings_end_with_what_differs(tmp_path):
    address = free_address()
    runs = [begin(tmp_path, 2, 0, address), begin(tmp_path, 2, 1, address, seed=3)]
    for code, said in ends(*runs, timeout=200):
        assert code in (1, 2) and "seed" in said and "(process 1) has 3" in said, said[-2000:]


@pytest.mark.assets
@pytest.mark.long
def test_a_real_pair_learns_on_two_devices_what_it_learns_on_one(assets, tmp_path):
    questions = ["Who wrote Hamlet?", "What is 17 + 25?", "Name two gases in the air.", "Give a synonym for happy."]
    rows = [tiny.conversation(question, "The answer is short and clear, and then it stops.") for question in questions]
    real = {
        "config": "embedded:quickstart",
        "model_name_or_path": assets / "smollm2-135m-gpt2tok",
        "teacher_model_name_or_path": assets / "smollm2-135m-instruct",
        "dataset_name": tiny.write_rows(tmp_path / "rows.jsonl", rows),
        "max_steps": 2,
        "lmbda": 0,
        "learning_rate": 5e-5,
        "save_strategy": "no",
        "uld_sort": "xla",  # equal probabilities have two subgradients, and numpy's sort takes the other one
    }
    for devices in (1, 2):
        changes = {"mesh": f"fsdp={devices}", "per_device_train_batch_size": 4 // devices}
        ((code, said),) = ends(begin(tmp_path / str(devices), devices=devices, **real | changes))
        assert code == 0, said[-3000:]
    for a, b in zip(metrics(tmp_path / "1"), metrics(tmp_path / "2"), strict=True):
        for name in ("loss", "grad_norm", "groups"):
            assert a[name] == pytest.approx(b[name], rel=1e-5), (a["step"], name)
