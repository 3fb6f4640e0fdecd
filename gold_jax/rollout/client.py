"""JSON over HTTP, with patience for a server that is starting or busy, and errors that say what to look at."""

import http.client
import json
import socket
import time
import urllib.error
import urllib.parse
import urllib.request
from typing import Any

ATTEMPTS = 5  # how often one question is put to a server that answers with a fault of its own (5xx)
_LONGEST_PAUSE = 8.0
_SHOWN = 400  # characters of a server's own words


class ServerError(OSError):
    """A server that cannot be reached, or that answers with a fault or with something else than was asked for."""


class Client:
    """Puts questions to one server.

    Refused and broken connections are tried again until `timeout` is over, faults of the server's own (5xx) at most
    `ATTEMPTS` times; what the server says is wrong with the question (4xx) is not asked again.

    Args:
        base_url: such as "http://localhost:8000".
        timeout: seconds in which a question must be answered, all attempts together.
        started: how such a server is started, for the errors.
        api_key: sent as a bearer token; None sends none.
        pause: seconds before the second attempt; doubled before each further one, up to 8.

    Raises:
        ValueError: the address is not one of HTTP.
    """

    def __init__(
        self, base_url: str, *, timeout: float, started: str = "", api_key: str | None = None, pause: float = 0.5
    ):
        self.base_url = base_url.rstrip("/")
        parts = urllib.parse.urlsplit(self.base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"the server's address is {base_url!r}; it must be one such as http://localhost:8000.")
        self.timeout, self.started, self.api_key, self.pause = timeout, started, api_key, pause

    def get(self, path: str) -> Any:
        """What the server answers to a GET, read as JSON.

        Raises:
            ServerError: see the class.
        """
        return self._ask(path, None)

    def post(self, path: str, body: Any = None) -> Any:
        """What the server answers to a POST of a JSON body (None: an empty one), read as JSON; None if it says nothing.

        Raises:
            ServerError: see the class.
        """
        return self._ask(path, b"" if body is None else json.dumps(body).encode())

    def _ask(self, path: str, data: bytes | None) -> Any:
        url = self.base_url + path
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        request = urllib.request.Request(url, data=data, headers=headers)
        deadline, pause, faults = time.monotonic() + self.timeout, self.pause, 0
        while True:
            try:
                with urllib.request.urlopen(request, timeout=max(0.001, deadline - time.monotonic())) as answer:
                    content = answer.read()
                break
            except urllib.error.HTTPError as error:
                faults += 1
                said = f"{url} answers {error.code} {error.reason}: {_words(_body(error))}"
                if error.code < 500:
                    raise ServerError(said) from error
                if faults == ATTEMPTS or time.monotonic() + pause > deadline:
                    raise ServerError(f"{said} (asked {faults} times); see the server's own log.") from error
            except (OSError, http.client.HTTPException) as error:  # URLError is an OSError
                reason = error.reason if isinstance(error, urllib.error.URLError) else error
                if isinstance(reason, TimeoutError):
                    raise ServerError(
                        f"{url} has not answered within {self.timeout:g} seconds; raise --vllm_server_timeout if it is only "
                        "slow, or see the server's own log."
                    ) from error
                if isinstance(reason, socket.gaierror) and reason.errno == socket.EAI_NONAME:
                    raise ServerError(f"{url} cannot be reached: there is no host of that name.") from error
                if time.monotonic() + pause > deadline:
                    raise ServerError(
                        f"{url} cannot be reached ({reason or type(reason).__name__}), tried for {self.timeout:g} seconds: is "
                        f"the server up, and are host and port right? {self.started}".rstrip()
                    ) from error
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
        if not content.strip():
            return None
        try:
            return json.loads(content)
        except ValueError as error:
            raise ServerError(f"{url} answers with something that is not JSON: {_cut(content)}") from error


def _body(error: urllib.error.HTTPError) -> bytes:
    try:
        return error.read()
    except (OSError, http.client.HTTPException):
        return b""


def _words(content: bytes) -> str:
    """The server's own message, out of the forms in which vLLM, SGLang and FastAPI write one."""
    try:
        said = json.loads(content)
    except ValueError:
        return _cut(content)
    for name in ("error", "message", "detail"):
        while isinstance(said, dict) and name in said:
            said = said[name]
    return _cut(said if isinstance(said, str) else json.dumps(said, ensure_ascii=False))


def _cut(said: str | bytes) -> str:
    text = " ".join((said.decode("utf-8", "replace") if isinstance(said, bytes) else said).split())
    return text[:_SHOWN] + "…" if len(text) > _SHOWN else text or "nothing"


__all__ = ["ATTEMPTS", "Client", "ServerError"]
