import os
import pathlib
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest

from gold_jax.parallel import agreement, processes
from gold_jax.parallel.agreement import describe_difference
from gold_jax.parallel.processes import ClusterSpec, cluster_from_flags, tpu_hosts

from .run_several import begin, finish, free_address, told

ROOT = pathlib.Path(__file__).parents[2]
SLURM = {
    "SLURM_JOB_ID": "9",
    "SLURM_STEP_NODELIST": "n[1-4]",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "0",
}
OPEN_MPI = {"OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_RANK": "5"}


@pytest.mark.parametrize(
    "flags, environ, meant",
    [
        ((None, None, None), {}, None),
        (("a:1", 2, 1), {}, ClusterSpec("--num_processes", "a:1", 2, 1, "deactivate")),
        ((None, 1, None), {}, None),
        (("a:1", 1, 0), {}, None),
        ((None, None, None), {"JAX_NUM_PROCESSES": "1"}, None),
        (
            (None, None, None),
            {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"},
            ClusterSpec("--num_processes", "a:1", 2, 0, "deactivate"),
        ),
        ((None, 3, 1), {"JAX_COORDINATOR_ADDRESS": "a:1"}, ClusterSpec("--num_processes", "a:1", 3, 1, "deactivate")),
        (("b:2", 3, 1), {"JAX_COORDINATOR_ADDRESS": "a:1"}, ClusterSpec("--num_processes", "b:2", 3, 1, "deactivate")),
        ((None, None, None), SLURM, ClusterSpec("Slurm")),
        (("a:1", None, None), SLURM, ClusterSpec("--num_processes", "a:1", 4, 3)),
        ((None, None, None), SLURM | {"SLURM_STEP_NUM_TASKS": "1"}, None),
        ((None, None, None), SLURM | {"SLURM_NTASKS": "1"}, None),
        ((None, None, None), {"SLURM_JOB_ID": "9", "SLURM_NTASKS": "4"}, None),  # a batch script, outside of any step
        ((None, None, None), OPEN_MPI, ClusterSpec("Open MPI")),
        (("a:1", None, None), OPEN_MPI, ClusterSpec("--num_processes", "a:1", 8, 5)),
        ((None, None, None), {"OMPI_COMM_WORLD_SIZE": "1"}, None),
    ],
)
def test_flags_and_the_environment_say_whether_there_are_several_processes(flags, environ, meant):
    assert cluster_from_flags(*flags, environ) == meant


@pytest.mark.parametrize(
    "flags, environ, words",
    [
        (("a:1", None, None), {}, "--num_processes and --process_id are missing"),
        ((None, 2, 0), {}, "--coordinator_address is missing"),
        (("a:1", 2, None), {}, "--process_id is missing"),
        ((None, None, 1), {}, "--coordinator_address and --num_processes are missing"),
        ((None, None, None), {"JAX_COORDINATOR_ADDRESS": "a:1"}, "JAX_NUM_PROCESSES and JAX_PROCESS_ID"),
        (("a:1", 2, 2), {}, "--process_id is 2, and --num_processes 2: the processes' numbers are 0 to 1"),
        (("a:1", 2, -1), {}, "--process_id is -1"),
        (("a:1", 0, 0), {}, "--num_processes is 0"),
        (("a", 2, 1), {}, "--coordinator_address is a: it must be HOST:PORT"),
        (("a:b", 2, 1), {}, "HOST:PORT"),
        ((None, None, None), {"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES is 'two'"),
    ],
)
def test_what_is_missing_or_impossible_is_named(flags, environ, words):
    with pytest.raises(ValueError, match=words):
        cluster_from_flags(*flags, environ)


@pytest.mark.parametrize(
    "environ, hosts",
    [
        ({}, None),  # only the metadata server knows
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, 1),
        ({"TPU_WORKER_HOSTNAMES": "a,b,c,d"}, 4),
        ({"TPU_PROCESS_ADDRESSES": "a:8476,b:8476", "TPU_WORKER_HOSTNAMES": "a"}, 2),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "MEGASCALE_NUM_SLICES": "2"}, 4),
        ({"TPU_SKIP_MDS_QUERY": "1"}, 1),
        ({"TPU_PROCESS_ADDRESSES": "local", "TPU_SKIP_MDS_QUERY": "1"}, 1),
    ],
)
def test_a_tpu_host_knows_how_many_there_are(environ, hosts):
    assert tpu_hosts(environ) == hosts


