"""JSON over HTTP, with patience for a server that is starting or busy, and errors that say what to look at."""

import asyncio
import contextlib
import email.utils
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx

ATTEMPTS = 5  # how often one question is put to a server that answers with a fault of its own (5xx)
_LONGEST_PAUSE = 8.0
_SHOWN = 400  # characters of a server's own words
_LONGEST_REPLY = 1 << 26  # bytes; completions take some hundred for each token


class ServerError(OSError):
    """A server that cannot be reached, or that answers with a fault or with something unexpected."""


class Refused(ServerError):
    """A server that will not answer this question (4xx)."""


class Client:
    """Sends requests to one server, from any number of threads; a `ServerError` says what went wrong.

    Refused and broken connections, and servers that ask for patience (429, 503 with Retry-After), are tried again until
    `timeout` is over, faults of the server's own (5xx) at most `ATTEMPTS` times; what the server refuses (4xx) is not
    repeated, and redirects are not followed. An `error` in the answer is one, whatever its status.

    Args:
        base_url: such as "http://localhost:8000"; a ValueError if it is no address of HTTP.
        timeout: seconds for a request, all attempts together.
        started: how such a server is started, for the errors.
        api_key: sent as a bearer token; None sends none.
        pause: seconds before the second attempt; doubled before each further one, up to 8.
    """

    def __init__(self, base_url: str, *, timeout: float, started="", api_key: str | None = None, pause: float = 0.5):
        try:
            address = httpx.URL(base_url)
        except httpx.InvalidURL:
            address = httpx.URL()
        if address.scheme not in ("http", "https") or not address.host:
            raise ValueError(f"the server's address is {base_url!r}; it must be one such as http://localhost:8000.")
        self.base_url, self.timeout, self.started, self.pause = base_url.rstrip("/"), timeout, started, pause
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else None
        limits = httpx.Limits(max_connections=None)  # the caller bounds the concurrency
        self._http = httpx.AsyncClient(headers=headers, limits=limits)
        # httpx counts the seconds between two reads; a coroutine can be given a time for the whole of an answer.
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="gold_jax client", daemon=True).start()

    def get(self, path: str) -> Any:
        """What the server answers to a GET, read as JSON."""
        return self._ask("GET", path)

    def post(self, path: str, body: Any = None) -> Any:
        """What the server answers to a POST of a JSON body (None: an empty one), read as JSON; None if it says nothing."""
        return self._ask("POST", path, body)

    def _ask(self, method: str, path: str, body: Any = None) -> Any:
        url = self.base_url + path
        deadline, pause, faults = time.monotonic() + self.timeout, self.pause, 0
        while True:
            wait = pause
            try:
                asked = self._send(method, url, body, max(0.001, deadline - time.monotonic()))
                answer, content = asyncio.run_coroutine_threadsafe(asked, self._loop).result()
                if answer.is_success:
                    return _read(url, answer, content)
                status = f"{url} answers {answer.status_code} {answer.reason_phrase}"
                if answer.has_redirect_location:
                    raise ServerError(f"{status} and sends on to {answer.headers['Location']}, which is not followed.")
                problem = f"{status}: {_words(content)}"
                after = _seconds(answer.headers.get("Retry-After"))
                if answer.status_code == 429 or (answer.status_code == 503 and after is not None):
                    wait = max(pause, after or 0.0)
                    problem += f" (asked again for {self.timeout:g} seconds); it has too much to do."
                elif answer.status_code < 500:
                    raise Refused(problem)
                else:
                    faults += 1
                    problem += f" (asked {faults} times); see the server's own log."
            except (TimeoutError, httpx.TimeoutException) as error:
                raise ServerError(
                    f"{url} has not answered within {self.timeout:g} seconds; raise --vllm_server_timeout if it is only "
                    "slow, or see the server's own log."
                ) from error
            except httpx.RequestError as error:
                if any(isinstance(e, socket.gaierror) and e.errno == socket.EAI_NONAME for e in _causes(error)):
                    raise ServerError(f"{url} cannot be reached: there is no host of that name.") from error
                problem = (
                    f"{url} cannot be reached ({_reason(error)}), tried for {self.timeout:g} seconds: is the server up, "
                    f"and are host and port right? {self.started}".rstrip()
                )
            if faults == ATTEMPTS or time.monotonic() + wait > deadline:
                raise ServerError(problem)
            time.sleep(wait)
            pause = min(2 * pause, _LONGEST_PAUSE)

    async def _send(self, method: str, url: str, body: Any, seconds: float) -> tuple[httpx.Response, bytes]:
        """One attempt: the head of the answer and all that follows it, within so many seconds."""
        content = bytearray()
        async with asyncio.timeout(seconds), self._http.stream(method, url, json=body, timeout=seconds) as answer:
            async for part in answer.aiter_bytes():
                content += part
                if len(content) > _LONGEST_REPLY:
                    raise ServerError(
                        f"{url} answers with more than {_LONGEST_REPLY >> 20} MiB: too much for an answer."
                    )
        return answer, bytes(content)


def _read(url: str, answer: httpx.Response, content: bytes) -> Any:
    """A successful answer as JSON; None where it says nothing."""
    try:
        said = json.loads(content) if content.strip() else None
    except (ValueError, RecursionError) as error:
        words = _cut(content.decode("utf-8", "replace"))
        raise ServerError(f"{url} answers with something that is not JSON: {words}") from error
    if isinstance(said, dict) and (said.get("error") or said.get("object") == "error"):
        raise ServerError(f"{url} answers {answer.status_code}, but with an error: {_words(content)}")
    return said


def _seconds(retry_after: str | None) -> float | None:
    """A Retry-After in seconds from now, which it gives as such or as a date; None where there is none that can be read."""
    with contextlib.suppress(ValueError):
        return float(retry_after or "")
    with contextlib.suppress(ValueError, OverflowError):  # a year that no calendar has
        date = email.utils.parsedate_tz(retry_after or "")
        return email.utils.mktime_tz(date) - time.time() if date else None
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, what caused it, what caused that, and so on."""
    while error is not None:
        yield error
        error = error.exceptions[0] if isinstance(error, BaseExceptionGroup) else error.__cause__ or error.__context__


def _reason(error: Exception) -> str:
    """The system's words, where it is the system that failed: "Connection refused"."""
    numbers = [e.errno for e in _causes(error) if isinstance(e, OSError) and (e.errno or 0) > 0]
    return os.strerror(numbers[-1]) if numbers else str(error) or type(error).__name__


def _words(content: bytes) -> str:
    """The server's own message, out of the forms in which vLLM, SGLang and FastAPI write one."""
    try:
        said = json.loads(content)
    except (ValueError, RecursionError):
        said = content.decode("utf-8", "replace")
    for name in ("error", "message", "detail"):
        while isinstance(said, dict) and name in said:
            said = said[name]
    return _cut(said if isinstance(said, str) else json.dumps(said, ensure_ascii=False))


def _cut(said: str) -> str:
    text = " ".join(said.split())
    return text[:_SHOWN] + "…" if len(text) > _SHOWN else text or "nothing"
