"""One description of every Llama-like family: a family is a set of values, not a copy of the model."""

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

import jax

from gold_jax.models.rope import Rope
from gold_jax.wording import quoted

FAMILIES = (
    "llama", "mistral", "ministral", "qwen2", "qwen3", "gemma2", "gemma3_text", "gemma3", "phi3", "smollm3", "granite",
    "olmo2", "olmo3", "exaone4",
)  # fmt: skip
ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
}


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Shape and arithmetic of a decoder-only transformer."""

    family: str  # `model_type` of the config it came from (`gemma3_text` for the language part of `gemma3`)
    vocab_size: int  # rows of the embedding and of the head; may exceed the tokenizer's entries
    width: int
    mlp_width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int  # need not be `width / heads`
    norm_eps: float  # added to the mean square in every RMSNorm
    activation: str  # one of `ACTIVATIONS`
    ropes: tuple[Rope, Rope]  # of (full-attention layers, sliding layers); Gemma 3 and OLMo 3 have two different ones
    sliding: tuple[bool, ...]  # per layer, whether it sees only the last `window` tokens
    window: int | None  # tokens in the sliding window, the token itself included; None without sliding layers
    tied: bool  # the head is the embedding
    query_scale: float  # factor on attention scores
    norm_offset: float = 0.0  # norms multiply by `norm_offset + weight` (Gemma: 1)
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # RMSNorm on every query and key head before the rotation (Qwen 3, Gemma 3)
    joint_qk_norm: bool = False  # of all heads as one vector (OLMo 2)
    sandwich_norms: bool = False  # norms after attention and MLP as well as before (Gemma)
    post_norms_only: bool = False  # norms after them and none before (OLMo 2, EXAONE 4)
    attention_softcap: float | None = None  # `cap · tanh(x / cap)` on scores
    final_softcap: float | None = None  # the same on logits
    # On embeddings (Gemma: √width; Granite), rounded to the compute dtype, as transformers does Gemma's.
    embedding_scale: float = 1.0
    residual_scale: float = 1.0  # on what attention and MLP add (Granite)
    hidden_scale: float = 1.0  # on the final hidden states, and so on logits (Granite: 1 / logits_scaling)
    rotated: tuple[bool, ...] | None = None  # per layer, whether queries and keys are rotated; None: in all
    fused_projections: bool = False  # files hold query, key and value in one matrix, gate and up in another (Phi 3)
    # JSON of where the model came from (`config`: the original dictionary, …), for saving; takes no part in comparisons.
    source: str = dataclasses.field(default="{}", compare=False, repr=False)

    @property
    def layer_ropes(self) -> tuple[Rope | None, ...]:
        """Per layer, its rotation; None where there is none."""
        rotated = (True,) * self.layers if self.rotated is None else self.rotated
        return tuple(self.ropes[slides] if rotates else None for slides, rotates in zip(self.sliding, rotated))

    @property
    def post_norms(self) -> bool:
        """Whether what attention and MLP add is normed."""
        return self.sandwich_norms or self.post_norms_only

    @property
    def max_decode_length(self) -> int | None:
        """Most tokens of a row that is decoded, prompt and completion together; None: any number."""
        lengths = (rope.short_length for rope in self.layer_ropes if rope is not None)
        return min((length for length in lengths if length is not None), default=None)

    def check_decode_length(self, length: int, wanted: str) -> None:
        """Raises a ValueError where rows are to be decoded up to more than `max_decode_length` tokens, which are `wanted`."""
        if self.max_decode_length is not None and length > self.max_decode_length:
            raise ValueError(
                f"{wanted} come to {length} tokens; the {self.family} model can decode rows of at most "
                f"{self.max_decode_length}, as LongRoPE rotates longer ones by other angles, from their first token on "
                "(docs/families.md)."
            )

    @classmethod
    def from_hf(cls, hf_config: Any, *, raw: dict | None = None) -> "DecoderConfig":
        """Read a `transformers` config object; of the multimodal `gemma3` its `text_config` is taken.

        `raw` is the dictionary that `config.json` held, kept for saving; None: `hf_config.to_dict()`.

        Raises:
            ValueError: `model_type`, `rope_type` or another feature that this decoder does not have.
        """
        check_family(hf_config.model_type)
        text = hf_config.text_config if hf_config.model_type == "gemma3" else hf_config
        _refuse_out_of_range(text)
        _refuse_unsupported(text, hf_config)
        family = text.model_type
        gemma, olmo = family.startswith("gemma"), family in ("olmo2", "olmo3")
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        sliding, window = _sliding_layers(text)
        bias = bool(getattr(text, "attention_bias", False)) and family not in _WITHOUT_BIASES
        activation = text.hidden_activation if gemma else text.hidden_act
        activation = {"gelu_new": "gelu_pytorch_tanh"}.get(activation, activation)  # two names of one approximation
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"hidden activation {quoted(activation)} is not known. Known are {', '.join(ACTIVATIONS)}."
            )
        return cls(
            family=family,
            vocab_size=text.vocab_size,
            width=text.hidden_size,
            mlp_width=text.intermediate_size,
            layers=text.num_hidden_layers,
            heads=text.num_attention_heads,
            kv_heads=text.num_key_value_heads,
            head_dim=head_dim,
            norm_eps=float(text.rms_norm_eps),
            activation=activation,
            ropes=_ropes(text, head_dim),
            rotated=_rotated_layers(text, sliding),
            sliding=sliding,
            window=window,
            # The outer config of a multimodal model decides whether its head is tied.
            tied=bool(hf_config.tie_word_embeddings),
            query_scale=_query_scale(text, head_dim),
            norm_offset=1.0 if gemma else 0.0,
            qkv_bias=bias or family == "qwen2",
            out_bias=bias and family != "qwen2",
            mlp_bias=family in ("llama", "smollm3", "granite") and bool(getattr(text, "mlp_bias", False)),
            qk_norm=family in ("qwen3", "gemma3_text", "exaone4"),
            joint_qk_norm=olmo,
            sandwich_norms=gemma,
            post_norms_only=olmo or family == "exaone4",
            # Gemma 3's attention has no cap in transformers, whatever its config says.
            attention_softcap=text.attn_logit_softcapping if family == "gemma2" else None,
            final_softcap=text.final_logit_softcapping if gemma else None,
            embedding_scale=float(text.hidden_size) ** 0.5 if gemma else _granite(text, "embedding_multiplier"),
            residual_scale=_granite(text, "residual_multiplier"),
            hidden_scale=1 / _granite(text, "logits_scaling"),
            fused_projections=family == "phi3",
            source=json.dumps({"config": hf_config.to_dict() if raw is None else raw}, default=str),
        )


# `attention_bias` in their configs means nothing to transformers.
_WITHOUT_BIASES = ("mistral", "ministral", "phi3", "exaone4")


def _granite(text: Any, name: str) -> float:
    """A factor that Granite's configs alone have."""
    return float(getattr(text, name)) if text.model_type == "granite" else 1.0


