"""Peak figures of TPUs and GPUs, by name, for one JAX device of each. Does not import JAX.

A device is a chip, or, on v3 and tpu7x, one of a chip's two cores. `accelerators.json` names the sources.
"""

import importlib.resources
import json
from typing import NamedTuple

GIB = 2**30


class Chip(NamedTuple):
    """One JAX device of an accelerator; bandwidths are in bytes/s."""

    name: str
    hbm_bytes: int  # TPUs: what the compiler lets a program use. GPUs: all memory, of which JAX preallocates a share
    flops: float  # peak dense bfloat16 FLOP/s, with float32 sums
    hbm_bandwidth: float
    interconnect: float  # in one direction over all links to others, ICI (a slice has fewer), NVLink or PCIe
    network: float | None  # in one direction, of the host's NICs; None if hosts differ
    host: int = 8  # chips of a full host
    cores: int = 1  # devices per chip
    links: int = 1  # to neighbours: 4 in a 2D torus, 6 in a 3D one; GPUs, through a switch, 1
    wraps: int = 0  # a torus axis whose length is a multiple of this is closed to a ring (in a 3D torus, if all are)


def _chip(name: str, gib: float, tflops: float, hbm: float, link: float, network: float | None, *rest: int) -> Chip:
    """A `Chip` from a row of `accelerators.json`: GiB of a device; TFLOP/s and GB/s of a chip, shared by its cores."""
    one = 1e9 / (rest[1] if rest else 1)
    return Chip(name, int(gib * GIB), tflops * 1e3 * one, hbm * one, link * one, network and network * one, *rest)


TABLE = json.loads((importlib.resources.files("gold_jax") / "accelerators.json").read_text())
TPUS, GPUS = ({name: _chip(name, *row) for name, row in TABLE[kind]["chips"].items()} for kind in ("tpus", "gpus"))
# By JAX's full `device_kind`: variants of a card differ.
DEVICE_KINDS = {kind: (TPUS | GPUS)[name] for kind, name in TABLE["device_kinds"].items()}
