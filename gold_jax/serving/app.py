"""OpenAI's `/v1/models`, `/v1/completions` and `/v1/chat/completions` over a `Batcher`, as a Starlette application."""

import asyncio
import concurrent.futures
import contextlib
import json
import sys
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from gold_jax.serving import writing
from gold_jax.serving.batcher import STOPPING, Batcher, QueueFull, Request, Tokens
from gold_jax.serving.programs import MOST_TOP
from gold_jax.serving.protocol import ParsedRequest, RequestError, read_request
from gold_jax.text.chat import ChatTokenizer

MOST_BYTES = 8 * 2**20  # of a body
_RETRY_SECONDS = 1


class _Choice:
    """One choice of a response, and how much of it was sent."""

    def __init__(self, chat: ChatTokenizer, parsed: ParsedRequest, prompt: Any, ids: np.ndarray, index: int):
        self.chat, self.parsed, self.ids, self.index = chat, parsed, ids, index
        self.request: Request | None = None
        self.is_chat = not isinstance(prompt, str) and not _is_ids(prompt)
        self.prompt_text, self.prompt_offsets = ("", []) if self.is_chat else writing.text_of_prompt(chat, prompt, ids)
        self.writing = writing.Writing(chat, prompt if self.is_chat else self.prompt_text, parsed.stop)
        self.prompt_tokens: Tokens | None = None
        self.echoes = parsed.echo  # until the prompt is sent
        self.characters = self.tokens = 0  # sent so far

    def take(self) -> tuple[str, dict | None]:
        """The text that was not sent yet, and the log-probabilities of its tokens; None if they were not requested."""
        text, top = self.writing.text[self.characters :], self.parsed.top
        logprobs = None
        if top is not None and self.writing.ids:
            tokens, offsets = self.writing.ready(self.tokens)
            self.tokens += len(tokens.ids)
            if self.is_chat:
                logprobs = writing.chat_logprobs(self.chat, tokens, top)
            else:
                before = len(self.prompt_text) if self.parsed.echo else 0
                logprobs = writing.completion_logprobs(self.chat, tokens, [before + at for at in offsets], top)
        self.characters += len(text)
        if self.echoes:
            self.echoes, text = False, self.prompt_text + text
            if self.prompt_tokens is not None:
                rest = writing.completion_logprobs(self.chat, self.prompt_tokens, self.prompt_offsets[1:], top)
                first = [writing.token_text(self.chat, int(self.ids[0]))], [None], [None], self.prompt_offsets[:1]
                prompt = {name: [*one, *rest[name]] for name, one in zip(rest, first)}
                logprobs = {name: [*values, *(logprobs or {}).get(name, [])] for name, values in prompt.items()}
        return text, logprobs


