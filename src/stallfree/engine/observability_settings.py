"""The settings of what a server says of itself: logs and traces."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated
from urllib.parse import urlsplit

from stallfree.engine.flags import Flag, check_choice
from stallfree.engine.replica_settings import ReplicaSettings
from stallfree.errors import ConfigError

LOG_FORMATS = ("text", "json")
LOG_LEVELS = ("debug", "info", "warning", "error")
OTLP_ENDPOINT_VARIABLE = "OTEL_EXPORTER_OTLP_ENDPOINT"


@dataclass(frozen=True, slots=True)
class ObservabilitySettings(ReplicaSettings):
    """The part of `ServerSettings` that says what is told of requests, and to whom.

    Raises:
        ConfigError: a value is out of range; names it and the limit.
    """

    log_format: Annotated[
        str,
        Flag(
            f"How the log is written to stderr: {', '.join(LOG_FORMATS)}. json is an object a "
            "line.",
            "FORMAT",
            panel="Logs and traces",
        ),
    ] = "text"
    log_level: Annotated[
        str,
        Flag(
            f"Least that is logged: {', '.join(LOG_LEVELS)}. info has a line for the end of each "
            "completion request, debug one for that of every request.",
            "LEVEL",
            panel="Logs and traces",
        ),
    ] = "info"
    log_prompts: Annotated[
        bool,
        Flag(
            "Log prompts and answers too. Without this they are in no log.",
            "",
            panel="Logs and traces",
        ),
    ] = False
    otlp_endpoint: Annotated[
        str | None,
        Flag(
            "Base URL of an OpenTelemetry collector (OTLP over HTTP), such as "
            "http://localhost:4318, that gets a trace of each request. Needs the extra otel.",
            "URL",
            unset="no traces",
            variable=OTLP_ENDPOINT_VARIABLE,
            panel="Logs and traces",
        ),
    ] = None

    def __post_init__(self) -> None:
        ReplicaSettings.__post_init__(self)
        check_choice("log_format", self.log_format, LOG_FORMATS)
        check_choice("log_level", self.log_level, LOG_LEVELS)
        if self.otlp_endpoint is not None:
            _check_url("otlp_endpoint", self.otlp_endpoint)


def _check_url(name: str, value: str) -> None:
    try:
        url = urlsplit(value)
        is_good = url.scheme in ("http", "https") and bool(url.hostname)
    except ValueError:
        is_good = False
    if not is_good:
        raise ConfigError(f"{name} is {value!r}; it must be a URL, http://host:port")
