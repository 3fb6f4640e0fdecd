"""Logs which process of a run is lost, has failed or is late.

It ends nothing: where a process is lost, JAX's own heartbeats end the others. What the processes say of themselves goes
through the key-value store that JAX keeps in process 0.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax

from gold_jax.distributed.initialize import coordination_client, process_id, process_names

WAITING = "waiting for the device"
HEARTBEATS, FAILURES = "gold_jax/heartbeat/", "gold_jax/failure/"
RESUME = "Start the run again with --resume_from_checkpoint latest."
EX_TEMPFAIL = 75  # of sysexits.h: what failed will succeed if it is started again


class PeerLost(RuntimeError):
    """Another process of the run stopped answering. `exit_code` is what a command ends with."""

    exit_code = EX_TEMPFAIL


class PeerFailed(RuntimeError):
    """Another process of the run ended with an error."""

    exit_code = 1


class Heartbeat(NamedTuple):
    """What a process says of itself: `count` grows with each, `seconds` is how long the activity has lasted."""

    count: int
    step: int
    activity: str
    seconds: float
    finished: bool = False


class PeerState(NamedTuple):
    """The newest heartbeat of another process, and when it was new by this process's clock."""

    heartbeat: Heartbeat
    seen_at: float


class Diagnosis(NamedTuple):
    """What is wrong with a process: `kind` is "lost", "failed" or "late", `since` the update and activity that it is late in."""

    kind: str
    process: int
    message: str
    since: tuple[int, str] | None = None


def update_peers(
    peers: Mapping[int, PeerState], texts: Mapping[int, str], own: int, now: float
) -> dict[int, PeerState]:
    """The state of the others after the store was read; a heartbeat that was seen before keeps its time."""
    updated = dict(peers)
    for i, text in texts.items():
        heartbeat = Heartbeat(*json.loads(text))
        if i != own and (i not in peers or peers[i].heartbeat.count != heartbeat.count):
            updated[i] = PeerState(heartbeat, now)
    return updated


def diagnose(
    now: float,
    peers: Mapping[int, PeerState],
    failures: Mapping[int, str],
    own: Heartbeat,
    *,
    names: Sequence[str],
    lost_after: float,
    late_after: float,
) -> Diagnosis | None:
    """What is wrong with the other processes, the worst first.

    Args:
        now: when the store was last read, in seconds.
        peers: the others' newest heartbeats; who has not sent one is not in it, and not missed.
        failures: the errors that other processes ended with.
        own: what this process is doing.
        names: what to call each process.
        lost_after: seconds of silence after which a process is lost.
        late_after: seconds that this process waits at the device before it names who keeps it waiting.
    """
    for i, error in failures.items():
        return Diagnosis("failed", i, f"{names[i]} ended with an error: {error}.")
    silence = {i: now - peer.seen_at for i, peer in peers.items() if not peer.heartbeat.finished}
    if lost := sorted((i for i in silence if silence[i] > lost_after), key=silence.get, reverse=True):
        last = peers[lost[0]].heartbeat
        line = f"{names[lost[0]]} has not answered for {silence[lost[0]]:.0f} seconds; it was at update {last.step}, {last.activity}"
        line += f". Nor has {', nor '.join(names[i] for i in lost[1:8])}" if lost[1:] else ""
        return Diagnosis("lost", lost[0], f"{line}. {RESUME}")
    if own.activity != WAITING or own.seconds <= late_after:
        return None
    busy = {i: peers[i].heartbeat.seconds + silence[i] for i in silence if peers[i].heartbeat.activity != WAITING}
    busy = {i: seconds for i, seconds in busy.items() if peers[i].heartbeat.step <= own.step}
    if not busy:
        return None
    slowest = max(busy, key=busy.get)
    last, more = peers[slowest].heartbeat, f"; {len(busy) - 1} more are not done either" if len(busy) > 1 else ""
    line = f"it has been {last.activity} for {busy[slowest]:.0f} seconds, at update {last.step}{more}"
    return Diagnosis("late", slowest, f"{names[slowest]} keeps the others waiting: {line}.", (last.step, last.activity))