def _query_scale(text: Any, head_dim: int) -> float:
    if text.model_type == "granite":
        return float(text.attention_multiplier)
    return (text.query_pre_attn_scalar if text.model_type.startswith("gemma") else head_dim) ** -0.5


def check_family(model_type: str | None) -> None:
    """Raises a ValueError where a `model_type` is none of `FAMILIES`."""
    if model_type not in FAMILIES:
        raise ValueError(
            f"model_type {quoted(model_type)} is not known. Known are {', '.join(FAMILIES)} (docs/families.md). Other dense "
            "transformers can be added (docs/add-a-model.md)."
        )


_MOST = {"num_hidden_layers": 10_000, "max_position_embeddings": 10**9}
_SIZES = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim".split()
_SCALES = (
    "query_pre_attn_scalar attn_logit_softcapping final_logit_softcapping sliding_window embedding_multiplier "
    "residual_multiplier logits_scaling attention_multiplier"
).split()


def check_sizes(config: Mapping[str, Any], model_type: Any) -> None:
    """Raises a ValueError where a size that a config gives cannot be one; transformers makes lists of so many layers."""
    for name in [*_SIZES, "max_position_embeddings"]:
        value, most = config.get(name), _MOST.get(name, 10**7)
        if name not in config or (name in ("head_dim", "max_position_embeddings") and value is None):
            continue
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
            raise ValueError(
                f"{name} of the {model_type} config is {quoted(value)}; it must be a whole number from 1 to {most}."
            )


def _refuse_out_of_range(text: Any) -> None:
    """Raises a ValueError where a number of a config cannot be what it says."""
    check_sizes({name: getattr(text, name, None) for name in [*_SIZES, *_MOST]}, text.model_type)
    scales = {"rms_norm_eps": 1} | dict.fromkeys(_SCALES, math.inf)
    for name, below in scales.items():
        value = getattr(text, name, None)
        if value is None and name != "rms_norm_eps":
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < below:
            words = f"between 0 and {below}" if below == 1 else "greater than 0"
            raise ValueError(f"{name} of the {text.model_type} config is {quoted(value)}; it must be a number {words}.")


