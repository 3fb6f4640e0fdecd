import email.utils
import json
import re
import socket
import time

import jax
import numpy as np
import pytest
import tiny_models as tiny
from flax import nnx

from gold_jax import GOLDConfig, GOLDTrainer
from gold_jax.config import RunFacts, named_without_effect
from gold_jax.models.functional import split
from gold_jax.models.hf_checkpoint import load_model
from gold_jax.rollout.agreement import FixedText, fraction_followed
from gold_jax.rollout.client import ATTEMPTS, Client, ServerError
from gold_jax.rollout.engine import NonFiniteLogits
from gold_jax.rollout.sampler import SamplingEngine
from gold_jax.rollout.server import ServerEngine
from rollout.fake_server import serving

KINDS = ("vllm", "sglang")
ROUTE = {"vllm": "/v1/completions", "sglang": "/generate"}
RELOAD = {"vllm": "/collective_rpc", "sglang": "/update_weights_from_disk"}
PROMPTS = [np.array(ids, np.int32) for ids in ([3, 14, 15, 92], [65], [35, 8, 97, 93, 23, 84, 62])]
NEW = 6


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return tiny.write_student(tmp_path_factory.mktemp("models") / "student")


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """The same architecture with other weights."""
    return tiny.write_student(tmp_path_factory.mktemp("models") / "other", seed=5)


@pytest.fixture(params=KINDS)
def server(request, student):
    with serving(student, request.param) as fake:
        yield fake


def engine(fake, folder, **options):
    options = {"kind": fake.kind, "timeout": 20.0, "pause": 0.001, "dtype": "float32"} | options
    return ServerEngine(fake.url, folder, **options)


def written(fake, folder, prompts=PROMPTS, seed=0, new=NEW, temperature=0.0, stop_ids=(), **options):
    asked = dict(max_new_tokens=new, key=jax.random.key(seed), temperature=temperature, stop_ids=stop_ids)
    return engine(fake, folder, **options).generate(None, prompts, **asked)


def built_in(model, prompts=PROMPTS, new=NEW, stop_ids=()):
    """What the built-in engine writes greedily."""
    asked = dict(max_new_tokens=new, key=jax.random.key(0), temperature=0.0, stop_ids=stop_ids)
    return SamplingEngine(4).generate(model, prompts, **asked)


def ids(completions):
    return [c.ids.tolist() for c in completions]


def test_greedy_completions_are_those_of_the_built_in_sampler(server, student, tmp_path):
    drawn = written(server, tmp_path)
    for one, own in zip(drawn, built_in(load_model(student)), strict=True):
        assert one.ids.dtype == np.int32 and one.ids.tolist() == own.ids.tolist()
        np.testing.assert_allclose(one.logprobs, own.logprobs, atol=1e-4)


def test_a_row_ends_with_the_stop_token_in_it(server, student, tmp_path):
    model = load_model(student)
    stop = int(built_in(model)[1].ids[2])
    drawn = written(server, tmp_path, stop_ids=[stop, 7])
    assert ids(drawn) == ids(built_in(model, stop_ids=[stop, 7]))
    assert drawn[1].ids[-1] == stop and len(drawn[1].ids) <= 3


def test_a_stop_token_that_the_server_only_names_is_put_back(student, tmp_path):
    with serving(student) as fake:
        stop = int(built_in(load_model(student))[1].ids[2])
        whole = written(fake, tmp_path, stop_ids=[stop])

        def without(answer):
            (choice,) = answer["choices"]
            if choice["finish_reason"] == "stop":
                choice["token_ids"] = choice["token_ids"][:-1]
                choice["logprobs"]["token_logprobs"] = choice["logprobs"]["token_logprobs"][:-1]
            return answer

        fake.mangle = without
        again = written(fake, tmp_path, stop_ids=[stop])
    assert ids(again) == ids(whole) and np.isnan(again[1].logprobs[-1])


def test_an_empty_prompt_gets_an_empty_completion_without_a_question(server, tmp_path):
    empty, full = written(server, tmp_path, prompts=[np.zeros(0, np.int32), PROMPTS[0]])
    assert len(empty.ids) == len(empty.logprobs) == 0 and len(full.ids) == NEW
    assert len(server.asked) == 1


def test_no_prompts_are_no_completions(server, tmp_path):
    assert written(server, tmp_path, prompts=[]) == []


def test_many_prompts_are_asked_for_at_once_but_not_too_many_and_come_back_in_order(server, student, tmp_path):
    prompts = [PROMPTS[i % 3] for i in range(12)]
    server.faults[ROUTE[server.kind]] = [0.1] * 12
    drawn = written(server, tmp_path, prompts=prompts, concurrency=4)
    expected = ids(built_in(load_model(student)))
    assert ids(drawn) == [expected[i % 3] for i in range(12)]
    assert 1 < server.most_at_once <= 4


