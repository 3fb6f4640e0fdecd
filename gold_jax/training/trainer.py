"""GOLDTrainer and SFTTrainer, which make a run from names or objects. The run itself is `training.loop`."""

import dataclasses
import functools
import importlib
import os
import pathlib
import shlex
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import jax
from rich.console import Console
from transformers.trainer_callback import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_utils import PredictionOutput, TrainOutput

from gold_jax import progress
from gold_jax.config import GOLDConfig, RunFacts, SFTConfig, named_without_effect, read_value
from gold_jax.config.trl_compat import MEMBERS
from gold_jax.cpu import release_freed_memory
from gold_jax.distributed.consensus import assert_same_across_processes, raised_in_all_processes
from gold_jax.distributed.initialize import is_main_process
from gold_jax.loading import LoadedModel, compute_dtype, load_model_and_tokenizer, read_template
from gold_jax.loss_spec import LossSpec
from gold_jax.models.decoder import Decoder
from gold_jax.models.functional import count, split
from gold_jax.notebook import table
from gold_jax.sharding.axes import mesh_flag
from gold_jax.sharding.placement import Placement
from gold_jax.text.chat import ChatTokenizer
from gold_jax.text.checks import check_evaluations
from gold_jax.text.data import Example, as_teacher_reads, load_examples
from gold_jax.text.stream import RowStream, open_stream
from gold_jax.text.truncation import EndsOfPrompts
from gold_jax.training import build
from gold_jax.training.batches import DistillationBatchBuilder, RowOrder, TokenBatchBuilder
from gold_jax.training.callbacks import check_compute_metrics, check_optimizers, check_trl_arguments
from gold_jax.training.hub import HubError, HubSilent, create_hub_repository, push_to_hub
from gold_jax.training.logging import header, shown
from gold_jax.training.loop import Loop
from gold_jax.training.model_card import write_model_card
from gold_jax.training.optimizer import make_schedule
from gold_jax.training.precision import describe_unmoved
from gold_jax.training.resume import IGNORED_ON_RESUME, describe_run, digests_of
from gold_jax.training.rows import TrainingRows, check_training_rows, needs_all_rows
from gold_jax.training.run_state import Data
from gold_jax.training.run_summary import RunSummary, environment, settings_beside_defaults
from gold_jax.training.trackers import require_trackers
from gold_jax.training.trainer_members import TrainerMembers
from gold_jax.wording import listed, plural, without_passwords

SFT_NEW_TOKENS = 128
_LEARNED = {"completion": "the completion", "assistant": "every assistant turn", "all": "the whole sequence"}


