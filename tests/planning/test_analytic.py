"""The analytic model: what lies on a device is what shapes say, FLOPs are what the compiler counts."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest
import tiny_models as tiny
from flax import nnx
from transformers import AutoConfig

from gold_jax.config import GOLDConfig, SFTConfig
from gold_jax.models.config import DecoderConfig
from gold_jax.models.decoder import Decoder
from gold_jax.planning.analytic import Analytic, attention_product, layer_matrices, parameter_count
from gold_jax.planning.compiled import PlannedRun, device_bytes
from gold_jax.planning.hardware import read_topology
from gold_jax.planning.plan import Pair, PlanRequest
from gold_jax.rollout import sampler

MATCHED = 354


def small(kind: str, rows: int, **changes) -> DecoderConfig:
    settings = tiny.config(kind, rows, **changes)
    return DecoderConfig.from_hf(AutoConfig.for_model(settings.pop("model_type"), **settings))


STUDENT, TEACHER = small("llama", 419), small("qwen3", 464)


def both(mesh, pair=Pair(STUDENT, TEACHER, MATCHED), attention=None, **settings) -> tuple[PlannedRun, Analytic]:  # noqa: B008
    """A run's shapes and its formulas."""
    settings = {"output_dir": "x", "max_length": 128} | settings
    if pair.teacher is None:
        args = SFTConfig(**settings)
    else:
        args = GOLDConfig(**{"max_completion_length": 64} | settings)
    gpus = read_topology(f"gpu:{math.prod(mesh)}xh100-80gb")
    request = PlanRequest(args, pair, gpus, dict(zip(("data", "fsdp", "tensor"), mesh)), attention)
    return PlannedRun(request), Analytic(request)


def resident(run: PlannedRun) -> dict[str, int]:
    """Bytes of one device that are taken all the time, by part."""
    found = {"student": device_bytes(run.state.params), "optimizer": device_bytes(run.state.optimizer)}
    if run.request.pair.teacher is not None:
        # The teacher's head is one of its parameters, reordered where it lies.
        found["teacher"] = device_bytes(run.run.step.constants._replace(teacher_head=None))
    return found


def transient(run: PlannedRun, program: str) -> dict[str, int]:
    """Bytes that are taken while a program runs and not always, by part; what it takes itself aside."""
    if program in ("prefill", "decoding"):
        cache = device_bytes((run.cache, run.decode_state))
        return {"decoding weights": device_bytes(run.weights), "cache": cache}
    found = {"gradients": device_bytes(run.state.params)} if run.request.micro_batches > 1 else {}
    if program != "optimizer":
        found["batch"] = device_bytes(run.batch)
        if run.request.reads:
            found["teacher's hidden states"] = device_bytes(run.hidden)
    return found


CASES = {
    "one device": ((1, 1, 1), {}),
    "fsdp": ((1, 8, 1), {}),
    "all axes": ((2, 2, 2), {}),
    "teacher cut further": ((4, 2, 1), {"teacher_layout": "full"}),
    "all cut": ((4, 1, 2), {"layout": "full", "teacher_layout": "full"}),
    "more devices than heads": ((1, 2, 4), {}),
    "micro-batches": ((2, 2, 1), {"gradient_accumulation_steps": 3}),
    "float32": ((1, 2, 2), {"bf16": False}),
    "positional groups": ((1, 2, 1), {"loss": "uld"}),
    "events": ((1, 2, 1), {"loss": "events"}),
    "likelihoods of texts": ((1, 2, 1), {"loss": "alm"}),
    "weights of 8 bits": ((2, 2, 2), {"rollout_quantization": "int8"}),
    "weights and cache of 8 bits": ((2, 2, 2), {"rollout_quantization": "int8_kv_cache"}),
    "several updates drawn together": ((1, 2, 1), {"rollout_batches": 4}),
    "rounded weights": ((2, 2, 2), {"bf16_stochastic_round": True, "gradient_accumulation_steps": 2}),
    "nothing to round": ((1, 2, 1), {"bf16_stochastic_round": True, "bf16": False}),
    "other rows": ((1, 4, 1), {"per_device_train_batch_size": 3, "generation_batch_size": 4}),
}


@pytest.mark.parametrize(("mesh", "settings"), CASES.values(), ids=CASES)
def test_what_stays_is_what_the_shardings_say(mesh, settings):
    run, model = both(mesh, **settings)
    assert model.resident() == resident(run)
    for program in model.request.programs:
        assert model.transient(program) == transient(run, program)