def test_seeds_come_from_the_key_and_the_index_alone(server, tmp_path):
    same = [PROMPTS[0]] * 4
    drawn = written(server, tmp_path, prompts=same, temperature=5.0)
    assert len({tuple(x) for x in ids(drawn)}) == 4
    assert ids(written(server, tmp_path, prompts=same[:2], temperature=5.0)) == ids(drawn)[:2]
    assert ids(written(server, tmp_path, prompts=same, temperature=5.0, seed=1)) != ids(drawn)


def test_nothing_but_what_was_asked_for_shapes_the_draw(server, tmp_path):
    asked = dict(max_new_tokens=2, key=jax.random.key(0), temperature=0.7, top_p=0.9, top_k=11, stop_ids=[7])
    engine(server, tmp_path).generate(None, PROMPTS[:1], **asked)
    (body,) = server.bodies(ROUTE[server.kind])
    settings = body if server.kind == "vllm" else body["sampling_params"]
    wanted = {"temperature": 0.7, "top_p": 0.9, "top_k": 11, "stop_token_ids": [7], "ignore_eos": True}
    wanted |= {"min_p": 0, "repetition_penalty": 1, "presence_penalty": 0, "frequency_penalty": 0}
    assert wanted.items() <= settings.items()


def test_logprobs_are_told_only_where_they_are_the_models_own(server, tmp_path):
    for temperature in (0.0, 1.0, 0.7):
        (one,) = written(server, tmp_path, prompts=PROMPTS[:1], temperature=temperature)
        # SGLang divides by the temperature before it takes the logarithm.
        assert np.isnan(one.logprobs).all() == (server.kind == "sglang" and temperature == 0.7)


def test_a_key_for_the_server_is_sent_along(server, tmp_path):
    written(server, tmp_path, prompts=PROMPTS[:1])
    assert server.key is None
    written(server, tmp_path, prompts=PROMPTS[:1], api_key="secret")
    assert server.key == "Bearer secret"


# weights


def test_pushed_weights_are_those_that_the_server_answers_with(server, student, other, tmp_path):
    at = engine(server, tmp_path / "weights")
    new = load_model(other)
    asked = dict(max_new_tokens=NEW, key=jax.random.key(0), temperature=0.0)
    before = ids(at.generate(None, PROMPTS, **asked))
    assert at.sync(nnx.split(new), 0)
    after = ids(at.generate(None, PROMPTS, **asked))
    assert after == ids(built_in(new)) != before
    assert at.sync(load_model(student), 1)
    assert ids(at.generate(None, PROMPTS, **asked)) == before


def test_weights_are_pushed_when_the_servers_are_so_many_updates_old(server, student, tmp_path):
    at = engine(server, tmp_path, sync_every=3)
    model = load_model(student)
    assert [step for step in (0, 1, 2, 4, 5, 6, 7, 20, 21) if at.sync(model, step)] == [0, 4, 7, 20]
    assert server.paths().count(RELOAD[server.kind]) == 4

    held = engine(server, tmp_path, sync_every=2, sync_first=False)
    assert [step for step in range(5) if held.sync(model, step)] == [2, 4]


def test_updates_that_are_counted_anew_are_pushed_again(server, student, tmp_path):
    at = engine(server, tmp_path, sync_every=3)
    model = load_model(student)
    assert at.sync(model, 4) and at.sync(model, 1)  # a smaller number can only be another run's
    assert not at.sync(model, 1)
    at.restart()
    assert at.sync(model, 1)


