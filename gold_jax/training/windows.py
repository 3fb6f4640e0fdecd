"""What each update learns from: rows in a fixed random order, and batches made from them.

A window is the rows of one update, split into micro-batches. Which rows it holds, which micro-batches the student
writes itself, and the sampling keys are pure functions of the seed and the step.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Protocol

import jax
import numpy as np

from gold_jax.loss_spec import LossSpec
from gold_jax.text.batch import Row, build_batches, build_rows, build_token_batches, counted_groups
from gold_jax.text.chat import Codec
from gold_jax.text.data import Example
from gold_jax.training.evaluation import sample_completions


@dataclasses.dataclass(frozen=True)
class Order:
    """The order in which rows are learned from: shuffled anew in every epoch, the last window of an epoch may be short."""

    rows: int
    per_step: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        """Updates that go through all rows once."""
        return math.ceil(self.rows / self.per_step)

    def __call__(self, step: int) -> list[int]:
        """Row numbers of an update."""
        epoch, k = divmod(step, self.steps_per_epoch)
        order = np.random.default_rng((self.seed, epoch)).permutation(self.rows)
        return order[k * self.per_step : (k + 1) * self.per_step].tolist()


@dataclasses.dataclass
class Window:
    """The micro-batches of one update, what they hold, and samples to look at."""

    batches: list
    stats: dict[str, float]
    samples: list[tuple[str, str]] = dataclasses.field(default_factory=list)


class Windows(Protocol):
    """Makes windows and evaluation batches."""

    def train(self, step: int, examples: Sequence[Example], params: Any) -> Window:
        """The window of an update, given its rows and the student's current parameters."""

    def evaluate(self, examples: Sequence[Example]) -> list:
        """All batches of an evaluation, normalised over all rows together."""


@dataclasses.dataclass
class DistillationWindows:
    """Windows of on-policy distillation: a share λ of the micro-batches is written by the student."""

    student: Codec
    teacher: Codec
    student_graph: Any
    spec: LossSpec
    one_vocabulary: bool
    batch_size: int
    eval_batch_size: int
    micro_batches: int
    lmbda: float
    num_generations: int
    max_length: int
    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    seed: int

    def train(self, step: int, examples: Sequence[Example], params: Any) -> Window:
        """See `Windows.train`."""
        examples = [e for e in examples for _ in range(self.num_generations)]
        chosen = np.random.default_rng((self.seed, step, 1)).random(self.micro_batches) < self.lmbda
        on_policy = np.repeat(chosen, self.batch_size)[: len(examples)]
        written = [e for e, on in zip(examples, on_policy) if on]
        drawn = []
        if written:
            drawn = sample_completions(
                (self.student_graph, params),
                self.student,
                [e.prompt for e in written],
                max_new_tokens=self.max_new_tokens,
                key=jax.random.fold_in(jax.random.key(self.seed), step),
                batch_size=self.batch_size,
                temperature=self.temperature,
                top_k=self.top_k,
                top_p=self.top_p,
            )
        source = iter(drawn)
        completions = [next(source) if on else e.completion for e, on in zip(examples, on_policy)]
        rows = self._rows(examples, completions)
        stats = self._describe(rows)
        if drawn:
            stats["completion_tokens"] = float(np.mean([len(d.ids) + d.stopped for d in drawn]))
            stats["stopped"] = float(np.mean([d.stopped for d in drawn]))
            stats["damaged"] = float(np.mean([d.damaged for d in drawn]))
        stats["on_policy"] = float(on_policy.mean())
        samples = [(self.student.render(e.prompt), d.text) for e, d in zip(written, drawn)]
        return Window(self._batches(rows, self.batch_size), stats, samples)

    def evaluate(self, examples: Sequence[Example]) -> list:
        """See `Windows.evaluate`; always on the data set's completions."""
        return self._batches(self._rows(examples, [e.completion for e in examples]), self.eval_batch_size)

    def _rows(self, examples, completions) -> list[Row]:
        return build_rows(
            self.student,
            self.teacher,
            [e.prompt for e in examples],
            completions,
            max_length=self.max_length,
            positional=self.spec.groups == "positional",
            one_vocabulary=self.one_vocabulary,
            skip_student_stop=self.spec.skip_student_stop,
            skip_teacher_stop=self.spec.skip_teacher_stop,
        )

    def _batches(self, rows: list[Row], batch_size: int) -> list:
        return build_batches(
            rows,
            batch_size,
            merge=self.spec.merge,
            groups="all" if self.spec.groups == "positional" else self.spec.groups,
            text=self.spec.of_text,
            normalization=self.spec.normalization,
            student_pad=self.student.pad_id,
            teacher_pad=self.teacher.pad_id,
        )

    def _describe(self, rows: list[Row]) -> dict[str, float]:
        groups = sum(r.groups for r in rows)
        plain = sum(int(counted_groups(r, "boundary", "one_to_one").sum()) for r in rows)
        tokens = sum(len(r.student.prompt) + len(r.student.completion) for r in rows)
        return {"groups": groups, "one_to_one": plain / max(1, groups), "tokens": tokens}


