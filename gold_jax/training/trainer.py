"""GOLDTrainer and SFTTrainer: from names or objects to a run. The run itself is `training.loop`."""

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from rich.console import Console

from gold_jax import no_effect
from gold_jax.config import GOLDConfig, SFTConfig
from gold_jax.fields import check_folder, read_value
from gold_jax.loading import LoadedModel, load_model_and_tokenizer
from gold_jax.losses.fused_head import chunk_size
from gold_jax.models.functional import ModelValue, count, merge, split
from gold_jax.parallel import processes
from gold_jax.parallel.layout import Placement
from gold_jax.parallel.mesh import describe_mesh
from gold_jax.parallel.watch import make_watchdog
from gold_jax.text.data import load_examples
from gold_jax.text.vocabulary import VocabularyMap
from gold_jax.training.batches import (
    DistillationBatchBuilder,
    TokenBatchBuilder,
    check_evaluation,
    check_examples,
    with_text_completion,
)
from gold_jax.training.evaluation import measures
from gold_jax.training.hub import HubSilent, create_hub_repository, push_to_hub
from gold_jax.training.loop import Loop, Task
from gold_jax.training.model_card import write_model_card
from gold_jax.training.resume import describe_tokenizer, describe_weights
from gold_jax.training.setting import (
    completion_server,
    compute_dtype,
    place_run,
    process_shard_of,
    read_template,
    same_vocabulary,
)
from gold_jax.training.step import make_cross_entropy_loss, make_distillation_loss
from gold_jax.training.tables import header
from gold_jax.training.teacher import freeze_teacher, restore_teacher

SFT_NEW_TOKENS = 128


