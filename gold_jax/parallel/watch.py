"""A process that dies, fails or lags is named by the others, and none of them waits for it for ever."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import jax

from gold_jax.parallel import processes
from gold_jax.parallel.beats import (
    EX_TEMPFAIL,
    WAITING,
    Heartbeat,
    Limits,
    PeerProblem,
    PeerState,
    diagnose,
    lost,
    update_peers,
)

_entered = itertools.count()  # all processes enter as many watches; each has its own keys in the store


class Store(Protocol):
    """Where the processes leave their beats for each other."""

    def put(self, index: int, text: str) -> None:
        """Puts the text of a process in the place of its last."""

    def all(self) -> dict[int, str]:
        """The texts of all processes that have put one."""


def is_caused_by_peers(error: BaseException | None) -> bool:
    """Whether an error may be what this process sees of another one's end."""
    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        text = str(error)
        # JAX raises what its runtime reports as a JaxRuntimeError, or as a ValueError where a call could not be begun.
        if (isinstance(error, jax.errors.JaxRuntimeError) or _STATUS.match(text)) and _BROKEN.search(text):
            return True
        error = error.__cause__ or error.__context__
    return False


_STATUS = re.compile(r"[A-Z]+(_[A-Z]+)*: ")  # such as "UNKNOWN: Gloo AllGather failed"
_BROKEN = re.compile(
    r"gloo|nccl|connection|peer|socket|barrier|coordination|heartbeat|timed out|"
    r"UNAVAILABLE|ABORTED|CANCELLED|DEADLINE_EXCEEDED",
    re.IGNORECASE,
)


def end_process(code: int) -> None:
    """Ends this process at once, from any thread, whatever the others are waiting for; flushes what it has said."""
    guard = threading.Timer(5, os._exit, (code,))  # flushing may wait for whoever reads it
    guard.daemon = True
    guard.start()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(code)


