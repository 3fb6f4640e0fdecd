"""Measures that compare across tokenizers: bits per byte of given completions, exact matches of greedy ones."""

import dataclasses
import functools
import itertools
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from gold_jax import progress
from gold_jax.loading import LoadedModel, as_loaded_model
from gold_jax.losses.distill import Head, flatten_positions, token_logp
from gold_jax.models.functional import merge, split
from gold_jax.rollout.engine import Engine
from gold_jax.rollout.sampler import SamplingEngine
from gold_jax.sharding.collectives import map_shards
from gold_jax.sharding.placement import ROW_AXES
from gold_jax.text.align import group_ends
from gold_jax.text.chat import ChatTokenizer
from gold_jax.text.data import Example, as_examples
from gold_jax.text.detokenize import SampledCompletion, completion_from_ids
from gold_jax.text.encode import Encoded
from gold_jax.text.packing import gather_positions, pack, pad_right


@dataclasses.dataclass(frozen=True)
class Score:
    """What completions cost a model."""

    bits: np.ndarray  # [N] negative log2-likelihood of each completion's tokens given its prompt
    bytes: np.ndarray  # [N] UTF-8 length of each completion, as far as it was scored
    tokens: np.ndarray  # [N] tokens scored
    cut: int  # how many rows did not fit in the window and were scored as far as they did

    @property
    def bits_per_byte(self) -> float:
        """All bits over all bytes; NaN where nothing was scored."""
        return float(self.bits.sum() / self.bytes.sum()) if self.bytes.sum() else float("nan")


@functools.partial(jax.jit, static_argnames=("graph", "chunk"))
def _completion_logp(graph, params, packed, position, behind, counted, chunk):
    """Log-probability `[B, T]` in nats of the tokens `behind` the positions `[B, T]`; zero but where `counted [B, T]`."""
    model = merge(graph, params)
    placement, hidden, weight = model.placement, model.forward_packed(*packed), model.head_weight()

    def logp(hidden, weight, position, behind, counted):
        head = Head(weight, jnp.arange(weight.shape[0]), model.config.final_softcap)
        position = flatten_positions(position, *hidden.shape[:2])
        return token_logp(hidden, head, position, behind, counted, chunk)

    if placement is None:
        return logp(hidden, weight, position, behind, counted)
    # Every device on its own rows, with the full head.
    weight = jax.lax.with_sharding_constraint(weight.astype(hidden.dtype), placement.replicated)
    rows = P(ROW_AXES)
    found = map_shards(placement, logp, (rows, P(), rows, rows, rows), rows)(hidden, weight, position, behind, counted)
    return jax.lax.with_sharding_constraint(found, placement.replicated)


def score_completions(
    model: Any,
    tokenizer: Any = None,
    rows: Any = (),
    *,
    batch_size: int = 8,
    max_length: int | None = None,
    chunk=256,
) -> Score:
    """What completions cost a model, in bits.

    Prompt and completion are what the model's own chat template makes of a row (`Example.completion_for`); the
    completion counts without a stop token, so that the number means the same for every tokenizer.

    Args:
        model: a folder, a hub id or `embedded:…`, a `LoadedModel`, a `Decoder`, or its `(graphdef, params)`.
        tokenizer: a name, a transformers tokenizer or a `ChatTokenizer`; None: the model's own.
        rows: with completions: `Example`s, or dicts as a data set has them.
        batch_size: rows at a time; on a mesh, the next multiple of its shards.
        max_length: longest sequence in tokens; None for no limit.
        chunk: positions whose logits are held at once.

    Raises:
        ValueError: a row has no completion.
    """
    loaded, examples = as_loaded_model(model, tokenizer), as_examples(rows)
    bits, sizes, tokens = (np.zeros(len(examples)) for _ in range(3))
    cut = 0
    for i, answer, first, logp in _read_completions(loaded, examples, batch_size, max_length, chunk):
        size = first + len(logp)  # of the answer that fits
        cut += size < len(answer.ids)
        if size:
            sizes[i] = answer.spans[size - 1, 1] - (answer.spans[0, 1] if first else 0)
        bits[i], tokens[i] = -logp.sum() / np.log(2), len(logp)
    return Score(bits, sizes, tokens, cut)


