"""A hub of one's own: as much of the Hugging Face hub as a download needs, on a local port."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"

Repositories = Mapping[str, Mapping[str, bytes]]


class HubServer(ThreadingHTTPServer):
    """Serves repositories, given as their files by name; notes which files were fetched."""

    daemon_threads = True

    def __init__(self, repositories: Repositories) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories = repositories
        self.fetched: list[str] = []

    @property
    def url(self) -> str:
        """For HF_ENDPOINT."""
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: HubServer

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, with_body: bool) -> None:
        parts = self.path.partition("?")[0].strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            repository, kind, revision = "/".join(parts[2:4]), parts[4], parts[5]
        else:
            repository, kind, revision = "/".join(parts[:2]), parts[2], parts[3]
        files = self.server.repositories.get(repository)
        if repository.startswith("gated/"):
            return self._fail(403, "GatedRepo")
        if files is None:
            return self._fail(404, "RepoNotFound")
        if revision not in ("main", COMMIT):
            return self._fail(404, "RevisionNotFound")
        if kind != "resolve":
            return self._send(_api(repository, kind, files), with_body)
        name = "/".join(parts[4:])
        if name not in files:
            return self._fail(404, "EntryNotFound")
        if with_body:
            self.server.fetched.append(name)
        etag = hashlib.sha1(files[name]).hexdigest()
        return self._send(files[name], with_body, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})

    def _fail(self, status: int, code: str) -> None:
        self._send(b"", False, {"X-Error-Code": code}, status)

    def _send(
        self,
        body: bytes,
        with_body: bool,
        headers: Mapping[str, str] | None = None,
        status: int = 200,
    ) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_body:
            self.wfile.write(body)


def _api(repository: str, kind: str, files: Mapping[str, bytes]) -> bytes:
    if kind == "tree":
        tree = [
            {
                "type": "file",
                "path": name,
                "size": len(content),
                "oid": hashlib.sha1(content).hexdigest(),
            }
            for name, content in files.items()
        ]
        return json.dumps(tree).encode()
    siblings = [{"rfilename": name} for name in files]
    return json.dumps({"id": repository, "sha": COMMIT, "siblings": siblings}).encode()


@contextmanager
def hub_of(repositories: Repositories) -> Iterator[HubServer]:
    """A running hub."""
    server = HubServer(repositories)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
