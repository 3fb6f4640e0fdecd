"""What a compiled program computes and moves on one device: FLOPs and bytes of memory traffic, read from its text.

`compiled.cost_analysis()` counts the body of a loop once, a Pallas kernel not at all; here an instruction counts as
often as it runs. FLOPs are those of products, two for a multiplication with an addition. Bytes are what instructions
outside of fusions read from and write to HBM: a fusion's slices count as slices, an update in place as what is new, and
what lies in another memory space (a TPU's VMEM is `S(1)` in a layout) not at all. On GPUs products are calls of cuBLAS or
stand in fusions, attention is a call of cuDNN.
"""

import math
import re
from typing import NamedTuple

import numpy as np

from gold_jax.planning import hlo
from gold_jax.planning.collectives import is_piece, starts
from gold_jax.planning.hlo import Computation, Execution, Instruction, Program

# Instructions that move nothing: names for what lies there, or the end of what its start has counted.
_FREE = "parameter constant tuple get-tuple-element bitcast while conditional call after-all".split()
_FREE += ["partition-id", "replica-id", "optimization-barrier", "async-start"]
_FREE_CALLS = ("AllocateBuffer", "Bitcast", "AssumeGatherIndicesInBound")
_SCRATCH = re.compile(r"[su]8\[\d*\]")
_SLICES = ("dynamic-slice", "slice", "gather", "slice-start")
# Products of scores or of shares that splash attention's kernels make: scores once again in each of the backward ones.
_KERNEL_PRODUCTS = {"_fwd": 2, "_dq": 3, "_dkv": 4}
_CUDNN_PRODUCTS = {"__cudnn$fmhaSoftmax": 2, "__cudnn$fmhaSoftmaxBackward": 5}
_PASSES = {"high": 3, "highest": 6}  # bfloat16 products on a TPU for one of float32 factors, by `operand_precision`


def read_work(program: Program, executions: list[Execution]) -> tuple[float, float]:
    """FLOPs and bytes of one call of a program, of which `executions` are all that runs (`hlo.executed`)."""
    flops = sum(times * _flops(inside, x) for inside, x, times, _ in executions)
    moved = sum(times * _bytes(program, inside, x) for inside, x, times, fused in executions if not fused)
    return float(flops), float(moved)


def _flops(inside: Computation, x: Instruction) -> float:
    if x.opcode == "custom-call" and "splash" in x.name:
        # Its mask skips blocks that nothing is seen of: half the pairs, for causal attention.
        shapes = [hlo.dimensions(inside.instructions[name].type) for name in x.operands]
        queries, keys, *_ = (shape for shape in shapes if len(shape) == 4)  # [rows, heads, tokens, head_dim]
        products = next((count for part, count in _KERNEL_PRODUCTS.items() if part in x.name), 0)
        return 2.0 * products * math.prod(queries) * keys[2] / 2
    target = re.search(r'custom_call_target="([^"]*)"', x.attributes) if x.opcode == "custom-call" else None
    if target and target[1] in _CUDNN_PRODUCTS:
        head_dim = hlo.dimensions(inside.instructions[x.operands[0]].type)[-1]
        return 2.0 * _CUDNN_PRODUCTS[target[1]] * _attention_pairs(x) * head_dim
    if x.opcode not in ("dot", "convolution") and not (target and target[1].startswith("__cublas$")):
        return 0.0
    precision = re.search(r'operand_precision"?[=:]\s*[{[]"?(\w+)', x.attributes)
    left, right = (hlo.dimensions(inside.instructions[name].type) for name in x.operands[:2])
    if x.opcode == "convolution":
        products = _convolution(x, left, right)
    else:
        axes = re.search(r'lhs_contracting_dim(?:ension)?s"?[=:]\s*[{[]([\d,"]*)', x.attributes)
        inner = math.prod(left[int(axis)] for axis in re.findall(r"\d+", axes[1])) if axes else 1
        products = math.prod(hlo.dimensions(hlo.elements(x.type)[0])) * inner
    return 2.0 * products * (_PASSES.get(precision[1].lower(), 1) if precision else 1)


def _attention_pairs(x: Instruction) -> float:
    """Pairs of queries and keys that a call of cuDNN's attention computes, of all rows and heads."""
    shape = re.search(r'"intermediate_tensor_shape":.*?"dimensions":\s*\[([^\]]*)\]', x.attributes)
    *heads, queries, keys = map(int, re.findall(r"\d+", shape[1]))
    window = re.search(r'"sliding_window_length":\s*"?(\d+)', x.attributes)
    near = min(int(window[1]) if window else 0, keys) or keys
    causal = "CAUSAL" in x.attributes or near < keys
    return math.prod(heads) * (queries * near - near * near / 2 if causal else queries * keys)


