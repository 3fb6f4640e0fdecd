"""What a profiler's trace file says: what the host did when, and which operations the device ran when.

`jax.profiler.ProfileData` reads the file. Times are seconds on the trace's own clock.
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax

from gold_jax.profiling.scopes import Scopes, best_match, part_of
from gold_jax.training.annotations import PREFIX, STEP

COMPILING = "compiling programs"
# What JAX calls the work that a new program makes.
_COMPILES = (
    "trace_to_jaxpr_dynamic",
    "lower_sharding_computation",
    "backend_compile_and_load",
    "compile_or_get_cached",
)


class Span(NamedTuple):
    """Something that lasted from `start` to `end`."""

    start: float
    end: float
    what: Any


class Operation(NamedTuple):
    """One operation of one program: `program` is its number and name, `name` the HLO instruction's."""

    program: tuple[int, str]
    name: str
    part: str = ""
    scope: str = ""

    @property
    def runs_others(self) -> bool:
        """Whether it is a loop or a call, which does nothing by itself while what it runs is running."""
        return self.name.split(".")[0] in ("while", "conditional", "call", "async-start", "async-done")


@dataclasses.dataclass(frozen=True)
class Trace:
    """One trace.

    Attributes:
        device: the device's plane.
        steps: what is the step's number.
        host: annotated work on the thread that trains; spans may be nested.
        threads: operations by the thread or stream that ran them; those of one thread may be nested.
        running: when programs ran, on devices that carry parts of an operation out where no event tells of it.
    """

    device: str
    steps: list[Span]
    host: list[Span]
    threads: list[list[Span]]
    running: list[Span]


def read_trace(path: str | os.PathLike, programs: Mapping[str, Sequence[Scopes]] | None = None) -> Trace:
    """The trace in an `.xplane.pb` file. Of several devices the first is taken: they all do the same.

    Args:
        path: the file.
        programs: as `load_scopes` gives them.

    Raises:
        ValueError: the file holds no step.
    """
    planes = {plane.name: plane for plane in jax.profiler.ProfileData.from_file(os.fspath(path)).planes}
    steps, host, threads, running = _host(planes.get("/host:CPU"))
    device = "CPU"
    accelerators = sorted(name for name in planes if name.startswith("/device:") and "CUSTOM" not in name)
    if accelerators:
        device, running = accelerators[0].removeprefix("/device:"), []
        threads = _accelerator(planes[accelerators[0]])
    if not steps:
        raise ValueError(f"{os.fspath(path)} holds no step; trace steps with --profile_steps")
    return Trace(device, steps, host, _with_scopes(threads, programs or {}), running)


def _host(plane: Any) -> tuple[list[Span], list[Span], list[list[Span]], list[Span]]:
    """Steps, annotated work, operations that ran on the host's threads, when programs ran there."""
    steps, host, threads = [], [], []
    begun, ended = {}, {}
    for line in () if plane is None else plane.lines:
        found, parts, operations = [], [], []
        for event in line.events:
            name, span = event.name, _span(event)
            if name.startswith(PREFIX):
                parts.append(span(name.removeprefix(PREFIX)))
            elif name in _COMPILES:
                parts.append(span(COMPILING))
            elif name == STEP:
                found.append(span(int(dict(event.stats)["step_num"])))
            elif not name.startswith(("end: ", "ThreadpoolListener")):
                stats = dict(event.stats)
                run = stats.get("run_id")
                if stats.get("device_ordinal", 0) != 0 or run is None:
                    continue
                operation = span(_operation(stats, name))
                if "hlo_op" in stats:
                    operations.append(operation)
                    begun[run] = min(operation.start, begun.get(run, operation.start))
                ended[run] = max(operation.end, ended.get(run, operation.end))
        threads.append(operations)
        if found:
            steps, host = found, parts
    return steps, host, threads, [Span(start, ended[run], run) for run, start in begun.items()]


def _accelerator(plane: Any) -> list[list[Span]]:
    """Operations by stream; the lines that a profiler derives from them again are left out."""
    lines = list(plane.lines)
    wanted = [line for line in lines if line.name.startswith("Stream")]
    wanted = wanted or [line for line in lines if line.name == "XLA Ops"]
    return [[_span(e)(_operation(dict(e.stats), e.name)) for e in line.events] for line in wanted]


def _span(event: Any):
    start = event.start_ns / 1e9
    return lambda what: Span(start, start + event.duration_ns / 1e9, what)


def _operation(stats: Mapping[str, Any], name: str) -> Operation:
    """TPUs name an event by the whole instruction and tell its scope, GPUs name it by the kernel."""
    instruction = str(stats.get("hlo_op") or name.split(" = ")[0].lstrip("%"))
    scope = str(stats.get("tf_op") or "").rstrip(":")
    return Operation(
        (stats.get("program_id", -1), str(stats.get("hlo_module", ""))), instruction, part_of(scope), scope
    )


def _with_scopes(threads: list[list[Span]], programs: Mapping[str, Sequence[Scopes]]) -> list[list[Span]]:
    """The operations with what their programs say of them, where the trace itself does not."""
    ran: dict[tuple[int, str], set[str]] = {}
    for span in (span for spans in threads for span in spans):
        ran.setdefault(span.what.program, set()).add(span.what.name)
    scopes = {program: best_match(programs.get(program[1], ()), names) for program, names in ran.items()}
    known: dict[Operation, Operation] = {}

    def with_scope(operation: Operation) -> Operation:
        if operation not in known:
            part, scope = scopes[operation.program].get(operation.name, ("", ""))
            known[operation] = operation._replace(part=operation.part or part, scope=operation.scope or scope)
        return known[operation]

    return [[span._replace(what=with_scope(span.what)) for span in spans] for spans in threads if spans]
