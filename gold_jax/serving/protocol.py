"""Requests in OpenAI's format, parsed into `ParsedRequest`, and errors in OpenAI's format."""

import dataclasses
import json
import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gold_jax.config.trl_compat import nearest
from gold_jax.text.template import Conversation, refused_variables
from gold_jax.wording import quoted

#: Fields that do not change the answer; each is logged when it is first received.
IGNORED = (
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "parallel_tool_calls", "verbosity",
)  # fmt: skip
#: Unsupported fields that would change the answer, with the values that turn them off.
UNSUPPORTED: Mapping[str, tuple] = {
    "best_of": (None, 1), "suffix": (None, ""), "presence_penalty": (None, 0), "frequency_penalty": (None, 0),
    "logit_bias": (None, {}), "response_format": (None, {"type": "text"}), "tools": (None, []), "functions": (None, []),
    "tool_choice": (None, "none", "auto"), "function_call": (None, "none", "auto"), "modalities": (None, ["text"]),
    "audio": (None,), "prediction": (None,), "reasoning_effort": (None,), "web_search_options": (None,), "min_p": (None, 0),
    "repetition_penalty": (None, 1), "min_tokens": (None, 0), "ignore_eos": (None, False), "use_beam_search": (None, False),
    "skip_special_tokens": (None, True), "add_special_tokens": (None, True), "continue_final_message": (None, False),
    "add_generation_prompt": (None, True), "length_penalty": (None, 1), "stop_token_ids": (None, []),
}  # fmt: skip
# fmt: off
_COMMON = (
    "model", "n", "max_tokens", "temperature", "top_p", "top_k", "seed", "stop", "stream", "stream_options", "logprobs",
)
# fmt: on
FIELDS = {
    "completions": (*_COMMON, "prompt", "echo"),
    "chat": (*_COMMON, "messages", "max_completion_tokens", "top_logprobs", "chat_template_kwargs"),
}
_DEFAULT_TOKENS = 16  # OpenAI's default of `max_tokens` in /v1/completions
_MOST_STOPS, _MOST_N = 16, 128
_ROLES = ("system", "developer", "user", "assistant", "tool")


class RequestError(Exception):
    """A refused request: a message that says what would be right, the field at fault or None, and an HTTP status."""

    def __init__(self, message: str, field: str | None = None, status: int = 400, kind: str = "invalid_request_error"):
        super().__init__(message)
        self.field, self.status, self.kind = field, status, kind

    def body(self) -> dict[str, Any]:
        """The error in OpenAI's format."""
        message, field = (x and x.encode(errors="replace").decode() for x in (str(self), self.field))
        return {"error": {"message": message, "type": self.kind, "param": field, "code": None}}


@dataclasses.dataclass(frozen=True)
class ParsedRequest:
    """A parsed request."""

    prompts: list  # each a text, a list of token ids, or messages
    max_tokens: int | None  # None: as many as fit
    n: int
    temperature: float
    top_p: float
    top_k: int
    seed: int
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool  # whether a stream ends with the number of tokens
    top: int | None  # how many of the most likely tokens are returned; None: no log-probabilities
    echo: bool
    ignored: tuple[str, ...]  # received fields of `IGNORED`


