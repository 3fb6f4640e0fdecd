import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gold_jax.config.trl_compat import ATTENTION
from gold_jax.models import attention as module
from gold_jax.models.attention import IMPLEMENTATIONS, PLAIN_LENGTH, attention, choose
from gold_jax.models.blockwise import block_size, blockwise
from gold_jax.models.hf_checkpoint import load_model

from . import tiny

# (T, H, N, window, soft cap): groups of 1, 2 and 7; lengths that are no multiple of a block, and one that is; windows narrower
# than a block, one token wide, wider than several, and wider than everything.
CASES = (
    (41, 6, 6, None, None),
    (64, 4, 2, 5, 2.0),
    (41, 7, 1, None, 2.0),
    (41, 4, 2, 37, None),
    (41, 4, 4, 1, None),
    (13, 4, 2, 50, 0.5),
)
SIZE = 16
# Rounding of float32 sums in another order; bfloat16 has 8 bits, and gradients sum many products.
TOLERANCE = {"float32": dict(atol=1e-5, rtol=1e-5), "bfloat16": dict(atol=6e-2, rtol=3e-2)}

# One function for each implementation, as a model calls it, except that blocks are small and nothing needs its platform.
KERNELS = {
    "blockwise": functools.partial(blockwise, block=16),
    "splash": functools.partial(module.splash, interpret=True),
    "cudnn": functools.partial(module.cudnn, kernel="xla"),
}