def test_a_push_leaves_one_whole_folder_under_a_name_of_its_own(server, student, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    at = engine(server, "weights")
    model = load_model(student)
    at.sync(model, 0)
    (first,) = (tmp_path / "weights").iterdir()
    at.sync(model, 1)
    (second,) = (tmp_path / "weights").iterdir()
    assert first.name != second.name and {"config.json", "model.safetensors"} <= {p.name for p in second.iterdir()}
    (body, *_) = server.bodies(RELOAD[server.kind])
    assert json.dumps(str(first)) in json.dumps(body)  # absolute: the server stands elsewhere


def test_what_a_killed_run_left_in_a_folder_of_its_own_is_removed(server, student, tmp_path):
    for name in "update-2-killed", ".update-3-killed", "update.txt":
        (tmp_path / name).mkdir()
    model = load_model(student)
    engine(server, tmp_path).sync(model, 4)
    assert (tmp_path / "update-2-killed").is_dir()
    at = engine(server, tmp_path, owns_dir=True)
    at.sync(model, 5)
    at.sync(model, 6)
    assert sorted(tmp_path.iterdir()) == [at.folder, tmp_path / "update.txt"]


def test_a_push_that_cannot_be_written_leaves_nothing_behind_and_is_not_announced(
    server, student, tmp_path, monkeypatch
):
    def full(model, folder, dtype):
        folder.mkdir(parents=True)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("gold_jax.rollout.server.save_model", full)
    with pytest.raises(OSError, match="No space left"):
        engine(server, tmp_path / "weights").sync(load_model(student), 0)
    assert list((tmp_path / "weights").iterdir()) == [] and server.asked == []


def test_vllm_without_its_development_routes_is_told_how_to_start(student, tmp_path):
    with serving(student) as fake:
        fake.faults["/collective_rpc"] = [(404, {"detail": "Not Found"})]
        with pytest.raises(ServerError, match=r"404 .*Not Found.* VLLM_SERVER_DEV_MODE=1"):
            engine(fake, tmp_path).sync(load_model(student), 0)


def test_vllm_that_cannot_forget_the_old_weights_is_an_error(student, tmp_path):
    with serving(student) as fake:
        fake.busy = True
        with pytest.raises(ServerError, match="cannot forget what the old weights computed"):
            engine(fake, tmp_path).sync(load_model(student), 0)


def test_sglang_that_refuses_a_folder_is_quoted(student, tmp_path):
    said = {"success": False, "message": "Failed to get weights iterator"}
    with serving(student, "sglang") as fake:
        for status in (400, 200):
            fake.faults["/update_weights_from_disk"] = [(status, said)]
            with pytest.raises(ServerError, match=r"Failed to get weights iterator"):
                engine(fake, tmp_path).sync(load_model(student), 0)


def test_weights_that_were_not_loaded_are_pushed_again(server, student, tmp_path):
    at = engine(server, tmp_path)
    server.faults[RELOAD[server.kind]] = [(400, {"message": "no"})]
    with pytest.raises(ServerError):
        at.sync(load_model(student), 0)
    assert at.sync(load_model(student), 0)


# whether its weights are the student's


def moved(model, step, scale=1e-3):
    """A model after something like an update."""
    graph, params = split(model)
    return graph, jax.tree.map(lambda x: x + scale * jax.random.normal(jax.random.key(step), x.shape), params)


def push_and_write(at, model, step, temperature=0.7):
    at.sync(model, step)
    return at.generate(model, PROMPTS, max_new_tokens=NEW, key=jax.random.key(step), temperature=temperature)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_server_that_follows_differs_by_rounding_alone(server, student, tmp_path, temperature):
    said = []
    at, model = engine(server, tmp_path, sync_every=2, notify=said.append), load_model(student)
    differences = []
    for step in range(6):
        push_and_write(at, model, step, temperature)
        differences.append(at.difference)
        model = moved(model, step, (1e-7, 1e-3, 1e-2, 0.1, 1e-3, 1e-3)[step])
    assert differences[1::2] == [None] * 3 and max(differences[::2]) < 1e-5 and said == []


def test_a_text_is_scored_within_the_servers_window(server, student, tmp_path):
    at = engine(server, tmp_path)
    push_and_write(at, load_model(student), 0)
    asked = [body.get("prompt", body.get("input_ids")) for body in server.bodies(ROUTE[server.kind])]
    assert sorted(map(len, asked[3:])) == sorted(len(prompt) + NEW - 1 for prompt in PROMPTS)


def test_weights_that_a_server_says_to_have_loaded_and_has_not_are_found(server, student, tmp_path):
    at, model = engine(server, tmp_path), load_model(student)
    push_and_write(at, model, 0)
    server.deaf = True
    small = moved(model, 1, 1e-7)
    push_and_write(at, small, 1)  # rounds to the same weights in bfloat16
    with pytest.raises(
        ServerError, match=r"loaded the student's weights of update \d, and still serves others: .* 0% of"
    ):
        for step in range(2, 9):  # small steps add up
            small = moved(small, 2, 5e-4)
            push_and_write(at, small, step)
    assert step < 8


def test_another_model_of_the_same_size_is_found_before_anything_is_learned(server, other, tmp_path):
    server.deaf = True
    mine = load_model(other)
    with pytest.raises(
        ServerError, match=r"1[58] tokens that it drew differ from the student's own by [1-9]\.\d+ nats"
    ):
        push_and_write(engine(server, tmp_path), mine, 0)
    with pytest.raises(ServerError, match="is not sampling from the student's weights"):  # said to have them
        push_and_write(engine(server, tmp_path, sync_first=False), mine, 0)


def test_a_server_that_tells_no_logprobs_is_named_once(server, student, tmp_path):
    def silent(answer):
        if server.kind == "vllm":
            (choice,) = answer.get("choices", [{}])
            choice |= {"logprobs": None, "prompt_logprobs": None}
        elif "meta_info" in answer:
            answer["meta_info"]["input_token_logprobs"] = None
        return answer

    server.mangle, said = silent, []
    at, model = engine(server, tmp_path, notify=said.append), load_model(student)
    for step in range(3):
        push_and_write(at, model, step)
        assert at.difference is None
    (line,) = said
    assert line.startswith(f"{server.url} returns no log-probabilities of a prompt")


def test_a_server_that_refuses_to_score_a_text_is_named_once(student, tmp_path):
    with serving(student) as fake:
        said = []
        at, model = engine(fake, tmp_path, notify=said.append), load_model(student)
        fake.faults["/v1/completions"] = [0.0, 0.0, 0.0, (400, {"message": "prompt_logprobs are not served"})]
        for step in range(2):
            push_and_write(at, model, step)
            assert at.difference < 1e-5
        assert len(said) == 1


def test_a_student_that_is_no_number_is_not_the_servers_fault(server, student, tmp_path):
    at, model = engine(server, tmp_path), load_model(student)
    push_and_write(at, model, 0)
    graph, params = split(model)
    with pytest.raises(NonFiniteLogits):
        at.sync((graph, jax.tree.map(lambda x: x * np.nan, params)), 1)


def test_noise_of_either_side_is_no_move():
    rng = np.random.default_rng(0)

    def noise(scale):
        return scale * rng.normal(size=400)

    own = -rng.exponential(2.0, 400)
    text = FixedText([], own, own + noise(0.05))
    assert fraction_followed(text, own + noise(0.07), text.served) is None  # its weights are rounded anew
    way = noise(0.15)
    assert fraction_followed(text, own + way, own + way + noise(0.05)) == pytest.approx(1, abs=0.15)
    assert fraction_followed(text, own + way + noise(0.07), text.served + way) == pytest.approx(1, abs=0.3)
    assert fraction_followed(text, own + way, own + noise(0.05)) == pytest.approx(0, abs=0.15)
    few = FixedText([], text.own[:9], text.served[:9])
    assert fraction_followed(few, (own + way)[:9], text.served[:9]) is None


# what a server may not do


def changed(kind, **changes):
    """Changes a true answer in the fields that the two servers name differently; `ids` also sets the log-probabilities."""

    def change(answer):
        if kind == "vllm":
            (choice,) = answer["choices"]
            choice["finish_reason"] = changes.get("finish", choice["finish_reason"])
            choice["stop_reason"] = changes.get("matched", choice["stop_reason"])
            if "ids" in changes:
                choice |= {"token_ids": changes["ids"], "logprobs": {"token_logprobs": [-1.0] * len(changes["ids"])}}
        else:
            about = answer["meta_info"]
            about["finish_reason"]["type"] = changes.get("finish", about["finish_reason"]["type"])
            about["finish_reason"]["matched"] = changes.get("matched")
            if "ids" in changes:
                about["output_token_logprobs"] = [[-1.0, i, None] for i in changes["ids"]]
        return answer

    return change


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"ids": [1, 2.5, 3]}, "a token id is 2.5"),
        ({"ids": [1, "2"]}, "a token id is '2'"),
        ({"ids": [True]}, "a token id is True"),
        ({"ids": [-1]}, "a token id is -1"),
        ({"ids": [1, 4000]}, "a token id is 4000, but the student has 300 tokens"),
        ({"ids": [1] * 7}, "7 tokens, but at most 6"),
        ({"ids": [1, 2, 3]}, "cut at 3 of 6 tokens.*--max-model-len"),
        ({"ids": []}, "cut at 0 of 6 tokens"),
        ({"ids": [1, 99, 3, 4, 5, 6]}, "continues after a stop token"),
        ({"finish": "abort"}, "ended by 'abort'"),
        ({"ids": [1, 2], "finish": "stop", "matched": "###"}, "stopped by '###', but only \\[99\\]"),
        ({"ids": [1, 2], "finish": "stop", "matched": None}, "stopped by None"),
    ],
)
def test_a_completion_that_cannot_be_the_students_is_an_error(server, tmp_path, changes, said):
    server.mangle = changed(server.kind, **changes)
    with pytest.raises(ServerError, match=f"{server.url}{ROUTE[server.kind]}, completion 0: .*{said}"):
        written(server, tmp_path, prompts=PROMPTS[:1], stop_ids=[99], vocab_size=300)


