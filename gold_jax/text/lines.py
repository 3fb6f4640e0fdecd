"""Rows of tokens laid end to end in lines, what they begin with in common once, and the padding of shapes.

Almost everything a decoder does to a token it does to that token alone, so tokens may stand anywhere. Only attention needs
rows, and finds them by number. A line holds no padding but at its end; and a beginning that rows share, such as the system
message of a template or a prompt that is answered several times, is read once: its hidden states are the same in
every row, and the gradients of all rows add up in them. Letters: `B` rows, `T` tokens of a row, `S` lines of `N` tokens
and `R = B / S` rows each. Everything here is numpy.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from gold_jax.sizes import bucket, line_bucket


class Lines(NamedTuple):
    """The tokens of a batch, one line for each device that shares it."""

    tokens: np.ndarray  # [S, N] int32
    place: np.ndarray  # [S, R, T] int32, where in the line a row's tokens stand; 0 behind a row's end
    owner: np.ndarray  # [S, N] int32, the first of a line's slots `R·T` that a token stands for; 0 for padding
    mask: np.ndarray  # [S, R, T] bool, true where there is a token


class Laid(NamedTuple):
    """Rows that are laid out and not yet padded.

    Attributes:
      lines: of each line its tokens, and where in it those of each row stand.
      height: `R`.
    """

    lines: list[tuple[np.ndarray, list[np.ndarray]]]
    height: int

    @property
    def sizes(self) -> tuple[int, int]:
        """Tokens of the longest row, and of the longest line."""
        longest = max((len(w) for _, where in self.lines for w in where), default=0)
        return longest, max(len(tokens) for tokens, _ in self.lines)


def lay_lines(rows: Sequence[np.ndarray], batch_size: int, lines: int = 1) -> Laid:
    """Lays rows out, as many to a line as `batch_size / lines`; arguments as `pack_lines`."""
    if batch_size % lines:
        raise ValueError(f"{batch_size} rows cannot be shared out evenly among {lines} devices")
    height = batch_size // lines
    return Laid([_lay(rows[k * height : (k + 1) * height]) for k in range(lines)], height)


def pad_lines(laid: Laid, longest_row: int, longest_line: int, *, pad: int = 0) -> Lines:
    """Pads what is laid out to the buckets that hold rows and lines of these lengths."""
    width, length, count = bucket(longest_row), line_bucket(longest_line), len(laid.lines)
    place = np.stack([pad_right(where, laid.height, width, np.int32) for _, where in laid.lines])
    sizes = [[len(w) for w in where] + [0] * (laid.height - len(where)) for _, where in laid.lines]
    mask = np.arange(width) < np.array(sizes)[..., None]
    owner = np.zeros((count, length), np.int32)
    slots = np.arange(laid.height * width, dtype=np.int32)
    for k in range(count):
        there = mask[k].reshape(-1)
        # From the last slot to the first, so that the first is what stays.
        owner[k, place[k].reshape(-1)[there][::-1]] = slots[there][::-1]
    return Lines(pad_right([tokens for tokens, _ in laid.lines], count, length, np.int32, pad), place, owner, mask)


def pack_lines(rows: Sequence[np.ndarray], batch_size: int, lines: int = 1, *, pad: int = 0) -> Lines:
    """Rows in lines, as many to a line as `batch_size / lines`; rows that lack are empty.

    Args:
      rows: int32 `[T]` each, at most `batch_size` of them.
      batch_size: `B`.
      lines: `S`.
      pad: the token to fill lines up with.

    Raises:
      ValueError: `lines` does not divide `batch_size`.
    """
    laid = lay_lines(rows, batch_size, lines)
    return pad_lines(laid, *laid.sizes, pad=pad)


def _lay(rows: Sequence[np.ndarray]) -> tuple[np.ndarray, list[np.ndarray]]:
    """The tokens of a line, and where in it those of every row stand.

    In lexicographic order a row shares its longest beginning with the row before it.
    """
    parts, where, size = [np.zeros(0, np.int32)], [np.zeros(0, np.int32)] * len(rows), 0
    before, stood = parts[0], parts[0]
    for i in sorted(range(len(rows)), key=lambda i: np.asarray(rows[i], ">i4").tobytes()):
        row = np.asarray(rows[i], np.int32)
        both = min(len(row), len(before))
        differ = np.flatnonzero(row[:both] != before[:both])
        shared = int(differ[0]) if differ.size else both
        where[i] = np.concatenate([stood[:shared], np.arange(size, size + len(row) - shared, dtype=np.int32)])
        parts.append(row[shared:])
        size += len(row) - shared
        before, stood = row, where[i]
    return np.concatenate(parts), where


def positions(lines: Lines) -> np.ndarray:
    """Where in its line each token of a row stands: int32 `[B, T]`; behind a row's end any."""
    return lines.place.reshape(-1, lines.place.shape[-1])


def pad_right(rows: Sequence[np.ndarray], height: int, width: int, dtype, fill=0) -> np.ndarray:
    """Ragged rows as one array `[height, width]`, filled up behind each row and below the last."""
    out = np.full((height, width), fill, dtype)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out
