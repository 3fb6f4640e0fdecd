"""From settings and models to all that an update needs, for trainers and, with abstract models, for `gold_jax.plan`."""

import functools
import math
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from flax import nnx

from gold_jax.config import GOLDConfig, SFTConfig
from gold_jax.distributed import consensus
from gold_jax.loading import LoadedModel
from gold_jax.loss_spec import LossSpec
from gold_jax.losses.fused_head import chunk_size
from gold_jax.losses.importance import ImportanceSampling
from gold_jax.models.config import DecoderConfig
from gold_jax.models.decoder import Decoder
from gold_jax.models.functional import Params, commit, count, split
from gold_jax.rollout.sampler import bytes_per_row, default_rows
from gold_jax.rollout.server import ServerEngine
from gold_jax.sharding.axes import mesh_sizes
from gold_jax.sharding.placement import Placement, make_mesh
from gold_jax.text.batch import SINGLE_PROCESS
from gold_jax.text.process_shard import ProcessShard
from gold_jax.text.vocabulary import VocabularyMap, one_sided_ids
from gold_jax.training.batches import DistillationBatchBuilder, TokenBatchBuilder
from gold_jax.training.objective import make_cross_entropy_loss, make_distillation_loss
from gold_jax.training.optimizer import make_optimizer, make_schedule
from gold_jax.training.step import Step, TrainState, state_shardings
from gold_jax.training.teacher import freeze_teacher
from gold_jax.training.utilization import training_flops


class Match(NamedTuple):
    """How the vocabularies of a pair face each other."""

    vocabulary: VocabularyMap  # the order of either head
    stops: tuple[Sequence[int], Sequence[int]] | None  # of either side, matched by role; None: as all other entries
    same: bool  # whether all that the student may write are entries of the teacher's under the same ids
    related: bool = False  # whether both have one vocabulary but for added tokens of one side alone


class Run(NamedTuple):
    """What an update needs."""

    graph: nnx.GraphDef  # the student's
    params: Params | None  # its parameters, arrays or shapes; the first update donates them
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule | None  # the optimizer's learning rates, where they are known
    shardings: TrainState | None  # of the state on a mesh; None: one device
    step: Step
    batches: DistillationBatchBuilder | TokenBatchBuilder | None  # None where a model has no tokenizer
    spec: LossSpec | None = None  # of a distillation, as what follows
    teacher_graph: nnx.GraphDef | None = None
    match: Match | None = None
    flops: float = 0.0  # that the models need for a token, see `utilization.training_flops`


