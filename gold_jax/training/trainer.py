"""GOLDTrainer and SFTTrainer: from names or objects to a run. The run itself is `training.loop`."""

import dataclasses
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from rich.console import Console
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import TrainOutput

from gold_jax.config import GOLDConfig, RunFacts, SFTConfig, named_without_effect, read_value, without_effect
from gold_jax.distributed.consensus import assert_same_across_processes
from gold_jax.distributed.initialize import is_main_process
from gold_jax.loading import LoadedModel, compute_dtype, load_model_and_tokenizer, read_template
from gold_jax.losses.fused_head import chunk_size
from gold_jax.models.functional import count, merge, split
from gold_jax.scoring import evaluate_model
from gold_jax.sharding.mesh import describe_mesh
from gold_jax.sharding.placement import Placement
from gold_jax.text.checks import CheckedRows, check_evaluation, check_examples, with_text_completion
from gold_jax.text.data import Example, load_examples
from gold_jax.text.process_shard import ProcessShard
from gold_jax.training.build import build_run, counted_tokens, match_pair
from gold_jax.training.callbacks import check_optimizers, check_trl_arguments
from gold_jax.training.hub import HubSilent, create_hub_repository, push_to_hub
from gold_jax.training.loop import Data, Loop
from gold_jax.training.model_card import write_model_card
from gold_jax.training.resume import describe_tokenizer, describe_weights
from gold_jax.training.setting import completion_server, place_run, process_shard_of
from gold_jax.training.tables import header
from gold_jax.training.teacher import restore_teacher

SFT_NEW_TOKENS = 128
_LEARNED = {"completion": "the completion", "assistant": "every assistant turn", "all": "the whole sequence"}


@dataclasses.dataclass(frozen=True)
class _Setup:
    """What a trainer is given, read and checked before any model is loaded."""

    args: SFTConfig
    title: str
    console: Console
    dataset_name: str | None
    train: Sequence[Example]
    eval: Sequence[Example] | None
    dtype: str
    placement: Placement | None
    process_shard: ProcessShard

    @classmethod
    def read(cls, args: SFTConfig, title: str, train_dataset, eval_dataset, console, dataset_name) -> "_Setup":
        """Reads the data and looks for the devices.

        Raises:
            ValueError: there is nothing to train on, or nothing to evaluate on where that was asked for.
        """
        # A copy, checked again: what was set on the settings since they were made is checked by the same rules.
        a = args.frozen_copy()
        if (a.num_processes or 1) > 1 and jax.process_count() == 1:
            raise ValueError(
                f"num_processes is {a.num_processes}, and this process runs alone: call "
                "gold_jax.distributed.initialize.initialize, or jax.distributed.initialize, before a trainer is made"
            )
        if train_dataset is None:
            raise ValueError("there is nothing to train on: pass train_dataset, or --dataset_name on the command line")
        if eval_dataset is None and (a.eval_strategy != "no" or a.eval_on_start):
            flag = "--eval_on_start" if a.eval_strategy == "no" else f"--eval_strategy {a.eval_strategy}"
            raise ValueError(f"{flag} needs rows to evaluate on: pass eval_dataset, or leave it out")
        train, evaluation = (
            None if rows is None else load_examples(rows, text_column=a.dataset_text_field)
            for rows in (train_dataset, eval_dataset)
        )
        placement = place_run(a.mesh, a.layout)
        return cls(
            args=a,
            title=title,
            console=(console or Console()) if is_main_process() else Console(quiet=True),
            dataset_name=dataset_name or (train_dataset if isinstance(train_dataset, str) else None),
            train=train,
            eval=evaluation,
            dtype=compute_dtype(a.bf16),
            placement=placement,
            process_shard=process_shard_of(placement),
        )

    @property
    def shards(self) -> int:
        """Parts that the rows of a batch are shared out to."""
        return 1 if self.placement is None else self.placement.row_shards

    def load(self, role: str, model, tokenizer, options: Mapping[str, Any], **settings) -> LoadedModel:
        """A model with its tokenizer, in this run's precision."""
        a, is_student = self.args, role == "student"
        template_kwargs = a.template_kwargs
        if not is_student and a.teacher_template_kwargs is not None:
            template_kwargs = a.teacher_template_kwargs
        return load_model_and_tokenizer(
            model,
            tokenizer,
            dtype=self.dtype,
            read_dtype=options.get("dtype", "auto"),
            revision=options.get("revision"),
            attention=options.get("attn_implementation"),
            chat_template=read_template(a.chat_template_path) if is_student and a.chat_template_path else None,
            template_kwargs=template_kwargs,
            special_tokens_in_prompts=a.special_tokens_in_prompts,
            eos_token=a.eos_token if is_student else None,
            trust_remote_code=a.trust_remote_code,
            role=role,
            **settings,
        )

    def load_student(self, model, tokenizer) -> LoadedModel:
        """The model that learns."""
        a = self.args
        return self.load(
            "student",
            model,
            tokenizer,
            a.model_init_kwargs,
            remat=a.gradient_checkpointing,
            placement=self.placement,
        )

    def show(self, student: LoadedModel, rows: Mapping[str, Any], kept: int, notices: Sequence[str]) -> None:
        """Prints what is about to run."""
        config, device = student.model.config, jax.devices()[0]
        size = count(split(student.model)[1])
        mesh = None
        if self.placement is not None:
            hosts = f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""
            mesh = f"{describe_mesh(self.placement.mesh)} ({jax.device_count()} devices{hosts})"
        facts = {
            "student": f"{student.name} ({config.family}, {size / 1e6:.1f} M parameters)",
            **rows,
            "data": f"{kept} rows" + (f" of {self.dataset_name}" if self.dataset_name else ""),
            "precision": f"{self.dtype} compute, float32 parameters",
            "attention": student.model.describe_attention(),
            "device": f"{device.device_kind} ({jax.default_backend()})",
            "mesh": mesh,
            "output": self.args.output_dir,
        }
        header(self.console, self.title, facts, notices)


