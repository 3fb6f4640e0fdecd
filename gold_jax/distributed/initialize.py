"""Joins the processes of one run with `jax.distributed`, where there are several; errors name the flag to change."""

import concurrent.futures
import functools
import os
import socket
import threading
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

try:
    from jax._src.distributed import global_state as _state  # what JAX knows of the processes, a private part of it
except ImportError:
    _state = None

FLAGS = ("--coordinator_address", "--num_processes", "--process_id")
_ALL_FLAGS = "--coordinator_address, --num_processes and --process_id"
VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
# What launchers set: how many processes they started, and which of them this one is.
LAUNCHERS = {
    "Open MPI": ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    "Slurm": ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
}


class ClusterSpec(NamedTuple):
    """Arguments of `jax.distributed.initialize` for a run of several processes; None where JAX detects it."""

    source: str  # what says that there are several processes, for error messages
    coordinator_address: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    detection: str | None = None


def initialize(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    timeout: float = 300,
    heartbeat_timeout: float = 100,
) -> None:
    """Joins the processes of a run; does nothing where there is one, or where `jax.distributed` was initialized before.

    Must come before JAX's first use of a device. `coordinator_address` is HOST:PORT of process 0, the same in all
    processes; where it alone is given, Slurm and Open MPI tell the rest. The others are waited for `timeout` seconds;
    after `heartbeat_timeout` seconds JAX takes a silent process for lost and ends the others.

    Raises:
        ValueError: one of the three is missing or makes no sense; the text names the flag.
        ConnectionError: the others were not found in time.
        RuntimeError: JAX's devices were used before.
    """
    if jax.distributed.is_initialized():
        return
    spec = detect_cluster(coordinator_address, num_processes, process_id, os.environ)
    if spec is None:
        return
    source, address, count, index, detection = spec
    if index == 0 and address and not os.environ.get("JAX_COORDINATOR_BIND_ADDRESS"):
        _check_port(address)
    options = dict(cluster_detection_method=detection, heartbeat_timeout_seconds=max(1, round(heartbeat_timeout)))
    options["initialization_timeout"] = int(timeout) + 60  # at it JAX aborts the process: the wait below ends first
    joined = concurrent.futures.Future()

    def join() -> None:
        try:
            joined.set_result(jax.distributed.initialize(address, count, index, **options))
        except Exception as error:
            joined.set_exception(error)

    threading.Thread(target=join, daemon=True).start()
    try:
        joined.result(timeout)
    except (TimeoutError, jax.errors.JaxRuntimeError) as error:
        this = f"Process {index} of {count}" if count else f"A process of {source}"
        at = address or getattr(_state, "coordinator_address", None) or "the address of process 0"
        failed = f"waited {timeout:g} seconds at {at}"
        if joined.done():
            failed = f"could not join the others at {at} ({_one_line(error)})"
        must = "Process 0 must run on that host, with that port open to the others; all processes need the same"
        each = "--coordinator_address and --num_processes, and each a --process_id of its own."
        raise ConnectionError(f"{this} {failed}. {must} {each}") from (error if joined.done() else None)
    except ValueError as error:
        if address is not None:
            raise
        lost = f"but JAX could not find out how they reach each other ({_one_line(error)})"
        raise ValueError(f"{source} says that this run has several processes, {lost}: give {_ALL_FLAGS}") from error
    process_names()  # all processes tell each other of their devices and hosts now, before one of them can fail


