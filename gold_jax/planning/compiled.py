"""A run's very programs, compiled for TPUs that are only described: what they hold, compute, move and send.

Nothing of a model is there but its shapes. The step, its loss and the sampler are those that training calls
(`training.build.build_run`); a batch has rows as long as the settings allow, which share no beginning, and every token
is a group of its own.
"""

import dataclasses
import functools
import math
import pathlib
import re
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies

from gold_jax.bucketing import bucket
from gold_jax.loading import LoadedModel
from gold_jax.losses.fused_head import INNER_TOKENS, chunk_size
from gold_jax.models.decoder import Decoder
from gold_jax.models.functional import merge, split
from gold_jax.planning import hlo
from gold_jax.planning.analytic import Analytic, check
from gold_jax.planning.collectives import read_collectives
from gold_jax.planning.hardware import GIB, Topology, need_compiler
from gold_jax.planning.plan import Cost, Plan, ProgramMemory
from gold_jax.planning.request import STUDENT, Pair, PlanRequest
from gold_jax.planning.work import read_work
from gold_jax.rollout import decode_state as sampling
from gold_jax.rollout.sampler import STOP_SLOTS
from gold_jax.sharding.mesh import make_mesh
from gold_jax.sharding.placement import ROW_AXES, Placement
from gold_jax.text.batch import Row, SideTokens, build_batches, build_token_batches
from gold_jax.text.vocabulary import VocabularyMap
from gold_jax.training.build import Match, build_run
from gold_jax.training.objective import with_hidden
from gold_jax.training.step import state_shapes

_UNITS = {"K": 2**10, "M": 2**20, "G": GIB, "T": 2**40}
_STEP = {"fused": STUDENT[0], "first": STUDENT[0], "add": STUDENT[1], "update": "optimizer"}


def compile_plan(
    request: PlanRequest, progress: Callable[[str], None] = lambda _: None, *, leave_out: Sequence[str] = ()
) -> Plan:
    """A plan for TPUs.

    Args:
        request: the run.
        progress: is told what is being done.
        leave_out: programs that are not compiled; their memory is left out.

    Raises:
        ImportError: the TPU compiler is not installed.
        ValueError: settings that make no run.
    """
    check(request)
    run = PlannedRun(request, make_mesh(request.mesh, described_devices(request.topology)))
    model, programs = Analytic(request), run.programs()
    costs = {name: model.cost(name) for name in programs}
    memories, code = [], 0
    for number, (name, (lower, arguments)) in enumerate(programs.items(), 1):
        if name in leave_out or (name in STUDENT and any(memory.error for memory in memories)):
            continue  # a second program with the same gradient is refused as well, and takes as long
        progress(f"compiling {number} of {len(programs)}: {name}")
        begin = time.perf_counter()
        compiled, laid_out, error = compile_program(lower)
        seconds = time.perf_counter() - begin
        if error is None:
            needed, size, cost = read_program(compiled, laid_out, request.mesh, run.trips)
            code += size
            cost = dataclasses.replace(cost, model_flops=costs[name].model_flops)
            costs |= dict.fromkeys(STUDENT if name in STUDENT else (name,), cost)  # both student's programs do the same
        else:
            stated = stated_bytes(error)
            needed = max(0, stated - device_bytes(arguments)) if stated else 0
        transient = run.transient(name)
        smaller = request.smaller_cache(transient["cache"]) if name == "decoding" else 0
        parts = {"smaller cache": smaller} if smaller > needed else {"temporaries": needed}
        memories.append(ProgramMemory(name, {**transient, **parts}, seconds, error))
    return Plan(request, {**run.resident(), "programs": code}, tuple(memories), costs, compiled=True)


def described_devices(topology: Topology) -> Sequence:
    """The devices of a slice that need not exist.

    Raises:
        ImportError: the TPU compiler is not installed.
    """
    need_compiler(topology.name)
    return topologies.get_topology_desc(
        platform="tpu", topology_name=topology.compile_name, **topology.compile_options
    ).devices