class _Answer:
    """The response to one HTTP request: its choices, the events of the batcher, and its format."""

    def __init__(self, parsed: ParsedRequest, choices: list[_Choice], kind: str, model: str, batcher: Batcher):
        self.parsed, self.choices, self.kind, self.batcher = parsed, choices, kind, batcher
        self.events: asyncio.Queue = asyncio.Queue()
        name, prefix = ("chat.completion", "chatcmpl") if kind == "chat" else ("text_completion", "cmpl")
        self.head = {"id": f"{prefix}-{uuid.uuid4().hex}", "object": name, "created": int(time.time()), "model": model}

    def submit(self, max_length: int) -> None:
        """Submits the choices to the batcher; `QueueFull` if there is no room for all of them."""
        loop, parsed = asyncio.get_running_loop(), self.parsed

        def receiver(choice):
            def receive(kind, value):
                with contextlib.suppress(RuntimeError):  # the event loop is closed
                    loop.call_soon_threadsafe(self.events.put_nowait, (choice, kind, value))

            return receive

        for choice in self.choices:
            room = max_length - len(choice.ids)
            choice.request = Request(
                prompt=choice.ids,
                receive=receiver(choice),
                max_tokens=room if parsed.max_tokens is None else parsed.max_tokens,
                seed=parsed.seed,
                index=choice.index % parsed.n,
                temperature=parsed.temperature,
                top_k=parsed.top_k,
                top_p=parsed.top_p,
                top=parsed.top or 0,
                score_prompt=parsed.echo and parsed.top is not None,
            )
            if choice.request.max_tokens == 0 and not choice.request.score_prompt:
                choice.writing.end("length")
        self.batcher.submit([c.request for c in self.choices if not c.writing.finish])

    def cancel(self) -> None:
        """Cancels the choices that are not finished."""
        for choice in self.choices:
            if not choice.writing.finish:
                self.batcher.cancel(choice.request)

    async def changes(self, http: HttpRequest) -> AsyncIterator[_Choice]:
        """Yields a choice whenever it has grown, until all are finished; `ClientDisconnect` if the client disconnects."""
        watch = asyncio.create_task(_disconnected(http))
        watch.add_done_callback(lambda _: self.events.put_nowait((None, "disconnected", None)))
        unfinished = [choice for choice in self.choices if not choice.writing.finish]
        try:
            for choice in self.choices:
                if choice not in unfinished:
                    yield choice
            while unfinished:
                choice, kind, value = await self.events.get()
                if kind == "disconnected":
                    raise ClientDisconnect
                if choice not in unfinished:  # it was cancelled
                    continue
                if kind == "error":
                    raise RequestError(value, status=503 if value == STOPPING else 500, kind="server_error")
                if kind == "prompt":
                    choice.prompt_tokens = value
                elif kind == "tokens":
                    choice.writing.add(value)
                else:
                    choice.writing.end(value)
                if choice.writing.finish:
                    unfinished.remove(choice)
                    if kind != "end":
                        self.batcher.cancel(choice.request)
                yield choice
        finally:
            watch.cancel()
            self.cancel()

    def usage(self) -> dict[str, int]:
        """The numbers of prompt and completion tokens."""
        read = sum(len(choice.ids) for choice in self.choices[:: self.parsed.n])
        written = sum(len(choice.writing.ids) for choice in self.choices)
        return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}

    async def complete(self, http: HttpRequest) -> dict[str, Any]:
        """The response as one JSON object."""
        async for _ in self.changes(http):
            pass
        choices = []
        for choice in self.choices:
            text, logprobs = choice.take()
            content = {"message": {"role": "assistant", "content": text}} if self.kind == "chat" else {"text": text}
            choices.append(
                {"index": choice.index, **content, "logprobs": logprobs, "finish_reason": choice.writing.finish}
            )
        return self.head | {"choices": choices, "usage": self.usage()}

    async def stream(self, http: HttpRequest) -> AsyncIterator[str]:
        """The response as server-sent events."""
        head = self.head | ({"object": "chat.completion.chunk"} if self.kind == "chat" else {})

        def event(**values: Any) -> str:
            return f"data: {json.dumps(head | values)}\n\n"

        def chunk(choice: _Choice, content: dict, logprobs=None, finish=None) -> str:
            return event(choices=[{"index": choice.index, **content, "logprobs": logprobs, "finish_reason": finish}])

        try:
            if self.kind == "chat":
                for choice in self.choices:
                    yield chunk(choice, {"delta": {"role": "assistant", "content": ""}})
            async for choice in self.changes(http):
                text, logprobs = choice.take()
                if text or choice.writing.finish:
                    content = {"delta": {"content": text} if text else {}} if self.kind == "chat" else {"text": text}
                    yield chunk(choice, content, logprobs, choice.writing.finish)
            if self.parsed.include_usage:
                yield event(choices=[], usage=self.usage())
            yield "data: [DONE]\n\n"
        except RequestError as error:
            yield f"data: {json.dumps(error.body())}\n\n"


