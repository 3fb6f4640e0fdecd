"""What the processes of a run exchange: numbers and token ids over the devices, settings through JAX's key-value store."""

import contextlib
import itertools
import json
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from gold_jax.distributed.initialize import coordination_client, process_names
from gold_jax.distributed.watchdog import PeerFailed, read_failures
from gold_jax.wording import listed, plural

_FRAME = 256  # words of the first message: most are shorter
_calls = itertools.count()  # all processes make these calls in the same order; each has keys of its own


def assert_same_across_processes(what: str, value: Any) -> None:
    """Raises in all processes where they do not have the same JSON value, called `what` in the error.

    A ValueError says which processes have what, of mappings which keys differ; a PeerFailed, which ended with an error
    before it came here.
    """
    count, me = jax.process_count(), jax.process_index()
    if count == 1:
        return
    client, names, key = coordination_client(), process_names(), f"gold_jax/same/{next(_calls)}"
    if client is None:
        raise RuntimeError("call gold_jax.distributed.initialize first: the processes cannot compare what they have")

    def wait_for(name: Any) -> Any:
        while True:
            try:
                return json.loads(client.blocking_key_value_get(f"{key}/{name}", 2000))
            except jax.errors.JaxRuntimeError:
                for i, error in read_failures(client).items():
                    raise PeerFailed(f"{names[i]} ended with an error: {error}.") from None

    client.key_value_set(f"{key}/{me}", json.dumps(value, sort_keys=True))
    if me == 0:
        found = describe_difference(what, [wait_for(i) for i in range(count)], names)
        client.key_value_set(f"{key}/verdict", json.dumps(found))
    if problem := wait_for("verdict"):
        raise ValueError(problem)


@contextlib.contextmanager
def raised_in_all_processes(what: str, kinds: Any = Exception) -> Iterator[None]:
    """A context that every process enters: an error of these kinds in one is raised in all.

    In that one it is its own, in the others a ValueError that names the process. Other errors are not shared.
    """
    error = None
    try:
        yield
    except kinds as caught:
        error = caught
    try:
        assert_same_across_processes(what, None if error is None else str(error))
    except ValueError as difference:
        raise error or difference from None
    if error is not None:
        raise error


def all_gather(values: np.ndarray) -> np.ndarray:
    """The arrays of all processes, of one shape and numeric dtype (or a ValueError): [...] -> [P, ...], unchanged."""
    values = np.asarray(values)
    if values.dtype.hasobject:
        raise ValueError(f"arrays of {values.dtype} cannot be sent to other processes")
    if jax.process_count() == 1:
        return values[None]
    kind = f"{values.dtype.name}{list(values.shape)}"
    kinds, rows = zip(*(row.split(b"\0", 1) for row in _gather_bytes(kind.encode() + b"\0" + values.tobytes())))
    if problem := describe_difference("the array that they exchange", [k.decode() for k in kinds], process_names()):
        raise ValueError(problem)
    return np.stack([np.frombuffer(row, values.dtype).reshape(values.shape) for row in rows])


def all_reduce_sum(values: np.ndarray) -> np.ndarray:
    """Sums over the processes, of the same shape: the same in all of them, and exact for whole numbers."""
    return np.asarray(all_gather(values).sum(axis=0))


def all_reduce_max(values: np.ndarray) -> np.ndarray:
    """The largest of each number over the processes, of the same shape."""
    return np.asarray(all_gather(values).max(axis=0))


def all_gather_ragged(rows: Sequence[np.ndarray]) -> list[list[np.ndarray]]:
    """The rows of all processes, int32 arrays (else a ValueError): for each process its own, however many and long."""
    rows = [np.asarray(row) for row in rows]
    for i, row in enumerate(rows):
        if row.ndim != 1 or row.dtype != np.int32:
            raise ValueError(f"row {i} is {row.dtype.name}{list(row.shape)}: rows are one-dimensional int32 arrays")
    if jax.process_count() == 1:
        return [rows]
    gathered, header = [], np.array([len(rows), *map(len, rows)], np.int32)
    for data in _gather_bytes(np.concatenate([header, *rows]).tobytes()):
        values = np.frombuffer(data, np.int32)
        lengths, tokens = values[1 : 1 + values[0]], values[1 + values[0] :]
        gathered.append([part.copy() for part in np.split(tokens, np.cumsum(lengths))[: len(lengths)]])
    return gathered


def _gather_bytes(data: bytes) -> list[bytes]:
    """The bytes of every process, of any lengths: short ones in one frame, longer ones in a second exchange."""
    header, capacity = np.array([len(data)], np.uint64).tobytes(), 4 * _FRAME - 8
    rows = _gather_words(header + (data if len(data) <= capacity else b""), _FRAME)
    lengths = [int(np.frombuffer(row[:8], np.uint64)[0]) for row in rows]
    if max(lengths) <= capacity:
        return [row[8 : 8 + length] for row, length in zip(rows, lengths)]
    rows = _gather_words(data, 1 << (max(lengths) // 4).bit_length())  # few sizes: a program is compiled for each
    return [row[:length] for row, length in zip(rows, lengths)]


def _gather_words(data: bytes, size: int) -> list[bytes]:
    """The bytes of every process, padded to words of 32 bits, which is what passes through every device unchanged."""
    words = np.frombuffer(data.ljust(4 * size, b"\0"), np.uint32)
    return [row.tobytes() for row in np.asarray(multihost_utils.process_allgather(words))]


def describe_difference(what: str, values: Sequence[Any], names: Sequence[str]) -> str | None:
    """How the values of the processes differ, in one sentence; None where they do not.

    >>> describe_difference("--seed", [1, 1, 2], ["a (process 0)", "b (process 1)", "c (process 2)"])
    'The processes differ in --seed: a (process 0) and 1 other have 1; c (process 2) has 2.'
    """
    if not all(isinstance(value, dict) for value in values):
        found = _who_has_what(values, names)
        return f"The processes differ in {what}: {found}." if found else None
    keys = dict.fromkeys(key for value in values for key in value)
    by_key = {key: _who_has_what([value.get(key) for value in values], names) for key in keys}
    parts = [f"{key}: {found}" for key, found in by_key.items() if found]
    return f"The processes differ in {what}. {listed(parts, 5, '; ', '; and')}." if parts else None


def _who_has_what(values: Sequence[Any], names: Sequence[str]) -> str:
    """Which processes have which value, what most have first; empty where all have the same."""
    groups: dict[str, list[str]] = {}
    for name, value in zip(names, values):
        groups.setdefault(json.dumps(value, sort_keys=True), []).append(name)
    if len(groups) == 1:
        return ""
    parts = []
    for text, (first, *others) in sorted(groups.items(), key=lambda item: -len(item[1]))[:4]:
        who = f"{first} and {plural(len(others), 'other')} have" if others else f"{first} has"
        parts.append(f"{who} {text if len(text) <= 80 else text[:79] + '…'}")
    return "; ".join(parts) + ("; …" if len(groups) > 4 else "")
