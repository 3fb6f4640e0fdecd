"""What each update learns from: rows in a fixed random order, and batches made from them.

An update batch is the rows of one update, split into micro-batches. Which rows it holds, which micro-batches the
student writes itself, and the sampling keys are pure functions of the seed and the step.
"""

import collections
import dataclasses
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from gold_jax.loss_spec import LossSpec
from gold_jax.rollout.engine import Engine
from gold_jax.rollout.sampler import SamplingEngine
from gold_jax.text.batch import (
    SINGLE_PROCESS,
    Row,
    align_rows,
    build_batches,
    build_token_batches,
    counted_groups,
    encode_rows,
)
from gold_jax.text.chat import ChatTokenizer
from gold_jax.text.data import Example
from gold_jax.text.detokenize import SampledCompletion, completion_from_ids
from gold_jax.text.process_shard import ProcessShard
from gold_jax.training.annotations import ALIGNMENT, BATCHES, ENCODING, SAMPLER, annotate


@dataclasses.dataclass(frozen=True)
class RowOrder:
    """The order in which rows are learned from: reshuffled in every epoch, the last update of an epoch may be short."""

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
class UpdateBatch:
    """The micro-batches of one update, what they hold, and prompts with what the student wrote for them."""

    batches: list
    stats: dict[str, float]
    samples: list[tuple[str | list[dict], str]] = dataclasses.field(default_factory=list)


class BatchBuilder(Protocol):
    """Makes update batches and evaluation batches."""

    def build(self, step: int, examples: Sequence[Example], params: Any) -> UpdateBatch:
        """The batch of an update, given its rows and the student's current parameters."""

    def build_evaluation(self, examples: Sequence[Example]) -> list:
        """All batches of an evaluation, normalised over all rows together."""