def read_request(data: bytes, kind: str, served: str, most_top: int) -> ParsedRequest:
    """Parses the body of a request of `kind` "completions" or "chat"; `RequestError` if it cannot be answered.

    `served` is the model's name, `most_top` the most top tokens that can be requested.
    """
    try:
        body = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the body is not JSON that can be read: {quoted(str(error), plain=True)}") from None
    if not isinstance(body, dict):
        raise RequestError(f"the body is {quoted(body)}; it must be a JSON object")
    _check_names(body, FIELDS[kind])
    field = _Fields(body)
    model = field.read("model", str, "a text", served)
    if model != served:
        raise RequestError(f"the model {quoted(model)} is not served here; {quoted(served)} is", "model", 404)
    prompts, max_tokens, top, echo = (_read_chat if kind == "chat" else _read_completion)(field, most_top)
    stop = _stop_strings(body.get("stop"))
    stream, include_usage = _stream_options(field)
    return ParsedRequest(
        prompts=prompts,
        max_tokens=max_tokens,
        n=field.whole("n", 1, 1, _MOST_N),
        temperature=field.number(
            "temperature", 1.0, lambda x: 0 <= x <= 100, "from 0 (the likeliest token always) to 100"
        ),
        top_p=field.number("top_p", 1.0, lambda x: 0 < x <= 1, "more than 0 and at most 1 (1: off)"),
        top_k=max(0, field.whole("top_k", 0, -1)),
        seed=field.whole("seed", secrets.randbits(31), -(2**63), 2**63 - 1),
        stop=stop,
        stream=stream,
        include_usage=include_usage,
        top=top,
        echo=echo,
        ignored=tuple(name for name in body if name in IGNORED),
    )


def _check_names(body: Mapping[str, Any], known: Sequence[str]) -> None:
    """`RequestError` for a field that is unknown, or unsupported and not turned off."""
    for name, value in body.items():
        if name in UNSUPPORTED and not _switched_off(value, UNSUPPORTED[name]):
            off = json.dumps(UNSUPPORTED[name][-1])
            instead = "leave it out" + f" (or pass {off})" * (off != "null")
            raise RequestError(f"{name} is not supported here; {instead}", name)
        if name not in known and name not in UNSUPPORTED and name not in IGNORED:
            raise RequestError(f"there is no field {quoted(name)}{nearest(name, known)}", name[:100])


def _read_chat(field: "_Fields", most_top: int) -> tuple[list, int | None, int | None, bool]:
    """`prompts`, `max_tokens`, `top` and `echo` of a chat."""
    prompts: list = [_messages(field.body.get("messages"))]
    if kwargs := field.read("chat_template_kwargs", dict, "a JSON object", {}):
        if wrong := refused_variables(kwargs):
            raise RequestError(f"chat_template_kwargs has {wrong}", "chat_template_kwargs")
        prompts = [Conversation(prompts[0], template_kwargs=kwargs)]
    newer, limit = field.whole("max_completion_tokens", None, 1), field.whole("max_tokens", None, 1)
    if None not in (newer, limit) and newer != limit:
        raise RequestError(f"max_tokens is {limit} and max_completion_tokens {newer}; leave one out", "max_tokens")
    logprobs = field.read("logprobs", bool, "true or false", False)
    top = field.whole("top_logprobs", 0, 0, most_top)
    if top and not logprobs:
        raise RequestError("top_logprobs needs logprobs: true", "top_logprobs")
    return prompts, limit or newer, top if logprobs else None, False


def _read_completion(field: "_Fields", most_top: int) -> tuple[list, int | None, int | None, bool]:
    """`prompts`, `max_tokens`, `top` and `echo` of a completion."""
    prompts, echo = _prompts(field.body.get("prompt")), field.read("echo", bool, "true or false", False)
    limit, top = field.whole("max_tokens", _DEFAULT_TOKENS, 0), field.whole("logprobs", None, 0, most_top)
    if limit == 0 and not echo:
        only = "max_tokens is 0, which only scores a prompt, with echo: true; it must be at least 1"
        raise RequestError(only, "max_tokens")
    return prompts, limit, top, echo


def _stop_strings(stop: Any) -> tuple[str, ...]:
    found = [] if stop is None else [stop] if isinstance(stop, str) else stop
    if not isinstance(found, list) or len(found) > _MOST_STOPS or not all(isinstance(s, str) and s for s in found):
        right = f"it must be a string or up to {_MOST_STOPS} of them, none empty"
        raise RequestError(f"stop is {quoted(found)}; {right}", "stop")
    return tuple(found)


