"""The flags that say which server is measured, and against which targets."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

from stallfree.engine.flags import Flag, check_range, check_types, parse_duration
from stallfree.errors import ConfigError

if TYPE_CHECKING:
    from stallfree.bench.endpoint import Endpoint
    from stallfree.bench.metrics import Slo

KEY_VARIABLE = "OPENAI_API_KEY"
_PANEL = "Endpoint"
_TARGETS_PANEL = "Targets"


@dataclass(frozen=True, slots=True)
class EndpointSettings:
    """How requests to the server look.

    Raises:
        ConfigError: a value has the wrong type or cannot be read.
    """

    model: Annotated[
        str | None,
        Flag(
            "Name of the model in requests.",
            "NAME",
            unset="the first that the server lists",
            panel=_PANEL,
        ),
    ] = None
    api: Annotated[
        str,
        Flag("completions, or chat for the chat template's sake.", "API", panel=_PANEL),
    ] = "completions"
    api_key: Annotated[
        str | None,
        Flag(
            "Sent as a bearer token. Prefer the environment variable: a command line is visible "
            "to other users.",
            "KEY",
            unset="none",
            variable=KEY_VARIABLE,
            panel=_PANEL,
        ),
    ] = field(default=None, repr=False)
    extra_body: Annotated[
        str | None,
        Flag(
            "More fields of each request, or other values; null leaves one out. temperature 0 and "
            "ignore_eos true are sent unless changed here.",
            "JSON",
            unset="none",
            panel=_PANEL,
        ),
    ] = None
    header: Annotated[
        tuple[str, ...],
        Flag("One more header; may be given several times.", "'NAME: VALUE'", panel=_PANEL),
    ] = ()
    timeout_s: Annotated[
        float,
        Flag("How long a request may take.", "SECONDS", name="timeout", panel=_PANEL),
    ] = 600.0

    def __post_init__(self) -> None:
        check_types(self)
        check_range("timeout", self.timeout_s, 0.001)
        self._extra_body()
        self._headers()

    def endpoint(self, url: str) -> Endpoint:
        """The server at a URL.

        Raises:
            ConfigError: the URL or the API is none.
        """
        from stallfree.bench.endpoint import Endpoint

        return Endpoint(
            url,
            model=self.model,
            api=self.api,
            api_key=self.api_key,
            extra_body=self._extra_body(),
            headers=self._headers(),
            timeout_s=self.timeout_s,
        )

    def _extra_body(self) -> dict[str, Any]:
        try:
            content = json.loads(self.extra_body or "{}")
        except ValueError as error:
            raise ConfigError(f"extra_body is {self.extra_body!r}, no JSON: {error}") from None
        if not isinstance(content, dict):
            raise ConfigError(f"extra_body is {self.extra_body!r}; it must be a JSON object")
        return content

    def _headers(self) -> dict[str, str]:
        headers = {}
        for line in self.header:
            name, colon, value = line.partition(":")
            if not (colon and name.strip() and line.isascii() and line.isprintable()):
                raise ConfigError(f"header is {name!r}...; write it as 'NAME: VALUE'")
            headers[name.strip()] = value.strip()
        return headers


@dataclass(frozen=True, slots=True)
class SloSettings:
    """Targets that requests are held against.

    Raises:
        ConfigError: a value has the wrong type or is out of range.
    """

    slo_tbt_s: Annotated[
        float | None,
        Flag(
            "Target for the time between tokens, 99 % of those of each request: 200ms, 0.2s.",
            "TIME",
            name="slo_tbt",
            unset="none",
            parse=parse_duration,
            panel=_TARGETS_PANEL,
        ),
    ] = None
    slo_ttft_s: Annotated[
        float | None,
        Flag(
            "Target for the time to the first token: 2s, 500ms.",
            "TIME",
            name="slo_ttft",
            unset="none",
            parse=parse_duration,
            panel=_TARGETS_PANEL,
        ),
    ] = None

    def __post_init__(self) -> None:
        check_types(self)
        check_range("slo_tbt", self.slo_tbt_s, 0.001)
        check_range("slo_ttft", self.slo_ttft_s, 0.001)

    def slo(self) -> Slo | None:
        """The targets; None if there are none."""
        from stallfree.bench.metrics import Slo

        if self.slo_tbt_s is None and self.slo_ttft_s is None:
            return None
        return Slo(tbt_s=self.slo_tbt_s, ttft_s=self.slo_ttft_s)
