"""The processes of one run: how they find each other, who they are, and what they tell each other."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import glob
import importlib.util
import os
import signal
import socket
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax

FLAGS = ("--coordinator_address", "--num_processes", "--process_id")
VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


class ClusterSpec(NamedTuple):
    """A run of several processes, as flags and the environment describe it.

    Attributes:
        by: who says that there are several, for error messages.
        address: HOST:PORT of process 0; None where JAX is to find it out, with the other two.
        number: how many processes there are.
        index: which of them this one is.
        detect: what `jax.distributed.initialize` is given as `cluster_detection_method`; None lets it look around.
        surely: whether there are several, and not perhaps one.
    """

    by: str
    address: str | None = None
    number: int | None = None
    index: int | None = None
    detect: str | None = None
    surely: bool = True


def start(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    timeout: float = 300,
) -> None:
    """Brings the processes of a run together; nothing happens where there is one. Must come before JAX's first use of a device.

    There are several where the arguments or JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID say so, in a
    Slurm step or under Open MPI with more than one task, and on a Cloud TPU pod; the last three are found out by JAX.
    Nothing happens either where `jax.distributed` was initialized before.

    Args:
        coordinator_address: HOST:PORT of process 0, the same in all processes.
        num_processes: how many there are.
        process_id: which of them this one is, from 0. Slurm and Open MPI tell this and the number where only the
            address is given.
        timeout: seconds to wait for the others.

    Raises:
        ValueError: one of the three is missing or makes no sense; the text names the flag.
        ConnectionError: the others were not found in time.
        RuntimeError: JAX's devices were used before.
    """
    if jax.distributed.is_initialized():
        return
    cluster = cluster_from_flags(coordinator_address, num_processes, process_id, os.environ) or _detect_tpu_pod(
        os.environ
    )
    if cluster is None:
        return
    try:
        _join(cluster, timeout)
    except Exception as error:
        if cluster.surely or isinstance(error, ConnectionError):
            raise
        warnings.warn(f"This TPU host is taken for the only one: JAX found no others ({_brief(error)}).", stacklevel=2)
        return
    if count() > 1:
        names()


def cluster_from_flags(
    address: str | None, number: int | None, index: int | None, environ: Mapping[str, str]
) -> ClusterSpec | None:
    """Whether flags, or else the environment, mean several processes; None for one.

    Raises:
        ValueError: as `start`.
    """
    address = address or environ.get(VARIABLES[0]) or None
    number = _int_variable(environ, VARIABLES[1]) if number is None else number
    index = _int_variable(environ, VARIABLES[2]) if index is None else index
    launcher = _detect_launcher(environ)
    if address is None and number is None and index is None:
        return ClusterSpec(launcher[0]) if launcher else None
    if launcher and address is not None:
        number = launcher[1] if number is None else number
        index = launcher[2] if index is None else index
    if number is not None and number < 1:
        raise ValueError(f"--num_processes is {number}: a run has one process at least")
    if number is not None and index is not None and not 0 <= index < number:
        raise ValueError(
            f"--process_id is {index}, and --num_processes {number}: the processes' numbers are 0 to {number - 1}"
        )
    if number == 1:
        return None
    missing = [flag for flag, value in zip(FLAGS, (address, number, index)) if value is None]
    if missing:
        raise ValueError(
            f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing: a run of several processes needs "
            f"{', '.join(FLAGS[:2])} and {FLAGS[2]}, or {', '.join(VARIABLES[:2])} and {VARIABLES[2]} in the environment"
        )
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f"--coordinator_address is {address}: it must be HOST:PORT, such as 10.0.0.1:1234")
    # A launcher may also say which of the host's devices are this process's own.
    return ClusterSpec("--num_processes", address, number, index, None if launcher else "deactivate")


def _int_variable(environ: Mapping[str, str], name: str) -> int | None:
    text = environ.get(name)
    if not text:
        return None
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{name} is {text!r} in the environment: it must be a whole number") from None


def _detect_launcher(environ: Mapping[str, str]) -> tuple[str, int | None, int | None] | None:
    """Slurm or Open MPI where it started several processes: its name, how many, and which this one is."""
    tasks = None
    if environ.get("SLURM_JOB_ID"):
        # Outside a step, as in a batch script, the number of tasks is that of the allocation, and one process runs.
        inside = environ.get("SLURM_STEP_NODELIST")
        tasks = _int_variable(environ, "SLURM_STEP_NUM_TASKS") or (
            _int_variable(environ, "SLURM_NTASKS") if inside else None
        )
    ranks = _int_variable(environ, "OMPI_COMM_WORLD_SIZE")
    if ranks and ranks > 1:
        return "Open MPI", ranks, _int_variable(environ, "OMPI_COMM_WORLD_RANK")
    if tasks and tasks > 1:
        return "Slurm", tasks, _int_variable(environ, "SLURM_PROCID")
    return None


def _detect_tpu_pod(environ: Mapping[str, str]) -> ClusterSpec | None:
    """A Cloud TPU host with others beside it, or of which this is not known; None where there are no TPUs or no others."""
    platforms = environ.get("JAX_PLATFORMS") or jax.config.jax_platforms or "tpu"
    chips = glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*")
    if "tpu" not in platforms.split(",") or not chips or importlib.util.find_spec("libtpu") is None:
        return None
    hosts = tpu_hosts(environ)
    return None if hosts == 1 else ClusterSpec("the TPU's environment", surely=hosts is not None)


def tpu_hosts(environ: Mapping[str, str]) -> int | None:
    """How many hosts a TPU's environment names; None where only Google's metadata server knows."""
    listed = environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES")
    if path := environ.get("TPU_PROCESS_ADDRESSES_PATH"):
        with contextlib.suppress(OSError), open(path, encoding="utf-8") as file:
            listed = file.read().strip() or listed
    slices = _int_variable(environ, "MEGASCALE_NUM_SLICES") or 1
    if listed:
        return len(listed.split(",")) * slices
    return 1 if environ.get("TPU_SKIP_MDS_QUERY") is not None and slices == 1 else None


def _join(cluster: ClusterSpec, timeout: float) -> None:
    """Calls `jax.distributed.initialize`, from a thread: where the others do not come it would end the process."""
    if cluster.index == 0 and cluster.address and not os.environ.get("JAX_COORDINATOR_BIND_ADDRESS"):
        _check_port(cluster)
    outcome: list[BaseException | None] = []

    def join() -> None:
        try:
            jax.distributed.initialize(
                cluster.address,
                cluster.number,
                cluster.index,
                cluster_detection_method=cluster.detect,
                initialization_timeout=int(timeout) + 60,  # the wait below ends first
            )
            outcome.append(None)
        except BaseException as error:
            outcome.append(error)

    def refused() -> None:
        print(
            f"{_me(cluster)} was not let in by process 0 at {_place(cluster)}. The line that begins with F, above, says why: "
            "ALREADY_EXISTS where two processes were given the same --process_id, INVALID_ARGUMENT where they were given "
            "different numbers as --num_processes.",
            file=sys.stderr,
            flush=True,
        )
        os._exit(2)

    with on_abort(refused):
        thread = threading.Thread(target=join, daemon=True)
        thread.start()
        thread.join(timeout)
    if not outcome:
        if not cluster.surely and _address(cluster) is None:
            raise TimeoutError(f"the metadata server did not answer within {timeout:g} seconds")
        where = f"{_me(cluster)} waited {timeout:g} seconds at {_place(cluster)}, "
        if answers(_address(cluster), 2):
            raise ConnectionError(
                f"{where}where process 0 answers, but not all processes came. Start all of them, with the same "
                f"--coordinator_address and --num_processes, and each with a --process_id of its own."
            )
        raise ConnectionError(
            f"{where}and nothing answers there. Process 0 must run on that host, and let this one reach that port."
        )
    error = outcome[0]
    if error is None:
        return
    if "before any JAX calls" in str(error):
        raise RuntimeError(
            "JAX's devices were used before the processes of this run were brought together: call "
            "gold_jax.parallel.processes.start first"
        ) from error
    if cluster.address is None and isinstance(error, ValueError):
        raise ValueError(
            f"{cluster.by} says that this run has several processes, but JAX could not find out how they reach each other "
            f"({_brief(error)}): give {', '.join(FLAGS[:2])} and {FLAGS[2]}"
        ) from error
    if cluster.surely and isinstance(error, jax.errors.JaxRuntimeError):
        raise ConnectionError(
            f"{_me(cluster)} could not join the others at {_place(cluster)}: {_brief(error)}"
        ) from error
    raise error


def _check_port(cluster: ClusterSpec) -> None:
    """Raises where process 0 cannot listen on its port: JAX's runtime crashes there."""
    for family, anywhere in ((socket.AF_INET6, "::"), (socket.AF_INET, "0.0.0.0")):
        try:
            probe = socket.socket(family)
        except OSError:
            continue
        with probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((anywhere, int(cluster.address.rpartition(":")[2])))
            except OverflowError:
                raise ValueError(f"--coordinator_address is {cluster.address}: there are no such ports") from None
            except OSError as error:
                if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                    continue
                raise ConnectionError(
                    f"Process 0 cannot listen on the port of {cluster.address} ({error.strerror}). Give another port in "
                    "--coordinator_address, the same one to all processes."
                ) from error


