"""Completions of several updates that are drawn together: the same draws, importance weights, and what a checkpoint keeps."""

import shutil
import types

import jax
import numpy as np
import optax
import pytest
from rollout.fake_server import serving
from run_files import completions
from training.small import SPECS, V, batches, built, decoder, drawn
from training.test_resume import gold, held, same

from gold_jax import GOLDConfig
from gold_jax.losses.importance import ImportanceSampling
from gold_jax.models.functional import count, split
from gold_jax.rollout.client import ServerError
from gold_jax.rollout.engine import Sampled
from gold_jax.rollout.sampler import bytes_per_row
from gold_jax.text.process_shard import ProcessShard
from gold_jax.training import build
from gold_jax.training.batches import DistillationBatchBuilder
from gold_jax.training.checkpointing import BadCheckpoint, read_metadata, read_rollouts
from gold_jax.training.resume import check_run
from gold_jax.training.rollout_buffer import Rollout, from_bytes, to_bytes

pytestmark = pytest.mark.usefixtures("own_cache")
FLAGS = dict(max_steps=5, logging_steps=1, save_strategy="no", gradient_accumulation_steps=2, num_generations=2)
WEIGHTS = "importance_sampling_ratio", "importance_sampling_truncated", "importance_sampling_logp_difference"


def differences(trainer):
    """Of each update, whether another student than that of now drew its completions."""
    return [row["importance_sampling_logp_difference"] > 0 for row in trainer.log_history if "loss" in row]


@pytest.mark.parametrize(
    "changes", [{}, {"seq_kd": True, "rollout_quantization": "int8"}], ids=["data", "seq_kd, int8"]
)
def test_a_student_that_does_not_move_learns_what_it_learns_when_every_update_draws(changes, world, tmp_path):
    flags = FLAGS | {"learning_rate": 0.0, "log_completions": True, "log_completions_steps": 100} | changes
    found = []
    for together in (1, 3):
        trainer = gold(world, tmp_path / str(together), rollout_batches=together, generation_batch_size=3, **flags)
        trainer.train()
        found.append([row for row in trainer.log_history if "loss" in row])
    assert completions(tmp_path / "1") == completions(tmp_path / "3")
    rounded = "rollout_quantization" in changes
    for step, (one, other) in enumerate(zip(*found, strict=True)):
        assert not set(WEIGHTS) & set(one) and one["on_policy"] == other["on_policy"]
        if rounded and step % 3:  # what was drawn from rounded matrices is weighted by what they gave it
            assert other["importance_sampling_logp_difference"] > 1e-4 or not other["on_policy"]
            continue
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-5)
        assert [other[name] for name in WEIGHTS] == pytest.approx([1, 0, 0], abs=1e-5)
    assert {row["on_policy"] for row in found[0]} > {0.5}


def test_a_run_that_stops_between_draws_goes_on_with_what_is_drawn(world, tmp_path):
    flags = FLAGS | {"lmbda": 1.0, "rollout_batches": 3, "save_strategy": "steps", "save_steps": 1}
    whole = gold(world, tmp_path / "whole", **flags)
    whole.train()
    assert differences(whole) == [False, True, True, False, True]
    kept = {}
    for step in (1, 2, 3, 4):
        folder = tmp_path / "whole" / f"checkpoint-{step}"
        kept[step] = [*read_rollouts(folder, read_metadata(folder))]
        again = gold(world, tmp_path / str(step), **flags)
        again.train(str(folder))
        assert same(held(again), held(whole)), step
    assert kept == {1: [1, 2], 2: [2], 3: [], 4: [4]}
    newest = tmp_path / "whole" / "checkpoint-4"
    (newest / "rollouts.npz").write_bytes(b"damaged")
    with pytest.raises(BadCheckpoint, match="rollouts.npz differs from what was saved"):
        read_rollouts(newest, read_metadata(newest))
    shutil.rmtree(tmp_path / "whole" / "checkpoint-5")  # of the end of the run
    last = gold(world, tmp_path / "whole", **flags)
    last.train("latest")
    assert "checkpoint-4 is incomplete or damaged: rollouts.npz differs" in last.console.export_text()
    assert same(held(last), held(whole))


def test_another_number_of_updates_drawn_together_goes_on_with_no_checkpoint():
    with pytest.raises(ValueError, match="--rollout_batches is 3 and was 1"):
        check_run({"rollout_batches": 1}, {"rollout_batches": 3}, "checkpoint-2")


def test_rollouts_are_read_as_they_were_written():
    drawn = [Rollout(np.arange(n, dtype=np.int32), np.linspace(-1, 0, n, dtype=np.float32)) for n in (3, 0, 5)]
    for rollouts in ({4: drawn[:2], 5: [], 6: drawn[2:]}, {7: []}):
        found = from_bytes(to_bytes(rollouts))
        assert found.keys() == rollouts.keys()
        for ours, theirs in zip(rollouts.values(), found.values()):
            assert all(same(a, b) for a, b in zip(ours, theirs, strict=True))


