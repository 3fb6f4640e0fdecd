"""The programs of a run, compiled for devices that are not here: what they hold, what they send, and how long compiling takes.

Nothing of a model is there but its shapes. The step, its loss and the sampler are those that training calls; a batch
has rows as long as the settings allow, which share no beginning.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import pathlib
import re
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gold_jax.bucketing import bucket
from gold_jax.config import SFTConfig
from gold_jax.loading import LoadedModel
from gold_jax.models.decoder import Decoder
from gold_jax.models.functional import merge, split
from gold_jax.planning.collectives import Collectives, read_collectives
from gold_jax.planning.sizes import Pair, Sizes
from gold_jax.rollout import decode_state as sampling
from gold_jax.rollout.sampler import STOP_SLOTS
from gold_jax.sharding.placement import ROW_AXES, Placement
from gold_jax.text.batch import Row, SideTokens, build_batches, build_token_batches
from gold_jax.text.vocabulary import VocabularyMap
from gold_jax.training.build import Match, build_run
from gold_jax.training.objective import with_hidden


@dataclasses.dataclass(frozen=True)
class Program:
    """One compiled program, in bytes of one device.

    Attributes:
        arguments: what it is given.
        fresh: what it returns in memory of its own, not in its arguments' place.
        temporaries: what it needs while it runs: of all that the compiler lays out, what is neither argument nor
            result. (Its `temp_size_in_bytes` adds up buffers that are not there at once.)
        code: the program itself, which lies on the device as long as it may be called.
        seconds: that compiling took.
        collectives: what it sends.
        error: what the compiler said where it gave up; then the numbers are zero.
    """

    arguments: int = 0
    fresh: int = 0
    temporaries: int = 0
    code: int = 0
    seconds: float = 0.0
    collectives: Collectives | None = None
    error: str | None = None


class PlannedRun(Sizes):
    """A run's programs and what lies on a device, before anything is there.

    Args:
        args: the settings.
        pair: the models.
        placement: of the student; its mesh may be of devices that are only described.
        platform: what the devices are, of `models.attention.PLATFORMS`.
        attention: as in `Decoder`.
    """

    def __init__(
        self, args: SFTConfig, pair: Pair, placement: Placement, *, platform: str = "tpu", attention: str | None = None
    ):
        super().__init__(args, pair, placement.row_shards)
        self.placement = placement
        make = functools.partial(Decoder.abstract, dtype=self.dtype, attention=attention or "auto", platform=platform)
        self.student = _placed(make(pair.student, remat=args.gradient_checkpointing, placement=placement))
        teacher = match = None
        if pair.teacher is not None:
            teacher_placement = Placement(placement.mesh, args.teacher_layout)
            teacher = _placed(make(pair.teacher, param_dtype=self.dtype, placement=teacher_placement))
            match = _match(pair)
        sides = [model and LoadedModel(model, None, "") for model in (self.student, teacher)]
        self.run = build_run(args, *sides, placement, total_steps=1000, match=match)
        self.state = self.run.shapes()

    # what is there

    def resident(self) -> dict[str, int]:
        """Bytes of one device that are taken all the time, by part."""
        found = {"student": device_bytes(self.state.params), "optimizer": device_bytes(self.state.optimizer)}
        if self.pair.teacher is not None:
            # The teacher's head is one of its parameters, reordered where it lies.
            found["teacher"] = device_bytes(self.run.step.constants._replace(teacher_head=None))
        if self.args.gradient_accumulation_steps > 1:
            found["gradients"] = device_bytes(self.state.params)
        return found

    # its programs

    def programs(self) -> dict[str, Callable[[], Any]]:
        """Every program of an update, lowered when called."""
        batch, found = self.batch(), {}
        step, params = self.run.step, self.state.params
        constants = step.constants
        if step.objective.teacher_forward is not None:
            lines = batch.teacher.packed
            found["teacher"] = lambda: step.programs["teacher_forward"].lower(constants, lines)
            hidden = jax.eval_shape(step.objective.teacher_forward, constants, lines)
            batch = with_hidden(batch, _abstract(hidden, self.placement.sharding(ROW_AXES)))
        names = ("fused",) if self.args.gradient_accumulation_steps == 1 else ("first", "add", "update")
        metrics = jax.eval_shape(step.objective.loss, params, constants, batch)
        metrics = jax.tree.map(lambda x: _abstract(x, self.placement.replicated), metrics)
        given = {
            "fused": (self.state, constants, batch),
            "first": (params, constants, batch),
            "add": (params, params, metrics, constants, batch),
            "update": (self.state, params, metrics[0]),
        }
        for name in names:
            program = step.programs[name]
            found[_SHOWN[name]] = lambda program=program, name=name: program.lower(*given[name])
        if self.samples:
            found |= {"prefill": self._lower_prefill, "decoding": self._lower_decode}
        return found

    def batch(self) -> Any:
        """A micro-batch of rows as long as they may be, as shapes on the mesh."""
        rng, each = np.random.default_rng(0), self.args.per_device_train_batch_size
        made, prompt = [], min(self.prompt_length, self.length - 1)
        for _ in range(each):
            sides = []
            for config in (self.pair.student, self.pair.teacher or self.pair.student):
                ids = rng.integers(0, config.vocab_size, self.length).astype(np.int32)
                sides.append(SideTokens(ids[:prompt], ids[prompt:], np.arange(self.length - prompt)))
            made.append(Row(*sides, groups=self.length - prompt, text="", stopped=True))
        if self.pair.teacher is None:
            rows = [(np.concatenate(r.student[:2]), np.arange(self.length) >= prompt) for r in made]
            (batch,) = build_token_batches(rows, each)
        else:
            spec = self.run.spec
            groups = "all" if spec.groups == "positional" else spec.groups
            (batch,) = build_batches(made, each, merge=spec.merge, groups=groups, text=spec.of_text)
        sharding = self.placement.sharding(ROW_AXES)
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((x.shape[0] * self.shards, *x.shape[1:]), x.dtype, sharding=sharding), batch
        )

    def cache(self) -> Any:
        """The cache and what is known of the rows, as shapes on the mesh."""
        return self._sampling()[:2]

    def decoding_weights(self) -> Any:
        """The copy of the weights that decoding reads, as shapes on the mesh."""
        return self._sampling()[2]

    @functools.cache  # noqa: B019  (lives as long as the plan)
    def _sampling(self) -> tuple:
        config, placement = self.pair.student, self.placement
        empty = functools.partial(
            sampling.empty_slots.__wrapped__,
            config=config,
            dtype=jnp.dtype(self.dtype),
            placement=placement,
            rows=self.sampled_rows,
            slots=self.slots,
            new=self.args.max_completion_length,
        )
        key = jax.eval_shape(lambda: jax.random.key(0))
        cache, decode_state = jax.eval_shape(empty, key)
        weights = jax.eval_shape(lambda params: merge(self.run.graph, params).decoding_weights(), self.state.params)
        return (
            jax.tree.map(_abstract, cache, sampling.cache_shardings(placement, cache)),
            jax.tree.map(lambda x: _abstract(x, placement.replicated), decode_state),
            jax.tree.map(_abstract, weights, self.student.decoding_shardings()),
        )

    def _lower_decode(self):
        cache, decode_state, weights = self._sampling()
        integer = jax.ShapeDtypeStruct((), jnp.int32)
        real = jax.ShapeDtypeStruct((), jnp.float32)
        stops = jax.ShapeDtypeStruct((STOP_SLOTS,), jnp.int32)
        settings = sampling.SamplingOptions(real, integer, real, stops, integer)
        return sampling.decode_until.lower(
            self.run.graph, self.state.params, weights, cache, decode_state, settings, integer, integer, integer
        )

    def _lower_prefill(self):
        cache, decode_state, _ = self._sampling()
        width = bucket(self.prompt_length - 1)

        def integers(*shape):
            return jax.ShapeDtypeStruct(shape, jnp.int32)

        rows, key = self.sampled_rows, jax.eval_shape(lambda: jax.random.key(0))
        each = [integers(rows)] * 4
        return sampling.prefill_into_slots.lower(
            self.run.graph, self.state.params, cache, decode_state, integers(rows, width), *each, key
        )


def _placed(model: Decoder) -> Decoder:
    """An abstract model whose parameters' shapes say where they lie."""
    _, params = split(model)
    return model.replace(jax.tree.map(_abstract, params, model.shardings(model.placement)))


