"""Logs which process of a run is lost, has failed or is late, and ends the processes of a command.

What they say of themselves goes through the key-value store that JAX keeps in process 0. Where a process is lost, JAX's
own heartbeats end the others.
"""

import contextlib
import functools
import itertools
import json
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
from jax.experimental import multihost_utils

from gold_jax.distributed.initialize import coordination_client, process_id, process_names

WAITING = "waiting for the device"
HEARTBEATS, FAILURES = "gold_jax/heartbeat/", "gold_jax/failure/"
RESUME = "Start the run again with --resume_from_checkpoint latest."
EX_TEMPFAIL = 75  # of sysexits.h: what failed will succeed if it is started again
_STATUS = re.compile(r"[A-Z]+(_[A-Z]+)*: ")  # such as "UNKNOWN: Gloo AllGather failed"
_BROKEN = re.compile(
    r"(?i)gloo|nccl|connection|peer|socket|barrier|coordination|heartbeat|timed out|unavailable|aborted|cancelled|deadline"
)


class PeerLost(RuntimeError):
    """Another process of the run stopped answering. `exit_code` is what a command ends with."""

    exit_code = EX_TEMPFAIL


class PeerFailed(RuntimeError):
    """Another process of the run ended with an error."""

    exit_code = 1


class Heartbeat(NamedTuple):
    """What a process says of itself."""

    count: int  # grows with each
    step: int
    activity: str
    seconds: float  # how long the activity has lasted
    finished: bool = False


#: Of another process the newest heartbeat, and when it was new by this process's clock.
Peers = dict[int, tuple[Heartbeat, float]]


def update_peers(peers: Peers, texts: dict[int, str], own: int, now: float) -> Peers:
    """The state of the others after the store was read; a heartbeat that was seen before keeps its time."""
    new = {i: (Heartbeat(*json.loads(text)), now) for i, text in texts.items() if i != own}
    return new | {i: state for i, state in peers.items() if i not in new or state[0] == new[i][0]}


def diagnose(
    now: float,
    peers: Peers,
    failures: dict[int, str],
    own: Heartbeat,
    names: Sequence[str],
    limits: tuple[float, float],
) -> tuple[tuple, str] | None:
    """The worst that is wrong with others: "lost", "failed" or "late" with the process (and update), and a sentence.

    `limits` are the seconds of silence before `now` after which a process is lost, and those that this one waits at the
    device before it says for whom.
    """
    lost_after, late_after = limits
    for i, error in failures.items():
        return ("failed", i), f"{names[i]} ended with an error: {error}."
    silence = {i: now - seen_at for i, (beat, seen_at) in peers.items() if not beat.finished}
    if lost := sorted((i for i in silence if silence[i] > lost_after), key=silence.get, reverse=True):
        first, last = lost[0], peers[lost[0]][0]
        nor = f". Nor has {', nor '.join(names[i] for i in lost[1:8])}" if lost[1:] else ""
        line = f"has not answered for {silence[first]:.0f} seconds; it was at update {last.step}, {last.activity}{nor}"
        return ("lost", first), f"{names[first]} {line}. {RESUME}"
    busy = {i: peers[i][0] for i in silence if peers[i][0].activity != WAITING and peers[i][0].step <= own.step}
    if not busy or own.activity != WAITING or own.seconds <= late_after:
        return None
    seconds, slowest = max((beat.seconds + silence[i], i) for i, beat in busy.items())
    last, more = busy[slowest], f"; {len(busy) - 1} more are not done either" if len(busy) > 1 else ""
    line = f"it has been {last.activity} for {seconds:.0f} seconds, at update {last.step}{more}"
    return ("late", slowest, last.step, last.activity), f"{names[slowest]} keeps the others waiting: {line}."


def log_to_stderr(line: str) -> None:
    """Prints to stderr on every process: the run's console is that of process 0, which may be the lost one."""
    print(f"gold_jax: {line}", file=sys.stderr, flush=True)


