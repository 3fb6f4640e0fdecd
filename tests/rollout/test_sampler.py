import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from transformers import LlamaConfig

from gold_jax.models.config import DecoderConfig
from gold_jax.models.decoder import Decoder
from gold_jax.models.weights import load_model
from gold_jax.rollout import sampler
from gold_jax.rollout.sampler import draw, filtered_weights, generate_tokens

NEW = 6
GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "models" / "greedy.json"


@pytest.fixture(scope="module")
def model() -> Decoder:
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = Decoder.from_config(DecoderConfig.from_hf(config), 0)
    model.head.set_value(model.head[...] * 20)  # far from uniform
    return model


def left_padded(prompts: list[list[int]], length: int) -> tuple[np.ndarray, np.ndarray]:
    tokens = np.zeros((len(prompts), length), np.int32)
    mask = np.zeros((len(prompts), length), bool)
    for row, prompt in enumerate(prompts):
        tokens[row, length - len(prompt) :] = prompt
        mask[row, length - len(prompt) :] = True
    return tokens, mask


PROMPTS = [[3, 14, 15], [9, 2, 6, 5, 35], [8]]


def generate(model, prompts=PROMPTS, length=8, key=0, **options):
    tokens, mask = left_padded(prompts, length)
    return jax.device_get(generate_tokens(model, tokens, mask, max_new_tokens=NEW, key=jax.random.key(key), **options))


def read_again(model, prompt, completion) -> np.ndarray:
    """Log-probabilities [N, V] from which each token of a completion was drawn, by one forward pass."""
    tokens, mask = left_padded([prompt + completion.tolist()], 8 + NEW)
    logits = jax.jit(lambda model, tokens, mask: model.logits(model(tokens, mask)))(model, tokens, mask)
    return np.asarray(jax.nn.log_softmax(logits))[0, 7:-1]


def test_greedy_takes_the_likeliest_token_each_time(model):
    rollout = generate(model, temperature=0)
    assert rollout.lengths.tolist() == [NEW] * 3
    for prompt, tokens in zip(PROMPTS, rollout.tokens):
        np.testing.assert_array_equal(read_again(model, prompt, tokens).argmax(axis=1), tokens)


def test_logprobs_are_those_of_the_model_itself(model):
    rollout = generate(model, temperature=2.0, top_k=5)
    for prompt, tokens, logprobs in zip(PROMPTS, rollout.tokens, rollout.logprobs):
        expected = read_again(model, prompt, tokens)[np.arange(NEW), tokens]
        np.testing.assert_allclose(logprobs, expected, atol=1e-5)


def test_a_row_ends_with_its_stop_token_and_the_others_go_on(model):
    free = generate(model, temperature=0)
    stop = int(free.tokens[1, 2])
    rollout = generate(model, temperature=0, stop_ids=[49, stop])
    first = [row.tolist().index(stop) + 1 if stop in row else NEW for row in free.tokens]
    assert rollout.lengths.tolist() == first and min(first) < NEW
    for row, length in enumerate(first):
        np.testing.assert_array_equal(rollout.tokens[row, :length], free.tokens[row, :length])
        assert not rollout.tokens[row, length:].any() and not rollout.logprobs[row, length:].any()


def test_sampling_ends_when_every_row_has_ended(model):
    class Counting(Decoder):
        steps = 0

        def decode_step(self, *arguments):
            jax.debug.callback(lambda: setattr(Counting, "steps", Counting.steps + 1))
            return super().decode_step(*arguments)

    counting = Counting.from_config(model.config, 0)
    stop = int(generate(counting, prompts=PROMPTS[:1], temperature=0).tokens[0, 1])
    Counting.steps = 0
    assert generate(counting, prompts=PROMPTS[:1], temperature=0, stop_ids=[stop]).lengths[0] <= 2
    jax.effects_barrier()
    assert Counting.steps <= 1


def test_a_row_without_prompt_is_left_out(model):
    rollout = generate(model, prompts=[PROMPTS[0], [], PROMPTS[2]], temperature=0)
    assert rollout.lengths.tolist() == [NEW, 0, NEW] and not rollout.tokens[1].any()
    np.testing.assert_array_equal(rollout.tokens[0], generate(model, temperature=0).tokens[0])


def test_what_a_row_draws_does_not_depend_on_padding_or_on_the_rows_below(model):
    plain = generate(model, key=5)
    np.testing.assert_array_equal(generate(model, length=16, key=5).tokens, plain.tokens)
    np.testing.assert_array_equal(generate(model, prompts=PROMPTS[:2], key=5).tokens, plain.tokens[:2])
    assert not np.array_equal(generate(model, key=6).tokens, plain.tokens)


def test_equal_prompts_draw_differently(model):
    rollout = generate(model, prompts=[PROMPTS[0]] * 3, temperature=3.0)
    assert len({tuple(row) for row in rollout.tokens}) == 3


def test_settings_compile_nothing_anew(model):
    generate(model)
    compiled = sampler._generate._cache_size()
    for options in (
        {"temperature": 0},
        {"top_k": 7, "key": 3},
        {"top_p": 0.5},
        {"stop_ids": [1, 2, 3]},
        {"temperature": 0.3},
    ):
        generate(model, **options)
    generate(nnx.split(model))
    assert sampler._generate._cache_size() == compiled


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperature": -1}, "temperature must be 0"),
        ({"temperature": float("nan")}, "temperature must be 0"),
        ({"top_k": -1}, "top_k must be 0"),
        ({"top_p": 0.0}, "top_p must lie in"),
        ({"top_p": 1.5}, "top_p must lie in"),
    ],
)
def test_a_setting_out_of_range_is_refused(model, options, words):
    with pytest.raises(ValueError, match=words):
        generate(model, **options)


