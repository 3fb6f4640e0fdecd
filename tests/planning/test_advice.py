"""What is advised where a run does not fit, and the meshes and slices that are tried."""

import dataclasses
import math

import pytest

from gold_jax.config import GOLDConfig, SFTConfig
from gold_jax.planning.advice import advice, flags_of, search, times_the_chips
from gold_jax.planning.analytic import estimate
from gold_jax.planning.hardware import read_topology
from gold_jax.planning.models import known_config
from gold_jax.planning.plan import Pair, PlanRequest, link_seconds, meshes
from gold_jax.sharding.axes import mesh_flag

QWENS = Pair(known_config("Qwen/Qwen3-4B"), known_config("Qwen/Qwen3-8B"))


def asked(topology: str, pair: Pair = QWENS, mesh=None, **settings) -> PlanRequest:
    kind = SFTConfig if pair.teacher is None else GOLDConfig
    slice_ = read_topology(topology)
    mesh = {"data": 1, "fsdp": slice_.devices, "tensor": 1} | (mesh or {})
    return PlanRequest(kind(output_dir="x", **settings), pair, slice_, mesh)


def test_meshes_take_all_devices_and_divide_the_heads():
    found = list(meshes(8, QWENS))
    assert all(math.prod(mesh.values()) == 8 for mesh in found)
    assert len({tuple(mesh.values()) for mesh in found}) == len(found) == 4 + 3 + 2 + 1
    odd = dataclasses.replace(QWENS.student, heads=6)
    assert {mesh["tensor"] for mesh in meshes(8, Pair(odd))} == {1, 2}


def test_a_mesh_reads_as_its_flag():
    assert mesh_flag({"data": 1, "fsdp": 4, "tensor": 2}) == "fsdp=4,tensor=2"
    assert mesh_flag({"data": 1, "fsdp": 1, "tensor": 1}) == "auto"


@pytest.mark.parametrize(
    ("name", "factor", "larger"),
    [
        ("v5e:2x2", 2, "v5e:2x4"),
        ("v5e:2x4", 2, "v5e:4x4"),
        ("v5e:1x1", 2, None),
        ("v5e:1x1", 4, "v5e:2x2"),
        ("v5p:2x2x1", 4, "v5p:2x2x4"),
        ("gpu:4xh100-80gb", 2, "gpu:8xh100-80gb"),
        ("gpu:8xh100-80gb", 4, "gpu:32xh100-80gb"),
    ],
)
def test_larger_slices(name, factor, larger):
    found = times_the_chips(read_topology(name), factor)
    assert (found and found.name) == larger
    assert found is None or found.chips == factor * read_topology(name).chips


def test_an_update_keeps_its_rows_when_fewer_are_read_at_once():
    plan = estimate(asked("gpu:8xl4-24gb", Pair(QWENS.teacher), per_device_train_batch_size=8, max_length=4096))
    assert not plan.fits
    flags = [one.flags.split() for one in advice(plan) if one.flags.startswith("--per_device_train_batch_size")]
    for words in flags:
        values = dict(zip(words[::2], words[1::2]))
        rows, passes = (
            int(values[f"--{name}"]) for name in ("per_device_train_batch_size", "gradient_accumulation_steps")
        )
        assert rows * passes == 8
    assert flags


def test_checkpointing_is_advised_only_where_it_is_off():
    def advised(on: bool) -> bool:
        plan = estimate(
            asked("gpu:8xl4-24gb", per_device_train_batch_size=64, max_length=2048, gradient_checkpointing=on)
        )
        return any("--gradient_checkpointing" in one.flags for one in advice(plan))

    assert advised(False) and not advised(True)


def test_where_one_change_is_not_enough_several_are_named():
    plan = estimate(
        asked("gpu:8xa100-80gb", mesh={"data": 8, "fsdp": 1}, per_device_train_batch_size=64, max_length=4096)
    )
    *alone, together = advice(plan)
    gentle = [one for one in alone if "--topology" not in one.flags and "max_new" not in one.flags]
    assert not any(one.fits for one in gentle)
    assert together.fits and ";" in together.why


def test_a_search_compiles_no_more_than_its_limit_and_puts_what_fits_first():
    compiled = []

    def compile_plan(one: PlanRequest):
        compiled.append(one)
        return estimate(one)

    first = estimate(asked("gpu:8xa100-80gb", mesh={"data": 8, "fsdp": 1}))
    found = search(first, compile_plan, limit=4)
    assert not first.fits and len(compiled) <= 3 and len(found) <= 4
    assert [one.fits for one in found] == sorted((one.fits for one in found), reverse=True)
    assert found[0].fits and sum(one is first for one in found) == 1


def test_a_search_draws_completions_of_several_updates_together_where_that_is_faster():
    settings = {"per_device_train_batch_size": 2, "max_completion_length": 512, "max_length": 1024}
    first = estimate(asked("gpu:8xh100-80gb", lmbda=1.0, **settings))
    best = search(first, None, limit=3)[0]
    together, alone = best.request, estimate(best.request.changed(rollout_batches=1))
    assert together.rollout_batches > 1 and f"--rollout_batches {together.rollout_batches}" in flags_of(together)
    assert together.sampled_rows == together.rollout_batches * alone.request.sampled_rows
    assert best.tokens_per_second > alone.tokens_per_second
    assert "rollout_batches" not in flags_of(first.request)
    named = search(estimate(asked("gpu:8xh100-80gb", lmbda=1.0, rollout_batches=2, **settings)), None, limit=3)
    assert {one.request.rollout_batches for one in named} == {2}
    off_policy = search(estimate(asked("gpu:8xh100-80gb", lmbda=0.0, **settings)), None, limit=2)
    assert {one.request.rollout_batches for one in off_policy} == {1}


def test_a_plan_draws_more_rows_at_once_where_memory_is_free():
    settings = {"lmbda": 1.0, "per_device_train_batch_size": 128, "max_completion_length": 128, "max_length": 256}
    rows = [asked(f"gpu:{card}", mesh={"fsdp": 1}, **settings).sampled_rows for card in ("l4-24gb", "h200-141gb")]
    assert rows[0] == 32 < rows[1]


def test_a_search_changes_nothing_of_what_was_asked_for():
    first = estimate(asked("gpu:8xa100-80gb"))
    before = dict(vars(first.request.args))
    search(first, None, limit=3)
    assert vars(first.request.args) == before


def test_hosts_are_slower_to_send_between_than_within():
    gpus = read_topology("gpu:16xh100-80gb")
    mesh = {"data": 2, "fsdp": 8, "tensor": 1}
    within, between = (link_seconds({axis: 1e9}, mesh, gpus) for axis in ("fsdp", "data"))
    assert within == 1e9 / 450e9 and between == 1e9 / 50e9
    assert link_seconds({}, mesh, gpus) == 0
