"""What a profiler's trace file says: what the host did when, and which operations of which programs the device ran.

Times are seconds on the trace's own clock. JAX reads the events; the compiled programs, whose metadata says which
`jax.named_scope` an operation stands in, lie in the same file where JAX's reader does not look, so they are read here.
"""

import collections
import dataclasses
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax

STEP = "train"  # the profilers' own name for the annotation around a step
PREFIX = "gold_jax: "  # before the name of every part of the host's work
COMPILING = "compiling programs"
# What JAX calls the work that a new program makes, and this its host part.
_COMPILES = (
    "trace_to_jaxpr_dynamic",
    "lower_sharding_computation",
    "backend_compile_and_load",
    "compile_or_get_cached",
)
PARTS = {
    "teacher": "teacher forward",
    "loss": "loss, both ways",
    "optimizer": "optimizer",
    "prefill": "sampling: prefill",
    "decode": "sampling: decoding",
}
_SCOPE = re.compile(rf"(?:(?:jvp|transpose|vmap|checkpoint|remat)\()*({'|'.join(('student', *PARTS))})\)*")
_HOLDS_OTHERS = ("while", "conditional", "call", "async-start", "async-done")


class Span(NamedTuple):
    """Something that lasted from `start` to `end`."""

    start: float
    end: float
    what: Any


class Source(NamedTuple):
    """Where an operation comes from: the part of a step, JAX's name for it (scopes and primitive), its HLO opcode."""

    part: str | None
    scope: str
    opcode: str


class Operation(NamedTuple):
    """One operation of one program: `name` is the HLO instruction's, `scope` there if the event itself tells it."""

    program: int
    module: str
    name: str
    scope: str | None


@dataclasses.dataclass
class Trace:
    """One trace.

    Attributes:
        device: the device's plane.
        steps: what is the step's number.
        host: parts of the host's work on the thread that trains; they may lie in each other.
        threads: operations by the thread or stream that ran them; those of one thread may lie in each other.
        running: when the device ran programs, on devices that carry parts of an operation out where no event tells of
            it.
        programs: instructions by number and module.
    """

    device: str
    steps: list[Span]
    host: list[Span]
    threads: list[list[Span]]
    running: list[Span]
    programs: Mapping[tuple[int, str], Mapping[str, Source]]
    _known: dict[Operation, Source] = dataclasses.field(default_factory=dict, repr=False)

    def source(self, operation: Operation) -> Source:
        """Where an operation comes from; its part is None where nothing tells."""
        if operation not in self._known:
            found = self.programs.get((operation.program, operation.module), {}).get(operation.name)
            if found is None:
                found = Source(None, "", operation.name.split(".")[0])
            if operation.scope:
                found = found._replace(scope=operation.scope, part=part_of(operation.scope) or found.part)
            self._known[operation] = found
        return self._known[operation]


def part_of(scope: str) -> str | None:
    """The part of a step that an operation's name belongs to, by the outermost scope in it that is one.

    >>> part_of("jit(fused)/transpose(jvp(student))/while/body/dot_general")
    'student backward'
    """
    for component in scope.split("/"):
        found = _SCOPE.fullmatch(component)
        if found:
            backward = "backward" if "transpose(" in component else "forward"
            return PARTS.get(found.group(1), f"student {backward}")
    return None


def read_trace(path: str | os.PathLike) -> Trace:
    """The trace in an `.xplane.pb` file.

    Of several devices the first is taken: they all do the same.

    Raises:
        ValueError: the file holds no step.
    """
    with open(path, "rb") as file:
        content = file.read()
    planes = {plane.name: plane for plane in jax.profiler.ProfileData.from_serialized_xspace(content).planes}
    steps, host, threads, runs = _host(planes)
    device = "CPU"
    accelerators = sorted(name for name in planes if name.startswith("/device:") and "CUSTOM" not in name)
    if accelerators:
        device, runs = accelerators[0].removeprefix("/device:"), []
        threads = _accelerator(planes[accelerators[0]])
    if not steps:
        raise ValueError(f"{os.fspath(path)} holds no step; trace steps with --profile_steps")
    return Trace(device, steps, host, [t for t in threads if t], runs, _programs_of(threads, content))