def test_a_prompt_that_is_answered_several_times_is_planned_to_be_read_once(monkeypatch):
    monkeypatch.setattr(sampler, "SMALL_MODEL", 0)
    settings = {"per_device_train_batch_size": 8, "num_generations": 4}
    (run, model), (_, alone) = both((1, 2, 1), **settings), both((1, 2, 1), per_device_train_batch_size=8)
    assert model.request.sampled_rows == alone.request.sampled_rows == 16
    assert model.request.sampled_prompts == 4 and alone.request.sampled_prompts == 16
    assert model.cost("prefill").flops * 4 == pytest.approx(alone.cost("prefill").flops)
    assert "prefill" in run.programs()


@pytest.mark.parametrize("settings", [{}, {"gradient_accumulation_steps": 2}, {"lmbda": 0.0}])
def test_the_programs_are_those_of_the_run(settings):
    run, model = both((1, 2, 1), **settings)
    assert list(model.request.programs) == list(run.programs())


def test_fine_tuning_has_no_teacher_and_no_cache():
    run, model = both((1, 4, 1), Pair(STUDENT))
    assert model.resident() == resident(run) and set(resident(run)) == {"student", "optimizer"}
    assert model.batch == device_bytes(run.batch)
    assert list(model.request.programs) == list(run.programs()) == ["student"]


def test_one_vocabulary_has_no_order():
    run, model = both((1, 2, 1), Pair(STUDENT, STUDENT))
    assert model.resident() == resident(run)


def test_checkpointing_keeps_fewer_activations():
    kept = [both((1, 1, 1), gradient_checkpointing=on)[1].temporaries("student")["activations"] for on in (True, False)]
    assert kept[0] < kept[1]


ROWS, LENGTH = 4, 128
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
    "phi3": {"sliding_window": 32, "pad_token_id": 0},
    "smollm3": {"attention_bias": True, "mlp_bias": True, "no_rope_layers": [1, 0], "pad_token_id": 0},
    "granite": {"attention_multiplier": 0.1, "residual_multiplier": 0.3},
    "olmo2": {},
    "exaone4": {"sliding_window": 32, "layer_types": ["sliding_attention", "full_attention"]},
}


def of(family: str) -> DecoderConfig:
    return DecoderConfig.from_hf(AutoConfig.for_model(family, **SMALL, **FAMILIES[family]))


def costs(config: DecoderConfig, teacher: DecoderConfig | None = None, **settings) -> Analytic:
    settings |= {"per_device_train_batch_size": ROWS, "max_length": LENGTH}
    if teacher is not None:
        settings |= {"max_completion_length": LENGTH // 2}
    return both((1, 1, 1), Pair(config, teacher), "plain", **settings)[1]


def compiled_flops(function, *arguments) -> float:
    return jax.jit(function).lower(*arguments).compile().cost_analysis()["flops"]


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_those_of_the_decoder(family):
    config = of(family)
    sizes = [math.prod(x.shape) for x in jax.tree.leaves(nnx.state(Decoder.abstract(config)))]
    assert parameter_count(config) == sum(sizes)
    assert parameter_count(config, "embedding") == 1024 * 256 and (parameter_count(config, "head") == 0) == config.tied


def test_norms_after_blocks_keep_as_much_with_norms_before_them_as_without():
    def kept(**norms):
        config = dataclasses.replace(of("llama"), **norms)
        return costs(config, gradient_checkpointing=False).temporaries("student")["activations"]

    assert kept(post_norms_only=True) == kept(sandwich_norms=True) > kept()
    assert kept(joint_qk_norm=True) == kept(qk_norm=True) > kept()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("remat", [None, False, True])
def test_layers_cost_what_the_compiler_counts(family, remat):
    """`remat` None is the forward pass alone. The compiler counts the body of a loop over layers once."""
    config = of(family)
    graph, params = nnx.split(Decoder.abstract(config, remat=bool(remat), attention="plain", platform="cpu"))
    tokens = jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32)

    def hidden(params, tokens):
        return nnx.merge(graph, params)(tokens, jnp.ones_like(tokens, bool))

    one_layer = dataclasses.replace(config, layers=1, sliding=config.sliding[:1])
    if remat is None:
        expected = costs(one_layer, one_layer).cost("teacher").flops
        counted = compiled_flops(hidden, params, tokens)
    else:
        head = 3 * 2.0 * ROWS * (LENGTH // 2) * config.vocab_size * config.width  # of which these have none
        expected = costs(one_layer, gradient_checkpointing=remat).cost("student").flops - head
        counted = compiled_flops(jax.grad(lambda *x: (hidden(*x) ** 2).sum()), params, tokens)
    assert counted == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_decoded_token_costs_what_the_compiler_counts(family):
    config = of(family)
    model = costs(config, config, lmbda=1.0, bf16=False)
    slots = model.request.prompt_length + model.request.args.max_completion_length // 2
    graph, params = nnx.split(Decoder.abstract(config, platform="cpu"))

    def step(params, tokens, cache):
        model = nnx.merge(graph, params)
        hidden, cache = model.decode_step(tokens, cache)
        return model.decode_logits(hidden), cache

    tokens, prompt = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((ROWS,), (ROWS, 8)))
    _, cache = jax.eval_shape(
        lambda params, prompt: nnx.merge(graph, params).prefill(prompt, jnp.ones_like(prompt, bool), slots),
        params,
        prompt,
    )
    cost = model.cost("decoding")
    assert model.request.sampled_rows == ROWS
    assert compiled_flops(step, params, tokens, cache) == pytest.approx(cost.model_flops, rel=0.05)
    read = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((cache.keys, cache.values)))
    weights = 4 * (parameter_count(config, "layers") + config.vocab_size * config.width)
    assert cost.hbm_bytes == pytest.approx(weights + read, rel=0.02)


