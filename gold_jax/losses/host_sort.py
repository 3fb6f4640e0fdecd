"""Sorting on the host: what `divergence.sorted_l1` does on CPUs, where XLA's own sort is several times slower than numpy's.

Letters: `C` rows, `V` and `W` values of either side.
"""

import functools
import os
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np


def can_sort_on_host() -> bool:
    """Whether programs on CPUs may call back.

    A callback waits for another of JAX's threads. With a single core there is none, and where a program runs on several
    devices they may all be held by a device that waits for this one: both wait for ever.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return cores > 1 and jax.device_count() == 1


def l1_and_signs(ours: jax.Array, theirs: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The L1 distance of both sides sorted, the shorter padded with zeros, and its gradient for the first.

    Args:
        ours: float32 `[C, V]`, none negative.
        theirs: float32 `[C, W]`, none negative.

    Returns:
        The distance float32 `[C]`, and int8 `[C, V]`: 1 for values larger than what stands opposite, -1 for smaller
        ones.

    Raises:
        ValueError: this process may use a single core, or there are several devices.
    """
    if not can_sort_on_host():
        raise ValueError(
            "sorting on the host takes two cores or more and a single device, and this process has fewer cores or more devices; "
            "sort with xla."
        )
    rows = ours.shape[0]
    shapes = jax.ShapeDtypeStruct((rows,), np.float32), jax.ShapeDtypeStruct(ours.shape, np.int8)
    return jax.pure_callback(_l1_and_signs, shapes, ours, theirs, vmap_method="sequential")


def _l1_and_signs(ours, theirs) -> tuple[np.ndarray, np.ndarray]:
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    loss, signs = np.zeros(len(ours), np.float32), np.zeros(ours.shape, np.int8)
    workers = max(1, min(len(ours), os.cpu_count() or 1))
    cuts = np.linspace(0, len(ours), workers + 1).astype(int)
    work = functools.partial(_sort_rows, ours, theirs, loss, signs)
    if workers == 1:
        work(0, len(ours))
    else:
        with ThreadPoolExecutor(workers) as pool:  # numpy sorts without holding Python's lock
            list(pool.map(work, cuts[:-1], cuts[1:]))
    return loss, signs


def _sort_rows(ours, theirs, loss, signs, start: int, stop: int) -> None:
    """Fills rows `start` to `stop` of the two results."""
    index = np.arange(ours.shape[1], dtype=np.int64)
    common = min(ours.shape[1], theirs.shape[1])
    for row in range(start, stop):
        # Floats that are not negative sort as their bits do; the index below them comes along, so one sort gives the ranks too.
        packed = ours[row].view(np.int32).astype(np.int64) << 32 | index
        packed.sort()
        order = packed & 0xFFFFFFFF
        sorted_ours = ours[row][order]
        sorted_theirs = _largest_ascending(theirs[row], common)
        difference = sorted_ours[len(sorted_ours) - common :] - sorted_theirs
        sign = np.ones(len(sorted_ours), np.int8)  # beyond the common ones, zero stands opposite
        sign[: len(sorted_ours) - common] = sorted_ours[: len(sorted_ours) - common] > 0
        sign[len(sorted_ours) - common :] = (difference > 0).view(np.int8) - (difference < 0).view(np.int8)
        signs[row, order] = sign
        beyond = float(theirs[row].sum(dtype=np.float64) - sorted_theirs.sum(dtype=np.float64))
        rest = float(sorted_ours[: len(sorted_ours) - common].sum(dtype=np.float64))
        loss[row] = np.abs(difference).sum(dtype=np.float64) + rest + np.maximum(0.0, beyond)  # not max: it drops NaN


def _largest_ascending(values: np.ndarray, count: int) -> np.ndarray:
    """The `count` largest values, ascending."""
    bits = values.view(np.int32)
    if 2 * count < len(bits):  # the others need no order
        bits = np.partition(bits, len(bits) - count)[len(bits) - count :]
    return np.sort(bits)[len(bits) - count :].view(np.float32)
