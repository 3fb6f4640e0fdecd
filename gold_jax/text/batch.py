"""From texts to static arrays: rows with both tokenizations and their groups, then padded merge-index batches.

A `Row` is ragged and stays on the host; a `Batch` is rectangular and goes to the device, which never sees text or spans:
the merge-index arrays of `Side` say at which positions to read a distribution and which token probabilities to multiply
into which group. Weights already hold the normalisation over the global batch, so that losses of micro-batches, devices
and hosts simply add up.

Shapes: B rows, T and U student and teacher tokens, G groups, M tokens inside merged groups; S packed sequences of N
tokens (see `text.packing`). Numpy only.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from gold_jax.bucketing import ShapeSet
from gold_jax.notebook import table
from gold_jax.text.align import groups_of
from gold_jax.text.chat import ChatTokenizer
from gold_jax.text.detokenize import SampledCompletion
from gold_jax.text.encode import Encoded
from gold_jax.text.packing import PackedBatch, gather_positions, pack_unpadded, pad_packed, pad_right
from gold_jax.text.process_shard import ProcessShard

SINGLE_PROCESS = ProcessShard()
IGNORE = -1
NO_GROUP = np.iinfo(np.int32).max  # the group of a token that belongs to none; sorts behind every real group


class Side(NamedTuple):
    """One model's part of a batch, int32. Positions index the packed sequence that holds the row."""

    packed: PackedBatch
    base: np.ndarray  # [B, G] position whose hidden state gives the group its distribution
    token: np.ndarray  # [B, G] token of the group's text that this distribution is over
    inner_position: np.ndarray  # [B, M] positions that predict further tokens of the text …
    inner_token: np.ndarray  # [B, M] … at this token …
    inner_group: np.ndarray  # [B, M] … into this group; G where there is none


class Labels(NamedTuple):
    """What cross-entropy learns. Positions index the packed sequence that holds the row."""

    position: np.ndarray  # [B, T] int32, the position that predicts the label
    token: np.ndarray  # [B, T] int32, IGNORE where nothing is predicted
    weight: np.ndarray  # [B, T] float32


class Behavior(NamedTuple):
    """What importance weights need to know of completions that the student drew with earlier weights."""

    # [B, T] float32 in nats, of each label when it was drawn; NaN: it was not, or by the current weights.
    logp: np.ndarray
    last: np.ndarray  # [B, G] int32, which token of the row is the last that a group's comparison depends on


class Batch(NamedTuple):
    """A padded batch. Weights already hold the normalisation: a loss is the weighted sum over its entries."""

    student: Side
    teacher: Side
    weight: np.ndarray  # [B, G] float32, zero where there is no group that counts
    labels: Labels  # the student's completion tokens
    behavior: Behavior | None = None  # None: nothing is weighted by what it was drawn with

    def __repr__(self) -> str:
        """Shapes instead of arrays; as in any pytree, leaves may be other objects."""
        packed = {"student": self.student.packed, "teacher": self.teacher.packed}
        named = {"weight": self.weight} | {name: getattr(x, "tokens", x) for name, x in packed.items()}
        shapes = (f"{name}={getattr(x, 'shape', x)}" for name, x in named.items())
        return f"Batch({', '.join(shapes)})"

    def _repr_html_(self) -> str | None:
        """What notebooks show; None, for which they show the `repr`, where leaves are no arrays that can be read."""
        rows = []
        try:
            counted = int(np.count_nonzero(self.weight))
            for name, packed in (("student", self.student.packed), ("teacher", self.teacher.packed)):
                tokens, stored = int(np.sum(packed.mask)), packed.stored()
                rows.append((name, tokens, stored, packed.tokens.size - stored, str(packed.mask.shape[1:])))
            filled = int(np.asarray(self.student.packed.mask).any(-1).sum())
        except (AttributeError, RuntimeError, TypeError):  # shapes, tracers, arrays that were donated, hidden states
            return None
        heads = "", "tokens of rows", "stored (shared beginnings once)", "padding", "rows, length"
        return table(f"Batch of {filled} rows, {counted:,} groups count in the loss", rows, heads)


class TokenBatch(NamedTuple):
    """A padded batch for cross-entropy alone."""

    packed: PackedBatch
    labels: Labels


class SideTokens(NamedTuple):
    """One model's tokens of a row: int32 `[P]` and `[T]`, and the group `[T]` of each completion token."""

    prompt: np.ndarray
    completion: np.ndarray
    group: np.ndarray


