"""The text of a compiled program (`compiled.as_text()`): its instructions, and how often each runs.

A program is computations by name; a computation is instructions in order, the last of which, or the one marked ROOT, is
its value. Nothing is checked: the text is the compiler's.
"""

import dataclasses
import functools
import math
import operator
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

_NAME = re.compile(r"%?([\w.\-]+)")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = ")
_ARRAY = re.compile(r"([a-z]+[a-z0-9]*)\[([\d,<=]*)\]")
_CALLED = re.compile(
    r"(?:calls|to_apply|called_computations|branch_computations|true_computation|false_computation)"
    r"=(?:\{([^}]*)\}|%?([\w.\-]+))"
)
# How integers that loops count with are computed.
_UNCHANGED = ("copy", "bitcast", "convert", "copy-start", "copy-done", "optimization-barrier")
_COMPARED = {name: getattr(operator, name.lower()) for name in ("LT", "LE", "GT", "GE", "NE", "EQ")}
_COMPUTED = {"add": operator.add, "subtract": operator.sub, "multiply": operator.mul, "compare": None}
_MOST_TRIPS = 2**20


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line: `%name = type opcode(operands), attributes`.

    Attributes:
        name: without the percent sign.
        type: of the result, layouts included.
        opcode: "all-reduce", "fusion", ….
        operands: names of instructions; of a constant or a parameter, the text between the parentheses.
        attributes: the rest of the line.
    """

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str

    @property
    def called(self) -> list[str]:
        """Computations that it calls; a while loop's two are attributes of their own."""
        names = []
        for several, one in _CALLED.findall(self.attributes):
            names += _NAME.findall(several) if several else [one]
        return names

    def attribute(self, name: str) -> str | None:
        """The word after `name=`, without a percent sign."""
        found = re.search(rf"\b{name}=%?([\w.\-]+)", self.attributes)
        return found and found[1]

    @property
    def op_name(self) -> str:
        """Which part of the JAX program it comes from, as `jit(f)/jvp()/while/body/dot_general`."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else self.name


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions by name, in order, and the one that is the value."""

    name: str
    instructions: dict[str, Instruction]
    root: Instruction


@dataclasses.dataclass(frozen=True)
class Program:
    """Computations by name, and the name of the entry."""

    computations: dict[str, Computation]
    entry: str


class Execution(NamedTuple):
    """An instruction where it runs.

    Attributes:
        inside: its computation.
        instruction: itself.
        times: how often it runs in one call of the program.
        fused: whether it is part of a fusion or reduction, whose values between are in no memory.
    """

    inside: Computation
    instruction: Instruction
    times: int
    fused: bool


def executed(
    program: Program, unknown_trips: int | Callable[[str], int] = 1
) -> tuple[list[Execution], tuple[str, ...]]:
    """Everything that runs, loops unrolled in number, and the loops that do not say how often they run.

    Of a conditional the branch runs that makes most bytes. The two later instructions of something asynchronous name
    what the first has called, and call nothing.

    Args:
        program: the program.
        unknown_trips: how often a loop runs that does not say; or tells it from the loop's `op_name`.
    """
    loops: dict[str, str] = {}

    @functools.cache
    def made(name: str) -> int:
        body = program.computations[name].instructions.values()
        return sum(size(x.type) + sum(map(made, x.called)) for x in body)

    def walk(name: str, times: int, fused: bool) -> Iterator[Execution]:
        inside = program.computations[name]
        for x in inside.instructions.values():
            yield Execution(inside, x, times, fused)
            if x.opcode == "while":
                trips = trip_count(program, inside, x)
                if trips is None:
                    loops[x.name] = x.op_name
                    trips = unknown_trips(x.op_name) if callable(unknown_trips) else unknown_trips
                for part in ("condition", "body"):
                    yield from walk(x.attribute(part), times * trips, fused)
            elif x.opcode == "conditional":
                yield from walk(max(x.called, key=made), times, fused)
            elif not x.opcode.endswith(("-update", "-done")):
                for called in x.called:
                    yield from walk(called, times, fused or x.opcode not in ("call", "async-start"))

    return list(walk(program.entry, 1, False)), tuple(sorted(loops.values()))


def read(text: str) -> Program:
    """Parse the text of an optimized module."""
    computations: dict[str, Computation] = {}
    name, entry, own, root = None, None, {}, None
    for line in text.splitlines():
        if name is None:
            if line.endswith("{") and not line[0].isspace() and not line.startswith("HloModule"):
                marked = line.startswith("ENTRY ")
                name = _NAME.match(line.removeprefix("ENTRY "))[1]
                entry = name if marked else entry
                own, root = {}, None
        # What follows says where it runs, as on a v6e's SparseCores. Kernels' own metadata goes over several lines, with braces.
        elif line == "}" or line.startswith("}, execution_thread"):
            if own:
                computations[name] = Computation(name, own, root or list(own.values())[-1])
            name = None
        else:
            instruction = _instruction(line)
            if instruction:
                own[instruction.name] = instruction
                root = instruction if line.lstrip().startswith("ROOT ") else root
    if entry not in computations:
        raise ValueError("This is no text of a compiled program: it has no ENTRY computation.")
    return Program(computations, entry)