def _read_completions(
    loaded: LoadedModel, examples: Sequence[Example], batch_size: int, max_length: int | None, chunk: int
) -> Iterator[tuple[int, Encoded, int, np.ndarray]]:
    """Yields each row's number, its encoded completion, the first token that is scored, and log-probabilities from it on.

    The first token of a text without a prompt is not scored. The log-probabilities, float64 in nats, are of as many tokens
    as fit in `max_length`. ValueError as `score_completions`.
    """
    model, chat_tokenizer, _ = loaded
    (graph, params), placement = split(model), model.placement
    shards = 1 if placement is None else placement.row_shards
    batch_size = -(-batch_size // shards) * shards
    completions = [e.completion_for(chat_tokenizer) for e in examples if e.completion is not None]
    if len(completions) < len(examples):
        row = next(i for i, e in enumerate(examples) if e.completion is None)
        raise ValueError(f"row {row} has a prompt but no completion, so nothing can be scored; give rows with answers")
    prompts = [chat_tokenizer.encode_prompt(e.prompt, limit=max_length) for e in examples]
    if max_length is not None:
        pairs = zip(completions, prompts)
        completions = [chat_tokenizer.shorten(text, max_length - len(prompt)) for text, prompt in pairs]
    answers = chat_tokenizer.encode_completions(completions, after=[e.prompt for e in examples])
    order = sorted(range(len(examples)), key=lambda i: len(prompts[i]) + len(answers[i].ids))
    for start in progress.track(range(0, len(order), batch_size), "scoring"):
        chosen = order[start : start + batch_size]
        ids, counted = [], []
        for i in chosen:
            prompt, answer = prompts[i], answers[i]
            sequence = np.concatenate([prompt, answer.ids])[:max_length]
            mark = np.arange(len(sequence)) >= len(prompt) - 1  # what predicts a token of the answer
            mark[-1:] = False
            ids.append(sequence)
            counted.append(mark)
        packed = pack(ids, batch_size, shards, pad=chat_tokenizer.pad_id, short_length=model.config.max_decode_length)
        width = packed.gather_index.shape[-1]
        behind = pad_right([x[1:] for x in ids], batch_size, width, np.int32)
        marks = pad_right(counted, batch_size, width, bool)
        batch = packed, gather_positions(packed), behind, marks
        logp = _completion_logp(graph, params, *(batch if placement is None else placement.put(batch, ROW_AXES)), chunk)
        for i, row, mark in zip(chosen, np.asarray(logp, np.float64), counted):
            # Of a text that begins with the answer, its first token is not predicted.
            yield i, answers[i], int(len(prompts[i]) == 0 and len(answers[i].ids) > 0), row[: len(mark)][mark]


class GroupScore(NamedTuple):
    """The log-probabilities in nats that both models give a group's tokens after all text before it; None: not known."""

    text: str
    student: float | None
    teacher: float | None


def score_groups(
    student: Any,
    teacher: Any,
    prompts: Sequence,
    completions: Sequence[str],
    *,
    teacher_prompts: Sequence | None = None,
    batch_size: int = 8,
    chunk: int = 128,
) -> list[list[GroupScore]]:
    """The log-probabilities that two models give each group of completions, each with its own tokenizer.

    Takes one forward pass of each model. Groups are those of `align`, joined where a boundary splits a character, so that
    the texts of a completion's groups make up its text. A log-probability is None for the first token of a text without a
    prompt, for a group with an unknown token, and where it is not finite.

    Args:
        student, teacher: as in `measure_gaps`.
        prompts: texts or lists of messages.
        completions: one for each prompt.
        teacher_prompts: the prompts that the teacher reads, one for each completion; None: `prompts`.
        batch_size: rows at a time.
        chunk: positions whose logits are held at once.

    Returns:
        The groups of each completion, in the order of the text.

    Raises:
        ValueError: there are not as many completions, or teacher prompts, as prompts.
    """
    teacher_prompts = prompts if teacher_prompts is None else teacher_prompts
    for given, what in ((completions, "completions"), (teacher_prompts, "teacher_prompts")):
        _check_one_each(given, what, prompts)
    found: list[dict[int, tuple]] = []
    for who, before in ((student, prompts), (teacher, teacher_prompts)):
        rows = [Example(prompt, text) for prompt, text in zip(before, completions)]
        read = _read_completions(_loaded(who), rows, batch_size, None, chunk)
        found.append({i: (answer, np.append(np.full(first, np.nan), logp)) for i, answer, first, logp in read})
    return [_joined_groups(text.encode(), *(side[i] for side in found)) for i, text in enumerate(completions)]


def _joined_groups(
    data: bytes, ours: tuple[Encoded, np.ndarray], theirs: tuple[Encoded, np.ndarray]
) -> list[GroupScore]:
    """The groups of one text, of either side's tokens and their log-probabilities."""
    *groups, count = group_ends(ours[0].spans[:, 1], theirs[0].spans[:, 1])
    ends, sums = np.zeros(count, int), []
    ends[groups[0]] = ours[0].spans[:, 1]  # of a group's tokens the last one counts
    for (encoded, logp), group in zip((ours, theirs), groups):
        known = np.where(encoded.unknown, np.nan, logp)
        sums.append(np.bincount(group, known, minlength=count))
    whole = [end == len(data) or data[end] & 0xC0 != 0x80 for end in ends.tolist()]  # characters up to there
    first = np.concatenate([[0], np.flatnonzero(whole) + 1])[: sum(whole)]
    cuts = [0, *ends[whole].tolist()]
    texts = [data[begin:end].decode() for begin, end in itertools.pairwise(cuts)]
    pairs = zip(*(np.add.reduceat(side, first) if len(first) else side for side in sums))
    return [GroupScore(text, *(float(x) if np.isfinite(x) else None for x in pair)) for text, pair in zip(texts, pairs)]


def sample_completions(
    model: Any,
    tokenizer: Any = None,
    prompts: Sequence = (),
    *,
    max_new_tokens: int = 128,
    key: jax.Array | int = 0,
    batch_size: int = 8,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    engine: Engine | None = None,
) -> list[SampledCompletion]:
    """Completions that a model draws for prompts, in order.

    Args:
        model, tokenizer: as in `score_completions`.
        prompts: texts or lists of messages.
        max_new_tokens: most tokens of a completion.
        key: PRNG key, or an int seed.
        batch_size: most rows that the built-in engine writes at once.
        temperature, top_k, top_p: as in `rollout.engine.Engine.generate`; temperature 0 is greedy.
        engine: what writes; None for the built-in one.
    """
    model, chat_tokenizer, _ = as_loaded_model(model, tokenizer)
    engine = SamplingEngine(batch_size) if engine is None else engine
    options = dict(max_new_tokens=max_new_tokens, key=as_key(key), temperature=temperature, top_k=top_k, top_p=top_p)
    return [completion for completion, _ in _sample_with_logprobs(model, chat_tokenizer, prompts, engine, **options)]


def as_key(key: jax.Array | int) -> jax.Array:
    """A PRNG key of an int seed, or the key given."""
    return jax.random.key(key) if isinstance(key, int) else key


def _sample_with_logprobs(model, chat_tokenizer: ChatTokenizer, prompts: Sequence, engine: Engine, **options):
    """Each completion with the log-probabilities, float32 [N], that the model itself gave to what it drew."""
    ids = chat_tokenizer.encode_prompts(prompts)
    sampled = engine.generate(model, ids, stop_ids=chat_tokenizer.stop_ids, **options)
    for prompt, completion in zip(prompts, sampled):
        yield completion_from_ids(chat_tokenizer, completion.ids, after=prompt), completion.logprobs


@dataclasses.dataclass(frozen=True)
class Gaps:
    """How far a student is from its teacher, in bits per byte, on text that either of them wrote.

    The forward gap is large where the student gives the teacher's text a low probability, the reverse gap where the
    teacher gives the student's text one.
    """

    student_on_teacher: float  # what the teacher's text costs the student
    teacher_on_teacher: float
    teacher_on_student: float
    # Of the sampled tokens: encoding the text again would hide samples that its tokenizer would not write.
    student_on_student: float
    ended: float  # share of the student's completions that ended by themselves

    @property
    def forward(self) -> float:
        """Student minus teacher on the teacher's text."""
        return self.student_on_teacher - self.teacher_on_teacher

    @property
    def reverse(self) -> float:
        """Teacher minus student on the student's text."""
        return self.teacher_on_student - self.student_on_student


def measure_gaps(
    student: Any,
    teacher: Any,
    prompts: Sequence,
    *,
    max_new_tokens: int = 128,
    key: jax.Array | int = 0,
    batch_size: int = 8,
    chunk=128,
    teacher_prompts: Sequence | None = None,
) -> Gaps:
    """Samples completions from both models at temperature 1, unfiltered, and scores them with both.

    Completions of white space alone are left out; one that is not valid UTF-8 counts up to the invalid bytes.

    Args:
        student, teacher: a folder, a hub id or `embedded:…`, a `LoadedModel`, or a pair of a model and its tokenizer.
        prompts, max_new_tokens, key, batch_size: as in `sample_completions`.
        chunk: positions whose logits are held at once.
        teacher_prompts: what the teacher reads in place of `prompts`, such as more context; None: the same.

    Raises:
        ValueError: a model wrote nothing that could be read, or there are not as many teacher prompts as prompts.
    """
    key, student, teacher = as_key(key), _loaded(student), _loaded(teacher)
    prompts = list(prompts)
    teacher_prompts = prompts if teacher_prompts is None else list(teacher_prompts)
    _check_one_each(teacher_prompts, "teacher_prompts", prompts)

    def written(name, who, prompts, key):
        """Each completion that can be read, with its row and log-probabilities; and the share that ended."""
        engine = SamplingEngine(batch_size)
        drawn = list(_sample_with_logprobs(*who[:2], prompts, engine, max_new_tokens=max_new_tokens, key=key))
        found = [(row, d, logp) for row, (d, logp) in enumerate(drawn) if d.text.strip()]
        if not found:
            raise ValueError(f"the {name} wrote nothing that could be read on {len(prompts)} prompts")
        return found, float(np.mean([d.stopped for d, _ in drawn]))

    def bits(who, prompts, found):
        rows = [Example(prompts[row], d.text) for row, d, _ in found]
        return score_completions(who, None, rows, batch_size=batch_size, chunk=chunk).bits_per_byte

    by_student, ended = written("student", student, prompts, jax.random.fold_in(key, 0))
    by_teacher, _ = written("teacher", teacher, teacher_prompts, jax.random.fold_in(key, 1))
    own_bits = sum(-float(logp[: len(d.ids)].sum()) for _, d, logp in by_student) / np.log(2)
    size = sum(len(d.text.encode()) for _, d, _ in by_student)
    return Gaps(
        student_on_teacher=bits(student, prompts, by_teacher),
        teacher_on_teacher=bits(teacher, teacher_prompts, by_teacher),
        teacher_on_student=bits(teacher, teacher_prompts, by_student),
        student_on_student=float(own_bits / size),
        ended=ended,
    )


def _check_one_each(given: Sequence, what: str, prompts: Sequence) -> None:
    """ValueError if there is not one for each prompt."""
    if len(given) != len(prompts):
        raise ValueError(f"there are {len(given)} {what} for {len(prompts)} prompts; give one for each")


def _loaded(model: Any) -> LoadedModel:
    """A model of what `measure_gaps` takes."""
    return as_loaded_model(*[model] if isinstance(model, LoadedModel | str | pathlib.Path) else model)


def exact_match(
    model: Any, tokenizer: Any = None, rows: Any = (), *, max_new_tokens: int = 128, batch_size: int = 8
) -> float:
    """Share of rows whose greedy completion is the given one, white space at both ends aside; arguments as `score_completions`."""
    loaded = as_loaded_model(model, tokenizer)
    options = dict(max_new_tokens=max_new_tokens, batch_size=batch_size)
    return share_alike(*greedy_completions(loaded, as_examples(rows), **options))


def greedy_completions(
    loaded: LoadedModel, examples: Sequence[Example], *, max_new_tokens: int, batch_size: int
) -> tuple[list[str], list[str]]:
    """Two lists of texts: what a model writes greedily for the rows that have a completion, and these completions."""
    pairs = [(e.prompt, e.completion_for(loaded.chat_tokenizer)) for e in examples if e.completion is not None]
    prompts, size = [prompt for prompt, _ in pairs], batch_size
    drawn = sample_completions(loaded, None, prompts, max_new_tokens=max_new_tokens, batch_size=size, temperature=0.0)
    return [d.text for d in drawn], [completion for _, completion in pairs]


def share_alike(written: Sequence[str], wanted: Sequence[str]) -> float:
    """Share of texts that equal those wanted, without white space at their ends."""
    return float(np.mean([text.strip() == other.strip() for text, other in zip(written, wanted)]))