class _Trainer(TrainerMembers):
    """What the trainers share: the inputs, read and checked before a model is loaded, and the run made from them.

    TRL's names of settings are attributes too (`trainer.beta`); its other attributes and methods raise AttributeErrors
    that name the alternative.
    """

    method = title = ""
    args: SFTConfig  # a frozen copy
    train_dataset: Any  # as it was passed
    eval_dataset: Any
    compute_metrics: Any
    hub_model_id: str | None
    model_name_or_path: str  # of the student
    is_in_train: bool
    spec: LossSpec | None = None  # the loss of a distillation
    _card: Mapping[str, Any]  # of the model card: loss and recipe

    def __init__(
        self, args, train_dataset, eval_dataset, optimizers, callbacks, compute, console, command, dataset_name
    ):
        check_optimizers(*optimizers)
        self._optimizers, self._callbacks = optimizers, list(callbacks or ())
        self.args = a = args.frozen_copy()  # validates again
        check_compute_metrics(compute, a)
        self.train_dataset, self.eval_dataset, self.compute_metrics = train_dataset, eval_dataset, compute
        self.is_in_train = False
        if a.push_to_hub and a.hub_strategy == "every_save":
            self._callbacks.append(_PushOnSave(self))
        if (a.num_processes or 1) > 1 and jax.process_count() == 1:
            first = "gold_jax.distributed.initialize.initialize, or jax.distributed.initialize, before a trainer"
            raise ValueError(f"num_processes is {a.num_processes}, and this process runs alone: call {first} is made")
        for name in ("output_dir", "checkpoint_dir"):
            if os.path.isfile(getattr(a, name) or ""):
                raise ValueError(f"--{name} is {str(getattr(a, name))!r}, which is a file; name a folder")
        if train_dataset is None:
            given = "pass train_dataset= by its name, or --dataset_name on the command line"
            raise ValueError(f"there is nothing to train on: {given}")
        if eval_dataset is None and (a.eval_strategy != "no" or a.eval_on_start):
            flag = "--eval_on_start" if a.eval_strategy == "no" else f"--eval_strategy {a.eval_strategy}"
            raise ValueError(f"{flag} needs rows to evaluate on: pass eval_dataset, or leave it out")
        first = a.on_bad_row == "error"
        named: dict[str, Any] = dict(text_column=a.dataset_text_field, renamed=a.columns)
        read = functools.partial(load_examples, check_first=first, **named)
        if isinstance(train_dataset, datasets.IterableDataset):
            train_dataset = open_stream(train_dataset, **named)
        streamed = isinstance(train_dataset, RowStream)
        if streamed and (why := needs_all_rows(a)):
            raise ValueError(f"a streamed data set has no length: {why}")
        self.train_examples: Any = train_dataset if streamed else read(train_dataset)
        if isinstance(eval_dataset, Mapping):
            names = [*map(str, eval_dataset)]
            if not names:
                raise ValueError("eval_dataset is an empty dict; pass data sets by their names, or leave it out")
            if len({*names}) < len(names):
                alike = ", ".join(map(repr, eval_dataset))
                raise ValueError(f"eval_dataset has two names that are written alike: {alike}")
            _check_best_metric(a, names)
            self.eval_examples: Any = dict(zip(names, map(read, eval_dataset.values())))
        else:
            self.eval_examples = None if eval_dataset is None else read(eval_dataset)
        self.placement = build.place_run(a.mesh, a.layout)
        self.process_shard = build.process_shard_of(self.placement)
        self.console = (console or progress.console() or Console()) if is_main_process() else Console(quiet=True)
        self.dataset_name = dataset_name or (train_dataset if isinstance(train_dataset, str) else None)
        self.command, self.hub_model_id, self.dtype = command, a.hub_model_id, compute_dtype(a.bf16)

    def _load(self, role: str, model, tokenizer, options: Mapping[str, Any], **settings) -> LoadedModel:
        """A model with its tokenizer, in this run's precision; `settings` are those of this side alone."""
        a, attention = self.args, options.get("attn_implementation")
        settings |= dict(read_dtype=options.get("dtype", "auto"), revision=options.get("revision"), attention=attention)
        settings |= dict(special_tokens_in_prompts=a.special_tokens_in_prompts, trust_remote_code=a.trust_remote_code)
        with progress.task(f"reading the {role}"):
            return load_model_and_tokenizer(model, tokenizer, dtype=self.dtype, role=role, **settings)

    def _load_student(self, model, tokenizer) -> LoadedModel:
        a = self.args
        template = read_template(a.chat_template_path) if a.chat_template_path else None
        options = dict(chat_template=template, template_kwargs=a.template_kwargs, eos_token=a.eos_token)
        options |= dict(remat=a.gradient_checkpointing, placement=self.placement)
        return self._load("student", model, tokenizer, a.model_init_kwargs, **options)

    def _check(self, learned: Any, chat_tokenizer: ChatTokenizer, **options: Any) -> TrainingRows:
        """`check_training_rows` of this run's rows."""
        given = self.args, self.train_examples, learned, chat_tokenizer, self.process_shard.num_shards, self.console
        rows = check_training_rows(*given, **options)
        self.train_examples = rows.examples
        return rows

    def _set_up(
        self, student, rows: TrainingRows, shown, max_new_tokens, teacher=None, match=None, engine=None, notices=()
    ) -> None:
        """Prints what is about to run (`shown`), and makes the loop that runs it on these rows."""
        a = self.args
        sides = {"the student": student} if teacher is None else {"the student": student, "the teacher": teacher}
        facts = RunFacts(a, self.spec, evaluates=self.eval_examples is not None, in_bfloat16=self._in_bfloat16)
        measured, evaluated = self._check_evaluation_rows(sides)
        self._check_evaluation_lengths(sides, max_new_tokens)
        self.notices = [*a.notices, *rows.notices, *measured, *named_without_effect(a, facts), *notices]
        shown |= {f"{whose.removeprefix('the ')} reads": x.chat_tokenizer.describe() for whose, x in sides.items()}
        data = Data(rows.examples, self.eval_examples, rows.order, {}, rows.background)
        if self._in_bfloat16 and not a.bf16_stochastic_round:
            total = data.total_steps(a)
            unmoved = describe_unmoved(split(student.model)[1], make_schedule(a, total), total)
            self.notices += [unmoved] if unmoved else []
        self._show(student, data, shown)
        # All processes compute together from here on; one that failed to load its data or models is named here.
        sizes = [side.model.config.vocab_size for side in sides.values()]
        assert_same_across_processes("the sizes of the vocabularies", sizes)
        digests, shards = digests_of(sides, rows.digest, evaluated), self.process_shard.num_shards
        data = data._replace(description=describe_run(facts, digests, shards, rows.count, rows.checked))
        options = dict(match=match, process_shard=self.process_shard, engine=engine, optimizers=self._optimizers)
        run = build.build_run(a, student, teacher, self.placement, total_steps=data.total_steps(a), **options)
        self.student = student._replace(model=None)  # the loop is the only owner of its parameters
        self._teacher, self.model_name_or_path = teacher and teacher._replace(model=None), student.name
        options = dict(teacher=self._teacher, callbacks=self._callbacks, compute_metrics=self.compute_metrics)
        if is_main_process():
            known = {"student": student.name, "method": self.method, **shown}
            known |= {"data": self.dataset_name, "rows": rows.count, "digests": digests}
            known |= {"settings": settings_beside_defaults(a), "notices": self.notices}
            options["summary"] = RunSummary(a.output_dir, known, self.command)
        self.loop = Loop(run, self.student, data, a, self.console, max_new_tokens, **options)

    @property
    def _in_bfloat16(self) -> bool:
        """Whether the built-in optimizer updates weights that are computed with in bfloat16."""
        return self.dtype == "bfloat16" and self._optimizers[0] is None

    def _check_evaluation_rows(self, sides: Mapping[str, LoadedModel]) -> tuple[list[str], str | None]:
        """Drops evaluation rows that cannot be measured; returns notices and a digest of the others (None: no rows)."""
        a, tokenizers = self.args, [side.chat_tokenizer for side in sides.values()]
        alone = "the teacher" not in sides
        options = dict(on_bad_row=a.on_bad_row, teacher_context=None if alone else a.teacher_context)
        options |= dict(whole=alone and build.counted_tokens(a) != "completion")
        self._check_evaluation = functools.partial(check_evaluations, sides=tokenizers, **options)
        if self.eval_examples is None:
            return [], None
        self.eval_examples, measured, evaluated = self._check_evaluation(self.eval_examples)
        return measured, evaluated

    def _check_evaluation_lengths(self, sides: Mapping[str, LoadedModel], max_new_tokens: int) -> None:
        """ValueError where an evaluation asks a model for longer rows than it can decode."""
        a, rows = self.args, self.eval_examples
        for whose, side in sides.items():
            writes = a.predict_with_generate or (len(sides) > 1 and a.eval_gaps)
            if rows is None or not writes or side.model.config.max_decode_length is None:
                continue
            examples = [e for part in (rows.values() if isinstance(rows, Mapping) else [rows]) for e in part]
            if whose == "the teacher":
                examples = as_teacher_reads(examples, side.chat_tokenizer, a.teacher_context)
            _check_longest_prompt(side, examples, max_new_tokens, "the evaluation data")

    def _show(self, student: LoadedModel, data: Data, shown: Mapping[str, Any]) -> None:
        """Prints what is about to run."""
        total, order = data.total_steps(self.args), data.order
        schedule = make_schedule(self.args, total)
        rate = f"learning rate {schedule.peak:g} ({schedule.kind}, {schedule.warmup} warmup steps)"
        rate = rate if self._optimizers[0] is None else "optimizer as passed"
        rounded = "stochastically rounded " if self._in_bfloat16 and self.args.bf16_stochastic_round else ""
        device, backend, size, mesh = jax.devices()[0], jax.default_backend(), count(split(student.model)[1]), None
        if self.placement is not None:
            hosts = f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""
            mesh = f"{mesh_flag(self.placement.mesh.shape)} ({jax.device_count()} devices{hosts})"
        rows = {
            "student": _describe_model(student, f"{size / 1e6:.1f} M parameters"),
            **shown,
            "data": order.describe() + (f" of {self.dataset_name}" if self.dataset_name else ""),
            "updates": f"{total:,} of {plural(order.per_step, 'row')} each, {rate}",
            "precision": f"{self.dtype} compute, {rounded}float32 parameters",
            "attention": student.model.describe_attention(),
            "device": device.device_kind if device.device_kind == backend else f"{device.device_kind} ({backend})",
            "mesh": mesh,
            "output": self.args.output_dir,
        }
        header(self.console, self.title, rows, self.notices)
        named = ("vocabularies", "completions", "updates", "precision", "device", "mesh")
        recipe = {name.capitalize(): rows[name] for name in named if rows.get(name)}
        recipe["Versions"] = ", ".join(f"{name} {version}" for name, version in environment()["versions"].items())
        self._card = {"loss": rows["loss"], "recipe": recipe}

    @property
    def log_history(self) -> list[dict[str, Any]]:
        """Every logged line of the last `train`, oldest first."""
        return [dict(row) for row in self.loop.history]

    @property
    def state(self) -> TrainerState:
        """transformers' `TrainerState` of the run: `global_step`, `max_steps`, `epoch`, `log_history` and more."""
        return dataclasses.replace(self.loop.trainer_state(), log_history=self.log_history)

    @property
    def model(self):
        """A copy of the current student, a `Decoder`, independent of the one that is trained."""
        student = self.loop.student.model
        return student.replace(jax.tree.map(jax.numpy.copy, split(student)[1]))

    def train(
        self,
        resume_from_checkpoint: str | os.PathLike | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: Any = None,
    ) -> TrainOutput:
        """Trains, saves the student to `output_dir` with a model card, and pushes it with `push_to_hub`.

        Args:
            resume_from_checkpoint: "latest" or True, the folder of a checkpoint, or False for none; None: as in the
                settings.
            trial: must be None: there is no hyperparameter search.
            ignore_keys_for_eval: accepted as in transformers, without effect.

        Returns:
            `global_step`; `training_loss`, the mean over the updates made now; `metrics`, the closing evaluation's,
            where there is evaluation data, and `train_runtime`, `train_loss` and others of this call.
        """
        if trial is not None:
            raise ValueError(f"trial is not supported here: {MEMBERS['hyperparameter_search']}")
        a, pushes = self.args, self.args.push_to_hub and is_main_process()
        require_packages(a)  # before the files of an earlier run are renamed
        with raised_in_all_processes("the repository on the hub", HubError):
            try:
                if pushes:
                    where = self.hub_model_id, a.output_dir, a.hub_private_repo, a.hub_token
                    self.hub_model_id = create_hub_repository(*where)
            except HubSilent as error:
                self.loop.say(str(error))
        resume = a.resume_from_checkpoint
        if resume_from_checkpoint is not None:
            resume = read_value(type(a), "resume_from_checkpoint", resume_from_checkpoint)
        try:
            output = self._run(resume)
        except KeyboardInterrupt as stopped:
            # IPython keeps the last error, whose frames would keep the arrays after `del trainer`.
            traceback.clear_frames(stopped.__traceback__)
            del self
            raise stopped.with_traceback(None if stopped.args else stopped.__traceback__) from None
        if is_main_process():
            self.create_model_card()
            self.loop.say(f"The student is saved in {a.output_dir}")
            if a.report:
                self._write_report()
        with raised_in_all_processes("the push to the hub", HubError):
            if pushes:
                self.push_to_hub()
        return output

    def report(self) -> Any:
        """A `gold_jax.report.Report` of the run in `output_dir` so far, which notebooks display.

        FileNotFoundError: there is nothing yet.
        """
        return importlib.import_module("gold_jax.report").Report(self.args.output_dir)

    def _run(self, resume: str | None) -> TrainOutput:
        """Runs the loop with progress shown."""
        self.is_in_train = True
        try:
            with progress.displayed(self.console, enabled=is_main_process() and not self.args.disable_tqdm):
                progress.watch_compiling()
                return self.loop.train(resume)
        finally:
            self.is_in_train = False
            release_freed_memory()

    def _write_report(self) -> None:
        """Writes the report of a finished run; an error is printed and does not fail the run."""
        folder = self.args.output_dir
        try:
            page = importlib.import_module("gold_jax.reporting.page")
            self.loop.say(f"The report is in {page.write_page(self.report().runs)}")
        except Exception as error:
            again = f"python -m gold_jax.report {shlex.quote(str(folder))} writes it later"
            self.loop.say(f"The report could not be written ({type(error).__name__}: {error}); {again}.")

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Measures the current student, logs the metrics and calls `on_evaluate`.

        Args:
            eval_dataset: rows as `eval_dataset` of the constructor takes them; a dict of several such sets, measured as
                `{metric_key_prefix}_{name}`; the name of a set of the constructor's; or None for all of these.
            ignore_keys: accepted as in transformers, without effect.
            metric_key_prefix: what the metrics' names begin with.
        """
        if isinstance(eval_dataset, Mapping):
            metrics = {}
            for name, part in eval_dataset.items():
                metrics |= self.evaluate(part, metric_key_prefix=f"{metric_key_prefix}_{name}")
            return metrics
        rows = None if eval_dataset is None else self._rows_to_measure(eval_dataset)
        metrics = _prefixed(self.loop.evaluate(rows), metric_key_prefix)
        self.loop.record(metrics, "on_evaluate")
        return metrics

    def predict(self, test_dataset: Any, ignore_keys: Any = None, metric_key_prefix: str = "test") -> PredictionOutput:
        """The student's greedy completions for rows with completions, and its metrics on them.

        Returns:
            `predictions`: its texts; `label_ids`: those of the rows; `metrics`: as `evaluate` returns them.
        """
        output = self.loop.predict(self._rows_to_measure(test_dataset))
        output = output._replace(metrics=_prefixed(output.metrics, metric_key_prefix))
        self.loop.callbacks.call("on_predict", metrics=output.metrics)
        return output

    def _rows_to_measure(self, rows: Any) -> Sequence:
        if isinstance(rows, str) and isinstance(self.eval_examples, Mapping) and rows in self.eval_examples:
            return self.eval_examples[rows]
        named = dict(text_column=self.args.dataset_text_field, renamed=self.args.columns)
        rows, notices, _ = self._check_evaluation(load_examples(rows, **named))
        for notice in notices:
            self.loop.say(notice)
        return rows

    def save_model(self, output_dir: str | os.PathLike | None = None, _internal_call: bool = False) -> pathlib.Path:
        """Writes the student and its tokenizer as a Hugging Face folder; None: to `output_dir` of the settings."""
        return self.loop.save(output_dir or self.args.output_dir)

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: Sequence[str] | str | None = None
    ) -> None:
        """Writes the model card into `output_dir`.

        Args:
            model_name: its title; None: the folder's name.
            dataset_name: None: the name of the data set that was trained on.
            tags: further tags.
        """
        given = dict(title=model_name, dataset=dataset_name or self.dataset_name, tags=tags, command=self.command)
        given |= dict(results=self.loop.results, history=self.loop.history, repo_id=self.hub_model_id, **self._card)
        given |= dict(teacher=self._teacher and self._teacher.name)
        settings = settings_beside_defaults(self.args)
        given["settings"] = {name: value for name, value in settings.items() if name not in IGNORED_ON_RESUME}
        write_model_card(self.args.output_dir, method=self.method, base_model=self.student.name, **given)

    def push_to_hub(
        self,
        commit_message: str = "Trained with gold_jax",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        **card: Any,
    ) -> str:
        """Uploads `output_dir`; returns the address of the commit.

        Args:
            commit_message: of the commit.
            blocking: without effect: the upload is always waited for.
            token: in place of `hub_token` of the settings.
            revision: None: the main branch; a ValueError otherwise.
            card: arguments of `create_model_card`, which is called if there are any.
        """
        a = self.args
        if revision not in (None, "main"):
            raise ValueError(f"revision is {revision!r}: pushes go to the main branch; move it on the hub afterwards")
        if card:
            self.create_model_card(**card)
        self.loop.callbacks.call("on_push_begin")
        url = push_to_hub(a.output_dir, self.hub_model_id, a.hub_private_repo, token or a.hub_token, commit_message)
        self.loop.say(f"Pushed to {url}")
        return url

    def __repr__(self) -> str:
        state = self.state
        names = [side.name for side in (self.student, self._teacher) if side is not None]
        rows, updates = self.loop.data.order.describe(), f"{state.global_step} of {state.max_steps} updates"
        return f"{type(self).__name__}({' from '.join(map(repr, names))}, {rows}, {updates} done)"

    def _repr_html_(self) -> str:
        """What notebooks show: what is trained how, and the metrics that were logged last."""
        facts = {"Loss": self._card["loss"], **self._card["recipe"], "Output": self.args.output_dir}
        last = {name: shown(value) for row in self.log_history for name, value in row.items()}
        names = sorted(last, key=lambda name: name.startswith("eval_"))
        logged = table("Logged last", [[last[name] for name in names]], names) if last else ""
        return table(repr(self), facts.items()) + logged


class _PushOnSave(TrainerCallback):
    """Pushes the student at every save but the last, which `train` pushes; an error of a push is only printed."""

    def __init__(self, trainer: _Trainer):
        self._trainer = trainer

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if control.should_training_stop or state.global_step >= state.max_steps:
            return
        self._trainer.save_model()
        if is_main_process():
            try:
                self._trainer.push_to_hub(f"Update {state.global_step}", model_name=None)
            except HubError as error:
                self._trainer.loop.say(str(error))


def require_packages(args: SFTConfig) -> None:
    """ImportError or ValueError: what `report` or `report_to` needs is not installed."""
    if args.report:
        importlib.import_module("gold_jax.reporting.plots").require_bokeh()
    if is_main_process():
        require_trackers(args.report_to)


def _check_best_metric(args: SFTConfig, sets: Sequence[str]) -> None:
    """ValueError if `metric_for_best_model` is not a metric of one of several evaluation sets."""
    wanted = args.metric_for_best_model
    if wanted is None or wanted.removeprefix("eval_").startswith(tuple(f"{name}_" for name in sets)):
        return
    measures = ("loss", "bits_per_byte", *(["exact_match"] if args.predict_with_generate else []))
    possible = listed([f"{name}_{measure}" for name in sets for measure in measures], 12)
    each = f"each of the {len(sets)} evaluation sets is measured by its name"
    raise ValueError(f"--metric_for_best_model is {wanted!r}, and {each}: give {possible}, or another measure of one")


def _check_longest_prompt(side: LoadedModel, examples: Sequence[Example], max_new_tokens: int, data: str) -> None:
    """ValueError where completions of prompts make longer rows than a model can decode."""
    longest = max(map(len, side.chat_tokenizer.encode_prompts([e.prompt for e in examples])))
    wanted = f"the longest prompt of {data} and {max_new_tokens} new tokens"
    side.model.config.check_decode_length(longest + max_new_tokens, wanted)


def _describe_model(side: LoadedModel, *facts: str) -> str:
    config, most = side.model.config, side.model.config.max_decode_length
    limit = [] if most is None else [f"LongRoPE: writes in rows of up to {most:,} tokens"]
    return f"{side.name} ({', '.join([config.family, *facts, *limit])})"


def _describe_vocabularies(match: build.Match, sizes: Sequence[int]) -> str:
    matched = match.vocabulary.matched
    if not (match.same or match.related):
        return f"{sizes[0]:,} and {sizes[1]:,} rows, {matched:,} matched by the bytes they spell"
    alone = sum(sizes) - 2 * matched
    unmatched = f", {plural(alone, 'row')} of one side alone" if alone and match.related else ""
    return f"one and the same{unmatched}" + ("" if match.stops is None else ", stop tokens matched by role")


def _describe_completions(args: GOLDConfig, served: bool) -> str:
    by = f"{args.lmbda:.0%} by the student"
    by += f" through {args.rollout_server} at {without_passwords(args.server_url)}" if served else ""
    by += f", drawn for {args.rollout_batches} updates at once" if args.lmbda and args.rollout_batches > 1 else ""
    by += f", {1 - args.lmbda:.0%} by the teacher" if args.seq_kd and args.lmbda < 1 else ""
    return by + (f", at most {args.max_completion_length} tokens" if args.lmbda or args.seq_kd else "")


def _prefixed(metrics: Mapping[str, float], prefix: str) -> dict[str, float]:
    return {f"{prefix}_{name.removeprefix('eval_')}": value for name, value in metrics.items()}


class SFTTrainer(_Trainer):
    """Supervised fine-tuning: cross-entropy on completions, on every assistant turn, or on whole sequences.

    Args:
        model: a folder or hub id, a `Decoder`, or `(graphdef, state)`.
        args: the settings.
        train_dataset: a name, or rows as `load_examples` takes them.
        eval_dataset: the same, or None; a dict of them, or a `datasets.DatasetDict`, is several, measured by name.
        processing_class: the tokenizer, or its name; None takes the one beside the model.
        optimizers: an optax transformation in place of AdamW with the settings' learning rates, and its schedule for
            the log (or None).
        callbacks: transformers' `TrainerCallback`s, called at begin and end, updates, logs, evaluations and saves.
        compute_metrics: with `predict_with_generate`, called in evaluation with a transformers `EvalPrediction` of
            texts: the student's greedy completions as `predictions`, the rows' own as `label_ids`; returns more metrics.
        console: where progress is shown; None for the terminal.
        command: the command line, for the model card.
        dataset_name: what the data set is called, for the model card.
        others: further arguments of TRL's trainers, such as `peft_config` and `data_collator`: None is taken, another
            value is a ValueError that says what stands in its place.

    Attributes:
        student: the name and the chat tokenizer of the model being trained; see `model`.
        log_history: every logged line of the last `train`, oldest first.
    """

    method, title = "supervised fine-tuning", "gold_jax.sft"

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
        console: Console | None = None,
        command: Sequence[str] | None = None,
        dataset_name: str | None = None,
        **others: Any,
    ):
        """Loads what is named and checks everything that can be checked before the first update."""
        args = SFTConfig() if args is None else args
        check_trl_arguments("SFTTrainer", args, SFTConfig, others, GOLDConfig)
        given = optimizers, callbacks, compute_metrics, console, command, dataset_name
        super().__init__(args, train_dataset, eval_dataset, *given)
        learned = build.counted_tokens(args)
        student = self._load_student(model, processing_class)
        need = "supervised fine-tuning learns completions, so every row needs one"
        # What stands before the last answer is learned too, unless completions alone are: long rows are cut then.
        most, reader = args.max_length, student.chat_tokenizer
        if args.truncation_mode == "keep_end" and most is not None:
            if learned != "completion":
                is_now = f"--truncation_mode keep_end shortens prompts, and here {_LEARNED[learned]} is learned"
                raise ValueError(f"{is_now}; use keep_start, or --completion_only_loss without --assistant_only_loss")

            def room(example: Any) -> int:
                text = reader.shorten(example.completion_for(reader), most)
                return most - 1 - len(reader.encode_completion(text, after=example.prompt).ids)

            self.train_examples = EndsOfPrompts(self.train_examples, reader, room)
        budget = None if args.max_length is None or learned != "completion" else args.max_length - 1
        targets = TokenBatchBuilder(student.chat_tokenizer, 1, 1, None, learned)
        targets = functools.partial(targets.count_targets, max_length=args.max_length or 0)
        options = dict(budget=budget, need_completion=need, learns_calls=learned != "completion")
        options |= dict(max_length=args.max_length, count_targets=targets, on_bad_row=args.on_bad_row)
        rows = self._check(learned, student.chat_tokenizer, **options)
        self._set_up(student, rows, {"loss": f"cross-entropy on {_LEARNED[learned]}"}, SFT_NEW_TOKENS)


class GOLDTrainer(_Trainer):
    """On-policy distillation from a teacher with any tokenizer.

    Args:
        model: the student: a folder or hub id, a `Decoder`, or `(graphdef, state)`.
        teacher_model: the teacher, likewise; None takes `args.teacher_model_name_or_path`.
        args: the settings.
        train_dataset: a name, or rows as `load_examples` takes them.
        eval_dataset: the same, or None; a dict of them, or a `datasets.DatasetDict`, is several, measured by name.
        processing_class: the student's tokenizer, or its name; None takes the one beside the model.
        teacher_processing_class: the teacher's; None takes `args.teacher_tokenizer_name_or_path`, else the one beside
            it.
        optimizers, callbacks, compute_metrics, console, command, dataset_name, others: as `SFTTrainer`.
    """

    method, title = "on-policy distillation", "gold_jax.train"

    @property
    def teacher_model(self) -> Decoder:
        """The teacher, a `Decoder` with arrays of its own."""
        teacher = self.loop.teacher.model
        return teacher.replace(jax.tree.map(jax.numpy.copy, split(teacher)[1]))

    @property
    def teacher_tokenizer(self):
        """The teacher's tokenizer."""
        return self._teacher.chat_tokenizer.tokenizer

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
        console: Console | None = None,
        command: Sequence[str] | None = None,
        dataset_name: str | None = None,
        **others: Any,
    ):
        """Loads both models and checks everything that can be checked before the first update."""
        args = GOLDConfig() if args is None else args
        check_trl_arguments("GOLDTrainer", args, GOLDConfig, others)
        teacher_model = args.teacher_model_name_or_path if teacher_model is None else teacher_model
        if teacher_model is None:
            raise ValueError("there is no teacher: pass teacher_model, or --teacher_model_name_or_path")
        given = optimizers, callbacks, compute_metrics, console, command, dataset_name
        super().__init__(args, train_dataset, eval_dataset, *given)
        a, placement = self.args, self.placement
        if not a.lmbda:
            self.method = "off-policy distillation"
        student = self._load_student(model, processing_class)
        tokenizer, options = teacher_processing_class or a.teacher_tokenizer_name_or_path, a.teacher_model_init_kwargs
        options = {**options, "revision": options.get("revision") or a.teacher_model_revision}
        placement = None if placement is None else Placement(placement.mesh, a.teacher_layout)
        template = a.template_kwargs if a.teacher_template_kwargs is None else a.teacher_template_kwargs
        settings = dict(param_dtype=self.dtype, template_kwargs=template, placement=placement)
        teacher = self._load("teacher", teacher_model, tokenizer, options, **settings)
        match = build.match_pair(student, teacher, a.projection_mask)
        self.spec = a.loss_spec(match.same or match.related)
        need, by_teacher = None, a.seq_kd and a.lmbda < 1
        build.check_decode_lengths(a, student.model.config, teacher.model.config)
        if a.lmbda < 1 and not a.seq_kd:
            share = f"with --lmbda {a.lmbda:g} a share of the batches comes from the data set"
            need = f"{share}; use --lmbda 1 for prompts alone"
        options = dict(budget=a.prompt_budget, need_completion=need, teacher=teacher.chat_tokenizer)
        options |= dict(student_writes=a.lmbda > 0, teacher_writes=by_teacher, teacher_context=a.teacher_context)
        if need is not None:
            sides = student.chat_tokenizer, teacher.chat_tokenizer, None
            builder = DistillationBatchBuilder(*sides, self.spec, match.same, a.max_length)
            options |= dict(max_length=a.max_length, count_targets=builder.count_targets)
        options |= dict(on_bad_row=a.on_bad_row)
        if a.truncation_mode == "keep_end":
            room = lambda _: a.prompt_budget  # noqa: E731
            self.train_examples = EndsOfPrompts(self.train_examples, student.chat_tokenizer, room)
        rows = self._check((self.spec, match.same), student.chat_tokenizer, **options)
        if by_teacher and teacher.model.config.max_decode_length is not None and isinstance(rows.order, RowOrder):
            kept = [rows.examples[i] for i in rows.order.rows]
            read = as_teacher_reads(kept, teacher.chat_tokenizer, a.teacher_context)
            _check_longest_prompt(teacher, read, a.max_completion_length, "the data, as the teacher reads it,")
        sizes = [side.model.config.vocab_size for side in (student, teacher)]
        notify = functools.partial(self.console.print, markup=False, soft_wrap=True)
        engine, notices = build.completion_server(a, sizes[0], self.dtype, notify)
        shown = {"teacher": _describe_model(teacher)}
        shown |= {"vocabularies": _describe_vocabularies(match, sizes), "loss": self.spec.describe()}
        shown |= {"completions": _describe_completions(a, served=engine is not None)}
        self._set_up(student, rows, shown, a.max_completion_length, teacher, match, engine, notices)
