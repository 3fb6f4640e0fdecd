"""What the processes of a run tell each other: numbers, rows of tokens, and whether they have the same settings."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gold_jax.parallel.processes import count, names

_FRAME = 256  # words of the first message: most are shorter


def _gather_words(words: np.ndarray) -> np.ndarray:
    """[N] uint32 of this process -> [P, N]. Words of 32 bits are what passes through every device unchanged."""
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(words))


def _gather_bytes(data: bytes) -> list[bytes]:
    """The bytes of every process, of any lengths."""
    frame = np.zeros(_FRAME, np.uint32)
    frame[:2] = np.array([len(data)], np.uint64).view(np.uint32)
    room = 4 * (_FRAME - 2)
    if len(data) <= room:
        frame[2:] = _words(data, _FRAME - 2)
    frames = np.ascontiguousarray(_gather_words(frame))
    lengths = frames[:, :2].copy().view(np.uint64)[:, 0].tolist()
    body = frames[:, 2:]
    if max(lengths) > room:
        body = _gather_words(_words(data, _rounded(max(lengths))))
    return [row.tobytes()[:length] for row, length in zip(body, lengths)]


def _rounded(length: int) -> int:
    """Words enough for some bytes: one of few sizes, because a program is compiled for each."""
    return 1 << (length // 4).bit_length()


def _words(data: bytes, size: int) -> np.ndarray:
    return np.frombuffer(data.ljust(4 * size, b"\0"), np.uint32)


def all_gather(values: np.ndarray) -> np.ndarray:
    """The arrays of all processes, of one shape and dtype: [...] -> [P, ...], bit for bit.

    Raises:
        ValueError: shapes or dtypes differ, or the dtype is not of numbers.
    """
    values = np.asarray(values)
    if values.dtype.hasobject:
        raise ValueError(f"arrays of {values.dtype} cannot be sent to other processes")
    if count() == 1:
        return values[None]
    kind = f"{values.dtype.name}{list(values.shape)}"
    kinds, rows = zip(*(row.split(b"\0", 1) for row in _gather_bytes(kind.encode() + b"\0" + values.tobytes())))
    if problem := describe_difference("the array that they exchange", [k.decode() for k in kinds], names()):
        raise ValueError(problem)
    return np.stack([np.frombuffer(row, values.dtype).reshape(values.shape) for row in rows])


def all_reduce_sum(values: np.ndarray) -> np.ndarray:
    """Sums over the processes, of the same shape: the same in all of them, and exact for whole numbers."""
    return np.asarray(all_gather(values).sum(axis=0))


def all_reduce_max(values: np.ndarray) -> np.ndarray:
    """The largest of each number over the processes, of the same shape."""
    return np.asarray(all_gather(values).max(axis=0))


def all_gather_ragged(rows: Sequence[np.ndarray]) -> list[list[np.ndarray]]:
    """The rows of all processes, such as token ids: for each process its own, however many and long.

    Args:
        rows: one-dimensional int32 arrays.

    Raises:
        ValueError: a row is something else.
    """
    rows = [np.asarray(row) for row in rows]
    for i, row in enumerate(rows):
        if row.ndim != 1 or row.dtype != np.int32:
            raise ValueError(f"row {i} is {row.dtype.name}{list(row.shape)}: rows are one-dimensional int32 arrays")
    if count() == 1:
        return [rows]
    head = np.array([len(rows), *map(len, rows)], np.int32)
    return [_unpack(data) for data in _gather_bytes(b"".join(row.tobytes() for row in (head, *rows)))]


def _unpack(data: bytes) -> list[np.ndarray]:
    values = np.frombuffer(data, np.int32)
    lengths, tokens = values[1 : 1 + values[0]], values[1 + values[0] :]
    ends = np.cumsum(lengths)
    return [tokens[end - length : end].copy() for length, end in zip(lengths, ends)]


def assert_same_across_processes(what: str, value: Any) -> None:
    """Checks that all processes have the same.

    Args:
        what: what it is, for the error: "--seed", "the settings".
        value: anything that JSON can hold; of mappings, the error shows the keys that differ.

    Raises:
        ValueError: in all processes; says which have what.
    """
    if count() == 1:
        return
    values = [json.loads(data) for data in _gather_bytes(json.dumps(value, sort_keys=True).encode())]
    if problem := describe_difference(what, values, names()):
        raise ValueError(problem)


def describe_difference(what: str, values: Sequence[Any], named: Sequence[str]) -> str | None:
    """How the values of the processes differ, in one sentence; None where they do not.

    >>> describe_difference("--seed", [1, 1, 2], ["a (process 0)", "b (process 1)", "c (process 2)"])
    'The processes differ in --seed: a (process 0) and 1 other have 1; c (process 2) has 2.'
    """
    groups = _groups(values)
    if len(groups) == 1:
        return None
    if all(isinstance(value, dict) for value in values):
        keys = [k for k in {k: 0 for value in values for k in value} if len(_groups([v.get(k) for v in values])) > 1]
        parts = [f"{key}: {_describe_groups(_groups([v.get(key) for v in values]), named)}" for key in keys[:5]]
        more = f"; and {len(keys) - 5} more" if len(keys) > 5 else ""
        return f"The processes differ in {what}. {'; '.join(parts)}{more}."
    return f"The processes differ in {what}: {_describe_groups(groups, named)}."


def _groups(values: Sequence[Any]) -> dict[str, list[int]]:
    """Which processes have the same, the largest group first."""
    found: dict[str, list[int]] = {}
    for i, value in enumerate(values):
        found.setdefault(json.dumps(value, sort_keys=True), []).append(i)
    return dict(sorted(found.items(), key=lambda item: -len(item[1])))


def _describe_groups(groups: Mapping[str, Sequence[int]], named: Sequence[str]) -> str:
    parts = []
    for text, (first, *others) in list(groups.items())[:4]:
        who = named[first]
        if others:
            who += f" and {len(others)} other{'s' * (len(others) > 1)}"
        parts.append(f"{who} {'have' if others else 'has'} {text if len(text) <= 80 else text[:79] + '…'}")
    return "; ".join(parts) + ("; …" if len(groups) > 4 else "")