class Watchdog:
    """While it is entered, this process tells the others what it is doing, and hears whether they are well.

    It is entered once. In a run of one process nothing happens. In one of several, a thread says every `period` seconds
    that this process lives, in the store that JAX keeps in process 0, and another one looks at what the others say:

    - Who has been silent for `lost_after` seconds is lost: each of the others names it in one line and ends with exit code 75,
      so that what supervises the run starts it again.
    - Who ended with an error says so; the others repeat it and end with exit code 1.
    - Whom a process has waited for at the device for `lag_after` seconds is named, once for each update; the run goes on.

    They end from the thread, because the main thread may be waiting for a device that will never answer. An error that
    leaves the `with` block marks this process as failed; one that may come of another one's end is explained first.
    Preemption (exit code 75) and the end of the block are no failure.

    Where process 0 dies, JAX's runtime aborts the others at once; they name it before they end. Where JAX's own
    heartbeats find a lost process first (100 seconds, by default), the same.
    """

    def __init__(
        self,
        say: Callable[[str], Any],
        *,
        period: float = Limits().period,
        lost_after: float = Limits().lost_after,
        lag_after: float = Limits().lag_after,
        end: Callable[[int], Any] = end_process,
    ):
        """Prepares a watch; nothing is started.

        Args:
            say: prints a line, from any thread. It must print in every process: where process 0 is gone, others must
                speak.
            period: seconds between what a process says of itself.
            lost_after: seconds of silence after which a process is lost.
            lag_after: seconds of waiting after which the one that is waited for is named.
            end: ends this process with an exit code.
        """
        self._say, self._end = say, end
        self._limits = Limits(period, lost_after, lag_after)
        self._store: Store | None = None
        self._me, self._named = 0, ("",)
        self._mine = (0, "starting", time.monotonic())
        self._state: dict[str, Any] = {}  # of the beats to come
        self._number = itertools.count()
        self._heard: dict[int, PeerState] = {}
        self._began = self._contact = time.monotonic()
        self._over = threading.Event()
        self._found = threading.Event()
        self._left = threading.Event()
        self._finding: PeerProblem | None = None
        self._leaving = threading.Lock()
        self._error: BaseException | None = None
        self._threads: list[threading.Thread] = []
        self._held = contextlib.ExitStack()

    @property
    def watching(self) -> bool:
        """Whether there is anyone to watch, and a way to."""
        return self._store is not None

    def __enter__(self) -> Watchdog:
        if processes.count() == 1:
            return self
        client = processes.coordination()
        if not all(hasattr(client, name) for name in ("key_value_set", "key_value_dir_get")):
            self._say(
                f"The processes do not watch each other: JAX {jax.__version__} does not share its store with them. Where one "
                "dies, the others may wait for it until JAX's own limit."
            )
            return self
        self._watch(_Shared(client, f"gold_jax/watch/{next(_entered)}/"), processes.index(), processes.names())
        return self

    def _watch(self, store: Store, me: int, named: Sequence[str]) -> None:
        """Begins to watch."""
        self._store, self._me, self._named = store, me, tuple(named)
        self._began = self._contact = time.monotonic()
        self._mine = (*self._mine[:2], self._began)
        self._held.enter_context(processes.on_abort(self._aborted))
        for part in (self._talk, self._look):
            thread = threading.Thread(target=part, name=f"watch{part.__name__}", daemon=True)
            thread.start()
            self._threads.append(thread)

    def at(self, step: int, doing: str) -> None:
        """Notes what this process does now: the update and a phrase such as "making the batch", "saving" or `WAITING`."""
        if self._mine[:2] != (step, doing):
            self._mine = (step, doing, time.monotonic())

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """While it is entered, this process waits for the others; afterwards it goes on with what it was doing."""
        before = self._mine
        self.at(before[0], WAITING)
        try:
            yield
        finally:
            self._mine = before

    def describe_peer_failure(self, error: BaseException) -> str | None:
        """Which process's end an error comes of; to be asked by the main thread before it reports the error.

        Waits for up to `lost_after` seconds, and a little, until someone is found to be gone; this process then ends as
        the class says, so that what is returned is seen only where `end` returns.

        Returns:
            The line that is said; None where all processes are well, or nobody watches them.
        """
        if not self.watching or not is_caused_by_peers(error):
            return None
        self._found.wait(self._limits.lost_after + 3 * self._limits.period + 1)
        return self._finding.line if self._finding else None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if not self.watching:
            return
        failed = error is not None and not (isinstance(error, SystemExit) and error.code in (None, 0, EX_TEMPFAIL))
        if failed:
            self.describe_peer_failure(error)
        if self._found.is_set():
            self._left.wait(20 + 3 * self._limits.period)  # a thread is ending this process
            return
        if not failed:
            self._last("finished")
            self._held.close()
            return
        self._error = error
        self._last("failed", why=_one_line(error))
        threading.Thread(target=self._end_after_error, name="watch_bury", daemon=True).start()

    def _last(self, state: str, **more: Any) -> None:
        """Says how this process ended, and nothing after that."""
        self._over.set()
        for thread in self._threads:
            thread.join(2)
        self._state = {"state": state, **more}
        self._put()

    def _put(self) -> None:
        """Says at once how this process is; does not wait long for a store that does not answer."""
        thread = threading.Thread(target=self._tell, daemon=True)
        thread.start()
        thread.join(2)

    def _beat(self) -> Heartbeat:
        step, doing, since = self._mine
        return Heartbeat(next(self._number), step, doing, round(time.monotonic() - since, 1), **self._state)

    def _tell(self) -> None:
        with contextlib.suppress(Exception):
            self._store.put(self._me, json.dumps(self._beat()))

    def _talk(self) -> None:
        """Says that this process lives, and listens."""
        while True:
            with contextlib.suppress(Exception):
                self._store.put(self._me, json.dumps(self._beat()))
                texts = self._store.all()
                now = time.monotonic()
                self._heard, self._contact = update_peers(self._heard, texts, self._me, now), now
            if self._over.wait(self._limits.period):
                return

    def _look(self) -> None:
        """Looks at what was heard; a thread of its own, because the store may not answer for minutes."""
        late = set()
        while not self._over.wait(self._limits.period / 2):
            findings = diagnose(
                time.monotonic(),
                self._heard,
                self._beat(),
                me=self._me,
                named=self._named,
                contact=self._contact,
                limits=self._limits,
            )
            for finding in findings:
                if finding.code is None:
                    if self._mine[0] not in late:
                        late.add(self._mine[0])
                        self._speak(finding.line)
                    continue
                # What failed there may be failing here as well, and its own error says more.
                if finding.kind == "failed" and self._over.wait(self._limits.period):
                    return
                self._leave(finding)
                return

    def _speak(self, line: str) -> None:
        try:
            self._say(line)
        except Exception:
            with contextlib.suppress(Exception):
                print(line, file=sys.stderr, flush=True)

    def _leave(self, finding: PeerProblem) -> None:
        """Says what was found, lets the others know, and ends this process."""
        if not self._leaving.acquire(blocking=False):
            time.sleep(60)  # another thread is ending this process
            return
        self._finding = finding
        self._found.set()
        guard = threading.Timer(10 + 3 * self._limits.period, self._end, (finding.code,))
        guard.daemon = True
        guard.start()
        self._state = {"state": "left", "why": finding.line, "cause": finding.process, "code": finding.code}
        if finding.process != 0 or finding.kind != "lost":
            self._put()
        self._speak(finding.line)
        self._wait_for_peers()
        guard.cancel()
        self._end(finding.code)
        self._left.set()

    def _wait_for_peers(self) -> None:
        """Process 0 holds the store: it stays until the others have read why it ends, and ended, but not for ever."""
        until = time.monotonic() + 2 * self._limits.period + 2
        while self._me == 0 and time.monotonic() < until:
            there = [h for h in self._heard.values() if h.beat.state in ("running", "failed")]
            if all(time.monotonic() - h.at > 2 * self._limits.period + 1 for h in there):
                return
            time.sleep(self._limits.period / 4)
            with contextlib.suppress(Exception):
                self._heard = update_peers(self._heard, self._store.all(), self._me, time.monotonic())

    def _end_after_error(self) -> None:
        """Ends a failed process once it has said its error: JAX's own end would wait minutes for the others."""
        while threading.main_thread().is_alive():
            time.sleep(0.2)
        time.sleep(1)  # for what else ends with the process
        self._wait_for_peers()
        self._end(_exit_code(self._error))

    def _aborted(self) -> None:
        """Called while JAX's runtime aborts this process: says who is to blame, and ends it; returns where nobody is."""
        if self._error is not None:
            self._end(_exit_code(self._error))
            return
        finding = self._finding or self._find_culprit()
        if finding is not None:
            self._leave(finding)

    def _find_culprit(self) -> PeerProblem | None:
        address = processes.coordinator_address()
        if self._me != 0 and address and not any(processes.answers(address, 2) for _ in range(2)):
            return lost(0, self._heard, self._named, f"is gone: nothing answers at {address} any more")
        silent = {p: self._contact - h.at for p, h in self._heard.items() if h.beat.state == "running"}
        if silent and max(silent.values()) > 2 * self._limits.period + 1:
            longest = max(silent, key=silent.get)
            return lost(longest, self._heard, self._named, f"has not answered for {silent[longest]:.0f} seconds")
        absent = [p for p in range(len(self._named)) if p != self._me and p not in self._heard]
        if absent and time.monotonic() - self._began > self._limits.lost_after:
            return lost(absent[0], self._heard, self._named, "was gone before it began")
        return None