def reference(logits: np.ndarray, temperature: float, top_k: int, top_p: float) -> np.ndarray:
    """Probabilities [V] after transformers' filters, by sorting."""
    logits = logits.astype(np.float64) / temperature
    if top_k:
        logits = np.where(logits >= np.sort(logits)[-top_k], logits, -np.inf)
    probabilities = np.exp(logits - logits.max())
    probabilities /= probabilities.sum()
    if top_p < 1:
        order = np.argsort(probabilities)[::-1]
        before = np.cumsum(probabilities[order]) - probabilities[order]
        probabilities[order[before >= top_p]] = 0
    return probabilities / probabilities.sum()


@pytest.mark.parametrize("temperature", (0.5, 1.0, 1.7))
@pytest.mark.parametrize("top_k", (0, 1, 5, 999, 5000))
@pytest.mark.parametrize("top_p", (1.0, 0.9, 0.3, 1e-6))
def test_the_filters_keep_what_sorting_would_keep(temperature, top_k, top_p):
    logits = 3 * np.random.default_rng(0).standard_normal((4, 1000)).astype(np.float32)
    weights = np.asarray(jax.jit(filtered_weights)(logits, temperature, top_k, top_p), np.float64)
    for row in range(4):
        expected = reference(logits[row], temperature, min(top_k, 1000), top_p)
        np.testing.assert_array_equal(weights[row] > 0, expected > 0)
        np.testing.assert_allclose(weights[row] / weights[row].sum(), expected, rtol=1e-4)


def test_entries_that_tie_with_the_last_one_kept_are_kept():
    logits = jnp.array([[1.0, 2.0, 2.0, 0.0, -jnp.inf]])
    assert (filtered_weights(logits, 1.0, 1, 1.0) > 0).tolist() == [[False, True, True, False, False]]
    assert (filtered_weights(logits, 1.0, 4, 1.0) > 0).tolist() == [[True, True, True, True, False]]


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.7, 0, 0.8), (1.5, 40, 1.0), (1.2, 60, 0.9)]
)
def test_tokens_come_as_often_as_their_probabilities_say(temperature, top_k, top_p):
    count, size = 40_000, 600  # several blocks of the vocabulary, the last one partly filled
    logits = 2 * np.random.default_rng(1).standard_normal(size).astype(np.float32)
    uniform = jax.random.uniform(jax.random.key(0), (count,))
    tokens = jax.jit(jax.vmap(lambda u: draw(logits[None], u[None], temperature, top_k, top_p)[0]))(uniform)
    expected = reference(logits, temperature, top_k, top_p)
    found = np.bincount(tokens, minlength=size)
    assert not found[expected == 0].any()
    kept = expected > 0
    # Pearson's statistic is near its degrees of freedom, with variance twice that: six deviations off is chance never.
    statistic = (((found - count * expected) ** 2)[kept] / (count * expected[kept])).sum()
    freedom = kept.sum() - 1
    assert abs(statistic - freedom) < 6 * np.sqrt(2 * freedom) + 10


def test_the_ends_of_the_unit_interval_draw_tokens_that_are_kept():
    logits = np.full((1, 600), -40.0, np.float32)
    logits[0, [5, 300, 301]] = 0
    for u, expected in ((0.0, 5), (1 - 2**-24, 301), (0.5, 300)):
        assert int(draw(jnp.asarray(logits), jnp.array([u], jnp.float32), 1.0, 3, 1.0)[0]) == expected


def chat(tokenizer, prompts):
    texts = (
        tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True)
        for prompt in prompts
    )
    return [tokenizer(text, add_special_tokens=False).input_ids for text in texts]


def greedy(folder, ids, new, stop):
    tokens, mask = left_padded(ids, max(map(len, ids)))
    options = {"key": jax.random.key(0), "temperature": 0, "stop_ids": [stop]}
    rollout = jax.device_get(generate_tokens(load_model(folder), tokens, mask, max_new_tokens=new, **options))
    return [row[:length].tolist() for row, length in zip(rollout.tokens, rollout.lengths)]


@pytest.mark.assets
@pytest.mark.slow
@pytest.mark.parametrize("name", ("smollm2-135m-instruct", "smollm2-135m-gpt2tok"))
def test_greedy_output_is_that_of_transformers(assets, name):
    from transformers import AutoTokenizer

    golden = json.loads(GOLDEN.read_text())
    tokenizer = AutoTokenizer.from_pretrained(assets / name)
    found = greedy(assets / name, chat(tokenizer, golden["prompts"]), golden["new"], tokenizer.eos_token_id)
    assert found == golden["answers"][name]


@pytest.mark.live
@pytest.mark.assets
@pytest.mark.slow
@pytest.mark.parametrize("name", ("smollm2-135m-instruct", "smollm2-135m-gpt2tok"))
def test_greedy_output_on_questions_is_that_of_transformers_here(assets, name):
    """Reads the questions from the JSONL file that GOLD_JAX_QUESTIONS names."""
    import os

    pytest.importorskip("torch")
    make_model_golden = pytest.importorskip("golden.make_model_golden")
    from transformers import AutoTokenizer

    file = os.environ.get("GOLD_JAX_QUESTIONS")
    if not file:
        pytest.skip("GOLD_JAX_QUESTIONS does not name a JSONL file whose rows have a question")
    questions = [json.loads(line)["question"] for line in pathlib.Path(file).read_text().splitlines()[:20]]
    tokenizer = AutoTokenizer.from_pretrained(assets / name)
    found = greedy(assets / name, chat(tokenizer, questions), 64, tokenizer.eos_token_id)
    assert found == make_model_golden.greedy(assets / name, questions, 64)
