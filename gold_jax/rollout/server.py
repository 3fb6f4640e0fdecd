"""A rollout engine on a server that runs already: vLLM's OpenAI-compatible one, or SGLang's.

Tokens go out and come back as ids, never as text: text that is read again need not give the tokens that were drawn. A
server that returns no ids is an error. What ends a completion is the student's stop tokens alone (`ignore_eos`), and
every penalty and filter that is not a setting of the run is switched off by name. Weights are pushed by saving and
reloading: the student is written as a Hugging Face folder where the server can read it too, under the same path, and
the server loads it in place.

Fields and routes, as they stood in the servers' sources and documentation in 2026:

* vLLM, `POST /v1/completions` with `return_token_ids` (0.10.2 and newer): `choices[0].token_ids` with the stop token in
  it, `finish_reason`, `stop_reason` (the stop token's id). `logprobs: 0` gives each drawn token's log-probability,
  under the default `--logprobs-mode raw_logprobs` that of the model itself. `seed` is honoured for each request.
  `prompt_logprobs: 1` gives the prompt's own, read anew whatever is cached: for each token but the first an object of
  token ids with their `logprob`. Where one is -inf, -9999 is written.
  `POST /collective_rpc` with `reload_weights` and `weights_path` (since pull request 32133, early 2026: 0.16 or newer)
  loads a folder, `POST /reset_prefix_cache` forgets what the old weights computed; both routes are there only
  where the server was started with `VLLM_SERVER_DEV_MODE=1`.
* SGLang, `POST /generate` with `input_ids` and `return_logprob` (0.5): `meta_info.output_token_logprobs` holds
  (log-probability, id, text) for each drawn token, the stop token too; `output_ids` is not read, because in some
  versions it begins with the end of the prompt (issue 17240). The log-probabilities are divided by the temperature, so
  they are the model's own at temperature 1 and when greedy alone. With `logprob_start_len: 0`, `input_token_logprobs`
  has the same of the prompt, never divided. `sampling_seed` (0.5.3 and newer) is honoured under
  `--enable-deterministic-inference`. `POST /update_weights_from_disk` loads a folder and forgets the old cache.
* Both list the model and its window under `GET /v1/models`.
"""

import concurrent.futures
import contextlib
import dataclasses
import os
import pathlib
import shutil
import uuid
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gold_jax.models.functional import merge, split
from gold_jax.models.hf_checkpoint import save_model
from gold_jax.rollout.agreement import Agreement
from gold_jax.rollout.client import Client, Refused, ServerError
from gold_jax.rollout.engine import EMPTY, NonFiniteLogits, Sampled

# Servers would take these from the model's generation_config.json, which would change what is sampled.
_NEUTRAL = dict(min_p=0.0, repetition_penalty=1.0, presence_penalty=0.0, frequency_penalty=0.0, ignore_eos=True)

_IMPOSSIBLE = -9999.0  # what vLLM writes for -inf
_ROUNDING = 0.01  # nats that a log-probability may lie above 0


class Answer(NamedTuple):
    """What a server says about one completion, not yet checked."""

    ids: Any
    logprobs: Any  # one for each id, or None where it does not tell the model's own
    finish: Any  # "stop", "length", or another reason to end
    matched: Any  # the id of the stop token that ended it, if it says so


