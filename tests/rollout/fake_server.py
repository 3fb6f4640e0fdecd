"""A small server that speaks as vLLM or as SGLang does, behind which a tiny model of this project really writes."""

import contextlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import jax
import numpy as np

from gold_jax.models.hf_checkpoint import load_model

WINDOW = 160


@jax.jit
def logits_of(model, tokens, mask):
    return model.logits(model(tokens, mask))


class FakeServer:
    """One server; `url` is where it is.

    Like vLLM's, its prefix cache keeps what the old weights computed until it is told to forget.

    Attributes:
      kind: "vllm" or "sglang".
      asked: (path, body) of every request, in the order they came.
      faults: what to answer next in place of the truth, per path: (status, body) or (status, body, headers), or seconds
        to stay silent, or "drop", or "slow head" or "slow body" to send the truth from there on by the byte.
      mangle: changes every true answer before it goes out.
      window: the longest sequence that it says it reads.
      deaf: whether it answers that it has loaded weights, and goes on with those it has.
    """

    def __init__(self, folder, kind):
        self.kind, self.asked, self.faults, self.mangle = kind, [], {}, lambda answer: answer
        self.window, self.busy, self.deaf, self.key = WINDOW, False, False, None
        self.lock = threading.Lock()
        self.most_at_once = self.at_once = 0
        self.serving = self.loaded = load_model(folder)

    def paths(self):
        return [path for path, _ in self.asked]

    def bodies(self, path):
        return [body for asked, body in self.asked if asked == path]

    def drawn(self):
        """The paths of the requests but those for the log-probabilities of a given text."""
        scores = "prompt_logprobs", "logprob_start_len"
        return [path for path, body in self.asked if not any(name in (body or {}) for name in scores)]

    def read(self, ids):
        """Log-probabilities of whatever may follow each token."""
        tokens, mask = np.zeros((1, WINDOW), np.int32), np.zeros((1, WINDOW), bool)
        tokens[0, : len(ids)], mask[0, : len(ids)] = ids, True
        return np.asarray(jax.nn.log_softmax(logits_of(self.serving, tokens, mask)[0, : len(ids)]))

    def score(self, ids):
        """The log-probability of each token, None for the first."""
        return [None, *map(float, self.read(ids)[np.arange(len(ids) - 1), ids[1:]])]

    def draw(self, prompt, *, most, temperature, seed, stops):
        """Ids and log-probabilities of one completion, one whole forward pass for each token."""
        rng, ids, logprobs = np.random.default_rng(seed), [], []
        while len(ids) < most and not (ids and ids[-1] in stops):
            own = self.read(prompt + ids)[-1]
            if temperature == 0:
                token = int(own.argmax())
            else:
                weights = np.exp((own - own.max()).astype(np.float64) / temperature)
                token = int(rng.choice(len(own), p=weights / weights.sum()))
            ids.append(token)
            logprobs.append(float(own[token]))
        return ids, logprobs

    def answer(self, path, body):
        """Status and JSON for a request that is not to fail."""
        routes = {
            "/v1/models": lambda _: (200, {"data": [{"id": "student", "max_model_len": self.window}]}),
            **(
                {
                    "/v1/completions": self.complete,
                    "/collective_rpc": self.reload_vllm,
                    "/reset_prefix_cache": self.reset,
                }
                if self.kind == "vllm"
                else {"/generate": self.generate, "/update_weights_from_disk": self.reload_sglang}
            ),
        }
        return routes[path](body) if path in routes else (404, {"detail": "Not Found"})

    def complete(self, body):
        if body.get("prompt_logprobs") is not None:
            ids = body["prompt"]
            told = [x and {str(i): {"logprob": x, "rank": 1}} for i, x in zip(ids, self.score(ids))]
            return 200, {"choices": [{"text": "…", "finish_reason": "length", "prompt_logprobs": told}]}
        if not body.get("ignore_eos") or body["top_k"] < -1:
            return 400, {"error": {"message": "top_k must be 0 (disable), or at least 1", "type": "BadRequestError"}}
        ids, logprobs = self.draw(
            body["prompt"],
            most=body["max_tokens"],
            temperature=body["temperature"],
            seed=body["seed"],
            stops=body["stop_token_ids"],
        )
        stopped = ids[-1] in body["stop_token_ids"]
        choice = {
            "text": "…",
            "finish_reason": "stop" if stopped else "length",
            "stop_reason": ids[-1] if stopped else None,
            "logprobs": {"token_logprobs": logprobs} if body.get("logprobs") is not None else None,
        }
        if body.get("return_token_ids"):
            choice |= {"token_ids": ids, "prompt_token_ids": body["prompt"]}
        return 200, {"choices": [choice]}

    def reload_vllm(self, body):
        assert body["method"] == "reload_weights"
        if not self.deaf:
            self.loaded = load_model(body["kwargs"]["weights_path"])
        return 200, {"results": [None]}

    def reset(self, _):
        if self.busy:
            return 200, {"success": False}
        self.serving = self.loaded
        return 200, {"success": True}

    def generate(self, body):
        settings = body["sampling_params"]
        if body.get("logprob_start_len") == 0:
            told = [[x, i, None] for i, x in zip(body["input_ids"], self.score(body["input_ids"]))]
            return 200, {"text": "…", "meta_info": {"finish_reason": {"type": "length"}, "input_token_logprobs": told}}
        if settings["top_k"] == 0 or not settings.get("ignore_eos"):
            return 400, {"error": {"message": "top_k must be -1 (disable) or at least 1, got 0."}}
        ids, logprobs = self.draw(
            body["input_ids"],
            most=settings["max_new_tokens"],
            temperature=settings["temperature"],
            seed=settings["sampling_seed"],
            stops=settings["stop_token_ids"],
        )
        stopped = ids[-1] in settings["stop_token_ids"]
        finish = {"type": "stop", "matched": ids[-1]} if stopped else {"type": "length", "length": len(ids)}
        about = {"finish_reason": finish, "completion_tokens": len(ids)}
        if body.get("return_logprob"):
            about["output_token_logprobs"] = [[p, i, None] for i, p in zip(ids, logprobs)]
        return 200, {"text": "…", "output_ids": body["input_ids"][-2:] + ids, "meta_info": about}

    def reload_sglang(self, body):
        if not self.deaf:
            self.loaded = self.serving = load_model(body["model_path"])
        return 200, {"success": True, "message": "Succeeded to update model weights."}