def build_run(
    args: SFTConfig,
    student: LoadedModel,
    teacher: LoadedModel | None = None,
    placement: Placement | None = None,
    *,
    total_steps: int,
    match: Match | None = None,
    process_shard: ProcessShard = SINGLE_PROCESS,
    engine: ServerEngine | None = None,
    optimizers: tuple[optax.GradientTransformation | None, optax.Schedule | None] = (None, None),
) -> Run:
    """Everything that an update of a run of `total_steps` needs; without a teacher it is supervised fine-tuning.

    The models' parameters are arrays or `jax.ShapeDtypeStruct`s with shardings, `placement` the mesh that both are on
    (None: one device). `match`: None is as the tokenizers say. `engine` writes for the student in place of the built-in
    sampler; `optimizers`, in place of the settings', are the gradient transformation and, for the log, its schedule.
    """
    graph, params = split(student.model)
    params = commit(params)
    optimizer, schedule = optimizers
    if optimizer is None:
        make = functools.partial(
            make_optimizer, args, stochastic_rounding=args.bf16_stochastic_round and student.model.dtype == "bfloat16"
        )
        optimizer, schedule = make(total_steps), make_schedule(args, total_steps)
        # The step is given the rates, so that runs of other learning rates share its programs.
        step_optimizer, rates = make(None), {"schedule": schedule}
    else:  # traced for each run, as what its functions take from outside themselves may have changed
        step_optimizer, rates = optax.GradientTransformation(*map(functools.partial, optimizer[:2])), {}
    shardings = None if placement is None else state_shardings(optimizer, params)
    shards = 1 if placement is None else placement.row_shards
    rows, eval_rows = (n * shards for n in (args.per_device_train_batch_size, args.per_device_eval_batch_size))
    chunk, chat_tokenizer = chunk_size(args.loss_chunk, student.model.platform), student.chat_tokenizer
    given = dict(shardings=shardings, device_put=None if placement is None else placement.put_rows, **rates)
    batches = None
    if teacher is None:
        step = Step(make_cross_entropy_loss(graph, chunk=chunk), step_optimizer, **given)
        if chat_tokenizer is not None:
            sizes = rows, eval_rows, args.max_length, counted_tokens(args), args.length_buckets
            batches = TokenBatchBuilder(chat_tokenizer, *sizes, process_shard, student.model.config.max_decode_length)
        flops = training_flops(student.model, None)
        return Run(graph, params, optimizer, schedule, shardings, step, batches, flops=flops)

    teacher_graph, teacher_params = split(teacher.model)
    teacher_params = commit(teacher_params)
    match = match or match_pair(student, teacher, args.projection_mask)
    spec = args.loss_spec(match.same or match.related)
    constants = freeze_teacher(teacher_graph, teacher_params, match.vocabulary, match.stops)
    importance = ImportanceSampling(args.temperature, args.rollout_importance_cap) if args.weighs_rollouts else None
    options = dict(chunk=chunk, importance=importance)
    objective = make_distillation_loss(graph, teacher_graph, spec, match.vocabulary, **options)
    step = Step(objective, step_optimizer, constants, **given)
    if chat_tokenizer is not None:
        # To write, the teacher needs its parameters as they were: of a head that was reordered, that is a second one.
        writes = args.seq_kd and args.lmbda < 1
        models = [student.model, teacher.model] if writes else [student.model]
        given = args, models, optimizer, params, placement, process_shard
        batches = DistillationBatchBuilder(
            chat_tokenizer, teacher.chat_tokenizer, graph, spec, match.same, args.max_length, rows, eval_rows,
            micro_batches=args.gradient_accumulation_steps, lmbda=args.lmbda, num_generations=args.num_generations,
            seed=args.seed, engine=engine, teacher_context=args.teacher_context,
            sampling={name: getattr(args, name) for name in ("max_new_tokens", "temperature", "top_k", "top_p")},
            generation_batch_size=args.generation_batch_size or _rows_at_once(*given),
            rollout_quantization=args.rollout_quantization, rollout_batches=args.rollout_batches,
            importance_weights=importance is not None, teacher_model=(teacher_graph, teacher_params) if writes else None,
            length_buckets=args.length_buckets, process_shard=process_shard,
            short_lengths=(student.model.config.max_decode_length, teacher.model.config.max_decode_length),
        )  # fmt: skip
    flops = training_flops(student.model, teacher.model if spec.distillation_weight else None)
    return Run(graph, params, optimizer, schedule, shardings, step, batches, spec, teacher_graph, match, flops)


def _rows_at_once(
    args: GOLDConfig,
    models: Sequence[Decoder],
    optimizer: optax.GradientTransformation,
    params: Params,
    placement: Placement | None,
    process_shard: ProcessShard,
) -> int:
    """How many completions the `models` sample at once by default.

    That goes by what is free on the fullest device of all processes when both models are there, less what the optimizer and
    decoding will keep.
    """
    told, shards = [device.memory_stats() for device in jax.local_devices()], process_shard.num_shards
    if not all(stats and "bytes_limit" in stats for stats in told):
        return default_rows(shards, None, 0)
    here = sum(math.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(params)) / count(params)
    state = here * sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(jax.eval_shape(optimizer.init, params)))
    itemsize, tensor = models[0].dtype.itemsize, 1 if placement is None else placement.tensor_size
    weights = itemsize * max(count(split(model)[1]) for model in models) / tensor
    free = min(stats["bytes_limit"] - stats["bytes_in_use"] for stats in told) - state - weights
    free = -int(process_shard.all_reduce_max(np.array([-free]))[0])
    sizes = args.prompt_budget, args.max_completion_length
    rounded = [args.rollout_quantization, "none"]  # the student, and the teacher where it writes too
    each = [bytes_per_row(x.config, itemsize, placement, *sizes, how) for x, how in zip(models, rounded)]
    return default_rows(shards, free, max(each))


