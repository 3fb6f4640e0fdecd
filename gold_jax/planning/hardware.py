"""Accelerators that need not be here: their figures by name, slices of them by a short text, what compiling for them needs.

Without JAX, for some of it has to be there before JAX is. Every figure is that of one JAX device, the thing a mesh has positions for: a chip, or, on v3 and tpu7x, one of a chip's
two cores (`Chip.cores` tells). FLOP/s are dense bfloat16 with float32 sums.

Sources. TPUs: the "System architecture" pages of docs.cloud.google.com/tpu (v3, v4, v5e, v5p, v6e, tpu7x); v3's and
v4's links from Jouppi et al., "A Domain-Specific Supercomputer for Training Deep Neural Networks" (656 Gbit/s a link,
four) and "TPU v4" (arXiv:2304.01433; 50 GB/s a link, six). Google's newer pages give both directions of the links
together: v5e 400, v6e 800, v5p and tpu7x 1,200 GB/s a chip; half of that is here. The memory of TPUs is no vendor's
figure but the limit that the compiler (libtpu 0.0.42.1) enforces: «exceeds available HBM (15.75G)». GPUs: NVIDIA's data
sheets of the A100, H100, H200, L4, L40S and A10G, HGX B200, and the Ada and Blackwell white papers for RTX cards; their
memory is what CUDA reports as a card's total, which is less than the name says. Networks: what NICs a host of the
cloud, or a DGX, has.
"""

import dataclasses
import difflib
import importlib.resources
import importlib.util
import json
import math
import os
import re
import sys

GIB = 2**30

# Of a GPU's memory, JAX takes this share when it starts, unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise.
GPU_SHARE = 0.75
# JAX runs on the CPU, on a TPU's host too; no metadata server is asked which TPU this is; and another process may hold libtpu.
_ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
# Without these libtpu complains that it cannot find them out. What they say does not change what it compiles.
_QUIET = {"TPU_ACCELERATOR_TYPE": "v5litepod-8", "TPU_WORKER_HOSTNAMES": "localhost"}


@dataclasses.dataclass(frozen=True)
class Chip:
    """One JAX device of an accelerator.

    Attributes:
        name: as in a topology's text.
        hbm_bytes: memory. TPUs: what the compiler lets a program fill. GPUs: all of it, of which JAX takes `GPU_SHARE`.
        flops: peak dense bfloat16 FLOP/s.
        hbm_bandwidth: bytes/s between memory and compute.
        interconnect: bytes/s that leave the device over all its links to others at once, in one direction: ICI on TPUs,
            where only a slice with wrapped axes and traffic along every axis has use for all of them
            (`Topology.interconnect` has those of a slice); NVLink or PCIe on GPUs.
        network: bytes/s in one direction of its share of the host's NICs; None where that depends on who built the
            host.
        host: chips of a full host.
        cores: devices per chip.
        links: links to neighbours: 4 in a 2D torus, 6 in a 3D one; GPUs, through a switch, 1.
        wraps: a torus axis whose length is a multiple of this is closed to a ring (in a 3D torus, if all are).
    """

    name: str
    hbm_bytes: int
    flops: float
    hbm_bandwidth: float
    interconnect: float
    network: float | None
    host: int
    cores: int = 1
    links: int = 1
    wraps: int = 0


def _chips(kind: str) -> dict[str, Chip]:
    """The rows of `hardware.json`, whose figures are a chip's (GiB of a device, TFLOP/s, GB/s), shared out over its cores."""
    data, found = _DATA[kind], {}
    for name, row in data["chips"].items():
        chip = dict(zip(data["columns"], row))
        cores = chip.get("cores", 1)
        hbm, link, network = (chip[key] and chip[key] * 1e9 / cores for key in ("hbm", "interconnect", "network"))
        memory, flops, host = int(chip["gib"] * GIB), chip["tflops"] * 1e12 / cores, chip.get("host", 8)
        links, wraps = chip.get("links", 1), chip.get("wraps", 0)
        found[name] = Chip(name, memory, flops, hbm, link, network, host, cores, links, wraps)
    return found


