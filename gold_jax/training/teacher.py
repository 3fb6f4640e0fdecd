"""The teacher as a step reads it: frozen, its head in the student's order."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gold_jax.loss_spec import LossSpec
from gold_jax.losses.compare import CompareOptions
from gold_jax.models.decoder import Decoder
from gold_jax.text.vocabulary import VocabularyMap


class Constants(NamedTuple):
    """What a distillation step reads and never changes; passed to the jitted step, not baked into it."""

    teacher: Any  # the teacher's parameters
    teacher_head: jax.Array  # [W, E], rows ordered
    teacher_place: jax.Array  # [W] row of a token id
    student_order: jax.Array | None  # [V] None: the student's own order is the matched one
    student_place: jax.Array  # [V]
    student_route: jax.Array  # [V - K] the matched column that an unmatched row gives to
    teacher_route: jax.Array  # [W - K]
    student_stops: jax.Array | None  # rows of the stop tokens, if there are several that count as one
    teacher_stops: jax.Array | None


def freeze_teacher(
    teacher: Decoder, vocabulary: VocabularyMap, stops: tuple[Sequence[int], Sequence[int]] | None = None
) -> tuple[nnx.GraphDef, Constants]:
    """Splits the teacher and reorders its head once, so that column `i` faces the student's column `i`.

    It is reordered in the parameters themselves and never held twice: of a teacher whose embedding is its head, tokens
    have to be looked up by their `teacher_place` from then on.

    Args:
      teacher: the teacher.
      vocabulary: the order of either head.
      stops: the stop tokens of student and teacher, each model's taken as one; None leaves every token by itself.
    """
    head = teacher.head_weight()
    if not _is_identity(vocabulary.teacher_order):
        head = _rows_of(head, vocabulary.teacher_order)
        (teacher.embedding if teacher.config.tied else teacher.head)[...] = head
    graph, params = nnx.split(teacher)
    student_place, teacher_place = (
        np.argsort(order).astype(np.int32) for order in (vocabulary.student_order, vocabulary.teacher_order)
    )

    def stop_rows(place, ids):
        return place[list(ids)] if len(ids) > 1 else None

    ours, theirs = stops or ((), ())
    about = Constants(
        teacher=None,
        teacher_head=None,
        teacher_place=teacher_place,
        student_order=None if _is_identity(vocabulary.student_order) else vocabulary.student_order,
        student_place=student_place,
        student_route=vocabulary.student_route,
        teacher_route=vocabulary.teacher_route,
        student_stops=stop_rows(student_place, ours),
        teacher_stops=stop_rows(teacher_place, theirs),
    )
    where = teacher.placement
    about = jax.tree.map(jnp.asarray, about) if where is None else where.put(about)
    return graph, about._replace(teacher=params, teacher_head=head)


def _rows_of(head: jax.Array, order: np.ndarray) -> jax.Array:
    """`head[order]`, lying where the head lies: a mesh cuts columns, never rows."""
    return jax.jit(lambda x: jnp.take(x, order, axis=0), out_shardings=head.sharding)(head)


def compare_options(spec: LossSpec, vocabulary: VocabularyMap) -> CompareOptions:
    """What a comparison has to know of the loss and the vocabularies."""
    matched, routes = vocabulary.matched, (vocabulary.student_route, vocabulary.teacher_route)
    return CompareOptions(
        matched=matched,
        beta=spec.beta,
        matched_weight=spec.matched_weight,
        unmatched_weight=spec.unmatched_weight,
        top_k=spec.top_k,
        sort=spec.sort,
        rest=all(bool((route == matched).any()) for route in routes),
        masked=any(bool((route > matched).any()) for route in routes),
        temperature=spec.alm_temperature,
    )


def restore_teacher(graph: nnx.GraphDef, constants: Constants, vocabulary: VocabularyMap) -> Decoder:
    """The teacher as it was before `freeze_teacher`, to measure it by itself."""
    teacher = nnx.merge(graph, constants.teacher)
    head = _rows_of(constants.teacher_head, np.argsort(vocabulary.teacher_order))
    (teacher.embedding if teacher.config.tied else teacher.head)[...] = head
    return teacher


def _is_identity(order: np.ndarray) -> bool:
    return bool((order == np.arange(len(order))).all())