def _match(pair: Pair) -> Match:
    """Vocabularies of the sizes given, in an order that is not the entries' own."""
    sizes = pair.student.vocab_size, pair.teacher.vocab_size
    if pair.matched is None:
        return Match(VocabularyMap.identity(*sizes), None, True)
    matched = pair.matched
    orders = [np.roll(np.arange(size, dtype=np.int32), 1) for size in sizes]
    routes = [np.full(size - matched, matched, np.int32) for size in sizes]
    # Two stop tokens on either side: the usual number.
    return Match(VocabularyMap(*orders, matched, matched, *sizes, *routes), ((0, 1), (0, 1)), False)


_SHOWN = {"fused": "student", "first": "student", "add": "student, further micro-batches", "update": "optimizer"}


def compile_program(lower: Callable[[], Any], mesh: Mapping[str, int], *, trips: int = 1) -> Program:
    """Compiles a program for the devices of its shardings.

    Args:
        lower: gives the lowered program.
        mesh: sizes of the mesh's axes.
        trips: how often a loop runs whose number of turns only the run knows.
    """
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        try:
            compiled = lower().compile(compiler_options={"xla_dump_to": folder})
        except Exception as error:
            if "memory" not in str(error).lower():
                raise
            return Program(seconds=time.perf_counter() - start, error=" ".join(str(error).split()))
        seconds, laid_out = time.perf_counter() - start, _laid_out(pathlib.Path(folder))
    about = compiled.memory_analysis()
    given, fresh = about.argument_size_in_bytes, about.output_size_in_bytes - about.alias_size_in_bytes
    return Program(
        given,
        fresh,
        max(about.peak_memory_in_bytes, laid_out) - given - fresh,
        about.generated_code_size_in_bytes,
        seconds,
        read_collectives(compiled.as_text(), mesh, unknown_trips=trips),
    )


def _laid_out(folder: pathlib.Path) -> int:
    """Bytes of all that a compiler laid out in a device's memory, as it says in its files; 0 where it does not.

    The peak that `memory_analysis` gives, and a program is refused by, is of what is used at once. What is used at
    several times has to lie in one place, which takes a few per cent more.
    """
    reports = [path.read_text() for path in folder.glob("*memory-usage-report.txt")]
    return max(
        (int(size) for text in reports for size in re.findall(r"color=0\)\s+Total bytes: (\d+)", text)), default=0
    )


def device_bytes(tree: Any) -> int:
    """Bytes that a tree of arrays, or of their shapes, takes on one device of its mesh."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * np.dtype(x.dtype).itemsize
        for x in jax.tree.leaves(tree)
        if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    )


def _abstract(x: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


__all__ = ["Pair", "PlannedRun", "Program", "compile_program", "device_bytes"]