class _Stream(StreamingResponse):
    """Server-sent events of a response, which cancels its choices however it ends."""

    def __init__(self, answer: _Answer, http: HttpRequest):
        super().__init__(answer.stream(http), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self.answer = answer

    async def __call__(self, scope, receive, send) -> None:
        try:
            with contextlib.suppress(ClientDisconnect, OSError):
                await super().__call__(scope, receive, send)
        finally:
            self.answer.cancel()


async def _disconnected(http: HttpRequest) -> None:
    """Returns when the client has closed the connection; its body must have been read."""
    while (await http.receive())["type"] != "http.disconnect":
        pass


async def _body(http: HttpRequest) -> bytes:
    data = bytearray()
    async for part in http.stream():
        data += part
        if len(data) > MOST_BYTES:
            raise RequestError(f"the body is longer than {MOST_BYTES} bytes", status=413)
    return bytes(data)


def _is_ids(prompt: Any) -> bool:
    return isinstance(prompt, list) and isinstance(prompt[0], int)


class _Service:
    """The endpoints of a batcher's model, with its tokenizer, under a name."""

    def __init__(self, chat: ChatTokenizer, batcher: Batcher, name: str, vocab_size: int):
        self.chat, self.batcher, self.name, self.vocab_size = chat, batcher, name, vocab_size
        self.created = int(time.time())
        self.logged: set[str] = set()  # ignored fields of requests
        # Tokenizes outside the event loop, one request at a time.
        self.reader = concurrent.futures.ThreadPoolExecutor(1)

    async def answer(self, http: HttpRequest) -> Response:
        """/v1/completions and /v1/chat/completions."""
        kind = "chat" if "chat" in http.url.path else "completions"
        try:
            data = await _body(http)
            parsed, choices = await asyncio.get_running_loop().run_in_executor(self.reader, self._read, data, kind)
            answer = _Answer(parsed, choices, kind, self.name, self.batcher)
            answer.submit(self.batcher.max_length)
            return _Stream(answer, http) if parsed.stream else JSONResponse(await answer.complete(http))
        except QueueFull:
            full = RequestError("too many requests wait; try again in a moment", status=503, kind="server_error")
            return JSONResponse(full.body(), 503, {"Retry-After": str(_RETRY_SECONDS)})
        except ClientDisconnect:
            return Response(status_code=499)

    async def models(self, http: HttpRequest) -> Response:
        """/v1/models and /v1/models/NAME."""
        if (requested := http.path_params.get("model", self.name)) != self.name:
            raise RequestError(f"the model {requested!r} is not served here; {self.name!r} is", "model", 404)
        entry = {"id": self.name, "object": "model", "created": self.created, "owned_by": "gold_jax"}
        entry["max_model_len"] = self.batcher.max_length
        return JSONResponse(entry if "model" in http.path_params else {"object": "list", "data": [entry]})

    async def health(self, http: HttpRequest) -> Response:
        """/health: how many sequences run and wait."""
        return JSONResponse({"status": "ok", "running": self.batcher.running, "waiting": self.batcher.waiting})

    def _read(self, data: bytes, kind: str) -> tuple[ParsedRequest, list[_Choice]]:
        """A parsed request and its choices, with prompts as tokens."""
        parsed, longest = read_request(data, kind, self.name, MOST_TOP), self.batcher.max_length
        for field in set(parsed.ignored) - self.logged:
            self.logged.add(field)
            print(f"note: the field {field} of requests changes nothing here and is ignored", file=sys.stderr)
        count, most = len(parsed.prompts) * parsed.n, self.batcher.rows + self.batcher.queue_size
        if count > most:
            raise RequestError(f"n times the prompts make {count} sequences; at most {most} fit at once", "n")
        choices, field = [], "messages" if kind == "chat" else "prompt"
        new = (kind == "chat" or 1) if parsed.max_tokens is None else parsed.max_tokens
        for at, prompt in enumerate(parsed.prompts):
            name = f"{field}[{at}]" if len(parsed.prompts) > 1 else field
            ids = self._encode(prompt, field, name)
            if len(ids) + new > longest:
                raise RequestError(
                    f"the tokens of {name} ({len(ids)}) and max_tokens ({new}) are more than the {longest} that fit "
                    f"here (--max_length); max_tokens can be at most {longest - len(ids)}",
                    "max_tokens",
                )
            choices += [_Choice(self.chat, parsed, prompt, ids, at * parsed.n + k) for k in range(parsed.n)]
        return parsed, choices

    def _encode(self, prompt: Any, field: str, name: str) -> np.ndarray:
        """A prompt as tokens, int32 [P], 1 to `max_length` of them, else a `RequestError` that calls it `name`."""
        longest = self.batcher.max_length
        if _is_ids(prompt):
            if wrong := [i for i in prompt if not 0 <= i < self.vocab_size]:
                has = f"the model has tokens 0 to {self.vocab_size - 1}"
                raise RequestError(f"{name} holds the token {wrong[0]}; {has}", field)
            ids = np.array(prompt, np.int32)
        else:
            try:
                ids = self.chat.encode_prompt(prompt, limit=longest)
            except ValueError as error:
                raise RequestError(f"{name} cannot be read: {error}", field) from None
        if not len(ids):
            raise RequestError(f"{name} has no tokens; it must have at least one", field)
        if len(ids) > longest:
            message = f"{name} has more than the {longest} tokens that fit here (--max_length); shorten it"
            raise RequestError(message, field)
        return ids


def _error_response(http: HttpRequest, error: Exception) -> Response:
    """Any error in OpenAI's format."""
    headers = error.headers if isinstance(error, HTTPException) else None  # Allow, for another method
    if isinstance(error, HTTPException):
        status, paths = error.status_code, ", ".join(f"{route.path}" for route in http.app.routes)
        error = RequestError(f"{http.method} {http.url.path} is not served; there are {paths}", status=status)
    elif not isinstance(error, RequestError):
        message = f"{type(error).__name__}, see the server's log"
        error = RequestError(message, status=500, kind="server_error")
    return JSONResponse(error.body(), error.status, headers)


def create_app(chat: ChatTokenizer, batcher: Batcher, name: str, vocab_size: int) -> Starlette:
    """The application that serves a batcher's model, with its tokenizer, under a name."""
    service = _Service(chat, batcher, name, vocab_size)
    routes = [
        Route("/v1/completions", service.answer, methods=["POST"]),
        Route("/v1/chat/completions", service.answer, methods=["POST"]),
        Route("/v1/models", service.models),
        Route("/v1/models/{model:path}", service.models),
        Route("/health", service.health),
    ]
    handlers = dict.fromkeys((RequestError, HTTPException, Exception), _error_response)
    return Starlette(routes=routes, exception_handlers=handlers)
