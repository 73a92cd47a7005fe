"""A server under load, as its URL and its answers to a few small requests show it.

Any server with OpenAI's API will do: nothing here depends on which one it is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from ssl import PROTOCOL_TLS_CLIENT, SSLContext
from typing import Any
from urllib.parse import urlsplit

import httpx

from stallfree.bench.prompts import WORDS, PromptSize
from stallfree.errors import ConfigError, EndpointError

APIS = ("completions", "chat")
CONNECT_TIMEOUT_S = 10.0
KEEPALIVE_S = 2.0  # less than servers keep an idle connection, so that none is closed under us
MAX_MESSAGE_CHARS = 300
_PROBE_REPEATS = 4
_PATHS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}
_DEFAULTS = {"temperature": 0, "ignore_eos": True}
_BAD_REQUEST = (httpx.codes.BAD_REQUEST, httpx.codes.UNPROCESSABLE_ENTITY)


class _UnreachableError(EndpointError):
    """Nothing answers."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where requests go, and what they carry.

    Attributes:
        url: of the server, with or without `/v1`.
        model: None for the first that the server lists.
        api: "completions" or "chat".
        api_key: sent as a bearer token.
        extra_body: more fields of each request, or other values; None leaves a field out.
        headers: more headers.
        timeout_s: how long a request may take as a whole.
        max_model_len: tokens of a prompt and its answer together; None if not known.
        size: of prompts; None until `prepare` has measured it.

    Raises:
        ConfigError: the URL or the API is none.
    """

    url: str
    model: str | None = None
    api: str = "completions"
    api_key: str | None = field(default=None, repr=False)
    extra_body: Mapping[str, object] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    timeout_s: float = 600.0
    max_model_len: int | None = None
    size: PromptSize | None = None

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.base_url)
            is_url = parts.scheme in ("http", "https") and bool(parts.hostname)
            is_url = is_url and parts.port != 0  # reading the port checks it
        except ValueError:
            is_url = False
        if not is_url or parts.query or parts.fragment:
            raise ConfigError(f"{self.url!r} is no URL of a server; write http://127.0.0.1:8000")
        if self.api not in APIS:
            raise ConfigError(f"api is {self.api!r}; it must be one of {', '.join(APIS)}")

    @property
    def base_url(self) -> str:
        """The URL without `/v1`."""
        url = self.url if "://" in self.url else f"http://{self.url}"
        return url.rstrip("/").removesuffix("/v1").rstrip("/")

    @property
    def requests_url(self) -> str:
        """Where requests are posted."""
        return self.base_url + _PATHS[self.api]

    def body(self, prompt: str, output_tokens: int, *, stream: bool = True) -> bytes:
        """The body of a request."""
        asked: dict[str, object] = {"prompt": prompt}
        if self.api == "chat":
            asked = {"messages": [{"role": "user", "content": prompt}]}
        streaming = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
        fields = {"model": self.model, **asked, "max_tokens": output_tokens, **_DEFAULTS}
        fields |= {**self.extra_body, **streaming}
        return json.dumps({k: v for k, v in fields.items() if v is not None}).encode()

    def open(self) -> httpx.AsyncClient:
        """A client with as many connections as there are requests; to be closed."""
        key = {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        fixed = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        return httpx.AsyncClient(
            headers={**fixed, **key, **self.headers},
            timeout=httpx.Timeout(None, connect=CONNECT_TIMEOUT_S),
            limits=httpx.Limits(
                max_connections=None, max_keepalive_connections=None, keepalive_expiry=KEEPALIVE_S
            ),
            trust_env=False,  # a proxy between would be measured too
            verify=True if self.base_url.startswith("https") else SSLContext(PROTOCOL_TLS_CLIENT),
        )


async def prepare(endpoint: Endpoint) -> Endpoint:
    """Find out what is not known of an endpoint: its model, its context, the size of prompts.

    Raises:
        EndpointError: the server is down, refuses these requests or does not understand them.
    """
    async with endpoint.open() as http:
        found = await _find_model(http, endpoint)
        return replace(found, size=await _measure_size(http, found))


async def _find_model(http: httpx.AsyncClient, endpoint: Endpoint) -> Endpoint:
    url = f"{endpoint.base_url}/v1/models"
    try:
        answer = await _ask(http, endpoint, url)
        models = [each for each in answer.get("data") or () if isinstance(each["id"], str)]
    except (EndpointError, KeyError, TypeError) as error:
        if endpoint.model is not None and not isinstance(error, _UnreachableError):
            return endpoint  # not every server lists its models
        if isinstance(error, EndpointError):
            raise
        raise EndpointError(f"{url} lists no models; name one with --model") from None
    name = endpoint.model or (models[0]["id"] if models else None)
    if name is None:
        raise EndpointError(f"{url} lists no models; name one with --model")
    about: dict[str, Any] = next((each for each in models if each["id"] == name), {})
    return replace(
        endpoint, model=name, max_model_len=endpoint.max_model_len or _context_length(about)
    )


def _context_length(about: Mapping[str, Any]) -> int | None:
    """The context of a model as servers tell it: vLLM and stallfree, or llama.cpp."""
    meta = about.get("meta")
    lengths = (about.get("max_model_len"), meta.get("n_ctx") if isinstance(meta, dict) else None)
    return next((each for each in lengths if isinstance(each, int) and each > 0), None)


async def _measure_size(http: httpx.AsyncClient, endpoint: Endpoint) -> PromptSize:
    """Fit a line through the tokens of two prompts, with every word in them equally often."""
    once = await _count(http, endpoint, 1)
    if once is None:
        return PromptSize()
    length = endpoint.max_model_len
    if length is not None and once * _PROBE_REPEATS >= length:
        return PromptSize(once / len(WORDS), is_measured=True)
    often = await _count(http, endpoint, _PROBE_REPEATS)
    if often is None or often <= once:
        return PromptSize()
    per_word = (often - once) / ((_PROBE_REPEATS - 1) * len(WORDS))
    return PromptSize(per_word, once - per_word * len(WORDS), is_measured=True)


async def _count(http: httpx.AsyncClient, endpoint: Endpoint, repeats: int) -> int | None:
    """Tokens of a prompt with all words so many times; None if the server does not tell."""
    body = endpoint.body(" ".join(WORDS * repeats), 1, stream=False)
    usage = (await _ask(http, endpoint, endpoint.requests_url, body)).get("usage")
    count = usage.get("prompt_tokens") if isinstance(usage, dict) else None
    return count if isinstance(count, int) and count > 0 else None


async def _ask(
    http: httpx.AsyncClient, endpoint: Endpoint, url: str, body: bytes | None = None
) -> dict[str, Any]:
    """The JSON object that a URL answers with: to a POST if there is a body, else to a GET."""
    timeout = httpx.Timeout(endpoint.timeout_s, connect=CONNECT_TIMEOUT_S)
    method = "GET" if body is None else "POST"
    try:
        response = await http.request(method, url, content=body, timeout=timeout)
    except httpx.HTTPError as error:
        message = f"{type(error).__name__}: {error}".rstrip(": ")
        raise _UnreachableError(f"{url} cannot be reached: {message}") from None
    if response.status_code != httpx.codes.OK:
        message = f"{url} answers with {error_text(response.status_code, response.content)}"
        if response.status_code in _BAD_REQUEST and body is not None:
            message += (
                "; a field that it does not know can be left out, "
                """as in --extra-body '{"ignore_eos": null}'"""
            )
        raise EndpointError(message)
    try:
        answer = response.json()
    except (ValueError, RecursionError):
        answer = None
    if not isinstance(answer, dict):
        raise EndpointError(f"{url} answers with no JSON object; is it an OpenAI API?")
    return answer


def error_text(status: int, body: bytes) -> str:
    """What an answer with an error says, in one line: its status and its message."""
    text = body.decode(errors="replace")
    try:
        message = error_message(json.loads(text))
    except (ValueError, RecursionError):
        message = None
    return f"status {status}: {message or shorten(text) or 'no message'}"


def error_message(content: object) -> str | None:
    """The message in the JSON of an error, wherever servers put it; None if there is none."""
    if isinstance(content, dict):
        for name in ("error", "message", "detail"):
            if content.get(name):
                return error_message(content[name]) or shorten(json.dumps(content[name]))
        return None
    return shorten(content) if isinstance(content, str) else None


def shorten(text: str) -> str:
    """`text` in one line, of a length that can be read, in characters that can be written."""
    line = " ".join(text.split()).encode(errors="replace").decode()
    return line if len(line) <= MAX_MESSAGE_CHARS else line[: MAX_MESSAGE_CHARS - 3] + "..."