def _refuse_unsupported(text: Any, outer: Any) -> None:
    experts = ("num_local_experts", "num_experts", "n_routed_experts")
    problems = [
        f"{name}={quoted(getattr(text, name))} (mixtures of experts)" for name in experts if getattr(text, name, None)
    ]
    if any(getattr(config, "quantization_config", None) is not None for config in (text, outer)):
        problems.append(
            "quantization_config (only plain float weights are read: name the model before its quantization)"
        )
    if getattr(text, "use_bidirectional_attention", None):
        problems.append("use_bidirectional_attention (only causal attention)")
    heads, kv_heads = text.num_attention_heads, text.num_key_value_heads
    if heads % kv_heads:
        problems.append(f"num_attention_heads={heads}, not a multiple of num_key_value_heads={kv_heads}")
    if problems:
        raise ValueError(
            f"The {outer.model_type} config has what this decoder does not support: {'; '.join(problems)}. Supported are "
            f"dense causal models of the types {', '.join(FAMILIES)}."
        )


def _sliding_layers(text: Any) -> tuple[tuple[bool, ...], int | None]:
    """Which layers slide, and their window."""
    window, count = getattr(text, "sliding_window", None), text.num_hidden_layers
    if text.model_type in ("llama", "granite", "olmo2"):  # these have no window in transformers
        return (False,) * count, None
    if text.model_type in ("mistral", "phi3"):  # every layer slides, whatever layer_types says
        return (window is not None,) * count, window
    kinds = list(text.layer_types)
    unknown = sorted(set(kinds) - {"full_attention", "sliding_attention"})
    if unknown or len(kinds) < count:
        raise ValueError(
            f"layer_types of the {text.model_type} config must name full_attention or sliding_attention for each of its "
            f"{count} layers; it has {len(kinds)} entries"
            + (f", among them {quoted(', '.join(map(str, unknown)), plain=True)}." if unknown else ".")
        )
    sliding = tuple(kind == "sliding_attention" for kind in kinds[:count])
    if any(sliding) and window is None:
        raise ValueError(
            f"layer_types of the {text.model_type} config has sliding_attention but sliding_window is null (Qwen configs "
            "need use_sliding_window: true as well)."
        )
    return sliding, window if any(sliding) else None


def _ropes(text: Any, head_dim: int) -> tuple[Rope, Rope]:
    """Rotary settings of full and of sliding layers, from the new format, or the old where an older release left it."""
    parameters = getattr(text, "rope_parameters", None)
    if not parameters:
        parameters = {"rope_theta": getattr(text, "rope_theta", None), **(getattr(text, "rope_scaling", None) or {})}
    kinds = ("full_attention", "sliding_attention")
    nested = {kind: parameters[kind] for kind in kinds if isinstance(parameters.get(kind), dict)}
    read = {}
    for kind, values in (nested or {None: parameters}).items():
        where = f"rope_parameters{f'[{kind!r}]' if kind else ''} of the {text.model_type} config"
        # In transformers yarn's `truncate` is the outer dictionary's.
        values = {**values, "truncate": parameters.get("truncate", True)} if kind else values
        rope = Rope.from_parameters(values, head_dim, max_length=text.max_position_embeddings, where=where)
        if rope.partial != 1 and text.model_type != "phi3":
            raise ValueError(
                f"{where}: partial_rotary_factor {rope.partial:g} is not supported; whole heads are rotated (1.0)."
            )
        if not rope.is_finite(head_dim):
            raise ValueError(f"{where} is {quoted(values)}, which gives angles that are no finite numbers.")
        read[kind] = rope
    one, *_ = read.values()
    return tuple(read.get(kind, one) for kind in kinds)


def _rotated_layers(text: Any, sliding: tuple[bool, ...]) -> tuple[bool, ...] | None:
    """Which layers rotate queries and keys (None: all); the others have no position embedding (NoPE)."""
    if text.model_type == "exaone4" and text.sliding_window is not None:
        return sliding
    if text.model_type != "smollm3":
        return None
    rotated = text.no_rope_layers  # 1 where there is a rotation
    if not isinstance(rotated, list) or len(rotated) < len(sliding) or not set(rotated) <= {0, 1}:
        needed = f"it must have a 1 (rotated) or a 0 for each of its {len(sliding)} layers"
        raise ValueError(f"no_rope_layers of the smollm3 config is {quoted(rotated)}; {needed}.")
    return tuple(map(bool, rotated[: len(sliding)]))
