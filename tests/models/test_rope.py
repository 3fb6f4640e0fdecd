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


def read(parameters: dict, max_length: int = 4096) -> Rope:
    return Rope.from_parameters(parameters, max_length=max_length, where="test")


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


def test_partial_rotation_is_refused():
    with pytest.raises(ValueError, match="partial_rotary_factor 0.5"):
        read({"rope_theta": 1e4, "partial_rotary_factor": 0.5})
