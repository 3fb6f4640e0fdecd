"""What a profiler's trace file says the host did and the device ran, in seconds of its own clock."""

import collections
import functools
import itertools
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax

from gold_jax.profiling.scopes import Scopes, best_match, part_of
from gold_jax.training.annotations import PREFIX, STEP

COMPILING = "compiling programs"
# What JAX calls the work that a new program makes.
_COMPILE = ("trace_to_jaxpr_dynamic", "lower_sharding_computation", "backend_compile_and_load", "compile_or_get_cached")


class Span(NamedTuple):
    """Something that lasted a while."""

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


class Trace(NamedTuple):
    """One trace, of the first device."""

    device: str  # its plane
    steps: list[Span]  # what is the step's number
    host: list[Span]  # annotated work on the thread that trains; spans may be nested
    threads: list[list[Span]]  # operations by the thread or stream that ran them; those of one thread may be nested
    running: list[Span]  # when programs ran, on devices that carry parts of an operation out where no event tells of it


def read_trace(path: str | os.PathLike, programs: Mapping[str, Sequence[Scopes]] | None = None) -> Trace:
    """The trace in an `.xplane.pb` file, with `programs` as `load_scopes` gives them. ValueError: it holds no step."""
    planes = {plane.name: plane for plane in jax.profiler.ProfileData.from_file(os.fspath(path)).planes}
    steps, host, threads, running = _host(planes["/host:CPU"].lines if "/host:CPU" in planes else ())
    device = "CPU"
    accelerators = sorted(name for name in planes if name.startswith("/device:") and "CUSTOM" not in name)
    if accelerators:
        device, running = accelerators[0].removeprefix("/device:"), []
        lines = list(planes[accelerators[0]].lines)  # the streams', from which a profiler derives others again
        lines = [line for line in lines if line.name.startswith("Stream")] or [x for x in lines if x.name == "XLA Ops"]
        threads = [[_span(e, _operation(e.name, dict(e.stats))) for e in line.events] for line in lines]
    if not steps:
        raise ValueError(f"{path} holds no step; trace steps with --profile_steps")
    return Trace(device, steps, host, _with_scopes(threads, programs or {}), running)


def _host(lines: Any) -> tuple[list[Span], list[Span], list[list[Span]], list[Span]]:
    """Steps, annotated work, operations that ran on the host's threads, when programs ran there."""
    steps, host, threads = [], [], []
    begun, ended = {}, {}
    for line in lines:
        found, parts, operations = [], [], []
        for event in line.events:
            name = event.name
            if name.startswith(PREFIX):
                parts.append(_span(event, name.removeprefix(PREFIX)))
            elif name in _COMPILE:
                parts.append(_span(event, COMPILING))
            elif name == STEP:
                found.append(_span(event, int(dict(event.stats)["step_num"])))
            elif not name.startswith(("end: ", "ThreadpoolListener")):
                stats = dict(event.stats)
                run = stats.get("run_id")
                if stats.get("device_ordinal", 0) != 0 or run is None:
                    continue
                span = _span(event, _operation(name, stats))
                if "hlo_op" in stats:
                    operations.append(span)
                    begun[run] = min(span.start, begun.get(run, span.start))
                ended[run] = max(span.end, ended.get(run, span.end))
        threads.append(operations)
        if found:
            steps, host = found, parts
    return steps, host, threads, [Span(start, ended[run], run) for run, start in begun.items()]


def _span(event: Any, what: Any) -> Span:
    start = event.start_ns / 1e9
    return Span(start, start + event.duration_ns / 1e9, what)


def _operation(name: str, stats: Mapping[str, Any]) -> Operation:
    """TPUs name an event by the whole instruction and tell its scope, GPUs name it by the kernel."""
    instruction = str(stats.get("hlo_op") or name.split(" = ")[0].lstrip("%"))
    scope = str(stats.get("tf_op") or "").rstrip(":")
    program = stats.get("program_id", -1), str(stats.get("hlo_module", ""))
    return Operation(program, instruction, part_of(scope), scope)


def _with_scopes(threads: list[list[Span]], programs: Mapping[str, Sequence[Scopes]]) -> list[list[Span]]:
    """The operations with what their programs say of them, where the trace itself does not."""
    ran = collections.defaultdict(set)
    for span in itertools.chain(*threads):
        ran[span.what.program].add(span.what.name)
    scopes = {program: best_match(programs.get(program[1], ()), names) for program, names in ran.items()}

    @functools.cache
    def with_scope(operation: Operation) -> Operation:
        part, scope = scopes[operation.program].get(operation.name, ("", ""))
        return operation._replace(part=operation.part or part, scope=operation.scope or scope)

    return [[span._replace(what=with_scope(span.what)) for span in spans] for spans in threads if spans]
