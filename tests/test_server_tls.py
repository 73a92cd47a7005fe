"""HTTPS: with a certificate of our own, and with files that are of no use."""

from __future__ import annotations

import ssl
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from hostile_clients import RawClient
from server_fixtures import MODEL, TIMEOUT_S, RunningServer, serve, tiny_engine, wait_until

from stallfree.engine.engine import Engine
from stallfree.engine.settings import ServerSettings
from stallfree.errors import ConfigError
from stallfree.server.connection import MAX_LINGERING
from stallfree.server.lifecycle import check_start

COMPLETIONS = "/v1/completions"
HANDSHAKE_S = 0.6


def make_certificate(folder: Path, name: str, *options: str) -> tuple[Path, Path]:
    """A certificate for this machine, and its key."""
    cert, key = folder / f"{name}.crt", folder / f"{name}.key"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    files = ["-keyout", str(key), "-out", str(cert), "-days", "2"]
    subprocess.run(
        [*command, *subject, *files, *(options or ("-nodes",))], check=True, capture_output=True
    )
    return cert, key


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_certificate(tmp_path_factory.mktemp("tls"), "good")


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return tiny_engine(tmp_path_factory.mktemp("model"), max_model_len=16_384)


@pytest.fixture
def server(engine: Engine, certificate: tuple[Path, Path]) -> Iterator[RunningServer]:
    cert, key = certificate
    with serve(
        engine,
        tls_cert=cert,
        tls_key=key,
        header_timeout_s=HANDSHAKE_S,
        unread_timeout_s=HANDSHAKE_S,
        max_unread_bytes=8192,
    ) as running:
        assert running.url.startswith("https://127.0.0.1:")
        yield running
        wait_until(running.is_idle)
        engine.scheduler.check_integrity()


@pytest.fixture
def context(certificate: tuple[Path, Path]) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=certificate[0])


@pytest.fixture
def client(server: RunningServer, context: ssl.SSLContext) -> Iterator[httpx.Client]:
    with httpx.Client(
        base_url=server.url, verify=context, timeout=TIMEOUT_S, trust_env=False
    ) as made:
        yield made


def test_answers_and_streams(client: httpx.Client) -> None:
    body = {"model": MODEL, "prompt": "hi", "max_tokens": 50, "stream": True, "ignore_eos": True}
    with client.stream("POST", COMPLETIONS, json=body) as answer:
        lines = [line for line in answer.iter_lines() if line]
    assert len(lines) > 40
    assert lines[-1] == "data: [DONE]"
    big = {"model": MODEL, "prompt": [5] * 2000, "echo": True, "logprobs": 20, "max_tokens": 2}
    assert len(client.post(COMPLETIONS, json=big).content) > 400_000


def test_a_certificate_that_is_not_trusted(server: RunningServer) -> None:
    with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
        server.http.get("/health")


def test_handshakes_that_never_end(server: RunningServer, client: httpx.Client) -> None:
    plain = server.url.replace("https", "http")
    with ExitStack() as stack:
        idle = [stack.enter_context(RawClient(plain)) for _ in range(50)]
        for number, raw in enumerate(idle):
            raw.send(b"\x16\x03\x01\x02\x00\x01"[: number % 7])
        assert client.get("/health").status_code == 200
        for raw in idle:
            assert raw.read_to_end() == b""
    assert client.get("/health").status_code == 200


MAX_CONNECTIONS = 4