class _Trainer:
    """What the trainers have in common: training, evaluation, saving and pushing of a run that is set up.

    Attributes:
        args: a frozen copy of the settings.
        student: the name and the tokenizer of the model that is trained; see `model`.
    """

    method = ""

    def __init__(
        self,
        setup: _Setup,
        student: LoadedModel,
        loop: Loop,
        notices: list[str],
        command: Sequence[str] | None,
        card: dict[str, Any],
    ):
        self.args, self.console, self.notices = setup.args, setup.console, notices
        self.train_examples, self.eval_examples = setup.train, setup.eval
        self.dataset_name, self.command = setup.dataset_name, command
        self.placement, self.process_shard = setup.placement, setup.process_shard
        self.hub_model_id = setup.args.hub_model_id
        self.student, self.loop, self._card = student, loop, card

    @property
    def log_history(self) -> list[dict[str, Any]]:
        """Every logged line of the last `train`, oldest first."""
        return [dict(row) for row in self.loop.history]

    @property
    def state(self) -> TrainerState:
        """Where training stands: `global_step`, `max_steps`, `epoch`, `log_history` and more, as transformers has them."""
        return self.loop.trainer_state()

    @property
    def model(self):
        """The student as it stands now, a `Decoder` of its own: training does not change it, nor it what is trained."""
        return self.loop.copy_model()

    def train(self, resume_from_checkpoint: str | os.PathLike | bool | None = None) -> TrainOutput:
        """Trains, saves the student to `output_dir` with a model card, and pushes it where that was asked for.

        Args:
            resume_from_checkpoint: "latest" or True, the folder of a checkpoint, or False for none of them; None: as
                the settings say.

        Returns:
            `global_step`; `training_loss`, the mean over the updates made now; `metrics`, the closing evaluation's, empty
            without evaluation data.
        """
        a = self.args
        if a.push_to_hub and is_main_process():
            try:
                self.hub_model_id = create_hub_repository(
                    self.hub_model_id, a.output_dir, a.hub_private_repo, a.hub_token
                )
            except HubSilent as error:
                self.console.print(str(error), markup=False, soft_wrap=True)
        resume = a.resume_from_checkpoint
        if resume_from_checkpoint is not None:
            resume = read_value(type(a), "resume_from_checkpoint", resume_from_checkpoint)
        results = self.loop.train(resume)
        if not is_main_process():
            return self.loop.output_of(results)
        write_model_card(
            a.output_dir,
            method=self.method,
            base_model=self.student.name,
            dataset=self.dataset_name,
            command=self.command,
            results={k: f"{v:.4f}" for k, v in results.items()},
            **self._card,
        )
        self.console.print(f"The student is saved in {a.output_dir}", markup=False, soft_wrap=True)
        if a.push_to_hub:
            self.push_to_hub()
        return self.loop.output_of(results)

    def evaluate(self) -> dict[str, float]:
        """Measures the student as it stands on `eval_dataset`."""
        return self.loop.evaluate()

    def save_model(self, output_dir: str | os.PathLike | None = None) -> pathlib.Path:
        """Writes the student and its tokenizer as a Hugging Face folder; None: to `output_dir` of the settings."""
        return self.loop.save(output_dir or self.args.output_dir)

    def push_to_hub(self) -> str:
        """Uploads `output_dir`; returns the address of the commit."""
        a = self.args
        url = push_to_hub(a.output_dir, self.hub_model_id, a.hub_private_repo, a.hub_token)
        self.console.print(f"Pushed to {url}", markup=False, soft_wrap=True)
        return url