def check_decode_lengths(args: GOLDConfig, student: DecoderConfig, teacher: DecoderConfig) -> None:
    """ValueError where training asks a model for longer rows than it can decode."""
    length, wanted = args.prompt_budget + args.max_completion_length, "--max_prompt_length and --max_completion_length"
    wanted = f"completions in training ({wanted}, or --max_length)"
    if args.lmbda > 0 and args.server_url is None:
        student.check_decode_length(length, f"prompts and the student's {wanted}")
    if args.seq_kd and args.lmbda < 1:
        teacher.check_decode_length(length, f"prompts and the teacher's {wanted}")


def counted_tokens(args: SFTConfig) -> str:
    """Which tokens supervised fine-tuning learns: those of the "completion", of every "assistant" turn, or "all"."""
    if args.assistant_only_loss:
        return "assistant"
    return "all" if args.completion_only_loss is False else "completion"


def match_pair(student: LoadedModel, teacher: LoadedModel, mask: Sequence[str] = ()) -> Match:
    """Matches the vocabularies of two models by their tokenizers; `mask` as in `VocabularyMap.build`."""
    ours, theirs = student.chat_tokenizer, teacher.chat_tokenizer
    sizes, stops = (student.model.config.vocab_size, teacher.model.config.vocab_size), (ours.stop_ids, theirs.stop_ids)
    one_sided = one_sided_ids(ours.tokenizer, theirs.tokenizer)
    # The teacher reads the student's very tokens where all that the student may write are the teacher's too.
    if one_sided is not None and not any(ours.surfaces.table[i] for i in one_sided[0]):
        by_role, unmatched = ours.stop_id != theirs.stop_id, one_sided[0] | one_sided[1]
        vocabulary = VocabularyMap.identity(*sizes, stop=stops, unmatched=unmatched)
        return Match(vocabulary, stops if by_role else None, True, True)
    options = dict(student_size=sizes[0], teacher_size=sizes[1], stop=stops, mask=mask)
    vocabulary = VocabularyMap.build(ours.surfaces, theirs.surfaces, **options)
    return Match(vocabulary, stops, False, one_sided is not None)


def place_run(mesh: str | None, layout: str = "fsdp") -> Placement | None:
    """The mesh over all devices that a run is spread over; None where there is one device. ValueError as `mesh_sizes`."""
    sizes = mesh_sizes(mesh, jax.device_count())
    return None if jax.device_count() == 1 else Placement(make_mesh(sizes), layout)


def process_shard_of(placement: Placement | None) -> ProcessShard:
    """Which rows this process makes."""
    if placement is None:
        return ProcessShard()
    if jax.process_count() == 1:
        return ProcessShard.single_process(placement.row_shards)
    owner, local_shards = placement.row_owners()
    exchange = consensus.all_reduce_sum, consensus.all_reduce_max, consensus.all_gather_ragged
    return ProcessShard(owner, local_shards, jax.process_index(), *exchange)


def completion_server(
    args: GOLDConfig, vocab_size: int, dtype: str, notify: Callable[[str], Any]
) -> tuple[ServerEngine | None, list[str]]:
    """The server that writes for the student, found to be there, or None for the built-in sampler; and notices.

    `notify` is told, during the run, what cannot be checked of it.

    ServerError: it is not there, or its window is too short. ValueError: the run has several processes.
    """
    if args.server_url is None:
        return None, []
    if args.lmbda == 0:
        return None, ["--use_vllm: no effect with --lmbda 0, where the student writes nothing"]
    if jax.process_count() > 1:
        several = "--use_vllm --vllm_mode server takes a run of one process, and this one has several"
        raise ValueError(f"{several}; leave it out, and the built-in sampler writes the completions on all devices.")
    folder = args.rollout_weights_dir or pathlib.Path(args.output_dir, ".rollout_weights")
    syncs = dict(sync_every=args.vllm_sync_frequency, sync_first=args.rollout_sync_first, dtype=dtype)
    answers = dict(kind=args.rollout_server, timeout=args.vllm_server_timeout, api_key=os.environ.get("VLLM_API_KEY"))
    syncs |= dict(owns_dir=args.rollout_weights_dir is None)  # which lies in the output_dir that this run locks
    engine = ServerEngine(args.server_url, folder, vocab_size=vocab_size, notify=notify, **syncs, **answers)
    engine.check(args.prompt_budget + args.max_completion_length)
    return engine, []
