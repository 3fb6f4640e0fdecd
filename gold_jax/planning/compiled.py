"""A run's very programs, compiled for TPUs or GPUs that are only described: what they hold, compute, move and send.

A batch has rows as long as the settings allow, which share no beginning, and every token is a group of its own.
"""

import collections
import contextlib
import dataclasses
import functools
import math
import pathlib
import re
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies

from gold_jax.bucketing import bucket
from gold_jax.loading import LoadedModel
from gold_jax.losses.fused_head import (
    CHUNK_GROUPS,
    CHUNK_PRODUCTS,
    GROUP_PRODUCT,
    INNER_TOKENS,
    chunk_group,
    chunk_size,
)
from gold_jax.models.decoder import Decoder
from gold_jax.models.functional import merge, split
from gold_jax.models.quantization import KV_CACHE
from gold_jax.planning import hlo
from gold_jax.planning.analytic import Analytic
from gold_jax.planning.collectives import read_collectives
from gold_jax.planning.hardware import Topology, has_gpu_compiler
from gold_jax.planning.plan import STUDENT, Cost, Pair, Plan, PlanRequest, Progress
from gold_jax.planning.work import read_work
from gold_jax.rollout import decode_state as sampling
from gold_jax.rollout.sampler import STOP_SLOTS
from gold_jax.sharding.placement import ROW_AXES, Placement, make_mesh
from gold_jax.text.batch import Row, SideTokens, build_batches, build_token_batches
from gold_jax.text.vocabulary import VocabularyMap
from gold_jax.training.build import Match, build_run
from gold_jax.training.objective import with_hidden
from gold_jax.training.step import state_shapes

_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def describe(topology: Topology) -> list[Any]:
    """The devices of a topology, to compile for."""
    platform = "tpu" if topology.kind == "tpu" else "cuda"
    return topologies.get_topology_desc(platform=platform, **topology.compile_options).devices


def why_not_compiled(topology: Topology) -> str | None:
    """Why nothing is compiled for GPUs, as the end of a sentence; None where their compiler is here and knows them."""
    if not topology.compile_options:
        return f"gold_jax has no description of the {topology.chip.name} to compile for"
    if not has_gpu_compiler():
        return "with `pip install 'gold_jax[plan-cuda]'` the run's programs are compiled for this card (which need not be here)"
    try:
        with answered_by(describe(topology)[0]):
            return None
    except Exception as error:  # of what an older or a newer JAX does not know, or cannot load
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        return f"the GPU compiler that is installed, of jax {jax.__version__}, does not know this card ({reason})"


@contextlib.contextmanager
def answered_by(device: Any) -> Iterator[None]:
    """While it lasts, JAX's cuDNN attention, which asks a card here what it can do, is answered by a described one."""
    if device.platform == "tpu":
        yield
        return
    from jax._src.cudnn import fused_attention_stablehlo

    def number(capability: str) -> tuple[int, ...]:
        return tuple(map(int, capability.split(".")))

    own, questions = number(device.compute_capability), {}
    questions["check_compute_capability"] = lambda least: own >= number(least)
    questions["is_cuda_compute_capability_equal"] = lambda other: own == number(other)
    with mock.patch.multiple(fused_attention_stablehlo, **questions):
        yield


def compile_plan(request: PlanRequest, progress: Progress = lambda _: None, leave_out: Collection[str] = ()) -> Plan:
    """A plan by the compiler; programs to `leave_out` are not compiled, nor in the memory.

    ValueError: the devices cannot do what a program asks for.
    """
    devices = describe(request.topology)
    try:
        with answered_by(devices[0]):
            return _compile_plan(request, devices, progress, leave_out)
    except NotImplementedError as error:
        raise ValueError(f"{request.topology.name} cannot do what the run asks for: {error}") from error


def _compile_plan(request: PlanRequest, devices: list[Any], progress: Progress, leave_out: Collection[str]) -> Plan:
    run, model = PlannedRun(request, make_mesh(request.mesh, devices)), Analytic(request)
    costs, moments, code = {name: model.cost(name) for name in request.programs}, [], 0
    for number, (name, (lower, arguments)) in enumerate(run.programs().items(), 1):
        if name in leave_out or (name in STUDENT and any(one["error"] for one in moments)):
            continue  # a second program with the same gradient is refused as well, and takes as long
        progress(f"compiling {number} of {len(costs)}: {name}")
        begin = time.perf_counter()
        compiled, laid_out, error = _compile(lower)
        seconds = time.perf_counter() - begin
        if error is None:
            needed, size, cost = _read(compiled, laid_out, request.mesh, run.trips)
            code += size
            cost = dataclasses.replace(cost, model_flops=costs[name].model_flops)
            costs |= dict.fromkeys(STUDENT if name in STUDENT else (name,), cost)  # both student's programs do the same
        else:  # which says what it needs, its arguments too: «… (22.89G) exceeds available HBM (15.75G)»
            stated = re.search(r"\(([\d.]+)([KMGT])\) exceeds", error)
            needed = int(float(stated[1]) * _UNITS[stated[2]]) if stated else 0
            needed = max(0, needed - device_bytes(arguments))
        parts = model.transient(name), {"temporaries": needed}
        moments.append(request.moment(name, *parts, seconds=seconds, error=error))
    resident = model.resident() | ({"programs": code} if code else {})  # of GPUs' programs it is not told
    return Plan(request, resident, moments, costs, compiled=True)


