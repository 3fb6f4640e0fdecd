"""JSON over HTTP, with patience for a server that is starting or busy, and errors that say what to look at."""

import json
import socket
import time
from typing import Any

import httpx

ATTEMPTS = 5  # how often one question is put to a server that answers with a fault of its own (5xx)
_LONGEST_PAUSE = 8.0
_SHOWN = 400  # characters of a server's own words


class ServerError(OSError):
    """A server that cannot be reached, or that answers with a fault or with something unexpected."""


class Client:
    """Sends requests to one server, from any number of threads; a `ServerError` says what went wrong.

    Refused and broken connections are tried again until `timeout` is over, faults of the server's own (5xx) at most
    `ATTEMPTS` times; requests that the server refuses (4xx) are not repeated.

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
        self._http = httpx.Client(headers=headers, limits=limits, follow_redirects=True)

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
            try:
                left = max(0.001, deadline - time.monotonic())
                answer = self._http.request(method, url, json=body, timeout=left)
                if answer.is_success:
                    break
                faults += 1
                problem = f"{url} answers {answer.status_code} {answer.reason_phrase}: {_words(answer.content)}"
                if answer.status_code < 500:
                    raise ServerError(problem)
                problem += f" (asked {faults} times); see the server's own log."
            except httpx.TimeoutException as error:
                raise ServerError(
                    f"{url} has not answered within {self.timeout:g} seconds; raise --vllm_server_timeout if it is only "
                    "slow, or see the server's own log."
                ) from error
            except httpx.TransportError as error:
                if _no_such_host(error):
                    raise ServerError(f"{url} cannot be reached: there is no host of that name.") from error
                problem = (
                    f"{url} cannot be reached ({error or type(error).__name__}), tried for {self.timeout:g} seconds: is "
                    f"the server up, and are host and port right? {self.started}".rstrip()
                )
            if faults == ATTEMPTS or time.monotonic() + pause > deadline:
                raise ServerError(problem)
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
        try:
            return answer.json() if answer.content.strip() else None
        except ValueError as error:
            raise ServerError(f"{url} answers with something that is not JSON: {_cut(answer.text)}") from error


def _no_such_host(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, socket.gaierror) and error.errno == socket.EAI_NONAME:
            return True
        error = error.__cause__ or error.__context__
    return False


def _words(content: bytes) -> str:
    """The server's own message, out of the forms in which vLLM, SGLang and FastAPI write one."""
    try:
        said = json.loads(content)
    except ValueError:
        said = content.decode("utf-8", "replace")
    for name in ("error", "message", "detail"):
        while isinstance(said, dict) and name in said:
            said = said[name]
    return _cut(said if isinstance(said, str) else json.dumps(said, ensure_ascii=False))


def _cut(said: str) -> str:
    text = " ".join(said.split())
    return text[:_SHOWN] + "…" if len(text) > _SHOWN else text or "nothing"
