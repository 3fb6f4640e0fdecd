"""Rows of tokens laid end to end in lines, what they begin with in common once, and the padding of shapes.

Almost everything a decoder does to a token it does to that token alone, so tokens may stand anywhere. Only attention
needs rows, and finds them by number. A line holds no padding but at its end; and a beginning that rows share, such as
the system message of a template or a prompt that is answered several times, is read once: its hidden states are the
same in every row, and the gradients of all rows add up in them. Letters: `B` rows, `T` tokens of a row, `S` lines of
`N` tokens and `R = B / S` rows each. Everything here is numpy.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from gold_jax.bucketing import bucket, fine_bucket


class PackedBatch(NamedTuple):
    """The tokens of a batch, one line for each device that shares it."""

    tokens: np.ndarray  # [S, N] int32
    gather_index: np.ndarray  # [S, R, T] int32, where in the line a row's tokens stand; 0 behind a row's end
    first_slot: np.ndarray  # [S, N] int32, the first of a line's slots `R·T` that a token stands for; 0 for padding
    mask: np.ndarray  # [S, R, T] bool, true where there is a token


class UnpaddedBatch(NamedTuple):
    """Rows that are laid out and not yet padded.

    Attributes:
        sequences: of each line its tokens, and where in it those of each row stand.
        rows_per_sequence: `R`.
    """

    sequences: list[tuple[np.ndarray, list[np.ndarray]]]
    rows_per_sequence: int

    @property
    def longest(self) -> tuple[int, int]:
        """Tokens of the longest row, and of the longest line."""
        longest = max((len(w) for _, index in self.sequences for w in index), default=0)
        return longest, max(len(tokens) for tokens, _ in self.sequences)


def pack_unpadded(rows: Sequence[np.ndarray], batch_size: int, num_sequences: int = 1) -> UnpaddedBatch:
    """Lays rows out, as many to a line as `batch_size / num_sequences`; arguments as `pack`."""
    if batch_size % num_sequences:
        raise ValueError(f"{batch_size} rows cannot be shared out evenly among {num_sequences} devices")
    rows_per_sequence = batch_size // num_sequences
    return UnpaddedBatch(
        [
            _deduplicate_prefixes(rows[k * rows_per_sequence : (k + 1) * rows_per_sequence])
            for k in range(num_sequences)
        ],
        rows_per_sequence,
    )


def pad_packed(unpadded: UnpaddedBatch, longest_row: int, longest_line: int, *, pad: int = 0) -> PackedBatch:
    """Pads what is laid out to the buckets that hold rows and lines of these lengths."""
    width, length, count = bucket(longest_row), fine_bucket(longest_line), len(unpadded.sequences)
    gather_index = np.stack(
        [pad_right(index, unpadded.rows_per_sequence, width, np.int32) for _, index in unpadded.sequences]
    )
    sizes = [
        [len(w) for w in index] + [0] * (unpadded.rows_per_sequence - len(index)) for _, index in unpadded.sequences
    ]
    mask = np.arange(width) < np.array(sizes)[..., None]
    first_slot = np.zeros((count, length), np.int32)
    slots = np.arange(unpadded.rows_per_sequence * width, dtype=np.int32)
    for k in range(count):
        valid = mask[k].reshape(-1)
        # From the last slot to the first, so that the first is what stays.
        first_slot[k, gather_index[k].reshape(-1)[valid][::-1]] = slots[valid][::-1]
    return PackedBatch(
        pad_right([tokens for tokens, _ in unpadded.sequences], count, length, np.int32, pad),
        gather_index,
        first_slot,
        mask,
    )


def pack(rows: Sequence[np.ndarray], batch_size: int, num_sequences: int = 1, *, pad: int = 0) -> PackedBatch:
    """Rows in lines, as many to a line as `batch_size / num_sequences`; rows that lack are empty.

    Args:
        rows: int32 `[T]` each, at most `batch_size` of them.
        batch_size: `B`.
        num_sequences: `S`.
        pad: the token to fill lines up with.

    Raises:
        ValueError: `num_sequences` does not divide `batch_size`.
    """
    unpadded = pack_unpadded(rows, batch_size, num_sequences)
    return pad_packed(unpadded, *unpadded.longest, pad=pad)


def _deduplicate_prefixes(rows: Sequence[np.ndarray]) -> tuple[np.ndarray, list[np.ndarray]]:
    """The tokens of a line, and where in it those of every row stand.

    In lexicographic order a row shares its longest beginning with the row before it.
    """
    parts, index, size = [np.zeros(0, np.int32)], [np.zeros(0, np.int32)] * len(rows), 0
    previous_row, previous_index = parts[0], parts[0]
    for i in sorted(range(len(rows)), key=lambda i: np.asarray(rows[i], ">i4").tobytes()):
        row = np.asarray(rows[i], np.int32)
        overlap = min(len(row), len(previous_row))
        differing = np.flatnonzero(row[:overlap] != previous_row[:overlap])
        shared = int(differing[0]) if differing.size else overlap
        index[i] = np.concatenate([previous_index[:shared], np.arange(size, size + len(row) - shared, dtype=np.int32)])
        parts.append(row[shared:])
        size += len(row) - shared
        previous_row, previous_index = row, index[i]
    return np.concatenate(parts), index


def gather_positions(packed: PackedBatch) -> np.ndarray:
    """Where in its line each token of a row stands: int32 `[B, T]`; behind a row's end any."""
    return packed.gather_index.reshape(-1, packed.gather_index.shape[-1])


def pad_right(rows: Sequence[np.ndarray], height: int, width: int, dtype, fill=0) -> np.ndarray:
    """Ragged rows as one array `[height, width]`, filled up behind each row and below the last."""
    out = np.full((height, width), fill, dtype)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out