def detect_cluster(
    coordinator_address: str | None, num_processes: int | None, process_id: int | None, environ: Mapping[str, str]
) -> ClusterSpec | None:
    """The processes that flags or the environment describe; None where there is one. ValueError as `initialize`."""
    address = coordinator_address or environ.get(VARIABLES[0]) or None
    number = _read_int(environ, VARIABLES[1]) if num_processes is None else num_processes
    index = _read_int(environ, VARIABLES[2]) if process_id is None else process_id
    launcher = next((name for name, (size, _) in LAUNCHERS.items() if (_read_int(environ, size) or 1) > 1), None)
    if address is None and number is None and index is None:
        source = launcher or _tpu_pod(environ)
        return ClusterSpec(source) if source else None
    if launcher and address is not None:
        size, rank = (_read_int(environ, name) for name in LAUNCHERS[launcher])
        number, index = size if number is None else number, rank if index is None else index
    if number is not None and number < 1:
        raise ValueError(f"--num_processes is {number}: a run has at least one process")
    if number is not None and index is not None and not 0 <= index < number:
        raise ValueError(f"--process_id is {index}; with --num_processes {number} it must be from 0 to {number - 1}")
    if number == 1:
        return None
    missing = [flag for flag, value in zip(FLAGS, (address, number, index)) if value is None]
    if missing:
        which = f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing"
        needs = f"{_ALL_FLAGS}, or {', '.join(VARIABLES[:2])} and {VARIABLES[2]} in the environment"
        raise ValueError(f"{which}: a run of several processes needs {needs}")
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError(f"--coordinator_address is {address}: it must be HOST:PORT, such as 10.0.0.1:1234")
    # Under a launcher JAX also detects which of the host's devices are this process's own.
    return ClusterSpec("--num_processes", address, number, index, None if launcher else "deactivate")


def _read_int(environ: Mapping[str, str], name: str) -> int | None:
    try:
        return int(environ[name]) if environ.get(name) else None
    except ValueError:
        raise ValueError(f"{name} is {environ[name]!r} in the environment: it must be a whole number") from None


def _tpu_pod(environ: Mapping[str, str]) -> str | None:
    """What to call the TPU pod that JAX detects; None for a single host, or none."""
    platforms = environ.get("JAX_PLATFORMS") or jax.config.jax_platforms or "tpu"
    if "tpu" not in platforms.split(","):
        return None
    try:
        from jax._src.clusters import ClusterEnv

        pod = next((env for env in ClusterEnv._cluster_types if "tpu" in env.name and env.is_env_present()), None)
        return "the TPU's environment" if pod is not None and pod.get_process_count() > 1 else None
    except Exception as error:  # the metadata server does not answer, or a version of JAX has no such class
        alone = f"This TPU host is taken for the only one: JAX found no others ({_one_line(error)})."
        warnings.warn(alone, stacklevel=3)


def _check_port(address: str) -> None:
    """Raises where process 0 cannot listen on its port: JAX crashes there."""
    try:
        socket.create_server(("", int(address.rpartition(":")[2]))).close()
    except OSError as error:
        cannot = f"Process 0 cannot listen on the port of {address} ({os.strerror(error.errno)})"
        same = "Give another port in --coordinator_address, the same one to all processes."
        raise ConnectionError(f"{cannot}. {same}") from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def coordination_client() -> Any:
    """JAX's client of the key-value store in process 0; None in a single process, and where JAX hides it."""
    return getattr(_state, "client", None)


def process_id() -> int:
    """Which process this is, from 0, also where JAX has not met the others yet and `jax.process_index` would wait for them."""
    return getattr(_state, "process_id", 0)


def is_main_process() -> bool:
    """Whether this is process 0, which alone writes what is written once."""
    return jax.process_index() == 0


@functools.cache
def process_names() -> tuple[str, ...]:
    """What to call each process, such as "host3 (process 3)". The first call must be made by all processes."""
    client, count, host = coordination_client(), jax.process_count(), socket.gethostname()
    if count == 1 or client is None:
        return (f"{host} (process 0)",) if count == 1 else tuple(f"process {i}" for i in range(count))
    client.key_value_set(f"gold_jax/host/{jax.process_index()}", host, allow_overwrite=True)
    return tuple(f"{client.blocking_key_value_get(f'gold_jax/host/{i}', 300_000)} (process {i})" for i in range(count))
