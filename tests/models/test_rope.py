import jax.numpy as jnp
import numpy as np
import pytest

from gold_jax.models.rope import Rope, rotate

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def read(parameters: dict, head_dim: int = 64, max_length: int = 4096) -> Rope:
    return Rope.from_parameters(parameters, head_dim, max_length=max_length, where="test")


def test_llama3_keeps_short_waves_and_stretches_long_ones():
    plain = read({"rope_theta": 500000.0}).inverse_frequencies(64)
    scaled = read(LLAMA3).inverse_frequencies(64)
    waves = 2 * np.pi / plain
    np.testing.assert_array_equal(scaled[waves < 8192 / 4], plain[waves < 8192 / 4])
    np.testing.assert_allclose(scaled[waves > 8192], plain[waves > 8192] / 32, rtol=1e-6)
    between = (waves > 8192 / 4) & (waves < 8192)
    assert between.any() and ((scaled < plain) & (scaled > plain / 32))[between].all()


def test_linear_scaling_divides_every_frequency():
    plain = read({"rope_theta": 1e4}).inverse_frequencies(32)
    scaled = read({"type": "linear", "factor": 4.0, "rope_theta": 1e4}).inverse_frequencies(32)
    np.testing.assert_allclose(scaled, plain / 4, rtol=1e-6)


def test_yarn_scales_attention_by_its_factor():
    rope = read({"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 64})
    assert rope.attention_factor == pytest.approx(0.1 * np.log(4) + 1)


def test_the_original_length_defaults_to_the_longest_position():
    parameters = {key: value for key, value in LLAMA3.items() if not key.startswith("original")}
    assert read(parameters, max_length=777).original_length == 777


def test_scores_depend_on_the_distance_alone():
    rope = read({"rope_theta": 1e4})
    query, key = np.random.default_rng(0).standard_normal((2, 1, 1, 1, 16)).astype(np.float32)

    def score(query_at, key_at):
        turned = [
            rotate(jnp.asarray(x), *rope.tables(jnp.array([[at]]), 16)) for x, at in ((query, query_at), (key, key_at))
        ]
        return float((turned[0] * turned[1]).sum())

    assert score(9, 4) == pytest.approx(score(105, 100), abs=1e-4)
    assert score(9, 4) != pytest.approx(score(9, 5), abs=1e-2)


def test_a_missing_value_is_named():
    with pytest.raises(ValueError, match="'llama3' needs factor, low_freq_factor"):
        read({"rope_type": "llama3", "rope_theta": 1e4, "high_freq_factor": 4.0})


def test_a_part_of_a_head_is_rotated_and_the_rest_stays():
    head, at = np.random.default_rng(0).standard_normal((1, 1, 1, 16)).astype(np.float32), jnp.array([[5]])
    rope = read({"rope_theta": 1e4, "partial_rotary_factor": 0.75}, 16)
    turned = np.asarray(rotate(jnp.asarray(head), *rope.tables(at, 16)))
    np.testing.assert_array_equal(turned[..., 12:], head[..., 12:])
    whole = rotate(jnp.asarray(head[..., :12]), *read({"rope_theta": 1e4}, 12).tables(at, 12))
    np.testing.assert_array_equal(turned[..., :12], whole)


@pytest.mark.parametrize("partial", [0.0, -1.0, 1.5, 0.6])
def test_a_part_that_is_no_even_number_of_channels_is_refused(partial):
    with pytest.raises(
        ValueError, match=rf"partial_rotary_factor (is {partial}; it must|{partial} rotates .* of 16 channels)"
    ):
        read({"rope_theta": 1e4, "partial_rotary_factor": partial}, 16)


def test_longrope_divides_each_frequency_by_the_factor_for_a_row_s_length():
    parameters = {"type": "longrope", "rope_theta": 1e4, "short_factor": [1.0, 2.0, 4.0], "long_factor": [9.0] * 3}
    rope = read(parameters | {"original_max_position_embeddings": 1024}, 6)
    plain = read({"rope_theta": 1e4}, 6).inverse_frequencies(6)
    np.testing.assert_allclose(rope.inverse_frequencies(6), plain / [1, 2, 4], rtol=1e-6)
    np.testing.assert_allclose(rope.inverse_frequencies(6, long=True), plain / 9, rtol=1e-6)
    assert rope.short_length == 1024 and rope.attention_factor == pytest.approx((1 + np.log(4) / np.log(1024)) ** 0.5)
    with pytest.raises(ValueError, match=r"short_factor is \[1.0, 2.0, 4.0\]; it must be a list of 4 numbers"):
        read(parameters, 8)


@pytest.mark.parametrize("name", ["factor", "attention_factor", "original_max_position_embeddings"])
@pytest.mark.parametrize("value", [0, -1, "x", [1.0], True])
def test_what_is_no_positive_number_is_refused_by_name(name, value):
    parameters = {"type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 2, "long_factor": [9.0] * 2}
    with pytest.raises(ValueError, match=rf"{name} is .*; it must be a number greater than 0"):
        read(parameters | {name: value}, 4)


@pytest.mark.parametrize("factors", [[0.0, 1.0], [1.0, -1.0], [1.0, "a"], [1.0, float("inf")], 5])
def test_factors_of_longrope_that_are_no_positive_numbers_are_refused(factors):
    with pytest.raises(ValueError, match="long_factor is .*; it must be a list of 2 numbers greater than 0"):
        read({"type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 2, "long_factor": factors}, 4)