def test_handshakes_count_as_connections(
    engine: Engine, certificate: tuple[Path, Path], context: ssl.SSLContext
) -> None:
    """One of a few too many is told so, once it can be; many too many are closed unheard."""
    cert, key = certificate
    limits: dict[str, Any] = {"max_connections": MAX_CONNECTIONS, "header_timeout_s": 60.0}
    with (
        ExitStack() as lasting,
        serve(engine, tls_cert=cert, tls_key=key, **limits) as running,
        ExitStack() as stack,
    ):
        plain = running.url.replace("https", "http")
        state, handshakes = running.server.server_state, running.server._handshakes
        assert handshakes is not None
        for _ in range(MAX_CONNECTIONS):
            stack.enter_context(RawClient(plain))
        wait_until(lambda: len(handshakes) == MAX_CONNECTIONS)
        with RawClient(running.url, tls=context) as one_more:
            answer = one_more.answer()
        assert answer.status == 429
        assert "4 connections are open; the limit is 4" in answer.error()["message"]
        wait_until(lambda: not state.connections)
        for _ in range(MAX_LINGERING):
            stack.enter_context(RawClient(plain))
        wait_until(lambda: len(handshakes) == MAX_CONNECTIONS + MAX_LINGERING)
        for _ in range(3):
            with RawClient(plain) as unheard:
                assert unheard.read_to_end() == b""
        assert len(handshakes) == MAX_CONNECTIONS + MAX_LINGERING
        stack.close()
        wait_until(lambda: len(handshakes) == 0)
        with RawClient(running.url, tls=context) as again:
            again.send(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            assert again.answer().status == 200
        lasting.enter_context(RawClient(plain))  # keeps the server from nothing, not from ending
        wait_until(lambda: len(handshakes) == 1)


def test_a_request_right_behind_the_handshake(
    server: RunningServer, certificate: tuple[Path, Path]
) -> None:
    """Its bytes come in one piece with the end of the handshake, before there is a connection."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    trusting = ssl.create_default_context(cafile=certificate[0])
    tls = trusting.wrap_bio(incoming, outgoing, server_hostname="localhost")
    with RawClient(server.url.replace("https", "http")) as raw:
        while True:
            try:
                tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                raw.send(outgoing.read())
                incoming.write(raw.socket.recv(1 << 16))
        tls.write(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        raw.send(outgoing.read())
        incoming.write(raw.read_to_end())
        assert tls.read(1 << 16).startswith(b"HTTP/1.1 200")


def test_plain_http_is_not_taken(server: RunningServer, client: httpx.Client) -> None:
    with RawClient(server.url.replace("https", "http")) as raw:
        raw.send(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b"HTTP" not in raw.read_to_end()
    assert client.get("/health").status_code == 200


def test_slow_clients(server: RunningServer, context: ssl.SSLContext) -> None:
    with RawClient(server.url, tls=context) as raw:
        raw.send(b"GET /health HTTP/1.1\r\n")
        assert raw.answer().status == 408
    with RawClient(server.url, receive_buffer=4096, tls=context) as raw:
        body = {"model": MODEL, "prompt": "hi", "max_tokens": 16_000, "stream": True}
        raw.post(COMPLETIONS, {**body, "ignore_eos": True})
        wait_until(lambda: server.engine.num_running == 1)
        wait_until(server.is_idle, timeout_s=60)
        with suppress(ssl.SSLError):
            assert b"[DONE]" not in raw.read_to_end()
    wait_until(lambda: not server.server.server_state.connections)


def test_files_that_are_of_no_use(tmp_path: Path, certificate: tuple[Path, Path]) -> None:
    cert, key = certificate
    other_cert, other_key = make_certificate(tmp_path, "other")
    locked_cert, locked_key = make_certificate(tmp_path, "locked", "-passout", "pass:secret")
    broken = tmp_path / "broken.pem"
    broken.write_text("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
    for cert_file, key_file, said in (
        (cert, other_key, "the key is not that of the certificate"),
        (other_cert, key, "the key is not that of the certificate"),
        (locked_cert, locked_key, "the key is encrypted"),
        (key, key, "tls_cert holds no certificate in PEM"),
        (cert, cert, "tls_key holds no private key in PEM"),
        (broken, key, "cannot be used"),
    ):
        settings = ServerSettings(port=0, tls_cert=cert_file, tls_key=key_file)
        with pytest.raises(ConfigError, match=said) as caught:
            check_start(settings)
        assert str(cert_file) in str(caught.value)
    check_start(ServerSettings(port=0, tls_cert=cert, tls_key=key))


def test_one_without_the_other(certificate: tuple[Path, Path], tmp_path: Path) -> None:
    cert, key = certificate
    with pytest.raises(ConfigError, match="tls_cert is given without tls_key; HTTPS needs both"):
        ServerSettings(tls_cert=cert)
    with pytest.raises(ConfigError, match="tls_key is given without tls_cert"):
        ServerSettings(tls_key=key)
    with pytest.raises(ConfigError, match="there is no such file"):
        ServerSettings(tls_cert=tmp_path / "missing", tls_key=key)
