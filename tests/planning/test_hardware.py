import importlib.util
import json
import os
import subprocess
import sys

import pytest

from gold_jax.accelerators import GIB, GPUS, TPUS
from gold_jax.planning.hardware import has_gpu_compiler, read_topology

SLICES = (
    "v3:2x2",
    "v4:2x2x1",
    "v4-16",
    "v5e:1x1",
    "v5e:2x4",
    "v5e-256",
    "v5p:2x2x2",
    "v5p-128",
    "v6e:4x4",
    "tpu7x:2x2x1",
)


@pytest.mark.parametrize(
    ("text", "name", "chips", "devices", "hosts"),
    [
        ("v5e:2x4", "v5e:2x4", 8, 8, 1),
        ("v5e-8", "v5e:2x4", 8, 8, 1),
        ("v5litepod-16", "v5e:4x4", 16, 16, 4),
        ("v5e-1", "v5e:1x1", 1, 1, 1),
        ("v5e-32", "v5e:4x8", 32, 32, 8),
        ("V5E-256", "v5e:16x16", 256, 256, 64),
        ("v6e:4x4", "v6e:4x4", 16, 16, 4),
        ("v4-8", "v4:2x2x1", 4, 4, 1),
        ("v4-32", "v4:2x2x4", 16, 16, 4),
        ("v5p-8", "v5p:2x2x1", 4, 4, 1),
        ("v5p-64", "v5p:2x4x4", 32, 32, 8),
        ("v5p-128", "v5p:4x4x4", 64, 64, 16),
        ("v5p-512", "v5p:4x8x8", 256, 256, 64),
        ("v5p:2x2x2", "v5p:2x2x2", 8, 8, 2),
        ("v3-8", "v3:2x2", 4, 8, 1),
        ("tpu7x-8", "tpu7x:2x2x1", 4, 8, 1),
        ("gpu:8xh100-80gb", "gpu:8xh100-80gb", 8, 8, 1),
        ("gpu:16xh100", "gpu:16xh100-80gb", 16, 16, 2),
        ("gpu:l4", "gpu:1xl4-24gb", 1, 1, 1),
    ],
)
def test_a_topology_is_read_from_its_shape_or_its_usual_name(text, name, chips, devices, hosts):
    found = read_topology(text)
    assert (found.name, found.chips, found.devices, found.hosts) == (name, chips, devices, hosts)
    assert found.kind == ("gpu" if text.startswith("gpu") else "tpu")
    assert found.compile_options.get("topology_name") == (None if found.kind == "gpu" else name)
    assert read_topology(found.name) == found


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("v5x:2x4", r"not a known TPU .*v5e.* The nearest is v5\w-8"),
        ("v5e:2x3", "2 axes, the first two even"),
        ("v5e:2x2x2", "2 axes"),
        ("v5e:0x2", "2 axes"),
        ("v5e-2", "2 chips have no usual shape"),
        ("v5e-12", "powers of two"),
        ("v4-4", "4 TensorCores, two to a chip, have no usual shape.* v4:2x2x1"),
        ("v5e", "TYPE:SHAPE .* The nearest is v5e-8"),
        ("h100-80gb", "gpu:COUNTxNAME.* The nearest is gpu:h100-80gb"),
        ("gpu:8xh1000", "not a known GPU .* The nearest is gpu:h100-80gb"),
        ("gpu:a100", "a100-40gb or a100-80gb"),
        ("gpu:12xl4", "nor whole hosts of 8"),
        ("gpu:0xl4", "are not 1 to 8"),
        ("", "is not a topology"),
    ],
)
def test_another_text_is_answered_with_what_would_be_right(text, message):
    with pytest.raises(ValueError, match=message):
        read_topology(text)


def test_links_count_as_far_as_the_slice_has_them():
    def share(text):
        found = read_topology(text)
        return found.interconnect / found.chip.interconnect

    assert share("v5e:16x16") == share("v5p:4x4x4") == share("gpu:8xh100") == 1
    assert share("v5e:2x4") == (1 + 1.5) / 4
    assert share("v5p:2x2x1") == 2 / 6
    assert share("v5e:1x1") == share("gpu:h100") == 0


@pytest.mark.parametrize("name", [*TPUS, *GPUS])
def test_a_chips_figures_are_in_bytes_and_flops_a_second(name):
    chip = {**TPUS, **GPUS}[name]
    assert 10 * GIB < chip.hbm_bytes < 200 * GIB
    assert 5e13 < chip.flops < 3e15
    assert 2e11 < chip.hbm_bandwidth < 1e13
    assert 3e10 < chip.interconnect < 1e12
    assert chip.network is None or 1e9 < chip.network < chip.interconnect


