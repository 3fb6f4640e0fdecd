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
from gold_jax.serving.batcher import MOST_TOP, STOPPING, Batcher, QueueFull, Request, Tokens
from gold_jax.serving.protocol import RequestError, Wanted, read_request
from gold_jax.text.chat import ChatTokenizer

MOST_BYTES = 8 * 2**20  # of a body
_RETRY_SECONDS = 1


class _Choice:
    """One choice of a response, and how much of it was sent."""

    def __init__(self, chat: ChatTokenizer, wanted: Wanted, prompt: Any, ids: np.ndarray, index: int):
        self.chat, self.wanted, self.ids, self.index = chat, wanted, ids, index
        self.request: Request | None = None
        self.is_chat = isinstance(prompt, list) and isinstance(prompt[0], dict)
        self.prompt_text, self.prompt_offsets = ("", []) if self.is_chat else writing.text_of_prompt(chat, prompt, ids)
        self.writing = writing.Writing(chat, prompt if self.is_chat else self.prompt_text, wanted.stop)
        self.prompt_tokens: Tokens | None = None
        self.echoes = wanted.echo  # until the prompt is sent
        self.characters = self.tokens = 0  # sent so far

    def take(self) -> tuple[str, dict | None]:
        """The text that was not sent yet, and the log-probabilities of its tokens; None if they were not requested."""
        text, top = self.writing.text[self.characters :], self.wanted.top
        costs = None
        if top is not None and self.writing.ids:
            tokens, offsets = self.writing.costs(self.tokens)
            self.tokens += len(tokens.ids)
            if self.is_chat:
                costs = writing.chat_logprobs(self.chat, tokens, top)
            else:
                before = len(self.prompt_text) if self.wanted.echo else 0
                costs = writing.completion_logprobs(self.chat, tokens, [before + at for at in offsets], top)
        self.characters += len(text)
        if self.echoes:
            self.echoes, text = False, self.prompt_text + text
            if self.prompt_tokens is not None:
                told = writing.completion_logprobs(self.chat, self.prompt_tokens, self.prompt_offsets[1:], top)
                first = [writing.token_text(self.chat, int(self.ids[0]))], [None], [None], self.prompt_offsets[:1]
                costs = {name: [*one, *told[name], *(costs or {}).get(name, [])] for name, one in zip(told, first)}
        return text, costs


class _Answer:
    """The response to one HTTP request: its choices, the events of the batcher, and its format."""

    def __init__(self, wanted: Wanted, choices: list[_Choice], kind: str, model: str, batcher: Batcher):
        self.wanted, self.choices, self.kind, self.batcher = wanted, choices, kind, batcher
        self.events: asyncio.Queue = asyncio.Queue()
        name, prefix = ("chat.completion", "chatcmpl") if kind == "chat" else ("text_completion", "cmpl")
        self.head = {"id": f"{prefix}-{uuid.uuid4().hex}", "object": name, "created": int(time.time()), "model": model}

    def submit(self, max_length: int) -> None:
        """Submits the choices to the batcher; `QueueFull` if there is no room for all of them."""
        loop, wanted = asyncio.get_running_loop(), self.wanted

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
                max_tokens=room if wanted.max_tokens is None else wanted.max_tokens,
                seed=wanted.seed,
                index=choice.index % wanted.n,
                temperature=wanted.temperature,
                top_k=wanted.top_k,
                top_p=wanted.top_p,
                top=wanted.top or 0,
                score_prompt=wanted.echo and wanted.top is not None,
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
        """Yields a choice whenever it has grown, until all are finished; `ClientDisconnect` if the client is gone."""
        watch = asyncio.create_task(_gone(http))
        watch.add_done_callback(lambda _: self.events.put_nowait((None, "gone", None)))
        unfinished = [choice for choice in self.choices if not choice.writing.finish]
        try:
            for choice in self.choices:
                if choice not in unfinished:
                    yield choice
            while unfinished:
                choice, kind, value = await self.events.get()
                if kind == "gone":
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
        read = sum(len(choice.ids) for choice in self.choices[:: self.wanted.n])
        written = sum(len(choice.writing.ids) for choice in self.choices)
        return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}

    async def whole(self, http: HttpRequest) -> dict[str, Any]:
        """The response as one JSON object."""
        async for _ in self.changes(http):
            pass
        choices = []
        for choice in self.choices:
            text, costs = choice.take()
            said = {"message": {"role": "assistant", "content": text}} if self.kind == "chat" else {"text": text}
            choices.append({"index": choice.index, **said, "logprobs": costs, "finish_reason": choice.writing.finish})
        return self.head | {"choices": choices, "usage": self.usage()}

    async def stream(self, http: HttpRequest) -> AsyncIterator[str]:
        """The response as server-sent events."""
        head = self.head | ({"object": "chat.completion.chunk"} if self.kind == "chat" else {})

        def event(**values: Any) -> str:
            return f"data: {json.dumps(head | values)}\n\n"

        def chunk(choice: _Choice, said: dict, costs=None, finish=None) -> str:
            return event(choices=[{"index": choice.index, **said, "logprobs": costs, "finish_reason": finish}])

        try:
            if self.kind == "chat":
                for choice in self.choices:
                    yield chunk(choice, {"delta": {"role": "assistant", "content": ""}})
            async for choice in self.changes(http):
                text, costs = choice.take()
                if text or choice.writing.finish:
                    said = {"delta": {"content": text} if text else {}} if self.kind == "chat" else {"text": text}
                    yield chunk(choice, said, costs, choice.writing.finish)
            if self.wanted.include_usage:
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