class _Shared:
    """The store that JAX keeps in process 0."""

    def __init__(self, client: Any, prefix: str):
        self._client, self._prefix = client, prefix

    def put(self, index: int, text: str) -> None:
        self._client.key_value_set(f"{self._prefix}{index}", text, allow_overwrite=True)

    def all(self) -> dict[int, str]:
        return {int(key.rpartition("/")[2]): text for key, text in self._client.key_value_dir_get(self._prefix)}


def _one_line(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return "it was interrupted"
    if isinstance(error, SystemExit):
        return f"exit code {error.code}"
    text = " ".join(str(error).split()).rstrip(".")
    text = text if len(text) <= 300 else text[:299] + "…"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _exit_code(error: BaseException) -> int:
    """What Python ends with for an error that nobody caught, or `command.run` for one that it said."""
    if error is getattr(sys, "last_value", None):
        return 1
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    if isinstance(error, KeyboardInterrupt):
        return 130
    return 2 if isinstance(error, ValueError | OSError | TypeError | ImportError) else 1


def make_watchdog(limit: float) -> Watchdog:
    """A watch over the run's processes, each lost after so many seconds of silence."""
    return Watchdog(print_on_every_process, period=min(2.0, limit / 5), lost_after=limit, lag_after=2 * limit)


def print_on_every_process(line: str) -> None:
    """Prints to stderr on every process."""
    print(f"gold_jax: {line}", file=sys.stderr, flush=True)
