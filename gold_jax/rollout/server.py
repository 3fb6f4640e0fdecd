"""A rollout engine on a server that runs already: vLLM's OpenAI-compatible one, or SGLang's.

Tokens go out and come back as ids, never as text: text that is read again need not give the tokens that were drawn. A
server that returns no ids is an error. What ends a completion is the student's stop tokens alone (`ignore_eos`), and
every penalty and filter that is not a setting of the run is switched off by name, because servers take defaults for them from the
model's generation_config.json.

Weights are pushed by saving and reloading: the student is written as a Hugging Face folder where the server can read it
too, under the same path, and the server loads it in place.

Fields and routes, as they stood in the servers' sources and documentation in 2026:

* vLLM, `POST /v1/completions` with `return_token_ids` (0.10.2 and newer): `choices[0].token_ids` with the stop token in
  it, `finish_reason`, `stop_reason` (the stop token's id). `logprobs: 0` gives each drawn token's log-probability,
  under the default `--logprobs-mode raw_logprobs` that of the model itself. `seed` is honoured for each request.
  `POST /collective_rpc` with `reload_weights` and `weights_path` (since pull request 32133, early 2026: 0.16 or newer)
  loads a folder, `POST /reset_prefix_cache` forgets what the old weights computed; both routes are there only
  where the server was started with `VLLM_SERVER_DEV_MODE=1`.
* SGLang, `POST /generate` with `input_ids` and `return_logprob` (0.5): `meta_info.output_token_logprobs` holds
  (log-probability, id, text) for each drawn token, the stop token too; `output_ids` is not read, because in some
  versions it begins with the end of the prompt (issue 17240). The log-probabilities are divided by the temperature, so
  they are the model's own at temperature 1 and when greedy alone. `sampling_seed` (0.5.3 and newer) is honoured under
  `--enable-deterministic-inference`. `POST /update_weights_from_disk` loads a folder and forgets the old cache.
* Both list the model and its window under `GET /v1/models`.
"""

import concurrent.futures
import os
import pathlib
import shutil
import uuid
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from gold_jax.models.functional import merge, split
from gold_jax.models.hf_checkpoint import save_model
from gold_jax.rollout.client import Client, ServerError
from gold_jax.rollout.engine import Sampled

CONCURRENCY = 64
# Servers would take these from the model's generation_config.json, which would change what is sampled.
_NEUTRAL = {
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "ignore_eos": True,
}


class SamplingParams(NamedTuple):
    """How one completion is sampled."""

    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    stop_ids: list[int]


class Answer(NamedTuple):
    """What a server says about one completion.

    Attributes:
        ids: token ids, not yet checked.
        logprobs: one for each id, or None where it does not tell the model's own.
        finish: "stop", "length", or another reason to end.
        matched: the id of the stop token that ended it, if it says so.
    """

    ids: Any
    logprobs: Any
    finish: Any
    matched: Any


class VLLM:
    """vLLM's OpenAI-compatible server (`vllm serve`); TRL's `trl vllm-serve` is another one."""

    started = "vLLM is started with: VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --port PORT"
    path = "/v1/completions"

    def request(self, prompt: list[int], params: SamplingParams, seed: int) -> dict:
        """The body of the request for one completion."""
        return {
            "prompt": prompt,
            "max_tokens": params.max_new_tokens,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "top_k": params.top_k,
            "seed": seed,
            "stop_token_ids": params.stop_ids,
            "return_token_ids": True,
            "logprobs": 0,
            **_NEUTRAL,
        }

    def read(self, answer: Any, prompt: list[int], params: SamplingParams) -> Answer:
        """What the answer says; KeyError, IndexError and TypeError where it has another form."""
        (choice,) = answer["choices"]
        ids = choice.get("token_ids")
        if ids is None:
            raise ServerError(
                "the answer has no token_ids, and text that is read again need not give the tokens that were drawn; vLLM returns "
                "them for return_token_ids from version 0.10.2 on, SGLang through its own route (--rollout_server sglang)."
            )
        read = choice.get("prompt_token_ids")
        if read is not None and read != prompt:
            raise ServerError(
                f"the server read another prompt ({len(read)} tokens) than the one it was given ({len(prompt)})."
            )
        logprobs = choice["logprobs"]["token_logprobs"] if choice.get("logprobs") else None
        return Answer(ids, logprobs, choice["finish_reason"], choice.get("stop_reason"))

    def reload(self, client: Client, folder: str) -> None:
        """Have the server load a folder of weights."""
        try:
            client.post("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": folder}})
            reset = client.post("/reset_prefix_cache")
        except ServerError as error:
            raise ServerError(
                f"{error} Weights are reloaded by vLLM 0.16 or newer, started with VLLM_SERVER_DEV_MODE=1, which must be able to "
                f"read {folder}."
            ) from error
        if isinstance(reset, dict) and reset.get("success") is False:
            raise ServerError(
                f"{client.base_url} cannot forget what the old weights computed, because it is still answering others; it must "
                "work for this run alone."
            )


