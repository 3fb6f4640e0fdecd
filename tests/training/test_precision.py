"""Weights that rounding to bfloat16 keeps where they are, and those that are rounded at random."""

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from run_files import metrics, summary
from safetensors.numpy import load_file
from transformers import TrainerCallback

from gold_jax import SFTConfig, SFTTrainer
from gold_jax.training.optimizer import make_optimizer, make_schedule, stochastic_round
from gold_jax.training.precision import describe_unmoved, share_out_of_reach

ROWS = [{"prompt": f"{n}", "completion": f" {n + 1}"} for n in range(8)]


class StopsAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


def narrow(x):
    return np.float32(x).astype(ml_dtypes.bfloat16)


@pytest.mark.parametrize("distance", [1e-6, 5e-5, 3e-4, 1e-2])
@pytest.mark.parametrize("stored", ["bfloat16", "float32"])
def test_the_share_out_of_reach_is_that_of_weights_which_round_alike_on_both_sides(distance, stored):
    weights = np.random.default_rng(0).normal(0, 0.05, 20_000)
    weights = narrow(weights).astype(np.float32) if stored == "bfloat16" else np.float32(weights)
    weights[::10] = 0  # which every change moves
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


def test_of_a_long_run_so_few_learning_rates_are_added_up_as_fit_into_memory():
    params = {"query": jnp.full((4, 4), 0.05)}
    for steps in (1, 10_001, 2**31 - 1):
        rate = 1e-5 / steps
        schedule = make_schedule(SFTConfig(learning_rate=rate, lr_scheduler_type="linear", warmup_steps=0), steps)
        said = describe_unmoved(params, schedule, steps)
        assert "100% of the weights" in said and ("add up to 1e-05" if steps == 1 else "add up to 5e-06") in said


def neighbours(x):
    """The numbers of bfloat16 next to float32 `x`, towards zero and away from it, by ml_dtypes."""
    near = narrow(x)
    away = np.nextafter(near, np.copysign(ml_dtypes.bfloat16(np.inf), near))
    inward = np.where(np.abs(near.astype(np.float64)) > np.abs(x), np.nextafter(near, ml_dtypes.bfloat16(0)), near)
    away = np.where(inward == near, away, near)
    return inward.astype(np.float32), away.astype(np.float32)


@pytest.mark.parametrize("share", [0.01, 0.25, 0.5, 0.9])
def test_numbers_are_rounded_to_a_neighbour_in_proportion_to_how_near_it_is(share):
    rng = np.random.default_rng(1)
    grid = narrow(rng.normal(0, 0.05, 200_000)).astype(np.float32)
    grid = grid[np.abs(grid) > 1e-30]
    _, next_to = neighbours(grid)
    x = np.float32(grid + share * (next_to - grid) * rng.uniform(0.999, 1.001, grid.size))
    inward, away = neighbours(x)
    found = np.asarray(stochastic_round(jnp.asarray(x)))
    assert ((found == inward) | (found == away)).all()
    assert (found == away).mean() == pytest.approx(share, abs=4 * np.sqrt(share * (1 - share) / x.size) + 1e-3)


def test_numbers_of_bfloat16_stay_and_equal_ones_are_rounded_alike():
    x = np.random.default_rng(2).normal(0, 1, 5_000)
    grid = np.concatenate([narrow(x).astype(np.float32), np.float32([0.0, -0.0, np.inf, -np.inf])])
    np.testing.assert_array_equal(stochastic_round(jnp.asarray(grid)), grid)
    x = np.float32(x)
    chex.assert_trees_all_equal(stochastic_round(jnp.asarray(x)), jax.jit(stochastic_round)(jnp.asarray(x[::-1]))[::-1])


