"""What an update costs each device at least: operations, memory traffic, bytes sent, and the seconds that follow.

Work is counted by `planning.arithmetic` for the rows of one shard and divided by the devices along `tensor`; gradients
and optimizer by what a device keeps of them. Rows are as long as they may be and every token is a group of its own. Of
the completions a share of lmbda is written by the student, all to their full length, in a cache of which the slots in
use are read. It is a floor: what overlaps perfectly in it (computing, reading, sending) does not in a run, and between
the phases it counts no time at all.
"""

import dataclasses
from collections.abc import Mapping

from gold_jax.bucketing import bucket
from gold_jax.models.attention import choose
from gold_jax.models.config import DecoderConfig
from gold_jax.planning import arithmetic
from gold_jax.planning.arithmetic import Reading, Roofline
from gold_jax.planning.footprint import STUDENT, Footprint, device_bytes
from gold_jax.planning.hardware import Topology
from gold_jax.planning.traffic import Sent, added, laying_out, link_seconds, times

# Products of float32 factors as such, `jax.lax.Precision.HIGHEST`, are six of bfloat16 ones on TPUs.
_FLOAT32_PRODUCTS = 6


@dataclasses.dataclass(frozen=True)
class Phase:
    """A part of an update, on one device.

    Attributes:
        name: "teacher", "student", "optimizer", "prefill" or "decoding".
        flops: operations, those done again too.
        model_flops: those that the models need, however they are computed.
        hbm_bytes: between memory and compute.
        sent: bytes by mesh axes.
        seconds: the least time, by resource.
    """

    name: str
    flops: float
    model_flops: float
    hbm_bytes: float
    sent: Sent
    seconds: Roofline


def phases(
    footprint: Footprint, topology: Topology, sent: Mapping[str, Sent], *, platform: str, attention: str = "auto"
) -> tuple[Phase, ...]:
    """The phases of an update, in their order.

    Args:
        footprint: the run.
        topology: its devices.
        sent: of each program of the footprint, what one device sends each time that it runs; of decoding, for one
            token.
        platform, attention: as in `models.attention.choose`.
    """
    made = _Phases(footprint, topology, platform, attention)
    found = made.training(sent)
    return (made.sampling(sent) if footprint.samples else ()) + found


class _Phases:
    def __init__(self, footprint: Footprint, topology: Topology, platform: str, attention: str):
        self.footprint, self.topology = footprint, topology
        self.platform, self.attention = platform, attention
        self.mesh = dict(footprint.placement.mesh.shape)
        self.tensor = footprint.placement.tensor_size

    def training(self, sent: Mapping[str, Sent]) -> tuple[Phase, ...]:
        f, c, passes = self.footprint, self.footprint.itemsize, self.footprint.args.gradient_accumulation_steps
        student, teacher = f.pair.student, f.pair.teacher if f.reads else None
        width = bucket(f.length)
        rows, positions = [width] * f.each * passes, f.each * (f.length - f.prompt_length) * passes
        heads = positions * self._losses()
        read = Reading(f.line * passes, rows, heads)
        attention = self._attention(student, width)
        work = arithmetic.training_step(
            student,
            read,
            teacher,
            None if teacher is None else Reading(f.line * passes, rows, positions),
            remat=f.args.gradient_checkpointing,
            chunk=f.chunk,
            micro_batches=passes,
            attention=attention,
            itemsize=c,
            teacher_param_bytes=c,
        )
        flops, moved = dict(work.flops), dict(work.hbm_bytes)
        kept = f.student / (4 * arithmetic.parameter_count(student).total) * self.tensor
        # Each pass over the layers reads them gathered, in the compute dtype, which they are rounded to once.
        moved["student parameters"] *= c / 4
        moved["student parameters"] += passes * device_bytes(student, f.placement, 4, of="layers") * self.tensor
        for name in ("gradients", "optimizer"):
            moved[name] *= kept
        needed = 3 * arithmetic.forward(student, read, attention=attention).total_flops
        needed += arithmetic.head_flops(student, heads, 3) + flops.get("teacher head", 0)
        found = []
        if teacher is not None:
            mine, its_bytes = (
                flops.pop("teacher forward"),
                moved.pop("teacher parameters") + moved.pop("teacher activations"),
            )
            found.append(self._phase("teacher", mine, mine, its_bytes, times(sent.get("teacher", {}), passes)))
        update = moved.pop("optimizer") if f.accumulates else None
        steps = [sent.get(STUDENT[0], {}), times(sent.get(STUDENT[1], {}), passes - 1)]
        found.append(self._phase("student", sum(flops.values()), needed, sum(moved.values()), added(steps)))
        if update is not None:
            found.append(self._phase("optimizer", 0, 0, update, sent.get("optimizer", {})))
        return tuple(found)

    def sampling(self, sent: Mapping[str, Sent]) -> tuple[Phase, ...]:
        f, c, student, args = self.footprint, self.footprint.itemsize, self.footprint.pair.student, self.footprint.args
        rows = f.sampled_rows // f.shards
        rounds = args.lmbda * f.each * args.gradient_accumulation_steps / rows
        count, new = arithmetic.parameter_count(student), args.max_completion_length
        width = bucket(f.prompt_length - 1)
        prompts = Reading(rows * width, [width] * rows)
        read = arithmetic.forward(student, prompts, attention=self._attention(student, width), itemsize=c)
        copies = f.placement.kv_repeats(student.heads, student.kv_heads)

        def cache(slots: int) -> float:
            return copies * rows * arithmetic.cache_bytes(student, slots, itemsize=c)

        calls = min(1.0, args.lmbda * args.gradient_accumulation_steps)
        copied = (f.student + f.decoding_weights) * self.tensor
        bytes_ = rounds * (read.total_bytes + count.layers * c + cache(f.prompt_length)) + calls * copied
        sends = added([times(sent.get("prefill", {}), rounds), times(laying_out(f), calls)])
        prefill = self._phase("prefill", rounds * read.total_flops, rounds * read.total_flops, bytes_, sends)
        slots = f.prompt_length + new // 2
        step = arithmetic.decode_step(student, rows, slots, itemsize=c)
        one = step.hbm_bytes["layers"] + step.hbm_bytes["head"] + cache(slots)
        steps = rounds * new
        flops = steps * step.total_flops
        return prefill, self._phase("decoding", flops, flops, steps * one, times(sent.get("decoding", {}), steps))

    def _losses(self) -> int:
        """How many losses meet the student's head."""
        spec = self.footprint.spec
        return 1 if spec is None else bool(spec.distillation_weight) + bool(spec.crossentropy_weight)

    def _attention(self, config: DecoderConfig, length: int) -> str:
        requested = self.attention, self.platform, self.footprint.dtype, config.head_dim, config.attention_softcap
        return choose(*requested, length=length)

    def _phase(self, name: str, flops: float, needed: float, hbm_bytes: float, sent: Sent) -> Phase:
        """A phase from the work of one shard."""
        flops, needed, hbm_bytes = (x / self.tensor for x in (flops, needed, hbm_bytes))
        chip, products = self.topology.chip, _FLOAT32_PRODUCTS if self.footprint.itemsize == 4 else 1
        seconds = Roofline(
            products * flops / chip.flops, hbm_bytes / chip.hbm_bandwidth, link_seconds(sent, self.mesh, self.topology)
        )
        return Phase(name, flops, needed, hbm_bytes, sent, seconds)


__all__ = ["Phase", "phases"]