def test_a_server_that_returns_no_ids_is_told_what_gives_them(server, tmp_path):
    def textual(answer):
        if server.kind == "vllm":
            answer["choices"][0].pop("token_ids")
        else:
            answer["meta_info"].pop("output_token_logprobs")
        return answer

    server.mangle = textual
    said = {"vllm": "no token_ids.*0.10.2.*--rollout_server sglang", "sglang": "no meta_info.output_token_logprobs"}
    with pytest.raises(ServerError, match=said[server.kind]):
        written(server, tmp_path)


def test_a_server_that_reads_another_prompt_is_an_error(student, tmp_path):
    with serving(student) as fake:

        def begun(answer):
            answer["choices"][0]["prompt_token_ids"].insert(0, 1)
            return answer

        fake.mangle = begun
        with pytest.raises(ServerError, match=r"read another prompt \(5 tokens\) than the one it was given \(4\)"):
            written(fake, tmp_path)


@pytest.mark.parametrize("answer", [{}, [], None, {"choices": []}, {"choices": [3], "meta_info": 3}, {"meta_info": {}}])
def test_json_of_another_form_is_an_error_that_shows_it(server, tmp_path, answer):
    server.mangle = lambda _: answer
    with pytest.raises(ServerError, match=f"{ROUTE[server.kind]}, completion"):
        written(server, tmp_path, prompts=PROMPTS[:1])


