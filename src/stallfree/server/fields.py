"""Request fields that JSON allows in several shapes, each brought to one.

Checked by hand, because a value may have millions of elements: the first wrong one ends it. Knows
nothing of the model: whether a token id exists is checked later.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, PlainValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

from stallfree.core.sampling_params import MAX_LOGIT_BIASES

MAX_SHOWN_CHARS = 60
MAX_TOKEN_ID_DIGITS = 10


def refusal(reason: str, field: str | None = None) -> PydanticCustomError:
    """An error that says `reason` of the field being validated, or of `field` in that object."""
    return PydanticCustomError("refusal", "{reason}", {"reason": reason, "field": field})


def shown(value: Any) -> str:
    """`value` as a message shows it: short, whatever the client sent."""
    if isinstance(value, list):
        return f"a list of {len(value)}" if value else "an empty list"
    if isinstance(value, dict):
        return "an object"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, str):
        value = value[: MAX_SHOWN_CHARS + 1]
    text = repr(value)
    return text if len(text) <= MAX_SHOWN_CHARS else f"{text[:MAX_SHOWN_CHARS]}..."


def _prompts(value: Any) -> list[str | list[Any]]:
    """One prompt or several, as text or as token ids; the ids themselves are not checked."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        raise refusal(f"is {shown(value)}; it must be text or token ids, or a list of such")
    if not value:
        raise refusal("is an empty list; it must have at least 1 token")
    if not isinstance(value[0], str | list):
        return [value]
    for index, prompt in enumerate(value):
        if not isinstance(prompt, str | list):
            raise refusal(f"has {shown(prompt)} at index {index}; it must be text or token ids")
    return value


def _stop(value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list) and all(isinstance(text, str) for text in value):
        return tuple(value)
    raise refusal(f"is {shown(value)}; it must be a string or a list of strings")


def _logit_bias(value: Any) -> dict[int, float]:
    if not isinstance(value, dict):
        raise refusal(f"is {shown(value)}; it must be an object")
    if len(value) > MAX_LOGIT_BIASES:
        raise refusal(f"has {len(value)} entries; the limit is {MAX_LOGIT_BIASES}")
    biases = {}
    for key, bias in value.items():
        if not (key.isascii() and key.isdecimal() and len(key) <= MAX_TOKEN_ID_DIGITS):
            raise refusal(f"has the key {shown(key)}; keys are token ids")
        if isinstance(bias, bool) or not isinstance(bias, int | float):
            raise refusal(f"gives token {key} {shown(bias)}; it must be a number")
        biases[int(key)] = bias
    return biases


def _content(value: Any) -> str:
    """The text of a message: a string, or the text parts of a list joined by line ends."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise refusal(f"is {shown(value)}; it must be a string or a list of text parts")
    return "\n".join(_part_text(part) for part in value)


def _part_text(part: Any) -> str:
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
        raise refusal(f"has the part {shown(part)}; it must be an object with a type")
    if part["type"] != "text":
        raise refusal(f"has a part of type {shown(part['type'])}; only text is supported")
    if not isinstance(part.get("text"), str):
        raise refusal(f"has a part whose text is {shown(part.get('text'))}; it must be a string")
    return str(part["text"])


_TEXT_PART = {
    "type": "object",
    "required": ["type", "text"],
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
}

_Text = Annotated[str, Field(min_length=1)]
_Tokens = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
_Several = Annotated[list[_Text | _Tokens], Field(min_length=1)]
Prompts = Annotated[
    list[str | list[Any]],
    PlainValidator(_prompts, json_schema_input_type=_Text | _Tokens | _Several),
]
Stop = Annotated[tuple[str, ...], PlainValidator(_stop, json_schema_input_type=str | list[str])]
LogitBias = Annotated[
    dict[int, float], PlainValidator(_logit_bias, json_schema_input_type=dict[str, float])
]
_TextPart = Annotated[dict[str, str], WithJsonSchema(_TEXT_PART)]
Content = Annotated[str, PlainValidator(_content, json_schema_input_type=str | list[_TextPart])]
