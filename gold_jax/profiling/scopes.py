"""Which part of a training step each instruction of a compiled program belongs to, by its `jax.named_scope`s.

A CPU's and a GPU's trace names instructions only, so programs are read while they are in memory, and kept beside it.
"""

import json
import os
import pathlib
import re
from collections.abc import Collection, Mapping, Sequence

import jax.extend.backend

#: A scope in a program, and what the table calls it; "student" is split by direction.
PARTS = {
    "teacher": "teacher forward",
    "loss": "loss, both ways",
    "optimizer": "optimizer",
    "prefill": "sampling: prefill",
    "decode": "sampling: decoding",
    "draw": "sampling: decoding",
}
_SCOPE = re.compile(rf"(?:(?:jvp|transpose|vmap|checkpoint|remat)\()*({'|'.join(('student', *PARTS))})\)*")
# Line of an HLO text: `  ROOT %fusion.3 = f32[8]{0} fusion(%a, %b), …, metadata={op_name="jit(f)/loss/add" …}`
_INSTRUCTION = re.compile(r"^ +(?:ROOT )?%?([\w.-]+) = (.*)", re.MULTILINE)
_OP_NAME = re.compile(r'metadata=\{[^}]*?op_name="([^"]*)"')
_OPERAND = re.compile(r"%([\w.-]+)")

#: Instruction to (part, scope); an empty text where none is known.
Scopes = Mapping[str, tuple[str, str]]


def part_of(scope: str) -> str:
    """The part of a step that an instruction's `op_name` belongs to, by its outermost known scope; empty without one.

    >>> part_of("jit(fused)/transpose(jvp(student))/while/body/dot_general")
    'student backward'
    """
    for component in scope.split("/"):
        if found := _SCOPE.fullmatch(component):
            backward = "backward" if "transpose(" in component else "forward"
            return PARTS.get(found[1], f"student {backward}")
    return ""


def scopes_of(hlo: str) -> dict[str, tuple[str, str]]:
    """Every instruction of an optimized program, given as HLO text.

    Those in no scope, which the compiler adds, count with the first that reads them, or else with the one before them
    in the order of execution; in a computation without any scope with the program's only part, if it has but one.
    """
    parts, scopes = {}, {}
    for computation in re.split("^}", hlo, flags=re.MULTILINE):
        instructions = _INSTRUCTION.findall(computation)
        reader = {}  # the first instruction that reads another
        for name, text in reversed(instructions):  # what reads an instruction comes after it
            scopes[name] = match[1] if (match := _OP_NAME.search(text)) else ""
            parts[name] = part_of(scopes[name]) or parts.get(reader.get(name), "")
            reader |= dict.fromkeys(_OPERAND.findall(text), name)
        before = ""
        for name, _ in instructions:
            before = parts[name] = parts[name] or before
    known = {*parts.values()} - {""}
    only = known.pop() if len(known) == 1 else ""
    return {name: (part or only, scopes[name]) for name, part in parts.items()}


def save_scopes(path: str | os.PathLike) -> None:
    """Writes the scopes of all programs in memory, several of a name where they were compiled for several shapes."""
    programs: dict[str, list] = {}
    for executable in jax.extend.backend.get_backend().live_executables():
        for module in executable.hlo_modules():
            programs.setdefault(module.name, []).append(scopes_of(module.to_string()))
    pathlib.Path(path).write_text(json.dumps(programs), encoding="utf-8")


def load_scopes(path: str | os.PathLike) -> dict[str, list[Scopes]]:
    """What `save_scopes` wrote; nothing where there is no such file."""
    path = pathlib.Path(path)
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def best_match(programs: Sequence[Scopes], instructions: Collection[str]) -> Scopes:
    """Of the programs with one name, that which has most of the instructions that ran."""
    return max(programs, key=lambda scopes: sum(name in scopes for name in instructions), default={})