def test_logprobs_that_do_not_fit_the_ids_are_an_error(student, tmp_path):
    with serving(student) as fake:

        def short(answer):
            answer["choices"][0]["logprobs"]["token_logprobs"].pop()
            return answer

        fake.mangle = short
        with pytest.raises(ServerError, match="6 token ids but 5 log-probabilities"):
            written(fake, tmp_path)


@pytest.mark.parametrize("wrong", [0.5, float("nan"), "-1.0", True, -9999.0, -float("inf"), [-1.0]])
def test_logprobs_that_no_drawn_token_can_have_are_an_error(server, tmp_path, wrong):
    def false(answer):
        if server.kind == "vllm":
            answer["choices"][0]["logprobs"]["token_logprobs"][1] = wrong
        else:
            answer["meta_info"]["output_token_logprobs"][1][0] = wrong
        return answer

    server.mangle = false
    with pytest.raises(ServerError, match=f"completion 0: a log-probability is {re.escape(repr(wrong))}"):
        written(server, tmp_path, prompts=PROMPTS[:1])


@pytest.mark.parametrize("content", [{"error": {"message": "dead"}}, {"object": "error", "message": "dead"}])
def test_success_with_an_error_in_it_is_an_error(server, student, tmp_path, content):
    reset = ["/reset_prefix_cache"] if server.kind == "vllm" else []
    at, model = engine(server, tmp_path), load_model(student)
    asked = dict(max_new_tokens=NEW, key=jax.random.key(0))
    for path in ["/v1/models", RELOAD[server.kind], *reset, ROUTE[server.kind]]:
        server.faults[path] = [(200, content)]
        with pytest.raises(ServerError, match=f"{path} answers 200, but with an error: dead"):
            at.check(1)
            at.sync(model, 0)
            at.generate(model, PROMPTS, **asked)


def test_an_unknown_kind_and_an_address_that_is_none_are_errors(tmp_path):
    with pytest.raises(ValueError, match="'tgi'; it must be one of vllm, sglang"):
        ServerEngine("http://localhost:1", tmp_path, kind="tgi")
    for address in ("localhost:8000", "file:///etc/passwd", "http://"):
        with pytest.raises(ValueError, match="it must be one such as http://localhost:8000"):
            ServerEngine(address, tmp_path)


def test_a_server_is_checked_before_it_is_used(server, tmp_path):
    at = engine(server, tmp_path)
    at.check(server.window)
    with pytest.raises(ServerError, match=f"reads at most {server.window} tokens, but .* may have {server.window + 1}"):
        at.check(server.window + 1)
    for window in "4096", [1], float("nan"), 0:
        server.mangle = lambda _, window=window: {"data": [{"id": "student", "max_model_len": window}]}
        with pytest.raises(ServerError, match="says that it reads .* tokens, which is no number of them"):
            at.check(1)
    server.mangle = lambda _: {"models": ["llama"]}
    with pytest.raises(ServerError, match=f"{server.url}/v1/models lists no model"):
        at.check(1)


# the line to the server


@pytest.fixture
def asked(student):
    with serving(student) as fake:
        yield fake, Client(fake.url + "/", timeout=20.0, pause=0.001, started="Start it.")