async def _gone(http: HttpRequest) -> None:
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


def create_app(chat: ChatTokenizer, batcher: Batcher, name: str, vocab_size: int) -> Starlette:
    """The application that serves a batcher's model, with its tokenizer, under a name."""
    created, said = int(time.time()), set()
    reader = concurrent.futures.ThreadPoolExecutor(1)  # tokenizes outside the event loop, one request at a time

    def read(data: bytes, kind: str) -> tuple[Wanted, list[_Choice]]:
        """A parsed request and its choices, with prompts as tokens."""
        wanted = read_request(data, kind, name, MOST_TOP)
        for field in set(wanted.ignored) - said:
            said.add(field)
            print(f"note: the field {field} of requests changes nothing here and is ignored", file=sys.stderr)
        most = batcher.rows + batcher.queue_size
        if len(wanted.prompts) * wanted.n > most:
            raise RequestError(
                f"n times the prompts make {len(wanted.prompts) * wanted.n} sequences; at most {most} fit at once", "n"
            )
        choices, field = [], "messages" if kind == "chat" else "prompt"
        for at, prompt in enumerate(wanted.prompts):
            of = f"{field}[{at}]" if len(wanted.prompts) > 1 else field
            if kind == "chat" or isinstance(prompt, str):
                try:
                    ids = chat.encode_prompt(prompt, limit=batcher.max_length)
                except ValueError as error:
                    raise RequestError(f"{of} cannot be read: {error}", field) from None
            else:
                if wrong := [i for i in prompt if not 0 <= i < vocab_size]:
                    raise RequestError(
                        f"{of} holds the token {wrong[0]}; the model has tokens 0 to {vocab_size - 1}", field
                    )
                ids = np.array(prompt, np.int32)
            if not len(ids):
                raise RequestError(f"{of} has no tokens; it must have at least one", field)
            new = (kind == "chat" or 1) if wanted.max_tokens is None else wanted.max_tokens
            if len(ids) > batcher.max_length:
                raise RequestError(
                    f"{of} has more than the {batcher.max_length} tokens that fit here (--max_length); shorten it",
                    field,
                )
            if len(ids) + new > batcher.max_length:
                raise RequestError(
                    f"the tokens of {of} ({len(ids)}) and max_tokens ({new}) are more than the {batcher.max_length} that fit here (--max_length); "
                    f"max_tokens can be at most {batcher.max_length - len(ids)}",
                    "max_tokens",
                )
            choices += [_Choice(chat, wanted, prompt, ids, at * wanted.n + k) for k in range(wanted.n)]
        return wanted, choices

    async def answer(http: HttpRequest) -> Response:
        kind = "chat" if "chat" in http.url.path else "completions"
        try:
            data = await _body(http)
            wanted, choices = await asyncio.get_running_loop().run_in_executor(reader, read, data, kind)
            found = _Answer(wanted, choices, kind, name, batcher)
            found.submit(batcher.max_length)
            return _Stream(found, http) if wanted.stream else JSONResponse(await found.whole(http))
        except QueueFull:
            full = RequestError("too many requests wait; try again in a moment", status=503, kind="server_error")
            return JSONResponse(full.body(), 503, {"Retry-After": str(_RETRY_SECONDS)})
        except ClientDisconnect:
            return Response(status_code=499)

    async def models(http: HttpRequest) -> Response:
        entry = {
            "id": name,
            "object": "model",
            "created": created,
            "owned_by": "gold_jax",
            "max_model_len": batcher.max_length,
        }
        if (wanted := http.path_params.get("model", name)) != name:
            raise RequestError(f"the model {wanted!r} is not served here; {name!r} is", "model", 404)
        return JSONResponse(entry if "model" in http.path_params else {"object": "list", "data": [entry]})

    async def health(http: HttpRequest) -> Response:
        return JSONResponse({"status": "ok", "running": batcher.running, "waiting": batcher.waiting})

    def refused(http: HttpRequest, error: Exception) -> Response:
        if not isinstance(error, RequestError | HTTPException):
            says = f"{type(error).__name__}, see the server's log"
            error = RequestError(says, status=500, kind="server_error")
        elif isinstance(error, HTTPException):
            status, there = error.status_code, ", ".join(f"{route.path}" for route in routes)
            error = RequestError(f"{http.method} {http.url.path} is not served; there are {there}", status=status)
        return JSONResponse(error.body(), error.status)

    routes = [
        Route("/v1/completions", answer, methods=["POST"]),
        Route("/v1/chat/completions", answer, methods=["POST"]),
        Route("/v1/models", models),
        Route("/v1/models/{model:path}", models),
        Route("/health", health),
    ]
    return Starlette(
        routes=routes, exception_handlers={RequestError: refused, HTTPException: refused, Exception: refused}
    )
