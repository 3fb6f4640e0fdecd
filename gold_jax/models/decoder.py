"""One flax.nnx decoder for every family that `DecoderConfig` describes.

Parameters of all layers are stacked `[L, ...]` and scanned, so that compiling takes the time of one layer. They are
stored in `param_dtype` (float32 masters for training) and cast to the compute `dtype` inside the scan: only one layer's
copy is alive at a time. Norms, rotations, softmax and logits are float32 whatever `dtype` is.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import unflatten_dict

from gold_jax.models import layer, repack
from gold_jax.models.attention import PLAIN_LENGTH, check_model, choose, current_platform, make_layer_attention
from gold_jax.models.blockwise import capped
from gold_jax.models.config import DecoderConfig
from gold_jax.models.functional import Params, merge, split
from gold_jax.models.parameters import layer_parameters, parameters
from gold_jax.models.quantization import Int8, to_int8, vectors_to_int8
from gold_jax.models.rope import Rope
from gold_jax.sharding import collectives
from gold_jax.sharding.collectives import ShardedParam
from gold_jax.sharding.placement import Placement


class Cache(NamedTuple):
    """Keys and values of what has been read, one pair of arrays per layer so that XLA updates each in place.

    A row's tokens are in its first slots, whatever the other rows hold: a token's slot is its rotary position. On a mesh
    a head may be there several times, once for each of the devices that share its queries (`Placement.kv_repeats`).
    """

    # L of [B, kv_heads, head_dim, S], which a query's product reads without a transpose, and of [B, kv_heads, S, head_dim].
    keys: tuple[jax.Array | Int8, ...]
    values: tuple[jax.Array | Int8, ...]
    length: jax.Array  # int32 [B], tokens that each row holds; its next one goes to this slot

    @property
    def slots(self) -> int:
        """S."""
        return jax.tree.leaves(self.values)[0].shape[2]

    def map_slots(self, change: Callable[..., jax.Array], *others: "Cache") -> "Cache":
        """`change(axis, array, *the same of others)` of all arrays of keys and values, `axis` being that of the slots."""

        def changed(name: str, axis: int):
            held = (getattr(cache, name) for cache in (self, *others))
            return jax.tree.map(lambda x, *more: change(min(axis, x.ndim - 1), x, *more), *held)

        return self._replace(keys=changed("keys", 3), values=changed("values", 2))

    def to_int8(self) -> "Cache":
        """The same with keys and values rounded to 8 bits, one scale for each head's key or value in a slot."""
        keys = tuple(vectors_to_int8(layer, 2) for layer in self.keys)
        return self._replace(keys=keys, values=tuple(vectors_to_int8(layer, 3) for layer in self.values))


class DecodingWeights(NamedTuple):
    """What `Decoder.decode_step` reads for every token: each layer's own parameters by name, and the head [V, D]."""

    layers: list[layer.Weights]
    head: jax.Array | Int8


def full_float32(method):
    """A method whose products multiply float32 as float32 where that is the compute dtype.

    GPUs and TPUs by default round the factors to fewer bits, which moves logits far beyond this decoder's tolerance.
    """

    @functools.wraps(method)
    def precise(self, *args, **kwargs):
        with jax.default_matmul_precision("highest") if self.dtype == jnp.float32 else contextlib.nullcontext():
            return method(self, *args, **kwargs)

    return precise


class Layers(nnx.Module):
    """The stacked parameters of all layers, one attribute each."""


