"""What a decoder holds: every parameter's shape, logical axes and kind of initial value."""

from typing import NamedTuple

from gold_jax.models.config import DecoderConfig


class ParamInfo(NamedTuple):
    """Shape, logical axes (for a mesh) and kind of initial value of one parameter."""

    shape: tuple[int, ...]
    spec: tuple[str | None, ...]
    init: str


def layer_parameters(config: DecoderConfig) -> dict[str, ParamInfo]:
    """What one layer holds, by name, without the leading axis of layers. Matrices are [in, out]."""
    specs = {
        "attention_norm": ("embed",),
        "query": ("embed", "heads"),
        "key": ("embed", "kv_heads"),
        "value": ("embed", "kv_heads"),
        "out": ("heads", "embed"),
        "mlp_norm": ("embed",),
        "gate": ("embed", "mlp"),
        "up": ("embed", "mlp"),
        "down": ("mlp", "embed"),
    }
    if config.qkv_bias:
        specs |= {"query_bias": ("heads",), "key_bias": ("kv_heads",), "value_bias": ("kv_heads",)}
    if config.out_bias:
        specs |= {"out_bias": ("embed",)}
    if config.mlp_bias:
        specs |= {"gate_bias": ("mlp",), "up_bias": ("mlp",), "down_bias": ("embed",)}
    if config.qk_norm:
        specs |= {"query_norm": (None,), "key_norm": (None,)}
    if config.joint_qk_norm:
        specs |= {"query_norm": ("heads",), "key_norm": ("kv_heads",)}
    if config.post_norms_only:
        specs = {name: spec for name, spec in specs.items() if name not in ("attention_norm", "mlp_norm")}
    if config.post_norms:
        specs |= {"attention_out_norm": ("embed",), "mlp_out_norm": ("embed",)}
    head = config.head_dim
    sizes = {"embed": config.width, "mlp": config.mlp_width, None: head}
    sizes |= {"heads": config.heads * head, "kv_heads": config.kv_heads * head}
    kinds = {"norm": "norm", "bias": "zeros"}
    return {
        name: ParamInfo(tuple(sizes[axis] for axis in spec), spec, kinds.get(name.rpartition("_")[2], "matrix"))
        for name, spec in specs.items()
    }


def parameters(config: DecoderConfig) -> dict[tuple[str, ...], ParamInfo]:
    """Every parameter of the model by its path in the tree of parameters; layers' come stacked, `("layers", name)`."""
    embedding = ParamInfo((config.vocab_size, config.width), ("vocab", "embed"), "matrix")
    layers = {
        ("layers", name): ParamInfo((config.layers, *shape), ("layers", *spec), init)
        for name, (shape, spec, init) in layer_parameters(config).items()
    }
    ends = {("final_norm",): ParamInfo((config.width,), ("embed",), "norm")}
    return {("embedding",): embedding} | layers | ends | ({} if config.tied else {("head",): embedding})
