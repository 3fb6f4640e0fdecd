"""What the devices send each other in an update, by arithmetic, and how long that takes at least.

Counted by the ring formulas of `planning.collectives`, for one device: layers' weights gathered for the forward and
again for the backward pass, in the compute dtype; their gradients summed where they are kept, likewise; heads gathered
and the head's float32 gradient summed; embeddings exchanged, there and back; along `tensor` what attention's output
projection and the MLP's add up.
"""

import math
from collections.abc import Iterable, Mapping

from gold_jax.bucketing import bucket
from gold_jax.models.config import DecoderConfig
from gold_jax.planning.arithmetic import parameter_count
from gold_jax.planning.footprint import Footprint
from gold_jax.planning.hardware import Topology
from gold_jax.sharding.placement import ROW_AXES, Placement, sharded_axes

_FLOAT32 = 4
Sent = dict[str, float]  # bytes by the mesh axes that the devices differ along, as in `Collectives.by_axes`


def sent_by(footprint: Footprint, program: str) -> Sent:
    """What one device sends while a program of `Footprint.programs` runs once; of decoding, for one token of each row."""
    of = {"teacher": _teacher, "prefill": _prefill, "decoding": _decoding, "optimizer": lambda _: {}}
    return of.get(program, _student)(footprint)


def laying_out(footprint: Footprint) -> Sent:
    """What it takes to make the copy of the student that decoding reads."""
    student, placement = footprint.pair.student, footprint.placement
    count = parameter_count(student)
    c = footprint.itemsize
    layers = _gather(placement, _width_axes(student, placement), count.layers * c / placement.tensor_size)
    return added([layers, _gather(placement, _head_axes(student, placement), student.vocab_size * student.width * c)])


def _student(footprint: Footprint) -> Sent:
    student, placement, c = footprint.pair.student, footprint.placement, footprint.itemsize
    layers = parameter_count(student).layers * c / placement.tensor_size
    width, cut = _width_axes(student, placement), _head_axes(student, placement)
    head = student.vocab_size * student.width
    parts = [
        _gather(placement, width, 2 * layers),
        _summed(placement, width, layers),
        _gather(placement, cut, head * c),
        _summed(placement, cut, head * _FLOAT32, also=("tensor",)),
        _exchange(footprint, student, placement, passes=2),
    ]
    if not student.tied:
        parts.append(_summed(placement, cut, head * _FLOAT32, scatter=False))
    parts.append(_along_tensor(footprint, student, 5 if footprint.args.gradient_checkpointing else 4))
    if footprint.reads:
        teacher = footprint.pair.teacher
        cut = _head_axes(teacher, footprint.teacher_placement)
        parts.append(_gather(placement, cut, teacher.vocab_size * teacher.width * c))
    return added(parts)


def _teacher(footprint: Footprint) -> Sent:
    teacher, placement = footprint.pair.teacher, footprint.teacher_placement
    layers = parameter_count(teacher).layers * footprint.itemsize / placement.tensor_size
    gathered = _gather(placement, _width_axes(teacher, placement), layers)
    return added([gathered, _exchange(footprint, teacher, placement), _along_tensor(footprint, teacher, 2)])


def _prefill(footprint: Footprint) -> Sent:
    student, placement = footprint.pair.student, footprint.placement
    layers = parameter_count(student).layers * footprint.itemsize / placement.tensor_size
    tokens = footprint.sampled_rows // footprint.shards * bucket(footprint.prompt_length - 1)
    gathered = _gather(placement, _width_axes(student, placement), layers)
    exchanged = _exchange(footprint, student, placement, tokens=tokens)
    return added([gathered, exchanged, _along_tensor(footprint, student, 2, tokens=tokens)])


def _decoding(footprint: Footprint) -> Sent:
    student, placement = footprint.pair.student, footprint.placement
    rows = footprint.sampled_rows // footprint.shards
    exchanged = _exchange(footprint, student, placement, tokens=rows)
    return added([exchanged, _along_tensor(footprint, student, 2, tokens=rows)])


def _width_axes(config: DecoderConfig, placement: Placement) -> tuple[str, ...]:
    """The mesh axes that a layer's width is cut over."""
    size = (config.width, config.mlp_width)
    return sharded_axes(placement.param_sharding(size, ("embed", "mlp")), 0)


def _head_axes(config: DecoderConfig, placement: Placement) -> tuple[str, ...]:
    """The mesh axes that the embedding's and the head's width are cut over."""
    return sharded_axes(placement.param_sharding((config.vocab_size, config.width), ("vocab", "embed")), 1)


