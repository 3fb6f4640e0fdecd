"""From a trace's events to seconds: every moment of a step is given to one part of the work, or to none.

Operations lie in each other (a loop and what it runs) and beside each other (threads of a CPU, streams of a GPU). A
moment of a thread belongs to the innermost operation there; where several run at once, they share it equally. So the
parts add up to the time in which the device was busy, and with its idle time to the step's.
"""

import bisect
import collections
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from gold_jax.training.trace import Span


def innermost(spans: Iterable[Span]) -> Iterator[Span]:
    """Spans of one thread, which may lie in each other, cut into stretches that belong to the innermost one each."""
    open_: list[Span] = []
    at = float("-inf")

    def close(until: float) -> Iterator[Span]:
        nonlocal at
        while open_ and open_[-1].end <= until:
            top = open_.pop()
            if at < top.end:
                yield Span(at, top.end, top.what)
                at = top.end

    for span in sorted(spans, key=lambda s: (s.start, -s.end)):
        yield from close(span.start)
        if open_ and at < span.start:
            yield Span(at, span.start, open_[-1].what)
        open_.append(span)
        at = max(at, span.start)
    yield from close(float("inf"))


def shared(
    threads: Sequence[Iterable[Span]],
    running: Iterable[Span] = (),
    holds_others: Callable[[Any], bool] = lambda _: False,
) -> Iterator[tuple[float, float, list[Any]]]:
    """The moments in which a device is busy, each with what it is busy with.

    Args:
        threads: what runs on each thread.
        running: when programs run. A CPU carries out parts of an operation on threads where no event tells of them: a
            moment of a program in which nothing is told belongs to the operation that began last.
        holds_others: whether something runs others. It has a moment only where none of these has it.

    Yields:
        Start, end, and those that share the time between, one or more. Moments do not overlap and come in order.
    """
    stretches = [stretch for spans in threads for stretch in innermost(spans)]
    during = union(running)
    edges = sorted(
        [(s.start, 1, i) for i, s in enumerate(stretches)]
        + [(s.end, 0, i) for i, s in enumerate(stretches)]
        + [(time, 2, -1) for span in during for time in (span.start, span.end)]
    )
    active: dict[int, Any] = {}
    last, now, run = None, float("-inf"), 0
    for time, kind, i in edges:
        while run < len(during) and during[run].end <= now:
            run += 1
        if time > now:
            if active:
                leaves = [what for what in active.values() if not holds_others(what)]
                yield now, time, leaves or list(active.values())
            elif last is not None and run < len(during) and during[run].start <= now:
                yield now, time, [last]
        now = time
        if kind == 1:
            last = active[i] = stretches[i].what
        elif kind == 0:
            del active[i]


def union(spans: Iterable[Span]) -> list[Span]:
    """Disjoint spans in order that cover what the given ones cover."""
    joined: list[Span] = []
    for span in sorted(spans, key=lambda s: s[:2]):
        if joined and span.start <= joined[-1].end:
            joined[-1] = Span(joined[-1].start, max(joined[-1].end, span.end), None)
        else:
            joined.append(Span(span.start, span.end, None))
    return joined


def within(span: Span, cover: Sequence[Span]) -> float:
    """How long a span lies in disjoint ordered ones."""
    first = bisect.bisect_right(cover, span.start, key=lambda s: s.end)
    length = 0.0
    for other in itertools.islice(cover, first, None):
        if other.start >= span.end:
            break
        length += min(span.end, other.end) - max(span.start, other.start)
    return length


class Sheet(NamedTuple):
    """Where the time of one step goes, in seconds.

    `device` by part and `host` by part leave `wall` less their sum for idling and for other work; `hidden` is how much
    of each host part ran while the device was busy; `operations` is what the device spent on each operation.
    """

    number: int
    wall: float
    device: dict[Any, float]
    host: dict[str, float]
    hidden: dict[str, float]
    operations: dict[Any, float]


def sheets(
    steps: Sequence[Span],
    host: Iterable[Span],
    moments: Iterable[tuple[float, float, list[Any]]],
    part: Callable[[Any], str],
    apart: str,
) -> list[Sheet]:
    """What each step's time goes to.

    Args:
        steps: what is their number; disjoint.
        host: parts of the host's work, possibly in each other.
        moments: of `shared`.
        part: the part that an operation belongs to.
        apart: the host part during which everything that the device does counts as this part.
    """
    steps = sorted(steps)
    stretches = list(innermost(host))
    covers = union(s for s in host if s.what == apart)
    busy, found = (
        [],
        [Sheet(s.what, s.end - s.start, *(collections.defaultdict(float) for _ in range(4))) for s in steps],
    )
    for start, end, owners in moments:
        busy.append(Span(start, end, None))
        for sheet, length, clipped in _clipped(steps, found, Span(start, end, None)):
            aside = within(clipped, covers)
            for owner in owners:
                sheet.device[part(owner)] += (length - aside) / len(owners)
                sheet.operations[owner] += length / len(owners)
            if aside:
                sheet.device[apart] += aside
    busy = union(busy)
    for stretch in stretches:
        for sheet, length, clipped in _clipped(steps, found, stretch):
            sheet.host[stretch.what] += length
            sheet.hidden[stretch.what] += within(clipped, busy)
    return found


def _clipped(steps: Sequence[Span], found: Sequence[Sheet], span: Span) -> Iterator[tuple[Sheet, float, Span]]:
    """The steps that a span lies in, with what lies in each."""
    first = bisect.bisect_right(steps, span.start, key=lambda s: s.end)
    for step, sheet in zip(steps[first:], found[first:]):
        if step.start >= span.end:
            break
        clipped = Span(max(step.start, span.start), min(step.end, span.end), span.what)
        yield sheet, clipped.end - clipped.start, clipped
