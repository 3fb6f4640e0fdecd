import json
import pathlib
import signal
import threading
import time

import jax
import pytest

from gold_jax.parallel import processes
from gold_jax.parallel.beats import WAITING, Heartbeat, Limits, PeerState, diagnose, update_peers
from gold_jax.parallel.watch import Watchdog, is_caused_by_peers

from .run_several import begin, finish, free_address, told

NAMES = ["host0 (process 0)", "host1 (process 1)", "host2 (process 2)", "host3 (process 3)"]


def beat(number=1, step=12, doing="making the batch", lasting=1.0, **more):
    return Heartbeat(number, step, doing, lasting, **more)


def judged(heard, mine=None, *, now=100.0, me=0, contact=None, named=NAMES):
    contact = now if contact is None else contact
    return diagnose(now, heard, mine or beat(), me=me, named=named, contact=contact, limits=Limits())


def test_processes_that_beat_are_well():
    assert judged({1: PeerState(beat(), 98.0), 2: PeerState(beat(doing=WAITING), 71.0)}) == []


def test_who_is_silent_for_too_long_is_lost_and_named():
    (finding,) = judged({1: PeerState(beat(), 98.0), 3: PeerState(beat(), 69.0)})
    assert (finding.kind, finding.process, finding.code) == ("lost", 3, 75)
    assert finding.line == (
        "host3 (process 3) has not answered for 31 seconds; it was at update 12, making the batch. Without it the run cannot "
        "go on: this process ends. Start the run again with --resume_from_checkpoint latest."
    )


def test_processes_of_one_host_are_lost_together():
    heard = {1: PeerState(beat(), 98.0), 2: PeerState(beat(), 70.5), 3: PeerState(beat(), 69.0)}
    (finding,) = judged(heard)
    assert finding.process == 3 and "making the batch. Nor has host2 (process 2). Without them the run" in finding.line


def test_who_finished_may_be_silent_and_who_has_not_begun_too():
    assert judged({1: PeerState(beat(state="finished"), 10.0)}) == []
    assert judged({}) == []


def test_nobody_is_lost_while_the_store_cannot_be_read_except_its_host():
    heard = {0: PeerState(beat(doing="saving"), 79.0), 1: PeerState(beat(), 60.0)}
    assert judged(heard, me=2, contact=80.0) == []
    (finding,) = judged(heard, me=2, contact=69.0)
    assert finding.process == 0 and finding.code == 75
    assert finding.line.startswith("host0 (process 0) has not answered for 31 seconds; it was at update 12, saving.")
    assert judged({1: PeerState(beat(), 60.0)}, me=0, contact=69.0) == []  # its own store: JAX sees to that


def test_an_error_of_another_process_is_repeated_at_once():
    (finding,) = judged(
        {1: PeerState(beat(state="failed", why="ValueError: no rows"), 99.9), 2: PeerState(beat(), 10.0)}
    )
    assert finding.code == 1
    assert (
        finding.line
        == "host1 (process 1) ended with an error at update 12: ValueError: no rows. This process ends too."
    )


def test_all_processes_name_the_one_that_the_first_of_them_named():
    left = beat(state="left", why="host3 (process 3) has not answered", cause=3, code=75)
    (finding,) = judged({1: PeerState(left, 99.0), 2: PeerState(beat(), 10.0)})
    assert (finding.process, finding.line, finding.code) == (3, "host3 (process 3) has not answered", 75)
    (finding,) = judged({1: PeerState(left, 99.0)}, me=3)
    assert (
        finding.line.startswith("The others ended because host3 (process 3) did not answer them") and finding.code == 75
    )


def test_who_keeps_a_process_waiting_is_named():
    mine = beat(doing=WAITING, lasting=61.0)
    heard = {
        1: PeerState(beat(lasting=70.0), 95.0),
        2: PeerState(beat(doing=WAITING), 99.0),
        3: PeerState(beat(step=13), 99.0),
    }
    (finding,) = judged(heard, mine)
    assert (finding.kind, finding.process, finding.code) == ("late", 1, None)
    assert finding.line == (
        "host1 (process 1) keeps the others waiting: it has been making the batch for 75 seconds, at update 12."
    )