def _host(planes: Mapping[str, Any]):
    """Steps, parts of the host's work, operations that ran on the host's threads, when programs ran there."""
    steps, host, threads = [], [], []
    begun, ended = {}, {}
    for line in planes["/host:CPU"].lines if "/host:CPU" in planes else ():
        found, parts, operations = [], [], []
        for event in line.events:
            name, start = event.name, event.start_ns / 1e9
            end = start + event.duration_ns / 1e9
            if name.startswith(PREFIX):
                parts.append(Span(start, end, name.removeprefix(PREFIX)))
            elif name in _COMPILES:
                parts.append(Span(start, end, COMPILING))
            elif name == STEP:
                found.append(Span(start, end, int(dict(event.stats)["step_num"])))
            elif not name.startswith(("end: ", "ThreadpoolListener")):
                stats = dict(event.stats)
                run = stats.get("run_id")
                if stats.get("device_ordinal", 0) != 0 or run is None:
                    continue
                if "hlo_op" in stats:
                    operations.append(Span(start, end, _operation(stats, name)))
                    begun[run] = min(start, begun.get(run, start))
                ended[run] = max(end, ended.get(run, end))
        threads.append(operations)
        if found:
            steps, host = found, parts
    return steps, host, threads, [Span(start, ended[run], run) for run, start in begun.items()]


def _accelerator(plane: Any) -> list[list[Span]]:
    """Operations by stream; the lines that a profiler derives from them again are left out."""
    lines = list(plane.lines)
    wanted = [line for line in lines if line.name.startswith("Stream")]
    wanted = wanted or [line for line in lines if line.name == "XLA Ops"]
    threads = []
    for line in wanted:
        operations = []
        for event in line.events:
            start = event.start_ns / 1e9
            operations.append(Span(start, start + event.duration_ns / 1e9, _operation(dict(event.stats), event.name)))
        threads.append(operations)
    return threads


def _operation(stats: Mapping[str, Any], name: str) -> Operation:
    """TPUs name an event by the whole instruction, GPUs by the kernel."""
    instruction = str(stats.get("hlo_op") or name.split(" = ")[0].lstrip("%"))
    scope = stats.get("tf_op")
    return Operation(
        int(stats.get("program_id", -1)),
        str(stats.get("hlo_module", "")),
        instruction,
        str(scope).rstrip(":") if scope else None,
    )


class _Instruction(NamedTuple):
    id: int
    name: str
    opcode: str
    scope: str
    calls: list[int]
    operands: list[int]


def _programs_of(threads: Sequence[Sequence[Span]], content: bytes) -> dict[tuple[int, str], Mapping[str, Source]]:
    """The instructions of the programs that operations are of.

    Events of a program that came from JAX's cache have the number that it was first compiled under, which says nothing
    here: of the programs with its name, the one that has its instructions is it.
    """
    names = collections.defaultdict(set)
    for span in (span for spans in threads for span in spans):
        names[span.what.program, span.what.module].add(span.what.name)
    compiled = list(_programs(content, {module for _, module in names}))
    found = {}
    for (program, module), operations in names.items():
        named = [
            (len(operations & sources.keys()), number == program, sources)
            for number, name, sources in compiled
            if name == module
        ]
        ranked = sorted(named, key=lambda one: one[:2], reverse=True)
        found[program, module] = collections.ChainMap(*(sources for _, _, sources in ranked))
    return found


def _programs(content: bytes, wanted: Collection[str]) -> Iterator[tuple[int, str, dict[str, Source]]]:
    """Number, name and instructions of compiled programs: an HloProto in each entry of the plane of metadata."""
    for plane in _get(memoryview(content), 1):
        if _text(plane, 2) != "/host:metadata":
            continue
        for entry in _get(plane, 4):
            for metadata in _get(entry, 2):
                numbered = re.fullmatch(r"(.*)\((\d+)\)", _text(metadata, 2))  # such as jit_fused(82)
                if not numbered or numbered.group(1) not in wanted:
                    continue
                for stat in _get(metadata, 5):
                    for proto in _get(stat, 6):
                        for module in _get(proto, 1):
                            yield int(numbered.group(2)), numbered.group(1), _sources(module)