class Decoder(nnx.Module):
    """A causal language model up to its head.

    Its only variables are `nnx.Param`s; each carries its logical axes, such as `("layers", "embed", "heads")`, under
    the metadata key `spec`. `models.functional.split` gives `(graphdef, params)`, a value that nothing else shares.
    Once made, a decoder is not written into: `replace` makes another.

    Attributes:
        config: the `DecoderConfig`.
        dtype: dtype of computation.
        param_dtype: dtype in which parameters are stored.
        remat: recompute each layer in the backward pass instead of keeping its activations.
        attention: how whole sequences are attended to: "auto", or one of `models.attention.IMPLEMENTATIONS`.
        platform: the one of `models.attention.PLATFORMS` that the model is to run on.
        placement: mesh and layout of the parameters; None: one device.
    """

    def __init__(
        self,
        config: DecoderConfig,
        key: jax.Array | int,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        remat: bool = False,
        attention: str = "auto",
        platform: str | None = None,
        placement: Placement | None = None,
    ):
        """Initialise at random (normal, standard deviation 0.02; norms to one). See also `load_model` and `shard`.

        `key` may be an int seed. `platform` None is where JAX runs now; name it for a model that is compiled here to run
        elsewhere.
        """
        self.config, self.remat, self.attention, self.placement = config, remat, attention, placement
        self.dtype, self.param_dtype = jnp.dtype(dtype), jnp.dtype(param_dtype)
        self.platform = current_platform() if platform is None else platform
        check_model(config, self.dtype, attention, self.platform)
        key = jax.random.key(key) if isinstance(key, int) else key
        start = {"norm": 1.0 - config.norm_offset, "zeros": 0.0}
        self.layers = Layers()
        for index, (path, (shape, spec, init)) in enumerate(parameters(config).items()):
            if init == "matrix":
                normal = 0.02 * jax.random.normal(jax.random.fold_in(key, index), shape, jnp.float32)
                value = normal.astype(self.param_dtype)
            else:
                value = jnp.full(shape, start[init], self.param_dtype)
            setattr(self.layers if len(path) == 2 else self, path[-1], nnx.Param(value, spec=spec))

    @classmethod
    def from_config(cls, config: DecoderConfig, key: jax.Array | int, *args, **settings) -> "Decoder":
        """A randomly initialised model: the constructor, by the name that transformers has for it."""
        return cls(config, key, *args, **settings)

    @classmethod
    def abstract(cls, config: DecoderConfig, *args, **settings) -> "Decoder":
        """A model whose parameters are `jax.ShapeDtypeStruct`s: to plan with, or to fill. Settings as the constructor's."""
        return nnx.eval_shape(lambda: cls(config, 0, *args, **settings))

    @full_float32
    def __call__(self, tokens: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Hidden states [B, T, D] after the final norm, in `dtype`, of tokens int32 [B, T].

        `mask` bool [B, T] is True where there is a token; None: everywhere. Padding may stand on either side of a row; a
        row may be empty. Values at padding are finite and mean nothing.
        """
        tokens = jnp.asarray(tokens)
        return self._forward(tokens, jnp.ones(tokens.shape, bool) if mask is None else mask)[0]

    @full_float32
    def forward_packed(self, tokens, gather_index, first_slot, mask) -> jax.Array:
        """As `__call__`, hidden states [S, N, D] of packed rows that share prefixes (see `text.packing`).

        Args:
            tokens: int32 [S, N], the packed sequences.
            gather_index: int32 [S, R, T], index into its sequence of each token of a row; rows are padded on the right.
            first_slot: int32 [S, N], one of the sequence's R·T row slots that hold the token (its position is the same
                in all of them, and all are of up to `config.max_decode_length` tokens, or all of more).
            mask: bool [S, R, T], True where a row has a token.
        """
        _, rows, length = gather_index.shape

        def attend_to_rows(attend, layout, sliding, query, key, value):
            (gather_index, first_slot), shared = layout
            sequences = len(gather_index)  # on a mesh a device's own

            def to_rows(x):  # [S, N, H, K] -> [B, T, H, K]
                rows = repack.to_rows(x.reshape(*x.shape[:2], -1), gather_index)
                return rows.reshape(-1, length, *x.shape[2:])

            attended = attend(shared, sliding, *map(to_rows, (query, key, value)))
            attended = attended.reshape(sequences, rows * length, -1)
            return repack.to_sequences(attended, gather_index, first_slot)  # [B, T, F] -> [S, N, F]

        lengths = jnp.take_along_axis(mask.sum(axis=2, dtype=jnp.int32), first_slot // length, axis=1)
        mask, positions = mask.reshape(-1, length), first_slot % length
        return self._layers(tokens, positions, lengths, mask, attend_to_rows, (gather_index, first_slot))[0]

    @classmethod
    def from_params(cls, config: DecoderConfig, params: Params, **settings) -> "Decoder":
        """A model that holds parameters: nested dicts by the paths of `models.parameters.parameters`, of arrays or shapes."""
        return merge(split(cls.abstract(config, **settings))[0], params)

    def replace(self, params: Params | None = None, **settings) -> "Decoder":
        """Another model, with these parameters or settings in place of this one's, which stays as it is."""
        names = ("dtype", "param_dtype", "remat", "attention", "platform", "placement")
        own = {name: getattr(self, name) for name in names}
        return Decoder.from_params(self.config, split(self)[1] if params is None else params, **(own | settings))

    def shard(self, placement: Placement) -> "Decoder":
        """This model with its parameters on a mesh."""
        return self.replace(jax.device_put(split(self)[1], self.shardings(placement)), placement=placement)

    def shardings(self, placement: Placement) -> Params:
        """The sharding of every parameter on a mesh: a tree like the parameters."""
        table = parameters(self.config).items()
        return unflatten_dict({path: placement.param_sharding(info.shape, info.spec) for path, info in table})

    def describe_attention(self) -> str:
        """Which implementation of attention this model's settings come to."""
        config = self.config
        model = self.attention, self.platform, self.dtype, config.head_dim, config.attention_softcap
        short, long = (choose(*model, length=length) for length in (1, PLAIN_LENGTH + 1))
        return short if short == long else f"{short} up to {PLAIN_LENGTH} tokens, {long} beyond"

    def head_weight(self) -> jax.Array:
        """The output projection [V, D], in `param_dtype`: the embedding where the two are tied."""
        return self.embedding[...] if self.config.tied else self.head[...]

    @full_float32
    def logits(self, hidden: jax.Array) -> jax.Array:
        """Float32 logits [..., V] of hidden states [..., D], soft cap included."""
        weight = self.head_weight().astype(self.dtype)
        logits = jnp.einsum("...d,vd->...v", hidden.astype(self.dtype), weight, preferred_element_type=jnp.float32)
        return capped(logits, self.config.final_softcap)

    @full_float32
    def decode_logits(self, hidden: jax.Array, weights: DecodingWeights | None = None) -> jax.Array:
        """`logits` of a few hidden states [B, D]; `weights` as in `decode_step`.

        A large matrix times a few columns is a third faster on CPUs than a few rows times its transpose; the barriers
        keep XLA from making the one of the other.
        """
        head = self.decoding_weights().head if weights is None else weights.head
        columns = jax.lax.optimization_barrier(hidden.astype(self.dtype).T)
        rows, scale = (head.values.astype(self.dtype), head.scale) if isinstance(head, Int8) else (head, None)
        logits = jax.lax.optimization_barrier(jnp.matmul(rows, columns, preferred_element_type=jnp.float32)).T
        return capped(logits if scale is None else logits * scale, self.config.final_softcap)

    @jax.named_scope("prefill")
    @full_float32
    def prefill(self, tokens: jax.Array, mask: jax.Array, cache_len: int) -> tuple[jax.Array, Cache]:
        """Read prompts: hidden states [B, D] of their last tokens, and the cache.

        `tokens` and `mask` are [B, P], the tokens of a row together, padding on either side. `cache_len` (static): slots
        of the cache, at least P; P plus the tokens to come is enough.
        """
        length = tokens.shape[1]
        self.config.check_decode_length(cache_len, "the slots of the cache")
        if cache_len < length:
            raise ValueError(f"cache_len is {cache_len}, less than the {length} tokens of the prompts it must hold.")
        count = mask.sum(axis=1, dtype=jnp.int32)
        order = jnp.arange(length)
        tokens = jnp.take_along_axis(tokens, (order + jnp.argmax(mask, axis=1)[:, None]) % length, axis=1)
        hidden, (keys, values) = self._forward(tokens, order < count[:, None], keep_cache=True)
        last = jnp.maximum(count - 1, 0)[:, None, None]
        heads = self.config.heads, self.config.kv_heads
        repeats = 1 if self.placement is None else self.placement.kv_repeats(*heads)

        def to_slots(stacked, axis):  # [L, B, P, N, K] -> L times [B, N, S, K] or, with the slots last, [B, N, K, S]
            moved = jnp.moveaxis(stacked if repeats == 1 else jnp.repeat(stacked, repeats, axis=3), 2, axis)
            padding = [(0, cache_len - length if other == axis else 0) for other in range(5)]
            return tuple(jnp.pad(moved, padding)[index] for index in range(self.config.layers))

        cache = Cache(keys=to_slots(keys, 4), values=to_slots(values, 3), length=count)
        return jnp.take_along_axis(hidden, last, axis=1)[:, 0], cache

    def decoding_weights(self, quantization: str = "none") -> DecodingWeights:
        """The parameters in the form that `decode_step` reads, in `dtype`: make them once, before the loop.

        A scan, or a slice inside the loop, would copy every layer's weights for every token. On one CPU, parameters
        that are in `dtype` already are viewed, and then live as long as the views, even where they are donated; else
        this is a copy. On a mesh it is sharded over `tensor` alone, so that a step all-gathers no weights. With
        any `quantization` but "none" matrices are `Int8`: half of bfloat16's bytes, and not the model's own numbers.
        """
        stacked, head, dtype = self._stacked(), self.head_weight(), self.dtype
        (own, *_), head_sharding = self.decoding_shardings(quantization)

        def copies(name, x):
            if isinstance(own[name], Int8):
                return _layers_to_int8(x, self.placement and own[name])
            return _layer_views(x, dtype) if self.placement is None else _layer_copies(x, dtype, own[name])

        columns = [copies(name, x) for name, x in stacked.items()]
        rounded = isinstance(head_sharding, Int8)
        if self.placement is not None:
            # From sharded columns to sharded rows: replicated in between, as XLA would do by itself, with a warning.
            head = _cast_and_shard(head, head.dtype if rounded else dtype, self.placement.replicated)
        if rounded:
            head = to_int8(head, -1, self.placement and head_sharding)
        else:
            head = head.astype(dtype) if self.placement is None else _cast_and_shard(head, dtype, head_sharding)
        return DecodingWeights([dict(zip(stacked, own)) for own in zip(*columns)], head)

    def decoding_shardings(self, quantization: str = "none") -> DecodingWeights:
        """The shardings of the weights that decoding reads; without a mesh None in the place of each."""
        config = self.config

        def sharding(shape, spec):
            return None if self.placement is None else self.placement.decode_sharding(shape, spec)

        def of_matrix(shape, spec, kept):  # `kept`: the axis that a product does not sum over
            whole = sharding(shape, spec)
            return whole if quantization == "none" else Int8(whole, sharding((shape[kept],), (spec[kept],)))

        own = {
            name: of_matrix(info.shape, info.spec, 1) if info.init == "matrix" else sharding(info.shape, info.spec)
            for name, info in layer_parameters(config).items()
        }
        head = of_matrix((config.vocab_size, config.width), ("vocab", "embed"), 0)
        return DecodingWeights([dict(own) for _ in range(config.layers)], head)

    @jax.named_scope("decode")
    @full_float32
    def decode_step(self, tokens: jax.Array, cache: Cache, weights: DecodingWeights | None = None):
        """Read one token per row, int32 [B]: hidden states [B, D], and the cache with the tokens in it.

        `cache` is of `prefill` or of the step before. A row that is full is read wrongly: see to it that there is room.
        `weights` are `decoding_weights()`, made outside the loop; None makes them here.
        """
        config = self.config
        config.check_decode_length(cache.slots, "the slots of the cache")
        weights = self.decoding_weights() if weights is None else weights
        distance = cache.length[:, None] - jnp.arange(cache.slots)
        visible = distance >= 0
        in_window = None if config.window is None else visible & (distance < config.window)
        tables = self._tables(cache.length[:, None])
        x, caches = self._embed(tokens), []
        arrays = zip(weights.layers, cache.keys, cache.values)
        for rope, sliding, (own, *cached) in zip(config.layer_ropes, config.sliding, arrays):
            seen = tables[rope], in_window if sliding else visible
            x, *written = layer.decode(config, own, x, *seen, (*cached, cache.length), self.platform, self.placement)
            caches.append(written)
        keys, values = zip(*caches)
        return layer.final_norm(config, self.final_norm[...], x), Cache(keys, values, cache.length + 1)

    def _embed(self, tokens: jax.Array) -> jax.Array:
        table = self.embedding[...]
        if self.placement is None:
            x = table[tokens].astype(self.dtype)
        else:
            x = collectives.embedding_lookup(self.placement, table, tokens, self.dtype)
        scale = self.config.embedding_scale
        return x if scale == 1.0 else x * jnp.asarray(scale, self.dtype)

    def _tables(self, positions, lengths=None) -> dict[Rope | None, tuple[jax.Array, jax.Array]]:
        """Cosines and sines by the layers' different rotations, as `Rope.tables`; for None those that rotate by nothing."""
        ropes, size = dict.fromkeys(self.config.layer_ropes), self.config.head_dim
        tables = {rope: rope.tables(positions, size, lengths) for rope in ropes if rope is not None}
        if None in ropes:
            like = next(iter(tables.values()), [jnp.zeros((*positions.shape, size // 2))])[0]
            tables[None] = jnp.ones_like(like), jnp.zeros_like(like)
        return tables

    def _forward(self, tokens: jax.Array, mask: jax.Array, *, keep_cache: bool = False):
        """Hidden states of rows, and where they are kept the rotated keys and the values of all layers."""
        mask = mask.astype(bool)
        positions = jnp.maximum(jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, 0)
        lengths = mask.sum(axis=1, keepdims=True, dtype=jnp.int32)
        return self._layers(tokens, positions, lengths, mask, keep_cache=keep_cache)

    def _layers(self, tokens, positions, lengths, mask, attend_to_rows=None, arrays=(), *, keep_cache: bool = False):
        """All layers over tokens in any arrangement, that `attend_to_rows` changes into rows as `mask` has them.

        It is given `arrays`, whose first axis is that of the tokens, beside what attention needs itself. `lengths`, of each
        token's row, broadcast to `positions`.
        """
        config, placement = self.config, self.placement
        layout, attend = make_layer_attention(config, mask, self.dtype, self.attention, self.platform)
        if attend_to_rows is not None:
            attend, layout = functools.partial(attend_to_rows, attend), (arrays, layout)
        weights = self._stacked()
        if placement is not None:
            attend = collectives.attention_per_head(placement, attend, config.heads, config.kv_heads)
            for name, info in layer_parameters(config).items():
                shardings = (of(info.shape, info.spec) for of in (placement.param_sharding, placement.compute_sharding))
                weights[name] = ShardedParam(weights[name], *shardings)
        all_short = config.max_decode_length is None or mask.shape[1] <= config.max_decode_length
        tables = self._tables(positions, None if all_short else lengths)
        which = jnp.asarray([list(tables).index(rope) for rope in config.layer_ropes], jnp.int32)

        def body(x, scanned):
            weights, sliding, which = scanned
            table, *others = tables.values()
            if others:
                table = jax.tree.map(functools.partial(jax.lax.select_n, which), table, *others)
            x, key, value = layer.forward(config, weights, x, table, functools.partial(attend, layout, sliding))
            return self._shard_rows(x), (key, value) if keep_cache else None

        if self.remat:
            body = jax.checkpoint(body, prevent_cse=False)
        x = self._shard_rows(self._embed(tokens))
        x, cached = jax.lax.scan(body, x, (weights, jnp.asarray(config.sliding), which))
        return layer.final_norm(config, self.final_norm[...], x), cached

    def _stacked(self) -> dict[str, jax.Array]:
        """The parameters of all layers by name."""
        return {name: getattr(self.layers, name)[...] for name in layer_parameters(self.config)}

    def _shard_rows(self, x: jax.Array) -> jax.Array:
        return x if self.placement is None else self.placement.shard_rows(x)


def _layer_views(x: jax.Array, dtype) -> list[jax.Array]:
    """`x [L, …]` as L arrays of a dtype, which share its memory and keep it where it has that dtype on one CPU."""
    traced = isinstance(x, jax.core.Tracer)
    if traced or x.dtype != dtype or not x.is_fully_addressable or [d.platform for d in x.devices()] != ["cpu"]:
        return _layer_copies(x, dtype)
    return [jax.device_put(part, x.sharding, may_alias=True) for part in np.asarray(x)]


@functools.partial(jax.jit, static_argnums=(1, 2))
def _layer_copies(x: jax.Array, dtype, sharding=None) -> list[jax.Array]:
    """`x [L, …]` as L arrays of another dtype, on a mesh as `sharding` says."""
    return [_cast_and_shard(part, dtype, sharding) for part in x]


@functools.partial(jax.jit, static_argnums=1)
def _layers_to_int8(x: jax.Array, sharding: Int8 | None = None) -> list[Int8]:
    """Matrices `x [L, …]` as L `Int8`, on a mesh as `sharding` says."""
    return [to_int8(part, -2, sharding) for part in x]


@functools.partial(jax.jit, static_argnums=(1, 2))
def _cast_and_shard(x: jax.Array, dtype, sharding=None) -> jax.Array:
    x = x.astype(dtype)
    return x if sharding is None else jax.lax.with_sharding_constraint(x, sharding)


__all__ = ["Cache", "Decoder", "DecodingWeights", "layer_parameters", "parameters"]
