"""One process of a run of several, for the tests: `python one_of_several.py PART ADDRESS NUMBER INDEX [ARGUMENTS]`."""

import json
import os
import pathlib
import sys
import time

import numpy as np

from gold_jax.parallel import agreement, processes
from gold_jax.parallel.beats import WAITING
from gold_jax.parallel.watch import Watchdog


def told(name, value):
    # In one piece, and on a line of its own: Gloo speaks at the same time.
    os.write(1, f"\n@{name} {json.dumps(value)}\n".encode())


def exchange(me):
    """What the processes can tell each other."""
    told("names", processes.names())
    told("first", processes.is_first())
    big = np.array([2**40 + me, -(2**62) - me, me], np.int64)
    told("gather", agreement.all_gather(big).tolist())
    told("total", agreement.all_reduce_sum(np.array([2**40 + me, me], np.int64)).tolist())
    told("largest", agreement.all_reduce_max(np.array([-me, 2**53 + me], np.int64)).tolist())
    exact = np.array([np.nan, -0.0, 1e-310, np.pi + me])
    told("float64", [row.tobytes().hex() for row in agreement.all_gather(exact)])
    told("own", exact.tobytes().hex())
    told("scalar", agreement.all_reduce_sum(np.float32(0.5 + me)).tolist())
    told("many", int(agreement.all_gather(np.full(5000, me, np.int64))[1].sum()))
    rows = [np.arange(me, dtype=np.int32), np.full(3, 2**31 - 1 - me, np.int32)] if me else []
    told("ragged", [[row.tolist() for row in one] for one in agreement.all_gather_ragged(rows)])
    long = [np.arange(3000 * me + 1, dtype=np.int32)]
    told("long", [len(one[0]) for one in agreement.all_gather_ragged(long)])
    agreement.assert_same_across_processes("--seed", 3)
    for what, value in [("--seed", me), ("the settings", {"lr": 0.1, "batch": 4 + me})]:
        try:
            agreement.assert_same_across_processes(what, value)
        except ValueError as error:
            told("differ", str(error))
    try:
        agreement.all_gather(np.zeros(2 + me))
    except ValueError as error:
        told("shapes", str(error))


def lag(me):
    """Process 1 takes its time; both end well."""
    with Watchdog(lambda line: told("said", line), period=0.2, lost_after=4, lag_after=1.0) as watch:
        watch.at(1, "making the batch")
        time.sleep(3 * me)
        watch.at(1, WAITING)
        agreement.all_reduce_sum(np.arange(2))
        watch.at(1, "saving")
    told("ended", True)


def end(me, victim, how, folder):
    """One of the two is killed, stopped, or fails, while the other waits for it."""
    with Watchdog(lambda line: told("said", line), period=0.25, lost_after=4) as watch:
        watch.at(7, "making the batch")
        agreement.all_reduce_sum(np.arange(2))
        if me == int(victim):
            time.sleep(1)  # its beat is heard
            if how == "error":
                raise ValueError("row 3 has no text")
            pathlib.Path(folder, "ready").write_text(str(os.getpid()))
            time.sleep(120)
        watch.at(7, WAITING)
        agreement.all_reduce_sum(np.arange(3))
    told("ended", True)


if __name__ == "__main__":
    part, address, number, me, *arguments = sys.argv[1:]
    timeout = float(arguments.pop()) if part == "start" else 60
    processes.start(address, int(number), int(me), timeout=timeout)
    if part != "start":
        {"exchange": exchange, "lag": lag, "end": end}[part](int(me), *arguments)