@dataclasses.dataclass(frozen=True)
class Row:
    """One prompt and completion as both models read it."""

    student: SideTokens
    teacher: SideTokens
    groups: int
    text: str
    stopped: bool
    invalid_utf8: bool = False
    #: The groups that a token stands in which does not spell its text (an unknown token): what it costs says nothing
    #: about the text, so they never count.
    unknown: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int32))


class EncodedRow(NamedTuple):
    """One row as both tokenizers read it, its tokens not yet grouped: prompts int32 `[P]`, and completions."""

    student_prompt: np.ndarray
    teacher_prompt: np.ndarray
    student: SampledCompletion
    teacher: Encoded


def encode_rows(
    student: ChatTokenizer,
    teacher: ChatTokenizer,
    prompts: Sequence[str | list],
    completions: Sequence[str | SampledCompletion],
    *,
    one_vocabulary: bool = False,
    teacher_prompts: Sequence[str | list] | None = None,
    student_prompt_ids: Sequence[np.ndarray] | None = None,
    max_length: int | None = None,
) -> list[EncodedRow]:
    """Encodes prompts with their completions for both models.

    Args:
        student, teacher: either model's chat tokenizer.
        prompts: plain texts or lists of messages; each model renders them with its own template.
        completions: text from the data set (it ends by itself, so a stop token follows), or what the student drew.
        one_vocabulary: both have the same entries: the teacher reads the very tokens of the student.
        teacher_prompts: other prompts for the teacher alone.
        student_prompt_ids: the student's tokens of the prompts, where they are known already.
        max_length: student tokens of prompt and completion that are needed; much longer texts are not read whole.
    """
    if teacher_prompts is None:
        teacher_prompts = prompts
    if student_prompt_ids is None:
        student_prompt_ids = student.encode_prompts(prompts)
    if max_length is not None:
        rooms = [max_length - len(ids) for ids in student_prompt_ids]
        completions = [student.shorten(c, n) if isinstance(c, str) else c for c, n in zip(completions, rooms)]
    # Texts take one call to the tokenizer; what was drawn already stays.
    texts = [(c, p) for c, p in zip(completions, prompts) if isinstance(c, str)]
    encoded = map(vars, student.encode_completions([c for c, _ in texts], after=[p for _, p in texts]))
    ours = [SampledCompletion(**next(encoded), text=c, stopped=True) if isinstance(c, str) else c for c in completions]
    theirs = ours if one_vocabulary else teacher.encode_completions([c.text for c in ours], after=teacher_prompts)
    # A prompt that is answered several times is encoded once.
    known = {id(prompt): ids for prompt, ids in zip(prompts, student_prompt_ids, strict=True)}
    known = known if teacher is student else {}
    others = {id(prompt): prompt for prompt in teacher_prompts if id(prompt) not in known}
    known |= zip(others, teacher.encode_prompts([*others.values()]))
    teacher_prompt_ids = [known[id(prompt)] for prompt in teacher_prompts]
    return [EncodedRow(*row) for row in zip(student_prompt_ids, teacher_prompt_ids, ours, theirs, strict=True)]


def align_rows(
    rows: Sequence[EncodedRow],
    stop_ids: tuple[int, int],
    *,
    max_length: int,
    teacher_max_length: int | None = None,
    positional: bool = False,
    one_vocabulary: bool = False,
    skip_student_stop: bool = False,
    skip_teacher_stop: bool = False,
) -> list[Row]:
    """Groups the tokens of both sides between the boundaries that they share. A row without a group counts for nothing.

    Args:
        rows: of `encode_rows`.
        stop_ids: the token that ends a turn, for student and teacher.
        max_length: student tokens of prompt and completion together. A group that does not fit whole is cut off, and
            with it what the teacher would read behind it.
        teacher_max_length: the same for the teacher; None leaves the teacher's side as long as it is.
        positional: pair tokens by position, as the first ULD did, instead of by bytes.
        one_vocabulary: both have the same entries, so that all groups are `1:1`.
        skip_student_stop, skip_teacher_stop: leave that side's stop token out of the groups; either one leaves the pair
            out.
    """
    if positional or one_vocabulary:
        sizes = [(len(row.student.ids), len(row.teacher.ids)) for row in rows]
        aligned = [(np.arange(ours), np.arange(theirs), min(ours, theirs)) for ours, theirs in sizes]
    else:
        aligned = groups_of([r.student.spans[:, 1] for r in rows], [r.teacher.spans[:, 1] for r in rows])
    made = []
    for (s_prompt, t_prompt, ours, theirs), (s_group, t_group, count) in zip(rows, aligned):
        s_ids, t_ids = ours.ids, theirs.ids
        s_group, t_group = (np.where((g >= 0) & (g < count), g, NO_GROUP) for g in (s_group, t_group))
        unknown = s_group[ours.unknown]
        if not one_vocabulary:
            unknown = np.concatenate([unknown, t_group[theirs.unknown]])
        if ours.stopped:
            counts_stop = not (skip_student_stop or skip_teacher_stop)
            s_ids, t_ids = (np.append(ids, stop) for ids, stop in zip((s_ids, t_ids), stop_ids))
            s_group, t_group = (np.append(g, count if counts_stop else NO_GROUP) for g in (s_group, t_group))
            count += counts_stop
        s_side, s_lost = _truncate(SideTokens(s_prompt, s_ids.astype(np.int32), s_group), max_length)
        t_side, t_lost = _truncate(SideTokens(t_prompt, t_ids.astype(np.int32), t_group), teacher_max_length)
        whole, unknown = min(count, s_lost, t_lost), unknown[unknown < count]
        if whole < count:  # the teacher need not read what the student is not to learn
            t_side = SideTokens(t_prompt, *(x[: np.count_nonzero(t_side.group < whole)] for x in t_side[1:]))
        made.append(Row(s_side, t_side, whole, ours.text, ours.stopped, ours.invalid_utf8, unknown))
    return made


