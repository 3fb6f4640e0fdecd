import pathlib
import socket
import subprocess
import sys

import jax
import pytest
from jax._src.clusters import ClusterEnv

from gold_jax.distributed.initialize import ClusterSpec, detect_cluster, initialize

from .run_several import begin, finish, free_address

ROOT = pathlib.Path(__file__).parents[2]
SLURM = {
    "SLURM_JOB_ID": "9",
    "SLURM_STEP_NODELIST": "n[1-4]",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "0",
}
OPEN_MPI = {"OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_RANK": "5"}


@pytest.mark.parametrize(
    "flags, environ, spec",
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
        ((None, None, None), {"SLURM_JOB_ID": "9", "SLURM_NTASKS": "4"}, None),  # a batch script, outside of any step
        ((None, None, None), OPEN_MPI, ClusterSpec("Open MPI")),
        (("a:1", None, None), OPEN_MPI, ClusterSpec("--num_processes", "a:1", 8, 5)),
        ((None, None, None), {"OMPI_COMM_WORLD_SIZE": "1"}, None),
    ],
)
def test_flags_and_the_environment_say_whether_there_are_several_processes(flags, environ, spec):
    assert detect_cluster(*flags, environ) == spec


@pytest.mark.parametrize(
    "flags, environ, words",
    [
        (("a:1", None, None), {}, "--num_processes and --process_id are missing"),
        ((None, 2, 0), {}, "--coordinator_address is missing"),
        (("a:1", 2, None), {}, "--process_id is missing"),
        ((None, None, 1), {}, "--coordinator_address and --num_processes are missing"),
        ((None, None, None), {"JAX_COORDINATOR_ADDRESS": "a:1"}, "JAX_NUM_PROCESSES and JAX_PROCESS_ID"),
        (("a:1", 2, 2), {}, "--process_id is 2; with --num_processes 2 it must be from 0 to 1"),
        (("a:1", 2, -1), {}, "--process_id is -1"),
        (("a:1", 0, 0), {}, "--num_processes is 0"),
        (("a", 2, 1), {}, "--coordinator_address is a: it must be HOST:PORT"),
        (("a:b", 2, 1), {}, "HOST:PORT"),
        (("a:70000", 2, 1), {}, "HOST:PORT"),
        ((None, None, None), {"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES is 'two'"),
    ],
)
def test_what_is_missing_or_impossible_is_named(flags, environ, words):
    with pytest.raises(ValueError, match=words):
        detect_cluster(*flags, environ)


class Pod(ClusterEnv):
    """A TPU pod as JAX detects it."""

    name, hosts = "gcetpu", 4
    is_env_present = classmethod(lambda cls: True)

    @classmethod
    def get_process_count(cls):
        if cls.hosts is None:
            raise RuntimeError("the metadata server does not answer")
        return cls.hosts


ClusterEnv._cluster_types.remove(Pod)


@pytest.mark.parametrize("hosts, spec", [(4, ClusterSpec("the TPU's environment")), (1, None)])
def test_a_tpu_pod_is_what_jax_detects(monkeypatch, hosts, spec):
    monkeypatch.setattr(ClusterEnv, "_cluster_types", [Pod])
    monkeypatch.setattr(Pod, "hosts", hosts)
    assert detect_cluster(None, None, None, {"JAX_PLATFORMS": "tpu,cpu"}) == spec
    assert detect_cluster(None, None, None, {"JAX_PLATFORMS": "cpu"}) is None


def test_a_tpu_host_that_finds_no_others_goes_on_alone(monkeypatch):
    monkeypatch.setattr(ClusterEnv, "_cluster_types", [Pod])
    monkeypatch.setattr(Pod, "hosts", None)
    with pytest.warns(UserWarning, match="the only one: JAX found no others"):
        assert detect_cluster(None, None, None, {"JAX_PLATFORMS": "tpu"}) is None


def test_what_jax_cannot_detect_is_asked_for(monkeypatch):
    def not_found(*_, **__):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", not_found)
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    with pytest.raises(
        ValueError, match="Open MPI says .* could not find out how they reach each other .* give --coordinator_address"
    ):
        initialize()


def test_importing_starts_nothing_and_touches_no_device():
    code = (
        "import threading, gold_jax.distributed.watchdog, gold_jax.distributed.consensus; from jax._src import xla_bridge; "
        "assert threading.active_count() == 1 and not xla_bridge.backends_are_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, cwd=ROOT)


@pytest.mark.slow
def test_processes_that_do_not_meet_say_where_they_waited():
    here, elsewhere = free_address(), free_address()
    alone = [begin("start", here, 2, 0, 2), begin("start", elsewhere, 2, 1, 2)]
    (code, _, first), (other, _, second) = map(finish, alone)
    assert code == other == 1
    assert f"ConnectionError: Process 0 of 2 waited 2 seconds at {here}. Process 0 must run on that host" in first
    assert f"ConnectionError: Process 1 of 2 waited 2 seconds at {elsewhere}. Process 0 must run on that host" in second


def test_a_port_that_is_taken_is_named():
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        code, _, err = finish(begin("start", address, 2, 0, 2))
    assert code == 1 and f"Process 0 cannot listen on the port of {address} (Address already in use)" in err


def test_starting_after_the_first_use_of_a_device_is_refused():
    assert jax.devices()
    with pytest.raises(RuntimeError, match="must be called before any JAX calls"):
        initialize(free_address(), 2, 1)


@pytest.mark.slow
def test_two_processes_of_the_same_number_do_not_run():
    address = free_address()
    started = [begin("start", address, 3, i, 5) for i in (0, 1, 1)]
    ended = [finish(process) for process in started]
    assert all(code not in (0, None) for code, _, _ in ended)
    assert any("ALREADY_EXISTS" in err or "newer incarnation" in err for _, _, err in ended)


@pytest.mark.slow
def test_a_process_that_fails_before_the_others_wait_for_it_is_named():
    address = free_address()
    started = [begin("disagree", address, 2, i) for i in range(2)]
    (code, _, err), (failed, _, why) = map(finish, started)
    assert (
        code == 1 and "PeerFailed" in err and "(process 1) ended with an error: ValueError: row 3 has no text." in err
    )
    assert failed == 1 and "ValueError: row 3 has no text" in why