@dataclasses.dataclass
class TokenWindows:
    """Windows of supervised fine-tuning."""

    codec: Codec
    batch_size: int
    eval_batch_size: int
    max_length: int | None
    counted: str  # "completion", "assistant" (every turn of the assistant's) or "all"

    def train(self, step: int, examples: Sequence[Example], params: Any) -> Window:
        """See `Windows.train`."""
        rows = self._rows(examples)
        stats = {"tokens": sum(len(ids) for ids, _ in rows), "targets": sum(int(c[1:].sum()) for _, c in rows)}
        return Window(build_token_batches(rows, self.batch_size, pad=self.codec.pad_id), stats)

    def evaluate(self, examples: Sequence[Example]) -> list:
        """See `Windows.evaluate`."""
        return build_token_batches(self._rows(examples), self.eval_batch_size, pad=self.codec.pad_id)

    def _rows(self, examples):
        rows = [self._row(e) for e in examples]
        return [(ids[: self.max_length], counted[: self.max_length]) for ids, counted in rows]

    def _row(self, example: Example):
        if self.counted != "completion" and example.messages:
            ids, counted = self.codec.encode_turns(example.messages)
        else:
            prompt = self.codec.encode_prompt(example.prompt)
            answer = self.codec.encode_completion(example.completion, after=example.prompt).ids
            ids = np.concatenate([prompt, answer, [self.codec.stop_id]]).astype(np.int32)
            counted = np.arange(len(ids)) >= len(prompt)
        return ids, np.ones_like(counted) if self.counted == "all" else counted


def check_examples(
    examples: Sequence[Example],
    codec: Codec,
    *,
    budget: int | None,
    need_completion: str | None,
    teacher: Codec | None = None,
) -> tuple[list[int], list[str]]:
    """Which rows can be learned from, and notices about those that cannot.

    Args:
      examples: all rows.
      codec: the student's codec.
      budget: most tokens of a prompt; rows with longer ones are left out. None: any.
      need_completion: why every row must have a completion, for the error; None if it need not.
      teacher: a teacher's codec, whose template must take every row as well.

    Raises:
      ValueError: a row lacks its completion, a chat template refuses one, or no row is left.
    """
    kept, long = [], 0
    for i, e in enumerate(examples):
        if need_completion and e.completion is None:
            raise ValueError(f"row {i} of the data set has a prompt but no completion; {need_completion}")
        text, *_ = _renderings(e, f"row {i} of the data set", codec, teacher)
        if budget is not None:
            # A token spells at least a byte, but for special ones: only long texts have to be encoded to know.
            if len(text.encode()) + 2 > budget and len(codec.encode_prompt(e.prompt)) > budget:
                long += 1
                continue
        kept.append(i)
    if not kept:
        raise ValueError(
            f"none of the {len(examples)} rows has a prompt of at most {budget} tokens; raise --max_prompt_length or "
            "--max_length, or lower --max_completion_length"
        )
    notice = f"left out {long} of {len(examples)} rows whose prompt is longer than {budget} tokens"
    return kept, [notice] if long else []


def check_evaluation(examples: Sequence[Example], *codecs: Codec | None) -> None:
    """Makes sure, before the first update, that there is something to evaluate on and that every template takes it.

    Raises:
      ValueError: no row has a completion, or a chat template refuses one.
    """
    measured = 0
    for i, e in enumerate(examples):
        if e.completion is not None:
            _renderings(e, f"row {i} of the evaluation data", *codecs)
            measured += 1
    if not measured:
        raise ValueError("no row of the evaluation data has a completion, so nothing can be measured on it")


def _renderings(example: Example, where: str, *codecs: Codec | None) -> list[str]:
    """The prompt as each template writes it; an error says which row it is."""
    try:
        return [codec.render(example.prompt) for codec in codecs if codec is not None]
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