@dataclasses.dataclass
class DistillationBatchBuilder:
    """Batches of on-policy distillation: a share λ of the micro-batches is written by the student.

    The others come from the data set or, where `teacher_model` (graph and parameters) is given, are written by the
    teacher. An update's completions are sampled together, `generation_batch_size` rows at a time, however it is split
    into micro-batches. `teacher_context` is a text that the teacher alone reads, before what a row may have of its own.
    `engine` writes for the student in place of the built-in sampler, after `sync` has been given the student (graph and
    parameters) and the number of updates that it has seen.

    `batch_size` and `eval_batch_size` count the rows of all devices, and `process_shard` says which of them this
    process makes. All processes sample together, including rows of other processes.
    """

    student: ChatTokenizer
    teacher: ChatTokenizer
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
    process_shard: ProcessShard = SINGLE_PROCESS

    @annotate(BATCHES)
    def build(self, step: int, examples: Sequence[Example], params: Any) -> UpdateBatch:
        """See `BatchBuilder.build`."""
        examples = [e for e in examples for _ in range(self.num_generations)]
        chosen = np.random.default_rng((self.seed, step, 1)).random(self.micro_batches) < self.lmbda
        on_policy = np.repeat(chosen, self.batch_size)[: len(examples)]
        local_rows = self.process_shard.local_rows(len(examples), self.batch_size)
        key = jax.random.fold_in(jax.random.key(self.seed), step)
        model = (self.student_graph, params)
        student_rows = np.flatnonzero(on_policy).tolist()
        if student_rows and self.sync is not None:
            with annotate(SAMPLER):
                self.sync(model, step)
        with annotate(ENCODING):  # a prompt that is answered several times is encoded once
            distinct = {id(examples[i]): examples[i].prompt for i in local_rows}
            encoded = {number: self.student.encode_prompt(prompt) for number, prompt in distinct.items()}
        prompt_ids = {i: encoded[id(examples[i])] for i in local_rows}
        completions: dict[int, str | SampledCompletion] = {i: examples[i].completion for i in local_rows}
        sampled = {}
        if student_rows:
            prompts = {i: examples[i].prompt for i in local_rows if on_policy[i]}
            ids = {i: prompt_ids[i] for i in prompts}
            sampled = self._sample(model, self.student, prompts, ids, student_rows, key, self.engine)
        teacher_rows = np.flatnonzero(~on_policy).tolist()
        if teacher_rows and self.teacher_model is not None:
            remaining = {i: examples[i] for i in local_rows if not on_policy[i]}
            completions |= self._by_teacher(remaining, teacher_rows, jax.random.fold_in(key, 1))
        completions |= sampled
        made = self._rows(
            [examples[i] for i in local_rows],
            [completions[i] for i in local_rows],
            [prompt_ids[i] for i in local_rows],
        )
        rows = dict(zip(local_rows, made))
        stats = self._describe(rows, sampled) | {"on_policy": float(on_policy.mean())}
        samples = [(examples[i].prompt, d.text) for i, d in sampled.items()]
        return UpdateBatch(self._batches(rows, len(examples), self.batch_size), stats, samples)

    @annotate(SAMPLER)
    def _sample(
        self,
        model,
        chat_tokenizer: ChatTokenizer,
        prompts: Mapping[int, Any],
        ids: Mapping[int, np.ndarray],
        wanted: Sequence[int],
        key,
        engine: Engine | None = None,
    ) -> dict[int, SampledCompletion]:
        """Completions of the rows `wanted`, of which this process has the prompts given and gets the completions of these."""
        rows = sampling_rows(len(wanted), self.batch_size, self.generation_batch_size)
        sampled = (engine or SamplingEngine(rows)).generate(
            model,
            self.process_shard.gather_token_ids(wanted, ids, self.batch_size),
            max_new_tokens=self.max_new_tokens,
            key=key,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            stop_ids=chat_tokenizer.stop_ids,
            pad_id=chat_tokenizer.pad_id,
        )
        return {
            i: completion_from_ids(chat_tokenizer, completion.ids, after=prompts[i])
            for i, completion in zip(wanted, sampled)
            if i in prompts
        }

    def _by_teacher(self, examples: Mapping[int, Example], wanted: Sequence[int], key) -> dict[int, SampledCompletion]:
        """What the teacher writes, as the student reads it."""
        prompts = dict(zip(examples, self._teacher_prompts(list(examples.values()))))
        with annotate(ENCODING):
            ids = {i: self.teacher.encode_prompt(prompt) for i, prompt in prompts.items()}
        sampled = self._sample(self.teacher_model, self.teacher, prompts, ids, wanted, key)
        with annotate(ENCODING):
            read = self.student.encode_completions(
                [sampled[i].text for i in examples], after=[e.prompt for e in examples.values()]
            )
        return {
            i: SampledCompletion.from_text(
                sampled[i].text, e, stopped=sampled[i].stopped, invalid_utf8=sampled[i].invalid_utf8
            )
            for i, e in zip(examples, read)
        }

    @annotate(ENCODING)
    def _teacher_prompts(self, examples: Sequence[Example]) -> list:
        """The prompts as the teacher reads them, with its contexts."""
        contexts = [[c for c in (self.teacher_context, e.teacher_context) if c] for e in examples]
        return [
            self.teacher.with_context(e.prompt, "\n\n".join(context)) if context else e.prompt
            for e, context in zip(examples, contexts)
        ]

    def build_evaluation(self, examples: Sequence[Example]) -> list:
        """See `BatchBuilder.build_evaluation`; always on the data set's completions."""
        local_rows = self.process_shard.local_rows(len(examples), self.eval_batch_size)
        local_examples = [examples[i] for i in local_rows]
        rows = dict(zip(local_rows, self._rows(local_examples, [e.completion for e in local_examples])))
        return self._batches(rows, len(examples), self.eval_batch_size)

    def _rows(self, examples, completions, prompt_ids=None) -> list[Row]:
        teacher_prompts = self._teacher_prompts(examples)
        with annotate(ENCODING):
            encoded = encode_rows(
                self.student,
                self.teacher,
                [e.prompt for e in examples],
                completions,
                one_vocabulary=self.one_vocabulary,
                teacher_prompts=teacher_prompts,
                student_prompt_ids=prompt_ids,
            )
        with annotate(ALIGNMENT):
            return align_rows(
                encoded,
                (self.student.stop_id, self.teacher.stop_id),
                max_length=self.max_length,
                positional=self.spec.groups == "positional",
                one_vocabulary=self.one_vocabulary,
                skip_student_stop=self.spec.skip_student_stop,
                skip_teacher_stop=self.spec.skip_teacher_stop,
            )

    def _batches(self, rows: Mapping[int, Row], count: int, batch_size: int) -> list:
        return build_batches(
            [rows.get(i) for i in range(count)],
            batch_size,
            merge=self.spec.merge,
            groups="all" if self.spec.groups == "positional" else self.spec.groups,
            text=self.spec.of_text,
            normalization=self.spec.normalization,
            student_pad=self.student.pad_id,
            teacher_pad=self.teacher.pad_id,
            process_shard=self.process_shard,
        )

    def _describe(self, rows: Mapping[int, Row], sampled: Mapping[int, SampledCompletion]) -> dict[str, float]:
        """What the rows of all processes hold."""

        def counted(found: Mapping[int, Any]) -> list:
            return [x for i, x in found.items() if self.process_shard.is_owner(i, self.batch_size)]

        rows, sampled = counted(rows), counted(sampled)
        groups, plain, unknown, tokens, written, length, stopped, invalid_utf8 = self.process_shard.all_reduce_sum(
            np.array(
                [
                    sum(r.groups for r in rows),
                    sum(int(counted_groups(r, "boundary", "one_to_one").sum()) for r in rows),
                    sum(len(np.unique(r.unknown)) for r in rows),
                    sum(len(r.student.prompt) + len(r.student.completion) for r in rows),
                    len(sampled),
                    sum(len(d.ids) + d.stopped for d in sampled),
                    sum(d.stopped for d in sampled),
                    sum(d.invalid_utf8 for d in sampled),
                ]
            )
        ).tolist()
        found = {"groups": groups, "one_to_one": plain / max(1, groups), "tokens": tokens}
        if unknown:
            found["unknown"] = unknown / max(1, groups)
        if written:
            sums = {"completion_tokens": length, "stopped": stopped, "damaged": invalid_utf8}
            found |= {name: value / written for name, value in sums.items()}
        return found


