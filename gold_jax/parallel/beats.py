"""What processes say of themselves every few seconds, and what follows from it: who is lost, who failed, who is late."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import NamedTuple

WAITING = "waiting for the device"
EX_TEMPFAIL = 75  # of sysexits.h: what failed will succeed if it is started again
RESTART_HINT = "Start the run again with --resume_from_checkpoint latest."


class Heartbeat(NamedTuple):
    """What a process says of itself every few seconds.

    Attributes:
        number: grows with every beat.
        step: the update that it is at.
        doing: and what it does there, such as "making the batch".
        lasting: for how many seconds, by its own clock.
        state: "running"; "finished"; "failed", with the error in `why`; "left", because of process `cause`, with the
            line that it said in `why` and its exit code in `code`.
    """

    number: int
    step: int
    doing: str
    lasting: float
    state: str = "running"
    why: str = ""
    cause: int = -1
    code: int = 0


class PeerState(NamedTuple):
    """The newest beat of another process, and when it was new, by this process's clock."""

    beat: Heartbeat
    at: float


class Limits(NamedTuple):
    """Seconds: between beats, until a process is taken for lost, and until one that the others wait for is named."""

    period: float = 2.0
    lost_after: float = 30.0
    lag_after: float = 60.0


class PeerProblem(NamedTuple):
    """What is wrong with a process.

    Attributes:
        kind: "lost", "failed", "left" or "late".
        process: its index.
        line: what to say.
        code: with which this process is to end; None where it goes on.
    """

    kind: str
    process: int
    line: str
    code: int | None = None


def diagnose(
    now: float,
    heard: Mapping[int, PeerState],
    mine: Heartbeat,
    *,
    me: int,
    named: Sequence[str],
    contact: float,
    limits: Limits,
) -> list[PeerProblem]:
    """What is wrong with the other processes; what ends the run first.

    Args:
        now: this process's clock, in seconds.
        heard: the others' newest beats; who has not begun to beat is not in it, and not missed.
        mine: what this process is doing.
        me: its index.
        named: what to call each process.
        contact: when the store last answered.
        limits: after how long something is wrong.
    """
    for process, (beat, _) in heard.items():
        if beat.state == "left" and beat.cause == me:
            line = f"The others ended because {named[me]} did not answer them: this process ends too. {RESTART_HINT}"
            return [PeerProblem("left", process, line, beat.code)]
        if beat.state == "left":
            return [PeerProblem("left", beat.cause, beat.why, beat.code)]
    for process, (beat, _) in heard.items():
        if beat.state == "failed":
            line = f"{named[process]} ended with an error at update {beat.step}: {beat.why}. This process ends too."
            return [PeerProblem("failed", process, line, 1)]
    if me != 0 and now - contact > limits.lost_after:
        return [lost(0, heard, named, f"has not answered for {now - contact:.0f} seconds")]
    # What is not read cannot be new: a beat's age is that of the last answer.
    silent = {p: contact - h.at for p, h in heard.items() if h.beat.state == "running"}
    gone = [p for p in silent if silent[p] > limits.lost_after]
    if gone:
        first = max(gone, key=silent.get)
        with_it = [named[p] for p in silent if p != first and silent[p] > limits.lost_after / 2]
        return [lost(first, heard, named, f"has not answered for {silent[first]:.0f} seconds", with_it)]
    late = _late(heard, mine, me, named, silent, limits)
    return [] if late is None else [late]


def lost(
    process: int, heard: Mapping[int, PeerState], named: Sequence[str], what: str, with_it: Sequence[str] = ()
) -> PeerProblem:
    """What is said of a process that is lost, and of those that are silent with it."""
    line = f"{named[process]} {what}"
    if process in heard:
        line += f"; it was at update {heard[process].beat.step}, {heard[process].beat.doing}"
    if with_it:
        line += f". Nor {'has' if len(with_it) == 1 else 'have'} {', '.join(with_it[:7])}{', …' * (len(with_it) > 7)}"
    line += f". Without {'them' if with_it else 'it'} the run cannot go on: this process ends. {RESTART_HINT}"
    return PeerProblem("lost", process, line, EX_TEMPFAIL)


def _late(
    heard: Mapping[int, PeerState],
    mine: Heartbeat,
    me: int,
    named: Sequence[str],
    silent: Mapping[int, float],
    limits: Limits,
) -> PeerProblem | None:
    """Who keeps a process waiting that has waited long enough; the first of those that wait says it."""
    if mine.doing != WAITING or mine.lasting <= limits.lag_after:
        return None
    if any(p < me and heard[p].beat.doing == WAITING for p in silent):
        return None
    lasting = {}
    for process, (beat, _) in heard.items():
        if beat.state == "finished":
            line = f"{named[process]} finished its run at update {beat.step}; this process waits for it at update {mine.step}."
            return PeerProblem("late", process, line)
        if beat.doing != WAITING and beat.step <= mine.step:
            lasting[process] = beat.lasting + silent[process]
    if not lasting:
        return None
    slowest = max(lasting, key=lasting.get)
    beat = heard[slowest].beat
    line = (
        f"{named[slowest]} keeps the others waiting: it has been {beat.doing} for {lasting[slowest]:.0f} seconds, at update "
        f"{beat.step}{f'; {len(lasting) - 1} more are not done either' if len(lasting) > 1 else ''}."
    )
    return PeerProblem("late", slowest, line)


def update_peers(heard: Mapping[int, PeerState], texts: Mapping[int, str], me: int, now: float) -> dict[int, PeerState]:
    """What is known of the others after the store was read."""
    known = dict(heard)
    for process, text in texts.items():
        if process == me:
            continue
        try:
            beat = Heartbeat(*json.loads(text))
        except (TypeError, ValueError):
            continue
        if process not in known or known[process].beat.number != beat.number:
            known[process] = PeerState(beat, now)
    return known
