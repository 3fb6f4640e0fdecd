"""Configs of well-known models, to plan a run with before anything is downloaded.

Each is what the `config.json` on the hub says of shapes and rotations, and `transformers` reads it as it would read the
file. Of Gemma 3's multimodal models it is the language part. An instruction-tuned model and its base have one shape.
"""

from typing import Any

from transformers import AutoConfig

from gold_jax.models.config import DecoderConfig

_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)
_SUFFIXES = ("-Instruct", "-it", "-pt", "-Base")


def _family(model_type: str, models: dict[str, tuple], **shared: Any) -> dict[str, dict[str, Any]]:
    """Configs by hub id, from a family's common fields and, for each model, `_SIZES` and the fields that are its own."""
    return {
        name: {"model_type": model_type, **shared, **dict(zip(_SIZES, sizes)), **own}
        for name, (*sizes, own) in models.items()
    }


def _llama3(factor: float) -> dict[str, Any]:
    return {
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
    }


_TIED, _UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
_WIDE_VOCABULARY = {"vocab_size": 152064}
_FAR = {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}

CONFIGS: dict[str, dict[str, Any]] = {
    **_family(
        "llama",
        {
            "meta-llama/Llama-3.2-1B": (2048, 8192, 16, 32, 8, 64, _TIED | _llama3(32.0)),
            "meta-llama/Llama-3.2-3B": (3072, 8192, 28, 24, 8, 128, _TIED | _llama3(32.0)),
            "meta-llama/Llama-3.1-8B": (4096, 14336, 32, 32, 8, 128, _UNTIED | _llama3(8.0)),
            "meta-llama/Llama-3.1-70B": (8192, 28672, 80, 64, 8, 128, _UNTIED | _llama3(8.0)),
            "meta-llama/Llama-3.3-70B": (8192, 28672, 80, 64, 8, 128, _UNTIED | _llama3(8.0)),
        },
        vocab_size=128256,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_theta=500000.0,
    ),
    **_family(
        "qwen2",
        {
            "Qwen/Qwen2.5-0.5B": (896, 4864, 24, 14, 2, 64, _TIED),
            "Qwen/Qwen2.5-1.5B": (1536, 8960, 28, 12, 2, 128, _TIED),
            "Qwen/Qwen2.5-3B": (2048, 11008, 36, 16, 2, 128, _TIED),
            "Qwen/Qwen2.5-7B": (3584, 18944, 28, 28, 4, 128, _UNTIED | _WIDE_VOCABULARY),
            "Qwen/Qwen2.5-14B": (5120, 13824, 48, 40, 8, 128, _UNTIED | _WIDE_VOCABULARY),
            "Qwen/Qwen2.5-32B": (5120, 27648, 64, 40, 8, 128, _UNTIED | _WIDE_VOCABULARY),
            "Qwen/Qwen2.5-72B": (8192, 29568, 80, 64, 8, 128, _UNTIED | _WIDE_VOCABULARY),
        },
        vocab_size=151936,
        max_position_embeddings=32768,
        rms_norm_eps=1e-6,
        rope_theta=1000000.0,
    ),
    **_family(
        "qwen3",
        {
            "Qwen/Qwen3-0.6B": (1024, 3072, 28, 16, 8, 128, _TIED),
            "Qwen/Qwen3-1.7B": (2048, 6144, 28, 16, 8, 128, _TIED),
            "Qwen/Qwen3-4B": (2560, 9728, 36, 32, 8, 128, _TIED),
            "Qwen/Qwen3-8B": (4096, 12288, 36, 32, 8, 128, _UNTIED),
            "Qwen/Qwen3-14B": (5120, 17408, 40, 40, 8, 128, _UNTIED),
            "Qwen/Qwen3-32B": (5120, 25600, 64, 64, 8, 128, _UNTIED),
            "Qwen/Qwen3-4B-Instruct-2507": (
                *(2560, 9728, 36, 32, 8, 128),
                _TIED | {"max_position_embeddings": 262144, "rope_theta": 5000000.0},
            ),
        },
        vocab_size=151936,
        max_position_embeddings=40960,
        rms_norm_eps=1e-6,
        rope_theta=1000000.0,
    ),
    **_family(
        "gemma2",
        {
            "google/gemma-2-2b": (2304, 9216, 26, 8, 4, 256, {"query_pre_attn_scalar": 256}),
            "google/gemma-2-9b": (3584, 14336, 42, 16, 8, 256, {"query_pre_attn_scalar": 256}),
            "google/gemma-2-27b": (4608, 36864, 46, 32, 16, 128, {"query_pre_attn_scalar": 144}),
        },
        vocab_size=256000,
        max_position_embeddings=8192,
        rms_norm_eps=1e-6,
        rope_theta=10000.0,
        sliding_window=4096,
        attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0,
    ),
    **_family(
        "gemma3_text",
        {
            "google/gemma-3-1b": (
                *(1152, 6912, 26, 4, 1, 256),
                {"vocab_size": 262144, "sliding_window": 512, "max_position_embeddings": 32768},
            ),
            "google/gemma-3-4b": (2560, 10240, 34, 8, 4, 256, _FAR),
            "google/gemma-3-12b": (3840, 15360, 48, 16, 8, 256, _FAR),
            "google/gemma-3-27b": (5376, 21504, 62, 32, 16, 128, _FAR | {"query_pre_attn_scalar": 168}),
        },
        vocab_size=262208,
        max_position_embeddings=131072,
        rms_norm_eps=1e-6,
        rope_theta=1000000.0,
        rope_local_base_freq=10000.0,
        sliding_window=1024,
        query_pre_attn_scalar=256,
    ),
    **_family(
        "llama",
        {
            "HuggingFaceTB/SmolLM2-135M": (576, 1536, 30, 9, 3, 64, {"rope_theta": 100000.0}),
            "HuggingFaceTB/SmolLM2-360M": (960, 2560, 32, 15, 5, 64, {"rope_theta": 100000.0}),
            "HuggingFaceTB/SmolLM2-1.7B": (2048, 8192, 24, 32, 32, 64, {"rope_theta": 130000.0}),
        },
        vocab_size=49152,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        **_TIED,
    ),
    **_family(
        "mistral",
        {"mistralai/Mistral-7B-v0.3": (4096, 14336, 32, 32, 8, 128, {})},
        vocab_size=32768,
        max_position_embeddings=32768,
        rms_norm_eps=1e-5,
        rope_theta=1000000.0,
        sliding_window=None,
        **_UNTIED,
    ),
}
# The suffix stands before the version here.
_OTHER_NAMES = {"mistralai/Mistral-7B-Instruct-v0.3": "mistralai/Mistral-7B-v0.3"}


def known_config(name: str) -> DecoderConfig | None:
    """The config of a model by its hub id, upper or lower case, base or instruction-tuned; None for one that is not known."""
    ids = {known.lower(): known for known in (*CONFIGS, *_OTHER_NAMES)}
    asked = name.strip().lower()
    for known in (asked, *(asked.removesuffix(suffix.lower()) for suffix in _SUFFIXES)):
        if known in ids:
            fields = dict(CONFIGS[_OTHER_NAMES.get(ids[known], ids[known])])
            return DecoderConfig.from_hf(AutoConfig.for_model(fields.pop("model_type"), **fields))
    return None