def _truncate(half: SideTokens, limit: int | None) -> tuple[SideTokens, int]:
    """One side within its limit, and the first group that is no longer whole."""
    room = len(half.completion) if limit is None else max(0, limit - len(half.prompt))
    kept, lost = half.group[:room], half.group[room:]
    return SideTokens(half.prompt, half.completion[:room], kept), int(lost.min()) if len(lost) else NO_GROUP


def counted_groups(row: Row, merge: str, groups: str) -> np.ndarray:
    """Which of a row's groups enter the loss: bool `[groups]`.

    `one_to_one` leaves merged groups out, and groups with an unknown token never count. A group whose distribution has
    no position before it (an empty prompt) is left out as well, except under `observed`, which reads one position late.
    """
    inside = (half.group[half.group < row.groups] for half in (row.student, row.teacher))
    s, t = (np.bincount(group, minlength=row.groups)[: row.groups] for group in inside)
    keep = (s > 0) & (t > 0)
    if groups == "one_to_one":
        keep &= (s == 1) & (t == 1)
    keep[row.unknown[row.unknown < row.groups]] = False
    if merge != "observed" and row.groups and not (len(row.student.prompt) and len(row.teacher.prompt)):
        keep[0] = False
    return keep


def _merge_index(half: SideTokens, groups: int, merge: str, text: bool):
    """`(base [groups], token [groups], inner positions, tokens, groups)` of one side of a row.

    Positions count from the prompt's start. Under `boundary` the inner tokens are those of the group's text behind its
    first, and there are none unless `text` is asked for.
    """
    inside = half.group < groups
    group, token = half.group[inside], half.completion[inside]
    at = len(half.prompt) + np.flatnonzero(inside)
    first = np.searchsorted(group, np.arange(groups), side="left")
    last = np.searchsorted(group, np.arange(groups), side="right") - 1
    order = np.arange(len(group))
    if merge == "chain":
        base, token_index, inner, state = at[last] - 1, last, order != last[group], at - 1
    elif merge == "observed":
        base, token_index, inner, state = at[first], last, order != first[group], at
    elif merge == "boundary":
        base, token_index, inner, state = at[first] - 1, first, (order != first[group]) & text, at - 1
    else:
        raise ValueError(f"merge must be chain, observed or boundary, not {merge!r}")
    return np.maximum(base, 0), token[token_index], np.maximum(state[inner], 0), token[inner], group[inner]


def normalized_weights(
    masks: Sequence[np.ndarray], normalization: str, total: int | None = None, rows: int | None = None
) -> list[np.ndarray]:
    """The weight of every entry of a global batch, from the masks of its rows.

    `groups`: one over the number of entries in all rows, so that any split into micro-batches, devices or hosts gives
    one number. `row_mean`: the mean over rows of the mean over a row's entries, as TRL takes it. `total` entries and
    `rows` are those of the whole batch, where these masks are a part of it.
    """
    if normalization == "groups":
        total = max(1, sum(int(m.sum()) for m in masks) if total is None else total)
        return [m.astype(np.float32) / np.float32(total) for m in masks]
    if normalization == "row_mean":
        rows = len(masks) if rows is None else rows
        return [m.astype(np.float32) / np.float32(max(1, m.sum()) * rows) for m in masks]
    raise ValueError(f"normalization must be groups or row_mean, not {normalization!r}")


