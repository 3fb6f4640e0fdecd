"""One process of a run of several, for the tests: `python one_of_several.py PART ADDRESS NUMBER INDEX [ARGUMENTS]`."""

import json
import os
import pathlib
import sys
import time

import numpy as np

from gold_jax.distributed import consensus
from gold_jax.distributed.initialize import initialize, is_main_process, process_names
from gold_jax.distributed.watchdog import WAITING, PeerFailed, PeerLost, Watchdog, end_process

TIMEOUT = 10  # seconds of silence after which JAX ends a process


def told(name, value):
    # In one piece, and on a line of its own: Gloo speaks at the same time.
    os.write(1, f"\n@{name} {json.dumps(value)}\n".encode())


def exchange(me):
    """What the processes can tell each other."""
    told("names", process_names())
    told("first", is_main_process())
    big = np.array([2**40 + me, -(2**62) - me, me], np.int64)
    told("gather", consensus.all_gather(big).tolist())
    told("total", consensus.all_reduce_sum(np.array([2**40 + me, me], np.int64)).tolist())
    told("largest", consensus.all_reduce_max(np.array([-me, 2**53 + me], np.int64)).tolist())
    exact = np.array([np.nan, -0.0, 1e-310, np.pi + me])
    told("float64", [row.tobytes().hex() for row in consensus.all_gather(exact)])
    told("own", exact.tobytes().hex())
    told("scalar", consensus.all_reduce_sum(np.float32(0.5 + me)).tolist())
    told("many", int(consensus.all_gather(np.full(5000, me, np.int64))[1].sum()))
    rows = [np.arange(me, dtype=np.int32), np.full(3, 2**31 - 1 - me, np.int32)] if me else []
    told("ragged", [[row.tolist() for row in one] for one in consensus.all_gather_ragged(rows)])
    long = [np.arange(3000 * me + 1, dtype=np.int32)]
    told("long", [len(one[0]) for one in consensus.all_gather_ragged(long)])
    consensus.assert_same_across_processes("--seed", 3)
    for what, value in [("--seed", me), ("the settings", {"lr": 0.1, "batch": 4 + me})]:
        try:
            consensus.assert_same_across_processes(what, value)
        except ValueError as error:
            told("differ", str(error))
    try:
        consensus.all_gather(np.zeros(2 + me))
    except ValueError as error:
        told("shapes", str(error))


def lag(me):
    """Process 1 takes its time; both end well."""
    with Watchdog(8, lambda line: told("said", line), late_after=1.0) as watchdog:
        watchdog.report(1, "making the batch")
        time.sleep(3 * me)
        watchdog.report(1, WAITING)
        consensus.all_reduce_sum(np.arange(2))
        watchdog.report(1, "saving")
    told("ended", True)


def end(me, victim, how, folder):
    """One of the two is killed, stopped, or fails, while the other waits for it."""
    with Watchdog(TIMEOUT, lambda line: told("said", line)) as watchdog:
        watchdog.report(7, "making the batch")
        consensus.all_reduce_sum(np.arange(2))
        if me == int(victim):
            time.sleep(1)  # its beat is heard
            if how == "error":
                raise ValueError("row 3 has no text")
            pathlib.Path(folder, "ready").write_text(str(os.getpid()))
            time.sleep(120)
        watchdog.report(7, WAITING)
        consensus.all_reduce_sum(np.arange(3))
    told("ended", True)


def disagree(me):
    """Process 1 fails before it comes to where the others wait for it."""
    if me == 1:
        raise ValueError("row 3 has no text")
    consensus.assert_same_across_processes("--seed", 3)


if __name__ == "__main__":
    part, address, number, me, *arguments = sys.argv[1:]
    timeout = float(arguments.pop()) if part == "start" else 60
    initialize(address, int(number), int(me), timeout=timeout, heartbeat_timeout=TIMEOUT)
    parts = {"exchange": exchange, "lag": lag, "end": end, "disagree": disagree, "start": lambda me: None}
    try:
        parts[part](int(me), *arguments)
    except BaseException as error:
        if isinstance(error, PeerLost | PeerFailed):  # as a command says them
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            end_process(SystemExit(error.exit_code))
        end_process(error)
        raise
    end_process(None)
