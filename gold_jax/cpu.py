"""What makes runs on a CPU faster or smaller than XLA and glibc make them by themselves.

The first two are off in the library, on in the commands; the third changes no setting and is on in both.

| what | without | with | measured |
| --- | --- | --- | --- |
| numpy sorts whole vocabularies (`sorts_on_host`) | 0.80 s | 0.24 s | CPU time of the loss, 32,000 × 49,152 entries, exact (`benchmarks/loss.py`) |
| huge pages for what malloc gives (`restart_with_huge_pages`) | 1.3 s | 0.9 s | an off-policy step of a 135M student, 2 cores, one run each |
| freed memory goes back to the system (`release_freed_memory`) | 564 MiB | 491 MiB | resident after the same loss is compiled and called once |

Nothing here imports JAX when it is imported: a command starts its process again before JAX is there.
"""

import contextlib
import ctypes
import functools
import os
import platform
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

# Entries of the larger vocabulary below which XLA sorts all the same: a row of 4,000 takes numpy 0.2 ms and XLA 0.4, and a
# program that calls the host is compiled anew in every process, which JAX keeps of others.
FEWEST_SORTED_ON_HOST = 8192

_enabled = False


@contextlib.contextmanager
def enabled() -> Iterator[None]:
    """Within it `sorted_l1` sorts on the host where `sort` is "auto".

    Whether it is on is looked up when a function is traced: a function that was compiled before stays as it was.
    """
    global _enabled
    before, _enabled = _enabled, True
    try:
        yield
    finally:
        _enabled = before


def restart_with_huge_pages() -> None:
    """Replaces this process by itself (`execv`) with huge pages switched on in glibc; returns where that is no use.

    A step on a CPU takes and frees as much memory as the gradients fill, and clearing it in pages of 4 KiB takes a
    third of the step. Only a process's start can change what glibc asks for. Nothing is changed where the user has set
    `glibc.malloc.hugetlb` in `GLIBC_TUNABLES` (0 keeps small pages).
    """
    given = os.environ.get("GLIBC_TUNABLES", "")
    if platform.libc_ver()[0] != "glibc" or "glibc.malloc.hugetlb" in given:
        return
    os.environ["GLIBC_TUNABLES"] = ":".join(filter(None, (given, "glibc.malloc.hugetlb=1")))
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def release_freed_memory() -> bool:
    """Gives the system what this process has freed, such as the copies that loading and compiling make; whether it did.

    It does only with glibc on Linux.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        return bool(ctypes.CDLL(None).malloc_trim(0))
    except AttributeError:  # another C library
        return False


def sorts_on_host() -> bool:
    """Whether "auto" sorts on the host: this is `enabled`, and programs may call back."""
    return _enabled and can_call_host()


def can_call_host() -> bool:
    """Whether programs on CPUs may call back.

    A callback waits for another of JAX's threads. With a single core there is none, and where a program runs on several
    devices they may all be held by a device that waits for this one: both wait for ever.
    """
    import jax

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return cores > 1 and jax.device_count() == 1


def sorted_l1_and_signs(student: np.ndarray, teacher: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The L1 distance of both sides sorted, the shorter padded with zeros, and its gradient for the first.

    Of float32 `[..., V]` and `[..., W]`, none negative: the distance float32 `[...]`, and int8 `[..., V]`: 1 for values
    larger than what stands opposite, -1 for smaller ones.
    """
    leading, ours = student.shape[:-1], np.asarray(student).reshape(-1, student.shape[-1])
    theirs = np.asarray(teacher).reshape(-1, teacher.shape[-1])
    loss, signs = np.zeros(len(ours), np.float32), np.zeros(ours.shape, np.int8)
    workers = max(1, min(len(ours), os.cpu_count() or 1))
    cuts = np.linspace(0, len(ours), workers + 1).astype(int)
    with ThreadPoolExecutor(workers) as pool:  # numpy sorts without holding Python's lock
        list(pool.map(functools.partial(_sort_rows, ours, theirs, loss, signs), cuts[:-1], cuts[1:]))
    return loss.reshape(leading), signs.reshape(student.shape)


def _sort_rows(ours, theirs, loss, signs, start: int, stop: int) -> None:
    """Fills rows `start` to `stop` of the two results."""
    index, common = np.arange(ours.shape[1], dtype=np.int64), min(ours.shape[1], theirs.shape[1])
    alone = ours.shape[1] - common  # so many of ours, the smallest, have zero opposite
    for row in range(start, stop):
        # Floats that are not negative sort as their bits do; the index below them comes along, so one sort gives the ranks too.
        packed = ours[row].view(np.int32).astype(np.int64) << 32 | index
        packed.sort()
        order = packed & 0xFFFFFFFF
        mine, other = ours[row][order], _largest_ascending(theirs[row], common)
        difference = mine[alone:] - other
        sign = (mine > 0).view(np.int8)
        sign[alone:] = (difference > 0).view(np.int8) - (difference < 0).view(np.int8)
        signs[row, order] = sign
        beyond = float(theirs[row].sum(dtype=np.float64) - other.sum(dtype=np.float64))
        rest = float(mine[:alone].sum(dtype=np.float64))
        loss[row] = np.abs(difference).sum(dtype=np.float64) + rest + np.maximum(0.0, beyond)  # not max: it drops NaN


def _largest_ascending(values: np.ndarray, count: int) -> np.ndarray:
    """The `count` largest values, ascending."""
    bits = values.view(np.int32)
    if 2 * count < len(bits):  # the others need no order
        bits = np.partition(bits, len(bits) - count)[len(bits) - count :]
    return np.sort(bits)[len(bits) - count :].view(np.float32)