class _VLLM:
    """vLLM's OpenAI-compatible server (`vllm serve`); TRL's `trl vllm-serve` is another one."""

    started = "vLLM is started with: VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --port PORT"
    path = "/v1/completions"

    def request(self, prompt: list[int], sampling: dict, most: int, seed: int) -> dict:
        """The body of the request for one completion of at most so many tokens."""
        return {"prompt": prompt, "max_tokens": most, "seed": seed, "return_token_ids": True, "logprobs": 0, **sampling}

    def read(self, answer: Any, prompt: list[int], temperature: float) -> Answer:
        """What the answer says; KeyError, IndexError and TypeError where it has another form."""
        (choice,) = answer["choices"]
        ids, read = choice.get("token_ids"), choice.get("prompt_token_ids")
        if ids is None:
            raise ServerError(
                "the answer has no token_ids, and text that is read again need not give the tokens that were drawn; vLLM returns "
                "them for return_token_ids from version 0.10.2 on, SGLang through its own route (--rollout_server sglang)."
            )
        if read is not None and read != prompt:
            raise ServerError(
                f"the server read another prompt ({len(read)} tokens) than the one it was given ({len(prompt)})."
            )
        logprobs = choice["logprobs"]["token_logprobs"] if choice.get("logprobs") else None
        return Answer(ids, logprobs, choice["finish_reason"], choice.get("stop_reason"))

    def score_request(self, ids: list[int]) -> dict:
        """The body of the request for the log-probabilities of a text."""
        return {"prompt": ids, "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 1}

    def read_scores(self, answer: Any, ids: list[int]) -> list | None:
        """Those of each token but the first; None where it does not tell. Errors as `read`."""
        (choice,) = answer["choices"]
        told = choice.get("prompt_logprobs")
        return told and [of[str(i)]["logprob"] for of, i in zip(told[1:], ids[1:], strict=True)]

    def reload(self, client: Client, folder: str) -> None:
        """Have the server load a folder of weights."""
        try:
            said = client.post("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": folder}})
            reset = client.post("/reset_prefix_cache")
        except ServerError as error:
            raise ServerError(
                f"{error} Weights are reloaded by vLLM 0.16 or newer, started with VLLM_SERVER_DEV_MODE=1, which must be able to "
                f"read {folder}."
            ) from error
        if isinstance(said, dict) and said.get("success") is False:
            raise ServerError(f"{client.base_url} has not loaded {folder}: {said.get('message')}")
        if isinstance(reset, dict) and reset.get("success") is False:
            raise ServerError(
                f"{client.base_url} cannot forget what the old weights computed, because it is still answering others; it must "
                "work for this run alone."
            )


class _SGLang:
    """SGLang's own server (`python -m sglang.launch_server`), through its native routes. Methods as in `_VLLM`."""

    started = "SGLang is started with: python -m sglang.launch_server --model-path MODEL --port PORT"
    path = "/generate"

    def request(self, prompt: list[int], sampling: dict, most: int, seed: int) -> dict:
        own = {"max_new_tokens": most, "sampling_seed": seed, "top_k": sampling["top_k"] or -1}
        return {"input_ids": prompt, "return_logprob": True, "sampling_params": sampling | own}

    def read(self, answer: Any, prompt: list[int], temperature: float) -> Answer:
        meta = answer["meta_info"]
        drawn = meta.get("output_token_logprobs")
        if drawn is None:
            raise ServerError(
                "the answer has no meta_info.output_token_logprobs, from which the token ids are read; SGLang's /generate gives "
                "them for return_logprob, vLLM through another route (--rollout_server vllm)."
            )
        logprobs = [d[0] for d in drawn] if temperature in (0, 1) else None  # else they are not the model's own
        finish = meta["finish_reason"]
        return Answer([d[1] for d in drawn], logprobs, finish["type"], finish.get("matched"))

    def score_request(self, ids: list[int]) -> dict:
        settings = {"max_new_tokens": 1, "temperature": 1.0}
        return {"input_ids": ids, "return_logprob": True, "logprob_start_len": 0, "sampling_params": settings}

    def read_scores(self, answer: Any, ids: list[int]) -> list | None:
        told = answer["meta_info"].get("input_token_logprobs")
        if told and [d[1] for d in told] != ids:
            raise ServerError("it tells log-probabilities of other tokens than those it was given.")
        return told and [d[0] for d in told[1:]]

    def reload(self, client: Client, folder: str) -> None:
        try:
            said = client.post("/update_weights_from_disk", {"model_path": folder})
        except ServerError as error:
            raise ServerError(f"{error} SGLang must be able to read {folder}.") from error
        if not isinstance(said, dict) or said.get("success") is not True:
            reason = said.get("message") if isinstance(said, dict) else said
            raise ServerError(f"{client.base_url} has not loaded {folder}: {reason}")


KINDS = {"vllm": _VLLM(), "sglang": _SGLang()}


