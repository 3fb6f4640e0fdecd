"""What each update learns from: rows in a random order, and batches made from them, pure functions of seed and step."""

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from gold_jax.bucketing import ShapeSet
from gold_jax.loss_spec import LossSpec
from gold_jax.rollout.agreement import logprob_difference
from gold_jax.rollout.client import ServerError
from gold_jax.rollout.engine import Engine, Sampled
from gold_jax.rollout.sampler import SamplingEngine
from gold_jax.rollout.server import ServerEngine
from gold_jax.text import batch as text_batch
from gold_jax.text.batch import SINGLE_PROCESS, Row, counted_groups
from gold_jax.text.chat import ChatTokenizer
from gold_jax.text.data import Example, as_teacher_reads
from gold_jax.text.detokenize import SampledCompletion, completion_from_ids
from gold_jax.text.process_shard import ProcessShard
from gold_jax.training.annotations import ALIGNMENT, BATCHES, ENCODING, SAMPLER, annotate
from gold_jax.training.rollout_buffer import Rollout, Rollouts
from gold_jax.wording import plural


@dataclasses.dataclass(frozen=True)
class RowOrder:
    """The order in which rows are learned from: reshuffled in every epoch, the last update of an epoch may be short."""

    rows: Sequence[int]  # their numbers
    per_step: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        """Updates that go through all rows once."""
        return math.ceil(len(self.rows) / self.per_step)

    def describe(self) -> str:
        """What updates learn from, in words."""
        return plural(len(self.rows), "row")

    def __call__(self, step: int) -> list[int]:
        """Row numbers of an update."""
        epoch, k = divmod(step, self.steps_per_epoch)
        order = _permutation(self.seed, epoch, len(self.rows))
        return [self.rows[i] for i in order[k * self.per_step : (k + 1) * self.per_step]]


@functools.lru_cache(2)
def _permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(count)


@dataclasses.dataclass
class UpdateBatch:
    """The micro-batches of one update, what they hold, and rows with what the student wrote for them."""

    batches: list
    stats: dict[str, float]
    samples: list[tuple[Example, str]] = dataclasses.field(default_factory=list)
    counted: int = 1  # groups or tokens that the loss has, of all processes; 0: there is nothing to learn
    shapes: Sequence[Sequence[int]] = ()  # that the run's batches are padded to, these ones' among them
    drawn: Rollouts = dataclasses.field(default_factory=dict)  # for later updates


class Evaluation(NamedTuple):
    """What is measured in one pass over rows with completions."""

    batches: list  # normalised over all rows together
    text: list[np.ndarray]  # of each, float32 [B, T]: 1 at the labels that `scoring.score_completions` counts
    bytes: int  # UTF-8 length of that text, in all processes
    rest: list[int]  # numbers of the rows whose text the batches do not hold whole, or hold in other tokens


def _text_labels(prompt: np.ndarray, completion: Any, max_length: int | None) -> tuple[int, int, int] | None:
    """First and end of a row's labels that are the completion's text, and its bytes; None where the row is cut."""
    length, spans = len(prompt) + len(completion.ids), completion.spans
    if max_length is not None and length >= max_length:  # with its stop token
        return None
    if len(spans) == 0:
        return 0, 0, 0
    first = 0 if len(prompt) else int(spans[0, 1])  # the very first token of all has nothing before it
    return max(0, len(prompt) - 1), length - 1, int(spans[-1, 1]) - first


def _evaluation(batches: list, labels: Mapping[int, Any], count: int, rows: int, shard: ProcessShard) -> Evaluation:
    """The evaluation of `count` examples, `rows` in a batch, from the `_text_labels` of those built here."""
    sums, text = np.zeros((2, count)), []
    for i, found in labels.items():
        if found is not None and shard.is_owner(i, rows):
            sums[:, i] = 1, found[2]
    for batch, part in zip(batches, shard.local_rows_per_batch(count, rows)):
        text.append(np.zeros(batch.labels.token.shape, np.float32))
        for marks, i in zip(text[-1], part):
            if labels[i] is not None:
                marks[slice(*labels[i][:2])] = 1
    whole, sizes = shard.all_reduce_sum(sums)
    return Evaluation(batches, text, int(sizes.sum()), np.flatnonzero(whole == 0).tolist())


