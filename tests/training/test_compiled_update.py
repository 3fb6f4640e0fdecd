"""The compiled programs of an update hold and copy nothing of the state's size, on CPUs, TPUs and GPUs."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

# Temporaries at most, in bytes of the gradient: nothing beside it for the update, on CPUs and GPUs; TPUs fetch a model as
# small as this into fast memory. What has a gradient to take holds it, and what lies between the layers.
TEMPORARIES = {
    "cpu": {"update": 0.05, "rounding update": 0.05, "fused": 2.0, "add": 1.9},
    "tpu": {"update": 0.8, "rounding update": 0.8, "fused": 1.0, "add": 0.6},
    "cuda": {"update": 0.05, "rounding update": 0.05, "fused": 1.7, "add": 1.7},
}
# Parameters, two moments, and the masters of parameters that are rounded; the gradient.
DONATED = {"update": 3, "rounding update": 4, "fused": 3, "add": 1}


def compiler(platform, module, name):
    missing = pytest.mark.skipif(importlib.util.find_spec(module) is None, reason=f"{name} compiler is not installed")
    return pytest.param(platform, marks=[pytest.mark.slow, missing])


@pytest.mark.parametrize(
    "platform", ["cpu", compiler("tpu", "libtpu", "the TPU"), compiler("cuda", "jax_cuda12_plugin", "the GPU")]
)
def test_the_state_is_changed_in_place_and_copied_nowhere(platform):
    script = pathlib.Path(__file__).with_name("compile_update.py")
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "0",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    done = subprocess.run(
        [sys.executable, script, platform], env=environment, timeout=600, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for name, found in json.loads(done.stdout.splitlines()[-1]).items():
        assert found["copies"] == [], name
        assert DONATED[name] <= found["aliased"] < DONATED[name] + 0.01, name
        assert found["temporaries"] < TEMPORARIES[platform][name], name