def _sources(module: memoryview) -> dict[str, Source]:
    """Where each instruction of a program comes from.

    The compiler adds some that stand in no scope. They belong where most of what they call does; else, as copies and
    buffers of zeros do, to what reads them, or to what they read; else to what calls them; else to the
    program's part, if it has but one.
    """
    computations = {next(_get(c, 5), 0): {i.id: i for i in map(_instruction, _get(c, 2))} for c in _get(module, 3)}
    own = {i.scope: part_of(i.scope) for instructions in computations.values() for i in instructions.values()}
    present = set(own.values()) - {None}
    rest = None  # the part of what nothing else tells of: in a program that samples, drawing from the logits above all
    if len(present) == 1:
        (rest,) = present
    elif PARTS["decode"] in present:
        rest = PARTS["decode"]
    caller = {
        called: (number, instruction)
        for number, instructions in computations.items()
        for instruction in instructions.values()
        for called in instruction.calls
    }

    def around(number: int) -> str | None:
        while number in caller:
            number, instruction = caller[number]
            if own[instruction.scope]:
                return own[instruction.scope]
        return None

    def inside(instruction: _Instruction) -> str | None:
        called = [i for number in instruction.calls for i in computations.get(number, {}).values()]
        found = collections.Counter(own[i.scope] for i in called if own[i.scope])
        return found.most_common(1)[0][0] if found else None

    sources = {}
    for number, instructions in computations.items():
        parts = {key: own[i.scope] or inside(i) for key, i in instructions.items()}
        read = {key: i.operands for key, i in instructions.items()}
        readers = collections.defaultdict(list)
        for key, operands in read.items():
            for operand in operands:
                readers[operand].append(key)
        for key, i in instructions.items():
            part = _nearest(key, parts, readers) or _nearest(key, parts, read) or around(number)
            sources[i.name] = Source(part or rest, i.scope, i.opcode)
    return sources


def _nearest(start: int, parts: Mapping[int, str | None], edges: Mapping[int, Sequence[int]]) -> str | None:
    """The part of an instruction, or of the first that has one along the edges."""
    seen, queue = {start}, collections.deque([start])
    while queue:
        key = queue.popleft()
        if parts.get(key):
            return parts[key]
        fresh = [k for k in edges.get(key, ()) if k not in seen]
        seen.update(fresh)
        queue.extend(fresh)
    return None


def holds_others(source: Source) -> bool:
    """Whether the operation is one that runs others, such as a loop, which does nothing by itself while they run."""
    return source.opcode in _HOLDS_OTHERS


def _instruction(buffer: memoryview) -> _Instruction:
    found = collections.defaultdict(list)
    for field, value in _fields(buffer):
        found[field].append(value)
    name, opcode = (bytes(found[field][0]).decode() for field in (1, 2))
    scope = _text(found[7][0], 2) if found[7] else ""
    number = found[35][0] if found[35] else 0  # zeros are not written
    return _Instruction(number, name, opcode, scope, _numbers(found[38]), _numbers(found[36]))


def _get(buffer: memoryview, field: int) -> Iterator[Any]:
    """The values of one field of a protobuf message."""
    return (value for number, value in _fields(buffer) if number == field)


def _text(buffer: memoryview, field: int) -> str:
    return bytes(next(_get(buffer, field), b"")).decode("utf-8", "replace")


def _numbers(values: Sequence[Any]) -> list[int]:
    """A repeated integer, packed or not."""
    found = []
    for value in values:
        if isinstance(value, int):
            found.append(value)
            continue
        at = 0
        while at < len(value):
            number, at = _varint(value, at)
            found.append(number)
    return found


def _fields(buffer: memoryview) -> Iterator[tuple[int, Any]]:
    """Numbers and values of a protobuf message's fields: ints, or bytes that are not decoded further."""
    at = 0
    while at < len(buffer):
        key, at = _varint(buffer, at)
        kind = key & 7
        if kind == 0:
            value, at = _varint(buffer, at)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
            value, at = buffer[at : at + size], at + size
        elif kind == 2:
            size, at = _varint(buffer, at)
            value, at = buffer[at : at + size], at + size
        else:
            raise ValueError(f"the trace holds a field of wire type {kind}, which protobuf does not have")
        yield key >> 3, value


def _varint(buffer: memoryview, at: int) -> tuple[int, int]:
    result = shift = 0
    while True:
        byte = buffer[at]
        at += 1
        result |= (byte & 127) << shift
        if byte < 128:
            return result, at
        shift += 7