def _stream_options(field: "_Fields") -> tuple[bool, bool]:
    """`stream` and `include_usage`."""
    options = field.read("stream_options", dict, "a JSON object", {})
    stream = field.read("stream", bool, "true or false", False)
    if options and not stream:
        raise RequestError("stream_options needs stream: true", "stream_options")
    for name in options:
        if name not in ("include_usage", "include_obfuscation"):
            raise RequestError(f"stream_options has no {quoted(name)}; it may have include_usage", "stream_options")
    return stream, _Fields(options).read("include_usage", bool, "true or false", False)


def _switched_off(value: Any, offs: tuple) -> bool:
    """Whether a value turns a field off; true and false do not equal 1 and 0."""
    return any(value == off and isinstance(value, bool) == isinstance(off, bool) for off in offs)


class _Fields:
    """The fields of a body; null counts as missing."""

    def __init__(self, body: Mapping[str, Any]):
        self.body = body

    def read(self, name: str, kind: type, words: str, default: Any) -> Any:
        value = self.body.get(name)
        if value is None:
            return default
        if not isinstance(value, kind):
            raise RequestError(f"{name} is {quoted(value)}; it must be {words}", name)
        return value

    def whole(self, name: str, default: Any, least: int, most: int = 2**31 - 1) -> Any:
        value = self.body.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            words = f"at least {least}" if most == 2**31 - 1 else f"from {least} to {most}"
            raise RequestError(f"{name} is {quoted(value)}; it must be a whole number, {words}", name)
        return value

    def number(self, name: str, default: float, holds: Callable[[float], bool], words: str) -> float:
        value = self.body.get(name)
        if value is None:
            return default
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not math.isfinite(value)
            or not holds(value)
        ):
            raise RequestError(f"{name} is {quoted(value)}; it must be a number, {words}", name)
        return float(value)


def _prompts(prompt: Any) -> list:
    """A text, texts, token ids, or lists of them."""
    ids = lambda x: isinstance(x, list) and x and all(type(i) is int for i in x)  # noqa: E731
    if isinstance(prompt, str) or ids(prompt):
        return [prompt]
    if isinstance(prompt, list) and prompt and (all(isinstance(p, str) for p in prompt) or all(map(ids, prompt))):
        return prompt
    raise RequestError(
        f"prompt is {_shown(prompt)}; it must be a text, a list of texts, a list of token ids, or a list of these",
        "prompt",
    )


def _shown(value: Any) -> str:
    return "missing" if value is None else quoted(value)


def _messages(messages: Any) -> list[dict]:
    """Messages as chat templates take them: text parts are joined."""
    if not isinstance(messages, list) or not messages:
        raise RequestError(f"messages is {_shown(messages)}; it must be a list of messages", "messages")
    found = []
    for at, message in enumerate(messages):
        name = f"messages[{at}]"
        if not isinstance(message, dict) or message.get("role") not in _ROLES:
            raise RequestError(f"{name} is {quoted(message)}; it must have a role, one of {', '.join(_ROLES)}", name)
        content = message.get("content")
        if isinstance(content, list):
            if not all(
                isinstance(p, dict) and p.get("type") == "text" and isinstance(p.get("text"), str) for p in content
            ):
                raise RequestError(
                    f"a part of {name}.content is not text; only parts of type text are supported", f"{name}.content"
                )
            content = "".join(part["text"] for part in content)
        if not isinstance(content, str):
            raise RequestError(f"{name}.content is {quoted(content)}; it must be a text", f"{name}.content")
        unread = [
            key for key in message if key not in ("role", "content", "name") and message[key] not in (None, [], "")
        ]
        if unread:
            raise RequestError(f"{name}.{unread[0]} is not supported here; leave it out", f"{name}.{unread[0]}"[:100])
        found.append({**{k: v for k, v in message.items() if k in ("role", "name")}, "content": content})
    return found
