"""From a trace's events to seconds: every moment of a step is given to one part of the work, or to none.

Operations are nested (a loop and what it runs) and run beside each other (threads of a CPU, streams of a GPU). A moment
of a thread belongs to its innermost operation; where several threads run at once, they share it equally. So the parts
add up to the time in which the device was busy, and with its idle time to the step's.
"""

import collections
import dataclasses

from gold_jax.profiling.trace import COMPILING, Operation, Span, Trace
from gold_jax.training.annotations import EVALUATION

OTHER = "other"


@dataclasses.dataclass
class StepTimes:
    """Where the time of one step goes, in seconds."""

    number: int
    wall: float
    device: dict[str, float]  # by part; what is missing to `wall` is idle
    host: dict[str, float]  # by annotation; what is missing to `wall` is other work
    hidden: dict[str, float]  # how much of each host annotation ran while the device was busy
    operations: dict[Operation, float]


def step_times(trace: Trace) -> list[StepTimes]:
    """What each step's time goes to.

    While the host evaluates, all that the device does counts as evaluation, and all that the host does but compiling.
    A CPU runs parts of an operation on threads that record no events: time of a program without one is attributed to
    the operation that began last. An operation that runs others gets only the time in which none of these runs.
    """
    evaluations = [span for span in trace.host if span.what == EVALUATION]
    lines = (evaluations, trace.steps, trace.host, trace.running, *trace.threads)
    lines = [[span for span in spans if span.end > span.start] for spans in lines]
    found = {s.what: StepTimes(s.what, s.end - s.start, *(collections.Counter() for _ in range(4))) for s in lines[1]}
    # Of what begins at one moment the longest comes first, as the outermost; before it what ends there.
    edges = [(span.start, 1, -span.end, k, span) for k, spans in enumerate(lines) for span in spans]
    edges += [(span.end, 0, 0.0, k, span) for _, _, _, k, span in edges]
    edges.sort(key=lambda edge: edge[:3])
    # Of every line the spans that have begun and not ended, the innermost last; of threads the innermost operation.
    current: list[list[Span]] = [[] for _ in lines]
    evaluation, step, host, program, *_ = current
    active, last, now = {}, None, 0.0
    for time, begins, _, k, span in edges:
        if time > now and step:
            times, length = found[step[-1].what], time - now
            operations = [o for o in active.values() if not o.runs_others] or list(active.values())
            if not operations and program and last is not None:
                operations = [last]
            for operation in operations:
                part = EVALUATION if evaluation else operation.part or OTHER
                times.device[part] += length / len(operations)
                times.operations[operation] += length / len(operations)
            if host:
                work = EVALUATION if evaluation and host[-1].what != COMPILING else host[-1].what
                times.host[work] += length
                times.hidden[work] += length * bool(operations)
        now = time
        current[k].append(span) if begins else current[k].remove(span)
        if k > 3:
            last = span.what if begins else last
            active.pop(k, None)
            if current[k]:
                active[k] = current[k][-1].what
    return list(found.values())
