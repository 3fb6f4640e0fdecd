import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from transformers import AutoConfig

from gold_jax.losses.fused_head import fused_linear_sum
from gold_jax.models.config import DecoderConfig
from gold_jax.models.decoder import Decoder
from gold_jax.planning import arithmetic
from gold_jax.planning.arithmetic import Reading
from gold_jax.planning.hardware import TPUS

ROWS, LENGTH = 4, 128
READING = Reading(ROWS * LENGTH, [LENGTH] * ROWS)
SMALL = {
    "vocab_size": 1024,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
}
FAMILIES = {
    "llama": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": 32, "head_dim": 48},
    "qwen2": {"tie_word_embeddings": False},
    "qwen3": {"head_dim": 64, "tie_word_embeddings": False},
    "gemma2": {"head_dim": 32, "sliding_window": 32},
    "gemma3_text": {"head_dim": 32, "sliding_window": 32},
}


def small(family: str) -> DecoderConfig:
    return DecoderConfig.from_hf(AutoConfig.for_model(family, **SMALL, **FAMILIES[family]))


def one_layer(config: DecoderConfig) -> DecoderConfig:
    """What the compiler's analysis sees of scanned layers."""
    return dataclasses.replace(config, layers=1, sliding=config.sliding[:1])


def compiled_flops(function, *arguments) -> float:
    return jax.jit(function).lower(*arguments).compile().cost_analysis()["flops"]


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_those_of_the_decoder(family):
    config = small(family)
    count = arithmetic.parameter_count(config)
    sizes = [math.prod(x.shape) for x in jax.tree.leaves(nnx.state(Decoder.abstract(config)))]
    assert count.total == sum(sizes)
    assert count.embedding == 1024 * 256 and (count.head == 0) == config.tied


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("remat", [None, False, True])
def test_layers_cost_what_the_compiler_counts(family, remat):
    """`remat` None is the forward pass alone."""
    config = small(family)
    graph, params = nnx.split(Decoder.abstract(config, remat=bool(remat), attention="plain", platform="cpu"))
    tokens = jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32)

    def hidden(params, tokens):
        return nnx.merge(graph, params)(tokens, jnp.ones_like(tokens, bool))

    if remat is None:
        expected = arithmetic.forward(one_layer(config), READING, attention="plain")
        counted = compiled_flops(hidden, params, tokens)
    else:
        expected = arithmetic.training_step(one_layer(config), READING, remat=remat, attention="plain")
        counted = compiled_flops(jax.grad(lambda *x: (hidden(*x) ** 2).sum()), params, tokens)
    assert counted == pytest.approx(expected.total_flops, rel=0.05)


def test_the_students_head_is_multiplied_with_three_times():
    config, chunk = small("llama"), 64

    def loss(hidden, head, rows, targets):
        def chunk_loss(logits, scale, shared, targets):
            return -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[:, None], 1).sum(), {}

        return fused_linear_sum(chunk_loss, None, chunk, hidden, head, rows, None, (), targets, chunk)[0]

    hidden, head = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((chunk, 256), (1024, 256)))
    whole = jax.ShapeDtypeStruct((chunk,), jnp.int32)
    counted = compiled_flops(jax.value_and_grad(loss, argnums=(0, 1)), hidden, head, whole, whole)
    work = arithmetic.training_step(config, Reading(0, [], positions=chunk), remat=True)
    assert counted == pytest.approx(work.flops["student head"], rel=0.05)
    assert work.flops["student head"] == arithmetic.head_flops(config, chunk, 3)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_decoded_token_costs_what_the_compiler_counts(family):
    config, slots = small(family), 512
    graph, params = nnx.split(Decoder.abstract(config, platform="cpu"))

    def step(params, tokens, cache):
        model = nnx.merge(graph, params)
        hidden, cache = model.decode_step(tokens, cache)
        return model.decode_logits(hidden), cache

    tokens = jax.ShapeDtypeStruct((ROWS,), jnp.int32)
    prompt = jax.ShapeDtypeStruct((ROWS, 8), jnp.int32)
    _, cache = jax.eval_shape(
        lambda params, prompt: nnx.merge(graph, params).prefill(prompt, jnp.ones_like(prompt, bool), slots),
        params,
        prompt,
    )
    work = arithmetic.decode_step(config, ROWS, slots, itemsize=4)
    assert compiled_flops(step, params, tokens, cache) == pytest.approx(work.total_flops, rel=0.05)
    held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((cache.keys, cache.values)))
    assert work.hbm_bytes["cache"] == held == ROWS * arithmetic.cache_bytes(config, slots, itemsize=4)


