import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from gold_jax.models.decoder import Decoder, parameters
from gold_jax.models.hf_checkpoint import load_model
from gold_jax.text.packing import gather_positions, pack, pad_right

from . import tiny

# What differs most between families: a window, biases, q/k norms of heads and of all, two ropes, a part of a head rotated,
# layers without rotation, caps, norms after blocks alone, factors on what is added and on logits.
VARIED = ("llama_biases", "mistral_window", "qwen2_layer_types", "qwen3", "gemma2", "gemma3_old")
VARIED += ("phi3_longrope", "smollm3_window", "granite_biases", "olmo3", "exaone4")


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")

    @functools.cache
    def load(name: str, **options) -> Decoder:
        return load_model(tiny.write_folder(name, folder / name), **options)

    return load


@jax.jit
def logits_of(model, tokens, mask):
    return model.logits(model(tokens, mask))


@pytest.mark.parametrize("name", tiny.CASES)
def test_logits_are_those_of_transformers(load, name):
    tokens, mask = tiny.batch()
    expected = np.load(tiny.GOLDEN / "logits.npz")[name]
    np.testing.assert_allclose(logits_of(load(name), tokens, mask)[mask], expected, atol=1e-5, rtol=0)


@pytest.mark.live
@pytest.mark.slow
@pytest.mark.parametrize("name", tiny.CASES)
def test_logits_are_those_of_transformers_here(load, name, tmp_path):
    pytest.importorskip("torch")
    make_model_golden = pytest.importorskip("golden.make_model_golden")
    tokens, mask = tiny.batch()
    expected = make_model_golden.transformers_logits(tiny.write_folder(name, tmp_path), tokens, mask)[mask]
    np.testing.assert_allclose(logits_of(load(name), tokens, mask)[mask], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", VARIED)
def test_decoding_token_by_token_gives_what_reading_at_once_gives(load, name):
    model = load(name)
    tokens, mask = (array[:2] for array in tiny.batch())  # the full row and the left-padded one
    expected = logits_of(model, tokens, mask)
    hidden, cache = nnx.jit(lambda model: model.prefill(tokens[:, :8], mask[:, :8], 20))(model)
    step = jax.jit(lambda model, token, cache: model.decode_step(token, cache))
    for index in range(8, 16):
        np.testing.assert_allclose(model.decode_logits(hidden), expected[:, index - 1], atol=1e-5, rtol=0)
        hidden, cache = step(model, tokens[:, index], cache)
    np.testing.assert_allclose(model.decode_logits(hidden), expected[:, 15], atol=1e-5, rtol=0)


def test_a_cache_too_short_for_the_prompt_is_refused(load):
    tokens, mask = tiny.batch()
    with pytest.raises(ValueError, match="cache_len is 15, less than the 16 tokens"):
        load("llama").prefill(tokens, mask, 15)


def test_longrope_rotates_each_row_by_its_own_length(load):
    model = load("phi3_longrope_beyond")
    tokens, mask = tiny.batch()  # rows of 16, 11 and 12 tokens, 12 being the original length
    together = logits_of(model, tokens, mask)
    for row, own in zip(range(3), mask):
        alone = logits_of(model, tokens[row : row + 1, own], own[None, own])[0]
        np.testing.assert_allclose(together[row, own], alone, atol=1e-5, rtol=0)


def test_a_cache_longer_than_longrope_s_original_length_is_refused(load):
    prompt = np.zeros((1, 9), np.int32)
    with pytest.raises(
        ValueError, match="the slots of the cache come to 13 tokens; the phi3 model can decode .* at most 12"
    ):
        load("phi3_longrope_beyond").prefill(prompt, prompt == 0, 13)


@pytest.mark.parametrize("name", ("llama", "gemma3_old"))
def test_padding_on_either_side_changes_nothing(load, name):
    model = load(name)
    tokens = np.random.default_rng(1).integers(0, 40, (1, 9))
    plain = logits_of(model, tokens, np.ones((1, 9), bool))
    for left, right in ((7, 0), (0, 7), (3, 4)):
        width = ((0, 0), (left, right))
        padded = logits_of(model, np.pad(tokens, width, constant_values=5), np.pad(np.ones((1, 9), bool), width))
        np.testing.assert_allclose(padded[:, left : left + 9], plain, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ("llama", "gemma2"))
def test_an_empty_row_stays_finite_forward_and_backward(load, name):
    graphdef, params = nnx.split(load(name))
    tokens, mask = tiny.batch()
    mask = mask.copy()
    mask[1] = False

    def loss(params):
        return nnx.merge(graphdef, params)(tokens, mask).sum()

    value, gradient = jax.jit(jax.value_and_grad(loss))(params)
    assert np.isfinite(value) and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_remat_gives_the_same_gradient(load):
    tokens, mask = tiny.batch()

    def gradient(model):
        graphdef, params = nnx.split(model)
        return jax.jit(jax.grad(lambda params: (nnx.merge(graphdef, params)(tokens, mask) ** 2).sum()))(params)

    plain, again = gradient(load("gemma3_old")), gradient(load("gemma3_old", remat=True))
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4), plain, again)


def test_remat_multiplies_every_layer_once_more(load):
    tokens, mask = tiny.batch()

    def products(remat):
        graphdef, params = nnx.split(load("llama", remat=remat))
        gradient = jax.grad(lambda params: nnx.merge(graphdef, params)(tokens, mask).sum())
        return str(jax.make_jaxpr(gradient)(params)).count("dot_general")

    assert products(remat=True) > products(remat=False)