DESCRIBED = {"a100-40gb": "8.0", "a100-80gb": "8.0", "h100-80gb": "9.0", "h200-141gb": "9.0"}


@pytest.mark.parametrize("name", GPUS)
def test_what_xla_is_told_of_a_card_has_its_memory_and_its_capability(name):
    options = read_topology(f"gpu:16x{name}").compile_options
    assert bool(options) == (name in DESCRIBED)
    if options:
        chip, (major, minor), text = GPUS[name], DESCRIBED[name].split("."), options["target_config"]
        assert f"device_memory_size: {chip.hbm_bytes} memory_bandwidth: {chip.hbm_bandwidth:.0f} " in text
        assert f"cuda_compute_capability {{ major: {major} minor: {minor} }}" in text
        assert options["topology"] == "1x2x8"  # slices, hosts, cards of a host


def test_an_efficiency_is_told_where_a_run_was_measured():
    assert (
        0 < min(read_topology("gpu:h200").efficiency.values())
        and max(read_topology("gpu:h100").efficiency.values()) < 1
    )
    assert not any(read_topology(name).efficiency for name in ("gpu:a100-80gb", "gpu:8xh200", "v5e:1x1"))


# No metadata server is asked which TPU this is, and another process may hold the library, too.
COMPILER_ALONE = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
ASK = """
import json, re, sys
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from gold_jax.planning.hardware import read_topology

found = {}
for name in sys.argv[1:]:
    topology = read_topology(name)
    description = topologies.get_topology_desc(platform="tpu", **topology.compile_options)
    hosts = len({device.process_index for device in description.devices})
    here = NamedSharding(Mesh(np.array(description.devices[:1]), "x"), PartitionSpec())
    large = jax.ShapeDtypeStruct((2**20, 2**16), jnp.float32, sharding=here)
    try:
        jax.jit(lambda x: x.T @ x[:, :128]).lower(large).compile()
    except jax.errors.JaxRuntimeError as error:
        limit = float(re.search(r"exceeds available HBM \\(([\\d.]+)G\\)", str(error))[1])
    found[name] = len(description.devices), hosts, limit
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="the TPU compiler is not installed")
def test_the_compiler_knows_the_same_devices_hosts_and_memory():
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "0",
        **COMPILER_ALONE,
    }
    done = subprocess.run(
        [sys.executable, "-c", ASK, *SLICES], env=environment, check=True, timeout=300, capture_output=True, text=True
    )
    expected = {}
    for name in SLICES:
        topology = read_topology(name)
        expected[name] = [topology.devices, topology.hosts, round(topology.chip.hbm_bytes / GIB, 2)]
    assert json.loads(done.stdout.splitlines()[-1]) == expected


ASK_OF_GPUS = """
import json, sys
import jax
from gold_jax.planning.compiled import answered_by, describe, why_not_compiled
from gold_jax.planning.hardware import prepare, read_topology

prepare()
found = {}
for name in sys.argv[1:]:
    topology = read_topology(name)
    assert why_not_compiled(topology) is None
    devices = describe(topology)
    with answered_by(devices[0]):
        from jax._src.cudnn import fused_attention_stablehlo as cudnn
        answers = [cudnn.check_compute_capability(one) for one in ("8.0", "9.0", "10.0")]
        answers.append(cudnn.is_cuda_compute_capability_equal("9.0"))
    found[name] = len(devices), len({device.process_index for device in devices}), answers
assert [device.platform for device in jax.devices()] == ["cpu"]
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not has_gpu_compiler(), reason="the GPU compiler is not installed: pip install 'gold_jax[plan-cuda]'"
)
def test_the_gpu_compiler_takes_every_description_and_opens_no_device():
    environment = {name: value for name, value in os.environ.items() if name not in ("JAX_PLATFORMS", "XLA_FLAGS")}
    names = [f"gpu:{count}x{name}" for name in DESCRIBED for count in (1, 16)]
    command = [sys.executable, "-c", ASK_OF_GPUS, *names]
    done = subprocess.run(command, env=environment, check=True, timeout=300, capture_output=True, text=True)
    answers = {"8.0": [True, False, False, False], "9.0": [True, True, False, True]}
    shapes = {1: [1, 1], 16: [16, 2]}  # devices and hosts
    expected = {
        f"gpu:{count}x{name}": [*shapes[count], answers[of]] for name, of in DESCRIBED.items() for count in shapes
    }
    assert json.loads(done.stdout) == expected
    assert "cuda" not in done.stderr.lower()
