"""What a compiled program's devices send each other: bytes by mesh axes, read from the text of the program.

Bytes are those that one device sends over its links, by the ring formulas, for a group of `n` devices:

| collective | bytes | of |
| --- | --- | --- |
| all-gather | `size · (n-1) / n` | the result |
| reduce-scatter | `size · (n-1) / n` | the operand |
| all-reduce | `2 · size · (n-1) / n` | the operand |
| all-to-all | `size · (n-1) / n` | the operand |
| collective-permute, collective-broadcast | `size` | the operand |

times the trips of the loops around it. A `-start` counts and its `-done` does not. How TPU programs look (libtpu
0.0.42.1):

- An all-gather that runs while something else is computed stands in the text three times or more: in a fusion that ends in
  a custom call to `AsyncCollectiveStart`, in the fusions that compute meanwhile, and in one that ends in
  `AsyncCollectiveDone`. The start counts.
- A reduce-scatter is mostly a fusion of an all-reduce and a dynamic-slice of it. It counts as what it does.
- Loops carry no trip count; `hlo.trip_count` finds it. Channel ids are no names: under `shard_map` all are 1.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping

import numpy as np

from gold_jax.planning import hlo
from gold_jax.planning.hlo import Computation, Instruction, Program

OPS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Bytes that each device sends, and how many collectives run, both over a whole call of the program."""

    bytes: float = 0.0
    count: int = 0

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(self.bytes + other.bytes, self.count + other.count)


@dataclasses.dataclass(frozen=True)
class Collectives:
    """A program's traffic.

    Attributes:
        by_axes: by the mesh axes that its groups span, as "fsdp" or "data+fsdp" (in the mesh's order), and operation.
        unknown_loops: where in the program the loops are that do not say how often they run.
    """

    by_axes: dict[str, dict[str, Traffic]]
    unknown_loops: tuple[str, ...]

    def over(self, axes: str) -> Traffic:
        """All operations whose groups span just these axes."""
        return sum(self.by_axes.get(axes, {}).values(), Traffic())

    @property
    def total(self) -> Traffic:
        """All of it."""
        return sum(map(self.over, self.by_axes), Traffic())


def read_collectives(
    text: str | Program, mesh: Mapping[str, int], *, unknown_trips: int | Callable[[str], int] = 1
) -> Collectives:
    """The collectives of a compiled program.

    Args:
        text: `compiled.as_text()`, or what `hlo.read` makes of it.
        mesh: sizes of the mesh's axes in its order, as `dict(mesh.shape)`. A device's id in the program is its position
            in the mesh, rows first.
        unknown_trips: as in `hlo.executed`.
    """
    program, mesh = hlo.read(text) if isinstance(text, str) else text, dict(mesh)
    started = {piece(x) for c in program.computations.values() for x in c.instructions.values() if starts(c, x)}
    executions, loops = hlo.executed(program, unknown_trips)
    by_axes: dict[str, dict[str, Traffic]] = {}
    for inside, x, times, _ in executions:
        if x.opcode.removesuffix("-start") not in OPS:
            continue
        if piece(x) in started and is_piece(x) and not starts(inside, x):
            continue
        op, bytes_, axes = _collective(inside, x, mesh)
        if axes:
            found = by_axes.setdefault(axes, {})
            found[op] = found.get(op, Traffic()) + Traffic(bytes_ * times, times)
    return Collectives({axes: dict(sorted(by_axes[axes].items())) for axes in sorted(by_axes)}, loops)


def _collective(inside: Computation, x: Instruction, mesh: dict[str, int]) -> tuple[str, float, str]:
    """What one collective is, the bytes that a device sends, and the axes along which its groups differ."""
    op, result = x.opcode.removesuffix("-start"), x.type
    if x.opcode.endswith("-start") and op != "all-reduce":  # (operand, result, …)
        result = hlo.elements(result)[1]
    bytes_, groups = hlo.size(result), _groups(x, op, mesh)
    axes = _spanned(groups, mesh)
    if op in ("collective-permute", "collective-broadcast"):
        return op, bytes_, axes
    n = groups.shape[1]
    if op == "reduce-scatter":
        bytes_ *= n
    elif op == "all-reduce" and _scatters(inside, x):
        op = "reduce-scatter"
    return op, bytes_ * (2 if op == "all-reduce" else 1) * (n - 1) / n, axes


def is_piece(instruction: Instruction) -> bool:
    """Whether it is one of several texts of an asynchronous TPU collective."""
    return "async_collective_fusion_config" in instruction.attributes


