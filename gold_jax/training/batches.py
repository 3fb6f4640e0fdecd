"""What each update learns from: rows in a fixed random order, and batches made from them.

An update batch is the rows of one update, split into micro-batches. Which rows it holds, which micro-batches the
student writes itself, and the sampling keys are pure functions of the seed and the step.
"""

import dataclasses
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