class _UpdateRows(NamedTuple):
    """The rows of one update."""

    examples: list[Example]  # each as often as it is answered
    on_policy: np.ndarray  # bool, which of them the student answers
    local_rows: list[int]  # the numbers of those that this process makes
    prompt_ids: dict[int, np.ndarray]  # the student's prompts of these

    @property
    def of_student(self) -> list[int]:
        """The numbers of those that the student answers, in all processes."""
        return np.flatnonzero(self.on_policy).tolist()


@dataclasses.dataclass
class DistillationBatchBuilder:
    """Batches of on-policy distillation: a share λ of the micro-batches is written by the student.

    The others come from the data set or are written by the teacher. An update's completions are sampled together,
    however it is split into micro-batches, with `rollout_batches` those of several updates. All processes sample together,
    including rows of other processes.
    """

    student: ChatTokenizer
    teacher: ChatTokenizer
    student_graph: Any
    spec: LossSpec
    one_vocabulary: bool
    max_length: int
    batch_size: int = 1  # rows of all devices, as the next one
    eval_batch_size: int = 1
    micro_batches: int = 1
    lmbda: float = 0.0
    num_generations: int = 1
    sampling: dict[str, Any] = dataclasses.field(default_factory=dict)  # max_new_tokens, temperature, top_k, top_p
    seed: int = 0
    generation_batch_size: int = 32  # rows that are sampled at once
    rollout_quantization: str = "none"  # what the built-in sampler reads in 8 bits: `values.QUANTIZATIONS`
    rollout_batches: int = 1  # updates whose completions of the student's are drawn together
    importance_weights: bool = False  # whether batches tell what completions were drawn with
    teacher_model: Any = None  # its graph and parameters, where it writes
    teacher_context: str | None = None  # a text that the teacher alone reads, before what a row may have of its own
    engine: ServerEngine | None = None  # writes for the student in place of the built-in sampler
    length_buckets: int = 12  # shapes that batches are padded to
    process_shard: ProcessShard = SINGLE_PROCESS  # which rows this process makes
    short_lengths: tuple[int | None, int | None] = (None, None)  # `packing.pack`'s of student and teacher

    @annotate(BATCHES)
    def build(
        self,
        step: int,
        examples: Sequence[Example],
        params: Any,
        shapes: Iterable = (),
        drawn: Rollouts | None = None,
        later: Mapping[int, Sequence[Example]] | None = None,
    ) -> UpdateBatch:
        """The batch of an update, given its rows, the student's current parameters, and the shapes of the run so far.

        `drawn` are completions that earlier updates drew; where this one's are not among them they are drawn now, with
        those of the `later` updates whose rows are given.
        """
        rows, drawn, difference = self._rows(step, examples), dict(drawn or {}), None
        is_fresh = step not in drawn
        if is_fresh:
            updates = {step: rows} | {t: self._rows(t, more, True) for t, more in (later or {}).items()}
            found, difference = self._draw((self.student_graph, params), step, updates)
            drawn |= found
        examples, on_policy, local_rows, prompt_ids = rows
        others = {i: examples[i] for i in local_rows if not on_policy[i]}
        rollouts = dict(zip(rows.of_student, drawn.pop(step), strict=True))
        prompts = {i: examples[i].prompt for i in local_rows if on_policy[i]}
        with annotate(SAMPLER):
            sampled = {i: completion_from_ids(self.student, rollouts[i].ids, after=p) for i, p in prompts.items()}
        completions = sampled
        if self.teacher_model is None:
            with annotate(ENCODING):  # of a row that comes several times once
                distinct = {id(example): example for example in others.values()}
                given = {number: example.completion_for(self.student) for number, example in distinct.items()}
            completions = sampled | {i: given[id(example)] for i, example in others.items()}
        elif teacher_rows := np.flatnonzero(~on_policy).tolist():
            key = jax.random.fold_in(self._key(step), 1)
            completions = sampled | self._by_teacher(others, teacher_rows, key)
        shape_set, behavior = ShapeSet(self.length_buckets, shapes), None
        if self.importance_weights:  # what was drawn just now has the weights of now
            behavior = {} if is_fresh else {i: tuple(rollouts[i]) for i in sampled}
        _, aligned, batches = self._batches(examples, completions, self.batch_size, prompt_ids, shape_set, behavior)
        stats, counted = self._describe(aligned, sampled)
        stats["on_policy"] = float(on_policy.mean())
        if difference is not None:
            stats["sampling_logp_difference"] = difference
        samples = [(examples[i], d.text) for i, d in sampled.items()]
        return UpdateBatch(batches, stats, samples, counted, shape_set.shapes, drawn)

    def _key(self, step: int) -> jax.Array:
        """The key of all that an update draws."""
        return jax.random.fold_in(jax.random.key(self.seed), step)

    def _rows(self, step: int, examples: Sequence[Example], to_draw: bool = False) -> _UpdateRows:
        """The rows of an update; `to_draw`: prompts of those alone that the student answers."""
        examples = [e for e in examples for _ in range(self.num_generations)]
        chosen = np.random.default_rng((self.seed, step, 1)).random(self.micro_batches) < self.lmbda
        on_policy = np.repeat(chosen, self.batch_size)[: len(examples)]
        local_rows = self.process_shard.local_rows(len(examples), self.batch_size)
        with annotate(ENCODING):  # a prompt that is answered several times is encoded once
            wanted = [i for i in local_rows if on_policy[i] or not to_draw]
            distinct = {id(examples[i]): examples[i].prompt for i in wanted}
            encoded = dict(zip(distinct, self.student.encode_prompts([*distinct.values()])))
        return _UpdateRows(examples, on_policy, local_rows, {i: encoded[id(examples[i])] for i in wanted})

    def _draw(self, model, step: int, updates: Mapping[int, _UpdateRows]) -> tuple[Rollouts, float | None]:
        """What the student, as it stands at an update, writes for these updates.

        What a row draws is the same whichever updates are drawn together. Also how far the log-probabilities of what was
        drawn differ from the student's own, where other weights than its own wrote it.
        """
        wanted = {t: rows.of_student for t, rows in updates.items()}
        if not (count := sum(map(len, wanted.values()))):
            return {t: [] for t in updates}, None
        engine = self.engine
        if engine is not None:
            with annotate(SAMPLER):
                engine.sync(model, step)
        else:
            rows = sampling_rows(count, self.batch_size, self.generation_batch_size)
            engine = SamplingEngine(rows, self.rollout_quantization, self.importance_weights)
        key = self._key(step)
        if self.rollout_batches > 1:
            folded = jax.vmap(jax.random.fold_in, (None, 0))
            key = jax.numpy.concatenate([folded(self._key(t), np.arange(len(i))) for t, i in wanted.items()])
        ids = [(wanted[t], rows.prompt_ids) for t, rows in updates.items()]
        sampled, difference = self._sample(model, self.student, ids, key, engine)
        drawn = iter([Rollout(d.ids, self._logprobs(d)) for d in sampled])
        return {t: [next(drawn) for _ in numbers] for t, numbers in wanted.items()}, difference

    def _logprobs(self, drawn: Sampled) -> np.ndarray:
        """Log-probabilities at the sampling temperature, of a server's completions (temperature 1) as it tells them."""
        found = drawn.logprobs if drawn.sampling_logprobs is None else drawn.sampling_logprobs
        if self.importance_weights and np.isnan(found[:-1]).any():  # that of a stop token is not told by all
            without = "importance weights need; --rollout_importance_cap 0 goes without them"
            raise ServerError(f"{self.engine.client.base_url} does not tell the log-probabilities that {without}.")
        return found

    @annotate(SAMPLER)
    def _sample(
        self, model, tokenizer: ChatTokenizer, rows: Sequence[tuple[Sequence[int], Mapping]], key, engine: Engine
    ) -> tuple[list[Sampled], float | None]:
        """Completions of rows, for each update their numbers and the prompts of those that this process makes.

        Also, where other weights than the model's wrote them, how far the log-probabilities of what was drawn differ.
        """
        gathered = [self.process_shard.gather_token_ids(*one, self.batch_size) for one in rows]
        prompt_ids = [ids for one in gathered for ids in one]
        options = dict(self.sampling, stop_ids=tokenizer.stop_ids)
        drawn = engine.generate(model, prompt_ids, key=key, **options)
        if isinstance(engine, SamplingEngine):
            rounded = engine.quantization != "none"
            return drawn, logprob_difference(model, prompt_ids, drawn, self.max_length) if rounded else None
        return drawn, engine.difference

    def _by_teacher(self, examples: Mapping[int, Example], wanted: Sequence[int], key) -> dict[int, SampledCompletion]:
        """What the teacher writes, as the student reads it."""
        prompts = dict(zip(examples, self._teacher_prompts(list(examples.values()))))
        with annotate(ENCODING):
            ids = dict(zip(prompts, self.teacher.encode_prompts([*prompts.values()])))
        engine = SamplingEngine(sampling_rows(len(wanted), self.batch_size, self.generation_batch_size))
        drawn, _ = self._sample(self.teacher_model, self.teacher, [(wanted, ids)], key, engine)
        drawn = dict(zip(wanted, drawn))
        with annotate(SAMPLER):
            sampled = {i: completion_from_ids(self.teacher, drawn[i].ids, after=p) for i, p in prompts.items()}
        with annotate(ENCODING):
            texts, after = [sampled[i].text for i in examples], [e.prompt for e in examples.values()]
            read = dict(zip(examples, self.student.encode_completions(texts, after=after)))
        return {i: dataclasses.replace(d, **vars(read[i])) for i, d in sampled.items()}

    @annotate(ENCODING)
    def _teacher_prompts(self, examples: Sequence[Example]) -> list:
        """The prompts as the teacher reads them, with its contexts."""
        return [e.prompt for e in as_teacher_reads(examples, self.teacher, self.teacher_context)]

    def build_evaluation(self, examples: Sequence[Example]) -> Evaluation:
        """All batches of an evaluation, on the data set's completions."""
        rows = self.eval_batch_size
        numbers = self.process_shard.local_rows(len(examples), rows)
        completions = {i: examples[i].completion_for(self.student) for i in numbers}
        encoded, _, batches = self._batches(examples, completions, rows, shapes=ShapeSet(self.length_buckets))
        text = {i: _text_labels(row.student_prompt, row.student, self.max_length) for i, row in encoded.items()}
        return _evaluation(batches, text, len(examples), rows, self.process_shard)

    def one_batch(
        self, examples: Sequence[Example], completions: Sequence[str | SampledCompletion], shapes: ShapeSet
    ) -> tuple[text_batch.Batch, list[int], list[int]]:
        """All rows with these completions in one batch, padded to one of the `shapes`.

        Also the numbers of the rows that `max_length` cuts, and of those of which nothing counts in the loss.
        """
        given = dict(enumerate(completions))
        encoded, rows, (batch,) = self._batches(examples, given, len(examples), shapes=shapes)
        cut = [i for i, x in encoded.items() if self._is_cut(x)]
        return batch, cut, [i for i, row in rows.items() if not self._count(row)]

    def _is_cut(self, row: text_batch.EncodedRow) -> bool:
        """Whether `max_length` leaves no room for all tokens of the student's and its stop token."""
        return len(row.student_prompt) + len(row.student.ids) + row.student.stopped > self.max_length

    def _batches(
        self,
        examples: Sequence[Example],
        completions: Mapping,
        batch_size: int,
        prompt_ids=None,
        shapes=None,
        drawn=None,
    ):
        """The rows that are made here, encoded and aligned, and the micro-batches of all."""
        numbers, spec = self.process_shard.local_rows(len(examples), batch_size), self.spec
        prompt_ids = prompt_ids and [prompt_ids[i] for i in numbers]
        encoded, rows = self._aligned([examples[i] for i in numbers], [completions[i] for i in numbers], prompt_ids)
        rows = dict(zip(numbers, rows))
        given = [rows.get(i) for i in range(len(examples))]
        options = dict(merge=spec.merge, groups=self._groups, text=spec.of_text, normalization=spec.normalization)
        options |= dict(
            student_pad=self.student.pad_id, teacher_pad=self.teacher.pad_id, short_lengths=self.short_lengths
        )
        options |= dict(shapes=shapes, process_shard=self.process_shard, drawn=drawn)
        batches = text_batch.build_batches(given, batch_size, **options)
        return dict(zip(numbers, encoded)), rows, batches

    def _aligned(self, examples: Sequence[Example], completions: Sequence, prompt_ids: Sequence | None = None) -> tuple:
        """Rows encoded, and aligned."""
        spec, teacher_prompts = self.spec, self._teacher_prompts(examples)
        with annotate(ENCODING):
            options = dict(one_vocabulary=self.one_vocabulary, teacher_prompts=teacher_prompts)
            options |= dict(student_prompt_ids=prompt_ids, max_length=self.max_length)
            encoded = text_batch.encode_rows(
                self.student, self.teacher, [e.prompt for e in examples], completions, **options
            )
        positional, stops = spec.groups == "positional", (self.student.stop_id, self.teacher.stop_id)
        with annotate(ALIGNMENT):
            options = dict(max_length=self.max_length, positional=positional, one_vocabulary=self.one_vocabulary)
            options |= dict(skip_student_stop=spec.skip_student_stop, skip_teacher_stop=spec.skip_teacher_stop)
            return encoded, text_batch.align_rows(encoded, stops, **options)

    @property
    def _groups(self) -> str:
        """Which groups count; pairs by position all do."""
        return "all" if self.spec.groups == "positional" else self.spec.groups

    def count_targets(self, examples: Sequence[Example]) -> list[tuple[int, bool]]:
        """How many groups, or tokens of cross-entropy, are learned from each row, and whether `max_length` cuts it.

        A row that certainly fits and has targets is counted as 1 without being aligned.
        """
        completions = [e.completion_for(self.student) for e in examples]
        found: list = [(1, False) if fits else None for fits in self._fit(examples, completions)]
        others = [i for i, done in enumerate(found) if done is None]
        encoded, rows = self._aligned([examples[i] for i in others], [completions[i] for i in others])
        for i, x, row in zip(others, encoded, rows):
            found[i] = self._count(row), self._is_cut(x)
        return found

    def _fit(self, examples: Sequence[Example], completions: Sequence[str]) -> list[bool]:
        """Which rows certainly fit into `max_length` on both sides and have targets. Encodes prompts only.

        Bounds a completion by its bytes, as a token spells at least one, plus a leading blank and the stop token.
        """
        if self.max_length is None or self._groups != "all" or self.spec.groups == "positional":
            return [False] * len(examples)
        room = np.array([self.max_length - len(text.encode()) - 2 if text else -1 for text in completions])
        prompts = [e.prompt for e in examples], self._teacher_prompts(examples)
        pairs = zip((self.student, self.teacher), prompts)
        lengths = np.array([[len(ids) for ids in side.encode_prompts(read)] for side, read in pairs])
        return ((lengths.min(axis=0) > 0) & (lengths.max(axis=0) <= room)).tolist() if len(examples) else []

    def _count(self, row: Row) -> int:
        counted = int(counted_groups(row, self.spec.merge, self._groups).sum()) if self.spec.distillation_weight else 0
        # Without a prompt nothing stands before the first token.
        targets = len(row.student.completion) - (not len(row.student.prompt) and bool(len(row.student.completion)))
        return counted + (targets if self.spec.crossentropy_weight else 0)

    def _describe(self, rows: Mapping[int, Row], sampled: Mapping[int, SampledCompletion]) -> tuple[dict, int]:
        """What the rows of all processes hold, and how much of it counts in the loss."""

        def owned(found: Mapping[int, Any]) -> list:
            return [x for i, x in found.items() if self.process_shard.is_owner(i, self.batch_size)]

        def of_row(r: Row) -> tuple[int, ...]:
            one_to_one = int(counted_groups(r, "boundary", "one_to_one").sum())
            tokens = len(r.student.prompt) + len(r.student.completion)
            return r.groups, one_to_one, len(np.unique(r.unknown)), tokens, self._count(r)

        def of_completion(d: SampledCompletion) -> tuple[int, ...]:
            return 1, len(d.ids) + d.stopped, d.stopped, d.invalid_utf8, 0

        counts = [[(0,) * 5, *map(of_row, owned(rows))], [(0,) * 5, *map(of_completion, owned(sampled))]]
        sums = self.process_shard.all_reduce_sum(np.array([np.sum(part, axis=0) for part in counts])).tolist()
        (groups, one_to_one, unknown, tokens, counted), (written, *sums) = sums
        found = {"groups": groups, "one_to_one": one_to_one / max(1, groups), "tokens": tokens}
        if unknown:
            found["unknown"] = unknown / max(1, groups)
        if written:
            names = "completion_tokens", "stopped", "damaged"
            found |= {name: value / written for name, value in zip(names, sums)}
        return found, counted


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
    rollout_batches, engine = 1, None  # those of `DistillationBatchBuilder`; nothing is sampled here
    length_buckets: int = 12  # shapes that batches are padded to
    process_shard: ProcessShard = SINGLE_PROCESS
    short_length: int | None = None  # `DecoderConfig.max_decode_length`

    @annotate(BATCHES)
    def build(self, step: int, examples: Sequence[Example], params: Any, shapes: Iterable = ()) -> UpdateBatch:
        """The batch of an update, given its rows, the student's current parameters, and the shapes of the run so far."""
        shape_set = ShapeSet(self.length_buckets, shapes)
        rows, batches = self._batches(examples, self.batch_size, shape_set)
        owned = [row for i, row in rows.items() if self.process_shard.is_owner(i, self.batch_size)]
        sums = [sum(len(ids) for ids, *_ in owned), sum(int(counted[1:].sum()) for _, counted, _ in owned)]
        tokens, targets = self.process_shard.all_reduce_sum(np.array(sums)).tolist()
        stats = {"tokens": tokens, "targets": targets}
        return UpdateBatch(batches, stats, counted=targets, shapes=shape_set.shapes)

    def build_evaluation(self, examples: Sequence[Example]) -> Evaluation:
        """All batches of an evaluation, on the data set's completions."""
        rows, batches = self._batches(examples, self.eval_batch_size, ShapeSet(self.length_buckets))
        text = {i: labels for i, (*_, labels) in rows.items()}
        return _evaluation(batches, text, len(examples), self.eval_batch_size, self.process_shard)

    def _batches(self, examples: Sequence[Example], batch_size: int, shapes: ShapeSet):
        """The rows that are made here, and the micro-batches of all."""
        numbers, pad = self.process_shard.local_rows(len(examples), batch_size), self.chat_tokenizer.pad_id
        with annotate(ENCODING):
            rows = {i: self._row(examples[i], self.max_length) for i in numbers}
        given = [rows[i][:2] if i in rows else None for i in range(len(examples))]
        options = dict(pad=pad, short_length=self.short_length, shapes=shapes, process_shard=self.process_shard)
        return rows, text_batch.build_token_batches(given, batch_size, **options)

    def count_targets(self, examples: Sequence[Example], max_length: int) -> list[tuple[int, bool]]:
        """How many tokens rows give to learn within `max_length`, and whether each is longer."""
        rows = [self._row(example, max_length + 1) for example in examples]
        return [(int(counted[1:max_length].sum()), len(ids) > max_length) for ids, counted, _ in rows]

    def _row(self, example: Example, max_length: int | None):
        """Ids `[T]`, which of them count, and where its labels hold the completion's text."""
        if example.messages and (self.counted != "completion" or example.answers > 1):
            turns = sum(message.get("role") == "assistant" for message in example.messages)
            before = turns - example.answers if self.counted == "completion" else 0  # answers that are not learned
            ids, counted = self.chat_tokenizer.encode_turns(example.messages, limit=max_length, skip=before)
            text = None
        else:
            prompt = self.chat_tokenizer.encode_prompt(example.prompt, limit=max_length)
            completion = example.completion_for(self.chat_tokenizer)
            if max_length is not None:
                completion = self.chat_tokenizer.shorten(completion, max_length - len(prompt))
            answer = self.chat_tokenizer.encode_completion(completion, after=example.prompt)
            ids = np.concatenate([prompt, answer.ids, [self.chat_tokenizer.stop_id]]).astype(np.int32)
            counted, text = np.arange(len(ids)) >= len(prompt), _text_labels(prompt, answer, max_length)
        counted = np.ones_like(counted) if self.counted == "all" else counted
        return ids[:max_length], counted[:max_length], text