class SFTTrainer(_Trainer):
    """Supervised fine-tuning: cross-entropy on completions, on every assistant turn, or on whole sequences.

    Args:
        model: a folder or hub id, a `Decoder`, or `(graphdef, state)`.
        args: the settings.
        train_dataset: a name, a `datasets.Dataset`, or a list of rows.
        eval_dataset: the same, or None.
        processing_class: the tokenizer, or its name; None takes the one beside the model.
        optimizers: an optax transformation in place of AdamW with the settings' learning rates, and its schedule for the log
            (or None).
        callbacks: transformers' `TrainerCallback`s, called at begin and end, updates, logs, evaluations and saves.
        compute_metrics, peft_config: refused, with what stands in their place.
        console: where progress is shown; None for the terminal.
        command: the command line, for the model card.
        dataset_name: what the data set is called, for the model card.

    Attributes:
        student: the name and the chat tokenizer of the model being trained; see `model`.
        log_history: every logged line of the last `train`, oldest first.
    """

    method = "supervised fine-tuning"

    def __init__(
        self,
        model: Any,
        args: SFTConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        *,
        optimizers: tuple[Any, Any] = (None, None),
        callbacks: Sequence[Any] | None = None,
        compute_metrics: Any = None,
        peft_config: Any = None,
        console: Console | None = None,
        command: Sequence[str] | None = None,
        dataset_name: str | None = None,
    ):
        """Loads what is named and checks everything that can be checked before the first update."""
        args = SFTConfig() if args is None else args
        if not isinstance(args, SFTConfig) or isinstance(args, GOLDConfig):
            raise TypeError(f"args is a {type(args).__name__}; SFTTrainer takes an SFTConfig")
        check_trl_arguments(compute_metrics, peft_config)
        optimizers = check_optimizers(optimizers)
        setup = _Setup.read(args, "gold_jax.sft", train_dataset, eval_dataset, console, dataset_name)
        student = setup.load_student(model, processing_class)
        loop, notices = _sft_loop(setup, student, optimizers, callbacks)
        super().__init__(setup, student._replace(model=None), loop, notices, command, {})


