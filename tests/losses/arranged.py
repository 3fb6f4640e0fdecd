"""Batches whose hidden states come row by row, `[B, T, D]`, as references make them, and comparisons by name."""

import numpy as np

from gold_jax.losses.compare import COMPARISONS, Overlap, compare_groups


def in_rows(batch):
    """The batch with positions counted in rows of `T` slots; no two rows may begin alike, or a slot would serve both."""
    sides = []
    for side in (batch.student, batch.teacher):
        lines, height, width = side.packed.gather_index.shape
        line = np.repeat(np.arange(lines), height)[:, None]

        def slot(position, side=side, line=line, slots=height * width):
            return side.packed.first_slot[line, position] + slots * line

        sides.append(side._replace(base=slot(side.base), inner_position=slot(side.inner_position)))
    return batch._replace(student=sides[0], teacher=sides[1])


def width(side):
    """`T`, padding included."""
    return side.packed.gather_index.shape[-1]


def bound(name, options):
    """A comparison with those of the `reference.Options` that it has."""
    comparison = COMPARISONS[name]
    return comparison.bind(**{key: getattr(options, key) for key in comparison.options if hasattr(options, key)})


def overlap(options):
    """What `reference.Options` say of the vocabularies."""
    return Overlap(options.matched, options.unprefixed, options.masked)


def compared(name, student, teacher, options):
    """A comparison of groups `[C]` by its name."""
    return compare_groups(bound(name, options), student, teacher, overlap(options))
