"""What a decoder holds: every parameter's shape, logical axes and kind of initial value."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from gold_jax.models.config import DecoderConfig


class ParamInfo(NamedTuple):
    """Shape, logical axes (for a mesh) and kind of initial value of one parameter."""

    shape: tuple[int, ...]
    spec: tuple[str | None, ...]
    init: str


def layer_parameters(config: DecoderConfig) -> dict[str, ParamInfo]:
    """What one layer holds, by name, without the leading axis of layers. Matrices are [in, out]."""
    width, inner = config.width, config.mlp_width
    q_size, kv_size = config.heads * config.head_dim, config.kv_heads * config.head_dim
    table = {
        "attention_norm": ParamInfo((width,), ("embed",), "norm"),
        "query": ParamInfo((width, q_size), ("embed", "heads"), "matrix"),
        "key": ParamInfo((width, kv_size), ("embed", "kv_heads"), "matrix"),
        "value": ParamInfo((width, kv_size), ("embed", "kv_heads"), "matrix"),
        "out": ParamInfo((q_size, width), ("heads", "embed"), "matrix"),
        "mlp_norm": ParamInfo((width,), ("embed",), "norm"),
        "gate": ParamInfo((width, inner), ("embed", "mlp"), "matrix"),
        "up": ParamInfo((width, inner), ("embed", "mlp"), "matrix"),
        "down": ParamInfo((inner, width), ("mlp", "embed"), "matrix"),
    }
    if config.qkv_bias:
        table["query_bias"] = ParamInfo((q_size,), ("heads",), "zeros")
        table["key_bias"] = ParamInfo((kv_size,), ("kv_heads",), "zeros")
        table["value_bias"] = ParamInfo((kv_size,), ("kv_heads",), "zeros")
    if config.out_bias:
        table["out_bias"] = ParamInfo((width,), ("embed",), "zeros")
    if config.mlp_bias:
        table["gate_bias"] = ParamInfo((inner,), ("mlp",), "zeros")
        table["up_bias"] = ParamInfo((inner,), ("mlp",), "zeros")
        table["down_bias"] = ParamInfo((width,), ("embed",), "zeros")
    if config.qk_norm:
        table["query_norm"] = ParamInfo((config.head_dim,), (None,), "norm")
        table["key_norm"] = ParamInfo((config.head_dim,), (None,), "norm")
    if config.sandwich_norms:
        table["attention_out_norm"] = ParamInfo((width,), ("embed",), "norm")
        table["mlp_out_norm"] = ParamInfo((width,), ("embed",), "norm")
    return table


def parameters(config: DecoderConfig) -> dict[tuple[str, ...], ParamInfo]:
    """Every parameter of the model by its path in the tree of parameters; layers' come stacked, `("layers", name)`."""
    table = {("embedding",): ParamInfo((config.vocab_size, config.width), ("vocab", "embed"), "matrix")}
    for name, info in layer_parameters(config).items():
        table["layers", name] = ParamInfo((config.layers, *info.shape), ("layers", *info.spec), info.init)
    table["final_norm",] = ParamInfo((config.width,), ("embed",), "norm")
    if not config.tied:
        table["head",] = ParamInfo((config.vocab_size, config.width), ("vocab", "embed"), "matrix")
    return table


def nested(by_path: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
    """Values by their paths as nested dicts."""
    tree: dict[str, Any] = {}
    for (*parents, name), value in by_path.items():
        branch = tree
        for parent in parents:
            branch = branch.setdefault(parent, {})
        branch[name] = value
    return tree
