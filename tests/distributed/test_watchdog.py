import json
import pathlib
import signal
import threading
import time

import jax
import pytest

from gold_jax.distributed import watchdog as module
from gold_jax.distributed.watchdog import (
    WAITING,
    Heartbeat,
    PeerFailed,
    PeerLost,
    Watchdog,
    comes_from_peer,
    diagnose,
    report_failure,
    update_peers,
)
from gold_jax.training.signals import Preempted

from .run_several import begin, finish, free_address, told

NAMES = ["host0 (process 0)", "host1 (process 1)", "host2 (process 2)", "host3 (process 3)"]


def beat(count=1, step=12, activity="making the batch", seconds=1.0, **more):
    return Heartbeat(count, step, activity, seconds, **more)


def diagnosed(peers, own=None, failures=()):
    return diagnose(100.0, peers, dict(failures), own or beat(), NAMES, (30, 60))


def test_processes_that_send_heartbeats_are_well():
    assert diagnosed({1: (beat(), 98.0), 2: (beat(activity=WAITING), 71.0)}) is None


def test_who_is_silent_for_too_long_is_lost_and_named():
    found = diagnosed({1: (beat(), 98.0), 3: (beat(), 69.0)})
    assert found == (
        ("lost", 3),
        "host3 (process 3) has not answered for 31 seconds; it was at update 12, making the batch. Start the run again with "
        "--resume_from_checkpoint latest.",
    )


def test_processes_of_one_host_are_lost_together():
    found = diagnosed({1: (beat(), 98.0), 2: (beat(), 69.5), 3: (beat(), 69.0)})
    assert found[0] == ("lost", 3) and "making the batch. Nor has host2 (process 2). Start" in found[1]


def test_who_finished_may_be_silent_and_who_has_not_begun_too():
    assert diagnosed({1: (beat(finished=True), 10.0)}) is None
    assert diagnosed({}) is None


def test_an_error_of_another_process_is_named_before_one_that_is_lost():
    found = diagnosed({2: (beat(), 10.0)}, failures={1: "ValueError: no rows"})
    assert found == (("failed", 1), "host1 (process 1) ended with an error: ValueError: no rows.")


def test_who_keeps_a_process_waiting_is_named():
    own = beat(activity=WAITING, seconds=61.0)
    peers = {
        1: (beat(seconds=70.0), 95.0),
        2: (beat(activity=WAITING), 99.0),
        3: (beat(step=13), 99.0),
    }
    found = diagnosed(peers, own)
    assert found == (
        ("late", 1, 12, "making the batch"),
        "host1 (process 1) keeps the others waiting: it has been making the batch for 75 seconds, at update 12.",
    )


def test_nobody_is_late_before_one_has_waited_long_or_where_all_wait():
    late = {1: (beat(seconds=70.0), 99.0)}
    assert diagnosed(late, beat(activity=WAITING, seconds=59.0)) is None
    assert diagnosed(late, beat(activity="saving", seconds=99.0)) is None
    all_wait = {1: (beat(activity=WAITING, seconds=99.0), 99.0)}
    assert diagnosed(all_wait, beat(activity=WAITING, seconds=99.0)) is None


def test_who_is_silent_for_half_the_timeout_is_lost_and_who_is_waited_for_twice_as_long_is_late():
    for options, late in ({}, 60), ({"late_after": 5}, 5):
        watchdog = Watchdog(30, **options)
        assert (watchdog._lost_after, watchdog._late_after) == (15, late)


def test_only_a_new_heartbeat_counts_as_seen():
    first = update_peers({}, {0: json.dumps(beat(1)), 1: json.dumps(beat(1))}, 0, 5.0)
    assert first == {1: (beat(1), 5.0)}
    assert update_peers(first, {1: json.dumps(beat(1))}, 0, 7.0)[1][1] == 5.0
    assert update_peers(first, {1: json.dumps(beat(2))}, 0, 7.0)[1][1] == 7.0


