"""Sequence packing: the rows of a batch end to end in a few sequences, shared prefixes stored once, shapes padded to buckets.

Everything but attention treats a decoder's tokens one by one, whatever their order; attention alone needs rows, and
gathers them by `gather_index`. So padding stands only at the end of a packed sequence, and a prefix that rows share (a
template's system message, a prompt sampled several times) is computed once: its hidden states are the same in every row
that begins with it, and the gradients of these rows add up in them. (Where a model rotates long rows by other angles, they
share nothing with short ones.)

Shapes: B rows, T tokens of a row; S packed sequences (one per device that shares the batch) of N tokens and R = B / S
rows each. Numpy only.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from gold_jax.bucketing import bucket, fine_bucket


class PackedBatch(NamedTuple):
    """The tokens of a batch, in one packed sequence per device that shares it."""

    tokens: np.ndarray  # [S, N] int32
    gather_index: np.ndarray  # [S, R, T] int32, index into its sequence of each token of a row; 0 behind a row's end
    first_slot: np.ndarray  # [S, N] int32, the first of its R·T row slots that holds the token; 0 for padding
    mask: np.ndarray  # [S, R, T] bool, true where there is a token

    def stored(self) -> int:
        """Tokens of the packed sequences without padding."""
        return int(np.where(self.mask, self.gather_index, -1).max((1, 2), initial=-1).sum() + len(self.tokens))


class UnpaddedBatch(NamedTuple):
    """Packed rows whose sequences are not yet padded."""

    sequences: list[tuple[np.ndarray, list[np.ndarray]]]  # tokens, and the indices into them of each row's tokens
    rows_per_sequence: int  # R

    @property
    def longest(self) -> tuple[int, int]:
        """Tokens of the longest row, and of the longest sequence."""
        longest = max((len(w) for _, index in self.sequences for w in index), default=0)
        return longest, max(len(tokens) for tokens, _ in self.sequences)


def pack_unpadded(
    rows: Sequence[np.ndarray], batch_size: int, num_sequences: int = 1, short_length: int | None = None
) -> UnpaddedBatch:
    """Packs rows, `batch_size / num_sequences` per sequence, without padding; arguments as `pack`."""
    if batch_size % num_sequences:
        raise ValueError(f"{batch_size} rows cannot be split evenly over {num_sequences} devices")
    size = batch_size // num_sequences
    parts = [rows[k * size : (k + 1) * size] for k in range(num_sequences)]
    return UnpaddedBatch([_deduplicate_prefixes(part, short_length) for part in parts], size)


def pad_packed(unpadded: UnpaddedBatch, longest_row: int, longest_sequence: int, *, pad: int = 0) -> PackedBatch:
    """Pads rows and sequences to the buckets that hold these lengths, so that shapes, and compilations, stay few."""
    width, length, height = bucket(longest_row), fine_bucket(longest_sequence), unpadded.rows_per_sequence
    tokens, indices = zip(*unpadded.sequences)
    gather_index = np.stack([pad_right(index, height, width, np.int32) for index in indices])
    sizes = [[len(w) for w in index] + [0] * (height - len(index)) for index in indices]
    mask = np.arange(width) < np.array(sizes)[..., None]
    first_slot = np.zeros((len(tokens), length), np.int32)
    slots = np.arange(height * width, dtype=np.int32)
    for k, first in enumerate(first_slot):
        valid = mask[k].reshape(-1)
        # Assigned from the last slot to the first: where several slots hold one token, the first is what remains.
        first[gather_index[k].reshape(-1)[valid][::-1]] = slots[valid][::-1]
    return PackedBatch(pad_right(tokens, len(tokens), length, np.int32, pad), gather_index, first_slot, mask)


def pack(
    rows: Sequence[np.ndarray],
    batch_size: int,
    num_sequences: int = 1,
    *,
    pad: int = 0,
    short_length: int | None = None,
) -> PackedBatch:
    """Packs `B = batch_size` rows, int32 `[T]` each, `B / S` per sequence with `S = num_sequences`; missing ones are empty.

    `short_length` is the model's (`DecoderConfig.max_decode_length`): longer rows share no prefix with those of up to so many tokens.
    ValueError where `num_sequences` does not divide `batch_size`.
    """
    unpadded = pack_unpadded(rows, batch_size, num_sequences, short_length)
    return pad_packed(unpadded, *unpadded.longest, pad=pad)


def _deduplicate_prefixes(rows: Sequence[np.ndarray], short_length: int | None) -> tuple[np.ndarray, list[np.ndarray]]:
    """The tokens of one packed sequence, and for every row the indices of its tokens in it.

    In lexicographic order a row's longest prefix shared with any earlier row is the one it shares with its predecessor.
    """
    parts, index, size = [np.zeros(0, np.int32)], [np.zeros(0, np.int32)] * len(rows), 0
    previous_row, previous_index = parts[0], parts[0]
    most = math.inf if short_length is None else short_length
    for i in sorted(range(len(rows)), key=lambda i: (len(rows[i]) > most, np.asarray(rows[i], ">i4").tobytes())):
        row = np.asarray(rows[i], np.int32)
        if len(previous_row) <= most < len(row):  # the first of the long ones
            previous_row = row[:0]
        overlap = min(len(row), len(previous_row))
        differing = np.flatnonzero(row[:overlap] != previous_row[:overlap])
        shared = int(differing[0]) if differing.size else overlap
        index[i] = np.concatenate([previous_index[:shared], np.arange(size, size + len(row) - shared, dtype=np.int32)])
        parts.append(row[shared:])
        size += len(row) - shared
        previous_row, previous_index = row, index[i]
    return np.concatenate(parts), index


def gather_positions(packed: PackedBatch) -> np.ndarray:
    """The index into its packed sequence of each token of a row: int32 `[B, T]`; arbitrary behind a row's end."""
    return packed.gather_index.reshape(-1, packed.gather_index.shape[-1])


def pad_right(rows: Sequence[np.ndarray], height: int, width: int, dtype, fill=0) -> np.ndarray:
    """Ragged rows as one array `[height, width]`, padded behind each row and below the last."""
    out = np.full((height, width), fill, dtype)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out