def test_attention_that_skips_what_is_masked_meets_half_the_pairs_and_windows_fewer():
    def pairs(config, implementation):
        return attention_product(config, rows, implementation) / (2 * config.heads * config.head_dim)

    config, rows = of("gemma2"), [100, 10]  # one sliding layer of 32, one full
    full, near = (sum(min(at + 1, window) for row in rows for at in range(row)) for window in (1000, 32))
    assert pairs(config, "splash") == full + near
    assert pairs(config, "plain") == 2 * (100**2 + 10**2)
    assert pairs(of("mistral"), "cudnn") == 2 * near


def test_kernels_compute_scores_again_in_the_backward_pass():
    config = of("llama")

    def products(name):
        model = both((1, 1, 1), Pair(config), name, max_length=1024, per_device_train_batch_size=1)[1]
        matrices = 2.0 * model.line * config.layers * layer_matrices(config)
        again = 2.0 * model.line * config.layers * layer_matrices(config, ("down",))
        head = 3 * 2.0 * 512 * config.vocab_size * config.width
        one = attention_product(config, [1024], name)
        return (model.cost("student").flops - 3 * matrices - again - head) / one - 4  # forward, and forward again

    assert [products(name) for name in ("plain", "blockwise", "cudnn")] == pytest.approx([4, 5, 5])


def test_a_distillation_step_has_both_models():
    student, teacher = of("llama"), of("qwen3")
    step, alone = costs(student, teacher).cost("student"), costs(student).cost("student")
    positions = ROWS * LENGTH // 2
    assert step.flops - alone.flops == pytest.approx(2.0 * positions * teacher.vocab_size * teacher.width)
    assert step.hbm_bytes > alone.hbm_bytes and step.model_flops < step.flops
    micro = costs(student, teacher, gradient_accumulation_steps=4)
    assert micro.cost("optimizer").hbm_bytes == 32 * parameter_count(student)
    rounded = costs(student, teacher, gradient_accumulation_steps=4, bf16_stochastic_round=True)
    assert rounded.cost("optimizer").hbm_bytes == 40 * parameter_count(student)  # masters, read and written
    further = micro.cost("student, further micro-batches").hbm_bytes - micro.cost("student").hbm_bytes
    assert further == 8 * parameter_count(student)  # gradients so far are read and written, too


def test_decoding_reads_a_cache_of_8_bits_in_its_own_bytes():
    models = [both((1, 2, 1), rollout_quantization=how)[1] for how in ("int8", "int8_kv_cache")]
    whole, rounded = (model.cost("decoding").hbm_bytes - model._decoding_weights(None) for model in models)
    size = models[0].student.config.head_dim
    assert rounded / whole == (size + 4) / (size * models[0].itemsize)


@pytest.mark.parametrize("rows", [1, 2, 3, 7])
def test_loops_over_groups_of_chunks_make_every_chunk_s_gradients_once(rows):
    settings = dict(per_device_train_batch_size=rows, max_length=512, max_completion_length=192, loss_chunk=64)
    run, _ = both((1, 1, 1), Pair(of("llama"), of("qwen3")), "plain", **settings)
    loop = "jit(fused)/jvp(loss)/chunk_groups/while"
    groups, chunks = run.trips(loop), run.trips("jit(fused)/jvp(loss)/while")
    each, whole, alone = (
        groups * run.trips(f"{loop}/body/{name}while") for name in ("", "group_product/", "chunk_products/")
    )
    assert chunks == 3 * rows == pytest.approx(each)
    assert chunks == pytest.approx(4 * whole + alone if chunks >= 4 else 3 * whole + alone) and alone < 4