class PlannedRun:
    """A run's programs and what lies on a device, before anything is there.

    Args:
        request: the run.
        mesh: of devices that may be only described; None: of none.
    """

    def __init__(self, request: PlanRequest, mesh: Any = None):
        self.request, self.args, pair = request, request.args, request.pair
        mesh = request.placement.mesh if mesh is None else mesh
        self.placement = Placement(mesh, self.args.layout)
        make = functools.partial(
            Decoder.abstract, dtype=request.dtype, attention=request.attention or "auto", platform=request.platform
        )
        remat = self.args.gradient_checkpointing
        self.student = _placed(make(pair.student, remat=remat, placement=self.placement))
        teacher = match = None
        if pair.teacher is not None:
            placement = Placement(mesh, self.args.teacher_layout)
            teacher, match = _placed(make(pair.teacher, param_dtype=request.dtype, placement=placement)), _match(pair)
        sides = [model and LoadedModel(model, None, "") for model in (self.student, teacher)]
        self.run = build_run(self.args, *sides, self.placement, total_steps=1000, match=match)
        self.state = state_shapes(self.run.optimizer, self.run.params)

    def trips(self, loop: str) -> int:
        """How often a loop runs that does not say: a loss over its chunks of positions, of which none has inner tokens; one token
        is decoded."""
        if "loss" not in loop:
            return 1
        return (
            0
            if INNER_TOKENS in loop
            else math.ceil(self.request.positions / chunk_size(self.args.loss_chunk, self.request.platform))
        )

    def resident(self) -> dict[str, int]:
        """Bytes of one device that are taken all the time, by part."""
        found = {"student": device_bytes(self.state.params), "optimizer": device_bytes(self.state.optimizer)}
        if self.request.pair.teacher is not None:
            # The teacher's head is one of its parameters, reordered where it lies.
            found["teacher"] = device_bytes(self.run.step.constants._replace(teacher_head=None))
        return found

    def transient(self, program: str) -> dict[str, int]:
        """Bytes that are taken while a program runs and not always, by part; what it takes itself aside."""
        if program in ("prefill", "decoding"):
            *cache, weights = self._sampling()
            return {"decoding weights": device_bytes(weights), "cache": device_bytes(cache)}
        found = {"gradients": device_bytes(self.state.params)} if self.request.passes > 1 else {}
        if program != "optimizer":
            found["batch"] = device_bytes(self.batch())
            if self.request.reads:
                found["teacher's hidden states"] = device_bytes(self._hidden())
        return found

    def programs(self) -> dict[str, tuple[Callable[[], Any], Any]]:
        """Every program of an update, of the names and in the order of `PlanRequest.programs`: what lowers it, and what of all
        that lies there it reads."""
        batch, found = self.batch(), {}
        step, params = self.run.step, self.state.params
        constants = step.constants
        used = constants
        if self.request.reads:
            lines = batch.teacher.packed
            lower = functools.partial(step.programs["teacher_forward"].lower, constants, lines)
            found["teacher"] = lower, (constants.teacher, lines)
            batch, used = with_hidden(batch, self._hidden()), constants._replace(teacher=None)
        metrics = jax.eval_shape(step.objective.loss, params, constants, batch)
        metrics = jax.tree.map(lambda x: _abstract(x, self.placement.replicated), metrics)
        given = {"fused": (self.state,)}
        if self.request.passes > 1:
            given = {"first": (params,), "add": (params, params, metrics), "update": (self.state, params, metrics[0])}
        for name, values in given.items():
            rest = () if name == "update" else (constants, batch)
            lower = functools.partial(step.programs[name].lower, *values, *rest)
            found[_STEP[name]] = lower, (values, rest and (used, batch))
        if self.request.samples:
            cache, decode_state, weights = self._sampling()
            found["prefill"] = self._lower_prefill, (params, cache, decode_state)
            found["decoding"] = self._lower_decode, (weights, cache, decode_state)
        return found

    @functools.cache  # noqa: B019  (lives as long as the plan)
    def batch(self) -> Any:
        """A micro-batch of rows as long as they may be, as shapes on the mesh."""
        rng, each, length = np.random.default_rng(0), self.args.per_device_train_batch_size, self.request.length
        pair, prompt, made = self.request.pair, min(self.request.prompt_length, length - 1), []
        for _ in range(each):
            sides = []
            for config in (pair.student, pair.teacher or pair.student):
                ids = rng.integers(0, config.vocab_size, length).astype(np.int32)
                sides.append(SideTokens(ids[:prompt], ids[prompt:], np.arange(length - prompt)))
            made.append(Row(*sides, groups=length - prompt, text="", stopped=True))
        if pair.teacher is None:
            rows = [(np.concatenate(r.student[:2]), np.arange(length) >= prompt) for r in made]
            (batch,) = build_token_batches(rows, each)
        else:
            spec = self.run.spec
            groups = "all" if spec.groups == "positional" else spec.groups
            (batch,) = build_batches(made, each, merge=spec.merge, groups=groups, text=spec.of_text)
        sharding, shards = self.placement.sharding(ROW_AXES), self.request.shards
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((x.shape[0] * shards, *x.shape[1:]), x.dtype, sharding=sharding), batch
        )

    @functools.cache  # noqa: B019
    def _hidden(self) -> Any:
        step = self.run.step
        hidden = jax.eval_shape(step.objective.teacher_forward, step.constants, self.batch().teacher.packed)
        return _abstract(hidden, self.placement.sharding(ROW_AXES))

    @functools.cache  # noqa: B019
    def _sampling(self) -> tuple:
        request, placement = self.request, self.placement
        empty = functools.partial(
            sampling.empty_slots.__wrapped__,
            config=request.pair.student,
            dtype=jnp.dtype(request.dtype),
            placement=placement,
            rows=request.sampled_rows,
            slots=request.slots,
            new=self.args.max_completion_length,
        )
        cache, decode_state = jax.eval_shape(empty, _key())
        weights = jax.eval_shape(lambda params: merge(self.run.graph, params).decoding_weights(), self.state.params)
        return (
            jax.tree.map(_abstract, cache, sampling.cache_shardings(placement, cache)),
            jax.tree.map(lambda x: _abstract(x, placement.replicated), decode_state),
            jax.tree.map(_abstract, weights, self.student.decoding_shardings()),
        )

    def _lower_decode(self):
        cache, decode_state, weights = self._sampling()
        integer, real = _shape(jnp.int32), _shape(jnp.float32)
        settings = sampling.SamplingOptions(real, integer, real, _shape(jnp.int32, STOP_SLOTS), integer)
        return sampling.decode_until.lower(
            self.run.graph, self.state.params, weights, cache, decode_state, settings, integer, integer, integer
        )

    def _lower_prefill(self):
        cache, decode_state, _ = self._sampling()
        rows, width = self.request.sampled_rows, bucket(self.request.prompt_length - 1)
        each = [_shape(jnp.int32, rows)] * 4
        return sampling.prefill_into_slots.lower(
            self.run.graph, self.state.params, cache, decode_state, _shape(jnp.int32, rows, width), *each, _key()
        )