def test_a_fault_of_the_servers_own_is_asked_again_but_not_for_ever(asked):
    fake, client = asked
    fake.faults["/v1/models"] = [(503, {"message": "busy"}), "drop", (500, b"")]
    assert client.get("/v1/models")["data"]
    fake.faults["/v1/models"] = [(503, {"message": "engine is dead"})] * 100
    fake.asked.clear()
    with pytest.raises(ServerError, match=rf"/v1/models answers 503 .*: engine is dead \(asked {ATTEMPTS} times\)"):
        client.get("/v1/models")
    assert len(fake.asked) == ATTEMPTS


@pytest.mark.parametrize(
    "content, said",
    [
        ({"error": {"message": "too long", "type": "x"}}, "too long"),
        ({"object": "error", "message": "too long"}, "too long"),
        ({"detail": "too long"}, "too long"),
        ({"detail": [{"loc": ["body"], "msg": "too long"}]}, "too long"),
        (b"<html>too long</html>", "<html>too long</html>"),
        (b"", "nothing"),
    ],
)
def test_what_is_wrong_with_the_question_is_said_once_in_the_servers_words(asked, content, said):
    fake, client = asked
    fake.faults["/v1/models"] = [(400, content)]
    with pytest.raises(ServerError, match=f"{fake.url}/v1/models answers 400 Bad Request: .*{said}"):
        client.get("/v1/models")
    assert len(fake.asked) == 1


def test_an_answer_that_is_not_json_is_shown(asked):
    fake, client = asked
    fake.faults["/v1/models"] = [(200, b"Welcome to nginx! " * 100)]
    with pytest.raises(ServerError, match="not JSON: Welcome to nginx! .*…$"):
        client.get("/v1/models")
    fake.faults["/v1/models"] = [(200, b"")]
    assert client.get("/v1/models") is None


def test_silence_is_an_error_that_names_the_flag(asked):
    fake, _ = asked
    fake.faults["/v1/models"] = [1.0]
    with pytest.raises(ServerError, match="not answered within 0.1 seconds.*--vllm_server_timeout"):
        Client(fake.url, timeout=0.1).get("/v1/models")


@pytest.mark.parametrize("what", ["slow head", "slow body"])
def test_a_server_that_goes_on_byte_by_byte_ends_with_the_time_for_the_whole(asked, what):
    fake, _ = asked
    fake.faults["/v1/models"] = [what]
    start = time.monotonic()
    with pytest.raises(ServerError, match="not answered within 0.3 seconds"):
        Client(fake.url, timeout=0.3).get("/v1/models")
    assert time.monotonic() - start < 2


def test_an_answer_without_end_is_not_read_to_its_end(asked, monkeypatch):
    fake, client = asked
    monkeypatch.setattr("gold_jax.rollout.client._LONGEST_REPLY", 1 << 20)
    fake.faults["/v1/models"] = [(200, b" " * (3 << 20))]
    with pytest.raises(ServerError, match="/v1/models answers with more than 1 MiB"):
        client.get("/v1/models")


def test_a_server_that_sends_on_is_not_followed_and_no_key_goes_there(asked, student):
    fake, _ = asked
    with serving(student) as elsewhere:
        fake.faults["/v1/models"] = [(307, b"", {"Location": f"{elsewhere.url}/v1/models"})]
        with pytest.raises(
            ServerError,
            match=f"answers 307 Temporary Redirect and sends on to {elsewhere.url}/v1/models, .*not followed",
        ):
            Client(fake.url, timeout=20.0, api_key="secret").get("/v1/models")
        assert len(fake.asked) == 1 and elsewhere.asked == []


def test_a_server_that_asks_for_patience_gets_it_within_the_time(asked):
    fake, client = asked
    soon = email.utils.formatdate(time.time() + 1, usegmt=True)
    busy = [(429, {"message": "slow down"})] * 6 + [(503, b"", {"Retry-After": 0})] * 6
    fake.faults["/v1/models"] = [*busy, (429, b"", {"Retry-After": 0.1}), (503, b"", {"Retry-After": soon})]
    start = time.monotonic()
    assert client.get("/v1/models")["data"] and time.monotonic() - start > 0.1
    fake.faults["/v1/models"] = [(503, b"", {"Retry-After": "Fri, 31 Dec 99999999 23:59:59 GMT"})]
    assert client.get("/v1/models")["data"]  # asked again as after any 503
    fake.faults["/v1/models"] = [(429, {"message": "slow down"}, {"Retry-After": "100"})]
    with pytest.raises(ServerError, match="429 Too Many Requests: slow down .asked again for 20 seconds"):
        client.get("/v1/models")


def test_an_answer_of_another_form_than_any_is_an_error(asked):
    fake, client = asked
    for content in (b"[" * 100_000, b"\xff\xfe", b"{"):
        fake.faults["/v1/models"] = [(200, content)]
        with pytest.raises(ServerError, match="not JSON"):
            client.get("/v1/models")
    fake.faults["/v1/models"] = [(400, b"[" * 100_000)]
    with pytest.raises(ServerError, match=r"400 Bad Request: \[\["):
        client.get("/v1/models")


