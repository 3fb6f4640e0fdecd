"""What lies on a device by arithmetic is what the shapes of a run's arrays say."""

import jax
import pytest
import tiny_models as tiny
from transformers import AutoConfig

from gold_jax.config import GOLDConfig, SFTConfig
from gold_jax.models.config import DecoderConfig
from gold_jax.planning.footprint import Footprint
from gold_jax.planning.programs import PlannedRun, device_bytes
from gold_jax.planning.sizes import Pair
from gold_jax.sharding.placement import Placement

AXES = ("data", "fsdp", "tensor")
MATCHED = 354


def small(kind: str, rows: int, **changes) -> DecoderConfig:
    settings = tiny.config(kind, rows, **changes)
    return DecoderConfig.from_hf(AutoConfig.for_model(settings.pop("model_type"), **settings))


STUDENT, TEACHER = small("llama", 419), small("qwen3", 464)


def both(mesh, pair=Pair(STUDENT, TEACHER, MATCHED), **settings) -> tuple[PlannedRun, Footprint]:  # noqa: B008
    """A run's shapes and its arithmetic."""
    if pair.teacher is None:
        args = SFTConfig(output_dir="x", max_length=128, **settings)
    else:
        args = GOLDConfig(output_dir="x", max_length=128, max_completion_length=64, **settings)
    where = Placement(jax.sharding.AbstractMesh(mesh, AXES), args.layout)
    return PlannedRun(args, pair, where), Footprint(args, pair, where)


CASES = {
    "one device": ((1, 1, 1), {}),
    "fsdp": ((1, 8, 1), {}),
    "all axes": ((2, 2, 2), {}),
    "teacher cut further": ((4, 2, 1), {"teacher_layout": "full"}),
    "all cut": ((4, 1, 2), {"layout": "full", "teacher_layout": "full"}),
    "more devices than heads": ((1, 2, 4), {}),
    "micro-batches": ((2, 2, 1), {"gradient_accumulation_steps": 3}),
    "float32": ((1, 2, 2), {"bf16": False}),
    "other rows": ((1, 4, 1), {"per_device_train_batch_size": 3, "generation_batch_size": 4}),
}


@pytest.mark.parametrize(("mesh", "settings"), CASES.values(), ids=CASES)
def test_what_stays_is_what_the_shardings_say(mesh, settings):
    run, footprint = both(mesh, **settings)
    resident = run.resident()
    gradients = resident.pop("gradients", 0)
    assert footprint.resident() == resident
    assert footprint.transient("optimizer").get("gradients", 0) == gradients
    assert footprint.batch == device_bytes(run.batch())
    assert footprint.cache == device_bytes(run.cache())
    assert footprint.decoding_weights == device_bytes(run.decoding_weights())


@pytest.mark.parametrize("settings", [{}, {"gradient_accumulation_steps": 2}, {"lmbda": 0.0}])
def test_the_programs_are_those_of_the_run(settings):
    run, footprint = both((1, 2, 1), **settings)
    assert footprint.programs() == list(run.programs())


def test_fine_tuning_has_no_teacher_and_no_cache():
    run, footprint = both((1, 4, 1), Pair(STUDENT))
    assert footprint.resident() == run.resident() and set(run.resident()) == {"student", "optimizer"}
    assert footprint.batch == device_bytes(run.batch())
    assert footprint.programs() == list(run.programs()) == ["student"]


def test_one_vocabulary_has_no_order():
    run, footprint = both((1, 2, 1), Pair(STUDENT, STUDENT))
    assert footprint.resident() == run.resident()


def test_a_compilers_number_is_split_into_parts_that_add_up():
    _, footprint = both((1, 2, 1))
    for total in (10, 10**6, 10**9):
        parts = footprint.split("student", total)
        assert sum(parts.values()) == total and min(parts.values()) >= 0
    assert footprint.split("teacher", 7) == {"temporaries": 7}


def test_checkpointing_keeps_fewer_activations():
    kept = [both((1, 1, 1), gradient_checkpointing=on)[1].temporaries("student")["activations"] for on in (True, False)]
    assert kept[0] < kept[1]
