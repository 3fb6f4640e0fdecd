"""Weights that rounding to bfloat16 keeps where they are."""

import ml_dtypes
import numpy as np
import pytest
from run_files import summary

from gold_jax import SFTConfig, SFTTrainer
from gold_jax.training.precision import share_out_of_reach

ROWS = [{"prompt": f"{n}", "completion": f" {n + 1}"} for n in range(8)]


def narrow(x):
    return np.float32(x).astype(ml_dtypes.bfloat16)


@pytest.mark.parametrize("distance", [1e-6, 5e-5, 3e-4, 1e-2])
@pytest.mark.parametrize("stored", ["bfloat16", "float32"])
def test_the_share_out_of_reach_is_that_of_weights_which_round_alike_on_both_sides(distance, stored):
    import jax.numpy as jnp

    weights = np.random.default_rng(0).normal(0, 0.05, 20_000)
    weights = narrow(weights).astype(np.float32) if stored == "bfloat16" else np.float32(weights)
    stays = (narrow(weights + distance) == narrow(weights)) & (narrow(weights - distance) == narrow(weights))
    params = {"query": jnp.asarray(weights.reshape(100, 200)), "norm": jnp.ones(50_000)}
    # On the lower side of a power of two a step is half as long, which is not counted.
    assert share_out_of_reach(params, distance) == pytest.approx(stays.mean(), abs=0.01)


@pytest.mark.parametrize("settings, said", [({}, True), ({"learning_rate": 1e-2}, False), ({"bf16": False}, False)])
def test_a_run_in_bfloat16_whose_learning_rates_are_rounded_away_says_so(world, tmp_path, settings, said):
    given = dict(output_dir=tmp_path, max_steps=2, learning_rate=1e-6, bf16=True) | settings
    SFTTrainer(str(world / "student"), SFTConfig(**given), ROWS).train()
    notices = [x for x in summary(tmp_path)["notices"] if "bfloat16 rounds" in x]
    assert len(notices) == said
    assert not said or "add up to 1.5e-06" in notices[0]
