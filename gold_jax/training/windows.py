"""What each update learns from: rows in a fixed random order, and batches made from them.

A window is the rows of one update, split into micro-batches. Which rows it holds, which micro-batches the student
writes itself, and the sampling keys are pure functions of the seed and the step.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from gold_jax.loss_spec import LossSpec
from gold_jax.rollout.engine import Engine
from gold_jax.text.batch import Row, build_batches, build_rows, build_token_batches, counted_groups
from gold_jax.text.chat import Codec
from gold_jax.text.data import Example
from gold_jax.text.drawn import Drawn
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
    """Windows of on-policy distillation: a share λ of the micro-batches is written by the student.

    The others come from the data set or, where `teacher_model` (graph and parameters) is given, are written by the
    teacher. An update's completions are sampled together, `generation_batch_size` rows at a time, however it is split
    into micro-batches. `teacher_context` is a text that the teacher alone reads, before what a row may have of its own.
    `engine` writes for the student in place of the built-in sampler, after `sync` has been given the student (graph and
    parameters) and the number of updates that it has seen.
    """

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
    generation_batch_size: int = 32
    teacher_model: Any = None
    teacher_context: str | None = None
    engine: Engine | None = None
    sync: Callable[[tuple, int], Any] | None = None

    def train(self, step: int, examples: Sequence[Example], params: Any) -> Window:
        """See `Windows.train`."""
        examples = [e for e in examples for _ in range(self.num_generations)]
        chosen = np.random.default_rng((self.seed, step, 1)).random(self.micro_batches) < self.lmbda
        on_policy = np.repeat(chosen, self.batch_size)[: len(examples)]
        written = [e for e, on in zip(examples, on_policy) if on]
        others = [e for e, on in zip(examples, on_policy) if not on]
        key = jax.random.fold_in(jax.random.key(self.seed), step)
        model = (self.student_graph, params)
        if written and self.sync is not None:
            self.sync(model, step)
        drawn = self._sample(model, self.student, [e.prompt for e in written], key, self.engine) if written else []
        given = [e.completion for e in others]
        if others and self.teacher_model is not None:
            given = self._by_teacher(others, jax.random.fold_in(key, 1))
        source, rest = iter(drawn), iter(given)
        completions = [next(source if on else rest) for on in on_policy]
        rows = self._rows(examples, completions)
        stats = self._describe(rows)
        if drawn:
            stats["completion_tokens"] = float(np.mean([len(d.ids) + d.stopped for d in drawn]))
            stats["stopped"] = float(np.mean([d.stopped for d in drawn]))
            stats["damaged"] = float(np.mean([d.damaged for d in drawn]))
        stats["on_policy"] = float(on_policy.mean())
        samples = [(self.student.render(e.prompt), d.text) for e, d in zip(written, drawn)]
        return Window(self._batches(rows, self.batch_size), stats, samples)

    def _sample(self, model, codec: Codec, prompts: list, key, engine: Engine | None = None) -> list[Drawn]:
        return sample_completions(
            model,
            codec,
            prompts,
            max_new_tokens=self.max_new_tokens,
            key=key,
            batch_size=sampling_rows(len(prompts), self.batch_size, self.generation_batch_size),
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            engine=engine,
        )

    def _by_teacher(self, examples: list[Example], key) -> list[Drawn]:
        """What the teacher writes, as the student reads it."""
        drawn = self._sample(self.teacher_model, self.teacher, self._told(examples), key)
        read = self.student.encode_completions([d.text for d in drawn], after=[e.prompt for e in examples])
        return [Drawn(e.ids, e.spans, d.text, d.stopped, d.damaged) for e, d in zip(read, drawn)]

    def _told(self, examples: Sequence[Example]) -> list:
        """The prompts as the teacher is told them."""
        contexts = [[c for c in (self.teacher_context, e.teacher_context) if c] for e in examples]
        return [
            self.teacher.with_context(e.prompt, "\n\n".join(context)) if context else e.prompt
            for e, context in zip(examples, contexts)
        ]

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
            teacher_prompts=self._told(examples),
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
        found = {"groups": groups, "one_to_one": plain / max(1, groups), "tokens": tokens}
        unknown = sum(len(np.unique(r.unknown)) for r in rows)
        return found | {"unknown": unknown / max(1, groups)} if unknown else found


def sampling_rows(prompts: int, batch_size: int, limit: int) -> int:
    """Rows to sample at once: a batch doubled until all prompts fit in, so that shapes stay few, but not beyond a limit."""
    rows = batch_size
    while rows < prompts and 2 * rows <= limit:
        rows *= 2
    return min(rows, limit)


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
    learns_calls: bool = False,
) -> tuple[list[int], list[str]]:
    """Which rows can be learned from, and notices about those that cannot.

    Args:
      examples: all rows.
      codec: the student's codec.
      budget: most tokens of a prompt; rows with longer ones are left out. None: any.
      need_completion: why every row must have a completion, for the error; None if it need not.
      teacher: a teacher's codec, whose template must take every row as well.
      learns_calls: whether an answer that calls tools can be learned, as whole conversations can. A completion cannot
        hold it, because every template writes calls in its own way; such rows are left out where one is needed.

    Raises:
      ValueError: a row lacks its completion, a chat template refuses one, or no row is left.
    """
    kept, long, calls, markup = [], 0, 0, []
    for i, e in enumerate(examples):
        if need_completion and e.completion is None:
            raise ValueError(f"row {i} of the data set has a prompt but no completion; {need_completion}")
        if need_completion and e.calls_tools and not learns_calls:
            calls += 1
            continue
        text, *_ = _renderings(e, f"row {i} of the data set", codec, teacher)
        if isinstance(e.prompt, str) and not codec.special_tokens_in_prompts and codec.special_strings_in(e.prompt):
            markup.append(i)
        if budget is not None:
            # A token spells at least a byte, but for special ones: only long texts have to be encoded to know.
            if len(text.encode()) + 2 > budget and len(codec.encode_prompt(e.prompt)) > budget:
                long += 1
                continue
        kept.append(i)
    if not kept:
        raise ValueError(
            f"none of the {len(examples)} rows has a prompt of at most {budget} tokens"
            + (f" ({calls} have an answer that calls tools, which only --assistant_only_loss learns)" if calls else "")
            + "; raise --max_prompt_length or --max_length, or lower --max_completion_length"
        )
    notices = []
    if long:
        notices.append(f"left out {long} of {len(examples)} rows whose prompt is longer than {budget} tokens")
    if calls:
        notices.append(f"left out {calls} of {len(examples)} rows whose last answer calls tools, which is no text")
    if markup:
        first = codec.special_strings_in(examples[markup[0]].prompt)[0]
        notices.append(
            f"{len(markup)} prompts, that of row {markup[0]} first, hold the string of a special token such as {first}, read "
            "as plain text; --special_tokens_in_prompts reads it as the token"
        )
    return kept, notices


def measurable(examples: Sequence[Example]) -> list[Example]:
    """The rows that have a completion in text."""
    return [e for e in examples if e.completion is not None and not e.calls_tools]


def check_evaluation(examples: Sequence[Example], *codecs: Codec | None) -> None:
    """Makes sure, before the first update, that there is something to evaluate on and that every template takes it.

    Raises:
      ValueError: no row has a completion, or a chat template refuses one.
    """
    measured = 0
    for i, e in enumerate(examples):
        if measurable([e]):
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
