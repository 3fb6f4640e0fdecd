from gold_jax.bucketing import bucket, fine_bucket, power_of_two


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
