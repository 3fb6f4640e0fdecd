"""One flax.nnx decoder for every family that `DecoderConfig` describes.

Parameters of all layers are stacked `[L, ...]` and scanned, so that compiling takes the time of one layer. They are
stored in `param_dtype` (float32 masters for training) and cast to the compute `dtype` inside the scan: only one layer's
copy is alive at a time. Norms, rotations, softmax and logits are float32 whatever `dtype` is.
"""

import contextlib
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from gold_jax.models import layer
from gold_jax.models.attention import check_model, current_platform, describe, make_layer_attention
from gold_jax.models.blockwise import capped
from gold_jax.models.config import DecoderConfig
from gold_jax.models.decoding import Cache, DecodingWeights, can_view_layers, cast_and_shard, layer_copies, layer_views
from gold_jax.models.functional import Params, merge, split
from gold_jax.models.parameters import ParamInfo, layer_parameters, nested, parameters
from gold_jax.sharding import collectives
from gold_jax.sharding.collectives import ShardedParam
from gold_jax.sharding.placement import Placement

# Settings beside config and parameters: keyword arguments of the constructor, and attributes of the same names.
SETTINGS = ("dtype", "param_dtype", "remat", "attention", "platform", "placement")


def full_float32(method):
    """A method whose products multiply float32 as float32 where that is the compute dtype.

    GPUs and TPUs by default round the factors to fewer bits, which moves logits by far more than this decoder's
    tolerance.
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
        key: jax.Array,
        *,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        remat=False,
        attention="auto",
        platform=None,
        placement: Placement | None = None,
    ):
        """Initialise at random (normal, standard deviation 0.02; norms to one). See also `load_model` and `shard`.

        `platform` None is where JAX runs now; name it for a model that is compiled here to run elsewhere.
        """
        self.config = config
        self.dtype = jnp.dtype(dtype)
        self.param_dtype = jnp.dtype(param_dtype)
        self.remat = remat
        self.attention = attention
        self.platform = current_platform() if platform is None else platform
        self.placement = placement
        check_model(config, self.dtype, self.attention, self.platform)
        self.layers = Layers()
        for index, (path, info) in enumerate(parameters(config).items()):
            if info.init == "matrix":
                normal = 0.02 * jax.random.normal(jax.random.fold_in(key, index), info.shape, jnp.float32)
                value = normal.astype(self.param_dtype)
            else:
                start = 1.0 - config.norm_offset if info.init == "norm" else 0.0
                value = jnp.full(info.shape, start, self.param_dtype)
            setattr(self.layers if len(path) == 2 else self, path[-1], nnx.Param(value, spec=info.spec))

    @classmethod
    def from_config(
        cls, config: DecoderConfig, key, dtype=jnp.float32, param_dtype=jnp.float32, remat=False, **options
    ) -> "Decoder":
        """A randomly initialised model; `key` is a PRNG key or an int seed, `options`: `attention`, `platform`, `placement`."""
        key = jax.random.key(key) if isinstance(key, int) else key
        return cls(config, key, dtype=dtype, param_dtype=param_dtype, remat=remat, **options)

    @classmethod
    def abstract(
        cls, config: DecoderConfig, dtype=jnp.float32, param_dtype=jnp.float32, remat=False, **options
    ) -> "Decoder":
        """A model whose parameters are `jax.ShapeDtypeStruct`s: to plan with, or to fill. Arguments as `from_config`."""
        return nnx.eval_shape(lambda: cls.from_config(config, 0, dtype, param_dtype, remat, **options))

    @full_float32
    def __call__(self, tokens: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Hidden states after the final norm.

        Args:
            tokens: int32 [B, T].
            mask: bool [B, T], True where there is a token; None: everywhere. Padding may stand on either side of a row; a
                row may be empty.

        Returns:
            [B, T, D] in `dtype`. Values at padding are finite and mean nothing.
        """
        tokens = jnp.asarray(tokens)
        mask = jnp.ones(tokens.shape, bool) if mask is None else mask
        return self._run(tokens, mask, keep_cache=False)[0]

    @full_float32
    def forward_packed(
        self, tokens: jax.Array, gather_index: jax.Array, first_slot: jax.Array, mask: jax.Array
    ) -> jax.Array:
        """Hidden states after the final norm, of packed rows that share prefixes (see `text.packing`).

        Args:
            tokens: int32 [S, N], the packed sequences.
            gather_index: int32 [S, R, T], index into its sequence of each token of a row; rows are padded on the right.
            first_slot: int32 [S, N], one of the sequence's R·T row slots that hold the token (its position is the same
                in all of them).
            mask: bool [S, R, T], True where a row has a token.

        Returns:
            [S, N, D] in `dtype`. Values at padding are finite and mean nothing.
        """
        _, rows, length = gather_index.shape

        def repack(attend, layout, sliding, query, key, value):
            (gather_index, first_slot), shared = layout
            sequences = len(gather_index)

            def to_rows(x):  # [S, N, H, K] -> [B, T, H, K]
                flat = x.reshape(*x.shape[:2], -1)
                return _gather(flat, gather_index.reshape(sequences, -1)).reshape(
                    sequences * rows, length, *x.shape[2:]
                )

            attended = attend(shared, sliding, *map(to_rows, (query, key, value)))
            return _gather(attended.reshape(sequences, rows * length, -1), first_slot)  # [B, T, F] -> [S, N, F]

        row_mask = mask.reshape(-1, length)
        return self._layers(
            tokens, first_slot % length, row_mask, repack, (gather_index, first_slot), keep_cache=False
        )[0]

    @classmethod
    def from_params(cls, config: DecoderConfig, params: Params, **settings) -> "Decoder":
        """A model that holds the given parameters.

        Args:
            config: what it is.
            params: nested dicts by the paths of `models.parameters.parameters`, of arrays (of any kind) or their
                shapes.
            settings: `dtype`, `param_dtype`, `remat`, `attention`, `platform` and `placement`, as the constructor has
                them.
        """
        graph, _ = split(cls.abstract(config, **settings))
        return merge(graph, params)

    def replace(self, params: Params | None = None, **settings) -> "Decoder":
        """Another model, with these parameters or settings in place of this one's, which stays as it is."""
        own = {name: getattr(self, name) for name in SETTINGS}
        return Decoder.from_params(self.config, split(self)[1] if params is None else params, **(own | settings))

    def shard(self, placement: Placement) -> "Decoder":
        """This model with its parameters on a mesh."""
        _, params = split(self)
        return self.replace(jax.device_put(params, self.shardings(placement)), placement=placement)

    def shardings(self, placement: Placement) -> Params:
        """The sharding of every parameter on a mesh: a tree like the parameters."""
        table = parameters(self.config)
        return nested({path: placement.param_sharding(info.shape, info.spec) for path, info in table.items()})

    def describe_attention(self) -> str:
        """Which implementation of attention this model's settings come to."""
        return describe(self.config, self.dtype, self.attention, self.platform)

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
        logits = jax.lax.optimization_barrier(jnp.matmul(head, columns, preferred_element_type=jnp.float32))
        return capped(logits.T, self.config.final_softcap)

    @jax.named_scope("prefill")
    @full_float32
    def prefill(self, tokens: jax.Array, mask: jax.Array, cache_len: int) -> tuple[jax.Array, Cache]:
        """Read prompts.

        Args:
            tokens, mask: [B, P], the tokens of a row together, padding on either side.
            cache_len: slots of the cache (static), at least P; P plus the tokens to come is enough.

        Returns:
            Hidden states [B, D] of the last tokens, and the cache.
        """
        length = tokens.shape[1]
        if cache_len < length:
            raise ValueError(
                f"cache_len is {cache_len}, less than the {length} tokens of the prompts that it must hold."
            )
        count = mask.sum(axis=1, dtype=jnp.int32)
        order = jnp.arange(length)
        tokens = jnp.take_along_axis(tokens, (order + jnp.argmax(mask, axis=1)[:, None]) % length, axis=1)
        hidden, (keys, values) = self._run(tokens, order < count[:, None], keep_cache=True)
        last = jnp.maximum(count - 1, 0)[:, None, None]

        repeats = self.kv_repeats

        def to_slots(stacked, axis):  # [L, B, P, N, K] -> L times [B, N, S, K] or, with the slots last, [B, N, K, S]
            moved = jnp.moveaxis(stacked if repeats == 1 else jnp.repeat(stacked, repeats, axis=3), 2, axis)
            padding = [(0, cache_len - length if other == axis else 0) for other in range(5)]
            return tuple(jnp.pad(moved, padding)[index] for index in range(self.config.layers))

        cache = Cache(keys=to_slots(keys, 4), values=to_slots(values, 3), length=count)
        return jnp.take_along_axis(hidden, last, axis=1)[:, 0], cache

    @property
    def kv_repeats(self) -> int:
        """How often each key-value head is repeated in the cache."""
        heads = self.config.heads, self.config.kv_heads
        return 1 if self.placement is None else self.placement.kv_repeats(*heads)

    def decoding_weights(self) -> DecodingWeights:
        """The parameters in the form that `decode_step` reads, in `dtype`: make them once, before the loop.

        A scan, or a slice inside the loop, would copy every layer's weights for every token. On one CPU, parameters
        that are in `dtype` already are viewed; else this is a copy. On a mesh it is sharded over `tensor` alone, so that
        a step all-gathers no weights.
        """
        names = self._names()
        stacked = {name: getattr(self.layers, name)[...] for name in names}
        head = self.head_weight()
        if self.placement is not None:
            own, placement = self.decoding_shardings().layers[0], self.decoding_shardings().head
            columns = [layer_copies(x, self.dtype, own[name]) for name, x in stacked.items()]
            # From sharded columns to sharded rows: replicated in between, as XLA would do by itself, with a warning.
            head = cast_and_shard(cast_and_shard(head, self.dtype, self.placement.replicated), self.dtype, placement)
        else:
            apart = layer_views if all(can_view_layers(x, self.dtype) for x in stacked.values()) else layer_copies
            columns = [apart(x, self.dtype) for x in stacked.values()]
            head = head.astype(self.dtype)
        return DecodingWeights([dict(zip(names, own)) for own in zip(*columns)], head)

    def decoding_shardings(self) -> DecodingWeights:
        """The shardings of the weights that decoding reads."""
        table, placement, config = layer_parameters(self.config), self.placement, self.config
        own = {name: placement.decode_sharding(table[name].shape, table[name].spec) for name in self._names()}
        head = placement.decode_sharding((config.vocab_size, config.width), ("vocab", "embed"))
        return DecodingWeights([dict(own) for _ in range(config.layers)], head)

    def _names(self) -> list[str]:
        """The parameters of a layer."""
        return [name for name, value in vars(self.layers).items() if isinstance(value, nnx.Param)]

    @jax.named_scope("decode")
    @full_float32
    def decode_step(
        self, tokens: jax.Array, cache: Cache, weights: DecodingWeights | None = None
    ) -> tuple[jax.Array, Cache]:
        """Read one token per row.

        Args:
            tokens: int32 [B].
            cache: of `prefill` or of the step before. A row that is full is read wrongly: see to it that there is room.
            weights: `decoding_weights()`, made outside the loop; None makes them here.

        Returns:
            Hidden states [B, D], and the cache with the tokens in it.
        """
        config = self.config
        weights = self.decoding_weights() if weights is None else weights
        distance = cache.length[:, None] - jnp.arange(cache.values[0].shape[2])
        visible = distance >= 0
        in_window = None if config.window is None else visible & (distance < config.window)
        tables = self._tables(cache.length[:, None])
        x = self._embed(tokens)
        keys, values = [], []
        for index in range(config.layers):
            sliding = config.sliding[index]
            x, key, value = layer.decode(
                config,
                weights.layers[index],
                x,
                tables[int(sliding)],
                in_window if sliding else visible,
                (cache.keys[index], cache.values[index], cache.length),
                self.platform,
                self.placement,
            )
            keys.append(key)
            values.append(value)
        hidden = layer.rms_norm(config, x, self.final_norm[...])
        return hidden, Cache(tuple(keys), tuple(values), cache.length + 1)

    def _embed(self, tokens: jax.Array) -> jax.Array:
        table = self.embedding[...]
        if self.placement is None:
            x = table[tokens].astype(self.dtype)
        else:
            x = collectives.embedding_lookup(self.placement, table, tokens, self.dtype)
        if self.config.embedding_scale == 1.0:
            return x
        return x * jnp.asarray(self.config.embedding_scale, self.dtype)

    def _tables(self, positions: jax.Array) -> tuple[tuple[jax.Array, jax.Array], ...]:
        """Cosines and sines for (full, sliding) layers."""
        full, local = self.config.ropes
        tables = full.tables(positions, self.config.head_dim)
        return tables, tables if local == full else local.tables(positions, self.config.head_dim)

    def _run(self, tokens: jax.Array, mask: jax.Array, *, keep_cache: bool):
        mask = mask.astype(bool)
        positions = jnp.maximum(jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, 0)

        def repack(attend, layout, *arguments):
            return attend(layout[1], *arguments)

        return self._layers(tokens, positions, mask, repack, (), keep_cache=keep_cache)

    def _layers(self, tokens, positions, mask, repack, arrays, *, keep_cache: bool):
        """All layers over tokens in any arrangement, that `repack` changes for attention into rows as `mask` has them.

        It is given `arrays`, whose first axis is that of the tokens, beside what attention needs itself.
        """
        config, placement = self.config, self.placement
        shared, attend = make_layer_attention(config, mask, self.dtype, self.attention, self.platform)
        attend, layout = functools.partial(repack, attend), (arrays, shared)
        if placement is not None:
            attend = collectives.attention_per_head(placement, attend, config.heads, config.kv_heads)
        tables = self._tables(positions)

        def body(x, scanned):
            weights, sliding = scanned
            table = _select_for_layer(sliding, config, tables, same=config.ropes[0] == config.ropes[1])
            attend_here = functools.partial(attend, layout, sliding)
            x, key, value = layer.forward(config, weights, x, table, attend_here)
            return self._shard_rows(x), (key, value) if keep_cache else None

        if self.remat:
            body = jax.checkpoint(body, prevent_cse=False)
        x, cached = jax.lax.scan(
            body, self._shard_rows(self._embed(tokens)), (self._stacked(), jnp.asarray(config.sliding))
        )
        return layer.rms_norm(config, x, self.final_norm[...]), cached

    def _stacked(self) -> dict[str, jax.Array | ShardedParam]:
        """The parameters of all layers by name."""
        stacked = {name: value[...] for name, value in vars(self.layers).items() if isinstance(value, nnx.Param)}
        if self.placement is None:
            return stacked
        placement, table = self.placement, layer_parameters(self.config)
        return {
            name: ShardedParam(
                x,
                *(
                    sharding_of(table[name].shape, table[name].spec)
                    for sharding_of in (placement.param_sharding, placement.compute_sharding)
                ),
            )
            for name, x in stacked.items()
        }

    def _shard_rows(self, x: jax.Array) -> jax.Array:
        return x if self.placement is None else self.placement.shard_rows(x)


def _gather(x: jax.Array, index: jax.Array) -> jax.Array:
    """`x [S, N, F]` at `index [S, M]` of each line: `[S, M, F]`. Indices must be in range."""
    return jax.vmap(lambda x, index: x.at[index].get(mode="promise_in_bounds"))(x, index)


def _select_for_layer(sliding: jax.Array, config: DecoderConfig, pair: tuple, *, same: bool):
    """The full (0) or sliding (1) one of a pair of pytrees, without a select where all layers agree."""
    if same or len(set(config.sliding)) == 1:
        return pair[int(config.sliding[0])]
    return jax.tree.map(functools.partial(jnp.where, sliding), pair[1], pair[0])


__all__ = ["Cache", "Decoder", "DecodingWeights", "ParamInfo", "layer_parameters", "parameters"]
