import os
import signal
import subprocess
import sys
import threading

import pytest

from gold_jax.training.signals import InterruptedTwice, SignalHandler


def send(number):
    os.kill(os.getpid(), number)


@pytest.fixture(autouse=True)
def usual_handlers():
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number, asked", [(signal.SIGINT, "interrupt"), (signal.SIGTERM, "preemption")])
def test_a_signal_is_held_until_the_run_looks(number, asked):
    with SignalHandler() as signals:
        assert signals.requested is None
        send(number)
        assert signals.requested == asked


def test_what_may_be_cut_short_is_and_gives_nothing():
    after = []

    def part(x):
        send(signal.SIGTERM)
        after.append(x)

    with SignalHandler() as signals:
        assert signals.interruptible(lambda x: x + 1, 2) == 3
        assert signals.interruptible(part, 1) is None
        assert signals.requested == "preemption" and after == []
        assert signals.interruptible(part, 1) is None  # not even begun


def test_an_error_of_what_may_be_cut_short_is_not_hidden():
    with SignalHandler() as signals, pytest.raises(ZeroDivisionError):
        signals.interruptible(lambda: 1 / 0)


def test_a_second_ctrl_c_ends_at_once_and_a_second_sigterm_does_not():
    with SignalHandler():
        send(signal.SIGTERM)
        send(signal.SIGTERM)
    with SignalHandler():
        send(signal.SIGINT)
        with pytest.raises(InterruptedTwice):
            send(signal.SIGINT)


def test_signals_are_as_before_afterwards_and_those_of_others_are_left_alone():
    with SignalHandler():
        pass
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    heard = []
    signal.signal(signal.SIGTERM, lambda *_: heard.append(1))
    with SignalHandler() as signals:
        send(signal.SIGTERM)
    assert heard == [1] and signals.requested is None


def test_outside_the_main_thread_nothing_is_touched():
    seen = []

    def elsewhere():
        with SignalHandler() as signals:
            seen.append((signal.getsignal(signal.SIGTERM), signals.requested))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == [(signal.SIG_DFL, None)]


def test_a_preempted_command_ends_with_75():
    code = (
        "from gold_jax.cli import run; from gold_jax.training.signals import InterruptedTwice, Preempted\n"
        "def main(_): raise Preempted\n"
        "run('gold_jax.train', main, [])"
    )
    ended = subprocess.run([sys.executable, "-c", code], timeout=120, capture_output=True, text=True)
    assert ended.returncode == 75 and ended.stderr == ""


def test_sigterm_ends_a_command_that_trains_so_that_it_is_started_again_before_its_first_update_too():
    program = """
import os, signal
from gold_jax import cli
from gold_jax.training.signals import SignalHandler

def main(argv):
    with SignalHandler() as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.requested == "preemption"
    if not os.fork():
        os.kill(os.getpid(), signal.SIGTERM)
    assert os.waitstatus_to_exitcode(os.wait()[1]) == 143
    os.kill(os.getpid(), signal.SIGTERM)

cli.run("gold_jax.sft", main, resumable=True)
"""
    environment = os.environ | {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}  # a program from a text cannot be restarted
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.returncode == 75 and done.stderr.count("Preempted while no update was under way") == 1