def _sft_loop(setup: _Setup, student: LoadedModel, optimizers, callbacks) -> tuple[Loop, list[str]]:
    """The loop of a fine-tuning, and notices."""
    a, learned = setup.args, counted_tokens(setup.args)
    checked = check_examples(
        setup.train,
        student.chat_tokenizer,
        # What stands before the last answer is learned too, unless completions alone are: long rows are cut then.
        budget=None if a.max_length is None or learned != "completion" else a.max_length - 1,
        need_completion="supervised fine-tuning learns completions, so every row needs one",
        learns_calls=learned != "completion",
    )
    facts = RunFacts(a, evaluates=setup.eval is not None)
    notices = [
        *a.notices,
        *(check_evaluation(setup.eval, student.chat_tokenizer) if setup.eval is not None else ()),
        *checked.notices,
        *named_without_effect(a, facts),
    ]
    setup.show(student, {"loss": f"cross-entropy on {_LEARNED[learned]}"}, len(checked.kept), notices)
    data = _data(
        setup,
        checked,
        describe_tokenizer("the student", student.chat_tokenizer),
        facts,
    )
    run = build_run(
        a,
        student,
        placement=setup.placement,
        total_steps=data.total_steps(a),
        process_shard=setup.process_shard,
        optimizers=optimizers,
    )
    loop = Loop(
        run,
        student._replace(model=None),
        data,
        a,
        console=setup.console,
        max_new_tokens=SFT_NEW_TOKENS,
        callbacks=callbacks,
    )
    return loop, notices


class GOLDTrainer(_Trainer):
    """On-policy distillation from a teacher with any tokenizer.

    Args:
        model: the student: a folder or hub id, a `Decoder`, or `(graphdef, state)`.
        teacher_model: the teacher, likewise; None takes `args.teacher_model_name_or_path`.
        args: the settings.
        train_dataset: a name, a `datasets.Dataset`, or a list of rows.
        eval_dataset: the same, or None.
        processing_class: the student's tokenizer, or its name; None takes the one beside the model.
        teacher_processing_class: the teacher's; None takes `args.teacher_tokenizer_name_or_path`, else the one beside
            it.
        optimizers, callbacks, compute_metrics, peft_config, console, command, dataset_name: as `SFTTrainer`.
    """

    method = "on-policy distillation"

    def __init__(
        self,
        model: Any,
        teacher_model: Any = None,
        args: GOLDConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        teacher_processing_class: Any = None,
        *,
        optimizers: tuple[Any, Any] = (None, None),
        callbacks: Sequence[Any] | None = None,
        compute_metrics: Any = None,
        peft_config: Any = None,
        console: Console | None = None,
        command: Sequence[str] | None = None,
        dataset_name: str | None = None,
    ):
        """Loads both models and checks everything that can be checked before the first update."""
        args = GOLDConfig() if args is None else args
        if not isinstance(args, GOLDConfig):
            raise TypeError(f"args is a {type(args).__name__}; GOLDTrainer takes a GOLDConfig")
        teacher_model = args.teacher_model_name_or_path if teacher_model is None else teacher_model
        if teacher_model is None:
            raise ValueError("there is no teacher: pass teacher_model, or --teacher_model_name_or_path")
        teacher_tokenizer = teacher_processing_class or args.teacher_tokenizer_name_or_path
        check_trl_arguments(compute_metrics, peft_config)
        optimizers = check_optimizers(optimizers)
        setup = _Setup.read(args, "gold_jax.train", train_dataset, eval_dataset, console, dataset_name)
        student = setup.load_student(model, processing_class)
        teacher = _load_teacher(setup, teacher_model, teacher_tokenizer)
        loop, notices, self.spec = _distillation_loop(setup, student, teacher, optimizers, callbacks)
        card = {"teacher": teacher.name, "loss": self.spec.describe()}
        super().__init__(setup, student._replace(model=None), loop, notices, command, card)


def _load_teacher(setup: _Setup, model, tokenizer) -> LoadedModel:
    a, placement = setup.args, setup.placement
    options = dict(a.teacher_model_init_kwargs)
    options["revision"] = options.get("revision") or a.teacher_model_revision
    if placement is not None:
        placement = Placement(placement.mesh, a.teacher_layout)
    return setup.load("teacher", model, tokenizer, options, param_dtype=setup.dtype, placement=placement)