class Slow:
    """A file that is written to by the byte."""

    def __init__(self, file):
        self.file = file

    def write(self, content):
        for byte in content:
            self.file.write(bytes([byte]))
            self.file.flush()
            time.sleep(0.05)

    def __getattr__(self, name):
        return getattr(self.file, name)


@contextlib.contextmanager
def serving(folder, kind="vllm"):
    """A server that runs until the block is done."""
    fake = FakeServer(folder, kind)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.respond(None)

        def do_POST(self):
            content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.respond(json.loads(content) if content else None)

        def respond(self, body):
            with fake.lock:
                fake.asked.append((self.path, body))
                fake.key = self.headers.get("Authorization")
                fault = fake.faults[self.path].pop(0) if fake.faults.get(self.path) else None
                fake.at_once += 1
                fake.most_at_once = max(fake.most_at_once, fake.at_once)
            if isinstance(fault, float):
                time.sleep(fault)
            headers = []
            if fault == "drop":
                self.close_connection = True
                self.connection.close()
                status = None
            elif isinstance(fault, tuple):
                status, answer, *headers = fault
            else:
                try:
                    status, answer = fake.answer(self.path, body)
                    answer = fake.mangle(answer)
                except Exception as error:  # a fault of this server must not look like a broken line
                    status, answer = 500, {"detail": repr(error)}
            with fake.lock:
                fake.at_once -= 1
            if status is not None:
                content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                with contextlib.suppress(OSError):  # whoever asked has gone
                    if fault == "slow head":
                        self.wfile = Slow(self.wfile)
                    self.send_response(status)
                    for name, value in dict(*headers, **{"Content-Length": len(content)}).items():
                        self.send_header(name, str(value))
                    self.end_headers()
                    if fault == "slow body":
                        self.wfile = Slow(self.wfile)
                    self.wfile.write(content)

        def log_message(self, *_):
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 128

        def handle_error(self, *_):
            pass

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    fake.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield fake
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