@dataclasses.dataclass(eq=False, repr=False)
class ServerEngine:
    """Has a server write completions; see `rollout.engine.Engine`.

    The server answers with the weights that `sync` pushed last, whatever model `generate` is given. An unknown kind and
    what is no HTTP address are a ValueError.
    """

    base_url: str  # such as "http://localhost:8000"
    weights_dir: str | os.PathLike  # for pushed weights; the server must be able to read the same absolute path
    kind: str = "vllm"  # one of `KINDS`
    owns_dir: bool = False  # whether no other run uses `weights_dir`, so that what a killed one left there is removed
    vocab_size: int | None = None  # rows of the student's head; ids beyond are an error. None: not checked
    timeout: float = 240.0  # seconds for each answer; a server that is starting is waited for as long
    sync_every: int = 1  # updates between two pushes
    sync_first: bool = True  # push before the first rollouts too; False where the server has the student's weights
    dtype: str = "auto"  # of pushed weights, as in `save_model`
    api_key: str | None = None  # bearer token, where the server wants one
    concurrency: int = 64  # most requests at once
    pause: float = 0.5  # seconds before a second attempt, as in `Client`
    notify: Callable[[str], Any] = warnings.warn  # is told what cannot be checked

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"the server's kind is {self.kind!r}; it must be one of {', '.join(KINDS)}.")
        self.api = KINDS[self.kind]
        options = {"timeout": self.timeout, "api_key": self.api_key, "pause": self.pause}
        self.client = Client(self.base_url, started=self.api.started, **options)
        self.weights_dir = pathlib.Path(self.weights_dir).absolute()
        self.pushed: int | None = None if self.sync_first else 0  # updates that the server's weights have seen
        self.folder: pathlib.Path | None = None
        self.agreement = Agreement(self.client.base_url, self._score, self.notify)
        self.compared = False  # since the last push
        self.difference: float | None = None  # mean absolute, in nats, that the last `generate` found, if it compared

    def check(self, longest: int) -> None:
        """Make sure that a server of the right kind is there, whose window holds `longest` tokens; else a `ServerError`."""
        answer, url = self.client.get("/v1/models"), self.client.base_url
        self.agreement = Agreement(url, self._score, self.notify, longest)
        try:
            window = answer["data"][0].get("max_model_len")
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise ServerError(
                f"{url}/v1/models lists no model, so this server cannot be used. {self.api.started}"
            ) from error
        if window is not None and (type(window) is not int or window < 1):
            raise ServerError(
                f"{url}/v1/models says that it reads {str(window)[:200]!r} tokens, which is no number of them."
            )
        if window is not None and window < longest:
            raise ServerError(
                f"{url} reads at most {window} tokens, but prompts and completions may have {longest}; raise its "
                "--max-model-len (vLLM) or --context-length (SGLang), or lower --max_prompt_length or --max_completion_length."
            )

    def sync(self, model: Any, updates: int) -> bool:
        """Push the student's weights where those that the server has are `sync_every` updates old; whether they were.

        `model` is a `Decoder`, or its `(graphdef, params)` as they stand after so many updates. A `ServerError` says that
        the server did not load them, or still serves others; `NonFiniteLogits` that they give no numbers.
        """
        if self.pushed is not None and 0 <= updates - self.pushed < self.sync_every:
            return False
        if not all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(split(model)[1])):
            raise NonFiniteLogits("the student's weights are not finite, so no server is given them.")
        if self.owns_dir and self.folder is None:
            for left in (*self.weights_dir.glob("update-*"), *self.weights_dir.glob(".update-*")):
                shutil.rmtree(left, ignore_errors=True)
        # A name of its own for every push: nothing that a server or a file system remembers of a path can be stale.
        folder = self.weights_dir / f"update-{updates}-{uuid.uuid4().hex[:8]}"
        unfinished = folder.with_name(f".{folder.name}")
        try:
            save_model(merge(*split(model)), unfinished, dtype=self.dtype)
            os.replace(unfinished, folder)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise
        try:
            self.api.reload(self.client, str(folder))
            self.agreement.check_followed(model, updates)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
        self.folder, self.pushed, self.compared = folder, updates, False
        return True

    def restart(self) -> None:
        """Makes the next `sync` push in any case: updates are counted from 0 again, with other weights."""
        self.pushed = None
        self.agreement.restart()

    def generate(self, model, prompts, *, max_new_tokens, key, temperature=1.0, top_k=0, top_p=1.0, stop_ids=()):
        """See `Engine.generate`; `model` is the one pushed last, beside which the first completions after a push are put.

        Each prompt is a request with a seed of its own, made of the key and the prompt's index.

        Raises:
            ServerError: the server refuses a setting, a completion is missing or breaks the settings, or another model
                drew it.
            NonFiniteLogits: the model gives no numbers.
        """
        sampling = {"temperature": float(temperature), "top_k": int(top_k), "top_p": float(top_p)}
        sampling |= {"stop_token_ids": [int(i) for i in stop_ids], **_NEUTRAL}
        seeds = _seeds(key, len(prompts))

        def complete(index: int) -> Sampled:
            prompt = [int(i) for i in prompts[index]]
            if not prompt:
                return EMPTY
            said = self.client.post(self.api.path, self.api.request(prompt, sampling, max_new_tokens, seeds[index]))
            with self._reading(said, f"completion {index}"):
                answer = self.api.read(said, prompt, temperature)
                return check_completion(answer, max_new_tokens, set(sampling["stop_token_ids"]), self.vocab_size)

        pool = concurrent.futures.ThreadPoolExecutor(min(self.concurrency, max(1, len(prompts))))
        try:
            drawn = list(pool.map(complete, range(len(prompts))))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        self.difference = None
        if not self.compared and self.pushed is not None and model is not None:
            self.difference = self.agreement.check_drawn(model, prompts, drawn)
            self.compared = any(len(d.ids) for d in drawn)
        return drawn

    def _score(self, ids: list[int]) -> list[float] | None:
        """The log-probabilities of a text's tokens but the first; None where the server does not tell them."""
        try:
            said = self.client.post(self.api.path, self.api.score_request(ids))
        except Refused:
            return None
        with self._reading(said, "the log-probabilities of a text"):
            scores = self.api.read_scores(said, ids)
            return None if scores is None or None in scores else check_logprobs(scores)

    @contextlib.contextmanager
    def _reading(self, said: Any, what: str) -> Iterator[None]:
        """A `ServerError` that says of which answer something could not be read."""
        source = f"{self.client.base_url}{self.api.path}, {what}"
        try:
            yield
        except ServerError as error:
            raise ServerError(f"{source}: {error}") from error
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise ServerError(
                f"{source}: the answer is not of the form that was expected ({type(error).__name__}: {error}); it begins with "
                f"{str(said)[:200]}. Is --rollout_server right?"
            ) from error


