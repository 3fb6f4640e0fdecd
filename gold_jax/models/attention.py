"""Attention over whole sequences: one meaning, four ways to compute it.

| name | is | holds `[T, T]` scores |
| --- | --- | --- |
| `plain` | a float32 softmax over all scores | yes |
| `blockwise` | a running softmax over blocks of queries and keys, in plain JAX: any platform, any model | no |
| `cudnn` | cuDNN's flash attention, through `jax.nn.dot_product_attention`: NVIDIA GPUs, 16-bit, no soft cap | no |
| `splash` | JAX's Pallas kernel for TPUs | no |

`auto` takes one of them for a platform that is named, never looked up while tracing: a program compiled on a CPU host
for a TPU gets the TPU's. (`jax.lax.platform_dependent` would decide at lowering, but every branch is then traced and
differentiated everywhere: cuDNN's cannot be where there is no cuDNN, and each branch's residuals are kept for all.)

Shapes: B rows, T tokens, H heads, N key-value heads, K head_dim. The tokens of a row stand together, padding on either
side.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from gold_jax.models.blockwise import MASK_VALUE, block_size, blockwise, capped
from gold_jax.models.config import DecoderConfig

IMPLEMENTATIONS = ("plain", "blockwise", "cudnn", "splash")
PLATFORMS = ("cpu", "cuda", "tpu", "other")

# Up to this many tokens the scores are no larger than a layer's other activations, and on CPUs `plain` takes no longer
# than `blockwise`, give or take a few percent; at 512 it takes a fifth longer, at 1,024 two thirds.
PLAIN_LENGTH = 256
_SPLASH_LANES = 128  # a TPU's vector width, of which the kernel's blocks must be multiples


def attention(query, key, value, *, mask, window=None, softcap=None, scale=None, implementation="auto", platform=None):
    """Causal grouped-query self-attention: `softmax(cap(scale · q·k)) v` over the tokens up to a query's own.

    Args:
        query: [B, T, H, K], of which the result has shape and dtype; key, value: [B, T, N, K], H a multiple of N.
        mask: bool [B, T], where there is a token; values at padding are finite and mean nothing.
        window: how many tokens a query sees, its own included; None for all before it.
        softcap: `cap · tanh(score / cap)` on scores; None for none.
        scale: factor on scores; None for `K ** -0.5`.
        implementation: "auto" or one of `IMPLEMENTATIONS`.
        platform: one of `PLATFORMS`, where it will run; None for where JAX runs now.

    Raises:
        ValueError: an implementation that does not exist, or that cannot compute this here.
    """
    (rows, length, heads, size), expected = query.shape, (*query.shape[:2], key.shape[2], query.shape[3])
    if key.shape != expected or value.shape != expected or heads % key.shape[2] or mask.shape != (rows, length):
        raise ValueError(
            f"attention takes query [B, T, H, K], key and value [B, T, N, K] and mask [B, T] with H a multiple of N; got "
            f"{query.shape}, {key.shape}, {value.shape} and {mask.shape}."
        )
    platform = current_platform() if platform is None else platform
    chosen = choose(implementation, platform, query.dtype, size, softcap, length=length)
    scale = size**-0.5 if scale is None else scale
    return _compute(chosen, platform, window, softcap, scale, query, key, value, mask.astype(bool))


def choose(implementation: str, platform: str, dtype, head_dim: int, softcap: float | None, *, length: int) -> str:
    """The one of `IMPLEMENTATIONS` that computes attention over `length` tokens; raises as `check`."""
    check(implementation, platform, dtype, head_dim, softcap)
    if implementation != "auto":
        return implementation
    if length <= PLAIN_LENGTH:
        return "plain"
    # float32 models are wanted exact: there the kernels' own products would be the less exact part.
    if platform == "tpu" and jnp.dtype(dtype).itemsize == 2:
        return "splash"
    # Heads wider than 128 need a Hopper card, which a name alone does not tell.
    if platform == "cuda" and head_dim <= 128 and not _why_unsupported("cudnn", platform, dtype, head_dim, softcap):
        return "cudnn"
    return "blockwise"


def check(implementation: str, platform: str, dtype, head_dim: int, softcap: float | None) -> None:
    """Raises a ValueError where a setting does not exist, or cannot do what a model needs, and says why."""
    if implementation not in ("auto", *IMPLEMENTATIONS):
        known = ", ".join(IMPLEMENTATIONS)
        raise ValueError(f"attention implementation {implementation!r} is not known; it must be auto, {known}.")
    if platform not in PLATFORMS:
        raise ValueError(f"platform {platform!r} is not known; it must be one of {', '.join(PLATFORMS)}.")
    fault = _why_unsupported(implementation, platform, dtype, head_dim, softcap)
    if fault:
        raise ValueError(f"attention implementation {implementation!r} cannot be used: {fault}.")


def check_model(config: DecoderConfig, dtype, implementation: str, platform: str) -> None:
    """`check` for a model, whose family an error names."""
    try:
        check(implementation, platform, dtype, config.head_dim, config.attention_softcap)
    except ValueError as error:
        raise ValueError(f"The {config.family} model: {error}") from None


def _why_unsupported(implementation: str, platform: str, dtype, head_dim: int, softcap: float | None) -> str | None:
    """Why an implementation cannot compute this, or None."""
    if implementation == "splash" and platform != "tpu":
        return f"it is a kernel for TPUs, and the model is for {platform}; blockwise runs everywhere"
    if implementation != "cudnn":
        return None
    if platform != "cuda":
        return f"it needs an NVIDIA GPU, Ampere or newer, and the model is for {platform}; blockwise runs everywhere"
    if jnp.dtype(dtype).itemsize != 2:
        return f"it computes in bfloat16 or float16, not {jnp.dtype(dtype).name}; use --bf16, or blockwise"
    if softcap is not None:
        return f"the model caps its attention scores at {softcap:g}, which cuDNN has no way to do; use blockwise"
    if head_dim % 8 or head_dim > 256:
        return f"its heads are at most 256 wide and a multiple of 8, the model's are {head_dim}; use blockwise"
    return None


def current_platform() -> str:
    """The one of `PLATFORMS` that JAX runs on; `cuda` where cuDNN's flash attention does (Ampere or newer)."""
    backend = jax.default_backend()
    if backend != "gpu":
        return backend if backend in PLATFORMS else "other"
    # ROCm calls itself gpu too; its cards are named gfx…, NVIDIA's by a number such as 9.0.
    capability = str(getattr(jax.local_devices()[0], "compute_capability", ""))
    return "cuda" if capability.replace(".", "").isdigit() and float(capability) >= 8 else "other"


