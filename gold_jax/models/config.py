"""One description of every Llama-like family: a family is a set of values, not a copy of the model."""

import dataclasses
import json
from typing import Any

from gold_jax.models.rope import Rope

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "gemma3")
ACTIVATIONS = ("silu", "gelu_pytorch_tanh", "gelu")


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Shape and arithmetic of a decoder-only transformer.

    Attributes:
        family: `model_type` of the config it came from (`gemma3_text` for the language part of `gemma3`).
        vocab_size: rows of the embedding and of the head; may exceed the tokenizer's entries.
        width, mlp_width, layers, heads, kv_heads, head_dim: sizes; `head_dim` need not be `width / heads`.
        norm_eps: added to the mean square in every RMSNorm.
        norm_offset: norms multiply by `norm_offset + weight` (Gemma: 1, else 0).
        activation: `silu`, `gelu_pytorch_tanh` or `gelu`.
        ropes: rotary settings of (full-attention layers, sliding layers); Gemma 3 alone has two different ones.
        sliding: per layer, whether it sees only the last `window` tokens.
        window: width of the sliding window in tokens, the token itself included; None without sliding layers.
        tied: the head is the embedding.
        qkv_bias, out_bias, mlp_bias: which projections have biases.
        qk_norm: RMSNorm on every query and key head before the rotation (Qwen 3, Gemma 3).
        sandwich_norms: norms after attention and MLP as well as before (Gemma).
        query_scale: factor on attention scores.
        attention_softcap, final_softcap: `cap · tanh(x / cap)` on scores and on logits; None without.
        embedding_scale: factor on embeddings (Gemma: √width), rounded to the compute dtype as transformers does.
        source: JSON of where the model came from (`config`: the original dictionary, …), for saving; takes no part in
            comparisons.
    """

    family: str
    vocab_size: int
    width: int
    mlp_width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    norm_eps: float
    activation: str
    ropes: tuple[Rope, Rope]
    sliding: tuple[bool, ...]
    window: int | None
    tied: bool
    query_scale: float
    norm_offset: float = 0.0
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sandwich_norms: bool = False
    attention_softcap: float | None = None
    final_softcap: float | None = None
    embedding_scale: float = 1.0
    source: str = dataclasses.field(default="{}", compare=False, repr=False)

    @classmethod
    def from_hf(cls, hf_config: Any, *, raw: dict | None = None) -> "DecoderConfig":
        """Read a `transformers` config object (`AutoConfig`, or a family's config class).

        Args:
            hf_config: the config; of the multimodal `gemma3` its `text_config` is taken.
            raw: the dictionary that `config.json` held, kept for saving; None: `hf_config.to_dict()`.

        Raises:
            ValueError: `model_type`, `rope_type` or another feature that this decoder does not have.
        """
        if hf_config.model_type not in FAMILIES:
            raise ValueError(f"model_type {hf_config.model_type!r} is not known. Known are {', '.join(FAMILIES)}.")
        raw = hf_config.to_dict() if raw is None else raw
        multimodal = hf_config.model_type == "gemma3"
        text = hf_config.text_config if multimodal else hf_config
        _refuse_unsupported(text, hf_config)
        gemma = text.model_type.startswith("gemma")
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        sliding, window = _sliding_layers(text)
        bias = bool(getattr(text, "attention_bias", False))
        activation = text.hidden_activation if gemma else text.hidden_act
        if activation == "gelu_new":  # another name for the same tanh approximation
            activation = "gelu_pytorch_tanh"
        if activation not in ACTIVATIONS:
            raise ValueError(f"hidden activation {activation!r} is not known. Known are {', '.join(ACTIVATIONS)}.")
        query_scalar = text.query_pre_attn_scalar if gemma else head_dim
        return cls(
            family=text.model_type,
            vocab_size=text.vocab_size,
            width=text.hidden_size,
            mlp_width=text.intermediate_size,
            layers=text.num_hidden_layers,
            heads=text.num_attention_heads,
            kv_heads=text.num_key_value_heads,
            head_dim=head_dim,
            norm_eps=float(text.rms_norm_eps),
            activation=activation,
            ropes=_ropes(text),
            sliding=sliding,
            window=window,
            # The outer config of a multimodal model decides whether its head is tied.
            tied=bool(hf_config.tie_word_embeddings),
            query_scale=query_scalar**-0.5,
            norm_offset=1.0 if gemma else 0.0,
            qkv_bias=text.model_type == "qwen2" or (bias and text.model_type != "mistral"),
            out_bias=bias and text.model_type not in ("qwen2", "mistral"),
            mlp_bias=text.model_type == "llama" and bool(getattr(text, "mlp_bias", False)),
            qk_norm=text.model_type in ("qwen3", "gemma3_text"),
            sandwich_norms=gemma,
            # Gemma 3's attention has no cap in transformers, whatever its config says.
            attention_softcap=text.attn_logit_softcapping if text.model_type == "gemma2" else None,
            final_softcap=text.final_logit_softcapping if gemma else None,
            embedding_scale=float(text.hidden_size) ** 0.5 if gemma else 1.0,
            source=json.dumps({"config": raw}, default=str),
        )


def _refuse_unsupported(text: Any, outer: Any) -> None:
    problems = []
    for config in (text, outer):
        if getattr(config, "quantization_config", None) is not None:
            problems.append("quantization_config (only plain float weights are read; export the model unquantised)")
            break
    for name in ("num_local_experts", "num_experts", "n_routed_experts"):
        if getattr(text, name, None):
            problems.append(f"{name}={getattr(text, name)} (mixtures of experts)")
    if getattr(text, "use_bidirectional_attention", None):
        problems.append("use_bidirectional_attention (only causal attention)")
    if text.num_attention_heads % text.num_key_value_heads:
        problems.append(
            f"num_attention_heads={text.num_attention_heads}, not a multiple of "
            f"num_key_value_heads={text.num_key_value_heads}"
        )
    if problems:
        raise ValueError(
            f"The {outer.model_type} config has what this decoder does not support: {'; '.join(problems)}. Supported are "
            f"dense causal models of the types {', '.join(FAMILIES)}."
        )


def _sliding_layers(text: Any) -> tuple[tuple[bool, ...], int | None]:
    window = getattr(text, "sliding_window", None)
    count = text.num_hidden_layers
    if text.model_type == "llama":  # transformers' Llama has no window
        return (False,) * count, None
    if text.model_type == "mistral":  # every layer slides, whatever layer_types says
        return (window is not None,) * count, window
    kinds = list(text.layer_types)
    unknown = sorted(set(kinds) - {"full_attention", "sliding_attention"})
    if unknown or len(kinds) < count:
        raise ValueError(
            f"layer_types of the {text.model_type} config must name full_attention or sliding_attention for each of its "
            f"{count} layers; it has {len(kinds)} entries" + (f", among them {', '.join(unknown)}." if unknown else ".")
        )
    sliding = tuple(kind == "sliding_attention" for kind in kinds[:count])
    if any(sliding) and window is None:
        raise ValueError(
            f"layer_types of the {text.model_type} config has sliding_attention but sliding_window is null (Qwen configs "
            "need use_sliding_window: true as well)."
        )
    return sliding, window if any(sliding) else None


def _ropes(text: Any) -> tuple[Rope, Rope]:
    """Rotary settings of full and of sliding layers, from the new format, or the old where an older release left it."""
    parameters = getattr(text, "rope_parameters", None)
    if not parameters:
        parameters = {"rope_theta": getattr(text, "rope_theta", None), **(getattr(text, "rope_scaling", None) or {})}
    kinds = ("full_attention", "sliding_attention")
    nested = {kind: parameters[kind] for kind in kinds if isinstance(parameters.get(kind), dict)}
    length = text.max_position_embeddings
    if not nested:
        rope = Rope.from_parameters(
            parameters, max_length=length, where=f"rope_parameters of the {text.model_type} config"
        )
        return rope, rope
    read = {
        kind: Rope.from_parameters(
            values, max_length=length, where=f"rope_parameters[{kind!r}] of the {text.model_type} config"
        )
        for kind, values in nested.items()
    }
    one = next(iter(read.values()))
    return read.get("full_attention", one), read.get("sliding_attention", one)
