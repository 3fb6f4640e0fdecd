"""SIGTERM while no update is under way: a command that trains ends at once, and so that it is started again."""

import os
import signal

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h
_MESSAGE = b"Preempted while no update was under way; --resume_from_checkpoint latest continues from what is saved.\n"
_pids: list[int] = []  # of the process that asked for it, not of those that it forks


def end_when_preempted() -> None:
    """Has SIGTERM end this process with `EXIT_CODE`, unless something else handles it; `SignalHandler` takes its place."""
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        _pids[:] = [os.getpid()]
        signal.signal(signal.SIGTERM, end_at_once)


def end_at_once(number: int, _frame: object) -> None:
    """The handler: nothing is cleaned up, as nothing would be without it."""
    if _pids == [os.getpid()]:
        os.write(2, _MESSAGE)
        os._exit(EXIT_CODE)
    os._exit(128 + number)