def make_layer_attention(config: DecoderConfig, mask: jax.Array, dtype, implementation: str, platform: str):
    """The attention of a scan over a model's layers, with what all layers share computed once.

    `mask` is bool [B, T], where there is a token, and `dtype` that of queries, keys and values; raises as `check`.

    Returns:
        What all layers share, arrays with an axis of rows first; and a function of it, of a traced bool, whether the
        layer slides, and of queries [B, T, H, K], keys and values [B, T, N, K], which gives [B, T, H * K].
    """
    length, cap, scale = mask.shape[1], config.attention_softcap, config.query_scale
    chosen = choose(implementation, platform, dtype, config.head_dim, cap, length=length)
    window = config.window if config.window is not None and config.window < length else None
    used = {window if sliding else None for sliding in config.sliding}
    windows = [window for window in dict.fromkeys((None, window)) if window in used]  # one, or none and one

    if chosen == "plain":
        shared = [_allowed(mask, window) for window in windows]
        # The backward pass computes the scores again: kept, they would be the largest thing a layer leaves behind.
        lean = jax.checkpoint(functools.partial(plain, softcap=cap, scale=scale), prevent_cse=False)

        def attend(allowed, sliding, query, key, value):
            out = lean(query, key, value, allowed[0] if len(allowed) == 1 else jnp.where(sliding, *allowed[::-1]))
            return out.reshape(*query.shape[:2], -1)

        return shared, attend

    # A kernel's window is static, which layer it is for is not: both are compiled, one runs.
    kernels = [functools.partial(_compute, chosen, platform, window, cap, scale) for window in windows]

    def attend_by_kernel(mask, sliding, *arrays):
        out = kernels[0](*arrays, mask) if len(kernels) == 1 else jax.lax.cond(sliding, *kernels[::-1], *arrays, mask)
        return out.reshape(*out.shape[:2], -1)

    return mask, attend_by_kernel


def _compute(implementation: str, platform: str, window, softcap, scale, query, key, value, mask) -> jax.Array:
    if implementation == "plain":
        return plain(query, key, value, _allowed(mask, window), softcap=softcap, scale=scale)
    if implementation == "blockwise":
        # CPUs want blocks that stay in their caches, accelerators few steps.
        return blockwise(query, key, value, mask, window, softcap, scale, block=128 if platform == "cpu" else 512)
    return {"cudnn": cudnn, "splash": splash}[implementation](query, key, value, mask, window, softcap, scale)


def plain(query, key, value, allowed: jax.Array, *, softcap: float | None, scale: float) -> jax.Array:
    """Attention with all scores at once, of query [B, T, H, K] to key and value [B, S, N, K] as bool `allowed` [B, T, S] says."""
    rows, length, _, size = query.shape
    grouped = query.reshape(rows, length, key.shape[2], -1, size)
    scores = jnp.einsum("btngk,bsnk->bngts", grouped, key, preferred_element_type=jnp.float32)
    weights = masked_softmax(scores, allowed[:, None, None], softcap=softcap, scale=scale).astype(value.dtype)
    return jnp.einsum("bngts,bsnk->btngk", weights, value).reshape(query.shape)


