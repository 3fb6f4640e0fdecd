"""Topologies of accelerators that are not attached, by a short text, and what compiling for them needs.

Does not import JAX, as `prepare` must run before JAX is imported. Figures of devices are in `gold_jax.accelerators`.
"""

import difflib
import importlib.util
import math
import os
import re
import sys
from typing import NamedTuple

from gold_jax.accelerators import GPUS, TABLE, TPUS, Chip

GPU_SHARE = 0.75  # the default of XLA_PYTHON_CLIENT_MEM_FRACTION
MEASURED_ON = TABLE["gpus"]["measured"]["on"]  # the card that `Topology.efficiency` was measured on
# The cloud's names count cores where a chip has two, whether or not JAX sees them: v4-8 is four chips.
_COUNTED_IN_CORES = ("v3", "v4", "v5p", "tpu7x")
FORMS = (
    "TYPE:SHAPE for a TPU slice, its shape in chips, as v5e:2x4 or v5p:2x2x2; TYPE-COUNT for the usual shape of that many, as "
    "v5e-8 (chips) or v4-8, v5p-8 (TensorCores, two to a chip, as the cloud counts them); gpu:COUNTxNAME, as gpu:8xh100-80gb"
)


class Topology(NamedTuple):
    """Devices that a run is planned for."""

    name: str  # the text that means it, in full
    kind: str  # "tpu" or "gpu"
    chip: Chip
    chips: int
    hosts: int  # processes that JAX would have, one to a host's virtual machine
    shape: tuple[int, ...] = ()  # chips along each axis of a TPU's torus
    compile_options: dict = {}  # for `jax.experimental.topologies.get_topology_desc`; empty: no compiler knows it

    @property
    def devices(self) -> int:
        """Devices that JAX would have, and a mesh positions for."""
        return self.chips * self.chip.cores

    @property
    def interconnect(self) -> float:
        """Bytes/s that leave a device in one direction over the links that there are, on average; without any, 0."""
        if not self.shape:
            return self.chip.interconnect if self.chips > 1 else 0.0
        # Where an axis is not closed, chips at the ends have fewer links than `Chip.interconnect` counts.
        closed = [size % self.chip.wraps == 0 for size in self.shape]
        if self.chip.links == 6:
            closed = [all(closed)] * len(self.shape)
        there = sum(2.0 if ring else 2 * (size - 1) / size for size, ring in zip(self.shape, closed))
        return self.chip.interconnect * there / self.chip.links

    @property
    def efficiency(self) -> dict[str, float]:
        """Least time over measured time, by phase; empty for devices, or numbers of them, that nothing measured tells of."""
        measured = TABLE["gpus"]["measured"]
        return measured["shares"] if self.chips == 1 and self.chip.name in measured["cards"] else {}


def read_topology(text: str) -> Topology:
    """The devices that a text like "v5e:2x4", "v5e-8" or "gpu:8xh100-80gb" means; a ValueError says what would be right."""
    text = text.strip().lower()
    if text.startswith("gpu:"):
        return _read_gpus(text)
    match = re.fullmatch(r"(?:tpu-)?([a-z]*\d*[a-z]*)(?::(\d+(?:x\d+)*)|-(\d+))", text)
    if not match:
        raise ValueError(f"{text!r} is not a topology. It is {FORMS}.{_nearest(text)}")
    name, shape, count = match.groups()
    name = TABLE["other_names"].get(name, name)  # what the cloud, or its users, call them besides
    if name not in TPUS:
        raise ValueError(f"{name!r} in {text!r} is not a known TPU ({', '.join(TPUS)}).{_nearest(name)}")
    chip = TPUS[name]
    shape = _usual_shape(chip, int(count), text) if count else _checked_shape(chip, shape, text)
    chips, name = math.prod(shape), f"{name}:{'x'.join(map(str, shape))}"
    options = {"topology_name": name}
    if chip.name == "v4":  # as v4 runs today: a chip is one device. The compiler's default is a device per core.
        options["chip_config_name"] = "megacore"
    # Up to a full host's chips are one virtual machine's; larger slices are made of those with four.
    hosts = 1 if chips <= chip.host else chips // 4
    if hosts == 1 and chips != 4:
        options["chips_per_host_bounds"] = (*shape, 1)[:3]
    return Topology(name, "tpu", chip, chips, hosts, shape, options)