class Watchdog:
    """While it is entered, a thread exchanges heartbeats with the other processes and logs what is wrong with them, once.

    A no-op in a run of one process, and until it is entered. A process is named after half of the `timeout` in seconds
    (`initialize`'s `heartbeat_timeout`) without an answer, and, once for each update and activity, after `late_after`
    seconds (None: twice the timeout) in which others wait for it. An error that leaves the block is reported to the
    others; one that comes of another process's end is replaced by `PeerLost` or `PeerFailed`, which name that process.
    """

    def __init__(self, timeout: float, log: Callable[[str], None] = log_to_stderr, *, late_after: float | None = None):
        self._log, self._logged = log, set()
        self._lost_after, self._late_after = timeout / 2, 2 * timeout if late_after is None else late_after
        self._period = min(2.0, timeout / 10)
        self._activity = (0, "starting", time.monotonic())
        self._stop, self._broken = threading.Event(), threading.Event()
        self._explanation: Exception | None = None  # of what comes of another process's end
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "Watchdog":
        if jax.process_count() > 1 and (client := coordination_client()) is not None:
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # where an earlier run of this process failed
                client.key_value_delete(f"{FAILURES}{process_id()}")
            arguments = client, process_id(), process_names()
            self._thread = threading.Thread(target=self._watch, args=arguments, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def report(self, step: int, activity: str) -> None:
        """Notes what this process does now: the update and a phrase such as "making the batch", "saving" or `WAITING`."""
        if self._activity[:2] != (step, activity):
            self._activity = (step, activity, time.monotonic())

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """While it is entered, this process waits for the others; afterwards it resumes its activity."""
        before = self._activity
        self.report(before[0], WAITING)
        yield
        self._activity = before

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if self._thread is None:
            return
        from_peer = comes_from_peer(error)
        if from_peer:
            self._broken.wait(self._lost_after + 3 * self._period + 1)
        self._stop.set()
        self._thread.join(2)
        if from_peer and self._explanation is not None:
            raise self._explanation from error
        if error is not None:
            report_failure(error)

    def _note(self, event: tuple, line: str) -> None:
        if event not in self._logged:
            self._log(line)
        self._logged.add(event)
        if event[0] != "late":
            self._explanation = (PeerLost if event[0] == "lost" else PeerFailed)(line)
            self._broken.set()

    def _watch(self, client, me: int, names: Sequence[str]) -> None:
        peers, limits, finished = {}, (self._lost_after, self._late_after), False
        silent = f"{names[0]} has not answered for {self._lost_after:.0f} seconds. {RESUME}"  # it holds the store
        for count in itertools.count():
            step, activity, since = self._activity
            own = Heartbeat(count, step, activity, round(time.monotonic() - since, 1), finished)
            timer = threading.Timer(self._lost_after, self._note, [("lost", 0), silent])
            timer.daemon = True
            if me != 0:
                timer.start()
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # the store is gone: JAX ends this process
                client.key_value_set(f"{HEARTBEATS}{me}", json.dumps(own), allow_overwrite=True)
                peers = update_peers(peers, read_store(client, HEARTBEATS), me, time.monotonic())
                found = diagnose(time.monotonic(), peers, read_failures(client), own, names, limits)
                if found is not None and not finished:
                    self._note(*found)
            timer.cancel()
            if finished:
                return
            finished = self._stop.wait(self._period)


def read_store(client, prefix: str) -> dict[int, str]:
    """The texts that processes left under a prefix."""
    return {int(key.rpartition("/")[2]): text for key, text in client.key_value_dir_get(prefix)}


def read_failures(client) -> dict[int, str]:
    """The errors that other processes ended with."""
    return {i: text for i, text in read_store(client, FAILURES).items() if i != process_id()}


def comes_from_peer(error: BaseException | None) -> bool:
    """Whether an error may be what this process sees of another one's end."""
    while error is not None:
        # JAX raises what its runtime reports as a JaxRuntimeError, or as a ValueError where a call could not be begun.
        if (isinstance(error, jax.errors.JaxRuntimeError) or _STATUS.match(str(error))) and _BROKEN.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def report_failure(error: BaseException) -> None:
    """Tells the other processes of the error that ends this one, unless it comes from one of them or is a preemption."""
    client = coordination_client()
    if client is None or isinstance(error, PeerFailed) or getattr(error, "exit_code", None) == EX_TEMPFAIL:
        return
    text = "it was interrupted" if isinstance(error, KeyboardInterrupt) else f"{type(error).__name__}: {error}"
    text = " ".join(text.split()).rstrip(".: ")[:300]
    send = functools.partial(client.key_value_set, f"{FAILURES}{process_id()}", text, allow_overwrite=True)
    thread = threading.Thread(target=send, daemon=True)
    thread.start()
    thread.join(2)  # the store may not answer


def end_process(ending: BaseException | None) -> None:
    """Called by the main thread of a command as the last thing it does; returns where the process may end as others do.

    JAX waits for all processes when one ends, and aborts those that waited in vain. So they first wait for each other
    here, for as long as it takes (process 0 may still be uploading). One that failed does not take part: it tells the
    others why and ends without JAX's shutdown, which would replace its exit code by that of an abort minutes later.
    """
    if coordination_client() is None:
        return
    code = 0 if ending is None else ending.code if isinstance(ending, SystemExit) else 1
    error = ending.__context__ or ending if isinstance(ending, SystemExit) else ending  # what the command printed
    if code in (None, 0, EX_TEMPFAIL) and not isinstance(error, PeerLost):
        try:
            multihost_utils.sync_global_devices("gold_jax ends")
            return
        except Exception as failure:
            ending, code, error = failure, 1, failure
    if not isinstance(ending, SystemExit):
        traceback.print_exception(ending)
    failures = {}
    if comes_from_peer(error):
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # the store is gone
            failures = read_failures(coordination_client())
    for i, text in failures.items():
        log_to_stderr(f"{process_names()[i]} ended with an error: {text}.")
    if not failures:
        report_failure(error)
    if process_id() == 0:
        time.sleep(5)  # it holds the store from which the others learn why
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 1)
