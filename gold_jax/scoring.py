"""Measures that compare across tokenizers: bits per byte of given completions, exact matches of greedy ones."""

import dataclasses
import functools
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from gold_jax.loading import LoadedModel, as_loaded_model
from gold_jax.losses.distill import Head, flatten_positions, token_logp
from gold_jax.models.functional import merge, split
from gold_jax.rollout.engine import Engine
from gold_jax.rollout.sampler import SamplingEngine
from gold_jax.sharding.collectives import map_shards
from gold_jax.sharding.placement import ROW_AXES
from gold_jax.text.chat import ChatTokenizer
from gold_jax.text.data import Example, load_examples
from gold_jax.text.detokenize import SampledCompletion, completion_from_ids
from gold_jax.text.packing import gather_positions, pack, pad_right

MODEL_WINDOW = 1 << 20


@dataclasses.dataclass(frozen=True)
class Score:
    """What completions cost a model.

    Attributes:
        bits: negative log2-likelihood of each completion's tokens given its prompt, `[N]`.
        bytes: UTF-8 length of each completion, as far as it was scored, `[N]`.
        tokens: tokens scored, `[N]`.
        cut: how many rows did not fit in the window and were scored as far as they did.
    """

    bits: np.ndarray
    bytes: np.ndarray
    tokens: np.ndarray
    cut: int

    @property
    def bits_per_byte(self) -> float:
        """All bits over all bytes; NaN where nothing was scored."""
        return float(self.bits.sum() / self.bytes.sum()) if self.bytes.sum() else float("nan")


@functools.partial(jax.jit, static_argnames=("graph", "chunk"))
def _completion_nll(graph, params, packed, position, behind, counted, chunk):
    """Negative log-likelihood `[B]` in nats of the tokens `behind` the positions `[B, T]` that `counted` marks."""
    model = merge(graph, params)
    placement, hidden, weight = model.placement, model.forward_packed(*packed), model.head_weight()

    def found(hidden, weight, position, behind, counted):
        head = Head(weight, jnp.arange(weight.shape[0]), model.config.final_softcap)
        position = flatten_positions(position, *hidden.shape[:2])
        return -token_logp(hidden, head, position, behind, counted, chunk).sum(1)

    if placement is not None:  # every device on its own rows, with the full head
        weight = jax.lax.with_sharding_constraint(weight.astype(hidden.dtype), placement.replicated)
        by_rows = P(ROW_AXES)
        by_device = map_shards(placement, found, (by_rows, P(), by_rows, by_rows, by_rows), by_rows)
        nll = by_device(hidden, weight, position, behind, counted)
        return jax.lax.with_sharding_constraint(nll, placement.replicated)
    return found(hidden, weight, position, behind, counted)