def _brief(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _me(cluster: ClusterSpec) -> str:
    if cluster.number is None:
        return f"This process, one of several as {cluster.by} says,"
    return f"Process {cluster.index} of {cluster.number}"


def _address(cluster: ClusterSpec) -> str | None:
    return cluster.address or getattr(_runtime(), "coordinator_address", None)


def _place(cluster: ClusterSpec) -> str:
    return _address(cluster) or "the address of process 0"


def answers(address: str | None, timeout: float) -> bool:
    """Whether something listens at HOST:PORT, within some seconds."""
    host, _, port = (address or "").rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout).close()
    except (OSError, ValueError):
        return False
    return True


def _runtime() -> Any:
    """What JAX knows of the processes. A private part of JAX: None where a version does not have it."""
    try:
        from jax._src.distributed import global_state
    except ImportError:
        return None
    return global_state


def coordination() -> Any:
    """JAX's client of the store that all processes share, in process 0; None in a single process, and where JAX hides it."""
    return getattr(_runtime(), "client", None)


def coordinator_address() -> str | None:
    """HOST:PORT where process 0 holds that store; None where it is not known."""
    return getattr(_runtime(), "coordinator_address", None)


@contextlib.contextmanager
def on_abort(callback: Callable[[], None]) -> Iterator[None]:
    """Calls `callback` when C++ code aborts this process; it ends as it would have once `callback` returns.

    JAX's runtime aborts a process at once when process 0 is gone, whatever its Python code is doing, and Python's own
    handlers of signals run in the main thread alone, which may be waiting for the device. So this handler is C's, and
    runs in the thread that aborts. Nothing is done where there is no such thing.
    """
    try:
        library = ctypes.CDLL(None)
        install, again = library.signal, getattr(library, "raise")
    except (AttributeError, OSError, TypeError):  # not a POSIX system
        yield
        return
    install.restype, install.argtypes = ctypes.c_void_p, [ctypes.c_int, ctypes.c_void_p]

    def aborted(number: int) -> None:
        try:
            callback()
        finally:
            install(number, before)
            again(number)  # held back until this handler returns

    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(aborted)
    before = install(signal.SIGABRT, ctypes.cast(handler, ctypes.c_void_p))
    try:
        yield
    finally:
        install(signal.SIGABRT, before)


def count() -> int:
    """How many processes the run has."""
    return jax.process_count()


def index() -> int:
    """Which of them this one is, from 0."""
    return jax.process_index()


def is_first() -> bool:
    """Whether this is process 0, which alone writes what is written once."""
    return index() == 0


@functools.cache
def names() -> tuple[str, ...]:
    """What to call each process, such as "host3 (process 3)". Told once: the first time all processes must ask; `start` does.

    Raises:
        ConnectionError: a process did not tell its host within five minutes.
    """
    hosts = [socket.gethostname()]
    if count() > 1:
        hosts = _hosts(hosts[0], timeout=300)
    return tuple(f"{host} (process {i})" if host else f"process {i}" for i, host in enumerate(hosts))


def _hosts(mine: str, timeout: float) -> list[str | None]:
    client = coordination()
    if client is None:
        return [None] * count()
    client.key_value_set(f"gold_jax/host/{index()}", mine, allow_overwrite=True)
    found = []
    for i in range(count()):
        try:
            found.append(client.blocking_key_value_get(f"gold_jax/host/{i}", int(timeout * 1000)))
        except jax.errors.JaxRuntimeError as error:
            raise ConnectionError(f"Process {i} did not tell its host's name within {timeout:g} seconds") from error
    return found