@pytest.mark.parametrize("name", ["llama", "phi3_longrope_beyond", *VARIED])
def test_rows_laid_in_lines_read_as_rows_by_themselves_do_with_the_same_gradient(load, name):
    """Beginnings that rows share stand in a line once; what any row asks of them adds up."""
    rng, model = np.random.default_rng(0), load(name)
    base = rng.integers(0, 40, 14).astype(np.int32)  # longer than 12, the original length of `phi3_longrope_beyond`
    rows = [
        base,
        np.r_[base[:7], 3, 4],
        np.r_[base[:7], 3, 9, 11, 13],
        base[:4],
        np.zeros(0, np.int32),
        rng.integers(0, 40, 9),
    ]
    rows = [np.asarray(row, np.int32) for row in rows]
    lines = pack(rows, 6, 2, short_length=model.config.max_decode_length)
    width = lines.gather_index.shape[-1]
    tokens = jnp.asarray(pad_right(rows, 6, width, np.int32))
    mask = jnp.asarray(lines.mask.reshape(6, width))
    graphdef, params = nnx.split(model)
    ask = jnp.asarray(rng.standard_normal((6, width, model.config.width)), jnp.float32) * mask[..., None]

    def by_rows(params):
        return nnx.merge(graphdef, params)(tokens, mask)

    def by_lines(params):
        hidden = nnx.merge(graphdef, params).forward_packed(*map(jnp.asarray, lines))
        return hidden[np.arange(6)[:, None] // 3, gather_positions(lines)]

    outcomes = []
    for read in (by_lines, by_rows):
        value, gradient = jax.jit(jax.value_and_grad(lambda p, read=read: jnp.sum(ask * read(p))))(params)
        outcomes.append((jnp.where(mask[..., None], read(params), 0.0), value, gradient))
    chex.assert_trees_all_close(outcomes[0][0], outcomes[1][0], rtol=1e-5, atol=1e-5)
    scale = optax.global_norm(outcomes[1][2])
    difference = optax.global_norm(jax.tree.map(jnp.subtract, outcomes[0][2], outcomes[1][2]))
    assert difference < 1e-5 * scale


def test_a_tpu_puts_tokens_into_the_cache_row_by_row_and_computes_the_same(load):
    model, (tokens, mask) = load("qwen3"), tiny.batch()
    outcomes = []
    for platform in ("cpu", "tpu"):
        model.platform = platform
        _, cache = model.prefill(tokens, mask, tokens.shape[1] + 2)
        for token in (1, 2):
            hidden, cache = model.decode_step(jnp.full(len(tokens), token), cache)
        outcomes.append((hidden, cache))
    model.platform = "cpu"
    chex.assert_trees_all_equal(*outcomes)


def test_bfloat16_computes_from_float32_masters(load):
    model = load("qwen3", dtype="bfloat16")
    tokens, mask = tiny.batch()
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(nnx.state(model)))
    hidden = model(tokens, mask)
    assert hidden.dtype == jnp.bfloat16 and model.logits(hidden).dtype == jnp.float32
    close = logits_of(load("qwen3"), tokens, mask)[mask]
    assert 1e-4 < np.abs(np.asarray(model.logits(hidden))[mask] - close).max() < 0.15


def test_a_huge_model_can_be_planned_without_memory(load):
    model = load("llama_tied")
    config = dataclasses.replace(model.config, width=65536, layers=500, sliding=(False,) * 500)
    graphdef, params = nnx.split(Decoder.abstract(config, param_dtype="bfloat16"))
    batch = jax.ShapeDtypeStruct((2, 8), jnp.int32), jax.ShapeDtypeStruct((2, 8), bool)
    hidden = jax.eval_shape(lambda params, *batch: nnx.merge(graphdef, params)(*batch), params, *batch)
    assert hidden.shape == (2, 8, 65536)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize("name", ("llama", "llama_biases", "qwen3", "gemma2"))
def test_every_parameter_names_its_axes(load, name):
    state = nnx.state(load(name))
    found = {path: variable for path, variable in nnx.to_flat_state(state)}
    assert found.keys() == parameters(load(name).config).keys()
    for path, variable in found.items():
        assert isinstance(variable, nnx.Param) and len(variable.spec) == variable.ndim, path
    assert found["layers", "query"].spec == ("layers", "embed", "heads")


def test_a_tied_head_is_the_embedding_and_learns_with_it(load):
    graphdef, params = nnx.split(load("llama_tied"))
    assert "head" not in params
    hidden = jnp.ones((1, 32))
    gradient = jax.grad(lambda params: nnx.merge(graphdef, params).logits(hidden).sum())(params)
    assert np.abs(gradient["embedding"][...]).min() > 0


def test_random_models_of_one_seed_are_the_same(load):
    config = load("gemma2").config
    one, other, third = (Decoder.from_config(config, seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one.layers.query[...], other.layers.query[...])
    assert not np.array_equal(one.layers.query[...], third.layers.query[...])
    np.testing.assert_array_equal(one.final_norm[...], 0)  # Gemma's norms multiply by one plus this


@pytest.mark.live
@pytest.mark.assets
@pytest.mark.slow
@pytest.mark.parametrize("name", ("smollm2-135m-instruct", "smollm2-135m-gpt2tok"))
def test_a_real_model_gives_the_logits_of_transformers(assets, name):
    pytest.importorskip("torch")
    make_model_golden = pytest.importorskip("golden.make_model_golden")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(assets / name)
    text = "The museum opens at nine. It has 3 floors, and 1,250 paintings hang on them: «Où est la mer?» "
    tokens = np.array([tokenizer(text * 4).input_ids], np.int32)
    mask = np.ones(tokens.shape, bool)
    expected = make_model_golden.transformers_logits(assets / name, tokens, mask)
    np.testing.assert_allclose(logits_of(load_model(assets / name), tokens, mask), expected, atol=1e-3, rtol=0)