class SFTTrainer:
    """Supervised fine-tuning: cross-entropy on completions, on every assistant turn, or on whole sequences.

    Args:
        model: a folder or hub id, a `Decoder`, or `(graphdef, state)`.
        args: the settings.
        train_dataset: a name, a `datasets.Dataset`, or a list of rows.
        eval_dataset: the same, or None.
        processing_class: the tokenizer, or its name; None takes the one beside the model.
        console: where progress is shown; None for the terminal.
        command: the command line, for the model card.
        dataset_name: what the data set is called, for the model card.

    Attributes:
        student: the name and the chat tokenizer of the model being trained; see `model`.
        log_history: every logged line of the last `train`, oldest first.
    """

    method = "supervised fine-tuning"
    title = "gold_jax.sft"

    def __init__(
        self,
        model: Any,
        args: SFTConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        *,
        console: Console | None = None,
        command: Sequence[str] | None = None,
        dataset_name: str | None = None,
    ):
        """Loads what is named and checks everything that can be checked before the first update."""
        if args is not None and not self._takes(args):
            raise TypeError(
                f"args is a {type(args).__name__}; {type(self).__name__} takes a {type(self._default_args()).__name__}"
            )
        # A copy, checked again: what was set on the settings since they were made is held to the same rules.
        self.args = a = (args if args is not None else self._default_args()).frozen_copy()
        self.hub_model_id = a.hub_model_id
        processes.start(a.coordinator_address, a.num_processes, a.process_id)
        self.console = (console or Console()) if processes.is_first() else Console(quiet=True)
        self.command = command
        self.notices = list(a.notices)
        self.dtype = compute_dtype(a.bf16)
        self.dataset_name = dataset_name or (train_dataset if isinstance(train_dataset, str) else None)
        if train_dataset is None:
            raise ValueError("there is nothing to train on: pass train_dataset, or --dataset_name on the command line")
        with make_watchdog(a.process_timeout) as watch:
            watch.at(0, "loading data and models")
            self.train_examples = load_examples(train_dataset, text_column=a.dataset_text_field)
            self.eval_examples = eval_dataset
            if eval_dataset is not None:
                self.eval_examples = load_examples(eval_dataset, text_column=a.dataset_text_field)
            elif a.eval_strategy != "no" or a.eval_on_start:
                asked = "--eval_on_start" if a.eval_strategy == "no" else f"--eval_strategy {a.eval_strategy}"
                raise ValueError(f"{asked} needs rows to evaluate on: pass eval_dataset, or leave it out")
            self.save_dtype = a.model_init_kwargs.get("dtype", "float32")
            self.placement = place_run(a.mesh, a.layout)
            self.shards = 1 if self.placement is None else self.placement.row_shards
            self.share = process_shard_of(self.placement)
            self.student = self._load(
                "student",
                model,
                processing_class,
                a.model_init_kwargs,
                remat=a.gradient_checkpointing,
                placement=self.placement,
            )
            self.loop = self._loop()

    @staticmethod
    def _default_args() -> SFTConfig:
        return SFTConfig()

    @staticmethod
    def _takes(args: Any) -> bool:
        return isinstance(args, SFTConfig) and not isinstance(args, GOLDConfig)

    def _load(self, role: str, model, tokenizer, options: Mapping, **settings) -> LoadedModel:
        """A participant with this run's precision and, for the student, its template settings."""
        a = self.args
        mine = role == "student"
        return load_model_and_tokenizer(
            model,
            tokenizer,
            dtype=self.dtype,
            read_dtype=options.get("dtype", "auto"),
            revision=options.get("revision"),
            attention=options.get("attn_implementation"),
            chat_template=read_template(a.chat_template_path) if mine and a.chat_template_path else None,
            template_kwargs=a.template_kwargs
            if mine or a.teacher_template_kwargs is None
            else a.teacher_template_kwargs,
            special_tokens_in_prompts=a.special_tokens_in_prompts,
            eos_token=a.eos_token if mine else None,
            trust_remote_code=a.trust_remote_code,
            role=role,
            **settings,
        )

    def _loop(self) -> Loop:
        a = self.args
        counted = "assistant" if a.assistant_only_loss else "all" if a.completion_only_loss is False else "completion"
        checked = check_examples(
            self.train_examples,
            self.student.chat_tokenizer,
            # What stands before the last answer is learned too, unless completions alone are: long rows are cut then.
            budget=None if a.max_length is None or counted != "completion" else a.max_length - 1,
            need_completion="supervised fine-tuning learns completions, so every row needs one",
            learns_calls=counted != "completion",
        )
        if self.eval_examples is not None:
            self.notices += check_evaluation(self.eval_examples, self.student.chat_tokenizer)
        self.notices += checked.notices
        batch_size = a.per_device_train_batch_size * self.shards
        batch_builder = TokenBatchBuilder(
            self.student.chat_tokenizer,
            batch_size,
            a.per_device_eval_batch_size * self.shards,
            a.max_length,
            counted,
            self.share,
        )
        self.notices += no_effect.notices(a, evaluates=self.eval_examples is not None)
        self._tell({"loss": f"cross-entropy on {COUNTED[counted]}"}, checked.kept)
        graph, params = self._take_student()
        loss = make_cross_entropy_loss(graph, chunk=chunk_size(a.loss_chunk))
        digests = {
            "the training data": checked.digest,
            **describe_tokenizer("the student", self.student.chat_tokenizer),
        }
        task = Task(
            self.student,
            graph,
            params,
            loss,
            (),
            batch_builder,
            self.train_examples,
            checked.kept,
            digests,
            self.eval_examples,
            without_effect=no_effect.fields(a, evaluates=self.eval_examples is not None),
        )
        return self._make_loop(task, batch_size * a.gradient_accumulation_steps, SFT_NEW_TOKENS)

    def _take_student(self) -> ModelValue:
        """The student as a value, which the loop is to own alone."""
        value = split(self.student.model)
        self.student = self.student._replace(model=None)
        return value

    def _make_loop(self, task: Task, prompts_per_step: int, max_new_tokens: int) -> Loop:
        return Loop(
            task,
            self.args,
            prompts_per_step=prompts_per_step,
            batch_size=self.args.per_device_train_batch_size * self.shards,
            console=self.console,
            max_new_tokens=max_new_tokens,
            save_dtype=self.save_dtype,
        )

    def _tell(self, rows: Mapping[str, Any], kept: Sequence[int]) -> None:
        config = self.student.model.config
        size = count(split(self.student.model)[1])
        device = jax.devices()[0]
        about = {
            "student": f"{self.student.name} ({config.family}, {size / 1e6:.1f} M parameters)",
            **rows,
            "data": f"{len(kept)} rows" + (f" of {self.dataset_name}" if self.dataset_name else ""),
            "precision": f"{self.dtype} compute, float32 parameters",
            "attention": self.student.model.describe_attention(),
            "device": f"{device.device_kind} ({jax.default_backend()})",
            "mesh": None if self.placement is None else self._describe_mesh(),
            "output": self.args.output_dir,
        }
        header(self.console, self.title, about, self.notices)

    def _describe_mesh(self) -> str:
        hosts = f" of {processes.count()} processes" if processes.count() > 1 else ""
        return f"{describe_mesh(self.placement.mesh)} ({jax.device_count()} devices{hosts})"

    @property
    def log_history(self) -> list[dict[str, Any]]:
        """Every logged line, oldest first."""
        return [dict(row) for row in self.loop.history]

    @property
    def model(self):
        """The student as it stands now, a `Decoder` of its own: training does not change it, nor it what is trained."""
        return self.loop.copy_model()

    def train(self, resume_from_checkpoint: str | os.PathLike | bool | None = None) -> dict[str, float]:
        """Trains, saves the student to `output_dir` with a model card, and pushes it where that was asked for.

        Args:
            resume_from_checkpoint: "latest" or True, the folder of a checkpoint, or False for none of them; None: as
                the settings say.

        Returns:
            The closing evaluation's metrics; empty without evaluation data.
        """
        a = self.args
        if a.push_to_hub and processes.is_first():
            try:
                self.hub_model_id = create_hub_repository(
                    self.hub_model_id, a.output_dir, a.hub_private_repo, a.hub_token
                )
            except HubSilent as error:
                self.console.print(str(error), markup=False, soft_wrap=True)
        resume = a.resume_from_checkpoint
        if resume_from_checkpoint is not None:
            resume = read_value(type(a), "resume_from_checkpoint", resume_from_checkpoint)
            check_folder("resume_from_checkpoint", resume)
        results = self.loop.train(resume)
        if not processes.is_first():
            return results
        write_model_card(
            a.output_dir,
            method=self.method,
            base_model=self.student.name,
            dataset=self.dataset_name,
            command=self.command,
            results={k: f"{v:.4f}" for k, v in results.items()},
            **self._card(),
        )
        self.console.print(f"The student is saved in {a.output_dir}", markup=False, soft_wrap=True)
        if a.push_to_hub:
            self.push_to_hub()
        return results

    def _card(self) -> dict[str, Any]:
        return {}

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