class SGLang:
    """SGLang's own server (`python -m sglang.launch_server`), through its native routes. Methods as in `VLLM`."""

    started = "SGLang is started with: python -m sglang.launch_server --model-path MODEL --port PORT"
    path = "/generate"

    def request(self, prompt: list[int], params: SamplingParams, seed: int) -> dict:
        """See `VLLM.request`."""
        sampling = {
            "max_new_tokens": params.max_new_tokens,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "top_k": params.top_k or -1,
            "sampling_seed": seed,
            "stop_token_ids": params.stop_ids,
            **_NEUTRAL,
        }
        return {"input_ids": prompt, "return_logprob": True, "sampling_params": sampling}

    def read(self, answer: Any, prompt: list[int], params: SamplingParams) -> Answer:
        """See `VLLM.read`."""
        meta_info = answer["meta_info"]
        token_logprobs = meta_info.get("output_token_logprobs")
        if token_logprobs is None:
            raise ServerError(
                "the answer has no meta_info.output_token_logprobs, from which the token ids are read; SGLang's /generate gives "
                "them for return_logprob, vLLM through another route (--rollout_server vllm)."
            )
        logprobs = (
            [d[0] for d in token_logprobs] if params.temperature in (0, 1) else None
        )  # else they are not the model's own
        finish = meta_info["finish_reason"]
        return Answer([d[1] for d in token_logprobs], logprobs, finish["type"], finish.get("matched"))

    def reload(self, client: Client, folder: str) -> None:
        """See `VLLM.reload`."""
        try:
            said = client.post("/update_weights_from_disk", {"model_path": folder})
        except ServerError as error:
            raise ServerError(f"{error} SGLang must be able to read {folder}.") from error
        if not isinstance(said, dict) or said.get("success") is not True:
            reason = said.get("message") if isinstance(said, dict) else said
            raise ServerError(f"{client.base_url} has not loaded {folder}: {reason}")


KINDS = {"vllm": VLLM, "sglang": SGLang}