def _instruction(line: str) -> Instruction | None:
    start = _INSTRUCTION.match(line)
    if not start:
        return None
    begin = start.end()
    end = _closing(line, begin) if line[begin] == "(" else line.index(" ", begin)
    opened = line.index("(", end)
    closed = _closing(line, opened)
    opcode, inside = line[end:opened].strip(), line[opened + 1 : closed - 1]
    if opcode in ("constant", "parameter"):
        operands = (inside,)
    else:  # operands may carry their types: the name is the last word
        operands = tuple(part.split()[-1].lstrip("%") for part in top_level(inside) if part.split())
    return Instruction(start[2], line[begin:end], opcode, operands, line[closed:])


def _closing(text: str, start: int) -> int:
    """The place after the parenthesis that closes the one at `start`."""
    depth = 0
    for place in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if not depth:
            return place + 1
    return len(text)


def top_level(text: str) -> list[str]:
    """What stands between the commas that are in no bracket, comments left out."""
    parts, depth, part = [], 0, ""
    for character in re.sub(r"/\*.*?\*/", "", text):
        depth += {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}.get(character, 0)
        if character == "," and not depth:
            parts.append(part.strip())
            part = ""
        else:
            part += character
    return [*parts, part.strip()]


def elements(type_: str) -> list[str]:
    """The types in a tuple's; a type that is none, alone."""
    return top_level(type_[1:-1]) if type_.startswith("(") else [type_]


def dimensions(type_: str) -> tuple[int, ...]:
    """The shape of an array's type."""
    return tuple(int(d.lstrip("<=")) for d in _ARRAY.search(type_)[2].split(",") if d)


def size(type_: str) -> int:
    """Bytes of an array, or of all arrays in a tuple, without what layouts pad."""
    total = 0.0
    for dtype, dimensions in _ARRAY.findall(re.sub(r"\{[^}]*\}", "", type_)):
        bits = re.search(r"\d+", dtype)
        bits = int(bits[0]) if bits else 8 * (dtype == "pred")
        total += math.prod(int(d.lstrip("<=")) for d in dimensions.split(",") if d) * bits / 8
    return math.ceil(total)


def trip_count(program: Program, inside: Computation, loop: Instruction) -> int | None:
    """How often a while loop runs, where the text tells: what the compiler noted, or what counting comes to.

    TPU programs come without the note. Their scans compare a counter, one element of the loop's tuple, with a constant:
    the integers in the tuple are computed, trip by trip, until the condition is false.
    """
    noted = re.search(r'known_trip_count"?\W+n\W+(\d+)', loop.attributes)
    if noted:
        return int(noted[1])
    condition, body = (program.computations[loop.attribute(part)] for part in ("condition", "body"))
    start = _source(inside, loop.operands[0])
    if start is None or {start.opcode, body.root.opcode} != {"tuple"}:
        return None
    first = [_integer(program, inside, name, {}) for name in start.operands]
    state = {index: value for index, value in enumerate(first) if value is not None}
    for trip in range(_MOST_TRIPS):
        goes_on = _integer(program, condition, condition.root.name, state)
        if not goes_on:
            return None if goes_on is None else trip
        after = {index: _integer(program, body, body.root.operands[index], state) for index in state}
        state = {index: value for index, value in after.items() if value is not None}
    return None


def _source(computation: Computation, name: str) -> Instruction | None:
    """The instruction that a value comes from, through what leaves it as it is."""
    found = computation.instructions.get(name)
    while found and found.opcode in _UNCHANGED:
        found = computation.instructions.get(found.operands[0])
    return found


def _integer(
    program: Program, computation: Computation, name: str, state: dict[int, int], given: tuple[int | None, ...] = ()
) -> int | None:
    """What an integer instruction comes to; None where that is not known.

    Args:
        program, computation, name: the instruction.
        state: known elements of the tuple that the computation is given.
        given: of a fused computation, its parameters.
    """
    x = _source(computation, name)
    if x is None:
        return None
    if x.opcode == "constant":
        return int(x.operands[0]) if re.fullmatch(r"-?\d+", x.operands[0]) else None
    if x.opcode == "parameter":
        return given[int(x.operands[0])] if given else None
    if x.opcode == "get-tuple-element":
        of = _source(computation, x.operands[0])
        return state.get(int(x.attribute("index"))) if of and of.opcode == "parameter" else None
    if x.opcode not in ("fusion", *_COMPUTED):
        return None
    operands = tuple(_integer(program, computation, operand, state, given) for operand in x.operands)
    if x.opcode == "fusion":
        called = program.computations[x.called[0]]
        return _integer(program, called, called.root.name, {}, operands)
    compute = _COMPARED.get(x.attribute("direction")) if x.opcode == "compare" else _COMPUTED[x.opcode]
    return None if compute is None or None in operands else int(compute(*operands))
