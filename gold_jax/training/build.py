"""`build_run`: from settings and two models to everything that an update needs, with arrays or with their shapes alone.

Trainers call it with loaded models, `gold_jax.plan` with models whose parameters are `jax.ShapeDtypeStruct`s, and so
both have the same programs.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import optax
from flax import nnx

from gold_jax.config import SFTConfig
from gold_jax.loading import LoadedModel
from gold_jax.loss_spec import LossSpec
from gold_jax.losses.fused_head import chunk_size
from gold_jax.models.functional import Params, split
from gold_jax.rollout.server import ServerEngine
from gold_jax.sharding.placement import Placement
from gold_jax.text.batch import SINGLE_PROCESS
from gold_jax.text.chat import ChatTokenizer
from gold_jax.text.process_shard import ProcessShard
from gold_jax.text.vocabulary import VocabularyMap
from gold_jax.training.batches import BatchBuilder, DistillationBatchBuilder, TokenBatchBuilder
from gold_jax.training.objective import make_cross_entropy_loss, make_distillation_loss
from gold_jax.training.optimizer import make_optimizer, make_schedule
from gold_jax.training.step import Step, TrainState, init_state, state_shapes, state_shardings
from gold_jax.training.teacher import freeze_teacher, teacher_shapes


class Match(NamedTuple):
    """How the vocabularies of a pair face each other.

    Attributes:
        vocabulary: the order of either head.
        stops: the stop tokens of student and teacher, matched by role; None where they match as all other entries do.
        same: whether both tokenizers have the same entries under the same ids.
    """

    vocabulary: VocabularyMap
    stops: tuple[Sequence[int], Sequence[int]] | None
    same: bool


class Run(NamedTuple):
    """What an update needs.

    Attributes:
        graph: the student's graph definition.
        params: its parameters, arrays or shapes. The first update donates them.
        optimizer, schedule: the gradient transformation and its learning rates (None: not known).
        shardings: of the state on a mesh; None: one device.
        step: `state, metrics = step(state, batches)`.
        batches: makes the micro-batches of updates and evaluations; None where a model has no tokenizer.
        spec, teacher_graph, match: of a distillation.
    """

    graph: nnx.GraphDef
    params: Params | None
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule | None
    shardings: TrainState | None
    step: Step
    batches: BatchBuilder | None
    spec: LossSpec | None = None
    teacher_graph: nnx.GraphDef | None = None
    match: Match | None = None

    def init(self, params: Params) -> TrainState:
        """The state before the first update from some parameters, which it holds."""
        return init_state(self.optimizer, params, self.shardings)

    def shapes(self, params: Params | None = None) -> TrainState:
        """That state as shapes with their shardings."""
        return state_shapes(self.optimizer, self.params if params is None else params)


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
    """Everything that an update needs.

    Args:
        args: the settings.
        student: the model that learns, its parameters arrays or `jax.ShapeDtypeStruct`s with shardings.
        teacher: the model that it learns from; None: supervised fine-tuning.
        placement: the mesh that both are sharded on; None: one device.
        total_steps: updates of the whole run, for the schedule.
        match: how the vocabularies face each other; None: as the tokenizers say.
        process_shard: which rows this process prepares.
        engine: writes for the student in place of the built-in sampler.
        optimizers: the gradient transformation, and its learning rate at each update (for the log), in place of the settings'.
    """
    graph, params = split(student.model)
    optimizer, schedule = optimizers
    if optimizer is None:
        optimizer, schedule = make_optimizer(args, total_steps), make_schedule(args, total_steps)
    shardings = None if placement is None else state_shardings(optimizer, params)
    shards = 1 if placement is None else placement.row_shards
    rows, eval_rows = (n * shards for n in (args.per_device_train_batch_size, args.per_device_eval_batch_size))
    chunk = chunk_size(args.loss_chunk, student.model.platform)
    common = dict(optimizer=optimizer, schedule=schedule, shardings=shardings)
    put_rows = None if placement is None else placement.put_rows
    if teacher is None:
        step = Step(make_cross_entropy_loss(graph, chunk=chunk), optimizer, shardings=shardings, device_put=put_rows)
        batches = student.chat_tokenizer and TokenBatchBuilder(
            student.chat_tokenizer, rows, eval_rows, args.max_length, counted_tokens(args), process_shard
        )
        return Run(graph, params, step=step, batches=batches, **common)

    teacher_graph, teacher_params = split(teacher.model)
    match = match or match_pair(args, student, teacher)
    spec = args.loss_spec(match.same)
    abstract = isinstance(jax.tree.leaves(teacher_params)[0], jax.ShapeDtypeStruct)
    freeze = teacher_shapes if abstract else freeze_teacher
    constants = freeze(teacher_graph, teacher_params, match.vocabulary, match.stops)
    objective = make_distillation_loss(graph, teacher_graph, spec, match.vocabulary, chunk=chunk)
    step = Step(objective, optimizer, constants, shardings=shardings, device_put=put_rows)
    batches = None
    if student.chat_tokenizer is not None:
        # To write, the teacher needs its parameters as they were: of a head that was reordered, that is a second one.
        writes = args.seq_kd and args.lmbda < 1
        batches = DistillationBatchBuilder(
            student=student.chat_tokenizer,
            teacher=teacher.chat_tokenizer,
            student_graph=graph,
            spec=spec,
            one_vocabulary=match.same,
            batch_size=rows,
            eval_batch_size=eval_rows,
            micro_batches=args.gradient_accumulation_steps,
            lmbda=args.lmbda,
            num_generations=args.num_generations,
            max_length=args.max_length,
            max_new_tokens=args.max_completion_length,
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            seed=args.seed,
            generation_batch_size=args.generation_batch_size or 32 * shards,
            teacher_model=(teacher_graph, teacher_params) if writes else None,
            teacher_context=args.teacher_context,
            engine=engine,
            sync=None if engine is None else engine.sync,
            process_shard=process_shard,
        )
    return Run(graph, params, step=step, batches=batches, spec=spec, teacher_graph=teacher_graph, match=match, **common)


def counted_tokens(args: SFTConfig) -> str:
    """Which tokens supervised fine-tuning learns: those of the "completion", of every "assistant" turn, or "all"."""
    if args.assistant_only_loss:
        return "assistant"
    return "all" if args.completion_only_loss is False else "completion"


def match_pair(args: Any, student: LoadedModel, teacher: LoadedModel) -> Match:
    """How the vocabularies of two models face each other, by their tokenizers.

    Args:
        args: reads `loss_spec`, whose masks keep entries out of a projection.
        student, teacher: models with tokenizers.
    """
    same = same_vocabulary(student.chat_tokenizer, teacher.chat_tokenizer)
    sizes = student.model.config.vocab_size, teacher.model.config.vocab_size
    stops = student.chat_tokenizer.stop_ids, teacher.chat_tokenizer.stop_ids
    if same:
        by_role = student.chat_tokenizer.stop_id != teacher.chat_tokenizer.stop_id
        return Match(VocabularyMap.identity(*sizes, stop=stops), stops if by_role else None, True)
    vocabulary = VocabularyMap.build(
        student.chat_tokenizer.surfaces,
        teacher.chat_tokenizer.surfaces,
        student_size=sizes[0],
        teacher_size=sizes[1],
        stop=stops,
        mask=args.loss_spec(False).mask,
    )
    return Match(vocabulary, stops, False)


def same_vocabulary(student: ChatTokenizer, teacher: ChatTokenizer) -> bool:
    """Whether both tokenizers have the same entries under the same ids."""
    return student.tokenizer.get_vocab() == teacher.tokenizer.get_vocab()