def _convolution(x: Instruction, *sides: tuple[int, ...]) -> float:
    """TPUs compute products as convolutions; batch axes are spatial ones, of which padding leaves one tap to each output."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", x.attributes).groups()
    left, right, out = (dict(zip(names, shape)) for names, shape in zip(labels, (*sides, hlo.dimensions(x.type))))
    window = dict(re.findall(r"(\w+)=([\dx_\-]+)", x.attributes.partition("window={")[2].partition("}")[0]))
    taps = 1
    for at, axis in enumerate(sorted(filter(str.isdigit, out))):
        given = {name: values.split("x")[at] for name, values in window.items()}
        stride, spread, gap = (int(given.get(name, 1)) for name in ("stride", "rhs_dilate", "lhs_dilate"))
        low, reach = int(given.get("pad", "0_0").split("_")[0]), (left[axis] - 1) * gap + 1
        # For each tap, the first and the last output that it meets an entry from; of dilated entries only one in `gap` is any.
        start = np.arange(right[axis]) * spread - low
        first, last = np.maximum(0, -(start // stride)), np.minimum(out[axis] - 1, (reach - 1 - start) // stride)
        taps *= np.maximum(0, last - first + 1).sum() / gap
    return left["b"] * right["i"] * out["f"] * taps / int(x.attribute("batch_group_count") or 1)


def _bytes(program: Program, inside: Computation, x: Instruction) -> float:
    free_call = x.opcode == "custom-call" and any(name in x.attributes for name in _FREE_CALLS)
    if x.opcode in _FREE or x.opcode.endswith(("-done", "-update")) or free_call:
        return 0
    if x.opcode in ("fusion", "fusion-start"):
        return _fusion(program, inside, x)
    read = [inside.instructions[name].type for name in x.operands if name in inside.instructions]
    made = x.type
    if changed := _updates(inside, x):
        given = read[1:2] if x.opcode == "dynamic-update-slice" else read[changed.first :]
        return sum(map(_hbm, given)) + (changed.bytes if _hbm(made) else 0)
    if x.opcode in ("copy-start", "slice-start"):  # (destination, source, …) or ((source), destination, …)
        made = hlo.elements(made)[x.opcode == "slice-start"]
    elif x.opcode.endswith("-start") and x.opcode != "all-reduce-start" and len(hlo.elements(made)) > 1:
        made = hlo.elements(made)[1]
    elif x.opcode == "custom-call" and made.startswith("("):  # without the scratch memory of a library's kernel
        return sum(map(_hbm, read)) + sum(_hbm(one) for one in hlo.elements(made) if not _SCRATCH.match(one))
    if x.opcode in _SLICES:
        return (hlo.size(made) if _hbm(read[0]) else 0) + _hbm(made)
    return sum(map(_hbm, read)) + _hbm(made)


def _fusion(program: Program, inside: Computation, x: Instruction) -> float:
    called, total = program[x.called[0]], 0
    for at, name in enumerate(x.operands):
        if given := _hbm(inside.instructions[name].type):
            total += min(given, _taken(program, called, _parameter(called, at)))
    body = called.instructions
    roots = [body[name] for name in called.root.operands] if called.root.opcode == "tuple" else [called.root]
    # Of one that runs meanwhile: (operands, result, …).
    results = hlo.elements(hlo.elements(x.type)[1] if x.opcode == "fusion-start" else x.type)
    for root, type_ in zip(roots, results):
        while root.opcode in ("bitcast", "copy") and root.operands[0] in body:
            root = body[root.operands[0]]
        if not _hbm(type_) or root.opcode == "parameter" or (is_piece(root) and not starts(called, root)):
            continue  # it is elsewhere, or was there before
        changed = _updates(called, root)
        total += changed.bytes if changed else hlo.size(type_)
    return total


class _Update(NamedTuple):
    """An update in place: the operands before `first` are the arrays changed; so many `bytes` of them are written."""

    first: int
    bytes: int


def _updates(inside: Computation, x: Instruction) -> _Update | None:
    """None for an instruction that changes nothing in place."""
    if x.opcode not in ("dynamic-update-slice", "scatter"):
        return None
    first = (len(x.operands) - 1) // 2 if x.opcode == "scatter" else 1  # arrays, indices, as many updates
    new = x.operands[first + 1 :] if x.opcode == "scatter" else x.operands[1:2]
    return _Update(first, sum(hlo.size(inside.instructions[name].type) for name in new))


def _parameter(called: Computation, at: int) -> Instruction:
    return next(y for y in called.instructions.values() if y.opcode == "parameter" and int(y.operands[0]) == at)


def _taken(program: Program, body: Computation, value: Instruction) -> float:
    """How much of a value the instructions of a fusion read, those of the fusions in it too."""
    total = 0
    for user in body.instructions.values():
        if value.name not in user.operands:
            continue
        first = user.operands[0] == value.name
        called = program[user.called[0]] if user.opcode == "fusion" else None
        only_renames = called is not None and called.root.opcode == "bitcast" and len(called.instructions) == 2
        if user.opcode == "bitcast" or only_renames:
            total += _taken(program, body, user)
        elif called is not None:
            given = [_parameter(called, at) for at, name in enumerate(user.operands) if name == value.name]
            total += sum(_taken(program, called, parameter) for parameter in given)
        elif user.opcode in _SLICES and first:
            total += hlo.size(user.type)
        elif user.opcode != "tuple" and not (first and _updates(body, user)):
            total += hlo.size(value.type)
    return total


def _hbm(type_: str) -> int:
    """Bytes of a type's arrays that lie in a device's main memory."""
    if type_.startswith("("):
        return sum(map(_hbm, hlo.elements(type_)))
    return 0 if re.search(r"S\([1-9]\d*\)", type_) else hlo.size(type_)
