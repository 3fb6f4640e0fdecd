"""The server, by HTTP: its answers, its errors, and that no answer depends on other requests."""

import contextlib
import dataclasses
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import jax
import numpy as np
import pytest
import uvicorn
from starlette.testclient import TestClient

import gold_jax
from gold_jax.loading import load_model_and_tokenizer
from gold_jax.models.decoder import Decoder
from gold_jax.models.functional import split
from gold_jax.serving.app import MOST_BYTES, create_app
from gold_jax.serving.batcher import Batcher, Request

PROMPTS = [[{"role": "user", "content": f"How do you say {number}?"}] for number in (5168, 12, 400, 7003, 88, 9)]


@pytest.fixture(scope="module")
def loaded():
    return load_model_and_tokenizer("embedded:student", special_tokens_in_prompts=True)


@pytest.fixture(scope="module")
def batcher(loaded):
    made = Batcher(loaded.model, loaded.chat_tokenizer.stop_ids, rows=4, queue_size=16, max_length=200)
    yield made
    made.close()


@pytest.fixture(scope="module")
def app(loaded, batcher):
    return create_app(loaded.chat_tokenizer, batcher, "student", loaded.model.config.vocab_size)


@pytest.fixture(scope="module")
def client(app):
    with TestClient(app) as made:
        yield made


