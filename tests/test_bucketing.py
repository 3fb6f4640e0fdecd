import numpy as np
import pytest

from gold_jax.bucketing import ShapeSet, bucket, fine_bucket, power_of_two


def test_buckets_are_few_and_waste_at_most_a_third():
    sizes = sorted({bucket(n) for n in range(1, 5000)})
    assert sizes[:6] == [32, 48, 64, 96, 128, 192] and len(sizes) == 16
    assert all(bucket(n) >= n and (n < 32 or bucket(n) < n * 1.5) for n in range(1, 5000))


def test_sizes_of_lines_are_few_and_waste_at_most_a_quarter():
    sizes = sorted({fine_bucket(n) for n in range(1, 5000)})
    assert sizes[:7] == [32, 40, 48, 56, 64, 80, 96] and len(sizes) == 30
    assert all(n <= fine_bucket(n) < max(33, n * 1.25) for n in range(1, 5000))


def test_powers_of_two_hold_what_is_asked_of_them():
    assert [power_of_two(n) for n in (1, 2, 3, 64, 65)] == [1, 2, 4, 64, 128]
    assert [power_of_two(n, smallest=32) for n in (0, 1, 32, 33)] == [32, 32, 32, 64]


def ragged_lengths(rows, seed, updates=3000, longest=1024):
    """Longest row and sum, of student and teacher, of updates over very ragged rows: `[updates, 4]`."""
    rng = np.random.default_rng(seed)
    prompt, answer = rng.lognormal(np.log(60), 1.2, (updates, rows)), rng.lognormal(np.log(100), 1.2, (updates, rows))
    ours = np.minimum(prompt + np.minimum(answer, 512) + 10, longest).astype(int)
    theirs = (ours * rng.normal(1.08, 0.07, ours.shape)).astype(int) + 12
    return np.stack([ours.max(1), ours.sum(1), theirs.max(1), theirs.sum(1)], 1)


@pytest.mark.parametrize("rows", [1, 4, 32])
@pytest.mark.parametrize("seed", range(3))
def test_ragged_lengths_take_about_a_dozen_shapes_and_few_come_late(rows, seed):
    lengths, shapes = ragged_lengths(rows, seed), ShapeSet(12)
    padded = np.array([shapes.fit(row.tolist(), rows) for row in lengths])
    own = {tuple(f(n) for f, n in zip([bucket, fine_bucket] * 2, row)) for row in lengths.tolist()}
    assert len(shapes.shapes) == len(set(map(tuple, padded.tolist()))) <= 17 and len(own) > 35
    assert len({*map(tuple, padded[1500:].tolist())} - {*map(tuple, padded[:1500].tolist())}) <= 1
    assert (padded >= lengths).all() and padded[:, [1, 3]].sum() < 1.5 * lengths[:, [1, 3]].sum()


def test_a_shape_is_a_pure_function_of_those_before_it():
    lengths, whole = ragged_lengths(4, 3, updates=200).tolist(), ShapeSet(12)
    expected = [whole.fit(row, 4) for row in lengths]
    first = ShapeSet(12)
    assert [first.fit(row, 4) for row in lengths[:20]] == expected[:20]
    second = ShapeSet(12, [list(shape) for shape in first.shapes])  # as a checkpoint's JSON has them
    assert [second.fit(row, 4) for row in lengths[20:]] == expected[20:]


def test_one_shape_grows_until_it_holds_everything():
    shapes = ShapeSet(1)
    assert shapes.fit([100, 100], 1) == (128, 112) and shapes.fit([40, 40], 1) == (128, 112)
    assert shapes.fit([50, 300], 1) == (128, 320) and shapes.fit([200, 40], 1) == (256, 320)