def test_a_batch_that_tells_nothing_of_its_draws_has_the_program_of_a_run_without_weights():
    spec = SPECS[0]
    (batch,), weights = batches(spec, 8), ImportanceSampling(0.9, 2.0)

    def lowered(importance):
        objective, params, constants = built(spec, importance=importance)
        given = params, constants, objective.with_teacher(constants, batch)
        return jax.jit(objective.loss).lower(*given).as_text()

    assert lowered(None) == lowered(weights)


def test_micro_batches_with_importance_weights_add_up():
    spec = SPECS[-1]  # cross-entropy too
    objective, params, constants = built(spec, importance=ImportanceSampling(0.9, 1.5))
    gradient, told, found = jax.jit(jax.value_and_grad(objective.loss, has_aux=True)), drawn(8), []
    for size in (8, 2):
        made = [objective.with_teacher(constants, batch) for batch in batches(spec, size, drawn=told)]
        gradients = [gradient(params, constants, batch) for batch in made]
        found.append(jax.tree.map(lambda *x: np.sum(x, axis=0), *gradients))
    assert found[0][0][1]["importance_sampling_ratio"] != pytest.approx(1, abs=1e-3)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *found)


def server_flags(url, **changes):
    told = {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": url, "lmbda": 1.0, "rollout_batches": 2}
    return FLAGS | told | {"max_steps": 2} | changes


def test_a_server_draws_for_several_updates_and_tells_what_the_weights_need(world, tmp_path):
    with serving(world / "student") as fake:
        trainer = gold(world, tmp_path / "out", **server_flags(fake.url, temperature=1.0, top_p=1.0))
        trainer.train()
        assert sum(path == "/collective_rpc" for path in fake.drawn()) == 1
    assert differences(trainer) == [False, True]
    assert trainer.log_history[0]["sampling_logp_difference"] < 1e-4


def test_a_server_at_another_temperature_is_refused_unless_nothing_is_weighted():
    given = dict(use_vllm=True, vllm_mode="server", rollout_batches=2, output_dir="x")
    with pytest.raises(ValueError, match="--temperature 0.9; a server tells .* use --temperature 1, or --rollout_imp"):
        GOLDConfig(**given)
    assert GOLDConfig(**given, rollout_importance_cap=0).rollout_importance_cap == 0
    with pytest.raises(ValueError, match="--rollout_importance_cap is 0.5; it must be 0 or at least 1"):
        GOLDConfig(output_dir="x", rollout_importance_cap=0.5)


def test_a_server_that_does_not_tell_what_the_weights_need_is_named():
    url = types.SimpleNamespace(client=types.SimpleNamespace(base_url="http://there"))
    builder = types.SimpleNamespace(importance_weights=True, engine=url)
    known, unknown = np.array([-1, np.nan], np.float32), np.array([np.nan, -1], np.float32)
    told = DistillationBatchBuilder._logprobs(
        builder, Sampled(np.arange(2), known)
    )  # that of a stop token may be missing
    np.testing.assert_array_equal(told, known)
    with pytest.raises(ServerError, match="http://there does not tell .* --rollout_importance_cap 0 goes without them"):
        DistillationBatchBuilder._logprobs(builder, Sampled(np.arange(2), unknown))


def test_nothing_is_weighted_where_the_cap_is_0(world, tmp_path):
    trainer = gold(world, tmp_path / "out", **FLAGS | {"lmbda": 1.0, "rollout_batches": 2, "rollout_importance_cap": 0})
    rows, builder, params = trainer.train_examples[:2], trainer.loop.run.batches, trainer.loop.state.params
    first = builder.build(0, rows, params, (), {}, {1: rows})
    later = builder.build(1, rows, params, (), first.drawn)
    assert all(batch.behavior is None for batch in (*first.batches, *later.batches))
    assert [*first.drawn] == [1] and not later.drawn and len(later.samples) == 4


def test_rows_at_once_follow_the_fullest_device_of_all_processes(monkeypatch):
    model, args = decoder(V, 1), GOLDConfig(output_dir="x")
    params, shard = split(model)[1], ProcessShard.single_process(2)
    each = bytes_per_row(model.config, 4, None, args.prompt_budget, args.max_completion_length)
    kept = 3 * 4 * count(params) + 8  # AdamW's state, and the weights to decode with
    device = types.SimpleNamespace(
        memory_stats=lambda: {"bytes_limit": 7 * kept + 256 * each, "bytes_in_use": 6 * kept}
    )
    full = types.SimpleNamespace(memory_stats=lambda: {"bytes_limit": 2 * kept, "bytes_in_use": kept})

    def rows(*devices, shard=shard):
        monkeypatch.setattr(jax, "local_devices", lambda: devices)
        return build._rows_at_once(args, [model], optax.adamw(0.1), params, None, shard)

    assert rows(device) == rows(device, device) == 2 * 128
    assert rows(device, full) == rows(types.SimpleNamespace(memory_stats=lambda: None)) == 2 * 32
    assert rows(device, shard=shard._replace(all_reduce_max=lambda x: np.maximum(x, -128 * each))) == 2 * 64