def sampling_rows(prompts: int, batch_size: int, limit: int) -> int:
    """Rows to sample at once: a batch doubled until all prompts fit in, so that shapes stay few, but not beyond a limit."""
    rows = batch_size
    while rows < prompts and 2 * rows <= limit:
        rows *= 2
    return min(rows, limit)


@dataclasses.dataclass
class TokenBatchBuilder:
    """Batches of supervised fine-tuning."""

    chat_tokenizer: ChatTokenizer
    batch_size: int
    eval_batch_size: int
    max_length: int | None
    counted: str  # "completion", "assistant" (every turn of the assistant's) or "all"
    process_shard: ProcessShard = SINGLE_PROCESS

    @annotate(BATCHES)
    def build(self, step: int, examples: Sequence[Example], params: Any) -> UpdateBatch:
        """See `BatchBuilder.build`."""
        rows = self._rows(examples, self.batch_size)
        counted = [
            row for i, row in enumerate(rows) if row is not None and self.process_shard.is_owner(i, self.batch_size)
        ]
        sums = [sum(len(ids) for ids, _ in counted), sum(int(c[1:].sum()) for _, c in counted)]
        tokens, targets = self.process_shard.all_reduce_sum(np.array(sums)).tolist()
        batches = build_token_batches(
            rows, self.batch_size, pad=self.chat_tokenizer.pad_id, process_shard=self.process_shard
        )
        return UpdateBatch(batches, {"tokens": tokens, "targets": targets})

    def build_evaluation(self, examples: Sequence[Example]) -> list:
        """See `BatchBuilder.build_evaluation`."""
        rows = self._rows(examples, self.eval_batch_size)
        return build_token_batches(
            rows, self.eval_batch_size, pad=self.chat_tokenizer.pad_id, process_shard=self.process_shard
        )

    @annotate(ENCODING)
    def _rows(self, examples: Sequence[Example], batch_size: int) -> list:
        """The rows that are made here, None for the others."""
        local_rows = set(self.process_shard.local_rows(len(examples), batch_size))
        rows = [self._row(e) if i in local_rows else None for i, e in enumerate(examples)]
        return [row and (row[0][: self.max_length], row[1][: self.max_length]) for row in rows]

    def _row(self, example: Example):
        if self.counted != "completion" and example.messages:
            ids, counted = self.chat_tokenizer.encode_turns(example.messages)
        else:
            prompt = self.chat_tokenizer.encode_prompt(example.prompt)
            answer = self.chat_tokenizer.encode_completion(example.completion, after=example.prompt).ids
            ids = np.concatenate([prompt, answer, [self.chat_tokenizer.stop_id]]).astype(np.int32)
            counted = np.arange(len(ids)) >= len(prompt)
        return ids, np.ones_like(counted) if self.counted == "all" else counted