def build_batches(
    rows: Sequence[Row | None],
    batch_size: int,
    *,
    merge: str,
    groups: str,
    text: bool = False,
    normalization: str = "groups",
    student_pad: int = 0,
    teacher_pad: int = 0,
    short_lengths: tuple[int | None, int | None] = (None, None),
    shapes: ShapeSet | None = None,
    process_shard: ProcessShard = SINGLE_PROCESS,
    drawn: Mapping[int, tuple[np.ndarray, np.ndarray]] | None = None,
) -> list[Batch]:
    """Pads a global batch of rows into micro-batches of `batch_size`, weights taken over all of them together.

    The last micro-batch is filled up with empty rows of weight zero. `short_lengths` are those of `packing.pack` for
    student and teacher. `text` says whether the comparison asks for the
    probability of a group's text, which under `boundary` takes further tokens. `shapes`, to which new ones are added,
    are those that batches are padded to (None: to the buckets of each). `process_shard` says into how many sequences
    the rows of a batch are packed and which of them this process makes; rows of others may be None, and are not in the
    result. `drawn` has the ids and log-probabilities of rows that were drawn with earlier weights (see `Behavior`).
    """
    parts, height = process_shard.local_rows_per_batch(len(rows), batch_size), process_shard.local_height(batch_size)
    local = {i: row for part in parts for i in part if (row := rows[i]) is not None}
    keeps = {i: counted_groups(row, merge, groups) for i, row in local.items()}
    targets = {i: _next_token_targets(row.student) for i, row in local.items()}
    counted = {i: mask for i, (_, mask) in targets.items()}
    weights, label_weights = _weights((keeps, counted), normalization, len(rows), batch_size, process_shard)
    sides = [[[getattr(local[i], who) for i in part] for who in ("student", "teacher")] for part in parts]
    tokens = [[[_tokens(half) for half in side] for side in both] for both in sides]
    packed = _pack_batches(tokens, (student_pad, teacher_pad), short_lengths, height, shapes, process_shard)
    batches = []
    for part, sides_of_part, (student, teacher) in zip(parts, sides, packed):
        counts = [local[i].groups for i in part]
        ours, theirs = ([_merge_index(half, n, merge, text) for half, n in zip(side, counts)] for side in sides_of_part)
        # A row has at most as many groups as student tokens: the token bucket serves for groups too, and shapes stay few.
        width = student.gather_index.shape[-1]
        sides_of_batch = _pad_side(student, ours, height, width), _pad_side(teacher, theirs, height, width)
        weight = pad_right([weights[i] for i in part], height, width, np.float32)
        labels = _pad_labels(student, [targets[i][0] for i in part], [label_weights[i] for i in part], height)
        behavior = None
        if drawn is not None:
            then = pad_right([_logp_then(local[i], drawn.get(i)) for i in part], height, width, np.float32, np.nan)
            last = [_last_read(half, n, merge, text) for half, n in zip(sides_of_part[0], counts)]
            behavior = Behavior(then, pad_right(last, height, width, np.int32))
        batches.append(Batch(*sides_of_batch, weight, labels, behavior))
    return batches


def _logp_then(row: Row, drawn: tuple[np.ndarray, np.ndarray] | None) -> np.ndarray:
    """Log-probabilities float32 `[P + T]` of a row's labels when they were drawn, NaN where they were not.

    A stop token in whose place another stands was not: its own log-probability says nothing of that one.
    """
    prompt, completion = row.student.prompt, row.student.completion
    found = np.full(len(prompt) + len(completion), np.nan, np.float32)
    if drawn is not None:
        ids, logp = drawn
        count = min(len(ids), len(completion))
        same = ids[:count] == completion[:count]
        found[len(prompt) - 1 : len(prompt) - 1 + count] = np.where(same, logp[:count], np.nan)
    return found


def _last_read(half: SideTokens, groups: int, merge: str, text: bool) -> np.ndarray:
    """For each group, which token of its row is the last that its comparison depends on, int32 `[groups]`.

    That is the group's own last one where its text is read, or the last whose probability is multiplied in; else the last
    one before the group.
    """
    inside = np.flatnonzero(half.group < groups)
    side = "left" if merge == "boundary" and not text else "right"
    end = np.searchsorted(half.group[inside], np.arange(groups), side=side)
    at = inside[end - (side == "right")]
    return len(half.prompt) + at - (not text and merge != "observed")