class GOLDTrainer(SFTTrainer):
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
    """

    method = "on-policy distillation"
    title = "gold_jax.train"

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
        console: Console | None = None,
        command: Sequence[str] | None = None,
        dataset_name: str | None = None,
    ):
        """Loads both models and checks everything that can be checked before the first update."""
        settings = args if self._takes(args) else self._default_args()  # what is none is refused below
        self._teacher_source = teacher_model if teacher_model is not None else settings.teacher_model_name_or_path
        if self._teacher_source is None:
            raise ValueError("there is no teacher: pass teacher_model, or --teacher_model_name_or_path")
        self._teacher_tokenizer = teacher_processing_class or settings.teacher_tokenizer_name_or_path
        super().__init__(
            model,
            args,
            train_dataset,
            eval_dataset,
            processing_class,
            console=console,
            command=command,
            dataset_name=dataset_name,
        )

    @staticmethod
    def _default_args() -> GOLDConfig:
        return GOLDConfig()

    @staticmethod
    def _takes(args: Any) -> bool:
        return isinstance(args, GOLDConfig)

    def _loop(self) -> Loop:
        a = self.args
        options = dict(a.teacher_model_init_kwargs)
        options["revision"] = options.get("revision") or a.teacher_model_revision
        placement = None if self.placement is None else Placement(self.placement.mesh, a.teacher_layout)
        teacher = self._load(
            "teacher",
            self._teacher_source,
            self._teacher_tokenizer,
            options,
            param_dtype=self.dtype,
            placement=placement,
        )
        student = self.student
        one = same_vocabulary(student.chat_tokenizer, teacher.chat_tokenizer)
        self.spec = a.loss_spec(one)
        sizes = student.model.config.vocab_size, teacher.model.config.vocab_size
        stops = student.chat_tokenizer.stop_ids, teacher.chat_tokenizer.stop_ids
        by_role = not one or student.chat_tokenizer.stop_id != teacher.chat_tokenizer.stop_id
        if one:
            vocabulary = VocabularyMap.identity(*sizes, stop=stops)
        else:
            vocabulary = VocabularyMap.build(
                student.chat_tokenizer.surfaces,
                teacher.chat_tokenizer.surfaces,
                student_size=sizes[0],
                teacher_size=sizes[1],
                stop=stops,
                mask=self.spec.mask,
            )
        checked = check_examples(
            self.train_examples,
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
        if self.eval_examples is not None:
            self.notices += check_evaluation(self.eval_examples, student.chat_tokenizer, teacher.chat_tokenizer)
        self.notices += checked.notices + no_effect.notices(a, self.spec, evaluates=self.eval_examples is not None)
        self.teacher_name = teacher.name
        engine, notices = completion_server(a, student.model.config.vocab_size, self.dtype)
        self.notices += notices
        self._tell(
            {
                "teacher": f"{teacher.name} ({teacher.model.config.family})",
                "vocabularies": "one and the same" + (", stop tokens matched by role" if by_role else "")
                if one
                else f"{sizes[0]:,} and {sizes[1]:,} rows, {vocabulary.matched:,} matched by surface",
                "loss": self.spec.describe(),
                "completions": f"{a.lmbda:.0%} by the student"
                + (f" through {a.rollout_server} at {a.server_url}" if engine is not None else "")
                + (f", {1 - a.lmbda:.0%} by the teacher" if a.seq_kd and a.lmbda < 1 else "")
                + (f", at most {a.max_completion_length} tokens" if a.lmbda or a.seq_kd else ""),
            },
            checked.kept,
        )
        teacher_graph, teacher_params = split(teacher.model)
        constants = freeze_teacher(teacher_graph, teacher_params, vocabulary, stops if by_role else None)
        digests = {
            "the training data": checked.digest,
            **describe_tokenizer("the student", student.chat_tokenizer),
            **describe_tokenizer("the teacher", teacher.chat_tokenizer),
            "the teacher's weights": describe_weights(teacher_params),
        }
        teacher = teacher._replace(model=None)  # from here on the constants hold its parameters
        # To write, it needs them as they were: of a head that was reordered, that is a second one.
        writes = a.seq_kd and a.lmbda < 1
        teacher_model = (teacher_graph, teacher_params) if writes else None
        del teacher_params
        student_graph, student_params = self._take_student()
        loss = make_distillation_loss(
            student_graph, teacher_graph, self.spec, vocabulary, chunk=chunk_size(a.loss_chunk)
        )
        batch_builder = DistillationBatchBuilder(
            student=student.chat_tokenizer,
            teacher=teacher.chat_tokenizer,
            student_graph=student_graph,
            spec=self.spec,
            one_vocabulary=one,
            batch_size=a.per_device_train_batch_size * self.shards,
            eval_batch_size=a.per_device_eval_batch_size * self.shards,
            micro_batches=a.gradient_accumulation_steps,
            lmbda=a.lmbda,
            num_generations=a.num_generations,
            max_length=a.max_length,
            max_new_tokens=a.max_completion_length,
            temperature=a.temperature,
            top_k=a.top_k,
            top_p=a.top_p,
            seed=a.seed,
            generation_batch_size=a.generation_batch_size or 32 * self.shards,
            teacher_model=teacher_model,
            teacher_context=a.teacher_context,
            engine=engine,
            sync=None if engine is None else engine.sync,
            process_shard=self.share,
        )

        def teacher_score():
            value = teacher_model or (teacher_graph, restore_teacher(teacher_graph, constants, vocabulary))
            whole = teacher._replace(model=merge(*value))
            return measures(whole, with_text_completion(self.eval_examples), a, a.max_completion_length)

        task = Task(
            self.student,
            student_graph,
            student_params,
            loss,
            constants,
            batch_builder,
            self.train_examples,
            checked.kept,
            digests,
            self.eval_examples,
            teacher_score,
            without_effect=no_effect.fields(a, self.spec, evaluates=self.eval_examples is not None),
            restart=None if engine is None else engine.restart,
        )
        rows = a.per_device_train_batch_size * self.shards * a.gradient_accumulation_steps
        return self._make_loop(task, rows // a.num_generations, a.max_completion_length)

    def _card(self) -> dict[str, Any]:
        return {"teacher": self.teacher_name, "loss": self.spec.describe()}


COUNTED = {"completion": "the completion", "assistant": "every assistant turn", "all": "the whole sequence"}