def test_a_server_that_is_not_there_is_waited_for_and_then_named():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, but nobody listens
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(
            ServerError, match=rf"{url}/x cannot be reached \(.*refused.*tried for 0.5 seconds.* Start it\."
        ):
            Client(url, timeout=0.5, pause=0.01, started="Start it.").get("/x")


def test_a_server_that_comes_up_late_is_found(student):
    with serving(student) as fake:
        fake.faults["/v1/models"] = ["drop"] * 12
        assert Client(fake.url, timeout=20.0, pause=0.0001).get("/v1/models")["data"]


def test_a_host_that_does_not_exist_is_not_waited_for(monkeypatch):
    def unknown(*_, **__):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(ServerError, match="no host of that name"):
        Client("http://nowhere.invalid:8000", timeout=1000.0, pause=100.0).get("/x")


# settings


def test_a_server_is_used_only_where_it_is_asked_for():
    assert GOLDConfig().server_url is None and GOLDConfig().notices == []
    colocated = GOLDConfig(use_vllm=True)
    assert colocated.server_url is None and "--vllm_mode server" in colocated.notices[0]
    server = {"use_vllm": True, "vllm_mode": "server"}
    assert GOLDConfig(**server).server_url == "http://0.0.0.0:8001"
    assert GOLDConfig(**server, vllm_server_host="h", vllm_server_port=7).server_url == "http://h:7"
    assert GOLDConfig(**server, vllm_server_base_url="http://h:8000/x").server_url == "http://h:8000/x"


def test_server_flags_without_a_server_are_noted():
    settings = GOLDConfig(vllm_server_port=8000, rollout_server="sglang")
    (notice,) = named_without_effect(settings, RunFacts(settings, settings.loss_spec(False), evaluates=False))
    assert notice.startswith("--vllm_server_port, --rollout_server: no effect without --use_vllm --vllm_mode server")


@pytest.mark.parametrize(
    "wrong",
    [
        {"vllm_mode": "client"},
        {"vllm_server_port": 0},
        {"vllm_server_port": 70000},
        {"vllm_server_timeout": 0},
        {"vllm_sync_frequency": 0},
        {"vllm_server_base_url": "localhost:8000"},
        {"rollout_server": "tgi"},
    ],
)
def test_server_settings_out_of_range_are_named(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=f"--{name} is"):
        GOLDConfig(use_vllm=True, **wrong)


# a run


def trainer(world, output, url, **settings):
    settings = {
        **dict(max_steps=2, max_completion_length=8, max_length=128, per_device_train_batch_size=2, save_strategy="no"),
        **dict(lmbda=1.0, temperature=1.0, top_p=1.0, learning_rate=0.01, logging_steps=1, vllm_server_timeout=20.0),
        **dict(use_vllm=True, vllm_mode="server", vllm_server_base_url=url),
        **settings,
    }
    return GOLDTrainer(
        str(world / "student"),
        str(world / "teacher"),
        GOLDConfig(output_dir=str(output), **settings),
        train_dataset=str(world / "data" / "train.jsonl"),
        eval_dataset=str(world / "data" / "test.jsonl") if settings.get("predict_with_generate") else None,
    )


@pytest.fixture
def vllm(student):
    with serving(student) as fake:
        yield fake


def test_a_run_draws_from_the_server_what_each_update_made_of_the_student(world, vllm, tmp_path, own_cache):
    out = tmp_path / "out"
    run = trainer(world, out, vllm.url, save_strategy="steps", save_steps=1)
    run.train()
    assert [row["on_policy"] for row in run.log_history] == [1, 1]
    assert all(np.isfinite(row["loss"]) for row in run.log_history)
    reload, draw = RELOAD["vllm"], ROUTE["vllm"]
    assert [p for p in vllm.drawn() if p in (reload, draw)] == [reload, draw, draw] * 2
    # The second window, which was the last to be drawn, is written by the student after one update.
    begun, once, served = load_model(world / "student"), load_model(out / "checkpoint-1"), vllm.serving
    assert jax.tree.all(jax.tree.map(np.array_equal, nnx.state(once), nnx.state(served)))
    assert not np.array_equal(begun.embedding[...], served.embedding[...])


def test_a_run_logs_how_far_the_server_is_from_the_student(world, vllm, tmp_path, own_cache):
    run = trainer(world, tmp_path / "out", vllm.url, vllm_sync_frequency=2, max_steps=3)
    run.train()
    found = [row.get("sampling_logp_difference") for row in run.log_history]
    assert found[1] is None and found[0] < 1e-4 and found[2] < 1e-4