def _distillation_loop(setup: _Setup, student: LoadedModel, teacher: LoadedModel, optimizers, callbacks):
    """The loop of a distillation, notices, and its loss."""
    a, evaluates = setup.args, setup.eval is not None
    match = match_pair(a, student, teacher)
    spec = a.loss_spec(match.same)
    checked = check_examples(
        setup.train,
        student.chat_tokenizer,
        budget=a.prompt_budget,
        need_completion=None
        if a.lmbda == 1 or a.seq_kd
        else f"with --lmbda {a.lmbda:g} a share of the batches comes from the data set; use --lmbda 1 for prompts alone",
        teacher=teacher.chat_tokenizer,
        student_writes=a.lmbda > 0,
        teacher_writes=a.seq_kd and a.lmbda < 1,
        teacher_context=a.teacher_context,
    )
    facts = RunFacts(a, spec, evaluates=evaluates)
    engine, server_notices = completion_server(a, student.model.config.vocab_size, setup.dtype)
    notices = [
        *a.notices,
        *(check_evaluation(setup.eval, student.chat_tokenizer, teacher.chat_tokenizer) if evaluates else ()),
        *checked.notices,
        *named_without_effect(a, facts),
        *server_notices,
    ]
    rows = {
        "teacher": f"{teacher.name} ({teacher.model.config.family})",
        "vocabularies": _describe_match(match, student, teacher),
        "loss": spec.describe(),
        "completions": _describe_completions(a, engine),
    }
    setup.show(student, rows, len(checked.kept), notices)
    # From here on all processes compute together: one that could not load its data or models is named here.
    sizes = [model.model.config.vocab_size for model in (student, teacher)]
    assert_same_across_processes("the sizes of the vocabularies", sizes)
    digests = {
        **describe_tokenizer("the student", student.chat_tokenizer),
        **describe_tokenizer("the teacher", teacher.chat_tokenizer),
        "the teacher's weights": describe_weights(split(teacher.model)[1]),
    }
    data = _data(setup, checked, digests, facts)
    run = build_run(
        a,
        student,
        teacher,
        setup.placement,
        total_steps=data.total_steps(a),
        match=match,
        process_shard=setup.process_shard,
        engine=engine,
        optimizers=optimizers,
    )
    teacher = teacher._replace(model=None)  # from here on the constants of the step hold its parameters
    evaluation = setup.eval

    def teacher_score():
        graph, vocabulary = run.teacher_graph, match.vocabulary
        model = run.batches.teacher_model or (graph, restore_teacher(graph, run.step.constants, vocabulary))
        model = merge(*model)
        return evaluate_model(
            teacher._replace(model=model),
            with_text_completion(evaluation),
            batch_size=a.per_device_eval_batch_size,
            chunk=chunk_size(a.loss_chunk, model.platform),
            max_new_tokens=a.max_completion_length if a.predict_with_generate else None,
        )

    loop = Loop(
        run,
        student._replace(model=None),
        data,
        a,
        console=setup.console,
        max_new_tokens=a.max_completion_length,
        teacher_score=teacher_score,
        restart=None if engine is None else engine.restart,
        callbacks=callbacks,
    )
    return loop, notices, spec


def _data(setup: _Setup, checked: CheckedRows, digests: Mapping[str, str], facts: RunFacts) -> Data:
    a = setup.args
    batch = a.per_device_train_batch_size * setup.shards
    return Data(
        train=setup.train,
        kept=checked.kept,
        eval=setup.eval,
        rows_per_step=batch * a.gradient_accumulation_steps // getattr(a, "num_generations", 1),
        batch_size=batch,
        seed=a.seed,
        digests={"the training data": checked.digest, **digests},
        without_effect=frozenset(name for name, _ in without_effect(a, facts)),
    )


def _describe_match(match, student: LoadedModel, teacher: LoadedModel) -> str:
    if match.same:
        return "one and the same" + ("" if match.stops is None else ", stop tokens matched by role")
    sizes = student.model.config.vocab_size, teacher.model.config.vocab_size
    return f"{sizes[0]:,} and {sizes[1]:,} rows, {match.vocabulary.matched:,} matched by surface"


def _describe_completions(a: GOLDConfig, engine) -> str:
    by_teacher = a.seq_kd and a.lmbda < 1
    return (
        f"{a.lmbda:.0%} by the student"
        + ("" if engine is None else f" through {a.rollout_server} at {a.server_url}")
        + (f", {1 - a.lmbda:.0%} by the teacher" if by_teacher else "")
        + (f", at most {a.max_completion_length} tokens" if a.lmbda or a.seq_kd else "")
    )
