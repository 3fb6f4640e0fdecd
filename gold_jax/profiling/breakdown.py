"""From a trace's events to seconds: every moment of a step is given to one part of the work, or to none.

Operations are nested (a loop and what it runs) and run beside each other (threads of a CPU, streams of a GPU). A moment
of a thread belongs to its innermost operation; where several threads run at once, they share it equally. So the parts
add up to the time in which the device was busy, and with its idle time to the step's.
"""

import collections
import dataclasses
from collections.abc import Iterable

from gold_jax.profiling.trace import COMPILING, Operation, Span, Trace
from gold_jax.training.annotations import EVALUATION

OTHER = "other"


@dataclasses.dataclass
class StepTimes:
    """Where the time of one step goes, in seconds.

    Attributes:
        number: the step's.
        wall: how long it took.
        device: by part; what is missing to `wall` is idle.
        host: by annotation; what is missing to `wall` is other work.
        hidden: how much of each host annotation ran while the device was busy.
        operations: what the device spent on each operation.
    """

    number: int
    wall: float
    device: dict[str, float]
    host: dict[str, float]
    hidden: dict[str, float]
    operations: dict[Operation, float]


class _Line:
    """What is going on now on one thread: spans that have begun and not ended, the innermost last."""

    def __init__(self, spans: Iterable[Span]):
        self.spans = [span for span in spans if span.end > span.start]
        self.open: list[Span] = []

    @property
    def now(self):
        return self.open[-1].what if self.open else None


def step_times(trace: Trace) -> list[StepTimes]:
    """What each step's time goes to.

    While the host evaluates, all that the device does counts as evaluation, and all that the host does but compiling:
    an evaluation encodes and pads too, but not for the next update. A CPU runs parts of an operation on
    threads that record no events: time of a program without an event is attributed to the operation that began last. An
    operation that runs others gets only the time in which none of these runs.
    """
    evaluation = _Line(span for span in trace.host if span.what == EVALUATION)
    steps, host, programs = _Line(trace.steps), _Line(trace.host), _Line(trace.running)
    threads = [_Line(spans) for spans in trace.threads]
    # Of what begins at one moment the longest comes first, as the outermost; before it what ends there.
    edges = []
    for line in (evaluation, steps, host, programs, *threads):
        edges += [(span.start, 1, -span.end, line, span) for span in line.spans]
        edges += [(span.end, 0, 0.0, line, span) for span in line.spans]
    edges.sort(key=lambda edge: edge[:3])
    found = {
        s.what: StepTimes(s.what, s.end - s.start, *(collections.Counter() for _ in range(4))) for s in steps.spans
    }
    thread_lines, active, last, now = set(map(id, threads)), {}, None, 0.0
    for time, begins, _, line, span in edges:
        if time > now and steps.open:
            step, length = found[steps.now], time - now
            operations = list(active.values())
            operations = [o for o in operations if not o.runs_others] or operations
            if not operations and programs.open and last is not None:
                operations = [last]
            for operation in operations:
                part = EVALUATION if evaluation.open else operation.part or OTHER
                step.device[part] += length / len(operations)
                step.operations[operation] += length / len(operations)
            if work := host.now:
                work = EVALUATION if evaluation.open and work != COMPILING else work
                step.host[work] += length
                step.hidden[work] += length * bool(operations)
        now = time
        line.open.append(span) if begins else line.open.remove(span)
        if id(line) in thread_lines:
            last = span.what if begins else last
            active.pop(id(line), None)
            if line.open:
                active[id(line)] = line.now
    return list(found.values())
