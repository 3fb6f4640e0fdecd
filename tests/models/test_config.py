import json

import pytest
from transformers import (
    AutoConfig,
    Gemma3TextConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Qwen2Config,
    SmolLM3Config,
)

from gold_jax.models.config import FAMILIES, DecoderConfig

from . import tiny


def read(name: str) -> DecoderConfig:
    raw = tiny.config_of(name)
    return DecoderConfig.from_hf(AutoConfig.for_model(**raw), raw=raw)


def test_both_formats_of_llama3_scaling_read_the_same():
    assert read("llama3_old").ropes == read("llama3_new").ropes
    assert read("llama3_old").ropes[0].kind == "llama3"


def test_gemma3_gives_its_full_and_sliding_layers_different_ropes():
    full, local = read("gemma3_old").ropes
    assert (full.kind, full.factor, full.theta) == ("linear", 8.0, 1e6)
    assert (local.kind, local.theta) == ("default", 100.0)
    assert read("gemma3_new").ropes == (full, local)
    assert read("gemma3_new").layer_ropes == (local, full, local)


def test_a_multimodal_gemma3_is_its_language_part():
    assert read("gemma3_multimodal_old") == read("gemma3_old")


def test_qwen2_slides_only_where_it_is_told_to():
    small = {"num_hidden_layers": 3, "sliding_window": 4, "max_window_layers": 1}
    assert DecoderConfig.from_hf(Qwen2Config(**small)).window is None
    config = DecoderConfig.from_hf(Qwen2Config(**small, use_sliding_window=True))
    assert (config.window, config.sliding) == (4, (False, True, True))


def test_mistral_slides_everywhere_or_nowhere():
    assert DecoderConfig.from_hf(MistralConfig(num_hidden_layers=2, sliding_window=8)).sliding == (True, True)
    assert DecoderConfig.from_hf(MistralConfig(num_hidden_layers=2, sliding_window=None)).sliding == (False, False)


def test_layers_without_rotation_have_none():
    assert [rope is not None for rope in read("smollm3").layer_ropes] == [True, False, True]
    assert [rope is not None for rope in read("exaone4").layer_ropes] == [True, False, True]  # those that slide
    assert None not in read("exaone4_no_window").layer_ropes
    with pytest.raises(ValueError, match=r"no_rope_layers of the smollm3 config is \[1, 0\]; it must have a 1"):
        DecoderConfig.from_hf(
            SmolLM3Config(num_hidden_layers=3, no_rope_layers=[1, 0], layer_types=["full_attention"] * 3)
        )


def test_configs_compare_and_hash_by_what_they_compute():
    one, other = (DecoderConfig.from_hf(LlamaConfig(), raw={"note": note}) for note in "ab")
    assert one == other and hash(one) == hash(other)
    assert json.loads(one.source)["config"] == {"note": "a"}


def test_an_unknown_family_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="'mixtral' is not known") as error:
        DecoderConfig.from_hf(MixtralConfig())
    assert all(family in str(error.value) for family in (*FAMILIES, "docs/families.md", "docs/add-a-model.md"))


def test_an_unknown_rope_type_is_refused_with_the_known_ones():
    with pytest.raises(
        ValueError, match="rope_type 'dynamic' is not known. Known are default, linear, llama3, longrope"
    ):
        DecoderConfig.from_hf(LlamaConfig(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (LlamaConfig(quantization_config={"quant_method": "fp8"}), "quantization_config"),
        (LlamaConfig(num_local_experts=4), "mixtures of experts"),
        (Gemma3TextConfig(use_bidirectional_attention=True), "use_bidirectional_attention"),
        (LlamaConfig(num_attention_heads=8, num_key_value_heads=3, hidden_size=64), "not a multiple"),
        (LlamaConfig(rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 0.5}), "partial_rotary_factor 0.5"),
        (GraniteConfig(logits_scaling=0.0), "logits_scaling of the granite config is 0.0; it must be a number greater"),
        (LlamaConfig(hidden_act="relu"), "activation 'relu' is not known"),
        (Qwen2Config(num_hidden_layers=1, layer_types=["sliding_attention"]), "sliding_window is null"),
        (Qwen2Config(num_hidden_layers=1, layer_types=["linear_attention"]), "linear_attention"),
    ],
)
def test_a_feature_that_is_not_there_is_refused_by_name(config, words):
    with pytest.raises(ValueError, match=words):
        DecoderConfig.from_hf(config)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"num_key_value_heads": 0}, "num_key_value_heads of the llama config is 0; it must be a whole number from 1"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers .* is 1000000000; it must be a whole number from 1 to 10000"),
        ({"vocab_size": -5}, "vocab_size .* is -5"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps .* is nan; it must be a number between 0 and 1"),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 0.0}},
            "rope_theta is 0.0; it must be a number greater than 0",
        ),
    ],
)
def test_numbers_out_of_range_are_one_sentence(changes, words):
    config = LlamaConfig(num_hidden_layers=2)
    for name, value in changes.items():  # as a file may hold them; transformers checks some of them itself
        object.__setattr__(config, name, value)
    with pytest.raises(ValueError, match=words) as error:
        DecoderConfig.from_hf(config)
    assert len(str(error.value)) < 300
