import pytest

from gold_jax.models.decoder import Decoder
from gold_jax.planning.analytic import parameter_count
from gold_jax.planning.models import known_config, known_models

# What the hub says of the weights ("safetensors", tied heads counted once); of Gemma 3 without its vision tower and projector.
COUNTS = {
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "meta-llama/Llama-3.2-3B": 3_212_749_824,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Llama-3.1-70B": 70_553_706_496,
    "meta-llama/Llama-3.3-70B": 70_553_706_496,
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen2.5-1.5B": 1_543_714_304,
    "Qwen/Qwen2.5-3B": 3_085_938_688,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
    "Qwen/Qwen2.5-14B": 14_770_033_664,
    "Qwen/Qwen2.5-32B": 32_763_876_352,
    "Qwen/Qwen2.5-72B": 72_706_203_648,
    "Qwen/Qwen3-0.6B": 596_049_920,
    "Qwen/Qwen3-1.7B": 1_720_574_976,
    "Qwen/Qwen3-4B": 4_022_468_096,
    "Qwen/Qwen3-4B-Instruct-2507": 4_022_468_096,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-14B": 14_768_307_200,
    "Qwen/Qwen3-32B": 32_762_123_264,
    "google/gemma-2-2b": 2_614_341_888,
    "google/gemma-2-9b": 9_241_705_984,
    "google/gemma-2-27b": 27_227_128_320,
    "google/gemma-3-1b": 999_885_952,
    "google/gemma-3-4b": 4_300_079_472 - 419_816_304,
    "google/gemma-3-12b": 12_187_325_040 - 421_290_864,
    "google/gemma-3-27b": 27_432_406_640 - 423_060_336,
    "HuggingFaceTB/SmolLM2-135M": 134_515_008,
    "HuggingFaceTB/SmolLM2-360M": 361_821_120,
    "HuggingFaceTB/SmolLM2-1.7B": 1_711_376_384,
    "mistralai/Mistral-7B-v0.3": 7_248_023_552,
    "HuggingFaceTB/SmolLM3-3B": 3_075_098_624,
    "allenai/OLMo-2-0425-1B": 1_484_916_736,
    "ibm-granite/granite-3.3-2b": 2_533_539_840,
    "microsoft/phi-4": 14_659_507_200,
    "microsoft/Phi-3-mini-4k": 3_821_079_552,
}


@pytest.mark.parametrize("name", COUNTS)
def test_a_known_model_has_as_many_parameters_as_its_weights(name):
    assert parameter_count(known_config(name)) == COUNTS[name]


@pytest.mark.parametrize(
    ("name", "base"),
    [
        ("meta-llama/Llama-3.2-1B-Instruct", "meta-llama/Llama-3.2-1B"),
        ("Qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen2.5-0.5B"),
        ("qwen/qwen3-8b", "Qwen/Qwen3-8B"),
        ("Qwen/Qwen3-8B-Base", "Qwen/Qwen3-8B"),
        ("google/gemma-2-9b-it", "google/gemma-2-9b"),
        ("google/gemma-3-4b-pt", "google/gemma-3-4b"),
        ("mistralai/Mistral-7B-Instruct-v0.3", "mistralai/Mistral-7B-v0.3"),
        ("allenai/OLMo-2-0425-1B-Instruct", "allenai/OLMo-2-0425-1B"),
        ("ibm-granite/granite-3.3-2b-instruct", "ibm-granite/granite-3.3-2b"),
        ("microsoft/Phi-3-mini-4k-instruct", "microsoft/Phi-3-mini-4k"),
    ],
)
def test_a_tuned_model_has_the_shape_of_its_base(name, base):
    assert known_config(name) == known_config(base) is not None


def test_every_known_model_is_counted():
    assert set(known_models()) == {*COUNTS, "mistralai/Mistral-7B-Instruct-v0.3"}


def test_families_read_as_they_are():
    assert known_config("meta-llama/Llama-3.2-1B").ropes[0].kind == "llama3"
    assert known_config("Qwen/Qwen3-4B-Instruct-2507").ropes[0].theta == 5e6
    assert known_config("Qwen/Qwen3-4B").qk_norm and known_config("Qwen/Qwen2.5-3B").qkv_bias
    gemma = known_config("google/gemma-3-27b-it")
    assert (gemma.family, gemma.window, sum(gemma.sliding), gemma.layers) == ("gemma3_text", 1024, 52, 62)
    assert gemma.ropes[0].theta == 1e6 and gemma.ropes[1].theta == 1e4 and gemma.query_scale == 168**-0.5
    assert known_config("google/gemma-2-27b").final_softcap == 30.0


def test_a_known_model_can_be_planned_with_and_an_unknown_one_is_none():
    model = Decoder.abstract(known_config("HuggingFaceTB/SmolLM2-135M-Instruct"))
    assert model.embedding.get_value().shape == (49152, 576)
    assert known_config("someone/their-model") is None
