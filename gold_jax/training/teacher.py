"""The teacher as a step reads it: frozen, its head in the student's order."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gold_jax.losses.compare import Overlap
from gold_jax.models.decoder import Decoder
from gold_jax.models.functional import Params, merge
from gold_jax.text.vocabulary import VocabularyMap


class StepConstants(NamedTuple):
    """What a distillation step reads and never changes; passed to the jitted step, not baked into it."""

    teacher: Any  # the teacher's parameters
    teacher_head: jax.Array  # [W, E], rows ordered
    teacher_row_of_token: jax.Array  # [W] row of a token id
    student_order: jax.Array | None  # [V] None: the student's own order is the matched one
    student_row_of_token: jax.Array  # [V]
    student_prefix_of_unmatched: jax.Array  # [V - K] the matched column that an unmatched row gives to
    teacher_prefix_of_unmatched: jax.Array  # [W - K]
    student_stops: jax.Array | None  # rows of the stop tokens, if there are several that count as one
    teacher_stops: jax.Array | None


def freeze_teacher(
    graph: nnx.GraphDef, params: Params, vocabulary: VocabularyMap, stops: Sequence[Sequence[int]] | None = None
) -> StepConstants:
    """The teacher as the loss reads it: its head's rows reordered once, so that column `i` faces the student's column `i`.

    In the result the reordered head replaces the teacher's own, so that memory holds one head unless the caller keeps
    the original; where it is the embedding (tied), tokens must be looked up by their `teacher_row_of_token`. Of
    `jax.ShapeDtypeStruct`s with shardings the result has such. `stops`, the stop tokens of student and teacher, are
    each model's taken as one; None leaves every token by itself.
    """
    teacher = merge(graph, params)
    placement, name = teacher.placement, _head_name(teacher)
    abstract = isinstance(params[name], jax.ShapeDtypeStruct)
    if not abstract and not _is_identity(vocabulary.teacher_order):
        params = {**params, name: _rows_of(params[name], vocabulary.teacher_order)}
    orders = vocabulary.student_order, vocabulary.teacher_order
    rows = ours, theirs = [np.argsort(order).astype(np.int32) for order in orders]
    prefixes = vocabulary.student_prefix_of_unmatched, vocabulary.teacher_prefix_of_unmatched
    stop_rows = (row_of[list(ids)] if len(ids) > 1 else None for row_of, ids in zip(rows, stops or ((), ())))
    order = None if _is_identity(orders[0]) else orders[0]
    constants = StepConstants(None, None, theirs, order, ours, *prefixes, *stop_rows)
    if abstract:
        sharding = None if placement is None else placement.replicated
        constants = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.int32, sharding=sharding), constants)
    else:
        constants = jax.tree.map(jnp.asarray, constants) if placement is None else placement.put(constants)
    return constants._replace(teacher=params, teacher_head=params[name])


def restore_teacher(graph: nnx.GraphDef, constants: StepConstants, vocabulary: VocabularyMap) -> Params:
    """The teacher's parameters as `freeze_teacher` was given them, to use the teacher by itself. The constants stay as they are."""
    if _is_identity(vocabulary.teacher_order):
        return constants.teacher
    head = _rows_of(constants.teacher_head, np.argsort(vocabulary.teacher_order))
    return {**constants.teacher, _head_name(merge(graph, constants.teacher)): head}


def _head_name(model: Decoder) -> str:
    return "embedding" if model.config.tied else "head"


def _rows_of(head: jax.Array, order: np.ndarray) -> jax.Array:
    """`head[order]`, sharded as the head: over columns, never over rows."""
    return _take(head, order, head.sharding)


@functools.partial(jax.jit, static_argnames="sharding")
def _take(head: jax.Array, order: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
    return jax.lax.with_sharding_constraint(jnp.take(head, order, axis=0), sharding)


def overlap_of(vocabulary: VocabularyMap) -> Overlap:
    """What a comparison has to know of the vocabularies."""
    matched = vocabulary.matched
    routes = vocabulary.student_prefix_of_unmatched, vocabulary.teacher_prefix_of_unmatched
    unprefixed = all(bool((route == matched).any()) for route in routes)
    return Overlap(matched, unprefixed=unprefixed, masked=any(bool((route > matched).any()) for route in routes))


def _is_identity(order: np.ndarray) -> bool:
    return bool((order == np.arange(len(order))).all())