def piece(instruction: Instruction) -> tuple:
    """What the pieces of one asynchronous TPU collective have in common."""
    found = re.search(r"replica_groups=.*?, [a-z]", instruction.attributes)
    return instruction.opcode, hlo.size(instruction.type), instruction.attribute("channel_id"), found and found[0]


def starts(inside: Computation, instruction: Instruction) -> bool:
    """Whether it is the piece of an asynchronous TPU collective that starts it."""
    return is_piece(instruction) and any(
        instruction.name in x.operands and "AsyncCollectiveStart" in x.attributes for x in inside.instructions.values()
    )


def _scatters(inside: Computation, instruction: Instruction) -> bool:
    """Whether an all-reduce is half of a fused reduce-scatter: its fusion gives a slice of it and nothing else."""
    return inside.root.opcode == "dynamic-slice" and inside.root.operands[0] == instruction.name


def _groups(instruction: Instruction, op: str, mesh: dict[str, int]) -> np.ndarray:
    """The devices that talk to each other, `[groups, n]`; of a permutation, its pairs `[pairs, 2]`."""
    attributes, devices = instruction.attributes, math.prod(mesh.values())
    everyone = np.arange(devices)[None]
    if op == "collective-permute":
        pairs = re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", attributes)
        return np.array(re.findall(r"(\d+),(\d+)", pairs[1]) if pairs else [], int).reshape(-1, 2)
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", attributes)
    named = re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?\)?)\))?(?: \{([^}]*)\})?", attributes)
    listed = re.search(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}", attributes)
    if iota:
        groups = _iota(iota[2]).reshape([int(x) for x in iota[1].split(",")])
    elif named:
        groups = _named(*named.groups())
    else:
        rows = [[int(x) for x in row.split(",")] for row in re.findall(r"\{([\d,]+)\}", listed[1] if listed else "")]
        groups = np.array(rows) if rows else everyone
    # Without this flag the groups are of replicas, of which there is one, and all its partitions take part.
    replicas = op in ("all-gather", "all-reduce", "reduce-scatter") and "use_global_device_ids=true" not in attributes
    return everyone if replicas and groups.size == 1 and "channel_id=" in attributes else groups


def _iota(text: str) -> np.ndarray:
    """`[2,4]T(1,0)`: the numbers from 0 in that shape, transposed, in a row."""
    shape, order = re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text).groups()
    shape = [int(x) for x in shape.split(",")]
    order = [int(x) for x in order.split(",")] if order else range(len(shape))
    return np.arange(math.prod(shape)).reshape(shape).transpose(order).reshape(-1)


def _named(axes: str, devices: str | None, grouped: str | None) -> np.ndarray:
    """Groups by the axes of a mesh of the compiler's, as newer versions write: `mesh['a'=2,'b'=8] {'a','b':(2)4}`.

    `'b':(2)4` is the part of axis `b` with size 4 that has 2 before it.
    """
    sizes = {name: int(size) for name, size in re.findall(r"'?([\w.\-]+)'?=(\d+)", axes)}
    if devices is None:
        ids = np.arange(math.prod(sizes.values()))
    else:
        ids = _iota(devices) if devices.startswith("[") else np.array([int(x) for x in devices.split(",")])
    if grouped is None:
        return ids[None]
    shape, chosen = [], []  # every axis cut where a group begins or ends, and which of the pieces are in groups
    parts = re.findall(r"'?([\w.\-]+)'?(?::\((\d+)\)(\d+))?", grouped)
    for name, size in sizes.items():
        spans = [(int(low or 1), int(low or 1) * int(part or size)) for other, low, part in parts if other == name]
        edges = sorted({1, size, *(edge for span in spans for edge in span)})
        for low, high in zip(edges, edges[1:]):
            if any(begin <= low and high <= end for begin, end in spans):
                chosen.append(len(shape))
            shape.append(high // low)
    rest = [axis for axis in range(len(shape)) if axis not in chosen]
    n = math.prod(shape[axis] for axis in chosen)
    return ids.reshape(shape).transpose([*rest, *chosen]).reshape(-1, n)


def _spanned(groups: np.ndarray, mesh: dict[str, int]) -> str:
    """The mesh axes along which the devices of a group differ, joined; "" where none has two."""
    places = np.unravel_index(groups, tuple(mesh.values()))
    return "+".join(name for name, at in zip(mesh, places) if at.size and (at != at[:, :1]).any())
