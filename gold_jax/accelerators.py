"""Accelerators, which need not be here: the figures of one JAX device of each, by name. Without JAX.

A device is a chip, or, on v3 and tpu7x, one of a chip's two cores. `accelerators.json` says where the figures are from.
"""

import importlib.resources
import json
from typing import NamedTuple

GIB = 2**30


class Chip(NamedTuple):
    """One JAX device of an accelerator; bandwidths are in bytes/s."""

    name: str
    hbm_bytes: int  # TPUs: what the compiler lets a program fill. GPUs: all of it, of which JAX takes a share
    flops: float  # peak dense bfloat16 FLOP/s, with float32 sums
    hbm_bandwidth: float
    interconnect: float  # in one direction over all links to others, ICI (a slice has fewer), NVLink or PCIe
    network: float | None  # in one direction, of the host's NICs; None where that depends on who built the host
    host: int = 8  # chips of a full host
    cores: int = 1  # devices per chip
    links: int = 1  # to neighbours: 4 in a 2D torus, 6 in a 3D one; GPUs, through a switch, 1
    wraps: int = 0  # a torus axis whose length is a multiple of this is closed to a ring (in a 3D torus, if all are)


def _chip(name: str, gib: float, tflops: float, hbm: float, link: float, network: float | None, *rest: int) -> Chip:
    """A row of `accelerators.json`: GiB of a device; TFLOP/s and GB/s of a chip, which its cores share."""
    one = 1e9 / (rest[1] if rest else 1)
    return Chip(name, int(gib * GIB), tflops * 1e3 * one, hbm * one, link * one, network and network * one, *rest)


TABLE = json.loads((importlib.resources.files("gold_jax") / "accelerators.json").read_text())
TPUS, GPUS = ({name: _chip(name, *row) for name, row in TABLE[kind]["chips"].items()} for kind in ("tpus", "gpus"))
# By what JAX calls a device's kind, in full: variants of a card differ.
DEVICE_KINDS = {kind: (TPUS | GPUS)[name] for kind, name in TABLE["device_kinds"].items()}