class PlannedRun:
    """A run's programs and what they read, as shapes, on a mesh of devices that may be only described (or None)."""

    def __init__(self, request: PlanRequest, mesh: Any = None):
        self.request, self.args, pair = request, request.args, request.pair
        mesh = request.placement.mesh if mesh is None else mesh
        self.placement = placement = Placement(mesh, self.args.layout)
        options = {"dtype": request.dtype, "attention": request.attention, "platform": request.platform}
        remat, teacher, match = self.args.gradient_checkpointing, None, None
        self.student = _placed(Decoder.abstract(pair.student, remat=remat, placement=placement, **options))
        if pair.teacher:
            options |= {"param_dtype": request.dtype, "placement": Placement(mesh, self.args.teacher_layout)}
            teacher, match = _placed(Decoder.abstract(pair.teacher, **options)), _match(pair)
        sides = [model and LoadedModel(model, None, "") for model in (self.student, teacher)]
        self.run = build_run(self.args, *sides, placement, total_steps=1000, match=match)
        self.state = state_shapes(self.run.optimizer, self.run.params)
        self.batch, step = self._batch(), self.run.step
        self.key = jax.eval_shape(jax.random.key, 0)
        if request.reads:
            hidden = jax.eval_shape(step.objective.teacher_forward, step.constants, self.batch.teacher.packed)
            self.hidden = _abstract(hidden, placement.sharding(ROW_AXES))
        if request.samples:
            self.cache, self.decode_state, self.weights = self._sampling()

    def trips(self, loop: str) -> float:
        """How often a loop runs that does not say: a loss once for each chunk of positions, and no position has inner tokens.

        Where several chunks make their gradients in one product, the loops over these are in one over groups of chunks.

        One token is decoded: of the loop over tokens, which takes several at once on GPUs, that part of a round.
        """
        if loop.endswith("jit(decode_until)/while"):
            return 1 / sampling.tokens_per_check(self.request.platform)
        if "loss" not in loop:
            return 1
        if INNER_TOKENS in loop:
            return 0
        chunk = chunk_size(self.args.loss_chunk, self.request.platform)
        chunks = math.ceil(self.request.positions / self.request.mesh["tensor"] / chunk)  # of one device
        if CHUNK_GROUPS not in loop:
            return chunks
        whole, left = divmod(chunks, chunk_group(chunk, chunks * chunk))
        groups, inside = whole + (left > 0), loop.partition(CHUNK_GROUPS)[2]
        if GROUP_PRODUCT in inside:
            return whole / groups
        if CHUNK_PRODUCTS in inside:
            return left / groups
        return chunks / groups if "/while/" in inside else groups

    def programs(self) -> dict[str, tuple[Callable[[], Any], Any]]:
        """Every program of `PlanRequest.programs`, in that order: what lowers it, and what of all that lies there it reads."""
        step, params, batch, found = self.run.step, self.state.params, self.batch, {}
        constants = used = step.constants

        def add(name: str, program: Any, arguments: tuple, read: Any) -> None:
            found[name] = functools.partial(program.lower, *arguments), read

        if self.request.reads:
            lines = batch.teacher.packed
            add("teacher", step.programs["teacher_forward"], (constants, lines), (constants.teacher, lines))
            batch, used = with_hidden(batch, self.hidden), constants._replace(teacher=None)
        rate = jax.eval_shape(step.learning_rate, self.state)
        rate = jax.tree.map(lambda x: _abstract(x, self.placement.replicated), rate)
        if self.request.micro_batches == 1:
            add(STUDENT[0], step.programs["fused"], (self.state, constants, batch, rate), (self.state, used, batch))
        else:
            metrics = jax.eval_shape(step.objective.loss, params, constants, batch)
            metrics = jax.tree.map(lambda x: _abstract(x, self.placement.replicated), metrics)
            so_far, given = (params, params, metrics), (self.state, params, metrics[0], rate)
            add(STUDENT[0], step.programs["first"], (params, constants, batch), (params, used, batch))
            add(STUDENT[1], step.programs["add"], (*so_far, constants, batch), (so_far, used, batch))
            add("optimizer", step.programs["update"], given, given)
        if self.request.samples:
            slots, rows = (self.cache, self.decode_state), self.request.sampled_rows
            prompts, width = self.request.sampled_prompts, bucket(self.request.prompt_length - 1)
            shapes = (), (rows,), (prompts,), (prompts, width), (STOP_SLOTS,)
            number, each, lengths, tokens, stops = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in shapes)
            source = None if prompts == rows else each
            filters = sampling.sampling_filters(self.args.temperature, self.args.top_k, self.args.top_p)
            options = sampling.SamplingOptions(*filters, stops, number)
            key = self.key
            if self.request.rollout_batches > 1:
                key = _abstract(jax.eval_shape(lambda key: jax.random.split(key, rows), key), self.placement.replicated)
            prefill = (self.run.graph, params, *slots, tokens, lengths, each, each, each, source, key)
            decode = (self.run.graph, params, self.weights, *slots, options, number, number, number)
            add("prefill", sampling.prefill_into_slots, prefill, (params, slots))
            add("decoding", sampling.decode_until, decode, (self.weights, slots))
        return found

    def _batch(self) -> Any:
        """A micro-batch of rows as long as they may be, as shapes on the mesh."""
        length, spec, rows = self.request.length, self.run.spec, []
        prompt = min(self.request.prompt_length, length - 1)
        for row in range(self.request.device_rows):
            ids = np.full(length, row, np.int32)
            if spec is None:
                rows.append((ids, np.arange(length) >= prompt))
            else:
                side = SideTokens(ids[:prompt], ids[prompt:], np.arange(length - prompt))
                rows.append(Row(side, side, groups=length - prompt, text="", stopped=True))
        if spec is None:
            (batch,) = build_token_batches(rows, len(rows))
        else:
            groups = "all" if spec.groups == "positional" else spec.groups
            options = dict(text=spec.of_text, drawn={} if self.request.weighs else None)
            (batch,) = build_batches(rows, len(rows), merge=spec.merge, groups=groups, **options)
        sharding, shards, shape = self.placement.sharding(ROW_AXES), self.request.shards, jax.ShapeDtypeStruct
        return jax.tree.map(lambda x: shape((len(x) * shards, *x.shape[1:]), x.dtype, sharding=sharding), batch)

    def _sampling(self) -> tuple:
        """The cache, the state of decoding and the weights that it reads."""
        request, placement, dtype = self.request, self.placement, jnp.dtype(self.request.dtype)
        sizes = {"rows": request.sampled_rows, "slots": request.slots, "new": self.args.max_completion_length}
        options = {"config": request.pair.student, "dtype": dtype, "placement": placement, **sizes}
        rounded = self.args.rollout_quantization
        options |= {"sampling_logprobs": request.weighs, "int8_cache": rounded == KV_CACHE}
        cache, state = jax.eval_shape(functools.partial(sampling.empty_slots.__wrapped__, **options), self.key)
        weights = jax.eval_shape(
            lambda params: merge(self.run.graph, params).decoding_weights(rounded), self.state.params
        )
        cache = jax.tree.map(_abstract, cache, sampling.cache_shardings(placement, cache))
        state = jax.tree.map(lambda x: _abstract(x, placement.replicated), state)
        return cache, state, jax.tree.map(_abstract, weights, self.student.decoding_shardings(rounded))