def log_to_stderr(line: str) -> None:
    """Prints to stderr on every process: the run's console is that of process 0, which may be the lost one."""
    print(f"gold_jax: {line}", file=sys.stderr, flush=True)


class Watchdog:
    """While it is entered, a thread exchanges heartbeats with the other processes and logs what is wrong with them, once.

    It names a late process once for each update and activity. A no-op in a run of one process, and until it is entered. An error that leaves the block is reported to the others;
    one that comes of another process's end is replaced by `PeerLost` or `PeerFailed`, which name that process.
    """

    def __init__(self, timeout: float, log: Callable[[str], None] = log_to_stderr, *, late_after: float | None = None):
        """Starts nothing.

        Args:
            timeout: seconds of silence after which JAX ends the run (`initialize`'s `heartbeat_timeout`); half of it
                after which a process is named.
            log: takes a line, from any thread, in every process.
            late_after: seconds of waiting for a process after which it is named; None: twice the timeout.
        """
        self._log = log
        self._limits = {"lost_after": timeout / 2, "late_after": 2 * timeout if late_after is None else late_after}
        self._period = min(2.0, timeout / 10)
        self._activity = (0, "starting", time.monotonic())
        self._stop, self._broken = threading.Event(), threading.Event()
        self._diagnosis: Diagnosis | None = None  # of a process that is lost or has failed
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Watchdog:
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
        try:
            yield
        finally:
            self._activity = before

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if self._thread is None:
            return
        from_peer = comes_from_peer(error)
        if from_peer:
            self._broken.wait(self._limits["lost_after"] + 3 * self._period + 1)
        self._stop.set()
        self._thread.join(2)
        if from_peer and (found := self._diagnosis):
            raise (PeerLost if found.kind == "lost" else PeerFailed)(found.message) from error
        if error is not None:
            report_failure(error)

    def _watch(self, client, own_id: int, names: Sequence[str]) -> None:
        def note(found: Diagnosis) -> None:
            event = found.kind, found.process, found.since
            if event not in logged:
                self._log(found.message)
            logged.add(event)
            if found.kind != "late":
                self._diagnosis = found
                self._broken.set()

        peers: dict[int, PeerState] = {}
        logged, counts, finished = set(), itertools.count(), False
        silence = f"has not answered for {self._limits['lost_after']:.0f} seconds"
        silent_store = Diagnosis("lost", 0, f"{names[0]} {silence}. {RESUME}")  # process 0 holds it
        while True:
            step, activity, since = self._activity
            own = Heartbeat(next(counts), step, activity, round(time.monotonic() - since, 1), finished)
            timer = threading.Timer(self._limits["lost_after"], note, [silent_store])
            timer.daemon = True
            if own_id != 0:
                timer.start()
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # the store is gone: JAX ends this process
                client.key_value_set(f"{HEARTBEATS}{own_id}", json.dumps(own), allow_overwrite=True)
                peers = update_peers(peers, read_store(client, HEARTBEATS), own_id, time.monotonic())
                found = diagnose(time.monotonic(), peers, read_failures(client), own, names=names, **self._limits)
                if found is not None and not finished:
                    note(found)
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


_STATUS = re.compile(r"[A-Z]+(_[A-Z]+)*: ")  # such as "UNKNOWN: Gloo AllGather failed"
_BROKEN = re.compile(
    r"(?i)gloo|nccl|connection|peer|socket|barrier|coordination|heartbeat|timed out|unavailable|aborted|cancelled|deadline"
)


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
    report = threading.Thread(
        target=client.key_value_set,
        args=(f"{FAILURES}{process_id()}", text),
        kwargs={"allow_overwrite": True},
        daemon=True,
    )
    report.start()
    report.join(2)  # the store may not answer