def _examples(rows: Any) -> list[Example]:
    """Rows as examples: those that are, and dicts as a data set has them."""
    rows = list(rows)
    return rows if all(isinstance(row, Example) for row in rows) else list(load_examples(rows))


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

    The prompt goes through the model's own chat template; the completion counts without a stop token, so that the
    number means the same for every tokenizer and template.

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
    model, chat_tokenizer, _ = as_loaded_model(model, tokenizer)
    graph, params = split(model)
    examples = _examples(rows)
    placement = model.placement
    shards = 1 if placement is None else placement.row_shards
    batch_size = -(-batch_size // shards) * shards
    completions: list[str] = []
    for i, e in enumerate(examples):
        if e.completion is None:
            raise ValueError(
                f"row {i} has a prompt but no completion, so nothing can be scored; give rows with answers"
            )
        completions.append(e.completion)
    prompts = [chat_tokenizer.encode_prompt(e.prompt) for e in examples]
    answers = chat_tokenizer.encode_completions(completions, after=[e.prompt for e in examples])
    limit = max_length or MODEL_WINDOW
    bits, sizes, tokens = (np.zeros(len(examples)) for _ in range(3))
    cut = 0
    order = sorted(range(len(examples)), key=lambda i: len(prompts[i]) + len(answers[i].ids))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        ids, counted = [], []
        for i in chosen:
            room = max(0, limit - len(prompts[i]))
            answer = answers[i].ids[:room]
            sequence = np.concatenate([prompts[i], answer])[:limit]
            first = max(1, len(prompts[i]))  # the very first token of all has nothing before it
            mark = np.zeros(len(sequence), bool)
            mark[first - 1 : len(sequence) - 1] = True
            ids.append(sequence)
            counted.append(mark)
            cut += len(answer) < len(answers[i].ids)
            scored = answers[i].spans[: len(answer)]
            begin = scored[0, 1] if len(prompts[i]) == 0 and len(scored) else 0
            sizes[i] = scored[-1, 1] - begin if len(scored) else 0
            tokens[i] = mark.sum()
        packed = pack(ids, batch_size, shards, pad=chat_tokenizer.pad_id)
        width = packed.gather_index.shape[-1]
        behind = pad_right([x[1:] for x in ids], batch_size, width, np.int32)
        marks = pad_right(counted, batch_size, width, bool)
        batch = packed, gather_positions(packed), behind, marks
        nll = _completion_nll(graph, params, *(batch if placement is None else placement.put(batch, ROW_AXES)), chunk)
        bits[chosen] = np.asarray(nll)[: len(chosen)] / np.log(2)
    return Score(bits, sizes, tokens, cut)


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
        model: a folder, a hub id or `embedded:…`, a `LoadedModel`, a `Decoder`, or its `(graphdef, params)`.
        tokenizer: a name, a transformers tokenizer or a `ChatTokenizer`; None: the model's own.
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
    ids = [chat_tokenizer.encode_prompt(p) for p in prompts]
    sampled = engine.generate(model, ids, stop_ids=chat_tokenizer.stop_ids, **options)
    for prompt, completion in zip(prompts, sampled):
        yield completion_from_ids(chat_tokenizer, completion.ids, after=prompt), completion.logprobs


@dataclasses.dataclass(frozen=True)
class Gaps:
    """How far a student is from its teacher, in bits per byte, on text that either of them wrote.

    A student falls short forward where it does not expect what its teacher says, and backward where it says what its
    teacher does not expect.

    Attributes:
        student_on_teacher, teacher_on_teacher: what the teacher's text costs either model.
        teacher_on_student: what the student's text costs the teacher.
        student_on_student: what the student spent on the tokens that it drew; reading its text again would hide draws
            that are not its tokenizer's own way of writing.
        ended: share of the student's completions that ended by themselves.
    """

    student_on_teacher: float
    teacher_on_teacher: float
    teacher_on_student: float
    student_on_student: float
    ended: float

    @property
    def forward(self) -> float:
        """Student less teacher on the teacher's text."""
        return self.student_on_teacher - self.teacher_on_teacher

    @property
    def reverse(self) -> float:
        """Teacher less student on the student's text."""
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
) -> Gaps:
    """Both models write on the prompts, at temperature 1 from their whole distributions, and read what was written.

    Blank completions are left out, damaged ones count up to the damage.

    Args:
        student: a folder, a hub id or `embedded:…`, a `LoadedModel`, or a pair of a model and its tokenizer.
        teacher: the same.
        prompts: texts or lists of messages.
        max_new_tokens: most tokens of a completion.
        key: PRNG key, or an int seed.
        batch_size: prompts at a time.
        chunk: positions whose logits are held at once.

    Raises:
        ValueError: a model wrote nothing that could be read.
    """

    key = as_key(key)
    student, teacher = (
        as_loaded_model(side) if isinstance(side, LoadedModel | str | pathlib.Path) else as_loaded_model(*side)
        for side in (student, teacher)
    )

    def written(who, key):
        return list(
            _sample_with_logprobs(*who[:2], prompts, SamplingEngine(batch_size), max_new_tokens=max_new_tokens, key=key)
        )

    def readable(completions):
        return [i for i, (d, _) in enumerate(completions) if d.text.strip()]

    def bits(who, completions):
        rows = [Example(prompts[i], completions[i][0].text) for i in readable(completions)]
        return score_completions(who, None, rows, batch_size=batch_size, chunk=chunk).bits_per_byte

    ours, theirs = written(student, jax.random.fold_in(key, 0)), written(teacher, jax.random.fold_in(key, 1))
    for name, completions in (("student", ours), ("teacher", theirs)):
        if not readable(completions):
            raise ValueError(f"the {name} wrote nothing that could be read on {len(prompts)} prompts")
    spent = sum(-float(ours[i][1][: len(ours[i][0].ids)].sum()) for i in readable(ours)) / np.log(2)
    size = sum(len(ours[i][0].text.encode()) for i in readable(ours))
    return Gaps(
        bits(student, theirs),
        bits(teacher, theirs),
        bits(teacher, ours),
        spent / size,
        float(np.mean([d.stopped for d, _ in ours])),
    )


def exact_match(
    model: Any, tokenizer: Any = None, rows: Any = (), *, max_new_tokens: int = 128, batch_size: int = 8
) -> float:
    """Share of rows whose greedy completion is the given one, blanks at either end aside; arguments as `score_completions`."""
    model, chat_tokenizer, _ = as_loaded_model(model, tokenizer)
    pairs = [(e.prompt, e.completion) for e in _examples(rows) if e.completion is not None]
    drawn = sample_completions(
        model,
        chat_tokenizer,
        [prompt for prompt, _ in pairs],
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        temperature=0.0,
    )
    return float(np.mean([d.text.strip() == completion.strip() for d, (_, completion) in zip(drawn, pairs)]))


def evaluate_model(
    model: LoadedModel,
    examples: Sequence[Example],
    *,
    batch_size: int,
    chunk: int,
    max_new_tokens: int | None,
) -> dict[str, float]:
    """What any model can be measured by on given completions: the same for students, teachers and every tokenizer.

    Args:
        model: with its tokenizer.
        examples: with completions.
        batch_size: rows at a time on one shard.
        chunk: positions whose logits are held at once.
        max_new_tokens: of the greedy completions that exact matches are counted on; None: none are made.
    """
    placement = model.model.placement
    rows = batch_size * (1 if placement is None else placement.row_shards)
    score = score_completions(model, None, examples, batch_size=rows, chunk=chunk)
    found = {"eval_bits_per_byte": score.bits_per_byte}
    if max_new_tokens is not None:
        found["eval_exact_match"] = exact_match(model, None, examples, max_new_tokens=max_new_tokens, batch_size=rows)
    return found
