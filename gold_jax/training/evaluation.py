"""Evaluation of the student, and which update was the best by a metric."""

import collections
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from transformers.trainer_utils import EvalPrediction, PredictionOutput

from gold_jax import progress
from gold_jax.config import GOLDConfig
from gold_jax.loading import LoadedModel
from gold_jax.losses.fused_head import chunk_size
from gold_jax.models.decoder import Decoder
from gold_jax.models.functional import merge
from gold_jax.scoring import (
    exact_match,
    greedy_completions,
    measure_gaps,
    score_completions,
    score_groups,
    share_alike,
)
from gold_jax.text.checks import with_text_completion
from gold_jax.text.data import Example, as_teacher_reads
from gold_jax.training.annotations import EVALUATION, annotate
from gold_jax.training.batches import DistillationBatchBuilder, TokenBatchBuilder
from gold_jax.training.build import Run
from gold_jax.training.logging import KEPT, plain_value
from gold_jax.training.step import Step
from gold_jax.training.teacher import restore_teacher

_SHOWN = "loss", "bits_per_byte", "exact_match", "forward_gap", "reverse_gap", "entropy"


class Evaluator(NamedTuple):
    """Measures a student on rows with completions."""

    step: Step
    batches: DistillationBatchBuilder | TokenBatchBuilder
    batch_size: int  # rows at once, on all devices
    loss_chunk: int | None
    max_new_tokens: int  # of a greedy completion
    compute_metrics: Callable[[EvalPrediction], Mapping[str, Any]] | None = None

    @annotate(EVALUATION)
    def predict(
        self,
        student: LoadedModel,
        params: Any,
        examples: Sequence[Example] | None,
        writes: bool,
        after_batch: Callable[[], Any] = lambda: None,
    ) -> PredictionOutput:
        """The metrics of a student with the parameters `params` on one set of rows.

        They are `eval_loss` and its parts, `eval_bits_per_byte`, and with `writes` also `eval_exact_match` and those of
        `compute_metrics`. With `writes` `predictions` are the student's greedy completions, `label_ids` the rows' own.
        ValueError: no row can be measured.
        """
        if examples is None:
            give = "give an eval_dataset, or --eval_strategy and a test split"
            raise ValueError(f"there is no data to evaluate on: {give}")
        examples = with_text_completion(examples)
        if not examples:
            raise ValueError("no row of the evaluation data has a completion, so nothing can be measured on it")
        data, totals = self.batches.build_evaluation(examples), collections.defaultdict(float)
        for batch, text in progress.track(list(zip(data.batches, data.text)), "evaluating"):
            for name, value in self.step.evaluate(params, batch, text).items():
                totals[f"eval_{name}"] += plain_value(value)
            after_batch()
        bits, size = totals.pop("eval_text_nll") / np.log(2), data.bytes
        if data.rest:
            rest, chunk = [examples[i] for i in data.rest], chunk_size(self.loss_chunk, student.model.platform)
            score = score_completions(student, None, rest, batch_size=self.batch_size, chunk=chunk)
            bits, size = bits + score.bits.sum(), size + score.bytes.sum()
        totals["eval_bits_per_byte"] = float(bits / size) if size else float("nan")
        texts = None, None
        if writes:
            options = dict(max_new_tokens=self.max_new_tokens, batch_size=self.batch_size)
            texts = greedy_completions(student, examples, **options)
            totals["eval_exact_match"] = share_alike(*texts)
            if self.compute_metrics is not None:
                found = self.compute_metrics(EvalPrediction(*texts))
                totals |= {f"eval_{name.removeprefix('eval_')}": plain_value(value) for name, value in found.items()}
        return PredictionOutput(*texts, dict(totals))