@dataclasses.dataclass(frozen=True)
class CheckedRows:
    """What is known of a data set once all its rows were looked at.

    Attributes:
        kept: numbers of the rows that can be learned from.
        notices: lines about the others, and about columns that are not read.
        digest: of all that is learned from the rows that are kept, in hexadecimal.
    """

    kept: list[int]
    notices: list[str]
    digest: str


def check_examples(
    examples: Sequence[Example],
    chat_tokenizer: ChatTokenizer,
    *,
    budget: int | None,
    need_completion: str | None,
    teacher: ChatTokenizer | None = None,
    learns_calls: bool = False,
    student_writes: bool = False,
    teacher_writes: bool = False,
    teacher_context: str | None = None,
) -> CheckedRows:
    """Which rows can be learned from, and notices about those that cannot.

    Args:
        examples: all rows.
        chat_tokenizer: the student's.
        budget: most tokens of a prompt; rows with longer ones are left out. None: any.
        need_completion: why every row must have a completion, for the error; None if it need not.
        teacher: a teacher's chat tokenizer, whose template must take every row as well.
        learns_calls: whether an answer that calls tools can be learned, as whole conversations can. A completion cannot
            hold it, because every template writes calls in its own way; such rows are left out where one is needed.
        student_writes, teacher_writes: whether completions are drawn from either model, for which a prompt needs a
            token.
        teacher_context: text before every prompt of the teacher.

    Raises:
        ValueError: a row lacks its completion, a chat template refuses one, or no row is left.
    """
    digest, unread = hashlib.sha256(), collections.Counter()
    kept, long, calls, empty, markup = [], 0, 0, collections.Counter(), []
    # Nothing can be drawn after no token at all. Where a tokenizer puts one before any text, no prompt is without.
    writers = {"student": chat_tokenizer if student_writes else None, "teacher": teacher if teacher_writes else None}
    writers = {who: writer for who, writer in writers.items() if writer and not len(writer.encode_prompt(""))}

    def cannot_write(e: Example) -> str | None:
        """Who would have to write after no token."""
        for who, writer in writers.items():
            context = who == "teacher" and (teacher_context or e.teacher_context)
            if (
                isinstance(e.prompt, str)
                and not e.prompt.strip()
                and not context
                and not len(writer.encode_prompt(e.prompt))
            ):
                return who
        return None

    for i, e in enumerate(examples):
        unread.update(e.unread)
        if need_completion and e.completion is None:
            raise ValueError(f"row {i} of the data set has a prompt but no completion; {need_completion}")
        if need_completion and e.calls_tools and not learns_calls:
            calls += 1
            continue
        if unable := cannot_write(e):
            empty[unable] += 1
            continue
        text, *_ = _render_all(e, f"row {i} of the data set", chat_tokenizer, teacher)
        if (
            isinstance(e.prompt, str)
            and not chat_tokenizer.special_tokens_in_prompts
            and chat_tokenizer.special_strings_in(e.prompt)
        ):
            markup.append(i)
        if budget is not None:
            # A token spells at least a byte, but for special ones: only long texts have to be encoded to know.
            if len(text.encode()) + 2 > budget and len(chat_tokenizer.encode_prompt(e.prompt)) > budget:
                long += 1
                continue
        kept.append(i)
        digest.update(b"%d\0%b\0" % (i, e.fingerprint))
    left_out = [
        (
            long,
            f"whose prompt is longer than {budget} tokens",
            "raise --max_prompt_length or --max_length, or lower --max_completion_length",
        ),
        (calls, "whose last answer calls tools, which is no text", "gold_jax.sft --assistant_only_loss learns it"),
        *(
            (
                count,
                f"without a prompt, before which the {who}'s tokenizer puts no token, so that nothing can be drawn",
                "--lmbda 0 without --seq_kd learns them",
            )
            for who, count in empty.items()
        ),
    ]
    left_out = [found for found in left_out if found[0]]
    if not kept:
        why = "; ".join(f"{count} {words} ({remedy})" for count, words, remedy in left_out)
        raise ValueError(f"none of the {len(examples)} rows can be learned from: {why}")
    notices = [f"left out {count} of {len(examples)} rows {words}" for count, words, _ in left_out]
    if markup:
        first = chat_tokenizer.special_strings_in(examples[markup[0]].prompt)[0]
        notices.append(
            f"{len(markup)} prompts, that of row {markup[0]} first, hold the string of a special token such as {first}, read "
            "as plain text; --special_tokens_in_prompts reads it as the token"
        )
    if unread:
        shown = ", ".join(f"{name!r} (rows: {count:,})" for name, count in unread.most_common(8))
        more = f" and {len(unread) - 8} more" if len(unread) > 8 else ""
        notices.append(f"columns of the data that nothing reads: {shown}{more}")
    return CheckedRows(kept, notices, digest.hexdigest())


