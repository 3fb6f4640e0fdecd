"""The text of a compiled program (`compiled.as_text()`): its instructions, and how often each runs."""

import functools
import math
import operator
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

_HEADER = re.compile(r"(?!HloModule)(ENTRY )?%?([\w.\-]+).*\{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\(([^)]*)\)(.*)")
_ARRAY = re.compile(r"([a-z]+[a-z0-9]*)\[([\d,<=]*)\]")
_DELIMITER = re.compile(r"[][(){},]")
_CALLS = r"calls|to_apply|(?:called|branch)_computations|(?:true|false)_computation"
_CALLED = re.compile(rf"(?:{_CALLS})=(\{{[^}}]*\}}|[\w.%\-]+)")
# Types of what loops count with, and how it is computed.
_COUNTING = re.compile(r"\(|pred\[\]|[su]\d+\[\]")
_UNCHANGED = ("copy", "bitcast", "convert", "copy-start", "copy-done", "optimization-barrier")
_COMPUTED = {"add": operator.add, "subtract": operator.sub, "multiply": operator.mul}
_COMPUTED |= {name: getattr(operator, name.lower()) for name in ("LT", "LE", "GT", "GE", "NE", "EQ")}
_MOST_TRIPS = 2**20


class Instruction(NamedTuple):
    """One line: `%name = type opcode(operands), attributes`; of a constant or a parameter the operand is its text."""

    name: str
    type: str
    opcode: str
    operands: list[str]
    attributes: str

    @property
    def called(self) -> list[str]:
        """Computations that it calls; a while loop's two are attributes of their own."""
        return [name for names in _CALLED.findall(self.attributes) for name in re.findall(r"[\w.\-]+", names)]

    def attribute(self, name: str) -> str | None:
        """The word after `name=`, without a percent sign."""
        found = re.search(rf"\b{name}=%?([\w.\-]+)", self.attributes)
        return found and found[1]


class Computation(NamedTuple):
    """A computation of a program."""

    instructions: dict[str, Instruction]  # by name, in order
    root: Instruction  # the one that is the value: that marked ROOT, or the last


Program = dict[str, Computation]  # by name, that of the entry ""
Execution = tuple[Computation, Instruction, float, bool]


def executed(program: Program, trips: Callable[[str], float]) -> list[Execution]:
    """Everything that runs: computation, instruction, times in one call of the program, and whether it is in a fusion or
    reduction, whose values between are in no memory.

    Of a loop that does not say how often it runs `trips` says it from the `op_name`. Of a conditional the branch runs that
    makes most bytes. The two later instructions of something asynchronous name what the first has called, and call nothing.
    """

    @functools.cache
    def made(name: str) -> int:
        body = program[name].instructions.values()
        return sum(size(x.type) + sum(map(made, x.called)) for x in body)

    def walk(name: str, times: float, fused: bool) -> Iterator[Execution]:
        inside = program[name]
        for x in inside.instructions.values():
            yield inside, x, times, fused
            if x.opcode == "while":
                if (count := trip_count(program, inside, x)) is None:
                    op_name = re.search(r'op_name="([^"]*)"', x.attributes)
                    count = trips(op_name[1] if op_name else x.name)
                for part in ("condition", "body"):
                    yield from walk(x.attribute(part), times * count, fused)
            elif x.opcode == "conditional":
                yield from walk(max(x.called, key=made), times, fused)
            elif not x.opcode.endswith(("-update", "-done")):
                for called in x.called:
                    yield from walk(called, times, fused or x.opcode not in ("call", "async-start"))

    return list(walk("", 1, False))


def read(text: str) -> Program:
    """Parses the text of an optimized module."""
    program, name, own, root = {}, "", None, None
    for line in text.splitlines():
        if own is None:
            if header := _HEADER.match(line):
                name, own, root = "" if header[1] else header[2], {}, None
        # What follows says where it runs, as on a v6e's SparseCores. Kernels' own metadata goes over several lines, with braces.
        elif line == "}" or line.startswith("}, execution_thread"):
            if own:
                program[name] = Computation(own, root or list(own.values())[-1])
            own = None
        elif start := _INSTRUCTION.match(line):
            marked, name_, type_, opcode, operands, attributes = start.groups()
            x = Instruction(name_, type_, opcode, re.findall(r"[\w.\-]+(?=,|$)", operands), attributes)
            own[x.name], root = x, x if marked else root
    if "" not in program:
        raise ValueError("This is not the text of a compiled program: it has no ENTRY computation.")
    return program


def elements(type_: str) -> list[str]:
    """The types in a tuple's; a type that is none, alone."""
    if not type_.startswith("("):
        return [type_]
    parts, depth, begin = [], 0, 1
    for found in _DELIMITER.finditer(type_):
        depth += {"(": 1, "[": 1, "{": 1, ",": 0}.get(found[0], -1)
        if depth == 0 or (depth == 1 and found[0] == ","):
            parts.append(re.sub(r"/\*.*?\*/", "", type_[begin : found.start()]).strip())
            begin = found.end()
    return parts


def dimensions(type_: str) -> tuple[int, ...]:
    """The shape of an array's type."""
    return tuple(int(d.lstrip("<=")) for d in _ARRAY.search(type_)[2].split(",") if d)


def size(type_: str) -> int:
    """Bytes of an array, or of all arrays in a tuple, without what layouts pad."""
    total = 0.0
    for found in _ARRAY.finditer(re.sub(r"\{[^}]*\}", "", type_)):
        bits = re.search(r"\d+", found[1])
        total += math.prod(dimensions(found[0])) * (int(bits[0]) if bits else 8 * (found[1] == "pred")) / 8
    return math.ceil(total)


def trip_count(program: Program, inside: Computation, loop: Instruction) -> int | None:
    """How often a while loop runs, where the text tells: what the compiler noted, or what counting comes to.

    The integers in the loop's tuple are computed, trip by trip, until the condition is false.
    """
    if noted := re.search(r'known_trip_count"?\W+n\W+(\d+)', loop.attributes):
        return int(noted[1])
    condition, body = (program[loop.attribute(part)] for part in ("condition", "body"))
    state = _value(program, inside, loop.operands[0], [])
    for trip in range(_MOST_TRIPS if state else 0):
        goes_on = _value(program, condition, condition.root.name, [state])
        if not goes_on:
            return None if goes_on is None else trip
        state = _value(program, body, body.root.name, [state])
    return None


def _value(program: Program, inside: Computation, name: str, given: list) -> Any:
    """What an integer, or a tuple as far as it has integers, comes to; None for what is not known."""
    x = inside.instructions.get(name)
    if x is None or not _COUNTING.match(x.type):
        return None
    if x.opcode == "constant":
        return int(x.operands[0]) if re.fullmatch(r"-?\d+", x.operands[0]) else None
    if x.opcode == "parameter":
        return given[int(x.operands[0])] if given else None
    operands = [_value(program, inside, operand, given) for operand in x.operands]
    if x.opcode == "tuple":
        return operands
    if x.opcode in _UNCHANGED:
        return operands[0]
    if x.opcode == "get-tuple-element":
        return operands[0] and operands[0][int(x.attribute("index"))]
    if x.opcode == "fusion":
        called = program[x.called[0]]
        return _value(program, called, called.root.name, operands)
    compute = _COMPUTED.get(x.attribute("direction") or x.opcode)
    return None if compute is None or None in operands else int(compute(*operands))