def _read_gpus(text: str) -> Topology:
    match = re.fullmatch(r"gpu:(?:(\d+)x)?([a-z].*)", text)
    if not match:
        raise ValueError(f"{text!r} is not a topology. GPUs are gpu:COUNTxNAME, as gpu:8xh100-80gb.")
    count, name = int(match[1] or 1), match[2]
    meant = [name] if name in GPUS else [full for full in GPUS if full.split("-")[0] == name]
    if len(meant) != 1:
        which = f" It could be {' or '.join(meant)}." if meant else _nearest(name)
        raise ValueError(f"{name!r} in {text!r} is not a known GPU ({', '.join(GPUS)}).{which}")
    chip = GPUS[meant[0]]
    if not count or (count > chip.host and count % chip.host):
        raise ValueError(f"{text!r}: {count} GPUs are not 1 to {chip.host}, nor whole hosts of {chip.host}.")
    hosts = -(-count // chip.host)
    options = {}
    if chip.name in TABLE["gpus"]["described"]:
        options = {"target_config": _target_config(chip), "topology": f"1x{hosts}x{count // hosts}"}
    return Topology(f"gpu:{count}x{chip.name}", "gpu", chip, count, hosts, compile_options=options)


def _target_config(chip: Chip) -> str:
    """What XLA's GPU compiler has to know of a card: a `stream_executor.GpuTargetConfigProto` as text."""
    name, capability = TABLE["gpus"]["described"][chip.name]
    known = TABLE["gpus"]["capabilities"]
    memory = {"device_memory_size": chip.hbm_bytes, "memory_bandwidth": int(chip.hbm_bandwidth)}
    values = known["all"] | known[capability] | memory
    fields = " ".join(f"{field}: {value}" for field, value in values.items())
    major, minor = capability.split(".")
    card = f"{fields} cuda_compute_capability {{ major: {major} minor: {minor} }}"
    # The oldest cuDNN that newer versions of JAX work with is 9.
    return f'gpu_device_info {{ {card} }} platform_name: "CUDA" dnn_version_info {{ major: 9 }} device_description_str: "{name}"'


def _usual_shape(chip: Chip, count: int, text: str) -> tuple[int, ...]:
    """The shape that the cloud gives a slice of so many chips (or cores): axes as equal as powers of two allow."""
    cores, axes = 2 if chip.name in _COUNTED_IN_CORES else 1, chip.links // 2
    chips, odd = divmod(count, cores)
    if odd or chips in (0, 2) or chips & (chips - 1):
        unit = "TensorCores, two to a chip," if cores == 2 else "chips"
        example = f"{chip.name}:{'2x2' if axes == 2 else '2x2x1'}"
        usual = f"{count} {unit} have no usual shape; powers of two have"
        raise ValueError(f"{text!r}: {usual}. Any shape can be named, as {example}.")
    exponent = chips.bit_length() - 1
    sizes = [2 ** (exponent // axes + (axis < exponent % axes)) for axis in range(axes)]
    return tuple(sizes if chips == 4 else sorted(sizes))


def _checked_shape(chip: Chip, named: str, text: str) -> tuple[int, ...]:
    axes, shape = chip.links // 2, tuple(map(int, named.split("x")))
    shape += (1,) * (axes - len(shape))
    if len(shape) != axes or not all(shape) or ((shape[0] % 2 or shape[1] % 2) and math.prod(shape) != 1):
        example = {2: "2x2, 2x4, 4x4, … 16x16", 3: "2x2x1, 2x2x2, 2x2x4, … 4x4x4"}[axes]
        legal = f"{axes} axes, the first two even, for a host's chips lie 2 by 2: {example}"
        raise ValueError(f"{text!r}: {chip.name} slices have {legal}; one chip is {'x'.join('1' * axes)}.")
    return shape


def _nearest(name: str) -> str:
    known = {name: f"{name}-8" for name in TPUS} | {name: f"gpu:{name}" for name in GPUS}
    found = difflib.get_close_matches(name.split(":")[0], known, n=1, cutoff=0.5)
    return f" The nearest is {known[found[0]]}." if found else ""


def has_gpu_compiler() -> bool:
    """Whether JAX's CUDA plugin, which brings XLA's GPU compiler with it, is installed."""
    return any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13))


def prepare() -> None:
    """Sets the environment in which JAX is to start; an already imported JAX is told to run on the CPU."""
    # libtpu complains where it cannot find these out; they do not change what it compiles.
    quiet = {"TPU_ACCELERATOR_TYPE": "v5litepod-8", "TPU_WORKER_HOSTNAMES": "localhost"}
    # XLA's GPU compiler warns of sorts that it cannot leave to CUB without a card.
    quiet |= {"TF_CPP_MIN_LOG_LEVEL": "2"}
    # No metadata server is asked which TPU this is; and another process may hold libtpu.
    alone = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    os.environ.update({**quiet, **os.environ, **alone})
    if "jax" in sys.modules:
        sys.modules["jax"].config.update("jax_platforms", "cpu")


def need_compiler(topology: str) -> None:
    """Sees that the TPU compiler is installed; an ImportError says how it gets there."""
    if importlib.util.find_spec("libtpu") is None:
        takes = f"planning for {topology} compiles the run's programs, which takes the TPU compiler (it needs no TPU)"
        how = "pip install 'gold_jax[tpu]', or libtpu alone. GPUs, such as gpu:8xh100-80gb, can be planned without."
        raise ImportError(f"{takes}: {how}")
