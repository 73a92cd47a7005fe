"""The settings of a server's limits, keys and encryption: what it takes, and from whom."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from stallfree.core.sampling_params import (
    MAX_CHOICES,
    MAX_LOGPROBS,
    MAX_STOP_STRING_CHARS,
    MAX_STOP_STRINGS,
)
from stallfree.engine.flags import Flag, check_file, check_range, parse_bytes, parse_duration
from stallfree.engine.observability_settings import ObservabilitySettings
from stallfree.errors import ConfigError

SHORTEST_TIMEOUT_S = 0.1

_LIMITS = "Server: limits"
_ACCESS = "Server: access"
_ORIGIN = re.compile(r"https?://[^/\s?#@]+|\*")


@dataclass(frozen=True, slots=True)
class LimitSettings(ObservabilitySettings):
    """The part of `ServerSettings` that keeps one client from hurting the others.

    It follows what the server tells of itself.

    Raises:
        ConfigError: a value is out of range, or a file is not there; names it and the limit.
    """

    max_body_bytes: Annotated[
        int,
        Flag("Largest body of a request.", "BYTES", parse=parse_bytes, panel=_LIMITS),
    ] = 1024 * 1024  # reading more would hold up the streams of others
    max_header_bytes: Annotated[
        int,
        Flag(
            "Largest head of a request: its address and headers.",
            "BYTES",
            parse=parse_bytes,
            panel=_LIMITS,
        ),
    ] = 16 * 1024
    max_headers: Annotated[
        int,
        Flag("Most headers of a request.", "COUNT", panel=_LIMITS),
    ] = 100
    max_prompt_tokens: Annotated[
        int | None,
        Flag("Most tokens of a prompt.", "TOKENS", unset="what the context holds", panel=_LIMITS),
    ] = None
    max_prompts: Annotated[
        int,
        Flag("Most prompts of a request.", "COUNT", panel=_LIMITS),
    ] = 512
    max_n: Annotated[
        int,
        Flag("Most completions of one prompt, `n`.", "COUNT", panel=_LIMITS),
    ] = MAX_CHOICES
    max_completions: Annotated[
        int,
        Flag("Most completions of a request, over all its prompts.", "COUNT", panel=_LIMITS),
    ] = 512
    max_logprobs: Annotated[
        int,
        Flag("Most likely tokens that a request may be told for each.", "COUNT", panel=_LIMITS),
    ] = MAX_LOGPROBS
    max_stop_strings: Annotated[
        int,
        Flag("Most stop strings of a request.", "COUNT", panel=_LIMITS),
    ] = MAX_STOP_STRINGS
    max_stop_string_chars: Annotated[
        int,
        Flag("Longest stop string.", "CHARACTERS", panel=_LIMITS),
    ] = MAX_STOP_STRING_CHARS
    max_connections: Annotated[
        int,
        Flag(
            "Most connections that are open, those in a TLS handshake included.",
            "COUNT",
            panel=_LIMITS,
        ),
    ] = 1_000
    max_concurrent_requests: Annotated[
        int,
        Flag(
            "Most requests for tokens and models under way; those who watch take no place.",
            "COUNT",
            panel=_LIMITS,
        ),
    ] = 512
    header_timeout_s: Annotated[
        float,
        Flag(
            "How long the head of a request may take to come, and a TLS handshake.",
            "TIME",
            name="header_timeout",
            parse=parse_duration,
            panel=_LIMITS,
        ),
    ] = 10.0
    body_timeout_s: Annotated[
        float,
        Flag(
            "How long the body of a request may take to come.",
            "TIME",
            name="body_timeout",
            parse=parse_duration,
            panel=_LIMITS,
        ),
    ] = 30.0
    max_unread_bytes: Annotated[
        int,
        Flag(
            "How much of a stream is held for a client that does not read it; beyond, the client "
            "is dropped.",
            "BYTES",
            parse=parse_bytes,
            panel=_LIMITS,
        ),
    ] = 256 * 1024
    unread_timeout_s: Annotated[
        float,
        Flag(
            "How long a client may leave an answer unread before it is dropped.",
            "TIME",
            name="unread_timeout",
            parse=parse_duration,
            panel=_LIMITS,
        ),
    ] = 30.0
    api_keys_file: Annotated[
        Path | None,
        Flag(
            "Keys, each on a line `NAME:KEY`, which may go on with limits: rate=10/s or "
            "rate=60/min for its requests, concurrency=4. Read again on SIGHUP.",
            "FILE",
            unset="no such keys",
            panel=_ACCESS,
        ),
    ] = None
    tls_cert: Annotated[
        Path | None,
        Flag(
            "Certificate to serve HTTPS with, in PEM, followed by those that vouch for it.",
            "FILE",
            unset="plain HTTP",
            panel=_ACCESS,
        ),
    ] = None
    tls_key: Annotated[
        Path | None,
        Flag("Private key of --tls-cert, in PEM.", "FILE", unset="none", panel=_ACCESS),
    ] = None
    cors_origin: Annotated[
        tuple[str, ...],
        Flag(
            "Site whose pages may use this server from a browser, such as https://example.org; "
            "* is any. May be given several times.",
            "URL",
            panel=_ACCESS,
        ),
    ] = ()

    def __post_init__(self) -> None:
        ObservabilitySettings.__post_init__(self)
        for name in ("max_body_bytes", "max_header_bytes", "max_headers", "max_unread_bytes"):
            check_range(name, getattr(self, name), 1)
        for name in ("max_prompts", "max_completions", "max_connections"):
            check_range(name, getattr(self, name), 1)
        check_range("max_concurrent_requests", self.max_concurrent_requests, 1)
        check_range("max_prompt_tokens", self.max_prompt_tokens, 1)
        check_range("max_n", self.max_n, 1, MAX_CHOICES)
        check_range("max_logprobs", self.max_logprobs, 0, MAX_LOGPROBS)
        check_range("max_stop_strings", self.max_stop_strings, 0, MAX_STOP_STRINGS)
        check_range("max_stop_string_chars", self.max_stop_string_chars, 1, MAX_STOP_STRING_CHARS)
        for name in ("header_timeout_s", "body_timeout_s", "unread_timeout_s"):
            check_range(name, getattr(self, name), SHORTEST_TIMEOUT_S)
        self._check_files()
        for origin in self.cors_origin:
            if not _ORIGIN.fullmatch(origin):
                raise ConfigError(
                    f"cors_origin is {origin!r}; write it as https://example.org, without a path, "
                    "or * for any"
                )

    def _check_files(self) -> None:
        for name in ("api_keys_file", "tls_cert", "tls_key"):
            check_file(name, getattr(self, name))
        if (self.tls_cert is None) != (self.tls_key is None):
            given, missing = ("tls_cert", "tls_key")
            if self.tls_cert is None:
                given, missing = missing, given
            raise ConfigError(f"{given} is given without {missing}; HTTPS needs both")