@pytest.fixture(scope="module")
def address(app):
    """The same application behind a socket."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    server.should_exit = True
    thread.join()


def post(client, path="completions", **body) -> dict:
    answer = client.post(f"/v1/{path}", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def chat(client, prompt, **body) -> str:
    return post(client, "chat/completions", messages=prompt, max_tokens=32, **body)["choices"][0]["message"]["content"]


def logprobs_of(loaded, ids) -> np.ndarray:
    """Of each token but the first, [T - 1, V]: the log-probabilities in its place."""
    tokens = np.array([ids], np.int32)
    return np.asarray(jax.nn.log_softmax(loaded.model.logits(loaded.model(tokens)), axis=-1))[0, :-1]


def events(client, path, **body) -> list[dict]:
    with client.stream("POST", f"/v1/{path}", json=body | {"stream": True}) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_the_model_is_listed_under_its_name(client):
    (entry,) = client.get("/v1/models").json()["data"]
    assert entry["id"] == "student" and entry["max_model_len"] == 200
    assert client.get("/v1/models/student").json() == entry and client.get("/v1/models/other").status_code == 404


def test_an_echoed_prompt_has_the_log_probabilities_that_the_model_gives(client, loaded):
    texts = ["5168 is forty-two. größer 😀", "How"]
    ids = [loaded.chat_tokenizer.encode_prompt(text).tolist() for text in texts]
    for prompt in (texts, ids):
        choices = post(client, prompt=prompt, echo=True, max_tokens=1, logprobs=5, temperature=0)["choices"]
        for own, text, choice in zip(ids, texts, choices):
            told, costs = choice["logprobs"], logprobs_of(loaded, own)
            wanted = costs[np.arange(len(own) - 1), own[1:]]
            assert told["token_logprobs"][0] is told["top_logprobs"][0] is None
            np.testing.assert_allclose(told["token_logprobs"][1:-1], wanted, atol=1e-4)
            assert all(len(told[name]) == len(own) + 1 for name in told)
            best = [max(top.values()) for top in told["top_logprobs"][1:-1]]
            np.testing.assert_allclose(best, costs.max(axis=1), atol=1e-4)
            assert choice["text"].startswith(text) or prompt is ids
            for token, begin in zip(told["tokens"], told["text_offset"]):
                assert choice["text"][begin:].lstrip().startswith(token.strip()) or token.startswith(("bytes:", "<"))


def test_a_prompt_is_scored_alone_where_no_token_is_asked_for(client):
    (choice,) = post(client, prompt="5168 is", echo=True, max_tokens=0, logprobs=0)["choices"]
    told = choice["logprobs"]
    assert choice["text"] == "5168 is" and choice["finish_reason"] == "length"
    assert told["top_logprobs"][1] == {told["tokens"][1]: told["token_logprobs"][1]}
    assert post(client, prompt="5168 is", echo=True, max_tokens=0)["choices"][0]["text"] == "5168 is"


def test_greedy_answers_are_those_of_generate_and_their_log_probabilities_the_model_s(client, loaded):
    wanted = gold_jax.sample_completions(loaded, None, PROMPTS, temperature=0.0, max_new_tokens=32)
    assert [chat(client, prompt, temperature=0) for prompt in PROMPTS] == [d.text for d in wanted]
    body = {"messages": PROMPTS[0], "temperature": 0, "logprobs": True, "top_logprobs": 2, "max_tokens": 32}
    (choice,) = post(client, "chat/completions", **body)["choices"]
    told, prompt = choice["logprobs"]["content"], loaded.chat_tokenizer.encode_prompt(PROMPTS[0])
    ids = [*prompt, *wanted[0].ids, loaded.chat_tokenizer.stop_id]
    costs = logprobs_of(loaded, ids)[len(prompt) - 1 :]
    np.testing.assert_allclose([t["logprob"] for t in told], costs.max(axis=1), atol=1e-4)
    assert "".join(t["token"] for t in told[:-1]).strip() == wanted[0].text and choice["finish_reason"] == "stop"
    assert all(t["top_logprobs"][0]["logprob"] == t["logprob"] and len(t["top_logprobs"]) == 2 for t in told)


def test_variables_of_the_template_change_nothing_but_the_prompt(client):
    body = {"messages": PROMPTS[0], "temperature": 0, "logprobs": True, "top_logprobs": 1, "max_tokens": 32}
    (plain,) = post(client, "chat/completions", **body)["choices"]
    assert post(client, "chat/completions", **body, chat_template_kwargs={"unread": True})["choices"] == [plain]


@pytest.mark.parametrize("settings", [{"temperature": 0.7}, {"top_k": 3}, {"top_p": 0.6, "top_k": 20}])
def test_a_seed_draws_what_it_draws_in_generate(client, loaded, settings):
    wanted = gold_jax.sample_completions(loaded, None, [PROMPTS[0]] * 3, key=5, max_new_tokens=32, **settings)
    said = post(client, "chat/completions", messages=PROMPTS[0], n=3, seed=5, max_tokens=32, **settings)
    assert [choice["message"]["content"] for choice in said["choices"]] == [d.text for d in wanted]
    tokens = [len(d.ids) + d.stopped for d in wanted]
    assert said["usage"]["completion_tokens"] == sum(tokens) and len(set(d.text for d in wanted)) > 1


def test_a_stream_says_what_the_whole_answer_says(client):
    body = {"messages": PROMPTS[0], "n": 2, "seed": 1, "max_tokens": 32, "logprobs": True}
    whole = post(client, "chat/completions", **body)
    *chunks, last = events(client, "chat/completions", **body, stream_options={"include_usage": True})
    assert last["usage"] == whole["usage"] and last["choices"] == []
    for choice in whole["choices"]:
        own = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
        assert own[0]["delta"]["role"] == "assistant" and own[-1]["finish_reason"] == choice["finish_reason"]
        assert "".join(c["delta"].get("content", "") for c in own) == choice["message"]["content"]
        costs = [cost for c in own if c["logprobs"] for cost in c["logprobs"]["content"]]
        assert costs == choice["logprobs"]["content"]
    body = {"prompt": "5168 is", "echo": True, "logprobs": 1, "temperature": 0, "max_tokens": 24}
    (choice,) = post(client, **body)["choices"]
    own = [chunk["choices"][0] for chunk in events(client, "completions", **body)]
    assert "".join(c["text"] for c in own) == choice["text"]
    for name, values in choice["logprobs"].items():
        assert [value for c in own if c["logprobs"] for value in c["logprobs"][name]] == values


def test_a_stop_string_ends_an_answer_before_it(client):
    whole = chat(client, PROMPTS[0], temperature=0)
    stop = whole[len(whole) // 2 :][:6]
    body = {"messages": PROMPTS[0], "max_tokens": 32, "temperature": 0, "stop": ["nowhere", stop]}
    (choice,) = post(client, "chat/completions", **body)["choices"]
    assert choice["message"]["content"] == whole[: whole.index(stop)] and choice["finish_reason"] == "stop"
    told = [chunk["choices"][0]["delta"].get("content", "") for chunk in events(client, "chat/completions", **body)]
    assert "".join(told) == whole[: whole.index(stop)]


@pytest.mark.parametrize(
    ("body", "field", "says"),
    [
        ({}, "prompt", "missing; it must be a text"),
        ({"prompt": "a", "temprature": 1}, "temprature", "the nearest is temperature"),
        ({"prompt": "a", "\ud800": 1}, "?", "there is no field '\\ud800'"),
        ({"prompt": "a \ud800"}, "prompt", "prompt cannot be read"),
        ({"prompt": "a", "temperature": -1}, "temperature", "-1; it must be a number, from 0"),
        ({"prompt": "a", "n": 1.5}, "n", "1.5; it must be a whole number, from 1 to 128"),
        ({"prompt": "a", "top_p": 0}, "top_p", "more than 0 and at most 1"),
        ({"prompt": "a", "stop": ["", "b"]}, "stop", "none empty"),
        ({"prompt": "a", "logprobs": True}, "logprobs", "from 0 to 20"),
        ({"prompt": "a", "max_tokens": 500}, "max_tokens", "max_tokens can be at most 199"),
        ({"prompt": "a " * 300}, "prompt", "has more than the 200 tokens that fit here"),
        ({"prompt": [[1, 2], [9999]]}, "prompt", "prompt[1] holds the token 9999"),
        ({"prompt": "a", "logit_bias": {"3": 1}}, "logit_bias", "not supported here; leave it out (or pass {})"),
        ({"prompt": "a", "min_p": 0.1}, "min_p", "not supported here"),
        ({"prompt": ["a"] * 7, "n": 3}, "n", "21 sequences; at most 20"),
        ({"prompt": "a", "model": "other"}, "model", "'student' is"),
        ({"prompt": "a", "stream_options": {"include_usage": True}}, "stream_options", "needs stream: true"),
        ({"prompt": "a", "stream": True, "stream_options": {"include_usage": "no"}}, "include_usage", "true or false"),
        (
            {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2, "max_completion_tokens": 3},
            "max_tokens",
            "is 2 and max_completion_tokens 3",
        ),
        (
            {"messages": [{"role": "user", "content": "a"}], "chat_template_kwargs": []},
            "chat_template_kwargs",
            "JSON object",
        ),
        ({"messages": [{"role": "who", "content": "a"}]}, "messages[0]", "one of system, developer, user"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content", "it must be a text"),
        ({"messages": [{"role": "user", "content": "a"}], "tools": [{}]}, "tools", "not supported here"),
        ({"messages": [{"role": "user", "content": "a"}], "top_logprobs": 2}, "top_logprobs", "needs logprobs: true"),
    ],
)
def test_what_cannot_be_done_is_refused_with_its_field(client, body, field, says):
    path = f"/v1/{'chat/' if 'messages' in body else ''}completions"
    answer = client.post(path, content=json.dumps(body).encode())
    error = answer.json()["error"]
    assert answer.status_code == (404 if field == "model" else 400)
    assert error["param"] == field and says in error["message"] and error["type"] == "invalid_request_error"


def test_what_is_no_request_is_refused(client):
    assert "not JSON" in client.post("/v1/completions", content=b"{").json()["error"]["message"]
    assert client.post("/v1/completions", content=b"[" * 100_000).status_code == 400
    assert client.post("/v1/completions", content=b" " * (MOST_BYTES + 1)).status_code == 413
    answer = client.get("/v1/completions")
    assert answer.status_code == 405 and answer.headers["allow"] == "POST"
    assert "/v1/chat/completions" in client.post("/v1/else").json()["error"]["message"]


def test_harmless_fields_are_ignored_and_said_once(client, capsys):
    for _ in range(2):
        post(client, prompt="a", max_tokens=1, user="me", frequency_penalty=0.0, logit_bias=None)
    assert capsys.readouterr().err.count("the field user of requests changes nothing") == 1


def test_many_at_once_get_what_each_gets_alone(client, address):
    settings = [{"temperature": 0}, {"seed": 3}, {"seed": 4, "top_k": 5}, {"temperature": 0, "stop": "hundred"}]
    asked = [(prompt, options) for prompt in PROMPTS for options in settings][:20]
    alone = [chat(client, prompt, **options) for prompt, options in asked]
    with httpx.Client(base_url=address, timeout=120) as many, ThreadPoolExecutor(12) as pool:
        together = list(pool.map(lambda one: chat(many, one[0], **one[1]), asked * 2))
    assert together == alone * 2


def test_a_batch_has_the_log_probabilities_that_each_prompt_has_alone(client):
    texts = ["How", "5168 is", "one, two, three, " * 12, "größer 😀 and " * 3]
    body = {"max_tokens": 12, "temperature": 0, "logprobs": 3}
    together = post(client, prompt=texts, **body)["choices"]
    for text, choice in zip(texts, together, strict=True):
        (alone,) = post(client, prompt=text, **body)["choices"]
        assert choice["text"] == alone["text"] and choice["logprobs"]["tokens"] == alone["logprobs"]["tokens"]
        costs = (c["logprobs"]["token_logprobs"] for c in (choice, alone))
        np.testing.assert_allclose(*costs, atol=1e-5)


def test_a_temperature_too_small_to_divide_by_is_greedy(client):
    greedy = post(client, prompt="5168 is", temperature=0)["choices"]
    assert post(client, prompt="5168 is", temperature=1e-40, seed=1)["choices"] == greedy


def test_requests_of_compiled_sizes_wait_for_no_compiling(loaded, caplog, capsys):
    sizes = {"rows": 2, "queue_size": 4, "max_length": 256, "quantization": "int8_kv_cache"}
    made = Batcher(loaded.model, loaded.chat_tokenizer.stop_ids, **sizes)

    def write(length, **settings):
        ended = threading.Event()
        prompt = np.arange(length, dtype=np.int32) + 5
        receive = lambda kind, value: kind in ("end", "error") and ended.set()  # noqa: E731
        made.submit([Request(prompt, receive, 3, **settings)])
        assert ended.wait(120)

    jax.config.update("jax_log_compiles", True)
    try:
        made.compile(100)
        assert "jit(prefill)" in caplog.text and "jit(decode_round)" in caplog.text
        caplog.clear()
        for settings in ({}, {"temperature": 0.7, "top_k": 3}, {"temperature": 0.7, "top_p": 0.5, "top": 3}):
            write(20, score_prompt=True, **settings)
        compiled = [record.getMessage() for record in caplog.records if "Finished XLA" in record.getMessage()]
        assert not any(name in line for line in compiled for name in ("prefill", "decode_round", "score_tokens"))
        assert "requests wait" not in capsys.readouterr().err
        write(150)
        assert "compiling for sequences of up to 256 tokens; requests wait" in capsys.readouterr().err
        write(253)  # to the last of the tokens that fit: no larger programs
        assert "requests wait" not in capsys.readouterr().err and made._slots_per_row == 256
    finally:
        jax.config.update("jax_log_compiles", False)
        made.close()


@contextlib.contextmanager
def held(batcher):
    """The batcher waits, with one sequence in a slot."""
    go_on, began = threading.Event(), threading.Event()

    def hold(kind, value):
        began.set()
        go_on.wait()

    wait_for(lambda: batcher.running == 0)
    batcher.submit([Request(np.array([5, 6], np.int32), hold, max_tokens=1)])
    try:
        assert began.wait(120)
        yield
    finally:
        go_on.set()


def test_beyond_the_queue_a_request_is_told_to_come_again(client, batcher):
    ended = []
    with held(batcher):
        room = batcher.queue_size + batcher.rows - batcher.running
        ids, end = np.array([5, 6], np.int32), lambda kind, value: ended.append(kind)
        waiting = [Request(ids, end, max_tokens=1) for _ in range(room)]
        batcher.submit(waiting)
        answer = client.post("/v1/completions", json={"prompt": "a"})
        assert answer.status_code == 503 and answer.headers["retry-after"] == "1"
        assert "try again" in answer.json()["error"]["message"]
        for request in waiting[1:]:
            batcher.cancel(request)
    assert post(client, prompt="a", max_tokens=1)["choices"] and ended == ["tokens", "end"]


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_place(address, batcher, stream):
    body = json.dumps({"prompt": "5168 is", "max_tokens": 190, "n": 4, "stream": stream, "top_k": 2}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with held(batcher):
        with socket.create_connection(address.removeprefix("http://").split(":")) as connection:
            connection.sendall(head + body)
            wait_for(lambda: batcher.waiting == 4)
        wait_for(lambda: batcher.waiting == 0)
    wait_for(lambda: batcher.running == 0)


def wait_for(holds) -> None:
    end = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("quantization", ["none", "int8_kv_cache"])
def test_what_a_slot_held_changes_no_later_answer(loaded, quantization):
    """Values that are no numbers stand behind the next prompt in the cache, where their weights are 0."""
    params = split(loaded.model)[1]
    embedding = params["embedding"].at[100].set(np.inf)
    untied = dataclasses.replace(loaded.model.config, tied=False)
    model = Decoder.from_params(untied, params | {"embedding": embedding, "head": params["embedding"]})
    made = Batcher(model, (), rows=1, queue_size=4, max_length=256, quantization=quantization)

    def write(prompt):
        ended, found = threading.Event(), []

        def receive(kind, value):
            found.append((kind, value.logprobs.tolist() if kind == "tokens" else value))
            if kind != "tokens":
                ended.set()

        made.submit([Request(np.array(prompt, np.int32), receive, 4)])
        assert ended.wait(120)
        return found[-1][0], [x for kind, value in found if kind == "tokens" for x in value]

    try:
        before = write([5, 6, 7])
        assert before[0] == "end" and len(before[1]) == 4
        assert write([5, 6, 100] + [7] * 200) == ("error", [])
        assert made._slots_per_row == 256  # the next prompt is read into the first 128
        kind, logprobs = write([5, 6, 7])
        assert kind == "end"
        np.testing.assert_allclose(logprobs, before[1], atol=1e-5)
    finally:
        made.close()


def test_logits_that_are_not_finite_are_an_error_and_the_next_request_is_answered(client, batcher, monkeypatch):
    whole = batcher._weights
    broken = whole._replace(head=whole.head * np.nan)
    monkeypatch.setattr(batcher, "_weights", broken)
    answer = client.post("/v1/completions", json={"prompt": "a", "temperature": 0})
    assert answer.status_code == 500 and "logits are not finite" in answer.json()["error"]["message"]
    monkeypatch.setattr(batcher, "_weights", None)  # a fault of the programs
    monkeypatch.setattr(batcher, "_state", ())
    assert client.post("/v1/completions", json={"prompt": "a", "temperature": 0}).status_code == 500
    monkeypatch.undo()
    assert post(client, prompt="a", max_tokens=1)["choices"]


def test_the_command_serves_until_it_is_interrupted():
    command = [sys.executable, "-m", "gold_jax.serve", "--model_name_or_path", "embedded:student", "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        said = ""
        while "serving" not in said:
            said = process.stderr.readline()
            assert said
        url = re.search(r"http://127\.0\.0\.1:\d+", said)[0]
        assert httpx.get(f"{url}/v1/models").json()["data"][0]["id"] == "embedded:student"
        port = url.rpartition(":")[2]
        again = subprocess.run([*command[:-1], port], capture_output=True, text=True, timeout=120)
        assert again.returncode == 2 and f"cannot listen on --host 127.0.0.1 --port {port}" in again.stderr
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0 and process.stderr.read().endswith("stopped\n")


def test_without_the_extra_a_line_says_what_to_install(monkeypatch):
    from gold_jax import serve

    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(ImportError, match=r"uvicorn is not installed: pip install 'gold_jax\[serve\]'"):
        serve.main(["--model_name_or_path", "embedded:student"])
