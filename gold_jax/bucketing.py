"""Sizes that ragged things are padded to: few enough that programs are few, close enough that little is wasted."""

from collections.abc import Iterable, Sequence

_LITTLE_PADDING = 1.15  # a shape that costs up to this many times a batch's own is used in its place


def bucket(length: int, *, smallest: int = 32) -> int:
    """The smallest of 32, 48, 64, 96, 128, 192, … that holds `length`: at most a third is padding, shapes stay few."""
    size = smallest
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size


def fine_bucket(length: int, *, smallest: int = 32) -> int:
    """The smallest of 32, 40, 48, 56, 64, 80, 96, … (four to an octave) that holds `length`: a tenth is padding on average."""
    octave = max(smallest, power_of_two(length) // 2)
    return next(size for size in range(octave, 2 * octave + 1, octave // 4) if size >= length)


def power_of_two(length: int, *, smallest: int = 1) -> int:
    """The smallest power of two, from `smallest` on, that holds `length`."""
    return max(smallest, 1 << max(0, length - 1).bit_length())


class ShapeSet:
    """The padded shapes of a run's batches, about `limit` of them, since each is compiled.

    A batch has up to four ragged lengths, whose buckets multiply. While there are fewer than three quarters of `limit`
    shapes, a batch that none of them holds with little padding gets buckets of its own. From then on it gets the
    cheapest that holds it, and where none does, one that holds all before it too, so that few more can follow.
    """

    def __init__(self, limit: int, shapes: Iterable[Sequence[int]] = ()):
        self.limit, self.shapes = limit, [tuple(shape) for shape in shapes]

    def fit(self, lengths: Sequence[int], rows: int) -> tuple[int, ...]:
        """Buckets for the longest row and the longest packed sequence of each side, `rows` rows to a sequence."""
        own = tuple(
            size(length) for size, length in zip([bucket, fine_bucket] * (len(lengths) // 2), lengths, strict=True)
        )

        def cost(shape: Sequence[int]) -> int:
            return rows * sum(shape[::2]) + sum(shape[1::2])

        holding = [s for s in self.shapes if all(have >= need for have, need in zip(s, own, strict=True))]
        best, few = min(holding, key=cost, default=None), 4 * len(self.shapes) < 3 * self.limit
        if best is None or few and cost(best) > _LITTLE_PADDING * cost(own):
            best = own if few else tuple(map(max, own, *self.shapes))
            self.shapes.append(best)
        return best