def _weights(
    masks: Sequence[Mapping[int, np.ndarray]], normalization: str, row_count: int, batch_size: int, shard: ProcessShard
) -> list[dict[int, np.ndarray]]:
    """The weights of the rows built here for each kind of mask, normalized over the rows of all processes."""
    owned = [{i: mask for i, mask in kind.items() if shard.is_owner(i, batch_size)} for kind in masks]
    totals = shard.all_reduce_sum(np.array([sum(int(mask.sum()) for mask in kind.values()) for kind in owned]))
    found = [normalized_weights([*kind.values()], normalization, int(n), row_count) for kind, n in zip(masks, totals)]
    return [dict(zip(kind, weights)) for kind, weights in zip(masks, found)]


def _pack_batches(
    tokens: list,
    pads: tuple[int, ...],
    short_lengths: tuple[int | None, ...],
    height: int,
    shapes: ShapeSet | None,
    shard: ProcessShard,
) -> list[list[PackedBatch]]:
    """Rows' tokens `[batches][sides][rows]`, packed `[batches][sides]`; sizes are enough for those of all processes."""
    sequences = len(shard.local_shards)
    unpadded = [
        [pack_unpadded(rows, height, sequences, short) for rows, short in zip(sides, short_lengths)] for sides in tokens
    ]
    sizes = shard.all_reduce_max(np.array([[side.longest for side in sides] for sides in unpadded]))
    if shapes is not None:
        fitted = [shapes.fit(size.ravel().tolist(), height // sequences) for size in sizes]
        sizes = np.array(fitted).reshape(sizes.shape)
    return [
        [pad_packed(side, *size, pad=pad) for side, size, pad in zip(sides, longest, pads)]
        for sides, longest in zip(unpadded, sizes.tolist())
    ]


def _tokens(half: SideTokens) -> np.ndarray:
    return np.concatenate([half.prompt, half.completion])


def _next_token_targets(half: SideTokens) -> tuple[np.ndarray, np.ndarray]:
    """Labels and mask `[P + T]`: every completion token is the label of the position before it (next-token prediction)."""
    tokens = _tokens(half)
    labels = np.append(tokens[1:], IGNORE)
    counted = np.zeros(len(tokens), bool)
    counted[max(0, len(half.prompt) - 1) : max(0, len(tokens) - 1)] = True
    return np.where(counted, labels, IGNORE), counted


def _pad_side(packed: PackedBatch, found: Sequence[tuple], height: int, groups: int) -> Side:
    gather_index = gather_positions(packed)
    width = gather_index.shape[1]
    base, token_index, position, token, group = zip(*found) if found else ((),) * 5
    return Side(
        packed,
        base=pad_right([gather_index[i, x] for i, x in enumerate(base)], height, groups, np.int32),
        token=pad_right(token_index, height, groups, np.int32),
        inner_position=pad_right([gather_index[i, x] for i, x in enumerate(position)], height, width, np.int32),
        inner_token=pad_right(token, height, width, np.int32),
        inner_group=pad_right(group, height, width, np.int32, groups),
    )


def _pad_labels(packed: PackedBatch, tokens, weights: Sequence[np.ndarray], height: int) -> Labels:
    index = gather_positions(packed)
    width = index.shape[1]
    padded = pad_right(tokens, height, width, np.int32, IGNORE), pad_right(weights, height, width, np.float32)
    return Labels(index, *padded)


def build_token_batches(
    rows: Sequence[tuple[np.ndarray, np.ndarray] | None],
    batch_size: int,
    *,
    normalization: str = "groups",
    pad: int = 0,
    short_length: int | None = None,
    shapes: ShapeSet | None = None,
    process_shard: ProcessShard = SINGLE_PROCESS,
) -> list[TokenBatch]:
    """Micro-batches for cross-entropy from `(ids [T], counted [T])`: a counted token is a target, if one stands before it.

    `shapes` and `process_shard` as in `build_batches`, `short_length` as in `packing.pack`.
    """
    parts, height = process_shard.local_rows_per_batch(len(rows), batch_size), process_shard.local_height(batch_size)
    local = {i: row for part in parts for i in part if (row := rows[i]) is not None}
    masks = {i: np.append(counted[1:], False) for i, (_, counted) in local.items()}
    (weights,) = _weights((masks,), normalization, len(rows), batch_size, process_shard)
    labels = {i: np.where(masks[i], np.append(ids[1:], IGNORE), IGNORE) for i, (ids, _) in local.items()}
    tokens = [[[local[i][0] for i in part]] for part in parts]
    packed = _pack_batches(tokens, (pad,), (short_length,), height, shapes, process_shard)
    return [
        TokenBatch(side, _pad_labels(side, [labels[i] for i in part], [weights[i] for i in part], height))
        for part, (side,) in zip(parts, packed)
    ]