def compile_program(lower: Callable[[], Any]) -> tuple[Any, int, str | None]:
    """Compiles a program for the devices of its shardings.

    Returns:
        The compiled program; bytes of all that the compiler laid out; and None, or what the compiler said where the
        program needs more memory than a device has.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            compiled = lower().compile(compiler_options={"xla_dump_to": folder})
        except Exception as error:
            if "memory" not in str(error).lower():
                raise
            return None, 0, " ".join(str(error).split())
        return compiled, _laid_out(pathlib.Path(folder)), None


def read_program(
    compiled: Any, laid_out: int, mesh: Mapping[str, int], trips: int | Callable[[str], int] = 1
) -> tuple[int, int, Cost]:
    """What a compiled program takes of one device.

    Args:
        compiled, laid_out: as `compile_program` gives them.
        mesh: sizes of the mesh's axes.
        trips: as `unknown_trips` of `hlo.executed`.

    Returns:
        Bytes that it needs while it runs (of all that is laid out, what is neither argument nor result; its
        `temp_size_in_bytes` adds up buffers that are not there at once); bytes of the program itself, which lies there
        as long as it may be called; and what it costs.
    """
    memory, program = compiled.memory_analysis(), hlo.read(compiled.as_text())
    fresh = memory.output_size_in_bytes - memory.alias_size_in_bytes
    temporaries = max(memory.peak_memory_in_bytes, laid_out) - memory.argument_size_in_bytes - fresh
    collectives = read_collectives(program, mesh, unknown_trips=trips)
    sent = {axes: collectives.over(axes).bytes for axes in collectives.by_axes}
    flops, moved = read_work(program, hlo.executed(program, trips)[0])
    return temporaries, memory.generated_code_size_in_bytes, Cost(flops, flops, moved, sent)


def _laid_out(folder: pathlib.Path) -> int:
    """Bytes of all that a compiler laid out in a device's memory, as it says in its files; 0 where it does not.

    The peak that `memory_analysis` gives, and a program is refused by, is of what is used at once. What is used at
    several times has to lie in one place, which takes a few per cent more.
    """
    reports = [path.read_text() for path in folder.glob("*memory-usage-report.txt")]
    return max(
        (int(size) for text in reports for size in re.findall(r"color=0\)\s+Total bytes: (\d+)", text)), default=0
    )


def stated_bytes(error: str) -> int | None:
    """What a refused program would have needed, its arguments too: «… (22.89G) exceeds available HBM (15.75G)»."""
    found = re.search(r"\(([\d.]+)([KMGT])\) exceeds", error)
    return int(float(found[1]) * _UNITS[found[2]]) if found else None


def device_bytes(tree: Any) -> int:
    """Bytes that a tree of arrays, or of their shapes, takes on one device of its mesh."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * np.dtype(x.dtype).itemsize
        for x in jax.tree.leaves(tree)
        if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    )


def _placed(model: Decoder) -> Decoder:
    """An abstract model whose parameters' shapes say where they lie."""
    _, params = split(model)
    return model.replace(jax.tree.map(_abstract, params, model.shardings(model.placement)))


def _match(pair: Pair) -> Match:
    """Vocabularies of the sizes given, in an order that is not the entries' own."""
    sizes, matched = (pair.student.vocab_size, pair.teacher.vocab_size), pair.matched
    if matched is None:
        return Match(VocabularyMap.identity(*sizes), None, True)
    orders = [np.roll(np.arange(size, dtype=np.int32), 1) for size in sizes]
    routes = [np.full(size - matched, matched, np.int32) for size in sizes]
    # Two stop tokens on either side: the usual number.
    return Match(VocabularyMap(*orders, matched, matched, *sizes, *routes), ((0, 1), (0, 1)), False)


def _abstract(x: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _shape(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _key() -> Any:
    return jax.eval_shape(lambda: jax.random.key(0))