_DATA = json.loads((importlib.resources.files("gold_jax.planning") / "hardware.json").read_text())
TPUS, GPUS = _chips("tpus"), _chips("gpus")
_OTHER_NAMES = _DATA["other_names"]  # what the cloud, or its users, call them besides
# The cloud's names count cores where a chip has two, whether or not JAX sees them: v4-8 is four chips.
_COUNTED_IN_CORES = ("v3", "v4", "v5p", "tpu7x")
_SMALL_CUBES = {1: (1, 1, 1), 4: (2, 2, 1), 8: (2, 2, 2), 16: (2, 2, 4)}  # the four chips of a host, then upward
FORMS = (
    "TYPE:SHAPE for a TPU slice, its shape in chips, as v5e:2x4 or v5p:2x2x2; TYPE-COUNT for the usual shape of that many, as "
    "v5e-8 (chips) or v4-8, v5p-8 (TensorCores, two to a chip, as the cloud counts them); gpu:COUNTxNAME, as gpu:8xh100-80gb"
)


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices that a run is planned for.

    Attributes:
        name: the text that means it, in full.
        kind: "tpu" or "gpu".
        chip: what one device has and can.
        chips: how many chips.
        hosts: how many processes JAX would have, one to a host's virtual machine.
        shape: chips along each axis of a TPU's torus; empty for GPUs.
        compile_name: `topology_name` of `jax.experimental.topologies.get_topology_desc(platform="tpu")`; None for GPUs.
        compile_options: its further arguments, with which the compiler sees these devices and hosts.
    """

    name: str
    kind: str
    chip: Chip
    chips: int
    hosts: int
    shape: tuple[int, ...] = ()
    compile_name: str | None = None
    compile_options: dict = dataclasses.field(default_factory=dict, hash=False)

    @property
    def devices(self) -> int:
        """Devices that JAX would have, and a mesh positions for."""
        return self.chips * self.chip.cores

    @property
    def interconnect(self) -> float:
        """Bytes/s that leave a device in one direction over the links that there are, on average; without any, 0.

        In a slice whose axes are not closed, chips at the ends have fewer links than `Chip.interconnect` counts.
        """
        if self.kind == "gpu" or not self.shape:
            return self.chip.interconnect if self.chips > 1 else 0.0
        closed = [size % self.chip.wraps == 0 for size in self.shape]
        if self.chip.links == 6:
            closed = [all(closed)] * len(self.shape)
        there = sum(2.0 if ring else 2 * (size - 1) / size for size, ring in zip(self.shape, closed))
        return self.chip.interconnect * there / self.chip.links

    @property
    def between_hosts(self) -> float | None:
        """Bytes/s in one direction from a device to one of another host: a TPU slice's links, GPUs' share of the NICs."""
        return self.chip.network if self.kind == "gpu" and self.hosts > 1 else self.interconnect


def read_topology(text: str) -> Topology:
    """The devices that a text like "v5e:2x4", "v5e-8" or "gpu:8xh100-80gb" means.

    Raises:
        ValueError: another text; it says what is wrong and what would be right.
    """
    text = text.strip().lower()
    if text.startswith("gpu:"):
        return _read_gpus(text)
    match = re.fullmatch(r"(?:tpu-)?([a-z]*\d*[a-z]*)(?::(\d+(?:x\d+)*)|-(\d+))", text)
    if not match:
        raise ValueError(f"{text!r} is no topology. It is {FORMS}.{_nearest(text)}")
    name, shape, count = match.groups()
    name = _OTHER_NAMES.get(name, name)
    if name not in TPUS:
        raise ValueError(f"{name!r} in {text!r} is no known TPU ({', '.join(TPUS)}).{_nearest(name)}")
    chip = TPUS[name]
    if count is not None:
        return _slice(chip, _usual_shape(chip, int(count), text))
    return _slice(chip, _checked_shape(chip, tuple(int(size) for size in shape.split("x")), text))


def _read_gpus(text: str) -> Topology:
    match = re.fullmatch(r"gpu:(?:(\d+)x)?([a-z].*)", text)
    if not match:
        raise ValueError(f"{text!r} is no topology. GPUs are gpu:COUNTxNAME, as gpu:8xh100-80gb.")
    count, name = int(match[1] or 1), match[2]
    meant = [name] if name in GPUS else [full for full in GPUS if full.split("-")[0] == name]
    if len(meant) != 1:
        which = f" It could be {' or '.join(meant)}." if meant else _nearest(name)
        raise ValueError(f"{name!r} in {text!r} is no known GPU ({', '.join(GPUS)}).{which}")
    chip = GPUS[meant[0]]
    if not count or (count > chip.host and count % chip.host):
        raise ValueError(f"{text!r}: {count} GPUs are not 1 to {chip.host}, nor whole hosts of {chip.host}.")
    return Topology(f"gpu:{count}x{chip.name}", "gpu", chip, count, -(-count // chip.host))


def _usual_shape(chip: Chip, count: int, text: str) -> tuple[int, ...]:
    """The shape that the cloud gives a slice of so many chips (or cores): axes as equal as powers of two allow."""
    cores = 2 if chip.name in _COUNTED_IN_CORES else 1
    chips, odd = divmod(count, cores)
    axes = chip.links // 2
    if odd or chips in (0, 2) or chips & (chips - 1):
        unit = "TensorCores, two to a chip," if cores == 2 else "chips"
        raise ValueError(
            f"{text!r}: {count} {unit} have no usual shape; powers of two have. Any shape can be named, as "
            f"{chip.name}:{'2x2' if axes == 2 else '2x2x1'}."
        )
    exponent = chips.bit_length() - 1
    if axes == 2:
        return 2 ** (exponent // 2), 2 ** (exponent - exponent // 2)
    if chips in _SMALL_CUBES:
        return _SMALL_CUBES[chips]
    return tuple(sorted(2 ** (exponent // 3 + (axis < exponent % 3)) for axis in range(3)))


def _checked_shape(chip: Chip, shape: tuple[int, ...], text: str) -> tuple[int, ...]:
    axes = chip.links // 2
    shape = shape + (1,) * (axes - len(shape))
    whole_hosts = shape[0] and shape[1] and not shape[0] % 2 and not shape[1] % 2
    if len(shape) != axes or not all(shape) or not (whole_hosts or math.prod(shape) == 1):
        example = {2: "2x2, 2x4, 4x4, … 16x16", 3: "2x2x1, 2x2x2, 2x2x4, … 4x4x4"}[axes]
        raise ValueError(
            f"{text!r}: {chip.name} slices have {axes} axes, the first two even, for a host's chips lie 2 by 2: {example}; "
            f"one chip is {'x'.join('1' * axes)}."
        )
    return shape


def _slice(chip: Chip, shape: tuple[int, ...]) -> Topology:
    chips = math.prod(shape)
    name = f"{chip.name}:{'x'.join(map(str, shape))}"
    options = {}
    if chip.name == "v4":  # as v4 runs today: a chip is one device. The compiler's default is a device per core.
        options["chip_config_name"] = "megacore"
    # Up to a full host's chips are one virtual machine's; larger slices are made of those with four.
    hosts = 1 if chips <= chip.host else chips // 4
    if hosts == 1 and chips != 4:
        options["chips_per_host_bounds"] = (*shape, 1)[:3]
    return Topology(name, "tpu", chip, chips, hosts, shape, name, options)


def _nearest(name: str) -> str:
    known = {name: f"{name}-8" for name in TPUS} | {name: f"gpu:{name}" for name in GPUS}
    found = difflib.get_close_matches(name.split(":")[0], known, n=1, cutoff=0.5)
    return f" The nearest is {known[found[0]]}." if found else ""


def prepare() -> None:
    """Sets the environment in which JAX is to start; an already imported JAX is told to run on the CPU."""
    os.environ.update(_ENVIRONMENT)
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    if "jax" in sys.modules:
        sys.modules["jax"].config.update("jax_platforms", "cpu")


def need_compiler(topology: str) -> None:
    """Sees that the TPU compiler is installed.

    Raises:
        ImportError: it is not; the text says how it gets there.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ImportError(
            f"planning for {topology} compiles the run's programs, which takes the TPU compiler (it needs no TPU): pip install "
            "'gold_jax[tpu]', or libtpu alone. GPUs, such as gpu:8xh100-80gb, are planned without."
        )