def test_masters_move_as_parameters_without_rounding_do_and_what_is_computed_with_follows():
    rng, start = np.random.default_rng(3), np.random.default_rng(4)
    params = {"query": narrow(start.normal(0, 0.05, (64, 64))).astype(np.float32), "norm": np.ones(64, np.float32)}
    params["query_bias"] = narrow(start.normal(0, 0.05, 64)).astype(np.float32)
    settings = SFTConfig(learning_rate=2e-6, lr_scheduler_type="constant", weight_decay=0.1)
    plain, rounding = (make_optimizer(settings, 20, stochastic_rounding=on) for on in (False, True))
    ends = {}
    gradients = [jax.tree.map(lambda x: np.float32(rng.normal(1, 1, x.shape)), params) for _ in range(20)]
    for name, optimizer in (("plain", plain), ("rounding", rounding)):
        state, now = optimizer.init(params), jax.tree.map(jnp.asarray, params)
        for gradient in gradients:
            updates, state = jax.jit(optimizer.update)(gradient, state, now)
            now = optax.apply_updates(now, updates)
        ends[name] = now
    # Weight decay takes the masters, not the rounded parameters.
    chex.assert_trees_all_close(state.masters, ends["plain"], rtol=1e-6)
    for name in ("query", "query_bias"):  # a bias is rounded where it is added
        np.testing.assert_array_equal(ends["rounding"][name], stochastic_round(state.masters[name]))
    np.testing.assert_array_equal(ends["rounding"]["norm"], state.masters["norm"])
    moved, wanted = (float((end["query"] - params["query"]).mean()) for end in (ends["rounding"], ends["plain"]))
    assert moved == pytest.approx(wanted, rel=0.2) and wanted < -2e-5
    assert (
        narrow(ends["plain"]["query"]) == narrow(params["query"])
    ).mean() > 0.6  # which rounding to the nearest leaves


def test_a_run_with_rounded_weights_saves_them_and_resumes_exactly(world, tmp_path):
    given = dict(
        bf16=True, bf16_stochastic_round=True, learning_rate=1e-5, logging_steps=1, save_steps=2, save_strategy="steps"
    )
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    SFTTrainer(str(world / "student"), SFTConfig(output_dir=whole, max_steps=4, **given), ROWS).train()
    assert not [x for x in summary(whole)["notices"] if "bfloat16" in x]
    halfway = SFTConfig(output_dir=parts, max_steps=4, **given)
    SFTTrainer(str(world / "student"), halfway, ROWS, callbacks=[StopsAt(2)]).train()
    SFTTrainer(str(world / "student"), halfway, ROWS).train(resume_from_checkpoint=True)
    ends = [load_file(folder / "model.safetensors") for folder in (whole, parts)]
    chex.assert_trees_all_equal(*ends)
    assert [row["loss"] for row in metrics(whole)] == [row["loss"] for row in metrics(parts)]
    begun = load_file(world / "student" / "model.safetensors")
    for name, value in ends[0].items():
        if "norm" not in name:
            np.testing.assert_array_equal(value, narrow(value).astype(np.float32), err_msg=name)
            assert (value != begun[name]).any()


def test_a_checkpoint_with_or_without_masters_is_refused_by_the_flag_s_name(world, tmp_path):
    def resumes(folder, **changed):
        begun = SFTConfig(output_dir=tmp_path / folder, max_steps=1, save_steps=1, save_strategy="steps", bf16=True)
        begun = begun.replace(bf16_stochastic_round=folder == "with")
        SFTTrainer(str(world / "student"), begun, ROWS).train()
        SFTTrainer(str(world / "student"), begun.replace(max_steps=2, **changed), ROWS).train(
            resume_from_checkpoint=True
        )

    with pytest.raises(ValueError, match="--bf16_stochastic_round is True and was False"):
        resumes("without", bf16_stochastic_round=True)
    with pytest.raises(ValueError, match="--bf16_stochastic_round is without effect and was True"):
        resumes("with", bf16=False)


def test_rounding_weights_where_float32_is_computed_in_is_said_to_do_nothing(world, tmp_path):
    settings = SFTConfig(output_dir=tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
    SFTTrainer(str(world / "student"), settings.replace(bf16_stochastic_round=True), ROWS).train()
    assert any("--bf16_stochastic_round: no effect" in x for x in summary(tmp_path)["notices"])
    for named in (True, False):  # so it may come and go
        settings = settings.replace(bf16_stochastic_round=named, max_steps=settings.max_steps + 1)
        SFTTrainer(str(world / "student"), settings, ROWS).train(resume_from_checkpoint=True)
