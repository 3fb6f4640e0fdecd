"""Batches whose hidden states come row by row, `[B, T, D]`, as references make them."""

import numpy as np


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
