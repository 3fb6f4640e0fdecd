"""Sizes, layouts, and what eight devices compute against one."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import pytest
import tiny_models as tiny
from jax.sharding import PartitionSpec as P

from gold_jax.models.decoder import parameters
from gold_jax.sharding.axes import mesh_sizes, read_mesh
from gold_jax.sharding.placement import Placement
from gold_jax.training.objective import splits_vocabulary

HERE = pathlib.Path(__file__).parent


def on_eight_devices(script, *arguments):
    """What a script prints, as JSON."""
    environment = os.environ | tiny.cpu_devices(8)
    command = [sys.executable, HERE / script, *arguments]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1500)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return json.loads(ran.stdout.splitlines()[-1])


# Every other method on the mesh that has every axis, on those that have fewer the first and the last; more where asked for.
EVERY = {"data=8": 12, "fsdp=8": 12, "fsdp=4,tensor=2": 12, "data=2,fsdp=2,tensor=2": 2}
MORE = {"data=8": 4, "fsdp=8": 4, "fsdp=4,tensor=2": 4, "data=2,fsdp=2,tensor=2": 1}
COUNT = {1: 14, 2: 7, 4: 4, 12: 2}  # of 14 methods


@pytest.fixture(scope="module")
def steps():
    """How far three steps on each mesh lie from those of one device, which are made once for all meshes."""
    return on_eight_devices("on_eight_devices.py", *(f"{mesh}/{every}" for mesh, every in EVERY.items()))


def assert_alike(found: dict[str, dict[str, float]], count: int) -> None:
    assert len(found) == count
    for name, errors in found.items():
        assert errors["loss"] < 1e-5 and errors["gradient"] < 1e-5, name


@pytest.mark.slow
@pytest.mark.parametrize("mesh", EVERY)
def test_three_steps_are_those_of_one_device(mesh, steps):
    found = {name: errors for name, errors in steps.items() if name.startswith(f"{mesh} ")}
    assert_alike(found, COUNT[EVERY[mesh]])


@pytest.mark.long
@pytest.mark.parametrize("mesh", MORE)
def test_three_steps_of_more_methods_are_those_of_one_device(mesh):
    assert_alike(on_eight_devices("on_eight_devices.py", f"{mesh}/{MORE[mesh]}"), COUNT[MORE[mesh]])


@pytest.mark.slow
def test_every_mesh_draws_what_one_device_draws():
    found = on_eight_devices("sampling_on_eight_devices.py")
    assert found["distinct"] > 1 and len(found["meshes"]) == 8
    for name, errors in found["meshes"].items():
        assert errors["differ"] == 0 and errors["logprobs"] < 1e-5, name
    assert found["gathered"] == [] and found["devices"] == 8


@pytest.mark.parametrize(
    "text, sizes",
    [
        (None, (1, 8, 1)),
        ("auto", (1, 8, 1)),
        ("data=8", (8, 1, 1)),
        ("tensor=2", (1, 4, 2)),
        ("data=2, tensor=2", (2, 2, 2)),
        ("fsdp=4,tensor=2", (1, 4, 2)),
    ],
)
def test_fsdp_takes_the_devices_that_are_not_named(text, sizes):
    assert tuple(mesh_sizes(text, 8).values()) == sizes


@pytest.mark.parametrize("text", ["fsdp", "fsdp=0", "rows=2", "fsdp=2,fsdp=4", "fsdp=two", "8"])
def test_what_is_no_mesh_is_refused(text):
    with pytest.raises(ValueError, match="must be auto, or sizes of data, fsdp, tensor"):
        read_mesh(text)


@pytest.mark.parametrize("text, words", [("fsdp=4", "takes 4 devices"), ("data=3", "takes a multiple of 3 devices")])
def test_sizes_that_do_not_come_to_the_devices_are_refused(text, words):
    with pytest.raises(ValueError, match=f"{words}, and there are 8"):
        mesh_sizes(text, 8)


def abstract_mesh(**sizes):
    """A mesh of this process's one device, seen as if there were more."""
    return jax.sharding.AbstractMesh(
        tuple({"data": 1, "fsdp": 1, "tensor": 1, **sizes}.values()), ("data", "fsdp", "tensor")
    )


@pytest.mark.parametrize(
    "layout, query, embedding",
    [
        ("fsdp", P(None, "fsdp", "tensor"), P(None, ("fsdp", "tensor"))),
        ("full", P(None, ("data", "fsdp"), "tensor"), P(None, ("data", "fsdp", "tensor"))),
        ("replicated", P(None, None, "tensor"), P(None, "tensor")),
    ],
)
def test_layouts_cut_the_width_and_never_the_vocabulary(layout, query, embedding):
    placement = Placement(abstract_mesh(data=2, fsdp=2, tensor=2), layout)
    assert placement.param_sharding((4, 16, 8), ("layers", "embed", "heads")).spec == query
    assert placement.param_sharding((37, 16), ("vocab", "embed")).spec == embedding
    assert placement.compute_sharding((16, 8), ("embed", "heads")).spec == P(None, "tensor")


def test_what_an_axis_does_not_divide_is_not_cut():
    placement = Placement(abstract_mesh(fsdp=4, tensor=2))
    assert placement.param_sharding((2, 18, 7), ("layers", "embed", "mlp")).spec == P()
    assert placement.row_axes(6) is None and placement.row_axes(8) == ("data", "fsdp")


@pytest.mark.parametrize("heads, kv_heads, tensor, copies", [(32, 8, 4, 1), (32, 8, 16, 2), (4, 1, 4, 4), (9, 3, 2, 1)])
def test_every_tensor_device_has_the_key_value_heads_of_its_own_heads(heads, kv_heads, tensor, copies):
    assert Placement(abstract_mesh(tensor=tensor)).kv_repeats(heads, kv_heads) == copies


@pytest.mark.parametrize(
    "tokens, width, tensor, columns, split",
    [
        (8192, 4096, 4, [("fsdp", "tensor"), ("tensor",)], True),
        (8192, 4096, 1, [("fsdp",), ("fsdp",)], False),
        (65536, 4096, 4, [("fsdp", "tensor"), ("tensor",)], False),  # logits would be more bytes than heads
        (8192, 4096, 4, [("fsdp", "tensor"), ()], False),  # a width that the devices do not divide
    ],
)
def test_the_vocabulary_is_split_where_logits_are_fewer_bytes_than_heads(tokens, width, tensor, columns, split):
    assert splits_vocabulary(tokens, width, tensor, columns) is split


def test_a_layout_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="must be one of fsdp, full, replicated"):
        Placement(abstract_mesh(), "zero")


def test_every_parameter_has_a_place(decoder_config):
    placement = Placement(abstract_mesh(fsdp=2, tensor=2))
    cut = [placement.param_sharding(info.shape, info.spec).spec for info in parameters(decoder_config).values()]
    assert all(spec != P() for spec in cut)


@pytest.fixture
def decoder_config():
    from training.small import decoder

    return decoder(37, 0).config