def masked_softmax(scores: jax.Array, allowed: jax.Array, *, softcap: float | None, scale: float) -> jax.Array:
    """Softmax over the last axis of unscaled float32 scores, among what is allowed."""
    return jax.nn.softmax(jnp.where(allowed, capped(scores * scale, softcap), MASK_VALUE), axis=-1)


def _allowed(mask: jax.Array, window: int | None) -> jax.Array:
    """What each query sees: bool [B, T, T]."""
    order = jnp.arange(mask.shape[1])
    distance = order[:, None] - order[None, :]
    visible = mask[:, None, :] & (distance >= 0)
    return visible if window is None else visible & (distance < window)


def cudnn(query, key, value, mask, window, softcap, scale, *, kernel: str = "cudnn") -> jax.Array:
    """cuDNN's flash attention; arguments as `attention`, shapes too. `kernel`: jax.nn's name for what computes it.

    cuDNN takes the length of a row, not its offset: rows are rolled until their tokens come first. (A mask would be
    [B, 1, T, T].)
    """
    del softcap  # `check` has seen to it that there is none
    start = jnp.argmax(mask, axis=1)
    # A row without tokens reads one of padding: a softmax over nothing is not finite everywhere.
    lengths = jnp.maximum(mask.sum(axis=1, dtype=jnp.int32), 1)
    rolled = (_roll(x, start) for x in (query, key, value))
    options = {"scale": scale, "is_causal": True, "local_window_size": None if window is None else (window - 1, 0)}
    options |= {"query_seq_lengths": lengths, "key_value_seq_lengths": lengths, "implementation": kernel}
    out = jax.nn.dot_product_attention(*rolled, **options)
    inside = jnp.arange(mask.shape[1]) < lengths[:, None]
    return _roll(jnp.where(inside[..., None, None], out, 0), -start)


@jax.custom_vjp
def _roll(x: jax.Array, start: jax.Array) -> jax.Array:
    """Every row of x [B, T, …] rolled so that its slot `start` [B] comes first."""
    order = (jnp.arange(x.shape[1]) + start[:, None]) % x.shape[1]
    return jnp.take_along_axis(x, order.reshape(*order.shape, *(1,) * (x.ndim - 2)), axis=1)


# The gradient of a roll is the inverse roll: a gather, where JAX would scatter.
_roll.defvjp(lambda x, start: (_roll(x, start), start), lambda start, gradient: (_roll(gradient, -start), None))


def splash(query, key, value, mask, window, softcap, scale, *, block: int = 512, interpret: bool = False) -> jax.Array:
    """JAX's Pallas kernel for TPUs; arguments as `attention`, shapes too.

    `block`: most queries and keys in a step. `interpret`: compute what the kernel says, slowly, on any platform. Padding
    attends to padding as tokens do to tokens, so that no softmax is over nothing.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    length, heads = query.shape[1:3]
    size = block_size(length, block, multiple=_SPLASH_LANES)
    extra = -length % size
    query, key, value = (jnp.pad(x, ((0, 0), (0, extra), (0, 0), (0, 0))) for x in (query * scale, key, value))
    segments = jnp.pad(mask, ((0, 0), (0, extra))).astype(jnp.int32)
    square = (length + extra,) * 2
    # Reaching `window - 1` back and none ahead is causal as well.
    static = masks.CausalMask(square) if window is None else masks.LocalMask(square, (window - 1, 0), 0)
    options = {"head_shards": 1, "q_seq_shards": 1, "attn_logits_soft_cap": softcap, "interpret": interpret}
    parts = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")

    def compute(query, key, value, segments):  # heads outside tokens
        blocks = kernels.BlockSizes(**{f"block_{part}": size for part in parts})
        kernel = kernels.make_splash_mha(masks.MultiHeadMask([static] * heads), block_sizes=blocks, **options)
        rows = jax.vmap(lambda q, k, v, own: kernel(q, k, v, segment_ids=kernels.SegmentIds(own, own)))
        return rows(query, key, value, segments)

    if query.dtype == jnp.float32:
        compute = _in_full_float32(compute)
    out = compute(*(jnp.swapaxes(x, 1, 2) for x in (query, key, value)), segments)
    return jnp.swapaxes(out, 1, 2)[:, :length]


def _in_full_float32(function: Callable) -> Callable:
    """A function that multiplies float32 as float32, in its gradient too, which JAX traces outside the caller's setting."""
    highest = functools.partial(jax.default_matmul_precision, "highest")

    @jax.custom_vjp
    def precise(*args):
        with highest():
            return function(*args)

    def forward(*args):
        with highest():
            return jax.vjp(function, *args)

    def backward(pullback, gradient):
        with highest():
            return pullback(gradient)

    precise.defvjp(forward, backward)
    return precise