def inputs(length, heads, kv_heads, dtype="float32"):
    """Queries, keys, values, what flows back into the output, and a mask: full, left-, right-, both-padded and empty rows."""
    rng = np.random.default_rng(length + heads)
    shapes = [(5, length, count, SIZE) for count in (heads, kv_heads, kv_heads, heads)]
    arrays = [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]
    mask = np.ones((5, length), bool)
    mask[1, : length // 3] = mask[2, -length // 4 :] = mask[3, :4] = mask[3, -5:] = mask[4] = False
    return *arrays, jnp.asarray(mask)


def with_gradients(function, query, key, value, flow, mask):
    """What a function gives, and the gradients of its inputs when `flow` comes back where there are tokens."""
    flow = jnp.where(mask[..., None, None], flow, 0)

    @jax.jit
    def run(query, key, value):
        out, pullback = jax.vjp(lambda *args: function(*args, mask), query, key, value)
        return out, pullback(flow)

    return run(query, key, value)


def plain_like(window, softcap):
    return lambda *args: attention(
        *args[:3], mask=args[3], window=window, softcap=softcap, implementation="plain", platform="cpu"
    )


def kernel_like(name, window, softcap):
    return lambda *args: KERNELS[name](*args, window, softcap, SIZE**-0.5)


def agree(name, case, dtype):
    length, heads, kv_heads, window, softcap = case
    *arrays, mask = inputs(length, heads, kv_heads, dtype)
    exact = [array.astype(jnp.float32) for array in arrays]
    wanted, wanted_gradients = with_gradients(plain_like(window, softcap), *exact, mask)
    found, gradients = with_gradients(kernel_like(name, window, softcap), *arrays, mask)
    assert found.dtype == dtype and all(gradient.dtype == dtype for gradient in gradients)
    np.testing.assert_allclose(found.astype(jnp.float32)[mask], wanted[mask], **TOLERANCE[dtype])
    for one, other in zip(gradients, wanted_gradients):
        np.testing.assert_allclose(one.astype(jnp.float32)[:4], other[:4], **TOLERANCE[dtype])
    assert all(jnp.isfinite(array).all() for array in (found, *gradients))
    assert not any(gradient[4].any() for gradient in gradients)  # of the empty row


@pytest.mark.parametrize("case", CASES, ids=str)
def test_blockwise_is_plain_in_value_and_gradient(case):
    agree("blockwise", case, "float32")


@pytest.mark.parametrize("case", CASES[:3], ids=str)
def test_the_tpu_kernel_is_plain_in_value_and_gradient(case):
    agree("splash", case, "float32")


def test_the_tpu_kernel_is_plain_over_several_of_its_blocks():
    agree("splash", (300, 2, 1, 140, None), "float32")


# cuDNN itself needs a GPU; here XLA's attention reads what is handed to it, and gives zeros at padding as it does.
@pytest.mark.parametrize("case", [case for case in CASES if case[4] is None], ids=str)
def test_rows_are_turned_for_cudnn_and_back(case):
    agree("cudnn", case, "float32")


@pytest.mark.parametrize("name, case", [("blockwise", CASES[1]), ("splash", CASES[1]), ("cudnn", CASES[3])])
def test_bfloat16_is_plain_within_its_rounding(name, case):
    agree(name, case, "bfloat16")


@pytest.mark.parametrize("name", KERNELS)
def test_gradients_that_come_in_at_padding_stay_finite(name):
    *arrays, mask = inputs(20, 2, 1)
    _, pullback = jax.vjp(lambda *args: kernel_like(name, 7, None)(*args, mask), *arrays[:3])
    assert all(jnp.isfinite(gradient).all() for gradient in pullback(arrays[3]))


def test_blockwise_visits_no_block_that_causality_or_the_window_leaves_empty():
    *arrays, mask = inputs(64, 2, 1)
    query, key, value = arrays[:3]
    # What is never read may be anything, while a share of 0 times NaN would show.
    first, last = value.at[:, :16].set(jnp.nan), value.at[:, 48:].set(jnp.nan)
    clean, far, ahead = (kernel_like("blockwise", 8, None)(query, key, values, mask) for values in (value, first, last))
    np.testing.assert_array_equal(clean[0, 32:], far[0, 32:])
    np.testing.assert_array_equal(clean[0, :48], ahead[0, :48])


def test_blockwise_gives_nothing_where_nothing_is_seen():
    *arrays, mask = inputs(41, 4, 2)
    out, pullback = jax.vjp(lambda *args: kernel_like("blockwise", None, None)(*args, mask), *arrays[:3])
    assert not out[4].any() and not out[1, : 41 // 3].any()
    assert not any(gradient[4].any() for gradient in pullback(jnp.ones_like(out)))


def test_blockwise_never_holds_all_scores():
    length, block = 96, 16
    *arrays, mask = inputs(length, 2, 1)
    text = str(jax.make_jaxpr(lambda *args: with_gradients(kernel_like("blockwise", None, 2.0), *args, mask))(*arrays))
    assert f"{block},{block}]" in text and f"{length},{length}]" not in text


@pytest.mark.parametrize("name", ("blockwise", "splash"))
def test_products_of_the_backward_pass_are_float32_too(name):
    *arrays, mask = inputs(20, 2, 1)
    text = str(jax.make_jaxpr(lambda *args: with_gradients(kernel_like(name, None, None), *args, mask))(*arrays))
    exact = text.count("precision=(Precision.HIGHEST, Precision.HIGHEST)")
    assert exact == text.count("dot_general[") >= 7


@pytest.mark.parametrize(
    "length, most, multiple, size", [(1, 128, 1, 1), (128, 128, 1, 128), (300, 128, 1, 100), (640, 512, 128, 384)]
)
def test_blocks_are_even_and_pad_little(length, most, multiple, size):
    assert block_size(length, most, multiple=multiple) == size


def chosen(platform, *, length=1024, dtype="bfloat16", head_dim=64, softcap=None, implementation="auto"):
    return choose(implementation, platform, dtype, head_dim, softcap, length=length)


def test_auto_takes_what_suits_platform_model_and_length():
    assert [chosen(platform) for platform in module.PLATFORMS] == ["blockwise", "cudnn", "splash", "blockwise"]
    assert {chosen(platform, length=PLAIN_LENGTH) for platform in module.PLATFORMS} == {"plain"}
    assert (
        chosen("cuda", softcap=50.0) == chosen("cuda", dtype="float32") == chosen("cuda", head_dim=256) == "blockwise"
    )
    assert chosen("tpu", softcap=50.0, head_dim=256) == "splash" and chosen("tpu", dtype="float32") == "blockwise"


@pytest.mark.parametrize(
    "platform, options, says",
    [
        ("cpu", dict(implementation="splash"), "kernel for TPUs, and the model is for cpu"),
        ("tpu", dict(implementation="cudnn"), "needs an NVIDIA GPU"),
        ("cuda", dict(implementation="cudnn", dtype="float32"), "not float32; use --bf16"),
        ("cuda", dict(implementation="cudnn", softcap=50.0), "caps its attention scores at 50"),
        ("cuda", dict(implementation="cudnn", head_dim=12), "a multiple of 8, the model's are 12"),
        ("cpu", dict(implementation="flash"), "'flash' is not known; it must be auto, plain, blockwise, cudnn, splash"),
        ("gpu", dict(), "platform 'gpu' is not known; it must be one of cpu, cuda, tpu, other"),
    ],
)
def test_what_is_asked_for_by_name_and_cannot_be_done_is_refused(platform, options, says):
    with pytest.raises(ValueError, match=says):
        chosen(platform, **options)


def test_shapes_that_do_not_fit_are_refused():
    query, key, value, _, mask = inputs(8, 4, 2)
    for wrong in (dict(key=key[:, :5]), dict(query=query[:, :, :3]), dict(mask=mask[:, 1:])):
        given = dict(query=query, key=key, value=value, mask=mask) | wrong
        with pytest.raises(ValueError, match="H a multiple of N"):
            attention(**given)


def test_the_flag_knows_every_implementation():
    assert ATTENTION == ("auto", *IMPLEMENTATIONS)


def hidden_and_gradient(model, tokens, mask):
    graphdef, params = nnx.split(model)

    @jax.jit
    def run(params):
        def loss(params):
            hidden = nnx.merge(graphdef, params)(tokens, mask)
            return jnp.square(hidden * mask[..., None]).mean(), hidden

        return jax.value_and_grad(loss, has_aux=True)(params)

    (_, hidden), gradient = run(params)
    return hidden[mask], gradient


# Layers that are all full; that all slide; of both kinds in turn, with two ropes or with soft caps.
@pytest.mark.parametrize(
    "family, name, remat",
    [
        ("llama", "blockwise", True),
        ("mistral_window", "splash", False),
        ("gemma3_old", "blockwise", False),
        ("gemma2", "blockwise", True),
        ("gemma2", "splash", True),
    ],
)
def test_a_model_computes_the_same_with_every_implementation(family, name, remat, tmp_path, monkeypatch):
    folder = tiny.write_folder(family, tmp_path)
    tokens, mask = tiny.batch()
    monkeypatch.setattr(module, "blockwise", lambda *args, block: blockwise(*args, block=8))
    monkeypatch.setattr(module, "splash", KERNELS["splash"])
    wanted = hidden_and_gradient(load_model(folder, attention="plain"), tokens, mask)
    model = load_model(folder, attention=name, remat=remat, platform="tpu" if name == "splash" else None)
    found = hidden_and_gradient(model, tokens, mask)
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-4, atol=2e-5), found, wanted)