def _compile(lower: Callable[[], Any]) -> tuple[Any, int, str | None]:
    """The program compiled; bytes of all that the compiler laid out; None, or what it said where no device has that much memory."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            compiled = lower().compile(compiler_options={"xla_dump_to": folder})
        except Exception as error:
            if "memory" not in str(error).lower():
                raise
            return None, 0, " ".join(str(error).split())
        # What is laid out takes a few per cent more than is used at once, the peak of `memory_analysis`.
        reports = "\n".join(path.read_text() for path in pathlib.Path(folder).glob("*memory-usage-report.txt"))
    return compiled, max(map(int, re.findall(r"color=0\)\s+Total bytes: (\d+)", reports)), default=0), None


def _read(
    compiled: Any, laid_out: int, mesh: Mapping[str, int], trips: Callable[[str], float]
) -> tuple[int, int, Cost]:
    """Bytes that a program needs while it runs; of the program itself, which lies there as long as it may be called; its cost."""
    memory, program = compiled.memory_analysis(), hlo.read(compiled.as_text())
    given = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    executions = hlo.executed(program, trips)
    flops, moved = read_work(program, executions)
    sent = collections.Counter()
    for (axes, _), size in read_collectives(executions, mesh).items():
        sent[axes] += size
    # `temp_size_in_bytes` adds up buffers of different times.
    needed = max(memory.peak_memory_in_bytes, laid_out) - given
    return needed, memory.generated_code_size_in_bytes, Cost(flops, flops, moved, dict(sent))


def device_bytes(tree: Any) -> int:
    """Bytes that a tree of arrays, or of their shapes, takes on one device of its mesh."""
    arrays = [x for x in jax.tree.leaves(tree) if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)]
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * np.dtype(x.dtype).itemsize for x in arrays)


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