def _gather(placement: Placement, axes: tuple[str, ...], size: float) -> Sent:
    """So many bytes gathered, or scattered, over some axes."""
    n = math.prod(placement.mesh.shape[axis] for axis in axes)
    return {_named(placement, axes): size * (n - 1) / n} if n > 1 else {}


def _summed(
    placement: Placement, axes: tuple[str, ...], size: float, *, scatter: bool = True, also: tuple[str, ...] = ()
) -> Sent:
    """A gradient summed over all devices that have a part in it, a share of it kept by each along the axes that it is cut over.

    `scatter` False: it is cut already when it is made. `also`: axes beside those of rows whose devices have a part.
    """
    kept = size / math.prod(placement.mesh.shape[axis] for axis in axes)
    rest = tuple(axis for axis in (*ROW_AXES, *also) if axis not in axes and placement.mesh.shape[axis] > 1)
    n = math.prod(placement.mesh.shape[axis] for axis in rest)
    both = {_named(placement, rest): 2 * kept * (n - 1) / n} if n > 1 else {}
    return added([_gather(placement, axes, size) if scatter else {}, both])


def _exchange(
    footprint: Footprint, config: DecoderConfig, placement: Placement, *, passes: int = 1, tokens: int | None = None
) -> Sent:
    """Embeddings of a device's tokens, looked up where their columns lie."""
    tokens = footprint.line if tokens is None else tokens
    size = passes * tokens * config.width * footprint.itemsize
    axes = _head_axes(config, placement)
    shared, same = tuple(a for a in axes if a in ROW_AXES), tuple(a for a in axes if a not in ROW_AXES)
    return added([_gather(placement, shared, size), _gather(placement, same, size)])


def _along_tensor(footprint: Footprint, config: DecoderConfig, times: int, *, tokens: int | None = None) -> Sent:
    """Sums over `tensor` of hidden states, so many in each layer."""
    t = footprint.placement.tensor_size
    tokens = footprint.line if tokens is None else tokens
    size = times * config.layers * tokens * config.width * footprint.itemsize
    return {"tensor": 2 * size * (t - 1) / t} if t > 1 else {}


def _named(placement: Placement, axes: tuple[str, ...]) -> str:
    return "+".join(axis for axis in placement.mesh.shape if axis in axes and placement.mesh.shape[axis] > 1)


def added(parts: Iterable[Mapping[str, float]]) -> Sent:
    """The sum of several."""
    total: Sent = {}
    for part in parts:
        for axes, size in part.items():
            total[axes] = total.get(axes, 0.0) + size
    return total


def times(sent: Mapping[str, float], factor: float) -> Sent:
    """So many times as much."""
    return {axes: factor * size for axes, size in sent.items()}


def link_seconds(sent: Mapping[str, float], mesh: Mapping[str, int], topology: Topology) -> float:
    """The least time that sending takes.

    On TPUs all links of the slice share all traffic. GPUs of one host have their links to each other,
    `Chip.interconnect`; what a group of several hosts' GPUs has to bring from host to host goes over the hosts'
    networks besides, at the same time.
    """
    within, between = 0.0, 0.0
    for axes, size in sent.items():
        within += size
        if topology.kind == "gpu" and topology.hosts > 1:
            here, hosts = _spread(axes.split("+"), mesh, topology.chip.host)
            n = here * hosts
            # Of what is gathered, `size·n/(n-1)`, a host brings in the other hosts' share, through all of its group's cards.
            between += size * n / (n - 1) * (hosts - 1) / hosts / here if hosts > 1 else 0.0
    if not within:
        return 0.0
    speed = topology.interconnect
    seconds = within / speed if speed else math.inf
    network = topology.between_hosts
    return max(seconds, between / network if between and network else 0.0)


def _spread(axes: list[str], mesh: Mapping[str, int], host: int) -> tuple[int, int]:
    """Of a group along some axes, how many devices it has on one host, and on how many hosts."""
    inside, here, hosts = 1, 1, 1  # devices lie in the mesh rows first: the last axis changes fastest
    for axis in reversed(list(mesh)):
        size = mesh[axis]
        fits = max(1, min(size, host // inside))
        if axis in axes:
            here, hosts = here * fits, hosts * (size // fits)
        inside *= size
    return here, hosts


__all__ = ["Sent", "added", "laying_out", "link_seconds", "sent_by", "times"]