def test_attention_that_skips_what_is_masked_meets_half_the_pairs_and_windows_fewer():
    config = small("gemma2")  # one sliding layer of 32, one full
    rows = [100, 10]
    full, near = (sum(min(at + 1, window) for row in rows for at in range(row)) for window in (1000, 32))
    assert arithmetic.attention_pairs(config, rows, "splash") == full + near
    assert arithmetic.attention_pairs(config, rows, "plain") == 2 * (100**2 + 10**2)
    assert arithmetic.attention_pairs(small("mistral"), rows, "cudnn") == 2 * near


def test_kernels_compute_scores_again_in_the_backward_pass():
    config = small("llama")

    def attention_flops(name):
        step = arithmetic.training_step(config, READING, remat=False, attention=name)
        products = 2 * arithmetic.forward(config, READING).flops["products"]
        pair = 2 * config.heads * config.head_dim * arithmetic.attention_pairs(config, READING.rows, name)
        return (step.flops["student backward"] - products) / pair

    assert [attention_flops(name) for name in ("plain", "blockwise", "cudnn", "splash")] == [4, 5, 5, 7]


def test_a_distillation_step_has_both_models_and_its_parts_add_up():
    student, teacher = small("llama"), small("qwen3")
    mine, theirs = Reading(400, [200, 200], positions=300, inner=20), Reading(500, [250, 250], positions=300, inner=40)
    step = arithmetic.training_step(student, mine, teacher, theirs, remat=True, chunk=64, micro_batches=4)
    alone = arithmetic.training_step(student, mine, remat=True, chunk=64, micro_batches=4)
    assert step.flops["teacher forward"] == arithmetic.forward(teacher, theirs).total_flops
    assert step.flops["teacher head"] == arithmetic.head_flops(teacher, 340)
    assert step.flops["student head"] == arithmetic.head_flops(student, 3 * 300 + 4 * 20)
    assert step.total_flops == sum(step.flops.values()) > alone.total_flops
    assert step.total_bytes - alone.total_bytes == sum(v for k, v in step.hbm_bytes.items() if k.startswith("teacher"))
    count = arithmetic.parameter_count(student)
    assert step.hbm_bytes["optimizer"] == 32 * count.total
    assert step.hbm_bytes["gradients"] == 4 * count.total * (1 + 3 * 4)
    assert step.hbm_bytes["student parameters"] == 4 * count.layers * 3 * 4


def test_a_roofline_names_the_resource_that_takes_longest():
    chip = TPUS["v5e"]
    line = arithmetic.roofline(2 * chip.flops, 0.5 * chip.hbm_bandwidth, chip.interconnect, chip)
    assert (line.compute, line.memory, line.interconnect) == (2, 0.5, 1)
    assert (line.seconds, line.slowest) == (2, "compute")
    slower = arithmetic.roofline(0, 0, chip.interconnect, chip, interconnect=chip.interconnect / 4)
    assert (slower.seconds, slower.slowest) == (4, "interconnect")
    assert arithmetic.roofline(1, 1, 0, chip, interconnect=0.0).interconnect == 0
    assert arithmetic.roofline(1, 1, 1, chip, interconnect=0.0).interconnect == math.inf