def test_a_run_ends_where_the_server_stays_behind_and_loses_nothing(world, vllm, tmp_path, own_cache):
    run = trainer(world, tmp_path / "out", vllm.url, max_steps=4)
    vllm.deaf = True
    said = []
    run.loop.say = said.append
    with pytest.raises(ServerError, match="loaded the student's weights of update 1, and still serves others"):
        run.train()
    assert said[-1].startswith("An error ended the run after 1 update; the student and") and "checkpoint-1" in said[-1]
    vllm.deaf = False
    again = trainer(world, tmp_path / "out", vllm.url, max_steps=4).train(resume_from_checkpoint="latest")
    assert again.global_step == 4


def test_a_run_whose_server_fails_between_updates_loses_nothing(world, vllm, tmp_path, own_cache):
    run, said = trainer(world, tmp_path / "out", vllm.url, max_steps=4), []
    run.loop.say = said.append
    vllm.faults["/v1/completions"] = [0.0] * 5 + [(200, {"error": {"message": "the engine is dead"}})]
    with pytest.raises(ServerError, match="/v1/completions answers 200, but with an error: the engine is dead"):
        run.train()
    assert said[-1].startswith("An error ended the run after 1 update") and "checkpoint-1" in said[-1]
    assert (tmp_path / "out" / "checkpoint-1" / "model.safetensors").exists()


def test_a_run_does_not_begin_with_a_server_of_another_model(world, other, tmp_path, own_cache):
    with serving(other) as fake:
        fake.deaf = True
        with pytest.raises(ServerError, match="is not sampling from the student's weights"):
            trainer(world, tmp_path / "out", fake.url).train()
        assert not list((tmp_path / "out").glob("checkpoint-*"))


def test_a_run_pushes_where_and_as_rarely_as_it_is_told(world, vllm, tmp_path, own_cache):
    folder = tmp_path / "shared"
    settings = dict(vllm_sync_frequency=2, rollout_sync_first=False, rollout_weights_dir=str(folder))
    loop = trainer(world, tmp_path / "out", vllm.url, **settings).loop
    for step in range(4):
        loop.run.batches.build(step, loop.data.train[:2], loop.state.params)
    assert [p for p in vllm.drawn() if p != "/v1/models"] == [
        *["/v1/completions"] * 4,
        *["/collective_rpc", "/reset_prefix_cache"],
        *["/v1/completions"] * 4,
    ]
    (left,) = folder.iterdir()
    assert left.name.startswith("update-2-")


def test_weights_go_through_a_hidden_folder_of_the_run_where_none_is_named(world, server, tmp_path, own_cache):
    loop = trainer(world, tmp_path / "out", server.url, rollout_server=server.kind).loop
    loop.run.batches.build(0, loop.data.train[:2], loop.state.params)
    assert len(list((tmp_path / "out" / ".rollout_weights").iterdir())) == 1


def test_a_run_that_asks_nothing_of_the_student_asks_nothing_of_the_server(world, vllm, tmp_path, own_cache):
    run = trainer(world, tmp_path / "out", vllm.url, lmbda=0.0)
    assert run.loop.run.batches.engine is None
    assert vllm.asked == [] and any("--lmbda 0" in notice for notice in run.notices)


def test_the_teacher_and_evaluations_write_with_the_built_in_sampler(world, vllm, tmp_path, own_cache):
    settings = dict(lmbda=0.5, seq_kd=True, gradient_accumulation_steps=2, predict_with_generate=True)
    run = trainer(world, tmp_path / "out", vllm.url, **settings)
    mixed = next(s for s in range(20) if (np.random.default_rng((42, s, 1)).random(2) < 0.5).sum() == 1)
    window = run.loop.run.batches.build(mixed, run.train_examples[:4], run.loop.state.params)
    assert window.stats["on_policy"] == 0.5
    assert vllm.drawn().count("/v1/completions") == 2
    assert "eval_exact_match" in run.evaluate()
    assert vllm.drawn().count("/v1/completions") == 2


def test_a_server_that_is_missing_stops_a_run_before_it_starts(world, tmp_path, own_cache):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ServerError, match=f"{url}/v1/models cannot be reached.*VLLM_SERVER_DEV_MODE=1 vllm serve"):
            trainer(world, tmp_path / "out", url, vllm_server_timeout=0.5)


def test_a_server_that_reads_too_little_stops_a_run_before_it_starts(world, vllm, tmp_path, own_cache):
    vllm.window = 127
    with pytest.raises(ServerError, match="reads at most 127 tokens, but prompts and completions may have 128"):
        trainer(world, tmp_path / "out", vllm.url)
