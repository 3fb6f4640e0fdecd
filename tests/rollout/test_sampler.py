import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from models import tiny
from transformers import LlamaConfig

from gold_jax.models import layer
from gold_jax.models.config import DecoderConfig
from gold_jax.models.decoder import Cache, Decoder
from gold_jax.models.functional import split
from gold_jax.models.hf_checkpoint import load_model
from gold_jax.models.quantization import KV_CACHE, Int8, vectors_to_int8
from gold_jax.rollout import decode_state as device
from gold_jax.rollout import sampler
from gold_jax.rollout.agreement import logprob_difference
from gold_jax.rollout.engine import EMPTY, NonFiniteLogits
from gold_jax.rollout.sampler import SamplingEngine, most_slots, prompt_width

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


@pytest.fixture(scope="module", autouse=True)
def no_model_is_small():
    """These models change the number of their rows as large ones do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampler, "SMALL_MODEL", 0)
        yield


PROMPTS = [[3, 14, 15], [9, 2, 6, 5, 35], [8]]


def generate(model, prompts=PROMPTS, rows=8, key=0, new=NEW, **options):
    prompts = [np.array(prompt, np.int32) for prompt in prompts]
    return SamplingEngine(rows).generate(model, prompts, max_new_tokens=new, key=jax.random.key(key), **options)


def ids(drawn) -> list[list[int]]:
    return [completion.ids.tolist() for completion in drawn]


def read_again(model, prompt, completion) -> np.ndarray:
    """Log-probabilities [N, V] from which each token of a completion was drawn, by one forward pass."""
    tokens = np.pad(prompt + completion.tolist(), (0, 8 + NEW))[None, : 8 + NEW]
    logits = jax.jit(lambda model, *read: model.logits(model(*read)))(model, tokens, np.ones(tokens.shape, bool))
    return np.asarray(jax.nn.log_softmax(logits))[0, len(prompt) - 1 :][: len(completion)]


def test_greedy_takes_the_likeliest_token_each_time(model):
    drawn = generate(model, temperature=0)
    assert [len(completion.ids) for completion in drawn] == [NEW] * 3
    for prompt, completion in zip(PROMPTS, drawn):
        np.testing.assert_array_equal(read_again(model, prompt, completion.ids).argmax(axis=1), completion.ids)


def test_longrope_is_sampled_up_to_its_original_length_though_that_is_no_size_of_a_cache(tmp_path):
    model = load_model(tiny.write_folder("phi3_longrope_beyond", tmp_path))  # 12 tokens
    (drawn,) = generate(model, PROMPTS[:1], new=9, temperature=0)
    row = np.array([PROMPTS[0] + drawn.ids.tolist()])
    np.testing.assert_array_equal(np.asarray(model.logits(model(row)))[0, 2:-1].argmax(axis=1), drawn.ids)
    with pytest.raises(ValueError, match="come to 13 tokens; the phi3 model can decode rows of at most 12"):
        generate(model, PROMPTS[:1], new=11)


def test_parameters_of_numpy_are_sampled_from_as_any_others(model):
    graph, params = split(model)
    assert ids(generate((graph, jax.tree.map(np.asarray, params)))) == ids(generate(model))


def test_logprobs_are_those_of_the_model_itself(model):
    for prompt, completion in zip(PROMPTS, generate(model, temperature=2.0, top_k=5)):
        expected = read_again(model, prompt, completion.ids)[np.arange(NEW), completion.ids]
        np.testing.assert_allclose(completion.logprobs, expected, atol=1e-5)


def test_a_row_ends_with_its_stop_token_and_the_others_go_on(model):
    free = ids(generate(model, temperature=0))
    stop = free[1][2]
    drawn = generate(model, temperature=0, stop_ids=[49, stop])
    ends = [row.index(stop) + 1 if stop in row else NEW for row in free]
    assert min(ends) < NEW and ids(drawn) == [row[:end] for row, end in zip(free, ends)]
    assert [len(completion.logprobs) for completion in drawn] == ends


def test_sampling_ends_when_every_row_has_ended(model):
    class Counting(Decoder):
        steps = 0

        def decode_step(self, *arguments):
            jax.debug.callback(lambda: setattr(Counting, "steps", Counting.steps + 1))
            return super().decode_step(*arguments)

    counting = Counting.from_config(model.config, 0)
    stop = ids(generate(counting, prompts=PROMPTS[:1], temperature=0))[0][1]
    jax.effects_barrier()
    Counting.steps = 0
    (drawn,) = generate(counting, prompts=PROMPTS[:1], temperature=0, stop_ids=[stop])
    jax.effects_barrier()
    assert len(drawn.ids) <= 2 and Counting.steps == len(drawn.ids)


def test_a_prompt_without_tokens_gets_an_empty_completion(model):
    drawn = generate(model, prompts=[PROMPTS[0], [], PROMPTS[2]], temperature=0)
    assert [len(completion.ids) for completion in drawn] == [NEW, 0, NEW] and drawn[1].logprobs.shape == (0,)
    assert ids(drawn)[0] == ids(generate(model, temperature=0))[0]
    assert ids(generate(model, prompts=[[], []])) == [[], []] and generate(model, prompts=[]) == []


def test_equal_prompts_draw_differently_and_keys_matter(model):
    drawn = ids(generate(model, prompts=[PROMPTS[0]] * 3, temperature=3.0))
    assert len(set(map(tuple, drawn))) == 3
    assert ids(generate(model, prompts=[PROMPTS[0]] * 3, temperature=3.0, key=6)) != drawn


# Many prompts of many lengths, some of which end early: rows join, shrink, and get more slots.
MANY = [np.random.default_rng(i).integers(0, 50, size).tolist() for i, size in enumerate([5, 1, 3, 20, 2, 40] * 6)]
STOPS = [1, 2]


@pytest.fixture(scope="module")
def alone(model):
    """What each of many prompts draws in a row of its own, by temperature."""
    return {t: ids(generate(model, MANY, rows=1, new=40, stop_ids=STOPS, temperature=t)) for t in (0, 1)}


@pytest.mark.parametrize("temperature", (0, 1))
@pytest.mark.parametrize("rows", (2, pytest.param(4, marks=pytest.mark.long), 8, 64))
def test_what_a_row_draws_does_not_depend_on_the_rows_beside_it(model, alone, rows, temperature):
    found = generate(model, MANY, rows=rows, new=40, stop_ids=STOPS, temperature=temperature)
    assert ids(found) == alone[temperature]


def test_prompts_end_at_different_times_in_these_tests(alone):
    lengths = [len(row) for row in alone[1]]
    assert len(set(lengths)) > 10 and max(lengths) == 40


def test_the_place_in_the_list_and_the_prompt_decide_what_is_drawn(model):
    plain = ids(generate(model, MANY))
    changed = MANY.copy()
    changed[4] = [7] * 90
    found = ids(generate(model, changed))
    assert found[4] != plain[4] and found[:4] + found[5:] == plain[:4] + plain[5:]
    assert ids(generate(model, MANY[:9])) == plain[:9]


@pytest.fixture
def events(monkeypatch):
    """Records which programs run, and over how many rows and slots."""
    found = []

    def record(name, run):
        def recording(*arguments, **options):
            out = run(*arguments, **options)
            found.append((name, *out[0].values[0].shape[:3:2]))
            return out

        monkeypatch.setattr(device, name, recording)

    for name in ("prefill_into_slots", "resize_slots", "decode_until"):
        record(name, getattr(device, name))
    return found


def test_a_small_batch_is_read_and_written_by_one_program_each(model, events):
    generate(model, PROMPTS, rows=4, temperature=0)
    assert events == [("prefill_into_slots", 4, 32), ("decode_until", 4, 32)]


def test_free_rows_are_filled_from_the_prompts_that_wait(model, events):
    generate(model, MANY, rows=8, new=40, stop_ids=STOPS)
    written = [event for event in events if event[0] == "decode_until"]
    assert [event[0] for event in events].count("prefill_into_slots") > 4 and len(written) > 4
    assert {rows for _, rows, _ in events} == {8}


def test_rows_that_are_done_are_left_behind_when_no_prompt_waits(model, events):
    generate(model, MANY, rows=64, new=40, stop_ids=STOPS)
    rows = [rows for name, rows, _ in events if name == "decode_until"]
    assert rows == [64, 32, 16, 8]


def test_a_small_model_keeps_its_rows_and_reads_prompts_in_one_width_of_rows(model, alone, events, monkeypatch):
    monkeypatch.setattr(sampler, "SMALL_MODEL", 10**7)
    read = []
    prefill = device.prefill_into_slots
    monkeypatch.setattr(device, "prefill_into_slots", lambda *args: read.append(len(args[4])) or prefill(*args))
    assert ids(generate(model, MANY, rows=8, new=40, stop_ids=STOPS)) == alone[1]
    assert {rows for _, rows, _ in events} == {8} and set(read) == {8} and len(read) > 2


@pytest.mark.parametrize(("rows", "read"), [(8, {2, 1}), (64, {16})])
def test_a_prompt_that_is_answered_several_times_is_read_once(model, monkeypatch, rows, read):
    prompts = [list(prompt) for prompt in MANY[:10] for _ in range(4)]
    expected = ids(generate(model, prompts, rows=1, new=12, stop_ids=STOPS))  # one row: none beside it to share with
    found, prefill = [], device.prefill_into_slots
    monkeypatch.setattr(device, "prefill_into_slots", lambda *args: found.append(len(args[4])) or prefill(*args))
    assert ids(generate(model, prompts, rows=rows, new=12, stop_ids=STOPS)) == expected
    assert (
        set(found) == read
    )  # 8 rows: two prompts at first, then one for the two rows of a refill; 64 rows: ten, padded


def test_weights_of_8_bits_draw_as_the_model_that_they_stand_for(model):
    """Their products are those of the rounded matrices, and what was drawn has the log-probabilities of these."""
    params, weights = split(model)[1], model.decoding_weights("int8")
    assert weights.head.values.dtype == np.int8 and weights.head.scale.shape == (50,)
    rounded = {name: np.array(x) for name, x in params["layers"].items()}
    for number, own in enumerate(weights.layers):
        for name, matrix in own.items():
            if isinstance(matrix, Int8):
                given, scale = rounded[name][number].copy(), np.asarray(matrix.scale)
                assert matrix.values.shape == given.shape and scale.shape == given.shape[1:]
                rounded[name][number] = np.asarray(matrix.values) * scale
                assert (np.abs(rounded[name][number] - given) <= scale / 2 * (1 + 1e-5)).all()
    assert sum(isinstance(x, Int8) for x in weights.layers[0].values()) == 7
    head = np.asarray(weights.head.values) * np.asarray(weights.head.scale)[:, None]
    other = model.replace(jax.tree.map(jnp.asarray, params | {"layers": rounded, "head": head}))
    options = dict(max_new_tokens=40, key=jax.random.key(0), stop_ids=STOPS)
    prompts = [np.array(prompt[:1], np.int32) for prompt in MANY]  # prompts are read with the model's own weights
    found = SamplingEngine(8, "int8").generate(model, prompts, **options)
    expected = SamplingEngine(8).generate(other, prompts, **options)
    assert ids(found) == ids(expected) != ids(SamplingEngine(8).generate(model, prompts, **options))
    for one, same in zip(found, expected):
        np.testing.assert_allclose(one.logprobs, same.logprobs, atol=2e-5)
    difference = logprob_difference(model, prompts, found)
    assert 0 < difference < 0.2 and logprob_difference(other, prompts, found) < 1e-5
    assert logprob_difference(model, prompts, [EMPTY] * len(prompts)) is None
    with pytest.raises(ValueError, match="quantization must be one of none, int8, int8_kv_cache, got 'int4'"):
        SamplingEngine(8, "int4")


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_attention_to_a_cache_of_8_bits_is_that_to_the_numbers_that_it_holds(model, platform):
    config, rng = model.config, np.random.default_rng(0)
    slots, size = 9, config.head_dim
    query = rng.normal(size=(3, 1, config.heads, size)).astype(np.float32)
    key, value = rng.normal(size=(2, 3, 1, config.kv_heads, size)).astype(np.float32)
    past = [
        rng.normal(size=(3, config.kv_heads, *shape)).astype(np.float32) for shape in ((size, slots), (slots, size))
    ]
    past[0][0, 0, :, 1] = 0  # a vector without a scale
    at = np.array([4, 0, 8], np.int32)
    allowed = np.arange(slots) <= at[:, None]

    def numbers(held, axis):
        return np.asarray(held.values) * np.expand_dims(held.scale, axis)

    cache = Cache(*((jnp.asarray(x),) for x in past), jnp.asarray(at)).to_int8()
    keys, values = cache.keys[0], cache.values[0]
    assert keys.values.dtype == np.int8 and keys.scale.shape == values.scale.shape == (3, config.kv_heads, slots)
    for held, given, axis in zip((keys, values), past, (2, 3)):
        assert (np.abs(numbers(held, axis) - given) <= np.expand_dims(held.scale, axis) / 2 * (1 + 1e-5)).all()
    attended, *written = layer._attend_to_cache(config, platform, query, key, value, allowed, keys, values, at)
    new = [numbers(vectors_to_int8(jnp.asarray(x), 3), 3) for x in (key, value)]
    held = numbers(keys, 2), numbers(values, 3)
    expected, *after = layer._attend_to_cache(config, platform, query, *new, allowed, *map(jnp.asarray, held), at)
    np.testing.assert_allclose(attended, expected, atol=2e-6)
    for ours, theirs, axis in zip(written, after, (2, 3)):
        np.testing.assert_allclose(numbers(ours, axis), theirs, atol=1e-6)


def test_an_empty_cache_of_8_bits_is_made_without_rounding_a_whole_one(model):
    """XLA computes constants while it compiles: minutes for the largest numbers of a cache of zeros."""
    sizes = {"config": model.config, "dtype": jnp.bfloat16, "rows": 3, "slots": 32, "new": 4}
    key = jax.random.key(0)
    lowered = device.empty_slots.lower(key, int8_cache=True, **sizes).as_text()
    assert "i8>" in lowered and "bf16>" not in lowered and "reduce" not in lowered
    cache, _ = device.empty_slots(key, int8_cache=True, **sizes)
    expected = device.empty_slots(key, **sizes)[0].to_int8()
    for one, same in zip(jax.tree.leaves(cache), jax.tree.leaves(expected), strict=True):
        assert one.dtype == same.dtype and np.array_equal(one, same)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_cache_of_8_bits_follows_rows_that_join_grow_and_shrink(model, temperature):
    """What a row draws does not depend on the others, and is close to what the model itself would say of it."""
    options = dict(max_new_tokens=40, key=jax.random.key(0), stop_ids=STOPS, temperature=temperature)
    prompts = [np.array(prompt, np.int32) for prompt in MANY]
    found = SamplingEngine(8, KV_CACHE).generate(model, prompts, **options)
    assert ids(found) == ids(SamplingEngine(64, KV_CACHE).generate(model, prompts, **options))
    of_weights = SamplingEngine(8, "int8").generate(model, prompts, **options)
    assert any(np.any(a.logprobs[:1] != b.logprobs[:1]) for a, b in zip(found, of_weights))  # prompts are rounded, too
    assert 0 < logprob_difference(model, prompts, found) < 0.05


def test_keys_of_prompts_stand_for_the_key_that_their_indices_are_folded_into(model):
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(3), np.arange(len(PROMPTS)))
    options = dict(max_new_tokens=NEW, temperature=0.7, top_k=20, top_p=0.9)
    prompts = [np.array(prompt, np.int32) for prompt in PROMPTS]
    told = SamplingEngine(8, sampling_logprobs=True).generate(model, prompts[1:], key=keys[1:], **options)
    plain = SamplingEngine(4).generate(model, prompts, key=jax.random.key(3), **options)[1:]
    assert ids(told) == ids(plain) and plain[0].sampling_logprobs is None
    for prompt, one, same in zip(PROMPTS[1:], told, plain, strict=True):
        np.testing.assert_allclose(one.logprobs, same.logprobs, atol=2e-5)
        logp = jax.nn.log_softmax(read_again(model, prompt, one.ids) / 0.7)
        np.testing.assert_allclose(one.sampling_logprobs, logp[np.arange(len(one.ids)), one.ids], atol=2e-5)


@pytest.mark.parametrize(
    "free, each, rows",
    [(None, 1, 32), (0, 1, 32), (-5, 1, 32), (255, 2, 32), (256, 2, 64), (4 * 128, 2, 128), (10**9, 1, 128)],
)
def test_rows_written_at_once_follow_the_free_memory(free, each, rows):
    assert sampler.default_rows(4, free, each) == 4 * rows


def test_rows_may_be_decoded_several_tokens_at_a_time(model, alone, monkeypatch):
    """As on GPUs, where to look whether any row goes on takes a synchronization."""
    monkeypatch.setattr(device, "tokens_per_check", lambda platform: device.TOKENS_PER_CHECK)
    device.decode_until.clear_cache()
    for options in ({"rows": 8}, {"rows": 64}):
        assert ids(generate(model, MANY, new=40, stop_ids=STOPS, **options)) == alone[1]
    drawn = generate(model, [[3] * 20] * 8, rows=8, new=300)  # slots grow
    device.decode_until.clear_cache()
    monkeypatch.undo()
    assert ids(generate(model, [[3] * 20] * 8, rows=8, new=300)) == ids(drawn)


def test_slots_grow_as_they_are_needed_where_the_cache_is_large(model, events):
    drawn = generate(model, [[3] * 20] * 8, rows=8, new=300)
    assert [len(completion.ids) for completion in drawn] == [300] * 8
    assert [slots for name, _, slots in events if name == "decode_until"] == [64, 128, 256, 320]


def test_slots_shrink_when_a_long_row_has_left(model, events):
    generate(model, [[3] * 500] + [[4, 5]] * 20, rows=4, new=8)
    slots = [slots for name, _, slots in events if name == "decode_until"]
    assert slots[0] == 512 and slots[-1] == 32


@pytest.mark.parametrize("length", [66, 130])
def test_a_prompt_just_beyond_a_bucket_fits_into_its_slots(model, length):
    prompt = (
        np.random.default_rng(0).integers(3, 50, length).tolist()
    )  # 65 tokens are padded to 96, 65 + 4 fit in 80 slots
    (drawn,) = generate(model, [prompt], rows=8, new=4, temperature=0)
    tokens = np.array([prompt + drawn.ids.tolist()])
    logits = model.logits(model(tokens, np.ones(tokens.shape, bool)))[0, length - 1 : -1]
    np.testing.assert_array_equal(np.asarray(logits).argmax(axis=1), drawn.ids)


@pytest.mark.parametrize("weights", [0, 10**12])
def test_prompts_of_every_length_fit_into_the_slots_of_their_cache(model, weights):
    for length in range(1, 3000):
        for new in (1, 2, 5, 30, 300):
            slots, _ = most_slots(model.config, weights, 8, length + new)
            assert length <= prompt_width(length, slots) <= slots and length + new <= slots


def test_settings_compile_nothing_anew(model):
    programs = (device.decode_until, device.prefill_into_slots, device.empty_slots)
    for options in ({}, {"temperature": 0}, {"top_k": 3}, {"top_p": 0.7}):  # off and on are different programs
        generate(model, **options)
    compiled = [program._cache_size() for program in programs]
    for options in (
        {"temperature": 0, "top_p": 0.3},
        {"top_k": 7, "key": 3},
        {"top_p": 0.5},
        {"stop_ids": [1, 2, 3]},
        {"temperature": 0.3},
        {"prompts": [[token] * 20 for token in range(4)]},
    ):
        generate(model, **options)
    generate(nnx.split(model))
    graph, params = split(model)
    generate((graph, jax.device_put(params, jax.devices()[0])))  # committed to the device, as those out of a step are
    assert [program._cache_size() for program in programs] == compiled


def test_the_programs_are_no_more_than_pairs_of_rows_and_slots(model):
    device.decode_until.clear_cache()
    for count in (1, 3, 4, 9, 36):
        generate(model, MANY[:count], rows=16, new=40, stop_ids=STOPS)
    rows, slots = (1, 4, 16), (64, 128)
    assert device.decode_until._cache_size() <= len(rows) * len(slots)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperature": -1}, "temperature must be 0"),
        ({"temperature": float("nan")}, "temperature must be 0"),
        ({"top_k": -1}, "top_k must be 0"),
        ({"top_p": 0.0}, "top_p must lie in"),
        ({"top_p": 1.5}, "top_p must lie in"),
        ({"new": 0}, "max_new_tokens must be at least 1"),
        ({"rows": 0}, "rows must be at least 1"),
        ({"prompts": [[1], [2, 50]]}, "prompt 1 holds token 50, but the model has tokens 0 to 49"),
    ],
)
def test_a_setting_out_of_range_is_refused(model, options, words):
    with pytest.raises(ValueError, match=words):
        generate(model, **options)


def chat(tokenizer, prompts):
    texts = (
        tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True)
        for prompt in prompts
    )
    return [tokenizer(text, add_special_tokens=False).input_ids for text in texts]


def greedy(folder, prompts, new, stop):
    return ids(generate(load_model(folder), prompts, new=new, temperature=0, stop_ids=[stop]))


@pytest.mark.assets
@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ("smollm2-135m-instruct", pytest.param("smollm2-135m-gpt2tok", marks=pytest.mark.long))
)
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


@pytest.mark.parametrize("options", [{"temperature": 0}, {}, {"top_k": 5}, {"top_p": 0.5}])
@pytest.mark.parametrize("broken", [float("nan"), float("inf"), 1e38])
def test_logits_that_are_no_numbers_give_an_error_and_no_tokens(model, options, broken):
    graph, params = split(model)
    params = {**params, "head": params["head"] * broken}
    with pytest.raises(NonFiniteLogits, match="logits for completion 0 are not finite"):
        generate((graph, params), [[3, 14]], **options)


def test_the_completion_whose_logits_are_no_numbers_is_named_however_late_they_come(model):
    graph, params = split(model)
    second = ids(generate(model, temperature=0))[1][2]  # read when the fourth token is drawn
    broken = {**params, "embedding": params["embedding"].at[second].set(np.nan)}
    alone = [PROMPTS[0], PROMPTS[1]] if second not in ids(generate(model, temperature=0))[0] else [PROMPTS[1]] * 2
    with pytest.raises(NonFiniteLogits, match="logits for completion [01] are not finite"):
        generate((graph, broken), alone, temperature=0)
    assert ids(generate((graph, broken), alone, temperature=0, new=3)) == ids(
        generate(model, alone, temperature=0, new=3)
    )


@pytest.mark.parametrize("int8", [False, True])
def test_of_an_earlier_row_nothing_is_left_in_its_slots_and_other_rows_stay(int8):
    def filled(rows, slots, value):
        keys, values = jnp.full((rows, 2, 4, slots), value), jnp.full((rows, 2, slots, 4), value)
        cache = Cache((keys,), (values,), jnp.full(rows, slots, jnp.int32))
        return cache.to_int8() if int8 else cache

    old, new = filled(3, 6, 5.0), filled(2, 4, 2.0)
    spoiled = jax.tree.map(lambda x: x if x.dtype == jnp.int8 else jnp.full_like(x, jnp.nan), old.values)
    found = device._scatter_rows(old._replace(values=spoiled), jnp.array([2, 3]), new)  # there is no row 3
    assert found.length.tolist() == [6, 6, 4]
    for was, came, now in zip(*(jax.tree.leaves(cache.values) for cache in (old._replace(values=spoiled), new, found))):
        np.testing.assert_array_equal(now[:2], was[:2])
        np.testing.assert_array_equal(now[2, :, :4], came[0])
        np.testing.assert_array_equal(now[2, :, 4:], 0 * was[2, :, 4:].astype(jnp.int8))