def with_text_completion(examples: Sequence[Example]) -> list[Example]:
    """The rows that have a completion in text."""
    return [e for e in examples if e.completion is not None and not e.calls_tools]


def check_evaluation(examples: Sequence[Example], *chat_tokenizers: ChatTokenizer | None) -> list[str]:
    """Makes sure, before the first update, that there is something to evaluate on and that every template takes it.

    Returns:
        A notice about rows that cannot be measured.

    Raises:
        ValueError: no row has a completion, or a chat template refuses one.
    """
    measured = 0
    for i, e in enumerate(examples):
        if with_text_completion([e]):
            _render_all(e, f"row {i} of the evaluation data", *chat_tokenizers)
            measured += 1
    if not measured:
        raise ValueError("no row of the evaluation data has a completion, so nothing can be measured on it")
    missing = len(examples) - measured
    if not missing:
        return []
    return [f"{missing} of {len(examples)} rows of the evaluation data have no completion in text and are not measured"]


def _render_all(example: Example, error_prefix: str, *chat_tokenizers: ChatTokenizer | None) -> list[str]:
    """The prompt as each template writes it; an error says which row it is."""
    try:
        return [
            chat_tokenizer.render(example.prompt) for chat_tokenizer in chat_tokenizers if chat_tokenizer is not None
        ]
    except ValueError as error:
        raise ValueError(f"{error_prefix}: {error}") from error
