"""What a compiled program's devices send each other: bytes by mesh axes, read from the text of the program.

Bytes are those that one device sends over its links, by the ring formulas: for a group of `n` devices `(n-1) / n` of what
is gathered, scattered or exchanged, twice that for an all-reduce, all of it for a permutation; times the trips of the
loops around it. A `-start` counts and its `-done` does not. In TPU programs (libtpu 0.0.42.1) an all-gather that runs
meanwhile stands in three fusions or more: that which ends in a custom call to `AsyncCollectiveStart` counts, those that
compute and that which ends in `AsyncCollectiveDone` do not. Channel ids are no names: under `shard_map` all are 1.
"""

import collections
import math
import re
from collections.abc import Iterable, Mapping

import numpy as np

from gold_jax.planning import hlo
from gold_jax.planning.hlo import Computation, Execution, Instruction

_OP = re.compile(r"(all-gather|all-reduce|reduce-scatter|(ragged-)?all-to-all|collective-(permute|broadcast))(-start)?")


def read_collectives(executions: Iterable[Execution], mesh: Mapping[str, int]) -> dict[tuple[str, str], float]:
    """Bytes that each device sends in a call of the program, by mesh axes that groups span ("data+fsdp") and by operation.

    `executions` are as `hlo.executed`. A device's id in the program is its position in the mesh, rows first.
    """
    executions = [run for run in executions if _OP.fullmatch(run[1].opcode)]
    started = {_piece(x) for inside, x, *_ in executions if starts(inside, x)}
    found = collections.Counter()
    for inside, x, times, _ in executions:
        if _piece(x) in started and is_piece(x) and not starts(inside, x):
            continue
        op, sent, axes = _collective(inside, x, dict(mesh))
        if axes:
            found[axes, op] += sent * times
    return dict(sorted(found.items()))


def _collective(inside: Computation, x: Instruction, mesh: dict[str, int]) -> tuple[str, float, str]:
    """What one collective is, the bytes that a device sends, and the axes along which its groups differ."""
    op, result = x.opcode.removesuffix("-start"), x.type
    if x.opcode.endswith("-start") and op != "all-reduce":  # (operand, result, …)
        result = hlo.elements(result)[1]
    sent, groups = float(hlo.size(result)), _groups(x, op, mesh)
    places = np.unravel_index(groups, tuple(mesh.values()))
    axes = "+".join(name for name, at in zip(mesh, places) if at.size and (at != at[:, :1]).any())
    if op in ("collective-permute", "collective-broadcast"):
        return op, sent, axes
    n = groups.shape[1]
    if op == "reduce-scatter":
        sent *= n
    # An all-reduce in a fusion that gives a slice of it and nothing else is half of a reduce-scatter.
    elif op == "all-reduce" and inside.root.opcode == "dynamic-slice" and inside.root.operands[0] == x.name:
        op = "reduce-scatter"
    return op, sent * (2 if op == "all-reduce" else 1) * (n - 1) / n, axes


def is_piece(x: Instruction) -> bool:
    """Whether it is one of several texts of an asynchronous TPU collective."""
    return "async_collective_fusion_config" in x.attributes


def _piece(x: Instruction) -> tuple:
    """What the pieces of one asynchronous TPU collective have in common."""
    groups = re.search(r"replica_groups=.*?, [a-z]", x.attributes)
    return x.opcode, hlo.size(x.type), x.attribute("channel_id"), groups and groups[0]


def starts(inside: Computation, x: Instruction) -> bool:
    """Whether it is the piece of an asynchronous TPU collective that starts it."""
    users = (y for y in inside.instructions.values() if x.name in y.operands)
    return is_piece(x) and any("AsyncCollectiveStart" in user.attributes for user in users)


def _groups(x: Instruction, op: str, mesh: dict[str, int]) -> np.ndarray:
    """The devices that talk to each other, `[groups, n]`; of a permutation, its pairs `[pairs, 2]`."""
    everyone = np.arange(math.prod(mesh.values()))[None]
    if op == "collective-permute":
        pairs = re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", x.attributes)
        return np.array(re.findall(r"(\d+),(\d+)", pairs[1]) if pairs else [], int).reshape(-1, 2)
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", x.attributes)
    named = re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?\)?)\))?(?: \{([^}]*)\})?", x.attributes)
    listed = re.search(r"replica_groups=\{(\{.*?\})\}", x.attributes)
    if iota:
        groups = _iota(iota[2]).reshape(_integers(iota[1]))
    elif named:
        groups = _named(*named.groups())
    else:
        groups = np.array([_integers(row) for row in listed[1].split("},{")]) if listed else everyone
    # Without this flag the groups are of replicas, of which there is one, and all its partitions take part.
    replicas = op in ("all-gather", "all-reduce", "reduce-scatter") and "use_global_device_ids=true" not in x.attributes
    return everyone if replicas and groups.size == 1 and "channel_id=" in x.attributes else groups


def _integers(text: str) -> list[int]:
    return [int(digits) for digits in re.findall(r"\d+", text)]


def _iota(text: str) -> np.ndarray:
    """`[2,4]T(1,0)`: the numbers from 0 in that shape, transposed, in a row."""
    shape, _, order = text.partition("T")
    shape = _integers(shape)
    return np.arange(math.prod(shape)).reshape(shape).transpose(_integers(order) or range(len(shape))).reshape(-1)


def _named(axes: str, devices: str | None, grouped: str | None) -> np.ndarray:
    """Groups by the axes of a mesh of the compiler's, as newer versions write: `mesh['a'=2,'b'=8] {'a','b':(2)4}`.

    `'b':(2)4` is the part of axis `b` with size 4 that has 2 before it.
    """
    sizes = {name: int(size) for name, size in re.findall(r"'?([\w.\-]+)'?=(\d+)", axes)}
    places, n = np.indices(tuple(sizes.values())).reshape(len(sizes), -1), 1
    ids = _iota(devices or f"[{places.shape[1]}]") if not devices or "[" in devices else np.array(_integers(devices))
    if grouped is None:
        return ids[None]
    for name, before, part in re.findall(r"'?([\w.\-]+)'?(?::\((\d+)\)(\d+))?", grouped):
        axis, count = list(sizes).index(name), int(part or sizes[name])
        step = sizes[name] // (int(before or 1) * count)
        places[axis] -= places[axis] // step % count * step  # what devices of a group differ in
        n *= count
    return ids[np.lexsort(places)].reshape(-1, n)