class ServerEngine:
    """Has a server write completions; see `rollout.engine.Engine`.

    The server answers with the weights that `sync` pushed last, whatever model `generate` is given.

    Args:
        base_url: such as "http://localhost:8000".
        weights_dir: folder for pushed weights, which the server must be able to read under the same absolute path.
        kind: "vllm" or "sglang".
        vocab_size: rows of the student's head; ids beyond are an error. None: not checked.
        timeout: seconds for each answer; a server that is starting is waited for as long.
        sync_every: updates between two pushes.
        sync_first: push before the first rollouts too; False where the server already has the student's weights.
        dtype: type of pushed weights, as in `save_model`.
        api_key: bearer token, where the server wants one.
        concurrency: most requests at once.
        pause: seconds before a second attempt, as in `Client`.

    Raises:
        ValueError: an unknown kind, or no HTTP address.
    """

    def __init__(
        self,
        base_url: str,
        weights_dir: str | os.PathLike,
        *,
        kind: str = "vllm",
        vocab_size: int | None = None,
        timeout: float = 240.0,
        sync_every: int = 1,
        sync_first: bool = True,
        dtype: str = "auto",
        api_key: str | None = None,
        concurrency: int = CONCURRENCY,
        pause: float = 0.5,
    ):
        if kind not in KINDS:
            raise ValueError(f"the server's kind is {kind!r}; it must be one of {', '.join(KINDS)}.")
        self.api = KINDS[kind]()
        self.client = Client(base_url, timeout=timeout, started=self.api.started, api_key=api_key, pause=pause)
        self.weights_dir = pathlib.Path(weights_dir).absolute()
        self.vocab_size, self.concurrency, self.dtype = vocab_size, concurrency, dtype
        self.sync_every = sync_every
        self.pushed: int | None = None if sync_first else 0  # updates that the server's weights have seen
        self.folder: pathlib.Path | None = None

    def check(self, longest: int) -> None:
        """Make sure that a server of the right kind is there.

        Args:
            longest: most tokens of a prompt and its completion together.

        Raises:
            ServerError: it is not, or its window is too short.
        """
        answer = self.client.get("/v1/models")
        try:
            window = answer["data"][0].get("max_model_len")
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise ServerError(
                f"{self.client.base_url}/v1/models lists no model, so this is no server that can be used. {self.api.started}"
            ) from error
        if window is not None and window < longest:
            raise ServerError(
                f"{self.client.base_url} reads at most {window} tokens, but prompts and completions may have {longest}; raise its "
                "--max-model-len (vLLM) or --context-length (SGLang), or lower --max_prompt_length or --max_completion_length."
            )

    def sync(self, model: Any, updates: int) -> bool:
        """Push the student's weights where those that the server has are `sync_every` updates old.

        Args:
            model: a `Decoder`, or its `(graphdef, params)` as they stand now.
            updates: how many updates these have seen.

        Returns:
            Whether they were pushed.

        Raises:
            ServerError: the server did not load them.
        """
        if self.pushed is not None and 0 <= updates - self.pushed < self.sync_every:
            return False
        model = merge(*split(model))
        # A name of its own for every push: nothing that a server or a file system remembers of a path can be stale.
        folder = self.weights_dir / f"update-{updates}-{uuid.uuid4().hex[:8]}"
        unfinished = folder.with_name(f".{folder.name}")
        try:
            save_model(model, unfinished, dtype=self.dtype)
            os.replace(unfinished, folder)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise
        self.api.reload(self.client, str(folder))
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
        self.folder, self.pushed = folder, updates
        return True

    def restart(self) -> None:
        """Makes the next `sync` push in any case: updates are counted from 0 again, with other weights."""
        self.pushed = None

    def generate(
        self,
        model: Any,
        prompts: Sequence[np.ndarray],
        *,
        max_new_tokens: int,
        key: jax.Array,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        stop_ids: Sequence[int] = (),
        pad_id: int = 0,
    ) -> list[Sampled]:
        """See `Engine.generate`; `model` and `pad_id` have no part here.

        Each prompt is a request with a seed of its own, made of the key and the prompt's index.

        Raises:
            ServerError: the server refuses a setting, or a completion is missing or breaks the settings.
        """
        params = SamplingParams(
            max_new_tokens, float(temperature), int(top_k), float(top_p), [int(i) for i in stop_ids]
        )
        seeds = _seeds(key, len(prompts))

        def complete(index: int) -> Sampled:
            prompt = [int(i) for i in prompts[index]]
            if not prompt:
                return Sampled(np.zeros(0, np.int32), np.zeros(0, np.float32))
            answer = self.client.post(self.api.path, self.api.request(prompt, params, seeds[index]))
            source = f"{self.client.base_url}{self.api.path}, completion {index}"
            try:
                return check_completion(self.api.read(answer, prompt, params), params, self.vocab_size)
            except ServerError as error:
                raise ServerError(f"{source}: {error}") from error
            except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
                raise ServerError(
                    f"{source}: the answer is not of the form that was expected ({type(error).__name__}: {error}); it begins with "
                    f"{str(answer)[:200]}. Is --rollout_server right?"
                ) from error

        pool = concurrent.futures.ThreadPoolExecutor(min(self.concurrency, max(1, len(prompts))))
        try:
            return list(pool.map(complete, range(len(prompts))))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def check_completion(answer: Answer, params: SamplingParams, vocab_size: int | None) -> Sampled:
    """The completion, checked to be one that the student could have sampled with these settings.

    Raises:
        ServerError: it is not, and why.
    """
    ids, stops = list(answer.ids), set(params.stop_ids)
    for i in ids:
        if type(i) is not int or i < 0:
            raise ServerError(f"a token id is {i!r}, which is none.")
        if vocab_size is not None and i >= vocab_size:
            raise ServerError(
                f"a token id is {i}, but the student has {vocab_size} tokens; the server has another model."
            )
    reported = [None] * len(ids) if answer.logprobs is None else answer.logprobs
    logprobs = [np.nan if x is None else x for x in reported]
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
    if len(ids) > params.max_new_tokens:
        raise ServerError(f"it has {len(ids)} tokens, but at most {params.max_new_tokens} were asked for.")
    if stops.intersection(ids[:-1]):
        raise ServerError("it goes on behind a stop token; the server does not heed stop_token_ids.")
    if answer.finish == "length" and len(ids) < params.max_new_tokens:
        raise ServerError(
            f"it was cut at {len(ids)} of {params.max_new_tokens} tokens, because the server's window is full; raise its "
            "--max-model-len (vLLM) or --context-length (SGLang)."
        )
    return Sampled(np.asarray(ids, np.int32), np.asarray(logprobs, np.float32))


def _seeds(key: jax.Array, count: int) -> list[int]:
    """A seed in [0, 2^31) for each index, which depends on the key and the index alone."""
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, np.arange(count))
    return [int(bits) >> 1 for bits in np.asarray(jax.vmap(jax.random.bits)(keys))]
