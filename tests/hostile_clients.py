"""Clients that do not behave, over sockets of their own, and the server process they are let at."""

from __future__ import annotations

import json
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

import httpx
from server_fixtures import TIMEOUT_S

SCRIPT = Path(__file__).with_name("server_process.py")


@dataclass(frozen=True)
class Answer:
    """What a server sent before it closed."""

    status: int
    headers: dict[str, str]
    body: bytes

    def error(self) -> dict[str, Any]:
        """The error in it, in OpenAI's form."""
        error: dict[str, Any] = json.loads(self.body)["error"]
        assert set(error) == {"message", "type", "param", "code"}
        return error


class RawClient:
    """A connection to a server, which sends and reads just what it is told."""

    def __init__(
        self, url: str, receive_buffer: int | None = None, tls: ssl.SSLContext | None = None
    ) -> None:
        address = urlsplit(url)
        assert address.hostname is not None
        plain = socket.socket()
        plain.settimeout(TIMEOUT_S)
        if receive_buffer is not None:
            plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        plain.connect((address.hostname, address.port))
        self._host = address.hostname
        self.socket = plain if tls is None else tls.wrap_socket(plain, server_hostname="localhost")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, data: bytes) -> bool:
        """Send `data`; returns whether the server still takes any."""
        try:
            self.socket.sendall(data)
        except OSError:
            return False
        return True

    def post(self, path: str, body: dict[str, Any], headers: str = "") -> None:
        """Send a whole request."""
        data = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: {self._host}\r\nContent-Length: {len(data)}\r\n"
        self.send(f"{head}{headers}\r\n".encode() + data)

    def read_until(self, end: bytes) -> bytes:
        """All that comes until it ends so."""
        data = bytearray()
        while not data.endswith(end):
            piece = self.socket.recv(1 << 16)
            assert piece, "the server closed"
            data += piece
        return bytes(data)

    def read_to_end(self) -> bytes:
        """All that comes until the server closes."""
        data = bytearray()
        with suppress(ConnectionError):
            while piece := self.socket.recv(1 << 16):
                data += piece
        return bytes(data)

    def answer(self) -> Answer:
        """The one answer that comes until the server closes."""
        head, _, body = self.read_to_end().partition(b"\r\n\r\n")
        first, *lines = head.decode().split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in lines)
        return Answer(int(first.split()[1]), headers, body)


@contextmanager
def server_process(
    folder: Path, drain_timeout_s: float = 20.0, **settings: Any
) -> Iterator[tuple[subprocess.Popen[str], httpx.Client]]:
    """A server process with the tiny model in `folder`, and a client of it that behaves."""
    given = json.dumps(settings, default=str)
    command = [sys.executable, str(SCRIPT), str(folder), str(drain_timeout_s), given]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as server:
        try:
            assert server.stdout is not None
            url = server.stdout.readline().strip()
            assert url.startswith("http")
            with httpx.Client(base_url=url, timeout=TIMEOUT_S, trust_env=False) as client:
                yield server, client
        finally:
            server.kill()