def test_the_hosts_of_a_tpu_may_stand_in_a_file(tmp_path):
    (tmp_path / "addresses").write_text("a:1,b:1,c:1\n")
    assert tpu_hosts({"TPU_PROCESS_ADDRESSES_PATH": str(tmp_path / "addresses")}) == 3


def test_a_tpu_host_that_finds_no_others_goes_on_alone(monkeypatch):
    def not_found(*_, **__):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(processes, "cluster_from_flags", lambda *_: None)
    monkeypatch.setattr(processes, "_detect_tpu_pod", lambda _: ClusterSpec("the TPU's environment", surely=False))
    monkeypatch.setattr(processes.jax.distributed, "initialize", not_found)
    with pytest.warns(UserWarning, match="the only one: JAX found no others"):
        processes.start()
    monkeypatch.setattr(processes, "_detect_tpu_pod", lambda _: ClusterSpec("the TPU's environment"))
    with pytest.raises(ValueError, match="could not find out how they reach each other .* give --coordinator_address"):
        processes.start()


def test_importing_starts_nothing_and_touches_no_device():
    code = (
        "import threading, gold_jax.parallel.processes, gold_jax.parallel.watch; from jax._src import xla_bridge; "
        "assert threading.active_count() == 1 and not xla_bridge.backends_are_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, cwd=ROOT)


def test_a_single_process_exchanges_with_itself(monkeypatch):
    monkeypatch.setattr(agreement, "_gather_words", None)
    processes.start()
    values = np.array([[1, 2**60]])
    assert processes.count() == 1 and processes.index() == 0 and processes.is_first()
    assert processes.names() == (f"{socket.gethostname()} (process 0)",)
    assert agreement.all_gather(values).tolist() == [[[1, 2**60]]]
    assert agreement.all_reduce_sum(values).tolist() == agreement.all_reduce_max(values).tolist() == [[1, 2**60]]
    assert [x.tolist() for x in agreement.all_gather_ragged([np.arange(2, dtype=np.int32)])[0]] == [[0, 1]]
    agreement.assert_same_across_processes("--seed", 3)


def test_rows_that_are_not_int32_are_refused():
    with pytest.raises(ValueError, match=r"row 1 is int64\[2\]"):
        agreement.all_gather_ragged([np.zeros(1, np.int32), np.zeros(2, np.int64)])
    with pytest.raises(ValueError, match="object"):
        agreement.all_gather(np.array([None]))


def test_differences_say_which_processes_have_what():
    names = [f"h{i} (process {i})" for i in range(8)]
    assert describe_difference("--seed", [1] * 8, names) is None
    assert describe_difference("--seed", [1] * 3 + [2] + [1] * 4, names) == (
        "The processes differ in --seed: h0 (process 0) and 6 others have 1; h3 (process 3) has 2."
    )
    many = describe_difference("--seed", list(range(8)), names)
    assert "h3 (process 3) has 3; …" in many and "h4" not in many
    settings = [{"lr": 0.1, "batch": 4}, {"lr": 0.1, "batch": 8, "new": None}, {"lr": 0.2, "batch": 8}]
    assert describe_difference("the settings", settings, names) == (
        "The processes differ in the settings. lr: h0 (process 0) and 1 other have 0.1; h2 (process 2) has 0.2; "
        "batch: h1 (process 1) and 1 other have 8; h0 (process 0) has 4."
    )
    assert len(describe_difference("the text", ["x" * 999, "y"], names)) < 300


@pytest.fixture(scope="module")
def exchanged():
    """What two processes said of what they told each other."""
    address = free_address()
    started = [begin("exchange", address, 2, i) for i in range(2)]
    found = []
    for process in started:
        code, out, err = finish(process)
        assert code == 0, err[-3000:]
        found.append(told(out))
    return found


def of(one, name):
    return [value for key, value in one if key == name]


def test_processes_know_each_other_by_name(exchanged):
    host = socket.gethostname()
    for i, one in enumerate(exchanged):
        assert of(one, "names") == [[f"{host} (process 0)", f"{host} (process 1)"]]
        assert of(one, "first") == [i == 0]


def test_arrays_are_gathered_bit_for_bit(exchanged):
    for one in exchanged:
        assert of(one, "gather") == [[[2**40, -(2**62), 0], [2**40 + 1, -(2**62) - 1, 1]]]
        assert of(one, "total") == [[2**41 + 1, 1]] and of(one, "largest") == [[0, 2**53 + 1]]
        assert of(one, "float64") == [[of(other, "own")[0] for other in exchanged]]
        assert of(one, "scalar") == [2.0] and of(one, "many") == [5000]


def test_rows_of_any_length_reach_all_processes(exchanged):
    top = 2**31 - 2
    for one in exchanged:
        assert of(one, "ragged") == [[[], [[0], [top, top, top]]]] and of(one, "long") == [[1, 3001]]


def test_what_the_processes_disagree_on_is_said_in_all_of_them(exchanged):
    for one in exchanged:
        seed, settings = of(one, "differ")
        assert "differ in --seed: " in seed and "(process 1) has 1." in seed
        assert (
            "differ in the settings. batch: " in settings and "(process 0) has 4" in settings and "lr" not in settings
        )
        assert "float64[3]" in of(one, "shapes")[0]


@pytest.mark.slow
def test_processes_that_do_not_meet_say_where_they_waited():
    here, elsewhere = free_address(), free_address()
    alone = [begin("start", here, 2, 0, 2), begin("start", elsewhere, 2, 1, 2)]
    (code, _, first), (other, _, second) = map(finish, alone)
    assert code == other == 1
    assert f"ConnectionError: Process 0 of 2 waited 2 seconds at {here}, where process 0 answers, but not all" in first
    assert f"ConnectionError: Process 1 of 2 waited 2 seconds at {elsewhere}, and nothing answers there" in second


def test_a_port_that_is_taken_is_named():
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        code, _, err = finish(begin("start", address, 2, 0, 2))
    assert code == 1 and f"Process 0 cannot listen on the port of {address} (Address already in use)" in err


def test_starting_after_the_first_use_of_a_device_is_refused():
    assert processes.jax.devices()
    with pytest.raises(
        RuntimeError, match="JAX's devices were used before the processes of this run were brought together"
    ):
        processes.start(free_address(), 2, 1)


@pytest.mark.slow
def test_two_processes_of_the_same_number_are_told_so():
    address = free_address()
    started = [begin("start", address, 3, i, 5) for i in (0, 1, 1)]
    ended = [finish(process) for process in started]
    assert sorted(code for code, _, _ in ended) == [1, 1, 2]
    refused = next(err for code, _, err in ended if code == 2)
    assert f"Process 1 of 3 was not let in by process 0 at {address}" in refused.splitlines()[-1]


ABORTS = """
import os, sys, threading, time
from gold_jax.parallel.processes import on_abort
def told():
    print("told", flush=True)
    if sys.argv[1] == "end":
        os._exit(75)
with on_abort(told):
    threading.Thread(target=os.abort).start()
    time.sleep(20)
"""


@pytest.mark.parametrize("how, code", [("end", 75), ("return", -signal.SIGABRT)])
def test_an_abort_of_another_thread_is_heard(how, code):
    ended = subprocess.run(
        [sys.executable, "-c", ABORTS, how], cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=120
    )
    assert ended.returncode == code and ended.stdout == "told\n"
