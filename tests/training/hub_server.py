"""A small server that speaks as the Hugging Face hub does to whoever pushes: over HTTP, with git's and LFS's files."""

import base64
import contextlib
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import yaml

TOKEN = "hf_good"


class HubServer:
    """One server; `url` is where it is.

    Attributes:
      repositories: the files of each, by its full name.
      private: what `create` was asked for, by a repository's full name.
      asked: the method and path of every request.
      fault: the stage that fails ("create", "preupload", "lfs", "upload", "commit") and how: a status, or "cut".
    """

    url = ""

    def __init__(self):
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, str | None] = {}
        self.stored: dict[str, bytes] = {}  # LFS objects by their SHA-256
        self.asked: list[tuple[str, str]] = []
        self.fault: tuple[str, int | str] | None = None

    def answer(self, method, path, body):
        """The stage that a request belongs to, and the answer of a healthy server."""
        if path == "/api/repos/create":
            given = json.loads(body)
            name = f"{given['organization'] or 'me'}/{given['name']}"
            self.private.setdefault(name, given.get("visibility"))
            known = name in self.repositories
            self.repositories.setdefault(name, {})
            return "create", 409 if known else 200, {"url": f"{self.url}/{name}"}
        if path == "/api/validate-yaml":
            head = yaml.safe_load(json.loads(body)["content"].split("---")[1])
            return "validate", 200 if head else 400, {"errors": [], "warnings": []}
        if "/preupload/" in path:
            asked = [file["path"] for file in json.loads(body)["files"]]
            modes = ["lfs" if name.endswith(".safetensors") else "regular" for name in asked]
            found = [{"path": n, "uploadMode": m, "shouldIgnore": False} for n, m in zip(asked, modes)]
            return "preupload", 200, {"files": found}
        if path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            for one in objects:
                one["actions"] = {"upload": {"href": f"{self.url}/lfs/{one['oid']}"}}
            return "lfs", 200, {"transfer": "basic", "objects": objects}
        if method == "PUT":
            assert hashlib.sha256(body).hexdigest() == path.removeprefix("/lfs/")
            self.stored[path.removeprefix("/lfs/")] = body
            return "upload", 200, {}
        if "/commit/" in path:
            repository = path.removeprefix("/api/models/").partition("/commit/")[0]
            return "commit", 200, lambda: self.commit(repository, body)
        return "other", 404, {}

    def commit(self, repository, body):
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                assert value["encoding"] == "base64"
                self.repositories[repository][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.repositories[repository][value["path"]] = self.stored[value["oid"]]
        return {"commitUrl": f"{self.url}/{repository}/commit/1", "commitOid": "1" * 40}


@contextlib.contextmanager
def serving():
    """A server on a free port of this machine."""
    hub = HubServer()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path = self.path.partition("?")[0]
            hub.asked.append((self.command, path))
            stage, status, answer = hub.answer(self.command, path, body)
            if self.headers.get("Authorization") != f"Bearer {TOKEN}" and stage != "upload":
                status, answer = 401, {"error": "Invalid username or password."}
            elif hub.fault is not None and hub.fault[0] == stage:
                if hub.fault[1] == "cut":
                    self.close_connection = True
                    return
                status, answer = hub.fault[1], {"error": "It does not work."}
            data = json.dumps(answer() if callable(answer) else answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PUT = do_HEAD = handle_any

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
