"""Sizes that ragged things are padded to: few enough that programs are few, close enough that little is wasted."""


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