class TeacherMeasures(NamedTuple):
    """What is measured of the teacher, and of a student beside it. The teacher reads contexts that are its alone."""

    teacher: LoadedModel  # its model is in `run`
    run: Run
    args: GOLDConfig
    batch_size: int  # rows at once, on all devices

    @property
    def model(self) -> Decoder:
        """The teacher, sharing the arrays that updates read."""
        run = self.run
        if run.batches.teacher_model is not None:
            return merge(*run.batches.teacher_model)
        return merge(run.teacher_graph, restore_teacher(run.teacher_graph, run.step.constants, run.match.vocabulary))

    def _reader(self, rows: Sequence[Example]) -> tuple[LoadedModel, list[Example], dict[str, Any]]:
        """The teacher, the rows as it reads them, and the `chunk` that scoring with it takes."""
        teacher = self.teacher._replace(model=self.model)
        examples = as_teacher_reads(rows, teacher.chat_tokenizer, self.args.teacher_context)
        return teacher, examples, dict(chunk=chunk_size(self.args.loss_chunk, teacher.model.platform))

    def score(self, rows: Sequence[Example]) -> dict[str, float]:
        """The teacher's metrics on one set of rows, measured as the student's."""
        teacher, examples, options = self._reader(with_text_completion(rows))
        score = score_completions(teacher, None, examples, batch_size=self.batch_size, **options)
        found = {"eval_bits_per_byte": score.bits_per_byte}
        if self.args.predict_with_generate:
            options = dict(max_new_tokens=self.args.max_completion_length, batch_size=self.batch_size)
            found["eval_exact_match"] = exact_match(teacher, None, examples, **options)
        return found

    def gaps(self, student: LoadedModel, rows: Sequence[Example]) -> dict[str, float]:
        """Gaps between a student and the teacher on completions of the rows' prompts by either, in bits per byte."""
        examples = with_text_completion(rows)
        teacher, read, options = self._reader(examples)
        options |= dict(max_new_tokens=self.args.max_completion_length, key=self.args.seed, batch_size=self.batch_size)
        options |= dict(teacher_prompts=[e.prompt for e in read])
        found = measure_gaps(student, teacher, [e.prompt for e in examples], **options)
        measured = {"forward_gap": found.forward, "reverse_gap": found.reverse, "entropy": found.student_on_student}
        return {f"eval_{name}": value for name, value in measured.items()}

    def score_groups(self, student: LoadedModel, samples: Sequence[tuple[Example, str]]) -> list[list]:
        """`scoring.score_groups` of the student's completions of rows; rounded, fit for JSON."""
        examples, texts = [example for example, _ in samples], [text for _, text in samples]
        teacher, read, options = self._reader(examples)
        options |= dict(teacher_prompts=[e.prompt for e in read], batch_size=KEPT)
        found = score_groups(student, teacher, [e.prompt for e in examples], texts, **options)
        return [[[g.text, *(x if x is None else round(x, 4) for x in g[1:])] for g in groups] for groups in found]


def over_sets(measure: Callable[[Any], dict[str, float]], rows: Any) -> dict[str, float]:
    """The metrics of one set of rows, or of several by name: `eval_loss` of the set `a` is `eval_a_loss`."""
    if not isinstance(rows, Mapping):
        return measure(rows)
    found = {name: measure(part) for name, part in rows.items()}
    return {f"eval_{name}_{k.removeprefix('eval_')}": v for name, one in found.items() for k, v in one.items()}


def compared(
    before: Mapping[str, float], after: Mapping[str, float], teacher: Mapping[str, float], rows: Any
) -> list[tuple[str, float | None, float, float | None]]:
    """Rows of a table of the main metrics on `rows` (as `over_sets` takes them): name, before, after, teacher."""
    sets = [f"eval_{name}_" for name in rows] if isinstance(rows, Mapping) else ["eval_"]
    names = [s + n for s in sets for n in _SHOWN if s + n in after]
    return [(n[5:].replace("_", " "), before.get(n), after[n], teacher.get(n)) for n in names]


class Measured(NamedTuple):
    """The value of a metric after an update."""

    metric: float
    step: int


class BestModel:
    """The best evaluation by one metric, and the best one with a checkpoint; `metric` None: none is."""

    def __init__(self, metric: str | None, greater_is_better: bool | None):
        self._wanted, self._greater_is_better = metric, greater_is_better
        self.newest: Measured | None = None
        self.best: Measured | None = None
        self.saved: Measured | None = None  # the best one whose update has a checkpoint
        self.checkpoint: str | None = None  # that of `saved`

    def take(self, metrics: Mapping[str, float], step: int) -> None:
        """Records the evaluation after an update; ValueError if it lacks the metric."""
        if self._wanted is None:
            return
        name = f"eval_{self._wanted.removeprefix('eval_')}"
        if name not in metrics:
            which = "which no evaluation measures; there are"
            raise ValueError(f"--metric_for_best_model is {self._wanted!r}, {which} {', '.join(metrics)}")
        self.newest = Measured(float(metrics[name]), step)
        if self._is_better(self.newest, self.best):
            self.best = self.newest

    def take_saved(self, step: int, checkpoint: str) -> bool:
        """Records that an update has a checkpoint; returns whether that is the best one."""
        if self.newest is None or self.newest.step != step or not self._is_better(self.newest, self.saved):
            return False
        self.saved, self.checkpoint = self.newest, checkpoint
        return True

    def saved_is_better(self, step: int) -> bool:
        """Whether the best checkpoint is of another update than `step`, and better than the newest evaluation."""
        saved, newest = self.saved, self.newest
        return saved is not None and newest is not None and saved.step != step and self._is_better(saved, newest)

    def _is_better(self, new: Measured, old: Measured | None) -> bool:
        if old is None or not (math.isfinite(new.metric) and math.isfinite(old.metric)):
            return math.isfinite(new.metric)
        return new.metric > old.metric if self._greater_is_better else new.metric < old.metric

    def state(self) -> dict[str, Any] | None:
        """What checkpoints store, as JSON; None: nothing."""
        return None if self.saved is None else {**self.best._asdict(), "saved": self.saved._asdict()}

    def restore(self, state: Mapping[str, Any], folder: Any) -> None:
        """Restores what `state` returned for a checkpoint in this folder."""
        self.best = Measured(state["metric"], state["step"])
        self.saved = Measured(**state.get("saved", self.best._asdict()))
        self.checkpoint = str(folder / f"checkpoint-{self.saved.step}")