def check_completion(answer: Answer, most: int, stops: set[int], vocab_size: int | None) -> Sampled:
    """The completion, or a `ServerError` that says why the student could not have sampled it with these settings."""
    ids = list(answer.ids)
    for i in ids:
        if type(i) is not int or i < 0:
            raise ServerError(f"a token id is {i!r}, which is none.")
        if vocab_size is not None and i >= vocab_size:
            raise ServerError(f"a token id is {i}, but the student has {vocab_size} tokens: another model's.")
    logprobs = check_logprobs([None] * len(ids) if answer.logprobs is None else answer.logprobs)
    if len(logprobs) != len(ids):
        raise ServerError(f"there are {len(ids)} token ids but {len(logprobs)} log-probabilities.")
    if answer.finish not in ("stop", "length"):
        raise ServerError(f"it ended by {answer.finish!r}, so it is not whole; see the server's own log.")
    if answer.finish == "stop" and not (ids and ids[-1] in stops):
        if type(answer.matched) is not int or answer.matched not in stops:
            raise ServerError(
                f"it was stopped by {answer.matched!r}, but only {sorted(stops)} were to stop it; start the server without stop "
                "strings and stop tokens of its own."
            )
        ids, logprobs = [*ids, answer.matched], [*logprobs, np.nan]
    if len(ids) > most:
        raise ServerError(f"it has {len(ids)} tokens, but at most {most} were asked for.")
    if stops.intersection(ids[:-1]):
        raise ServerError("it continues after a stop token; the server does not heed stop_token_ids.")
    if answer.finish == "length" and len(ids) < most:
        raise ServerError(
            f"it was cut at {len(ids)} of {most} tokens, because the server's window is full; raise its "
            "--max-model-len (vLLM) or --context-length (SGLang)."
        )
    return Sampled(np.asarray(ids, np.int32), np.asarray(logprobs, np.float32))


def check_logprobs(logprobs: Sequence) -> list[float]:
    """Log-probabilities of tokens that are there, NaN for None; a `ServerError` where one is none."""
    for x in logprobs:
        if x is not None and (type(x) not in (int, float) or not _IMPOSSIBLE < x <= _ROUNDING):
            raise ServerError(f"a log-probability is {x!r}; that of a token that is there is a number, at most 0.")
    return [np.nan if x is None else float(x) for x in logprobs]


def _seeds(key: jax.Array, count: int) -> list[int]:
    """A seed in [0, 2^31) for each index, which depends on the key and the index alone, or on the index's own key."""
    keys = key if key.ndim else jax.vmap(jax.random.fold_in, (None, 0))(key, np.arange(count))
    return [int(bits) >> 1 for bits in np.asarray(jax.vmap(jax.random.bits)(keys))]
