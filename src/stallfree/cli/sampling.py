"""The sampling flags of `generate` and `chat`: every one optional, so that each has its defaults.

The ranges are those of `SamplingParams`, which checks them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from stallfree.engine.flags import Flag, check_types, settings_of

_PANEL = "Sampling"


@dataclass(frozen=True, slots=True)
class SamplingSettings:
    """Fields of `SamplingParams` that were given; None stands for those that were not.

    Raises:
        ConfigError: a value has the wrong type.
    """

    max_tokens: Annotated[
        int | None,
        Flag(
            "Most tokens of an answer.",
            "TOKENS",
            unset="256 or what the context leaves; in a chat, all it leaves",
            panel=_PANEL,
        ),
    ] = None
    min_tokens: Annotated[
        int | None,
        Flag("Tokens before an answer may end.", "TOKENS", unset="0", panel=_PANEL),
    ] = None
    temperature: Annotated[
        float | None,
        Flag(
            "0 always takes the likeliest token; higher is more random.",
            "T",
            unset="1; in a chat, 0.7",
            panel=_PANEL,
        ),
    ] = None
    top_p: Annotated[
        float | None,
        Flag(
            "Sample from the likeliest tokens that reach this probability together.",
            "P",
            unset="1",
            panel=_PANEL,
        ),
    ] = None
    top_k: Annotated[
        int | None,
        Flag("Sample from the k likeliest tokens.", "K", unset="all", panel=_PANEL),
    ] = None
    min_p: Annotated[
        float | None,
        Flag(
            "Sample from tokens at least this fraction as likely as the likeliest.",
            "P",
            unset="0",
            panel=_PANEL,
        ),
    ] = None
    repetition_penalty: Annotated[
        float | None,
        Flag("Above 1 makes tokens seen so far less likely.", "X", unset="1", panel=_PANEL),
    ] = None
    presence_penalty: Annotated[
        float | None,
        Flag("Taken once from the logits of tokens in the answer.", "X", unset="0", panel=_PANEL),
    ] = None
    frequency_penalty: Annotated[
        float | None,
        Flag(
            "Taken from the logits of a token each time it is in the answer.",
            "X",
            unset="0",
            panel=_PANEL,
        ),
    ] = None
    stop: Annotated[
        tuple[str, ...],
        Flag("Text that ends an answer; may be given several times.", "TEXT", panel=_PANEL),
    ] = ()
    ignore_eos: Annotated[
        bool,
        Flag("Go on past the model's end tokens.", "", panel=_PANEL),
    ] = False

    def __post_init__(self) -> None:
        check_types(self)

    def given(self) -> dict[str, Any]:
        """The fields that were given, by name."""
        values = ((item, getattr(self, item.field)) for item in settings_of(type(self)))
        return {item.field: value for item, value in values if value != item.default}