def test_nobody_is_late_before_one_has_waited_long_or_where_all_wait():
    late = {1: PeerState(beat(lasting=70.0), 99.0)}
    assert judged(late, beat(doing=WAITING, lasting=59.0)) == []
    assert judged(late, beat(doing="saving", lasting=99.0)) == []
    assert judged({1: PeerState(beat(doing=WAITING, lasting=99.0), 99.0)}, beat(doing=WAITING, lasting=99.0)) == []


def test_only_the_first_of_those_that_wait_speaks():
    heard = {1: PeerState(beat(doing=WAITING), 99.0), 3: PeerState(beat(), 99.0)}
    assert judged(heard, beat(doing=WAITING, lasting=99.0), me=2) == []
    assert judged({**heard, 1: PeerState(beat(), 99.0)}, beat(doing=WAITING, lasting=99.0), me=2)


def test_who_finished_while_others_wait_is_named():
    (finding,) = judged({1: PeerState(beat(step=11, state="finished"), 10.0)}, beat(doing=WAITING, lasting=99.0))
    assert finding.line == "host1 (process 1) finished its run at update 11; this process waits for it at update 12."


def test_only_a_new_beat_counts_as_heard():
    first = update_peers({}, {0: json.dumps(beat(1)), 1: json.dumps(beat(1)), 2: "not a beat"}, 0, 5.0)
    assert first == {1: PeerState(beat(1), 5.0)}
    assert update_peers(first, {1: json.dumps(beat(1))}, 0, 7.0)[1].at == 5.0
    assert update_peers(first, {1: json.dumps(beat(2))}, 0, 7.0)[1].at == 7.0


