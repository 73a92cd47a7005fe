"""What a soak sends: requests of every kind, good and hostile, each with what may come of it.

All of it comes from a seed. A hostile request is one that no client should send: a body that is no
JSON, values of the wrong type, bytes that are no HTTP, half a request.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from load import make_prompt

OK, BAD = frozenset({200}), frozenset({400, 404, 405, 413, 415, 422})
TOO_LARGE = frozenset({413})
FULL = frozenset({429})  # too much waits, which at twice the capacity is no fault
ANY: frozenset[int] = frozenset()
HUGE_BYTES = 3 << 20
LEAVES = 0.25  # share of good requests whose client does not wait for the end
MOST_SECONDS = 6.0  # that a client waits before it leaves


@dataclass(frozen=True, slots=True)
class Sending:
    """One connection.

    Attributes:
        kind: for the table.
        payload: all bytes that are sent.
        statuses: what the answer may be; empty if there need not be one.
        choices: completions that are asked for; 0 if the server is to refuse it.
        leaves_after_s: when its client closes the connection, if it does.
        may_starve: it is of tier `flex`, which at twice the capacity may wait for ever.
    """

    kind: str
    payload: bytes
    statuses: frozenset[int]
    choices: int = 0
    leaves_after_s: float | None = None
    may_starve: bool = False


def http_request(
    path: str, content: bytes, method: str = "POST", content_type: str = "application/json"
) -> bytes:
    """The bytes of a request whose connection ends with the answer."""
    head = (
        f"{method} {path} HTTP/1.1\r\nHost: soak\r\nContent-Type: {content_type}\r\n"
        f"Content-Length: {len(content)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + content


def good(draws: random.Random, model: str, *, most_words: int, most_tokens: int) -> Sending:
    """A completion or a chat with fields of all kinds."""
    words = min(most_words, max(1, round(draws.lognormvariate(3.0, 1.2))))
    tokens = min(most_tokens, max(1, round(draws.lognormvariate(2.8, 0.8))))
    n = draws.choice((1, 1, 1, 1, 2, 3))
    text = make_prompt(words, draws.getrandbits(32))
    body: dict[str, Any] = {"model": model, "max_tokens": tokens, "n": n}
    body |= {"temperature": draws.choice((0, 0.7, 1.0)), "stream": draws.random() < 0.6}
    if draws.random() < 0.3:
        body["stop"] = draws.sample(("\n", ". ", "the", "river"), draws.randint(1, 3))
    if draws.random() < 0.5:
        body["service_tier"] = draws.choice(("default", "flex", "flex", "auto"))
    if draws.random() < 0.2:
        body |= {"seed": draws.getrandbits(31), "top_p": 0.9, "frequency_penalty": 0.5}
    if body["stream"] and draws.random() < 0.5:
        body["stream_options"] = {"include_usage": True}
    prompts = 1
    if draws.random() < 0.5:
        path, kind = "/v1/chat/completions", "chat"
        body["messages"] = [{"role": "user", "content": text}]
        if draws.random() < 0.2:
            body |= {"logprobs": True, "top_logprobs": 2}
    else:
        path, kind = "/v1/completions", "completion"
        prompts = draws.choice((1, 1, 1, 2))
        body["prompt"] = [text] * prompts if prompts > 1 else text
        if draws.random() < 0.2:
            body |= {"logprobs": 2, "echo": draws.random() < 0.5}
    leaves = draws.uniform(0, MOST_SECONDS) if draws.random() < LEAVES else None
    how = "streamed" if body["stream"] else "whole"
    return Sending(
        f"{kind}, {how}" + (", left" if leaves is not None else ""),
        http_request(path, json.dumps(body).encode()),
        OK | FULL,
        prompts * n,
        leaves,
        may_starve=body.get("service_tier") == "flex",
    )


def hostile(draws: random.Random, model: str) -> Sending:
    """Something that no client should send."""
    kind = draws.choice(tuple(_HOSTILE))
    payload, statuses = _HOSTILE[kind](draws, {"model": model, "prompt": "x", "max_tokens": 4})
    leaves = draws.uniform(0, 1) if statuses == ANY else None
    return Sending(kind, payload, statuses, leaves_after_s=leaves)


# Each gets a source of chance and a good body, whatever of them it needs.
# ruff: noqa: ARG001
Made = tuple[bytes, frozenset[int]]


def _completion(body: object) -> bytes:
    return http_request("/v1/completions", json.dumps(body).encode())


def _no_json(draws: random.Random, body: dict[str, Any]) -> Made:
    content = json.dumps(body).encode()
    return http_request("/v1/completions", content[: draws.randrange(len(content))]), BAD


def _random_body(draws: random.Random, body: dict[str, Any]) -> Made:
    return http_request("/v1/chat/completions", draws.randbytes(draws.randint(1, 2000))), BAD


def _wrong_type(draws: random.Random, body: dict[str, Any]) -> Made:
    field = draws.choice(("max_tokens", "temperature", "n", "stream", "stop", "prompt", "top_p"))
    value: Any = draws.choice(({"a": 1}, [[[]]], -(10**30), [None]))
    return _completion({**body, field: value}), BAD


def _unknown_field(draws: random.Random, body: dict[str, Any]) -> Made:
    return _completion({**body, f"field_{draws.getrandbits(16)}": 1}), BAD


def _out_of_range(draws: random.Random, body: dict[str, Any]) -> Made:
    changes: tuple[dict[str, Any], ...] = (
        {"max_tokens": -1},
        {"n": 100_000},
        {"temperature": -3},
        {"top_p": 7},
        {"prompt": [2**31]},
        {"prompt": [-1]},
        {"prompt": []},
        {"max_tokens": 10**9},
        {"logprobs": 10**6},
    )
    return _completion({**body, **draws.choice(changes)}), BAD


def _too_long(draws: random.Random, body: dict[str, Any]) -> Made:
    return _completion({**body, "prompt": [5] * draws.randint(120_000, 150_000)}), BAD


def _huge(draws: random.Random, body: dict[str, Any]) -> Made:
    return _completion({**body, "prompt": "x" * HUGE_BYTES}), TOO_LARGE


def _nested(draws: random.Random, body: dict[str, Any]) -> Made:
    content = b"[" * draws.randint(1_000, 200_000)
    return http_request("/v1/completions", content), BAD


def _wrong_place(draws: random.Random, body: dict[str, Any]) -> Made:
    path = draws.choice(("/", "/v2/completions", "/v1/models/" + "x" * 500, "/../../etc/passwd"))
    return http_request(path, b"{}", draws.choice(("GET", "PUT", "DELETE"))), BAD


def _wrong_method(draws: random.Random, body: dict[str, Any]) -> Made:
    return http_request("/v1/completions", b"{}", draws.choice(("GET", "PUT", "PATCH"))), BAD


def _wrong_media(draws: random.Random, body: dict[str, Any]) -> Made:
    content = json.dumps(body).encode()
    return http_request("/v1/completions", content, content_type="text/html"), BAD


def _garbage(draws: random.Random, body: dict[str, Any]) -> Made:
    return draws.randbytes(draws.randint(1, 5000)), ANY


def _half(draws: random.Random, body: dict[str, Any]) -> Made:
    whole = _completion(body)
    return whole[: draws.randrange(1, len(whole) - 1)], ANY


def _many_headers(draws: random.Random, body: dict[str, Any]) -> Made:
    headers = "".join(f"X-{i}: {'y' * 200}\r\n" for i in range(draws.randint(100, 2000)))
    return f"GET /health HTTP/1.1\r\nHost: soak\r\n{headers}\r\n".encode(), ANY


_HOSTILE: dict[str, Callable[[random.Random, dict[str, Any]], Made]] = {
    "no JSON": _no_json,
    "random bytes as the body": _random_body,
    "wrong type": _wrong_type,
    "unknown field": _unknown_field,
    "out of range": _out_of_range,
    "prompt beyond the context": _too_long,
    "body too large": _huge,
    "nested too deeply": _nested,
    "wrong path": _wrong_place,
    "wrong method": _wrong_method,
    "wrong media type": _wrong_media,
    "random bytes": _garbage,
    "half a request": _half,
    "too many headers": _many_headers,
}
