"""Kernels of accelerators that are not there: what is compiled for them, not what they compute."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from gold_jax.models.attention import attention
from gold_jax.models.decoder import Decoder
from gold_jax.models.hf_checkpoint import read_config

from . import tiny


def test_cudnn_lowers_for_cuda_without_a_gpu(monkeypatch):
    # Tracing asks for the version of a cuDNN that is not here. Nothing is run.
    fused = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91000)

    def loss(query, key, value, mask):
        out = attention(query, key, value, mask=mask, window=100, implementation="cudnn", platform="cuda")
        return out.astype(jnp.float32).sum()

    shapes = [jax.ShapeDtypeStruct((2, 512, heads, 64), jnp.bfloat16) for heads in (8, 2, 2)]
    traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(*shapes, jax.ShapeDtypeStruct((2, 512), bool))
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "fmhaSoftmax" in text and "fmhaSoftmaxBackward" in text
    assert "PADDING_CAUSAL" in text and "512x512" not in text


@pytest.fixture(scope="module")
def tpu():
    """A device of a TPU that is not there, for which the TPU compiler compiles all the same."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu, which brings the TPU compiler, is not installed (pip install 'jax[tpu]')")
    from jax.experimental import topologies

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TPU_SKIP_MDS_QUERY", "1")  # no TPU machine is asked what it is
        patch.setenv("TPU_WORKER_HOSTNAMES", "localhost")
        topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
    return jax.sharding.SingleDeviceSharding(topology.devices[0])


@pytest.mark.slow
@pytest.mark.parametrize("name", ("llama", "gemma2"))
def test_a_training_step_compiles_for_a_tpu_with_its_kernel(name, tpu, tmp_path):
    small = read_config(tiny.write_folder(name, tmp_path))
    config = small.__class__(**vars(small) | dict(head_dim=64, window=small.window and 128))
    model = Decoder.abstract(config, jnp.bfloat16, remat=True, platform="tpu")
    graphdef, params = nnx.split(model)
    on_tpu = functools.partial(jax.ShapeDtypeStruct, sharding=tpu)
    params = jax.tree.map(lambda leaf: on_tpu(leaf.shape, leaf.dtype), params)

    def loss(params, tokens, mask):
        return jnp.square(nnx.merge(graphdef, params)(tokens, mask).astype(jnp.float32)).mean()

    batch = on_tpu((2, 512), jnp.int32), on_tpu((2, 512), bool)
    compiled = jax.jit(jax.grad(loss)).lower(params, *batch).compile()
    # Forward, forward again under remat, and two kernels backward; twice where layers of two kinds alternate.
    kinds = len(set(config.sliding))
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 4 * kinds
    assert compiled.memory_analysis().temp_size_in_bytes > 0