def test_prompts_are_read_by_blocks_as_at_once(tmp_path):
    folder = tiny.write_folder("gemma3_old", tmp_path)
    tokens, mask = (array[:2] for array in tiny.batch())  # the full row and the left-padded one
    read = jax.jit(lambda model: model.prefill(tokens, mask, 20))
    (hidden, cache), (wanted, wanted_cache) = (
        read(load_model(folder, attention=name)) for name in ("blockwise", "plain")
    )
    np.testing.assert_allclose(hidden, wanted, atol=1e-5)
    held = jnp.arange(20) < cache.length[:, None]
    for slots, ours, theirs in ((3, cache.keys, wanted_cache.keys), (2, cache.values, wanted_cache.values)):
        for one, other in zip(ours, theirs):
            np.testing.assert_allclose(*(jnp.moveaxis(x, slots, 1)[held] for x in (one, other)), atol=1e-5)


def test_a_model_is_refused_before_its_weights_are_read(tmp_path):
    folder = tiny.write_folder("gemma2", tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="The gemma2 model: .*caps its attention scores at 2"):
        load_model(folder, dtype="bfloat16", attention="cudnn", platform="cuda")


def test_a_model_says_what_its_attention_comes_to(tmp_path):
    folder = tiny.write_folder("llama", tmp_path)
    words = {
        options: load_model(folder, attention=options[0], platform=options[1]).describe_attention()
        for options in (("auto", "cpu"), ("plain", "cpu"))
    }
    assert words == {("auto", "cpu"): "plain up to 256 tokens, blockwise beyond", ("plain", "cpu"): "plain"}