def test_errors_that_may_come_from_another_process_are_known():
    broken = jax.errors.JaxRuntimeError("UNKNOWN: Gloo AllGather failed: Connection closed by peer [127.0.0.1]:20883")
    assert comes_from_peer(broken)
    assert comes_from_peer(
        ValueError("UNKNOWN: Gloo AllGather failed: Read error [::1]:20883: Connection reset by peer")
    )
    wrapped = ValueError("could not save")
    wrapped.__cause__ = broken
    assert comes_from_peer(wrapped)
    assert not comes_from_peer(jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes"))
    assert not comes_from_peer(ValueError("Connection closed by peer")) and not comes_from_peer(None)


class Client:
    """The store of JAX, and the one other process that tests play."""

    def __init__(self):
        self.kept, self.broken = {}, False

    def key_value_set(self, key, text, allow_overwrite=False):
        if self.broken:
            raise jax.errors.JaxRuntimeError("UNAVAILABLE")
        assert allow_overwrite
        self.kept[key] = text

    def key_value_dir_get(self, prefix):
        if self.broken:
            raise jax.errors.JaxRuntimeError("UNAVAILABLE")
        return [(key, text) for key, text in self.kept.items() if key.startswith(prefix)]

    def key_value_delete(self, key):
        self.kept.pop(key, None)

    def peer_sends(self, *values, **more):
        self.kept["gold_jax/heartbeat/1"] = json.dumps(beat(*values, **more))

    def peer_fails(self, error):
        self.kept["gold_jax/failure/1"] = error

    @property
    def sent(self):
        return Heartbeat(*json.loads(self.kept["gold_jax/heartbeat/0"]))


@pytest.fixture
def client(monkeypatch):
    client = Client()
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(module, "process_id", lambda: 0)
    monkeypatch.setattr(module, "process_names", lambda: tuple(NAMES[:2]))
    monkeypatch.setattr(module, "coordination_client", lambda: client)
    return client


class Run:
    """A watchdog that is quick, and what it logged."""

    def __init__(self, timeout=0.6, late_after=0.1):
        self.lines = []
        self.watchdog = Watchdog(timeout, self.lines.append, late_after=late_after)


def until(happened, seconds=5):
    limit = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < limit
        time.sleep(0.005)


def test_a_process_sends_what_it_does_and_that_it_finished(client):
    run = Run()
    with run.watchdog as watchdog:
        watchdog.report(3, "saving")
        until(lambda: client.kept and client.sent.activity == "saving" and client.sent.seconds > 0.1)
        watchdog.report(3, "saving")  # still
        assert client.sent.step == 3 and not client.sent.finished
    assert client.sent.finished and run.lines == []
    last = client.sent
    time.sleep(0.1)
    assert client.sent == last and "watchdog" not in {t.name for t in threading.enumerate()}


def test_nothing_happens_before_a_watchdog_is_entered(client):
    run = Run()
    run.watchdog.report(1, WAITING)
    with run.watchdog.waiting():
        time.sleep(0.1)
    assert client.kept == {} and "watchdog" not in {t.name for t in threading.enumerate()}


def test_a_lost_process_is_logged_once_and_ends_nothing(client):
    run = Run()
    with run.watchdog:
        client.peer_sends()
        until(lambda: run.lines)
        time.sleep(0.2)
    assert len(run.lines) == 1
    assert run.lines[0].startswith("host1 (process 1) has not answered for 0 seconds; it was at update 12")


def test_a_failed_process_is_logged_once(client):
    run = Run()
    with run.watchdog:
        client.peer_fails("ValueError: no rows")
        until(lambda: run.lines)
        time.sleep(0.2)
    assert run.lines == ["host1 (process 1) ended with an error: ValueError: no rows."]


def test_a_process_that_sends_heartbeats_is_not_lost(client):
    run = Run(timeout=2)
    with run.watchdog:
        for number in range(30):
            client.peer_sends(number)
            time.sleep(0.05)
        client.peer_sends(99, finished=True)
        time.sleep(1.2)
    assert run.lines == []


def test_a_store_that_does_not_answer_makes_nobody_lost(client):
    run = Run()
    with run.watchdog:
        client.peer_sends()
        time.sleep(0.1)
        client.broken = True
        time.sleep(0.5)
    assert run.lines == []


def test_a_store_that_hangs_is_the_loss_of_process_0(client, monkeypatch):
    monkeypatch.setattr(client, "key_value_dir_get", lambda _: time.sleep(1) or [])
    monkeypatch.setattr(module, "process_id", lambda: 1)
    run = Run()
    with run.watchdog:
        until(lambda: run.lines)
    assert run.lines[0].startswith("host0 (process 0) has not answered for 0 seconds.")


def test_who_lags_is_logged_once_for_each_update(client):
    run = Run(timeout=60)
    run.watchdog._period = 0.02
    with run.watchdog as watchdog:
        for step in (12, 13):
            client.peer_sends(step, step=step)
            watchdog.report(step, WAITING)
            until(lambda: len(run.lines) == step - 11)  # noqa: B023
            time.sleep(0.1)
    assert len(run.lines) == 2 and all("keeps the others waiting" in line for line in run.lines)


def test_an_error_is_told_to_the_others_in_one_line_until_the_next_run(client):
    with pytest.raises(ValueError), Run().watchdog:
        raise ValueError("row 3\nhas no text.")
    assert client.kept["gold_jax/failure/0"] == "ValueError: row 3 has no text" and client.sent.finished
    with Run().watchdog:
        assert "gold_jax/failure/0" not in client.kept


@pytest.mark.parametrize("error", [Preempted(), PeerLost("host1 is lost"), PeerFailed("host1 failed")])
def test_preemption_and_what_comes_of_others_are_no_failure(client, error):
    with pytest.raises(type(error)), Run().watchdog:
        raise error
    assert "gold_jax/failure/0" not in client.kept


def test_a_broken_connection_is_explained_by_the_process_behind_it(client):
    error = jax.errors.JaxRuntimeError("UNKNOWN: Gloo AllGather failed: Connection closed by peer")
    run = Run()
    with pytest.raises(PeerLost, match=r"host1 \(process 1\) has not answered") as found, run.watchdog:
        client.peer_sends()
        time.sleep(0.1)
        raise error
    assert found.value.__cause__ is error and found.value.exit_code == 75 and len(run.lines) == 1
    with pytest.raises(PeerFailed, match="ended with an error: ValueError: no rows") as found, Run().watchdog:
        client.peer_fails("ValueError: no rows")
        raise error
    assert found.value.exit_code == 1


def test_a_broken_connection_that_nobody_explains_is_an_error_like_others(client):
    with pytest.raises(jax.errors.JaxRuntimeError), Run().watchdog:
        raise jax.errors.JaxRuntimeError("Connection closed by peer")
    assert "Connection closed" in client.kept["gold_jax/failure/0"]


def test_a_store_that_hangs_does_not_hold_up_the_end(client, monkeypatch):
    monkeypatch.setattr(client, "key_value_set", lambda *_, **__: time.sleep(30))
    began = time.monotonic()
    report_failure(ValueError("no rows"))
    assert time.monotonic() - began < 5


def test_a_version_of_jax_without_the_store_is_not_watched(client, monkeypatch):
    monkeypatch.setattr(module, "coordination_client", lambda: None)
    with Run().watchdog as watchdog:
        watchdog.report(1, WAITING)
        assert "watchdog" not in {t.name for t in threading.enumerate()}


def test_a_single_process_watches_nobody():
    before = threading.active_count()
    with Run().watchdog as watchdog:
        watchdog.report(1, WAITING)
        assert threading.active_count() == before
    assert module.end_process(ValueError("no rows")) is None


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
        code, out, err = finish(started[1 - victim], 300)
    finally:
        if how != "error":
            started[victim].kill()
        gone, _, why = finish(started[victim])
    said = [line for name, line in told(out) if name == "said"]
    if how == "error":
        assert gone == 1 and "ValueError: row 3 has no text" in why
        assert said and f"(process {victim}) ended with an error: ValueError: row 3 has no text." in said[0], err[
            -3000:
        ]
    elif (how, victim) == ("SIGKILL", 0):  # JAX ends the others before anything can be logged
        assert "leader" in err, err[-3000:]
    else:
        assert said and f"(process {victim}) has not answered" in said[0], err[-3000:]
        assert victim == 0 or "update 7, making the batch" in said[0]  # process 0 keeps what the processes say
        assert "--resume_from_checkpoint latest" in said[0]
    # JAX aborts who waits at the device; who got an error from there ends with it.
    assert code in (-signal.SIGABRT, 1 if how == "error" else 75)