def test_errors_that_may_come_from_another_process_are_known():
    broken = jax.errors.JaxRuntimeError("UNKNOWN: Gloo AllGather failed: Connection closed by peer [127.0.0.1]:20883")
    assert is_caused_by_peers(broken)
    assert is_caused_by_peers(
        ValueError("UNKNOWN: Gloo AllGather failed: Read error [::1]:20883: Connection reset by peer")
    )
    wrapped = ValueError("could not save")
    wrapped.__cause__ = broken
    assert is_caused_by_peers(wrapped)
    assert not is_caused_by_peers(jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes"))
    assert not is_caused_by_peers(ValueError("Connection closed by peer")) and not is_caused_by_peers(None)


class Client:
    """The store of JAX, and the one other process that tests play."""

    def __init__(self):
        self.kept, self.prefix, self.broken = {}, None, False

    def key_value_set(self, key, text, allow_overwrite=False):
        if self.broken:
            raise RuntimeError("UNAVAILABLE")
        assert allow_overwrite
        self.kept[key] = text
        self.prefix = key[: key.rindex("/") + 1]

    def key_value_dir_get(self, prefix):
        if self.broken:
            raise RuntimeError("UNAVAILABLE")
        return [(key, text) for key, text in self.kept.items() if key.startswith(prefix)]

    def says(self, process, *values, **more):
        self.kept[f"{self.prefix}{process}"] = json.dumps(beat(*values, **more))

    def said(self, process):
        return Heartbeat(*json.loads(self.kept[f"{self.prefix}{process}"]))


@pytest.fixture
def client(monkeypatch):
    client = Client()
    monkeypatch.setattr(processes, "count", lambda: 2)
    monkeypatch.setattr(processes, "index", lambda: 0)
    monkeypatch.setattr(processes, "names", lambda: tuple(NAMES[:2]))
    monkeypatch.setattr(processes, "coordination", lambda: client)
    return client


class Run:
    """A watch that is quick, what it said, and the code that it would have ended with."""

    def __init__(self, **limits):
        self.lines, self.codes, self.ended = [], [], threading.Event()
        limits = {"period": 0.02, "lost_after": 0.3, "lag_after": 0.1} | limits
        self.watch = Watchdog(self.lines.append, end=self.end, **limits)

    def end(self, code):
        self.codes.append(code)
        self.ended.set()


def until(happened, seconds=5):
    limit = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < limit
        time.sleep(0.005)


def test_a_process_says_what_it_does_and_that_it_finished(client):
    run = Run()
    with run.watch as watch:
        assert watch.watching
        watch.at(3, "saving")
        until(lambda: client.prefix and client.said(0).doing == "saving" and client.said(0).lasting > 0.1)
        watch.at(3, "saving")  # still
        assert client.said(0).step == 3 and client.said(0).state == "running"
    assert client.said(0).state == "finished" and run.lines == [] and run.codes == []
    last = client.said(0)
    time.sleep(0.1)
    assert client.said(0) == last and not {"watch_talk", "watch_look"} & {t.name for t in threading.enumerate()}


def test_a_lost_process_is_said_and_ends_this_one(client):
    run = Run()
    with run.watch:
        until(lambda: client.prefix)
        client.says(1)
        assert run.ended.wait(5)
    assert run.codes == [75] and len(run.lines) == 1
    assert run.lines[0].startswith("host1 (process 1) has not answered for 0 seconds; it was at update 12")
    assert client.said(0).state == "left" and client.said(0).cause == 1 and client.said(0).code == 75


def test_a_failed_process_ends_this_one_unless_its_own_error_comes_first(client):
    run = Run()
    with run.watch:
        until(lambda: client.prefix)
        client.says(1, state="failed", why="ValueError: no rows")
        assert run.ended.wait(5)
    assert run.codes == [1] and "ended with an error at update 12: ValueError: no rows" in run.lines[0]


def test_a_process_that_beats_is_not_lost(client):
    run = Run(lost_after=1)
    with run.watch:
        until(lambda: client.prefix)
        for number in range(30):
            client.says(1, number)
            time.sleep(0.05)
        client.says(1, 99, state="finished")
        time.sleep(1.2)
    assert run.lines == [] and run.codes == []


def test_a_store_that_does_not_answer_is_the_end_of_process_0(client, monkeypatch):
    monkeypatch.setattr(processes, "index", lambda: 1)
    run = Run()
    with run.watch:
        until(lambda: client.prefix)
        client.says(0)
        time.sleep(0.1)
        client.broken = True
        assert run.ended.wait(5)
    assert run.codes == [75] and run.lines[0].startswith("host0 (process 0) has not answered")


@pytest.mark.parametrize(
    "answers, line", [(False, "host0 (process 0) is gone: nothing answers at h:1 any"), (True, None)]
)
def test_an_abort_is_blamed_on_process_0_where_that_is_gone(client, monkeypatch, answers, line):
    monkeypatch.setattr(processes, "index", lambda: 1)
    monkeypatch.setattr(processes, "coordinator_address", lambda: "h:1")
    monkeypatch.setattr(processes, "answers", lambda *_: answers)
    run = Run(lost_after=30)
    with run.watch:
        until(lambda: client.prefix)
        client.says(0)
        time.sleep(0.1)
        run.watch._aborted()  # as JAX's runtime has it called
        assert run.codes == ([75] if line else []) and [said[: len(line)] for said in run.lines] == (
            [line] if line else []
        )


def test_who_lags_is_said_once_for_each_update(client):
    run = Run(lost_after=30)
    with run.watch as watch:
        until(lambda: client.prefix)
        client.says(1, 1, step=12)
        for step in (12, 13):
            watch.at(step, WAITING)
            until(lambda: len(run.lines) == step - 11)  # noqa: B023
            time.sleep(0.1)
    assert len(run.lines) == 2 and all("keeps the others waiting" in line for line in run.lines) and run.codes == []


def test_an_error_is_told_to_the_others_in_one_line(client):
    run = Run()
    with pytest.raises(ValueError), run.watch as watch:
        watch.at(4, "making the batch")
        raise ValueError("row 3\nhas no text.")
    assert client.said(0).state == "failed" and client.said(0).why == "ValueError: row 3 has no text"
    assert client.said(0).step == 4 and run.codes == []
    run.watch._held.close()


@pytest.mark.parametrize("code, state", [(0, "finished"), (75, "finished"), (2, "failed")])
def test_a_run_that_ends_for_preemption_has_not_failed(client, code, state):
    run = Run()
    with pytest.raises(SystemExit), run.watch:
        raise SystemExit(code)
    assert client.said(0).state == state
    run.watch._held.close()


def test_a_broken_connection_is_explained_by_the_loss_behind_it(client):
    run = Run()
    error = jax.errors.JaxRuntimeError("Gloo AllGather failed: Connection closed by peer")
    with pytest.raises(jax.errors.JaxRuntimeError), run.watch as watch:
        until(lambda: client.prefix)
        client.says(1)
        assert watch.describe_peer_failure(ValueError("something else")) is None
        assert watch.describe_peer_failure(error) == run.watch._finding.line
        raise error
    assert run.codes == [75] and len(run.lines) == 1 and client.said(0).state == "left"


def test_a_broken_connection_that_nobody_explains_is_an_error_like_others(client):
    run = Run()
    with pytest.raises(jax.errors.JaxRuntimeError), run.watch:
        raise jax.errors.JaxRuntimeError("Connection closed by peer")
    assert client.said(0).state == "failed" and run.codes == []
    run.watch._held.close()


def test_watches_one_after_the_other_do_not_hear_each_other(client):
    with Run().watch:
        until(lambda: client.prefix)
        client.says(1, state="failed", why="of the run before")
        before = client.prefix
    run = Run()
    with run.watch:
        until(lambda: client.prefix != before)
        time.sleep(0.2)
    assert run.lines == []


def test_a_version_of_jax_without_the_store_is_said(client, monkeypatch):
    monkeypatch.setattr(processes, "coordination", lambda: None)
    run = Run()
    with run.watch as watch:
        watch.at(1, WAITING)
        assert not watch.watching and watch.describe_peer_failure(ValueError()) is None
    assert len(run.lines) == 1 and "do not watch each other" in run.lines[0]


def test_a_single_process_watches_nobody():
    before = threading.active_count()
    with Run().watch as watch:
        watch.at(1, WAITING)
        assert not watch.watching and threading.active_count() == before
        assert watch.describe_peer_failure(ValueError()) is None


def test_a_slow_process_is_named_and_a_clean_end_is_no_loss():
    address = free_address()
    started = [begin("lag", address, 2, i) for i in range(2)]
    (first, out, err), (second, other, _) = map(finish, started)
    assert first == second == 0, err[-3000:]
    (said, line), *others = told(out)
    assert said == "said" and "(process 1) keeps the others waiting: it has been making the batch for" in line
    assert others == told(other) == [("ended", True)]


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("how", ["SIGKILL", "SIGSTOP", "error"])
def test_no_process_waits_for_ever_for_one_that_is_gone(victim, how, tmp_path):
    address = free_address()
    started = [begin("end", address, 2, i, victim, how, tmp_path) for i in range(2)]
    try:
        if how != "error":
            until(lambda: pathlib.Path(tmp_path, "ready").exists(), 60)
            started[victim].send_signal(getattr(signal, how))
        began = time.monotonic()
        code, out, err = finish(started[1 - victim], 60)
        took = time.monotonic() - began
    finally:
        if how != "error":
            started[victim].kill()
        gone, _, why = finish(started[victim])
    said = [line for name, line in told(out) if name == "said"]
    assert len(said) == 1 and f"(process {victim})" in said[0], err[-3000:]
    if how == "error":
        assert code == 1 and gone == 1 and "ValueError: row 3 has no text" in why
        assert "ended with an error at update 7: ValueError: row 3 has no text." in said[0]
    else:
        assert code == 75 and took < 4 + 6
        assert "update 7, making the batch" in said[0] and "--resume_from_checkpoint latest" in said[0]
